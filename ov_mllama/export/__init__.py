"""The export: checkpoint -> IR -> compressed IR, and the plan for a machine. Start reading at `convert.py`."""
