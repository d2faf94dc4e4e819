"""Convert a checkpoint, run the converted model: what the notebook calls, and where to read on.

- `convert_mllama`: `ov_mllama/convert.py`. What the two IRs compute is in `ov_mllama/graphs.py`, how a graph is traced
  and its KV cache hidden in `ov_mllama/tracing.py`, how files are written whole and checked in `ov_mllama/files.py`.
- `OVMLlamaForConditionalGeneration`: `ov_mllama/model.py`, transformers' side of it. The images are encoded by
  `OVImageEncoder` in `ov_mllama/vision.py`, tokens are computed by `OVLanguageModel` and its sessions in
  `ov_mllama/language.py`, `ov_mllama/cache.py` keeps the books of their KV caches.
- `GenerationStats`: `ov_mllama/stats.py`.

In a program that only runs a converted model, import from `ov_mllama.model`: this file loads the converter too.
"""

from ov_mllama.convert import convert_mllama
from ov_mllama.files import LANGUAGE_MODEL_NAME as LANGUAGE_MODEL
from ov_mllama.files import VISION_ENCODER_NAME as IMAGE_ENCODER
from ov_mllama.language import OVLanguageModel
from ov_mllama.model import OVMLlamaForConditionalGeneration
from ov_mllama.stats import GenerationStats
from ov_mllama.vision import OVImageEncoder

__all__ = [
    "IMAGE_ENCODER",
    "LANGUAGE_MODEL",
    "GenerationStats",
    "OVImageEncoder",
    "OVLanguageModel",
    "OVMLlamaForConditionalGeneration",
    "convert_mllama",
]
