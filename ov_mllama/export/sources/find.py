"""The source of a checkpoint: what a folder holds, told from its files and its config, and how its weights are read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ov_mllama.export.sources.files import stored_tensors, weight_files
from ov_mllama.export.sources.quantized import method_of
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

MODEL_TYPES = {  # model_type of config.json: its use here, and an example
    "mllama": "this converter takes Llama 3.2 Vision ones (model_type 'mllama'), such as "
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama": "a draft model is a Llama for text (model_type 'llama'), such as meta-llama/Llama-3.2-1B-Instruct",
}


@dataclass(frozen=True)
class Source:
    """A checkpoint's files and how they are read.

    Attributes:
        kind: for people, such as "16-bit safetensors" or "bitsandbytes nf4".
        config: as transformers reads it, of the unquantised model.
        settings: files that say how the weights are meant: config.json, adapter_config.json.
        weights: files of weights.
        tensors: return all tensors by stored names, in 16 bit when they are read.
        quantized: whether any are stored in fewer bits.
    """

    kind: str
    config: Any
    settings: list[Path]
    weights: list[Path]
    tensors: Callable[[], dict[str, Tensor]]
    quantized: bool = False


def find_source(folder: Path, model_type: str = "mllama") -> Source:
    """Return the source in a folder, told from names and configs alone; its weights are read later.

    Args:
        model_type: expected `model_type`, of MODEL_TYPES.
    Raises:
        InputError: for another model type, or a kind that is not read, with what to do instead.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint or a hub id.")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != model_type:
        raise InputError(f"{folder} is a '{config.model_type}' checkpoint; {MODEL_TYPES[model_type]}.")
    quantization = quantization_of(folder)
    method = method_of(quantization) if quantization else None
    kind = method.describe(quantization) if method else "16-bit safetensors"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    files = weight_files(folder) if any(folder.glob("*.safetensors")) else []

    def tensors() -> dict[str, Tensor]:
        stored = stored_tensors(files)
        return method.decode(stored, quantization) if method else stored

    return Source(kind, config, [folder / "config.json"], files, tensors, quantized=bool(method))


def quantization_of(folder: Path) -> dict:
    """Return the `quantization_config` of a folder's config.json; empty if there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / 'config.json'} is no config: download it again.") from error


def without_weights(folder: Path) -> InputError:
    """Return the error for a folder without weights that are read."""
    if any(folder.glob("*.xml")):
        return InputError(
            f"{folder} is a converted model: give it as model_dir (make chat MODEL_DIR={folder}), or the "
            "checkpoint it was made of."
        )
    return InputError(
        f"{folder} has a config but no *.safetensors weights: download it completely, or save the model with "
        "save_pretrained(..., safe_serialization=True). Pickled .bin weights are not loaded."
    )
