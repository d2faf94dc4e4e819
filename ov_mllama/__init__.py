"""Llama 3.2 Vision on OpenVINO: the engine behind the notebook's helper modules. Importing it loads nothing.

    checkpoint -> convert -> compress -> smaller IRs
    images -> vision -> cross-attention K/V; tokens, those -> language -> logits; all of it as `generate` -> model

Begin with `model.py` to run a converted model, with `convert.py` to make one. Imports go one way; `tests/test_house.py`
holds the order.
"""
