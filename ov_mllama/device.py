"""What differs on a GPU: memory of its own, where the K/V of a conversation's images can stay."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import openvino as ov

from ov_mllama.cross_attention import CrossAttention


class DeviceTensors:
    """A GPU's memory for the K/V that one session reads, so that they go there once per prompt and not once per token:
    OpenVINO copies an input that lies in the host's memory at each inference.

    Encoded images stay with the host, where they are kept and cut (`restrict`). Not verified on hardware: there was
    none, and the tests use a stand-in for the context. So it is used only where it is asked for.

    Args:
        context: `ov.RemoteContext` of the device.
    """

    SHAPES = 2  # a prompt has at most two views of its images: its own tokens' and that of the tokens after it

    def __init__(self, context):
        self.context = context
        self._tensors: OrderedDict[tuple, dict] = OrderedDict()  # by shapes; those used last are at the end

    def place(self, cross_attention: CrossAttention) -> CrossAttention:
        """The same with its K/V in the device's memory, allocated once per shape; the next prompt writes over it."""
        arrays = cross_attention.key_values
        shapes = tuple(array.shape for array in arrays.values())
        tensors = self._tensors.pop(shapes, None)
        if tensors is None:
            while len(self._tensors) >= self.SHAPES:
                self._tensors.popitem(last=False)
            tensors = {
                name: self.context.create_tensor(ov.Type.f32, ov.Shape(array.shape), {})
                for name, array in arrays.items()
            }
        self._tensors[shapes] = tensors
        for name, array in arrays.items():
            tensors[name].copy_from(ov.Tensor(np.ascontiguousarray(array), shared_memory=True))
        return replace(cross_attention, key_values=tensors)
