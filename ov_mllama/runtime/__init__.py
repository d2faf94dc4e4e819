"""Run a converted model: images and tokens in, tokens out. Start reading at `model.py`.

Needs numpy, torch, transformers, openvino, Pillow and psutil; this folder may be copied alone.
"""
