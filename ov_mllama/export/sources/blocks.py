"""Quantised matrices whose blocks of rows and columns share a scale, as FP8 and integer formats have them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ov_mllama.export.sources.files import AGAIN
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

CHUNK_WEIGHTS = 1 << 22  # computed at once
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.uint32)


def unchanged(values: torch.Tensor) -> torch.Tensor:
    """Return stored values that are not packed."""
    return values


@dataclass(frozen=True)
class Blocks:
    """A matrix whose blocks share a scale: weight = (value - zero point) * scale + bias, each rounded to `dtype`.

    Attributes:
        shape: rows and columns.
        block: rows and columns that share a scale; the last block may be smaller.
        dtype: of all calculations and the result.
        stored: return the values as stored, [rows, any].
        scale: return the scales, [blocks of rows, blocks of columns].
        unpack: return some of the stored rows as numbers, [rows, columns].
        zero_point: return the zero points, as the scales; None without.
        bias: likewise.
        order: block of each column, i64 [columns]; None if they are in order.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    dtype: torch.dtype
    stored: Callable[[], torch.Tensor]
    scale: Callable[[], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor] = unchanged
    zero_point: Callable[[], torch.Tensor] | None = None
    bias: Callable[[], torch.Tensor] | None = None
    order: torch.Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks in a column and in a row."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])

    def read(self) -> torch.Tensor:
        """Return the weight, computed in chunks of rows."""
        rows, columns = self.shape
        stored, scale = self.stored(), self.on_grid(self.scale)
        zero = None if self.zero_point is None else self.on_grid(self.zero_point)
        bias = None if self.bias is None else self.on_grid(self.bias)
        across = torch.arange(columns) // self.block[1] if self.order is None else self.order
        weight, step = torch.empty(self.shape, dtype=self.dtype), max(1, CHUNK_WEIGHTS // columns)
        for start in range(0, rows, step):
            down = torch.arange(start, min(start + step, rows)) // self.block[0]
            values = self.unpack(stored[start : start + step]).to(self.dtype)
            if zero is not None:
                values = values - zero[down][:, across]
            values = values * scale[down][:, across]
            weight[start : start + step] = values if bias is None else values + bias[down][:, across]
        return weight

    def on_grid(self, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what there is one of for each block, [blocks of rows, blocks of columns]."""
        return read().reshape(self.grid).to(self.dtype)

    def tensor(self) -> Tensor:
        """Return the weight as a `Tensor`, computed when it is read."""
        return Tensor(self.shape, self.dtype, self.read)


def unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the numbers in a matrix's words, the first in the lowest bits: u8 [rows, columns].

    Args:
        words: i32 or u32 [rows, words].
        bits: 4 or 8.
    """
    values = words.contiguous().view(torch.uint8)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(1)
    return values[:, :columns]


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise an InputError unless a tensor has this shape, or this without dimensions of one."""
    squeezed = [tuple(size for size in shape if size > 1) for shape in (tensor.shape, expected)]
    if squeezed[0] != squeezed[1]:
        raise InputError(f"{name} is {list(tensor.shape)} instead of {list(expected)}: {AGAIN}")


def check_rest(tensors: dict[str, Tensor]) -> None:
    """Raise an InputError for a tensor that is still quantised, as it has no scale."""
    for name, tensor in tensors.items():
        if tensor.dtype in QUANTISED:
            raise InputError(f"{name} is quantised ({tensor.dtype}), but the checkpoint has no scale for it: {AGAIN}")
