"""Llama 3.2 Vision for other programs: an OpenAI-compatible server, and captions for folders of pictures."""
