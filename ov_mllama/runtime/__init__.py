"""Inference with a converted model; start reading at `model.py`. May be copied alone.

Needs numpy, torch, transformers, openvino, Pillow, psutil, httpx and filelock.
"""
