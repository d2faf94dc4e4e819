"""Llama 3.2 Vision on OpenVINO: the engine behind the notebook's helper modules."""
