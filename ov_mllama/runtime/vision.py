"""Vision encoder: from images to cross-attention K/V, cached.

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
from .errors import NumericalError, OutOfMemoryError
from .image_cache import EncodedImage, EncodingTimes, ImageCache, join_images
from .image_store import ImageStore, encoder_id, store_key
from .inference import POLL_S, Progress, acquire, check_stop, run
from .ir import ir_stamp
from .memory import free_memory, picture_memory, trim_memory
from .shapes import MllamaShapes, static_shape


class ImageInputs(NamedTuple):
    """The processor's tensors for a batch's images, as arrays.

    Attributes:
        pixel_values: f32 [batch, images, tiles, channels, height, width].
        aspect_ratio_ids: i64 [batch, images], 1-based canvas of each; 0 is no image.
        aspect_ratio_mask: i64 [batch, images, tiles], 1 for real tiles, which come first.
        cross_attention_mask: i64 [batch, tokens, images, tiles], 1 where a token sees a tile.
    """

    pixel_values: np.ndarray
    aspect_ratio_ids: np.ndarray
    aspect_ratio_mask: np.ndarray
    cross_attention_mask: np.ndarray


class Encoded(NamedTuple):
    """Encoded images of a batch; one row, which broadcasts, if all rows have the same images.

    Attributes:
        key_values: cross-attention K/V by port name (shapes in `CrossAttention`), rows = columns * patches, one column
            per computed tile of each image, padded with zeros.
        stands_for: bool [batch, columns, images * tiles], the tiles that each column represents.
        image_s: seconds for each different image, about 0 for cached ones.
        cached: number of them that were in the cache.
    """

    key_values: dict[str, np.ndarray]
    stands_for: np.ndarray
    image_s: list[float]
    cached: int


def image_keys(images: ImageInputs) -> list[tuple[bytes, ...]]:
    """Return a digest of each image, for each row of the batch."""
    return [
        tuple(
            b"".join(hashlib.sha256(np.ascontiguousarray(part)).digest() for part in image)
            for image in zip(*row, strict=True)
        )
        for row in zip(*images[:3], strict=True)
    ]


def unique_images(images: ImageInputs, keys: list[tuple[bytes, ...]]) -> dict[bytes, tuple]:
    """Return each different image once, (pixels, aspect ratio id, tile mask) by its key."""
    return {
        key: part
        for row_keys, row in zip(keys, zip(*images[:3], strict=True), strict=True)
        for key, part in zip(row_keys, zip(*row, strict=True), strict=True)
    }


class CancelUnlessAwaited(NamedTuple):
    """A stop event without effect while a prompt waits for the image."""

    stop: threading.Event
    awaited: list[bytes]
    key: bytes

    def is_set(self) -> bool:
        return self.stop.is_set() and self.key not in self.awaited


def image_inputs(
    pixels: np.ndarray, aspect_ratio_id: int, tile_mask: np.ndarray, one_padding_tile: bool = False
) -> dict[str, np.ndarray]:
    """Return all inputs of the vision IR, by port name, for one image.

    Args:
        pixels: f32 [tiles, channels, height, width].
        tile_mask: i64 [tiles], 1 for real tiles, which come first.
        one_padding_tile: compute one padding tile that represents all.
    """
    tiles, real = len(tile_mask), int(tile_mask.sum())
    counts = np.ones(min(real + 1, tiles) if one_padding_tile else tiles, np.int64)
    counts[-1] += tiles - len(counts)
    return {
        "pixel_values": np.array(pixels[: len(counts)], np.float32),  # copied, see `language_inputs`
        "aspect_ratio_ids": np.array([aspect_ratio_id], np.int64),
        "real_tiles": np.array(real, np.int64),
        "tile_counts": counts,
    }


class OVImageEncoder:
    """Vision encoder with a cache. Thread-safe; one image is encoded at a time, also beside the language model.

    Args:
        path: of the IR.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        cache_bytes: budget for encoded images, 0.1 GB per computed tile with the 11B; the infer request holds the last
            image in any case.
        stamp: the IR's, if read already.

    Attributes:
        cache: encoded images in memory.
        store: encoded images on disk (`use_store`); None without.
        chosen: precision and its reason (`devices.choose`).
        padding_alike: one padding tile represents all (`convert.padding_tiles_are_alike`).
        pixels_shape: of one image's pixels, [tiles, channels, height, width].
        output_shapes: of K/V by port name, -1 for any length.
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
        self.shapes, self.cache = shapes, ImageCache(cache_bytes)
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
        self.store: ImageStore | None = None
        self._id = ""

    def use_store(self, store: ImageStore) -> None:
        """Read images from a store, and write new ones into it in 16 bit, which rounds them."""
        if store:
            model = (self._request or self._compile()).get_compiled_model()
            self.store, self._id = store, encoder_id(Path(self._ir[0]), model)

    def _compile(self) -> ov.InferRequest:
        return ov.Core().compile_model(*self._ir).create_infer_request()

    def encode(
        self,
        images: ImageInputs,
        keys: list[tuple[bytes, ...]] | None = None,
        stop: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Encoded:
        """Encode each different image once, one by one, as encoding is compute-bound.

        Args:
            keys: their `image_keys`, if computed already.
            stop: once set, the current image is cancelled between two layers.
            progress: updated with the current image.
        Raises:
            Cancelled: if `stop` was set; completed images are cached.
            NumericalError: if K/V are not finite.
            OutOfMemoryError: if one does not fit.
        """
        keys = keys or image_keys(images)
        image_s, cached = [], 0
        parts = unique_images(images, keys)
        # held from the beginning, as encoding one could evict another
        encoded = {key: image for key in parts if (image := self.cache.get(key))}
        self._awaited += parts
        try:
            for number, (key, part) in enumerate(parts.items(), 1):
                self._enter(progress, number, len(parts), key, part)
                started, hit = time.perf_counter(), True
                if key not in encoded:
                    encoded[key], hit = self._encode_one(key, part, stop)
                cached += hit
                image_s.append(time.perf_counter() - started)
        finally:
            for key in parts:
                self._awaited.remove(key)
        if len(set(keys)) == 1:
            keys = keys[:1]
        key_values, stands_for = join_images([[encoded[key] for key in row] for row in keys], self.shapes)
        return Encoded(key_values, stands_for, image_s, cached)

    def prefetch(
        self, images: ImageInputs, stop: threading.Event | None = None, progress: Progress | None = None
    ) -> list[float]:
        """Encode images into the cache, within its budget, ahead of a prompt. Between two images, prompts go first.

        Args:
            stop: as for `encode`, but without effect on an image that a prompt waits for.
            progress: updated with the current image.
        Returns:
            seconds for each different image, about 0 for cached ones.
        """
        image_s = []
        parts = unique_images(images, image_keys(images))
        for number, (key, part) in enumerate(parts.items(), 1):
            self._enter(progress, number, len(parts), key, part)
            started = time.perf_counter()
            while any(other != key for other in self._awaited):
                check_stop(stop)
                time.sleep(POLL_S)
            self._encode_one(key, part, stop and CancelUnlessAwaited(stop, self._awaited, key))
            image_s.append(time.perf_counter() - started)
        return image_s

    def _enter(self, progress: Progress | None, number: int, count: int, key: bytes, part: tuple) -> None:
        """Update a progress with an image that is not held."""
        if progress and not self.holds(key):
            left_s = functools.partial(self._clock.left_s, key, int(self._tiles(part[2])))
            progress.enter(f"Encoding image {number} of {count}", left_s)

    def _encode_one(self, key: bytes, part: tuple, stop) -> tuple[EncodedImage, bool]:
        """Return an image, and whether it was held, also by another thread meanwhile."""
        image = self._held(key)
        if image:
            return image, True
        with acquire(self._turn, stop):
            image = self._held(key)
            if image:
                return image, True
            inputs = self._inputs(part)
            self._check_memory(inputs)
            with self._clock.timing(key, len(inputs["tile_counts"])):
                image = self._infer(inputs, stop)
            if self.store:
                self.store.put(store_key(self._id, key), image)
            self.cache.put(key, image)
            return image, False

    def holds(self, key: bytes) -> bool:
        """Return whether an image is held, in memory or on disk."""
        return key in self.cache or (self.store is not None and self.store.holds(store_key(self._id, key)))

    def _held(self, key: bytes) -> EncodedImage | None:
        """Return an image from memory, else from disk; None if it must be encoded."""
        image = self.cache.get(key)
        if image is None and self.store:
            image = self.store.get(store_key(self._id, key), self.shapes)
            if image:
                self.cache.put(key, image)
        return image

    def remove(self, images: ImageInputs) -> None:
        """Delete images from memory and from disk."""
        for key in unique_images(images, image_keys(images)):
            self.cache.remove(key)
            if self.store:
                self.store.remove(store_key(self._id, key))

    def expected_s(self, real_tiles: int) -> float | None:
        """Return the seconds that an image takes by those before; None before the first."""
        mask = np.arange(self.shapes.max_num_tiles) < real_tiles
        return self._clock.expected_s(int(self._tiles(mask)))

    def memory_for(self, images: ImageInputs, keys: list[tuple[bytes, ...]]) -> float:
        """Return the bytes of the largest image that is not in memory: its `memory.picture_memory`, or its K/V if it is
        on disk."""
        if self._own_memory:
            return 0
        needed = [0.0]
        for key, (_, _, mask) in unique_images(images, keys).items():
            tiles = int(self._tiles(mask))
            if key not in self.cache:
                key_values = self.shapes.cross_kv_bytes(tiles * self.shapes.patches_per_tile)
                needed.append(key_values if self.holds(key) else picture_memory(self.shapes, tiles))
        return max(needed)

    def _tiles(self, tile_mask: np.ndarray) -> np.ndarray:
        """Return an upper bound of the computed tiles of each image, [...] for masks [..., tiles]."""
        real, tiles = tile_mask.sum(-1), tile_mask.shape[-1]
        return np.minimum(real + 1, tiles) if self.padding_alike else np.full_like(real, tiles)

    def _check_memory(self, inputs: dict[str, np.ndarray]) -> None:
        """Drop cached images if memory is short; OutOfMemoryError if that is not enough."""
        if self._own_memory:
            return
        needed = picture_memory(self.shapes, len(inputs["tile_counts"]))
        if free_memory() < needed:
            self.forget()
        free = free_memory()
        if free < needed:
            raise OutOfMemoryError(
                f"Encoding a {int(inputs['real_tiles'])}-tile image needs {needed / 1e9:.1f} GB of memory; only "
                f"{free / 1e9:.1f} GB are available. Close other programs, or shrink it into one tile (detail='low')."
            )

    def rows_read(self, images: ImageInputs, seen: np.ndarray, row_mask: bool = False) -> int:
        """Return an upper bound of the K/V rows that a prompt reads; arguments as for `visible_kv`."""
        mask = images.aspect_ratio_mask
        tiles = mask.sum(-1) if row_mask or seen.any(-1).all() else self._tiles(mask)
        return int(tiles.sum()) * self.shapes.patches_per_tile

    def _inputs(self, part: tuple) -> dict[str, np.ndarray]:
        pixels, aspect_ratio_id, tile_mask = part
        real = int(tile_mask.sum())
        # padding tiles are equal to the last bit only if no canvas tile is among them, and no pixel in them
        alike = self.padding_alike and real >= self.shapes.canvas_tiles[aspect_ratio_id] and not pixels[real:].any()
        return image_inputs(pixels, aspect_ratio_id, tile_mask, alike)

    def _infer(self, inputs: dict[str, np.ndarray], stop) -> EncodedImage:
        rows = len(inputs["tile_counts"]) * self.shapes.patches_per_tile
        # removed while it runs: after a failure it is compiled again, see `OVLanguageModel.infer`
        request, self._request = self._request or self._compile(), None
        key_values = {
            name: np.empty(self.shapes.cross_kv_shape(name, 1, rows), np.float32) for name in self.output_shapes
        }
        for name, array in key_values.items():  # written into the cached arrays: 0.4 GB for four tiles of the 11B
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        run(request, inputs, stop)
        request.get_compiled_model().release_memory()  # of the layers' results
        trim_memory()
        self._request = request
        for array in key_values.values():
            check_finite(array, "image's keys and values")
        return EncodedImage(key_values, inputs["tile_counts"])

    def forget(self) -> None:
        """Clear the cache in memory."""
        self.cache.clear()
        trim_memory()


def check_finite(array: np.ndarray, what: str) -> None:
    """Raise a NumericalError for results that are not finite, which would decode to "!!!!"."""
    if not np.isfinite(array).all():
        raise NumericalError(
            f"The {what} are not finite: they overflow this device's precision. Load the model with "
            "ov_config={'INFERENCE_PRECISION_HINT': 'f32'}; if that is set, the weights are broken."
        )
