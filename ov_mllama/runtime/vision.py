"""The images: what the vision IR makes of them, and how long it is kept.

processor's tensors -> OVImageEncoder -> Encoded: K/V of all tiles
"""

import functools
import hashlib
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov

from .devices import choose, has_own_memory
from .image_cache import EncodedImage, EncodingTimes, ImageCache, join_images
from .inference import POLL_S, Progress, acquire, check_stop, run
from .ir import ir_stamp
from .memory import free_memory, picture_memory, trim_memory
from .shapes import MllamaShapes


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


class Encoded(NamedTuple):
    """What the vision encoder knows of a batch's images. Of a batch whose rows all hold the same images it is one row,
    which broadcasts.

    Attributes:
        key_values: cross-attention K/V by port name (shapes in `CrossAttention`), rows = columns * patches, one column
            for each computed tile of each image; rows of the batch with fewer end in zeros.
        stands_for: bool [batch, columns, images * tiles], the tiles that each column stands for.
        image_s: seconds that each different image took or was waited for, next to nothing for those kept.
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


def different(images: ImageInputs, keys: list[tuple[bytes, ...]]) -> dict[bytes, tuple]:
    """Each different image once, (pixels, aspect ratio id, tile mask) by its key."""
    return {
        key: part
        for row_keys, row in zip(keys, zip(*images[:3], strict=True), strict=True)
        for key, part in zip(row_keys, zip(*row, strict=True), strict=True)
    }


class CancelUnlessAwaited(NamedTuple):
    """An event that counts as not set while a prompt waits for the image."""

    stop: threading.Event
    wanted: list[bytes]
    key: bytes

    def is_set(self) -> bool:
        return self.stop.is_set() and self.key not in self.wanted


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

    The images used last are kept encoded: a follow-up question does not wait for them again. Threads may call it at any
    time, also while the language model computes; they take turns for each image.

    Args:
        path: of the IR.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        cache_bytes: room for encoded images; with the 11B one takes 0.1 GB for each tile that is computed. 0 keeps none
            but the last, whose memory the infer request holds.
        stamp: the IR's, if it was read already. It says whether the checkpoint's padding tiles are alike, so that one
            is computed for all (`convert.padding_tiles_are_alike`), and decides what it is computed in.

    Attributes:
        chosen: what it is computed in on this device, and why (`devices.choose`).
        padding_alike: one padding tile is computed for all.
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
        stamp: dict[str, str] | None = None,
    ):
        stamp = ir_stamp(Path(path)) if stamp is None else stamp
        self.shapes, self.kept = shapes, ImageCache(cache_bytes)
        self.padding_alike = stamp.get("padding_tiles") == "alike"
        self.chosen = choose("vision", stamp, device, ov_config)
        self._ir = (path, device, self.chosen.properties)
        self._own_memory = has_own_memory(device)
        self._request: ov.InferRequest | None = self._compile()
        self._turn = threading.Lock()
        self._awaited: list[bytes] = []  # images that prompts are waiting for
        self._clock = EncodingTimes()
        model = self._request.get_compiled_model()
        self.pixels_shape = (shapes.max_num_tiles, *static_shape(model.input("pixel_values"))[1:])
        self.output_shapes = {port.get_any_name(): static_shape(port) for port in model.outputs}

    def _compile(self) -> ov.InferRequest:
        return ov.Core().compile_model(*self._ir).create_infer_request()

    def encode(
        self,
        images: ImageInputs,
        keys: list[tuple[bytes, ...]] | None = None,
        stop: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Encoded:
        """Images -> cross-attention K/V.

        They are encoded one by one (batching gains nothing where arithmetic is the limit), and each different one once:
        beams, repeated images and the processor's fill-up images cost nothing more.

        Args:
            keys: their `image_keys`, if known already: to digest the pixels takes a while.
            stop: once it is set, the image under way is given up between two layers.
            progress: told which of them is under way.
        Raises:
            Cancelled: `stop` was set; the images that were done are kept.
            FloatingPointError: K/V that are not finite.
            MemoryError: too little for one of them.
        """
        keys = keys or image_keys(images)
        image_s, kept = [], 0
        parts = different(images, keys)
        # held from the beginning: else the first that is new could push the next one out
        encoded = {key: image for key in parts if (image := self.kept.get(key))}
        self._awaited += parts
        try:
            for number, (key, part) in enumerate(parts.items(), 1):
                if progress:
                    left_s = functools.partial(self._clock.left_s, key, int(self._tiles(part[2])))
                    progress.enter(f"Looking at picture {number} of {len(parts)}", left_s)
                started, was_kept = time.perf_counter(), True
                if key not in encoded:
                    encoded[key], was_kept = self._encode_one(key, part, stop)
                kept += was_kept
                image_s.append(time.perf_counter() - started)
        finally:
            for key in parts:
                self._awaited.remove(key)
        if len(set(keys)) == 1:
            keys = keys[:1]
        key_values, stands_for = join_images([[encoded[key] for key in row] for row in keys], self.shapes)
        return Encoded(key_values, stands_for, image_s, kept)

    def prefetch(self, images: ImageInputs, stop: threading.Event | None = None) -> list[float]:
        """Encodes images ahead of the prompt about them, as far as there is room to keep them.

        Prompts go first: between two images it waits while a prompt waits for another one. An image that a prompt waits
        for meanwhile is not given up.

        Args:
            stop: as for `encode`.
        Returns:
            seconds for each different image, next to nothing for those kept already.
        Raises:
            Cancelled, FloatingPointError, MemoryError: as `encode`.
        """
        image_s = []
        for key, part in different(images, image_keys(images)).items():
            started = time.perf_counter()
            while any(other != key for other in self._awaited):
                check_stop(stop)
                time.sleep(POLL_S)
            self._encode_one(key, part, stop and CancelUnlessAwaited(stop, self._awaited, key))
            image_s.append(time.perf_counter() - started)
        return image_s

    def _encode_one(self, key: bytes, part: tuple, stop) -> tuple[EncodedImage, bool]:
        """An image, and whether it was kept: whoever waited here while another thread encoded it finds it so."""
        image = self.kept.get(key)
        if image:
            return image, True
        with acquire(self._turn, stop):
            image = self.kept.get(key)
            if image:
                return image, True
            inputs = self._inputs(part)
            self._check_room(inputs)
            with self._clock.timing(key, len(inputs["tile_counts"])):
                image = self._infer(inputs, stop)
            self.kept.put(key, image)
            return image, False

    def memory_for(self, images: ImageInputs, keys: list[tuple[bytes, ...]]) -> float:
        """Bytes of this machine for the largest that is not kept, while it is encoded (`memory.picture_memory`)."""
        if self._own_memory:
            return 0
        new = [mask for key, (_, _, mask) in different(images, keys).items() if key not in self.kept]
        return max((picture_memory(self.shapes, int(self._tiles(mask))) for mask in new), default=0.0)

    def _tiles(self, tile_mask: np.ndarray) -> np.ndarray:
        """How many tiles of each image are computed, [...] for masks [..., tiles]; else, rarely, all."""
        real, tiles = tile_mask.sum(-1), tile_mask.shape[-1]
        return np.minimum(real + 1, tiles) if self.padding_alike else np.full_like(real, tiles)

    def _check_room(self, inputs: dict[str, np.ndarray]) -> None:
        """Where memory is short, other images are no longer kept.

        Raises:
            MemoryError: that is not enough.
        """
        needed = picture_memory(self.shapes, len(inputs["tile_counts"]))
        if self._own_memory:
            return
        if free_memory() < needed:
            self.forget()
        free = free_memory()
        if free < needed:
            raise MemoryError(
                f"A picture of {int(inputs['real_tiles'])} tiles takes {needed / 1e9:.1f} GB of memory while it is "
                f"looked at and {free / 1e9:.1f} GB are free, {(needed - free) / 1e9:.1f} GB too little: close other "
                "programs, or shrink it into one tile (`images.at_detail`)."
            )

    def rows_read(self, images: ImageInputs, seen: np.ndarray, row_mask: bool = False) -> int:
        """Upper bound of the K/V rows that a prompt reads; tokens without image read padding tiles too (`visible_kv`).

        Args:
            seen: bool [batch, query, images * tiles].
            row_mask: as for `visible_kv`.
        """
        mask = images.aspect_ratio_mask
        tiles = mask.sum(-1) if row_mask or seen.any(-1).all() else self._tiles(mask)
        return int(tiles.sum()) * self.shapes.patches_per_tile

    def _inputs(self, part: tuple) -> dict[str, np.ndarray]:
        pixels, aspect_ratio_id, tile_mask = part
        real = int(tile_mask.sum())
        # only then are the padding tiles alike to the last bit: no canvas tile among them, and no pixel in them
        alike = self.padding_alike and real >= self.shapes.canvas_tiles[aspect_ratio_id] and not pixels[real:].any()
        return image_inputs(pixels, aspect_ratio_id, tile_mask, alike)

    def _infer(self, inputs: dict[str, np.ndarray], stop) -> EncodedImage:
        rows = len(inputs["tile_counts"]) * self.shapes.patches_per_tile
        # taken out while it computes: one that fails or is interrupted is compiled anew, see `OVLanguageModel.infer`
        request, self._request = self._request or self._compile(), None
        key_values = {
            name: np.empty(self.shapes.cross_kv_shape(name, 1, rows), np.float32) for name in self.output_shapes
        }
        for name, array in key_values.items():  # written where it will be kept: 0.4 GB for four tiles of the 11B
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        run(request, inputs, stop)
        request.get_compiled_model().release_memory()  # of what the layers held, while the language model answers
        trim_memory()
        self._request = request
        for array in key_values.values():
            check_finite(array, "image's keys and values")
        return EncodedImage(key_values, inputs["tile_counts"])

    def forget(self) -> None:
        """Drops the images kept."""
        self.kept.clear()
        trim_memory()


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
