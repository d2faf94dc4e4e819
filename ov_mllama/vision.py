"""The images: what the vision IR makes of them, and the part of it that each step of the language model reads.

processor's tensors -> OVImageEncoder -> Encoded: K/V of all tiles -> restrict -> CrossAttention
"""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov

from ov_mllama.shapes import MASKED, MllamaShapes, rows_axis

# ---- The images -----------------------------------------------------------------------------------------------------


class ImageInputs(NamedTuple):
    """What the processor makes of a batch's images, as numpy arrays.

    Attributes:
        pixel_values: f32 [batch, images, tiles, channels, height, width].
        aspect_ratio_ids: i64 [batch, images], 1-based canvas of each; 0 is no image.
        aspect_ratio_mask: i64 [batch, images, tiles], 1 for real tiles, which come first.
        cross_attention_mask: i64 [batch, tokens, images, tiles], 1 where a token may see a tile.
    """

    pixel_values: np.ndarray
    aspect_ratio_ids: np.ndarray
    aspect_ratio_mask: np.ndarray
    cross_attention_mask: np.ndarray


class EncodedImage(NamedTuple):
    """One image, as it is kept.

    Attributes:
        key_values: by port name, of the tiles that were computed.
        tile_counts: i64 [tiles], how many of the image's tiles each of them stands for.
    """

    key_values: dict[str, np.ndarray]
    tile_counts: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.key_values.values())


class Encoded(NamedTuple):
    """What the vision encoder knows of a batch's images. Of a batch whose rows all hold the same images it is one row,
    which broadcasts.

    Attributes:
        key_values: cross-attention K/V by port name (shapes in `CrossAttention`), rows = columns * patches, one column
            for each computed tile of each image; rows of the batch with fewer end in zeros.
        stands_for: bool [batch, columns, images * tiles], the tiles that each column stands for.
        image_s: seconds for each different image, next to nothing for those kept.
        kept: how many of those were kept encoded from before.
    """

    key_values: dict[str, np.ndarray]
    stands_for: np.ndarray
    image_s: list[float]
    kept: int


def image_keys(images: ImageInputs) -> list[tuple[bytes, ...]]:
    """Digests that tell images apart, for each row of the batch."""
    return [
        tuple(
            b"".join(hashlib.sha256(np.ascontiguousarray(part)).digest() for part in image)
            for image in zip(*row, strict=True)
        )
        for row in zip(*images[:3], strict=True)
    ]


def image_inputs(
    pixels: np.ndarray, aspect_ratio_id: int, tile_mask: np.ndarray, one_padding_tile: bool = False
) -> dict[str, np.ndarray]:
    """Everything that one inference of the vision IR takes, by port name, for one image as the processor gives it.

    Args:
        pixels: f32 [tiles, channels, height, width].
        tile_mask: i64 [tiles], 1 for real tiles, which come first.
        one_padding_tile: compute one that stands for all; False computes each.
    """
    tiles, real = len(tile_mask), int(tile_mask.sum())
    counts = np.ones(min(real + 1, tiles) if one_padding_tile else tiles, np.int64)
    counts[-1] += tiles - len(counts)
    return {
        "pixel_values": np.array(pixels[: len(counts)], np.float32),  # copied, as `language_inputs` says
        "aspect_ratio_ids": np.array([aspect_ratio_id], np.int64),
        "real_tiles": np.array(real, np.int64),
        "tile_counts": counts,
    }


class OVImageEncoder:
    """The vision IR: images -> cross-attention K/V.

    The images used last are kept encoded: a follow-up question does not wait for them again.

    Args:
        path: of the IR.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        cache_bytes: room for encoded images; with the 11B one takes 0.1 GB for each tile that is computed. 0 keeps none
            but the last, whose memory the infer request holds.
        padding_alike: the checkpoint's padding tiles are alike, as the IR's stamp says
            (`convert.padding_tiles_are_alike`): compute one for all.

    Attributes:
        pixels_shape: of one image's pixels, [tiles, channels, height, width].
        output_shapes: of K/V by port name, -1 where any length may be.
    """

    def __init__(
        self,
        path: str | Path,
        shapes: MllamaShapes,
        device: str = "CPU",
        ov_config: dict | None = None,
        cache_bytes: int = 1_000_000_000,
        padding_alike: bool = False,
    ):
        self.shapes, self.cache_bytes, self.padding_alike = shapes, cache_bytes, padding_alike
        self._ir = (path, device, ov_config or {})
        self._request: ov.InferRequest | None = self._compile()
        self._cache: OrderedDict[bytes, EncodedImage] = OrderedDict()  # the image used last is at the end
        model = self._request.get_compiled_model()
        self.pixels_shape = (shapes.max_num_tiles, *static_shape(model.input("pixel_values"))[1:])
        self.output_shapes = {port.get_any_name(): static_shape(port) for port in model.outputs}

    def _compile(self) -> ov.InferRequest:
        return ov.Core().compile_model(*self._ir).create_infer_request()

    def encode(self, images: ImageInputs, keys: list[tuple[bytes, ...]] | None = None) -> Encoded:
        """Images -> cross-attention K/V.

        They are encoded one by one (batching gains nothing where arithmetic is the limit), and each different one once:
        beams, repeated images and the processor's fill-up images cost nothing more.

        Args:
            keys: their `image_keys`, if known already: to digest the pixels takes a while.
        Raises:
            FloatingPointError: K/V that are not finite.
        """
        keys = keys or image_keys(images)
        parts = {
            key: part
            for row_keys, row in zip(keys, zip(*images[:3], strict=True), strict=True)
            for key, part in zip(row_keys, zip(*row, strict=True), strict=True)
        }
        encoded, image_s, kept = {}, [], sum(key in self._cache for key in parts)
        for key, part in parts.items():
            started = time.perf_counter()
            encoded[key] = self._cache.pop(key) if key in self._cache else self._infer(*part)
            self._keep(key, encoded[key])
            image_s.append(time.perf_counter() - started)
        if len(set(keys)) == 1:
            keys = keys[:1]
        key_values, stands_for = join_images([[encoded[key] for key in row] for row in keys], self.shapes)
        return Encoded(key_values, stands_for, image_s, kept)

    def rows_read(self, images: ImageInputs, seen: np.ndarray) -> int:
        """At most how many K/V rows a prompt reads: tokens that see no image read the padding tiles' too (`restrict`).

        Args:
            seen: bool [batch, query, images * tiles].
        """
        real, tiles = images.aspect_ratio_mask.sum(-1), images.aspect_ratio_mask.shape[-1]
        every = np.minimum(real + 1, tiles) if self.padding_alike else np.full_like(real, tiles)
        return int((real if seen.any(-1).all() else every).sum()) * self.shapes.patches_per_tile

    def _infer(self, pixels: np.ndarray, aspect_ratio_id: int, tile_mask: np.ndarray) -> EncodedImage:
        real = int(tile_mask.sum())
        # only then are the padding tiles alike to the last bit: no canvas tile among them, and no pixel in them
        alike = self.padding_alike and real >= self.shapes.canvas_tiles[aspect_ratio_id] and not pixels[real:].any()
        inputs = image_inputs(pixels, aspect_ratio_id, tile_mask, alike)
        rows = len(inputs["tile_counts"]) * self.shapes.patches_per_tile
        # taken out while it computes: one that fails or is interrupted is compiled anew, see `OVLanguageModel.infer`
        request, self._request = self._request or self._compile(), None
        key_values = {
            name: np.empty(self.shapes.cross_kv_shape(name, 1, rows), np.float32) for name in self.output_shapes
        }
        for name, array in key_values.items():  # written where it will be kept: 0.4 GB for four tiles of the 11B
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer(inputs, share_inputs=True)
        request.get_compiled_model().release_memory()  # of what the layers held, while the language model answers
        self._request = request
        for array in key_values.values():
            check_finite(array, "image's keys and values")
        return EncodedImage(key_values, inputs["tile_counts"])

    def _keep(self, key: bytes, image: EncodedImage) -> None:
        self._cache[key] = image
        while self._cache and self.cached_bytes > self.cache_bytes:
            self._cache.popitem(last=False)

    def forget(self) -> None:
        """Drops the images kept."""
        self._cache.clear()

    @property
    def cached_bytes(self) -> int:
        """Bytes that the images kept take."""
        return sum(image.nbytes for image in self._cache.values())


def join_images(batch: list[list[EncodedImage]], shapes: MllamaShapes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images of each row of a batch -> `key_values` and `stands_for` of `Encoded`."""
    lengths = [sum(len(image.tile_counts) for image in row) for row in batch]
    columns, patches = max(lengths), shapes.patches_per_tile
    stands_for = np.zeros((len(batch), columns, len(batch[0]) * shapes.max_num_tiles), bool)
    for row, images in zip(stands_for, batch, strict=True):
        counts = np.concatenate([image.tile_counts for image in images])
        for column, (count, end) in enumerate(zip(counts, counts.cumsum(), strict=True)):
            row[column, end - count : end] = True
    key_values = {}
    for name in shapes.cross_kv_names:
        axis = rows_axis(name)
        rows = [join([image.key_values[name] for image in images], axis) for images in batch]
        padded = [
            join([row, np.zeros(shapes.cross_kv_shape(name, 1, (columns - length) * patches), np.float32)], axis)
            if length < columns
            else row
            for row, length in zip(rows, lengths, strict=True)
        ]
        key_values[name] = join(padded, axis=0)
    return key_values, stands_for


def static_shape(port) -> tuple[int, ...]:
    """A port's shape, -1 where any length may be."""
    return tuple(axis.get_length() if axis.is_static else -1 for axis in port.partial_shape)


def check_finite(array: np.ndarray, what: str) -> None:
    """Refuses numbers that would come out as "!!!!".

    Raises:
        FloatingPointError: with the precision to set.
    """
    if not np.isfinite(array).all():
        raise FloatingPointError(
            f"The {what} are not finite: the numbers have outgrown the precision that this device computes in. Load "
            "the model with ov_config={'INFERENCE_PRECISION_HINT': 'f32'}; if that is set, the weights are broken."
        )


def join(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenated, or the only one itself: K/V of an image are too large to copy for nothing."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


# ---- What the language model reads of the images --------------------------------------------------------------------


@dataclass
class CrossAttention:
    """The images as one step of the language model reads them. Any axis of 1 broadcasts.

    Attributes:
        key_values: by port name, f32: key [batch, kv heads, head_dim, rows], value [batch, kv heads, rows, head_dim].
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


def no_images(shapes: MllamaShapes) -> CrossAttention:
    """For text only: one all-zero row and the gate closed, so that the cross-attention layers add exactly nothing."""
    key_values = {name: np.zeros(shapes.cross_kv_shape(name, 1, 1), np.float32) for name in shapes.cross_kv_names}
    return CrossAttention(
        key_values, bias=np.zeros((1, 1, 1, 1), np.float32), sees_image=np.zeros((1, 1, 1), np.float32)
    )


def restrict(encoded: Encoded, mask: np.ndarray, shapes: MllamaShapes) -> CrossAttention:
    """The part of the images that tokens may see, and the bias that hides the rest and counts what stands for several.

    A token that may see no tile at all (text before the first image) attends to every row, padding tiles included,
    and only its MLP is switched off: what transformers does, and its open question (transformers#39379). So no row can
    be left out of a step that has such a token. A key that stands for n tiles that a token may see counts n times:
    exp(score + log n) is n * exp(score).

    Args:
        mask: bool [batch, query, images * tiles].
    """
    sees_any = mask.any(-1, keepdims=True)
    visible = (mask | ~sees_any).astype(np.float32)
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
