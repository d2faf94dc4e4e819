"""Encoded images on disk: a bounded LRU store of 16-bit files that survives the process.

    <folder>/<key>.kv16: i64 tile counts, f16 keys and values in the order of `cross_kv_names`, u32 CRC of all before

Several processes may share a folder. Nothing here breaks an answer: without disk, images are encoded.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import secrets
import time
import zlib
from pathlib import Path

import numpy as np
import openvino as ov
import torch

from .errors import DiskError
from .image_cache import EncodedImage
from .ir import fingerprint
from .memory import free_disk
from .shapes import MllamaShapes

logger = logging.getLogger(__name__)

MAX_BYTES = 2_000_000_000  # default budget: 9 images of four tiles of the 11B, 19 of one
RESERVE_BYTES = 1_000_000_000  # left free on the disk for everything else
PARTIAL_S = 60 * 60  # age of a file under way that a killed process has left
FORMAT = "1"  # increase whenever a file's layout or the encoder's own inputs change
COMPUTED_IN = ("INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


class ImageStore:
    """Store of encoded images in a folder of one user.

    K/V are stored in 16 bit. `put` rounds the image itself too, so that every answer reads the same numbers.

    Args:
        folder: created with the first image, readable by its user only.
        max_bytes: budget for all files, least recently used ones are deleted; 0 stores nothing.
    """

    def __init__(self, folder: str | Path, max_bytes: int = MAX_BYTES):
        self.folder, self.max_bytes = Path(folder), max_bytes

    def __bool__(self) -> bool:
        return self.max_bytes > 0

    def holds(self, key: str) -> bool:
        """Return whether there is a file, which may be broken."""
        with contextlib.suppress(OSError):  # another user's folder
            return self._path(key).is_file()
        return False

    def get(self, key: str, shapes: MllamaShapes) -> EncodedImage | None:
        """Read an image, and mark it as used last; None if there is none. A broken file is deleted."""
        path = self._path(key)
        try:
            image = read_image(path, shapes)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s): the image is encoded again.", path, error)
            self.remove(key)
            return None
        with contextlib.suppress(OSError):  # evicted by another process meanwhile
            os.utime(path)
        return image

    def put(self, key: str, image: EncodedImage) -> None:
        """Round an image's K/V to 16 bit, in place, and write it; one beyond float16's range is neither rounded nor
        written. A failure is logged."""
        halves = {name: torch.from_numpy(array).half() for name, array in image.key_values.items()}
        if not all(half.isfinite().all() for half in halves.values()):
            return
        for name, half in halves.items():
            torch.from_numpy(image.key_values[name]).copy_(half)
        try:
            self._write(self._path(key), image.tile_counts, {name: half.numpy() for name, half in halves.items()})
        except OSError as error:
            logger.warning("An encoded image is not stored in %s: %s", self.folder, error)

    def remove(self, key: str) -> None:
        """Delete an image, if it is there."""
        with contextlib.suppress(OSError):  # on Windows another process may be reading it
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.kv16"

    def _write(self, path: Path, counts: np.ndarray, halves: dict[str, np.ndarray]) -> None:
        """Write a file atomically, unless it exceeds the budget or would fill the disk."""
        nbytes, free = sum(half.nbytes for half in halves.values()), free_disk(self.folder)
        if nbytes > self.max_bytes:
            return
        if free < nbytes + RESERVE_BYTES:
            raise DiskError(errno.ENOSPC, f"only {free / 1e9:.1f} GB of disk are free")
        make_private(self.folder)
        part = path.with_name(f"{secrets.token_hex(8)}.part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:  # noqa: PTH123 - mode
                crc = 0
                for array in (counts.astype("<i8"), *halves.values()):
                    crc = zlib.crc32(array.data, crc)
                    file.write(array.data)
                file.write(crc.to_bytes(4, "little"))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        self._evict()

    def _evict(self) -> None:
        """Delete the least recently used files beyond the budget, and what killed processes have left."""
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # deleted by another process
                stat = path.stat()
                if path.suffix == ".kv16":
                    files.append((stat.st_mtime_ns, stat.st_size, path))
                elif path.suffix == ".part" and stat.st_mtime < time.time() - PARTIAL_S:
                    path.unlink()
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            self.remove(path.stem)
            excess -= size


def make_private(folder: Path) -> None:
    """Create a folder and its parents, readable by their user only; those that exist stay as they are."""
    for each in reversed([folder, *folder.parents]):  # the mode of mkdir is not that of the parents
        each.mkdir(mode=0o700, exist_ok=True)


def read_image(path: Path, shapes: MllamaShapes) -> EncodedImage:
    """Read a file that `ImageStore.put` wrote.

    Raises:
        ValueError: if it is broken.
        OSError: if it is missing or cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tiles, rest = divmod(size - 4, 8 + shapes.cross_kv_bytes(shapes.patches_per_tile) // 2)
        if rest or not 0 < tiles <= shapes.max_num_tiles:
            raise ValueError(f"it has {size} bytes, which is no number of tiles")
        counts = np.fromfile(file, "<i8", tiles)
        crc, key_values = zlib.crc32(counts), {}
        for name in shapes.cross_kv_names:
            shape = shapes.cross_kv_shape(name, 1, tiles * shapes.patches_per_tile)
            half = np.fromfile(file, "<f2", math.prod(shape))
            crc = zlib.crc32(half, crc)
            key_values[name] = torch.from_numpy(half).float().numpy().reshape(shape)
        if crc.to_bytes(4, "little") != file.read():
            raise ValueError("its checksum is wrong")
    return EncodedImage(key_values, counts.astype(np.int64))


def encoder_id(path: Path, model: ov.CompiledModel) -> str:
    """Return a text that differs wherever a vision IR may give other K/V: by its files, this OpenVINO, the device, and
    the precision that it is computed in."""
    supported = set(map(str, model.get_property("SUPPORTED_PROPERTIES")))
    names = [name for name in ("EXECUTION_DEVICES", *COMPUTED_IN) if name in supported]
    settings = [f"{name}={model.get_property(name)}" for name in names]
    files = fingerprint(path.with_suffix(".xml"), path.with_suffix(".bin"))
    return " ".join([FORMAT, files, ov.get_version(), *settings])


def store_key(encoder: str, image_key: bytes) -> str:
    """Return the name of an image (a digest of its pixels) as a vision IR (`encoder_id`) encodes it."""
    return hashlib.sha256(encoder.encode() + b"\0" + image_key).hexdigest()
