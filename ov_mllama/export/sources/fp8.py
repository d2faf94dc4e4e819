"""Checkpoints in FP8 of transformers ("fp8": blocks, as DeepSeek's; "fbgemm_fp8": rows), dequantised.

weight = value * scale in float32, as in transformers 5.23.0: integrations/finegrained_fp8.py (`Fp8Dequantize`), and
integrations/fbgemm_fp8.py (`FbgemmFp8Linear`), which multiplies its result by a scale for each row.
"""

import re

import torch

from ov_mllama.export.sources.blocks import Blocks, check_rest, check_shape
from ov_mllama.export.sources.files import AGAIN, FIX
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

SCALES = ("weight_scale_inv", "weight_scale")  # of transformers' blocks; of rows, and of vLLM's single scale
ACTIVATIONS = re.compile(r"(^|\.)((input|activation|output|[qkv])_scale|input_scale_ub)$")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def describe(quantization: dict) -> str:
    """Return a phrase such as "fp8 in blocks of 128 x 128".

    Raises:
        InputError: for scales that are not read.
    """
    if quantization.get("scale_fmt", "float") != "float":
        raise InputError(
            f"The checkpoint is in FP8 with scales in {quantization['scale_fmt']}, which are not read: {FIX}"
        )
    if quantization["quant_method"] == "fbgemm_fp8":
        return "fbgemm_fp8"
    size = quantization.get("weight_block_size")
    return f"fp8 in blocks of {size[0]} x {size[1]}" if size else "fp8"


def decode(tensors: dict[str, Tensor], quantization: dict) -> dict[str, Tensor]:
    """Return the tensors dequantised when they are read, in float32.

    Raises:
        InputError: for a weight without scale, a scale without weight, or scales of another shape.
    """
    scales = {name: name.rpartition(".")[0] + ".weight" for name in tensors if name.rpartition(".")[2] in SCALES}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scales and not ACTIVATIONS.search(name)}
    stored = {name: rest.pop(name, None) for name in scales.values()}
    check_rest(rest)
    for scale, name in scales.items():
        weight = stored[name]
        if weight is None or weight.dtype not in FP8:
            what = "missing" if weight is None else f"{weight.dtype}, not in FP8"
            raise InputError(f"{name} is {what} beside {scale}: {AGAIN}")
        rest[name] = dequantised(scale, weight, tensors[scale], quantization.get("weight_block_size"))
    return rest


def dequantised(name: str, weight: Tensor, scale: Tensor, size: list[int] | None) -> Tensor:
    """Return a weight, computed when it is read.

    Args:
        name: of the scale.
        weight: [rows, columns].
        scale: [blocks of rows, blocks of columns], [rows, 1], [rows] or one number.
        size: rows and columns of a block; None if there is one scale, or one for each row.
    Raises:
        InputError: for scales of another shape.
    """
    rows, columns = weight.shape
    single = max(scale.shape, default=1) == 1
    block = (rows, columns) if single else tuple(size) if size else (1, columns)
    blocks = Blocks((rows, columns), (block[0], block[1]), torch.float32, weight.read, scale.read)
    check_shape(name, scale, blocks.grid)
    return blocks.tensor()
