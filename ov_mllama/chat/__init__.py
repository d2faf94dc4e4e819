"""Chat page, and its conversations on disk. Start reading at `layout.py`."""
