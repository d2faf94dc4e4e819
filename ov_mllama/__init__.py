"""Llama 3.2 Vision on OpenVINO: the package behind the notebook's helper modules. Importing it loads nothing.

    checkpoint -> export/convert.py -> export/compress.py -> smaller IRs
    images -> runtime/vision.py -> cross-attention K/V; tokens and those -> runtime/language.py -> logits

Start with `ov_mllama/runtime/model.py` to run a converted model, with `ov_mllama/export/convert.py` to make one;
`docs/architecture.md` walks through both. Imports go downwards only; `tests/test_house.py` checks them.
"""

from ov_mllama.deprecated import install as _resolve_old_module_paths

_resolve_old_module_paths()
