"""LRU cache of encoded images, their concatenation for a batch, and the times that encoding took."""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .shapes import MllamaShapes, rows_axis


class EncodedImage(NamedTuple):
    """One encoded image.

    Attributes:
        key_values: by port name, of the computed tiles.
        tile_counts: i64 [tiles], number of the image's tiles that each of them represents.
    """

    key_values: dict[str, np.ndarray]
    tile_counts: np.ndarray

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.key_values.values())


class ImageCache:
    """Thread-safe LRU cache of encoded images, by key (`image_keys`)."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> EncodedImage | None:
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
            return self._images.get(key)

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._images

    def put(self, key: bytes, image: EncodedImage) -> None:
        """Add an image and evict others; one beyond the budget is evicted itself."""
        with self._lock:
            self._images[key] = image
            while self._images and self._nbytes() > self.max_bytes:
                self._images.popitem(last=False)

    def remove(self, key: bytes) -> None:
        with self._lock:
            self._images.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._images.clear()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def _nbytes(self) -> int:
        return sum(image.nbytes for image in self._images.values())


def join_images(batch: list[list[EncodedImage]], shapes: MllamaShapes) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Concatenate the images of each row of a batch: `key_values` and `stands_for` of `Encoded`."""
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


def join(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenate arrays; a single one is not copied, as an image's K/V are large."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


class EncodingTimes:
    """Time estimates for encoding, from the images before."""

    def __init__(self):
        self._took: dict[int, float] = {}  # seconds of the last image, by computed tiles
        self._current: tuple[bytes, int, float] | None = None

    @contextlib.contextmanager
    def timing(self, key: bytes, tiles: int) -> Iterator[None]:
        """Time the encoding of an image of so many computed tiles, inside; failed and cancelled ones do not count."""
        started = time.perf_counter()
        self._current = key, tiles, started
        try:
            yield
            self._took[tiles] = time.perf_counter() - started
        finally:
            self._current = None

    def left_s(self, key: bytes, tiles: int) -> float | None:
        """Return the seconds until an image is encoded, the rest of a current one included; None before the first."""
        current, expected = self._current, self.expected_s(tiles)
        if current is None or expected is None:
            return expected
        other, its_tiles, since = current
        left = max(0.0, (self.expected_s(its_tiles) or 0.0) - (time.perf_counter() - since))
        return left if other == key else left + expected

    def expected_s(self, tiles: int) -> float | None:
        """Scale the time of the last image with the nearest number of tiles."""
        took = dict(self._took)  # another thread may add to it
        if not took:
            return None
        nearest = min(took, key=lambda known: abs(known - tiles))
        return took[nearest] * tiles / nearest
