"""The source of a checkpoint: what a folder holds, told from its files and its config, and how its weights are read."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ov_mllama.export.sources.files import hint, stored_tensors, weight_files
from ov_mllama.export.sources.lora import CONFIG, adapter_files, adapter_settings, is_adapter
from ov_mllama.export.sources.meta import PARAMS, config_of, is_meta, shards_of
from ov_mllama.export.sources.meta import stored_tensors as meta_tensors
from ov_mllama.export.sources.others import another_model, without_config
from ov_mllama.export.sources.quantized import method_of
from ov_mllama.export.sources.source import Source
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

logger = logging.getLogger(__name__)

OWN_CONFIG = "take the config.json that belongs to the weights, from where they were downloaded or saved."


def find_source(folder: Path, model_type: str = "mllama") -> Source:
    """Return the source in a folder, told from names and configs alone; its weights are read later.

    Args:
        model_type: expected `model_type`, of `others.MODEL_TYPES`.
    Raises:
        InputError: for another model type, or a kind that is not read, with what to do instead.
    """
    if is_meta(folder) and model_type == "mllama":
        config, files = config_of(folder), shards_of(folder)
        return Source("Meta's own", config, [folder / PARAMS], files, partial(meta_tensors, files, config))
    if is_adapter(folder):
        adapter, stored = adapter_settings(folder), adapter_files(folder)
        return Source("LoRA adapter", None, [folder / CONFIG], stored, partial(stored_tensors, stored), adapter)
    if (folder / CONFIG).is_file():
        logger.info("%s holds a complete model, so its %s is not used", folder, CONFIG)
    if not (folder / "config.json").is_file():
        raise without_config(folder)
    settings = settings_of(folder)
    if settings.get("model_type") != model_type:
        raise another_model(folder, settings.get("model_type"), model_type)
    quantization = settings.get("quantization_config") or {}
    mlx = settings.get("quantization") or {}
    if not (isinstance(quantization, dict) and isinstance(mlx, dict)):
        raise InputError(f"{folder / 'config.json'} names no method of quantisation: {OWN_CONFIG}")
    quantization = {**mlx, "quant_method": "mlx"} if mlx else quantization
    config = read_config(folder)
    method = method_of(quantization) if quantization else None
    kind = method.describe(quantization) if method else "16-bit safetensors"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    files = weight_files(folder) if any(folder.glob("*.safetensors")) else []

    def tensors() -> dict[str, Tensor]:
        stored = stored_tensors(files)
        return method.decode(stored, quantization) if method else stored

    return Source(kind, config, [folder / "config.json"], files, tensors, quantized=bool(method))


def read_config(folder: Path) -> Any:
    """Return a folder's config.json as transformers reads it.

    Raises:
        InputError: if it has values that transformers refuses, or fails at, or names layers that there are not.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        vision = getattr(config, "vision_config", None)
        read, layers = (vision.intermediate_layers_indices, vision.num_hidden_layers) if vision else ([], 0)
        beyond = not all(-1 <= index < layers for index in read)
    except Exception as error:  # noqa: BLE001 - libraries raise whatever they like
        raise InputError(f"{folder / 'config.json'} cannot be used ({last_line(error)}): {OWN_CONFIG}") from error
    if beyond:
        raise InputError(
            f"{folder / 'config.json'} has the projector read the layers {read} of a vision tower which has {layers}: "
            f"{OWN_CONFIG}"
        )
    return config


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, up to its first full stop."""
    return str(error).strip().rpartition("\n")[2].strip().partition(". ")[0]


def settings_of(folder: Path) -> dict:
    """Return a folder's config.json.

    Raises:
        InputError: if it is none.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no config{hint(path)}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no config{hint(path)}")
    return settings
