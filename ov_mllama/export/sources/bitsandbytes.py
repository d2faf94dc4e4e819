"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8; layers that were skipped stay as stored.

A 4-bit weight W is stored flat, two values a byte, the first in the high half, with these tensors beside it:
    W.quant_state.bitsandbytes__nf4 (or fp4): JSON, as bytes u8: shape, dtype, blocksize, quant_type
    W.quant_map f32 [16]: the values of the 16 codes
    W.absmax f32 [blocks]: scales; u8 if they are quantised too, by W.nested_quant_map f32 [256], W.nested_absmax f32
    [nested blocks], and nested_blocksize and nested_offset of the JSON
An 8-bit weight i8 [rows, columns] has SCB f32 [rows] and weight_format beside it, in its layer.
(bitsandbytes 0.50.2: functional.QuantState.as_dict, nn.modules.Linear8bitLt)
"""

import json
import re
from functools import partial
from math import prod

import torch
from torch.nn import functional

from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

KINDS = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"
OF_4_BIT = re.compile(rf"(.+)\.((?:nested_)?absmax|(?:nested_)?quant_map|{re.escape(STATE)}\w+)")
OF_8_BIT = re.compile(r"(.+)\.(SCB|weight_format)")
ROW_MAJOR = 0  # weight_format; others are permuted for a GPU
RECIPROCAL_OF_127 = 7.874015718698502e-3  # as bitsandbytes 0.50.2 writes it, in int8_vectorwise_dequant
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHUNK_ELEMENTS = 1 << 22  # dequantised at a time; a multiple of every block size
FIX = "download it again, or convert the 16-bit checkpoint that it was made of."


def describe(quantization: dict) -> str:
    """Return the kind of a checkpoint, such as "bitsandbytes nf4".

    Raises:
        InputError: for a 4-bit type that is not read.
    """
    if quantization.get("load_in_8bit"):
        return "bitsandbytes 8 bit"
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    if kind not in KINDS:
        raise InputError(
            f"The checkpoint is quantised by bitsandbytes to '{kind}', which is not read (only {', '.join(KINDS)} and "
            "8 bit): convert the 16-bit checkpoint that it was made of."
        )
    return f"bitsandbytes {kind}"


def decode(tensors: dict[str, Tensor], quantization: dict) -> dict[str, Tensor]:
    """Return the tensors by the names of the unquantised checkpoint, dequantised when they are read.

    Raises:
        InputError: if one that belongs to a weight is missing, left over, or does not fit it.
    """
    weights, parts = {}, {}
    for name, tensor in tensors.items():
        if found := OF_4_BIT.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = tensor
        elif found := OF_8_BIT.fullmatch(name):
            parts.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
        else:
            weights[name] = tensor
    for name in parts:
        if name not in weights:
            raise InputError(f"{name} is missing, though {', '.join(parts[name])} of it are there: {FIX}")
    return {name: dequantised(name, tensor, parts.get(name, {})) for name, tensor in weights.items()}


def dequantised(name: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Return a weight that dequantises itself when it is read; one that is not quantised, as it is.

    Args:
        parts: the tensors beside it.
    """
    if "SCB" in parts:
        return of_8_bit(name, weight, parts)
    states = [part for part in parts if part.startswith(STATE)]
    if states:
        return of_4_bit(name, weight, parts, parts[states[0]])
    if parts or weight.dtype in (torch.int8, torch.uint8):
        raise InputError(f"{name} is quantised, but its {STATE}* or SCB is missing: {FIX}")
    return weight


def of_8_bit(name: str, weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Return an 8-bit weight as f32 [rows, columns], as bitsandbytes' own function does."""
    form = int(parts["weight_format"].read()) if "weight_format" in parts else ROW_MAJOR
    if form != ROW_MAJOR:
        raise InputError(f"{name} is stored in a GPU's order (weight_format {form}), which is not read: {FIX}")
    others = [part for part in parts if part not in ("SCB", "weight_format")]
    check(not others, name, f"{', '.join(others)} left over")
    fits = weight.dtype == torch.int8 and len(weight.shape) == 2 and parts["SCB"].shape == weight.shape[:1]
    check(fits, name, f"{list(parts['SCB'].shape)} scales SCB for {weight.dtype} {list(weight.shape)}")
    return Tensor(weight.shape, torch.float32, partial(read_8_bit, weight, parts["SCB"]))


def read_8_bit(weight: Tensor, scales: Tensor) -> torch.Tensor:
    """Return an 8-bit weight dequantised, f32 [rows, columns]."""
    values, by_row, made = weight.read(), scales.read().float().view(-1, 1), torch.empty(weight.shape)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(made), rows):
        some = slice(start, start + rows)
        made[some] = (values[some] * by_row[some]).mul_(RECIPROCAL_OF_127)
    return made


def of_4_bit(name: str, weight: Tensor, parts: dict[str, Tensor], stored_state: Tensor) -> Tensor:
    """Return a 4-bit weight in its unquantised shape and type.

    Raises:
        InputError: if a part is missing or its size does not fit.
    """
    nested = "absmax" in parts and parts["absmax"].dtype == torch.uint8
    try:
        state = json.loads(bytes(stored_state.read().numpy()))
        shape, block, dtype = tuple(state["shape"]), int(state["blocksize"]), DTYPES[state["dtype"]]
        outer_block, _ = (int(state["nested_blocksize"]), float(state["nested_offset"])) if nested else (1, 0.0)
        count, blocks = prod(shape), -(-prod(shape) // block)
        expected = {"absmax": blocks, "quant_map": 16}
        expected |= {"nested_absmax": -(-blocks // outer_block), "nested_quant_map": 256} if nested else {}
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise InputError(f"{name}.{STATE}* is no description of a 4-bit weight: {FIX}") from error
    absent = [part for part in expected if part not in parts]
    others = [part for part in parts if part not in expected and not part.startswith(STATE)]
    check(not absent, name, f"{', '.join(absent)} missing")
    check(not others, name, f"{', '.join(others)} left over")
    for part, length in expected.items():
        found = prod(parts[part].shape)
        check(found == length, name, f"{found:,} values of {part} instead of {length:,}")
    size = prod(weight.shape) * weight.dtype.itemsize
    check(size == -(-count // 2), name, f"{size:,} bytes instead of {-(-count // 2):,} for {list(shape)}")
    check(block > 0 and CHUNK_ELEMENTS % block == 0, name, f"blocks of {block}")
    return Tensor(shape, dtype, partial(read_4_bit, weight, parts, state, shape, dtype))


def check(holds: bool, name: str, problem: str) -> None:
    """Raise an InputError about a weight unless a condition holds."""
    if not holds:
        raise InputError(f"{name} is no complete bitsandbytes weight ({problem}): {FIX}")


def read_4_bit(
    weight: Tensor, parts: dict[str, Tensor], state: dict, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return a 4-bit weight dequantised: code's value * block's scale, computed in f32 (functional.dequantize_4bit)."""
    packed, codes = weight.read().reshape(-1).view(torch.uint8), parts["quant_map"].read().float()
    pair = torch.stack((codes.repeat_interleave(16), codes.repeat(16)), 1)  # of a byte, high half first
    block, made = state["blocksize"], torch.empty(prod(shape), dtype=dtype)
    scales = read_scales(parts, state)
    for start in range(0, len(made), CHUNK_ELEMENTS):
        part = made[start : start + CHUNK_ELEMENTS]
        stored = packed[start // 2 : -(-(start + len(part)) // 2)]
        values = functional.embedding(stored.int(), pair).reshape(-1)[: len(part)]
        of_part = scales[start // block : -(-(start + len(part)) // block)].repeat_interleave(block)
        part.copy_(values * of_part[: len(part)])
    return made.view(shape)


def read_scales(parts: dict[str, Tensor], state: dict) -> torch.Tensor:
    """Return a 4-bit weight's scales, f32 [blocks]; quantised ones are dequantised, then shifted by their mean."""
    scales = parts["absmax"].read().reshape(-1)
    if "nested_absmax" not in parts:
        return scales.float()
    outer = parts["nested_absmax"].read().float().reshape(-1).repeat_interleave(state["nested_blocksize"])
    codes = parts["nested_quant_map"].read().float()
    return codes[scales.int()] * outer[: len(scales)] + torch.tensor(state["nested_offset"], dtype=torch.float32)
