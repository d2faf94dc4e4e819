"""Convert a checkpoint and run the converted model: the names that the notebook imports, and their files.

- `convert_mllama`: `ov_mllama/export/convert.py`. The graphs of the two IRs are in `ov_mllama/export/graphs.py`,
  tracing and the stateful KV cache in `ov_mllama/export/tracing.py`, writing in `ov_mllama/export/build.py`.
- `OVMLlamaForConditionalGeneration`: `ov_mllama/runtime/model.py`, transformers' side of it. The images are encoded by
  `OVImageEncoder` in `ov_mllama/runtime/vision.py`, tokens are computed by `OVLanguageModel` and its sessions in
  `ov_mllama/runtime/language.py`, `ov_mllama/runtime/kv_cache.py` is the bookkeeping of their KV caches.
- `GenerationStats`: `ov_mllama/runtime/stats.py`.

In a program that only runs a converted model, import from `ov_mllama.runtime.model`: this file loads the converter too.
"""

from ov_mllama.export.convert import convert_mllama
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME as LANGUAGE_MODEL
from ov_mllama.runtime.ir import VISION_ENCODER_NAME as IMAGE_ENCODER
from ov_mllama.runtime.language import OVLanguageModel
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.stats import GenerationStats
from ov_mllama.runtime.vision import OVImageEncoder

__all__ = [
    "IMAGE_ENCODER",
    "LANGUAGE_MODEL",
    "GenerationStats",
    "OVImageEncoder",
    "OVLanguageModel",
    "OVMLlamaForConditionalGeneration",
    "convert_mllama",
]
