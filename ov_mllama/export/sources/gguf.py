"""GGUF files: the header, checked against the file's size before anything is allocated, and the tensors, mapped.

The package `gguf` has the types and their blocks. Its GGUFReader is not used: a damaged count in a header has it loop
2^60 times, and Llama 3's vocabulary takes it 8 s and 0.7 GB, here 0.2 s.
"""

import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ov_mllama.export.sources.files import AGAIN, hint
from ov_mllama.runtime.errors import InputError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT_BYTES = 32  # of tensors, unless the header has `general.alignment`
MAX_DIMENSIONS = 4
SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        shape: in numpy's order, which is the reverse of the file's.
        kind: type of its values.
        data: u8 [rows, bytes of a row], mapped.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata, such as {"general.architecture": "mllama"}, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(path: Path) -> GgufFile:
    """Read a GGUF file's header and map its tensors.

    Raises:
        InputError: if it is no GGUF file of version 2 or 3, truncated or damaged.
    """
    data = mapped_bytes(path)
    cursor = Cursor(data, len(MAGIC))
    with errors_of(path):
        tensor_count = cursor.tensor_count()
        metadata = dict(cursor.pairs())
        entries = [cursor.tensor_info() for _ in range(cursor.checked_count(tensor_count, 24))]
        alignment = metadata.get("general.alignment", ALIGNMENT_BYTES)
        if not (isinstance(alignment, int) and 0 < alignment <= 1 << 16):
            raise ValueError(f"an alignment of {alignment!r}")
        start = -(-cursor.offset // alignment) * alignment
        tensors = {name: mapped(data, start + offset, shape, kind) for name, shape, kind, offset in entries}
        if len(tensors) < len(entries):
            raise ValueError("two tensors of the same name")
    return GgufFile(path, metadata, tensors)


def architecture_of(path: Path) -> str:
    """Return a file's `general.architecture`, which is read alone; InputError as `read_gguf`, or if it has none."""
    cursor = Cursor(mapped_bytes(path), len(MAGIC))
    with errors_of(path):
        cursor.tensor_count()
        for key, value in cursor.pairs():
            if key == "general.architecture":
                return str(value)
        raise ValueError("no general.architecture")


def mapped_bytes(path: Path) -> np.ndarray:
    """Return a file's bytes, u8, mapped; InputError if it is no GGUF file."""
    if path.stat().st_size < len(MAGIC):
        raise InputError(f"{path} is no GGUF file{hint(path)}")
    data = np.memmap(path, np.uint8, "c")
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise InputError(f"{path} is no GGUF file{hint(path)}")
    return data


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Raise what a damaged header causes as an InputError."""
    try:
        yield
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{path} is truncated or damaged ({error}): {AGAIN}") from error


def mapped(data: np.ndarray, offset: int, shape: tuple[int, ...], kind: GGMLQuantizationType) -> Stored:
    """Return a tensor of a file's bytes; ValueError if it is not completely there."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    columns = shape[-1] if shape else 1
    if columns % block:
        raise ValueError(f"rows of {columns} values in blocks of {block}")
    row_bytes = columns // block * block_bytes
    end = offset + math.prod(shape[:-1]) * row_bytes
    if end > len(data):
        raise ValueError(f"{len(data):,} of {end:,} bytes")
    return Stored(shape, kind, data[offset:end].reshape(-1, row_bytes) if end > offset else data[:0])


class Cursor:
    """A position in a header.

    Args:
        data: u8 [bytes], the file.
        offset: of the first byte to read.
    """

    def __init__(self, data: np.ndarray, offset: int):
        self.view, self.offset = memoryview(data), offset  # type: ignore[arg-type]

    def scalar(self, layout: str) -> Any:
        """Return the next value in a `struct` layout; struct.error behind the end."""
        (value,) = struct.unpack_from(layout, self.view, self.offset)
        self.offset += struct.calcsize(layout)
        return value

    def tensor_count(self) -> int:
        """Return the file's number of tensors, behind its version; ValueError for a version that is not read."""
        version = self.scalar("<I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} instead of {VERSIONS[0]} or {VERSIONS[1]}")
        return self.scalar("<Q")

    def pairs(self) -> Iterator[tuple[str, Any]]:
        """Yield the metadata, whose number comes next."""
        for _ in range(self.checked_count(self.scalar("<Q"), 12)):
            key = self.string()
            yield key, self.value(GGUFValueType(self.scalar("<I")))

    def checked_count(self, count: int, item_bytes: int) -> int:
        """Return a count of items of at least so many bytes; ValueError if the file cannot hold them."""
        if count * item_bytes > len(self.view) - self.offset:
            raise ValueError(f"{count:,} items in {len(self.view):,} bytes")
        return count

    def string(self) -> str:
        """Return the next text."""
        length = self.checked_count(self.scalar("<Q"), 1)
        self.offset += length
        return str(self.view[self.offset - length : self.offset], "utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        """Return the next value of metadata: a number, a text or a list of them."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == GGUFValueType.STRING:
            return self.string()
        kind, count = GGUFValueType(self.scalar("<I")), self.scalar("<Q")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(self.checked_count(count, 8))]
        if kind not in SCALARS:
            raise ValueError("a list of lists")
        layout = f"<{self.checked_count(count, struct.calcsize(SCALARS[kind]))}{SCALARS[kind][1]}"
        values = struct.unpack_from(layout, self.view, self.offset)
        self.offset += struct.calcsize(layout)
        return list(values)

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        """Return the next tensor's name, shape in numpy's order, type, and offset from the first one."""
        name, dimensions = self.string(), self.scalar("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions of {name[:80]}")
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))[::-1]
        number = self.scalar("<I")
        if number not in {*GGMLQuantizationType}:
            raise ValueError(f"the unknown type {number} of {name[:80]}")
        return name, shape, GGMLQuantizationType(number), self.scalar("<Q")
