"""What the notebook calls: convert a checkpoint, run the converted model."""

from ov_mllama.convert import convert_mllama
from ov_mllama.generation import GenerationStats
from ov_mllama.model import OVMLlamaForConditionalGeneration

__all__ = ["GenerationStats", "OVMLlamaForConditionalGeneration", "convert_mllama"]
