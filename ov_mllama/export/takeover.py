"""Weights that a checkpoint stores in 4 bits, taken over into the IR as they are: no 16-bit copy, no second quantisation.

Checkpoint.load leaves `packed_tensors` out (zeros that take no memory) -> trace -> take_over puts the integers in place
"""

import logging

import numpy as np
import openvino as ov
from openvino import Node, Type
from openvino import opset13 as ops
from torch import nn

from ov_mllama.export.sources.tensors import Packed, Tensor

logger = logging.getLogger(__name__)


def packed_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that can be taken over."""
    return {name: tensor for name, tensor in tensors.items() if tensor.pack}


def take_over(ov_model: ov.Model, model: nn.Module, tensors: dict[str, Tensor]) -> int:
    """Replace the constants of matrices by their 4-bit ones, and return their number.

    Args:
        ov_model: traced from `model`, whose constants share its memory.
        model: with zeros instead of the tensors.
        tensors: by the model's names; those that are not in the graph are left alone.
    """
    addresses = {weight.data_ptr(): name for name, weight in model.state_dict().items() if name in tensors}
    constants = [op for op in ov_model.get_ops() if op.get_type_name() == "Constant" and op.get_byte_size()]
    taken = 0
    for constant in constants:
        name = addresses.get(constant.data.ctypes.data)
        pack = tensors[name].pack if name else None
        if not pack:
            continue
        (convert,) = (port.get_node() for port in constant.output(0).get_target_inputs())
        weight = dequantized(pack(), list(constant.shape), convert.get_element_type(), convert.get_friendly_name())
        for port in convert.output(0).get_target_inputs():
            port.replace_source_output(weight.output(0))
        taken += 1
    return taken


def dequantized(packed: Packed, shape: list[int], dtype: Type, name: str) -> Node:
    """Return the node (value - zero point) * scale, in the form that NNCF writes and plugins keep compressed.

    Args:
        shape: of the matrix.
        dtype: of the result.
        name: prefix of the nodes' names.
    """
    values = ops.convert(constant(packed.values, f"{name}/values"), Type.f16)
    zero_points = ops.convert(constant(packed.zero_points, f"{name}/zero_point"), Type.f16)
    scaled = ops.multiply(ops.subtract(values, zero_points), constant(packed.scales, f"{name}/scale"))
    return ops.convert(ops.reshape(scaled, np.array(shape), special_zero=False), dtype, name=f"{name}/dequantized")


def constant(array: np.ndarray, name: str) -> Node:
    """Return an array as a constant: u8 in 4 bits, other types as they are."""
    return ops.constant(array, dtype=Type.u4 if array.dtype == np.uint8 else None, name=name)
