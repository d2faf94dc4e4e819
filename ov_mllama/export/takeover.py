"""Take 4-bit weights of a checkpoint over into the IR as they are: no 16-bit copy, no second quantisation.

`Checkpoint.load` without `packed_weights` (zeros that take no memory) -> trace -> `take_over` puts the integers there
"""

import logging
import re
from collections.abc import Callable

import numpy as np
import openvino as ov
from openvino import Node, Type
from openvino import opset13 as ops
from torch import nn

from ov_mllama.export.sources.tensors import Packed, Tensor

logger = logging.getLogger(__name__)

PackedWeights = dict[str, Callable[[], Packed]]  # by the model's names
# Matrices of the language model's graph: not its embedding, nor K/V projections of the image, which the vision IR has
TAKEN = re.compile(r"(?!model\.(vision_model|multi_modal_projector)\.|.*(\.cross_attn\.[kv]_proj|embed_tokens)\.).*")


def packed_weights(tensors: dict[str, Tensor]) -> PackedWeights:
    """Return the matrices of the language model that are stored in 4 bits and can be taken over."""
    return {name: tensor.pack for name, tensor in tensors.items() if tensor.pack and TAKEN.match(name)}


def take_over(ov_model: ov.Model, model: nn.Module, packed: PackedWeights) -> None:
    """Replace the constants of matrices by 4-bit ones, which NNCF leaves alone.

    Args:
        ov_model: traced from `model`, with constants that share its memory.
        model: with zeros instead of the matrices.
        packed: the matrices.
    Raises:
        RuntimeError: if a matrix is no constant of the graph, where zeros would be left.
    """
    addresses = {weight.data_ptr(): name for name, weight in model.state_dict().items() if name in packed}
    constants = [op for op in ov_model.get_ops() if op.get_type_name() == "Constant" and op.get_byte_size()]
    found = {name: op for op in constants if (name := addresses.get(op.data.ctypes.data))}
    missing = sorted(packed.keys() - found.keys())
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(packed)} 4-bit matrices are not in the graph, such as {missing[0]}."
        )
    for name, op in found.items():
        (convert,) = (port.get_node() for port in op.output(0).get_target_inputs())  # to f32, in front of a MatMul
        weight = dequantized(packed[name](), op.shape, convert.get_element_type(), op.get_friendly_name())
        for port in convert.output(0).get_target_inputs():
            port.replace_source_output(weight.output(0))


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


def dequantized(packed: Packed, shape: ov.Shape, dtype: Type, name: str) -> Node:
    """Return the node (value - zero point) * scale, in the form that NNCF writes and plugins keep compressed.

    Args:
        shape: of the matrix, [rows, columns].
        dtype: of the result.
        name: prefix of the nodes' names.
    """
    values = ops.convert(constant(packed.values, f"{name}/values"), Type.f16)
    zero_points = ops.convert(constant(packed.zero_points, f"{name}/zero_point"), Type.f16)
    scaled = ops.multiply(ops.subtract(values, zero_points), constant(packed.scales, f"{name}/scale"))
    matrix = ops.reshape(scaled, np.array(list(shape)), special_zero=False)
    return ops.convert(matrix, dtype, name=f"{name}/dequantized")


def constant(array: np.ndarray, name: str) -> Node:
    """Return an array as a constant: u8 in 4 bits, other types as they are."""
    return ops.constant(array, dtype=Type.u4 if array.dtype == np.uint8 else None, name=name)
