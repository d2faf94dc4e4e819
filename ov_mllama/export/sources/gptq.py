"""GPTQ, AWQ and AutoRound: integers packed into 32-bit words, with a scale and an integer zero point for each group.

weight[row, column] = scales[group, row] * (value[row, column] - zero_point[group, row]), where group is column // group
size, or g_idx[column] if GPTQ ordered the columns by activation (desc_act).

    GPTQ  qweight i32 [columns * bits / 32, rows]  packed along the columns, in order
    AWQ   qweight i32 [columns, rows * 4 / 32]     packed along the rows, in the order of AWQ_ORDER
    both  qzeros  i32 [groups, rows * bits / 32]   packed along the rows, GPTQ's first format less one
          scales  f16 [groups, rows]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ov_mllama.export.sources.files import FIX
from ov_mllama.export.sources.tensors import Packed, Tensor, four_bit_bytes
from ov_mllama.runtime.errors import InputError

Tensors = dict[str, Tensor]

PARTS = ("qweight", "qzeros", "scales", "g_idx")  # g_idx i32 [columns] is optional
BITS = (2, 3, 4, 8)  # 5 to 7 are packed in two ways that no config tells apart
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in the word of each of eight rows
CHUNK_VALUES = 1 << 24  # dequantised at once, 6 bytes each beside the result


class Packing(NamedTuple):
    """A layout of the words.

    Attributes:
        awq: AWQ's instead of GPTQ's.
        less_one: zero points are stored less one.
    """

    awq: bool = False
    less_one: bool = False


# ---- Configs --------------------------------------------------------------------------------------------------------


def describe_gptq(quantization: dict) -> str:
    """Return a phrase for a GPTQ checkpoint; InputError for formats that are not read."""
    gptq_packing(quantization)
    return phrase("GPTQ", quantization)


def describe_awq(quantization: dict) -> str:
    """Return a phrase for an AWQ checkpoint; InputError for versions that are not read."""
    awq_packing(quantization)
    return phrase("AWQ", quantization)


def describe_auto_round(quantization: dict) -> str:
    """Return a phrase for an AutoRound checkpoint; InputError for packings that are not read."""
    auto_round_packing(quantization)
    return phrase("AutoRound", quantization)


def phrase(method: str, quantization: dict) -> str:
    """Return the method with its bits and group size, which single layers may differ from."""
    size = quantization.get("group_size", -1)
    return f"{method}, {bits_of(quantization)} bits, {f'groups of {size}' if size != -1 else 'one group a channel'}"


def bits_of(quantization: dict) -> object:
    """Return the bits of a config: `bits`, or `w_bit` of older AWQ ones."""
    return quantization.get("bits", quantization.get("w_bit"))


def check_bits(method: str, quantization: dict, allowed: tuple[int, ...]) -> None:
    """Raise an InputError unless the config's bits are allowed."""
    if bits_of(quantization) not in allowed:
        raise InputError(
            f"The checkpoint is quantised with {method} in {bits_of(quantization)} bits; only "
            f"{', '.join(map(str, allowed))} are read: {FIX}"
        )


def layout_of(quantization: dict, default: str) -> str:
    """Return the config's name for the layout: `checkpoint_format`, `format` or `version`, as the writers call it."""
    keys = ("checkpoint_format", "format", "version")
    return str(next((quantization[key] for key in keys if quantization.get(key)), default)).lower()


def gptq_packing(quantization: dict) -> Packing:
    """Return the packing of a GPTQ checkpoint: "gptq", or "gptq_v2", whose zero points are stored as they are."""
    layout = layout_of(quantization, "gptq")
    if quantization.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2") or quantization.get("pack_dtype", "int32") != "int32":
        raise InputError(f"The checkpoint is quantised with GPTQ in the layout '{layout}', which is not read: {FIX}")
    check_bits("GPTQ", quantization, BITS)
    return Packing(less_one=layout == "gptq")


def awq_packing(quantization: dict) -> Packing:
    """Return the packing of an AWQ checkpoint, version "gemm"."""
    layout = layout_of(quantization, "gemm")
    layout = "llm-awq" if quantization.get("backend") == "llm-awq" else layout
    if layout != "gemm":
        raise InputError(f"The checkpoint is quantised with AWQ in the version '{layout}', which is not read: {FIX}")
    check_bits("AWQ", quantization, (4,))
    return Packing(awq=True)


def auto_round_packing(quantization: dict) -> Packing:
    """Return the packing of an AutoRound checkpoint: AWQ's, GPTQ's, or that with zero points as they are.

    auto-round 0.16.1: inference/convert_model.py and export/export_to_autoround/export.py; before 0.5 the name of the
    packing was in `backend`, such as "auto_round:gptq:exllamav2".
    """
    backend = str(quantization.get("backend", ""))
    former = backend if backend.startswith("auto_round") else "auto_round:auto_gptq"
    packing = str(quantization.get("packing_format") or former)
    parts = {part.removeprefix("auto_") for part in packing.split(":")[1:]}
    known = {"gptq", "awq", "gptqmodel", "exllamav2", "tritonv2", "triton"}
    activations = quantization.get("act_bits") or 16
    rotated = "rotation" if quantization.get("rotation_config") else ""
    odd = rotated or ("" if quantization.get("data_type", "int").startswith("int") else quantization["data_type"])
    if packing == "auto" or packing.split(":")[0] != "auto_round" or not parts <= known or odd or activations < 16:
        variant = odd or (f"{activations}-bit activations" if activations < 16 else packing)
        raise InputError(f"The checkpoint is quantised with AutoRound ('{variant}'), which is not read: {FIX}")
    check_bits("AutoRound", quantization, (4,) if "awq" in parts else BITS)
    return Packing(awq="awq" in parts, less_one="gptq" in parts)


def decode_gptq(tensors: Tensors, quantization: dict) -> Tensors:
    """Return a GPTQ checkpoint's tensors, dequantised when they are read."""
    return decode(tensors, quantization, gptq_packing(quantization))


def decode_awq(tensors: Tensors, quantization: dict) -> Tensors:
    """Return an AWQ checkpoint's tensors, dequantised when they are read."""
    return decode(tensors, quantization, awq_packing(quantization))


def decode_auto_round(tensors: Tensors, quantization: dict) -> Tensors:
    """Return an AutoRound checkpoint's tensors, dequantised when they are read."""
    return decode(tensors, quantization, auto_round_packing(quantization))


# ---- Tensors --------------------------------------------------------------------------------------------------------


def decode(tensors: Tensors, quantization: dict, packing: Packing) -> Tensors:
    """Return the tensors with one `weight` for each layer's PARTS.

    Which layers are quantised, and in how many bits, is read from the tensors: configs name exceptions in many ways.

    Raises:
        InputError: for a layer with a part missing, of a shape that does not fit, or with an unquantised weight too.
    """
    decoded: Tensors = {}
    layers: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            layers.setdefault(layer, {})[part] = tensor
        else:
            decoded[name] = tensor
    for layer, parts in layers.items():
        missing = [part for part in PARTS[:3] if part not in parts]
        if missing or f"{layer}.weight" in decoded:
            wrong = f"{missing[0]} is missing" if missing else "there is an unquantised weight too"
            raise InputError(f"{layer} holds {', '.join(parts)}, but {wrong}: download the checkpoint again.")
        matrix = Matrix(layer, parts, packing, int(quantization.get("group_size") or -1))
        pack = matrix.pack if matrix.is_packable else None
        shape, dtype = (matrix.rows, matrix.columns), matrix.parts["scales"].dtype
        packed_bytes = four_bit_bytes(*shape, matrix.group_size) if pack else 0
        decoded[f"{layer}.weight"] = Tensor(shape, dtype, matrix.read, pack=pack, packed_bytes=packed_bytes)
    return decoded


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix of rows (outputs) and columns (inputs).

    Args:
        layer: its name.
        parts: tensors by PARTS.
        packing: of the words.
        given_size: group size of the config, which the shapes may contradict; -1 for one group.
    Raises:
        InputError: for shapes that do not fit each other.
    """

    layer: str
    parts: Tensors
    packing: Packing
    given_size: int

    def __post_init__(self):
        if not self.fits():
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in self.parts.items())
            raise InputError(f"{self.layer} has parts that do not fit each other ({shapes}): {FIX}")

    def fits(self) -> bool:
        """Return whether the shapes of the parts, and the groups of the columns, fit each other."""
        if any(len(self.parts[part].shape) != 2 or 0 in self.parts[part].shape for part in PARTS[:3]):
            return False
        if self.bits not in ((4,) if self.packing.awq else BITS):
            return False
        columns, rows, groups = self.columns, self.rows, self.parts["scales"].shape[0]
        expected = {
            "qweight": (columns, rows * 4 // 32) if self.packing.awq else (columns * self.bits // 32, rows),
            "qzeros": (groups, rows * self.bits // 32),
            "g_idx": (columns,),
        }
        if any(self.parts[part].shape != shape for part, shape in expected.items() if part in self.parts):
            return False
        if self.order is None:
            return -(-columns // self.group_size) == groups
        return int(self.order.min()) >= 0 and int(self.order.max()) < groups

    @property
    def rows(self) -> int:
        """Outputs of the layer."""
        return self.parts["scales"].shape[1]

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return self.parts["qzeros"].shape[1] * 32 // self.rows

    @property
    def columns(self) -> int:
        """Inputs of the layer."""
        words = self.parts["qweight"].shape[0]
        return words if self.packing.awq else words * 32 // self.bits

    @property
    def group_size(self) -> int:
        """Columns that share a scale: as the config gives it unless this layer has another number of groups."""
        groups = self.parts["scales"].shape[0]
        given = self.given_size if self.given_size > 0 else self.columns
        return given if -(-self.columns // given) == groups else max(1, self.columns // groups)

    @cached_property
    def order(self) -> np.ndarray | None:
        """The group of each column; None if groups are consecutive columns."""
        if "g_idx" not in self.parts:
            return None
        order = self.parts["g_idx"].read().numpy()
        return None if (order == np.arange(len(order)) // self.group_size).all() else order

    @property
    def is_packable(self) -> bool:
        """True if `pack` returns the matrix: 4 bits, equal groups of consecutive columns, f16 scales."""
        even = self.order is None and self.columns % self.group_size == 0
        return self.bits == 4 and even and self.parts["scales"].dtype == torch.float16

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return the values of some rows, u8 [rows, columns]."""
        words = self.parts["qweight"].read()
        if self.packing.awq:
            return unpack_awq(words[:, start // 8 : -(-stop // 8)].numpy()).T[start % 8 :][: stop - start]
        return unpack(words[:, start:stop].T.contiguous().numpy(), self.bits)

    def zero_points(self) -> np.ndarray:
        """Return the zero points, u8 [rows, groups].

        gptqmodel 7.7.0, utils/model.py: what `convert_gptq_v1_to_v2_format_module` adds to GPTQ's first format is added
        to whole words, with carries, as they were subtracted; to 3 bits by value.
        """
        words = self.parts["qzeros"].read().numpy()
        if self.packing.awq:
            return unpack_awq(words).T
        ones = sum(1 << shift for shift in range(0, 32, self.bits)) if self.packing.less_one and self.bits != 3 else 0
        zeros = unpack(words.view(np.uint32) + np.uint32(ones), self.bits).T
        return (zeros + 1) & 7 if self.packing.less_one and self.bits == 3 else zeros

    def chunks(self) -> Iterator[slice]:
        """Yield slices of rows, of CHUNK_VALUES values at most."""
        step = max(1, CHUNK_VALUES // self.columns // 8) * 8
        yield from (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def read(self) -> torch.Tensor:
        """Return the dequantised matrix [rows, columns], in the type of its scales.

        auto-round 0.16.1, auto_round_extension/torch/qlinear_torch.py, `QuantLinear.forward`: value less zero point is
        exact, their product with the scale is rounded once.
        """
        scales, zeros = self.parts["scales"].read().T, torch.from_numpy(self.zero_points())
        order = np.arange(self.columns) // self.group_size if self.order is None else self.order
        group = torch.from_numpy(order.astype(np.int64))
        weight = torch.empty(self.rows, self.columns, dtype=scales.dtype)
        for rows in self.chunks():
            values = torch.from_numpy(self.values(rows.start, rows.stop)).short()
            values -= zeros[rows][:, group]
            torch.mul(values, scales[rows][:, group], out=weight[rows])
        return weight

    def pack(self) -> Packed:
        """Return the matrix in 4 bits, exactly."""
        shape = (self.rows, -1, self.group_size)
        values = np.concatenate([self.values(rows.start, rows.stop) for rows in self.chunks()])
        scales = np.ascontiguousarray(self.parts["scales"].read().numpy().T)
        return Packed(values.reshape(shape), self.zero_points()[..., None], scales[..., None])


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the values in 32-bit words, u8 [rows, values]: a stream of bits, the lowest first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits == 0:
        parts = [(octets >> shift) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)]
        return np.stack(parts, -1).reshape(len(words), -1)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    return np.packbits(stream.reshape(len(words), -1, bits), axis=-1, bitorder="little")[..., 0]


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """Return the 4-bit values in AWQ's words, u8 [rows, values]."""
    values = unpack(words, 4).reshape(len(words), -1, 8)
    return values[..., list(AWQ_ORDER)].reshape(len(words), -1)
