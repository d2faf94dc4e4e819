"""Tensors that are read when needed, and the 16-bit weights made of them, mapped from files.

Tensor (shape, dtype, read) -> a checkpoint's own file, mapped; or computed, written to a temporary file, mapped
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm.auto import tqdm

from ov_mllama.runtime.errors import DiskError, InputError

BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
WRITTEN_AT_ONCE = 1 << 24  # values converted to 16 bit at a time: of a mapped tensor only these take memory
ALIGNMENT_BYTES = 64  # of each tensor in a temporary file, as OpenVINO aligns constants


@dataclass(frozen=True)
class Packed:
    """A matrix in 4 or 8 bits, in groups: weight = (value - zero point) * scale.

    Attributes:
        values: [rows, groups, group size], u8 of 0 to 15, or i8.
        zero_points: u8 [rows, groups, 1], each 0 to 15; or f32 of any value; None for zeros.
        scales: f16 or f32 [rows, groups, 1].
    """

    values: np.ndarray
    zero_points: np.ndarray | None
    scales: np.ndarray


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
        shape: of the tensor that `read` returns.
        dtype: likewise.
        read: return the tensor: mapped from its file, or computed.
        mapped: whether it is mapped, and takes no memory of the process.
        pack: return the same weight as integers in groups, exactly; None if it is not stored so.
        packed_bytes: of what `pack` returns, in an IR.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    mapped: bool = False
    pack: Callable[[], Packed] | None = None
    packed_bytes: int = 0

    def in_place(self, dtype: torch.dtype) -> bool:
        """Return whether `read` returns the tensor in this type without a copy."""
        return self.mapped and self.dtype == dtype


def four_bit_bytes(rows: int, columns: int, size: int) -> int:
    """Return the bytes of a matrix in 4 bits, with a scale in 16 and a zero point in 4 for each group of `size`."""
    return rows * columns // 2 + rows * -(-columns // size) * 5 // 2


def weight_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Return the 16-bit type of a checkpoint's weights: the one that most are stored in; float16 for one in float32.

    Weights dequantised to float16 make it float16: bfloat16 would take three of their bits, while bfloat16 weights
    change in float16 by at most 3e-8, where they are below 6e-5.
    """
    size = {torch.bfloat16: 0, torch.float16: 0}
    if any(tensor.dtype == torch.float16 and not tensor.mapped for tensor in tensors.values()):
        return torch.float16
    for tensor in tensors.values():
        if tensor.dtype in size:
            size[tensor.dtype] += int(np.prod(tensor.shape))
    return torch.bfloat16 if size[torch.bfloat16] > size[torch.float16] else torch.float16


def computed_bytes(tensors: dict[str, Tensor], dtype: torch.dtype) -> int:
    """Return the size of the temporary file that `materialize` writes."""
    return sum(padded(tensor) for tensor in tensors.values() if not tensor.in_place(dtype))


def padded(tensor: Tensor) -> int:
    """Return the bytes of a tensor in 16 bit, up to the next tensor."""
    return -(-2 * int(np.prod(tensor.shape)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def write(file: BinaryIO, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write a tensor's values in a 16-bit type.

    Raises:
        InputError: for values that the type lacks, such as 1e6 in float16, NaN and infinity.
    """
    for values in tensor.read().reshape(-1).split(WRITTEN_AT_ONCE):
        rounded = values.to(dtype)
        if not rounded.isfinite().all():
            raise InputError(
                f"{name} holds values beyond {dtype}'s {torch.finfo(dtype).max:.3g}, or NaN: save the checkpoint in "
                "bfloat16, or take another."
            )
        file.write(rounded.view(torch.uint8).numpy().data)


def materialize(
    tensors: dict[str, Tensor], dtype: torch.dtype, folder: Path, left_out: frozenset[str] = frozenset()
) -> dict[str, torch.Tensor]:
    """Return the tensors in a 16-bit type, all mapped: from the checkpoint's files, or from an unnamed temporary one.

    Computed tensors are read one at a time; the file is freed with the last tensor that is mapped from it.

    Args:
        dtype: float16 or bfloat16.
        folder: for the temporary file, of `computed_bytes`.
        left_out: names of tensors that are not read: zeros that take no disk stand for computed ones.
    Raises:
        InputError: as `write`.
        DiskError: if the folder's disk is full.
    """
    made = {name: tensor.read() for name, tensor in tensors.items() if tensor.in_place(dtype)}
    computed = {name: tensor for name, tensor in tensors.items() if name not in made}
    if not computed:
        return made
    offset, offsets = 0, {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for name, tensor in tqdm(computed.items(), desc="Reading weights", unit="tensor", leave=False):
                offsets[name] = offset
                if name not in left_out:
                    file.seek(offset)  # written, not mapped: a full disk would end the process
                    write(file, name, tensor, dtype)
                offset += padded(tensor)
            file.truncate(offset)
            file.flush()
            weights = torch.from_numpy(np.memmap(file, np.uint8, "c", shape=(offset,)))
    except OSError as error:
        raise DiskError(
            error.errno,
            f"{folder} cannot hold the weights in 16 bit, {offset / 1e9:.1f} GB and more, while they are converted "
            f"({error.strerror}): free disk space, or choose a folder on another disk",
        ) from error
    for name, start in offsets.items():
        shape = computed[name].shape
        end = start + 2 * int(np.prod(shape))
        made[name] = weights[start:end].view(dtype).view(shape)
    return made
