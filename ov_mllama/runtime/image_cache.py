"""Encoded images: how long they are kept, and how a batch's are joined."""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .shapes import MllamaShapes, rows_axis


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


class ImageCache:
    """Encoded images, as many as there is room for; the one used longest ago goes first. For several threads.

    Args:
        room: bytes for all of them.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()
        self._turn = threading.Lock()

    def get(self, key: bytes) -> EncodedImage | None:
        """An image by its key (`image_keys`), which is now the one used last."""
        with self._turn:
            if key in self._images:
                self._images.move_to_end(key)
            return self._images.get(key)

    def __contains__(self, key: bytes) -> bool:
        """Whether an image is kept; it is not used by being asked about."""
        with self._turn:
            return key in self._images

    def put(self, key: bytes, image: EncodedImage) -> None:
        """Keeps an image; it goes at once if it is larger than all the room."""
        with self._turn:
            self._images[key] = image
            while self._images and self._nbytes() > self.max_bytes:
                self._images.popitem(last=False)

    def clear(self) -> None:
        with self._turn:
            self._images.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        with self._turn:
            return self._nbytes()

    def _nbytes(self) -> int:
        return sum(image.nbytes for image in self._images.values())


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


def join(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenated, or the only one itself: K/V of an image are too large to copy for nothing."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


class EncodingTimes:
    """When the picture under way began, and how long earlier ones took."""

    def __init__(self):
        self._took: dict[int, float] = {}  # seconds of the last picture of so many computed tiles
        self._under_way: tuple[bytes, int, float] | None = None

    @contextlib.contextmanager
    def timing(self, key: bytes, tiles: int) -> Iterator[None]:
        """A picture is encoded inside; one that fails or is given up tells nothing of how long others take.

        Args:
            key: the image's, see `image_keys`.
            tiles: that are computed of it.
        """
        started = time.perf_counter()
        self._under_way = key, tiles, started
        try:
            yield
            self._took[tiles] = time.perf_counter() - started
        finally:
            self._under_way = None

    def left_s(self, key: bytes, tiles: int) -> float | None:
        """Seconds until a picture is encoded, with what is left of another one under way; None before the first."""
        under_way, whole = self._under_way, self._expected_s(tiles)
        if under_way is None or whole is None:
            return whole
        other, its_tiles, since = under_way
        left = max(0.0, (self._expected_s(its_tiles) or 0.0) - (time.perf_counter() - since))
        return left if other == key else left + whole

    def _expected_s(self, tiles: int) -> float | None:
        """As the last picture of as many tiles took, else the one nearest to it, tile for tile."""
        took = dict(self._took)  # another thread may add to it
        if not took:
            return None
        nearest = min(took, key=lambda known: abs(known - tiles))
        return took[nearest] * tiles / nearest
