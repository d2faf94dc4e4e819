"""Take quantised weights of a checkpoint over into the IR as they are: no 16-bit copy, no second quantisation.

`Checkpoint.load` without `packed_weights` (zeros that take no memory) -> trace -> `take_over` puts the integers there
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import openvino as ov
from openvino import Node, Type
from openvino import opset13 as ops
from torch import nn
from tqdm.auto import tqdm

from ov_mllama.export.sources.files import AGAIN
from ov_mllama.export.sources.tensors import ALIGNMENT_BYTES, Packed, Tensor
from ov_mllama.runtime.errors import DiskError, InputError

logger = logging.getLogger(__name__)

PackedWeights = dict[str, Callable[[], Packed]]  # by the model's names
# Matrices of the language model's graph: not the K/V projections of the image, which the vision encoder's IR has
TAKEN = re.compile(r"(?!model\.(vision_model|multi_modal_projector)\.|.*\.cross_attn\.[kv]_proj\.).*")
VALUES_AT_ONCE = 1 << 22  # written in one go; even, for two values in a byte


def packed_weights(tensors: dict[str, Tensor]) -> PackedWeights:
    """Return the matrices of the language model that are stored as integers and can be taken over."""
    return {name: tensor.pack for name, tensor in tensors.items() if tensor.pack and TAKEN.match(name)}


def packed_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of the matrices that `packed_weights` returns, in the IR and in a temporary file."""
    return sum(tensor.packed_bytes for name, tensor in tensors.items() if tensor.pack and TAKEN.match(name))


def take_over(ov_model: ov.Model, model: nn.Module, packed: PackedWeights, folder: Path) -> np.ndarray:
    """Replace the constants of matrices by integers with scales, which NNCF leaves alone.

    Args:
        ov_model: traced from `model`, with constants that share its memory.
        model: with zeros instead of the matrices.
        packed: the matrices.
        folder: for an unnamed temporary file, from which the new constants are mapped.
    Returns:
        the mapped file, u8 [bytes]: hold it as long as `ov_model` is used, whose constants do not.
    Raises:
        RuntimeError: if a matrix is no constant of the graph, where zeros would be left.
        InputError: as `finite`.
        DiskError: if the folder's disk is full.
    """
    if not packed:
        return np.zeros(0, np.uint8)
    addresses = {weight.data_ptr(): name for name, weight in model.state_dict().items() if name in packed}
    constants = [op for op in ov_model.get_ops() if op.get_type_name() == "Constant" and op.get_byte_size()]
    found = {name: op for op in constants if (name := addresses.get(op.data.ctypes.data))}
    missing = sorted(packed.keys() - found.keys())
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(packed)} quantised matrices are not in the graph, such as {missing[0]}."
        )
    data, places = written({name: packed[name] for name in found}, folder)
    for name, op in found.items():
        (convert,) = (port.get_node() for port in op.output(0).get_target_inputs())  # to f32, for a MatMul or Gather
        weight = dequantized(data, places[name], op.shape, op.get_friendly_name())
        for port in convert.output(0).get_target_inputs():
            port.replace_source_output(weight.output(0))
    return data


class Place(NamedTuple):
    """The place of an array in the temporary file: first byte, shape, and type in the IR."""

    offset: int
    shape: tuple[int, ...]
    dtype: Type


Parts = dict[str, Place]  # of a matrix, by the names of `Packed`


def written(packed: PackedWeights, folder: Path) -> tuple[np.ndarray, dict[str, Parts]]:
    """Return matrices in a mapped temporary file, and where they are in it; errors as `take_over`."""
    places: dict[str, Parts] = {}
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for name, pack in tqdm(packed.items(), desc="Reading weights", unit="matrix", leave=False):
                parts = finite(name, vars(pack()))
                places[name] = {part: write(file, array) for part, array in parts.items()}
            file.flush()
            return np.memmap(file, np.uint8, "c"), places
    except OSError as error:
        raise DiskError(
            error.errno,
            f"{folder} cannot hold a copy of the quantised weights while they are converted ({error.strerror}): free "
            "disk space, or choose a folder on another disk",
        ) from error


def finite(name: str, parts: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """Return the parts of a matrix that there are; InputError unless its scales and zero points are finite."""
    given = {part: array for part, array in parts.items() if array is not None}
    if not all(np.isfinite(array).all() for part, array in given.items() if part != "values"):
        raise InputError(f"{name} has NaN or infinity among its scales: {AGAIN}")
    return given


def write(file: BinaryIO, array: np.ndarray) -> Place:
    """Append an array to a file, u8 with two values of 0 to 15 in a byte, the first in its lower half."""
    file.seek(-file.tell() % ALIGNMENT_BYTES, os.SEEK_CUR)
    four = array.dtype == np.uint8
    place = Place(file.tell(), array.shape, Type.u4 if four else Type(array.dtype))
    flat = array.reshape(-1)
    for start in range(0, len(flat), VALUES_AT_ONCE):
        values = flat[start : start + VALUES_AT_ONCE]
        file.write((nibbles(values) if four else values).data)
    return place


def nibbles(values: np.ndarray) -> np.ndarray:
    """Return u8 values of 0 to 15, two in a byte."""
    pairs = np.append(values, np.zeros(len(values) % 2, np.uint8)).view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


def warn_of_second_quantization(tensors: dict[str, Tensor]) -> None:
    """Log what it costs that matrices are quantised again which the checkpoint stores quantised in another way.

    Measured on normal weights with channels of different size: the relative error of 4 bits in groups of 64 is 9.4 %;
    on top of NF4 or of GPTQ in groups of 128 it is 13.3 %, on top of INT8 or FP8 9.5 to 9.8 %; INT8 on top of 4 bits
    adds 0.4 % of their error.

    Args:
        tensors: of a quantised checkpoint.
    """
    again = [name for name, tensor in tensors.items() if TAKEN.match(name) and not (tensor.mapped or tensor.pack)]
    if again:
        logger.warning(
            "⚠️ The checkpoint stores %d matrices quantised in a way that the IR cannot take over: they are quantised "
            "again. 4 bits on top of 4 bits lose 1.4 times as much as once, on top of 8 bits hardly more than once; "
            "algo='int8_asym' loses next to nothing more, at twice the size.",
            len(again),
        )


def dequantized(data: np.ndarray, parts: Parts, shape: ov.Shape, name: str) -> Node:
    """Return the node (value - zero point) * scale in f32, in the form that NNCF writes and plugins keep compressed.

    Args:
        data: u8 [bytes], in which the parts of the matrix are.
        shape: of the matrix, [rows, columns].
        name: prefix of the nodes' names.
    """
    dtype = parts["scales"].dtype
    values = ops.convert(constant(data, parts["values"], f"{name}/values"), dtype)
    if "zero_points" in parts:
        zero_points = constant(data, parts["zero_points"], f"{name}/zero_point")
        if zero_points.get_element_type() != dtype:
            zero_points = ops.convert(zero_points, dtype)
        values = ops.subtract(values, zero_points)
    scaled = ops.multiply(values, constant(data, parts["scales"], f"{name}/scale"))
    matrix = ops.reshape(scaled, np.array(list(shape)), special_zero=False, name=f"{name}/dequantized")
    return matrix if dtype == Type.f32 else ops.convert(matrix, Type.f32, name=f"{name}/f32")


def constant(data: np.ndarray, place: Place, name: str) -> Node:
    """Return a constant that shares memory with a part of `data`."""
    count = int(np.prod(place.shape))
    size = -(-count * place.dtype.bitwidth // 8)
    part = data[place.offset : place.offset + size]
    return ops.constant(ov.Tensor(part, ov.Shape(place.shape), place.dtype), name=name, shared_memory=True)
