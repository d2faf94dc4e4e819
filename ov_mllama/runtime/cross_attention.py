"""Cross-attention inputs of one step of the language model: K/V rows of the visible tiles, and a bias for the others.

Encoded -> visible_kv -> CrossAttention
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
import torch
from openvino.preprocess import PrePostProcessor

from .errors import InputError
from .shapes import MASKED, MllamaShapes, rows_axis
from .vision import Encoded


@dataclass
class CrossAttention:
    """Image K/V for one step of the language model. Any axis of 1 broadcasts.

    Attributes:
        key_values: by port name, f32: key [batch, kv heads, head_dim, rows], value [batch, kv heads, rows, head_dim];
            after `in_bf16` the bits of bf16, as u16.
        bias: f32 [batch, 1, query, rows], 0 or MASKED; a single 0 if every token sees every row.
        sees_image: f32 [batch, query, 1], 0 for tokens that see no image, else 1.
    """

    key_values: dict[str, np.ndarray]
    bias: np.ndarray
    sees_image: np.ndarray

    def rows(self, indices: np.ndarray) -> "CrossAttention":
        """Select rows of the batch; what broadcasts stays one row."""

        def take(array):
            if array.shape[0] == 1:
                return array
            if not isinstance(array, np.ndarray):
                raise InputError("Batch rows in a GPU's memory cannot be selected: load with use_remote_tensors=False.")
            return array[indices]

        return CrossAttention(
            {name: take(array) for name, array in self.key_values.items()}, take(self.bias), take(self.sees_image)
        )

    def in_bf16(self) -> "CrossAttention":
        """Round the K/V once, instead of in the plugin at each token."""
        rounded = {
            name: torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
            for name, array in self.key_values.items()
        }
        return replace(self, key_values=rounded)

    def tokens(self, query: slice) -> "CrossAttention":
        """Select tokens of the step."""
        bias, sees_image = self.bias, self.sees_image
        if bias.shape[2] > 1:
            bias = np.ascontiguousarray(bias[:, :, query])
        if sees_image.shape[1] > 1:
            sees_image = np.ascontiguousarray(sees_image[:, query])
        return CrossAttention(self.key_values, bias, sees_image)


def no_images(shapes: MllamaShapes) -> CrossAttention:
    """Return inputs for text only: a zero row and a closed gate, with which cross-attention layers add exactly 0."""
    key_values = {name: np.zeros(shapes.cross_kv_shape(name, 1, 1), np.float32) for name in shapes.cross_kv_names}
    return CrossAttention(
        key_values, bias=np.zeros((1, 1, 1, 1), np.float32), sees_image=np.zeros((1, 1, 1), np.float32)
    )


def visible_kv(encoded: Encoded, mask: np.ndarray, shapes: MllamaShapes, row_mask: bool = False) -> CrossAttention:
    """Select the K/V rows that any token sees, and compute the bias that masks and weights them.

    A token that sees no tile (text before the first image) attends to every row, padding tiles included, and only its
    MLP is switched off, as in transformers (transformers#39379): a step with such a token needs all rows. With Meta's
    row mask it attends to none. A key that represents n visible tiles counts n times: exp(score + log n).

    Args:
        mask: bool [batch, query, images * tiles].
        row_mask: the language IR has Meta's (`reference.Reference`).
    """
    sees_any = mask.any(-1, keepdims=True)
    if row_mask and not sees_any.any():
        return no_images(shapes)
    # tokens whose result is multiplied by 0 see what the others do, so that mostly no bias is needed
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


def stack(views: list[CrossAttention | None], batches: list[int]) -> CrossAttention | None:
    """Join the views of one-token steps, of `batches` rows each, into one; K/V are padded with rows that count nothing.
    The views' own K/V are released name by name, as they are large."""
    parts = [replace(view, key_values=dict(view.key_values)) for view in views if view]
    if not parts:  # a plain Llama
        return None
    ends = np.cumsum(batches)
    rows = [next(iter(part.key_values.values())).shape[-1] for part in parts]  # a key's last axis
    bias = np.full((ends[-1], 1, 1, max(rows)), MASKED, np.float32)
    sees_image = np.zeros((ends[-1], 1, 1), np.float32)
    for part, count, end, length in zip(parts, batches, ends, rows, strict=True):
        bias[end - count : end, ..., :length] = part.bias
        sees_image[end - count : end] = part.sees_image
    key_values = {}
    for name in list(parts[0].key_values):
        arrays = [part.key_values.pop(name) for part in parts]
        shape = [int(ends[-1]), *arrays[0].shape[1:]]
        shape[rows_axis(name)] = max(rows)
        key_values[name] = np.zeros(shape, arrays[0].dtype)
        for array, count, end in zip(arrays, batches, ends, strict=True):
            key_values[name][end - count : end, :, : array.shape[2], : array.shape[3]] = array
    return CrossAttention(key_values, bias if bias.any() else np.zeros((1, 1, 1, 1), np.float32), sees_image)


def to_ov_tensor(key_value):
    """Wrap the bits of bf16, which numpy lacks, in an OpenVINO tensor."""
    if isinstance(key_value, np.ndarray) and key_value.dtype == np.uint16:
        return ov.Tensor(key_value, key_value.shape, ov.Type.bf16)
    return key_value


def read_in_bf16(model: ov.Model, names: list[str]) -> ov.Model:
    """Change inputs of a model that computes in bf16 from f32 to bf16. Results stay equal; the plugin no longer rounds
    at each token, 21 of 44 ms of the 11B's attention over four tiles (benchmarks/README.md)."""
    ports = PrePostProcessor(model)
    for name in names:
        ports.input(name).tensor().set_element_type(ov.Type.bf16)
    return ports.build()


def tiles_seen(cross_attention_mask: np.ndarray, length: int) -> np.ndarray:
    """Return the tiles that each token of a prompt sees: bool [batch, length, images * tiles].

    Args:
        cross_attention_mask: [batch, tokens, images, tiles] from the processor; tokens beyond it see as its last one.
    """
    mask = cross_attention_mask.astype(bool).reshape(*cross_attention_mask.shape[:2], -1)
    missing = max(length - mask.shape[1], 0)
    return np.concatenate([mask[:, :length], mask[:, -1:].repeat(missing, axis=1)], axis=1)


def take_tiles(name: str, array: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Copy the rows of a key or value that belong to `tiles` (bool [columns])."""
    axis = rows_axis(name)
    by_tile = array.reshape(*array.shape[:axis], len(tiles), -1, *array.shape[axis + 1 :])
    taken = by_tile.compress(tiles, axis)
    return taken.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


class DeviceTensors:
    """GPU memory (of an `ov.RemoteContext`) for the K/V that one session reads: copied once per prompt, and not by
    OpenVINO at each token. Opt-in, as not verified on hardware; tests use a stand-in for the context."""

    MAX_SHAPES = 2  # of a prompt: for its own tokens, and for those after it

    def __init__(self, context):
        self.context = context
        self._tensors: OrderedDict[tuple, dict] = OrderedDict()  # by shapes, in LRU order

    def place(self, cross_attention: CrossAttention) -> CrossAttention:
        """Copy the K/V into memory allocated once per shape; the next prompt overwrites it."""
        arrays = cross_attention.key_values
        shapes = tuple(array.shape for array in arrays.values())
        tensors = self._tensors.pop(shapes, None)
        if tensors is None:
            while len(self._tensors) >= self.MAX_SHAPES:
                self._tensors.popitem(last=False)
            tensors = {
                name: self.context.create_tensor(ov.Type.f32, ov.Shape(array.shape), {})
                for name, array in arrays.items()
            }
        self._tensors[shapes] = tensors
        for name, array in arrays.items():
            tensors[name].copy_from(ov.Tensor(np.ascontiguousarray(array), shared_memory=True))
        return replace(cross_attention, key_values=tensors)
