"""Make IRs: checkpoint -> IR -> smaller IR, and the plan for a machine. Start reading at `convert.py`."""
