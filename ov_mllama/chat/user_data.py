"""This program's folder in the user's data."""

from pathlib import Path

import platformdirs

from ov_mllama.runtime.image_store import ImageStore


def data_folder() -> Path:
    """Return the folder of conversations and encoded images."""
    return platformdirs.user_data_path("ov_mllama", appauthor=False)


def encoded_images(megabytes: int) -> ImageStore:
    """Return the store of encoded images; 0 stores nothing."""
    return ImageStore(data_folder() / "encoded", megabytes * 1_000_000)
