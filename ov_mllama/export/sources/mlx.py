"""Checkpoints that MLX quantised (mlx-vlm, for Apple's computers), dequantised.

weight = value * scale + bias by groups of a row, each rounded to the scale's type, as MLX 0.32.4 (`mx.dequantize` on a
CPU); names, and a patch embedding with the channels last, as mlx-vlm has them (models/mllama).
"""

from functools import partial

import torch

from ov_mllama.export.sources.blocks import Blocks, check_rest, check_shape, unpacked
from ov_mllama.export.sources.files import AGAIN, FIX
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError


def describe(quantization: dict) -> str:
    """Return a phrase such as "MLX, 4 bit".

    Raises:
        InputError: for a mode or number of bits that is not read.
    """
    settings = [quantization, *(layer for layer in quantization.values() if isinstance(layer, dict))]
    for each in settings:
        mode, bits = each.get("mode", "affine"), each.get("bits", quantization.get("bits"))
        if mode != "affine" or bits not in (4, 8):
            raise InputError(
                f"The checkpoint is quantised by MLX in the mode {mode}, {bits} bit, which is not read: {FIX}"
            )
    return f"MLX, {quantization['bits']} bit"


def decode(tensors: dict[str, Tensor], quantization: dict) -> dict[str, Tensor]:
    """Return the tensors by transformers' names, dequantised when they are read.

    Raises:
        InputError: for a weight without scales or biases, or the reverse, or shapes that do not match.
    """
    parts = ("scales", "biases")
    modules = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in parts)
    quantised = {f"{module}.{part}" for module in modules for part in ("weight", *parts)}
    decoded = {name: tensor for name, tensor in tensors.items() if name not in quantised}
    check_rest(decoded)
    for module in modules:
        for part in ("weight", *parts):
            if f"{module}.{part}" not in tensors:
                raise InputError(f"{module}.{part} is missing beside the others of {module}: {AGAIN}")
        settings = quantization.get(module)
        settings = {**quantization, **(settings if isinstance(settings, dict) else {})}
        words, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", *parts))
        rows, columns = words.shape[0], words.shape[1] * 32 // settings["bits"]
        unpack = partial(unpacked, bits=settings["bits"], columns=columns)
        blocks = Blocks(
            (rows, columns),
            (1, settings["group_size"]),
            scales.dtype,
            words.read,
            scales.read,
            unpack,
            bias=biases.read,
        )
        for part, tensor in zip(parts, (scales, biases), strict=True):
            check_shape(f"{module}.{part}", tensor, blocks.grid)
        decoded[f"{module}.weight"] = blocks.tensor()
    return {name.replace("vision_tower", "vision_model"): in_layout(name, tensor) for name, tensor in decoded.items()}


def in_layout(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in transformers' layout: the patch embedding is [channels out, high, wide, channels in]."""
    if not name.endswith("patch_embedding.weight") or len(tensor.shape) != 4:
        return tensor
    out, high, wide, channels = tensor.shape
    return Tensor((out, channels, high, wide), tensor.dtype, partial(channels_first, tensor))


def channels_first(tensor: Tensor) -> torch.Tensor:
    """Return an image filter with its channels before height and width."""
    return tensor.read().permute(0, 3, 1, 2).contiguous()
