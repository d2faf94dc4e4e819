"""Encoded images, and how long they are kept."""

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np


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


class KeptImages:
    """Encoded images, as many as there is room for; the one used longest ago goes first. For several threads.

    Args:
        room: bytes for all of them.
    """

    def __init__(self, room: int):
        self.room = room
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
            while self._images and self._nbytes() > self.room:
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
