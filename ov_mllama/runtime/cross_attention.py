"""What each step of the language model reads of the images: the K/V rows of the tiles that its tokens may see, and a
bias that hides the others.

Encoded -> visible_kv -> CrossAttention
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
import torch
from openvino.preprocess import PrePostProcessor

from .shapes import MASKED, MllamaShapes, rows_axis
from .vision import Encoded


@dataclass
class CrossAttention:
    """The images as one step of the language model reads them. Any axis of 1 broadcasts.

    Attributes:
        key_values: by port name, f32: key [batch, kv heads, head_dim, rows], value [batch, kv heads, rows, head_dim];
            after `in_bf16` the bits of bf16, as u16.
        bias: f32 [batch, 1, query, rows], 0 or MASKED; a single 0 where every token may see every row.
        sees_image: f32 [batch, query, 1], 0 for tokens that may see no image, else 1.
    """

    key_values: dict[str, np.ndarray]
    bias: np.ndarray
    sees_image: np.ndarray

    def rows(self, indices: np.ndarray) -> "CrossAttention":
        """That of some rows of the batch; what is the same for all stays one row."""

        def take(array):
            if array.shape[0] == 1:
                return array
            if not isinstance(array, np.ndarray):
                raise ValueError("Rows cannot be chosen in a device's memory: load with use_remote_tensors=False.")
            return array[indices]

        return CrossAttention(
            {name: take(array) for name, array in self.key_values.items()}, take(self.bias), take(self.sees_image)
        )

    def in_bf16(self) -> "CrossAttention":
        """The same, its K/V rounded: once, and not by the plugin at each token."""
        rounded = {
            name: torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
            for name, array in self.key_values.items()
        }
        return replace(self, key_values=rounded)

    def tokens(self, chosen: slice) -> "CrossAttention":
        """That of some of the step's tokens."""
        bias, sees_image = self.bias, self.sees_image
        if bias.shape[2] > 1:
            bias = np.ascontiguousarray(bias[:, :, chosen])
        if sees_image.shape[1] > 1:
            sees_image = np.ascontiguousarray(sees_image[:, chosen])
        return CrossAttention(self.key_values, bias, sees_image)


def no_images(shapes: MllamaShapes) -> CrossAttention:
    """For text only: one all-zero row and the gate closed, so that the cross-attention layers add exactly nothing."""
    key_values = {name: np.zeros(shapes.cross_kv_shape(name, 1, 1), np.float32) for name in shapes.cross_kv_names}
    return CrossAttention(
        key_values, bias=np.zeros((1, 1, 1, 1), np.float32), sees_image=np.zeros((1, 1, 1), np.float32)
    )


def visible_kv(encoded: Encoded, mask: np.ndarray, shapes: MllamaShapes, row_mask: bool = False) -> CrossAttention:
    """The part of the images that tokens may see, and the bias that hides the rest and counts what stands for several.

    A token that may see no tile at all (text before the first image) attends to every row, padding tiles included,
    and only its MLP is switched off: what transformers does, and its open question (transformers#39379). So no row can
    be left out of a step that has such a token. With Meta's row mask it attends to none.

    A key that stands for n tiles that a token may see counts n times: exp(score + log n) is n * exp(score).

    Args:
        mask: bool [batch, query, images * tiles].
        row_mask: the language IR has Meta's (`reference.Reference`).
    """
    sees_any = mask.any(-1, keepdims=True)
    if row_mask and not sees_any.any():
        return no_images(shapes)
    # what is multiplied by 0 may be anything: the tiles that the others see, so that mostly no bias is needed
    instead = mask.any(1, keepdims=True) if row_mask else True
    visible = (mask | (~sees_any & instead)).astype(np.float32)
    counts = visible @ encoded.stands_for.swapaxes(1, 2).astype(np.float32)  # [batch, query, columns]
    needed, key_values = np.asarray(counts.any((0, 1))), encoded.key_values
    if not needed.all():
        key_values = {name: take_tiles(name, array, needed) for name, array in key_values.items()}
    counts = counts[..., needed]
    if (counts == 1).all():
        bias = np.zeros((1, 1, 1, 1), np.float32)
    else:
        bias = np.where(counts > 0, np.log(np.maximum(counts, 1)), np.float32(MASKED)).astype(np.float32)
        bias = bias.repeat(shapes.patches_per_tile, axis=-1)[:, None]
    return CrossAttention(key_values, bias, sees_image=sees_any.astype(np.float32))


def to_ov_tensor(key_value):
    """K/V as its port takes it: numpy has no bf16, of which u16 are the bits."""
    if isinstance(key_value, np.ndarray) and key_value.dtype == np.uint16:
        return ov.Tensor(key_value, key_value.shape, ov.Type.bf16)
    return key_value


def read_in_bf16(model: ov.Model, names: list[str]) -> ov.Model:
    """The model with inputs in bf16 instead of f32. Where it computes in bf16 that changes no number: the plugin rounds
    what is f32 anew at each token, 21 of 44 ms of the 11B's attention over four tiles (benchmarks/README.md).
    """
    ports = PrePostProcessor(model)
    for name in names:
        ports.input(name).tensor().set_element_type(ov.Type.bf16)
    return ports.build()


def tiles_seen(cross_attention_mask: np.ndarray, length: int) -> np.ndarray:
    """Which tiles each token of a prompt of `length` may see: bool [batch, length, images * tiles].

    Args:
        cross_attention_mask: [batch, tokens, images, tiles] from the processor; of tokens beyond it (as when an answer
            is continued) each sees what the last one does.
    """
    mask = cross_attention_mask.astype(bool).reshape(*cross_attention_mask.shape[:2], -1)
    missing = max(length - mask.shape[1], 0)
    return np.concatenate([mask[:, :length], mask[:, -1:].repeat(missing, axis=1)], axis=1)


def take_tiles(name: str, array: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """A contiguous copy of a key's or value's rows that belong to `tiles` (bool [columns])."""
    axis = rows_axis(name)
    by_tile = array.reshape(*array.shape[:axis], len(tiles), -1, *array.shape[axis + 1 :])
    taken = by_tile.compress(tiles, axis)
    return taken.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


class DeviceTensors:
    """A GPU's memory for the K/V that one session reads, so that they go there once per prompt and not once per token:
    OpenVINO copies an input that lies in the host's memory at each inference.

    Encoded images stay with the host, where they are kept and cut (`visible_kv`). Not verified on hardware: there was
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
