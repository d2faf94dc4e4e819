"""Blocks of quantised GGUF tensors, taken over as integers with scales, or dequantised by the package `gguf`.

Q4_K: 256 values share two float16 factors, and 32 of them 6 bits of scale and of minimum; value = scale * q - minimum.
Q6_K: 256 values share a float16 factor, and 16 of them 8 bits of scale; value = scale * q, q from -32 to 31.
Q8_0: 32 values share a float16 scale. (llama.cpp's ggml-common.h, and gguf 0.19.0, which tests compare with.)
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ov_mllama.export.sources.files import FIX
from ov_mllama.export.sources.gguf import Stored
from ov_mllama.export.sources.tensors import Packed, Tensor
from ov_mllama.runtime.errors import InputError

Q4_K, Q6_K, Q8_0 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0
PLAIN = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F32: torch.float32,
}
GROUPS = {Q4_K: 32, Q6_K: 16, Q8_0: 32}  # values that share a scale, of types that are taken over
VALUES_AT_ONCE = 1 << 22  # decoded in one go: intermediate results take up to 20 bytes each
MAX_ZERO_POINT = 1e8  # beyond, 15 steps are less than float32 resolves beside the minimum

Rows = np.ndarray  # i64, the stored row of each row


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Return whether the package `gguf` dequantises a type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def tensor_of(name: str, stored: Stored, rows: Rows | None = None) -> Tensor:
    """Return a matrix or vector as a `Tensor`: mapped if its type is torch's and its rows stay in order.

    Args:
        name: for the error.
        rows: the stored row of each row, for another order.
    Raises:
        InputError: for a type that is not read.
    """
    if stored.kind not in PLAIN and not can_dequantize(stored.kind):
        raise InputError(f"{name} is stored as {stored.kind.name}, which is not read: {FIX}")
    if stored.kind in PLAIN:
        dtype = PLAIN[stored.kind]
        return Tensor(stored.shape, dtype, partial(read_plain, stored, dtype, rows), mapped=rows is None)
    pack = partial(pack_blocks, stored, rows) if stored.kind in GROUPS and len(stored.shape) == 2 else None
    packed_bytes = 0
    if pack:
        count, groups = math.prod(stored.shape), math.prod(stored.shape) // GROUPS[stored.kind]
        packed_bytes = count // 2 + 8 * groups if stored.kind == Q4_K else count + 4 * groups
    return Tensor(stored.shape, torch.float16, partial(read_blocks, stored, rows), pack=pack, packed_bytes=packed_bytes)


def read_plain(stored: Stored, dtype: torch.dtype, rows: Rows | None) -> torch.Tensor:
    """Return a tensor that is stored in a type of torch."""
    data = stored.data if rows is None else stored.data[rows]
    return torch.from_numpy(data).view(-1).view(dtype).view(stored.shape)


def chunks(stored: Stored) -> list[slice]:
    """Return slices of a tensor's rows that are decoded in one go."""
    count, step = len(stored.data), max(1, VALUES_AT_ONCE // stored.shape[-1])
    return [slice(start, start + step) for start in range(0, count, step)]


def read_blocks(stored: Stored, rows: Rows | None) -> torch.Tensor:
    """Return a quantised tensor as float16; values beyond are infinite."""
    result = np.empty((len(stored.data), stored.shape[-1]), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in chunks(stored):
            result[part] = dequantize(stored.data[part if rows is None else rows[part]], stored.kind)
    return torch.from_numpy(result).view(stored.shape)


def pack_blocks(stored: Stored, rows: Rows | None) -> Packed:
    """Return a matrix of a type in GROUPS as integers with scales."""
    columns, size = stored.shape[-1], GROUPS[stored.kind]
    count, groups = len(stored.data), columns // size
    values = np.empty((count, groups, size), np.uint8 if stored.kind == Q4_K else np.int8)
    scales = np.empty((count, groups, 1), np.float32)
    zero_points = np.empty_like(scales) if stored.kind == Q4_K else None
    decode: Callable = {Q4_K: decode_q4_k, Q6_K: decode_q6_k, Q8_0: decode_q8_0}[stored.kind]
    for part in chunks(stored):
        data = stored.data[part if rows is None else rows[part]]
        decoded = decode(data.reshape(-1, data.shape[1] * GROUPS_PER_BLOCK[stored.kind] // groups))
        targets = (values, scales) if zero_points is None else (values, scales, zero_points)
        for target, source in zip(targets, decoded, strict=True):
            target[part] = source.reshape(target[part].shape)
    return Packed(values, zero_points, scales)


GROUPS_PER_BLOCK = {Q4_K: 8, Q6_K: 16, Q8_0: 1}


def decode_q4_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode Q4_K to value = (q - zero point) * scale, with zero points that are no integers.

    Args:
        blocks: u8 [blocks, 144]: factor of scales and of minima (f16), scales and minima (8 times 6 bits each, 12
            bytes), values (4 times 32 bytes, the low halves first).
    Returns:
        q, u8 [blocks, 8, 32], and scales and zero points, f32 [blocks, 8]. A group without a scale has the same value
        everywhere: q is 0 then, the zero point 1, and the scale the minimum.
    """
    factors = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, (mixed & 15) | (first >> 2) & 48], axis=1) * factors[:, :1]
    minima = np.concatenate([second & 63, (mixed >> 4) | (second >> 2) & 48], axis=1) * factors[:, 1:]
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    q = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    constant = np.abs(minima) > MAX_ZERO_POINT * np.abs(scales)
    if constant.any():
        q[constant] = 0
        scales = np.where(constant, minima, scales)
    zero_points = np.divide(minima, scales, out=np.zeros_like(scales), where=scales != 0)
    return q, scales, zero_points


def decode_q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode Q6_K to value = q * scale.

    Args:
        blocks: u8 [blocks, 210]: low 4 bits (2 times 64 bytes), high 2 bits (2 times 32 bytes), scales (i8 [16]),
            their factor (f16).
    Returns:
        q, i8 [blocks, 16, 16], and scales, f32 [blocks, 16].
    """
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    q = np.empty((len(blocks), 2, 4, 32), np.uint8)
    for quarter in range(4):
        part = low[:, :, 32 * (quarter % 2) :][:, :, :32]
        part = part & 15 if quarter < 2 else part >> 4
        q[:, :, quarter] = part | ((high >> 2 * quarter) & 3) << 4
    scales = blocks[:, 192:208].view(np.int8) * blocks[:, 208:].copy().view(np.float16).astype(np.float32)
    return (q - 32).view(np.int8).reshape(-1, 16, 16), scales


def decode_q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode Q8_0 to value = q * scale.

    Args:
        blocks: u8 [blocks, 34]: scale (f16), values (i8 [32]).
    Returns:
        q, i8 [blocks, 32], and scales, f32 [blocks].
    """
    return blocks[:, 2:].view(np.int8), blocks[:, :2].copy().view(np.float16).astype(np.float32)
