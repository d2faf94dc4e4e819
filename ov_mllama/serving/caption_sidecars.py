"""Captions as text files beside the images, as trainers of image models read them."""

import logging
from dataclasses import dataclass
from pathlib import Path

from ov_mllama.runtime.errors import InputError
from ov_mllama.serving.caption_outputs import write_text

logger = logging.getLogger(__name__)


@dataclass
class Sidecars:
    """Text file for each image, with its caption in one line.

    Attributes:
        prefix, suffix: of each text.
        overwrite: replace files that exist; else their images are left out.
    """

    prefix: str = ""
    suffix: str = ""
    overwrite: bool = False

    def images_without(self, images: list[Path]) -> list[Path]:
        """Return the images that need a file.

        Raises:
            InputError: if two images would share one.
        """
        first: dict[Path, Path] = {}
        for image in images:
            other = first.setdefault(text := image.with_suffix(".txt"), image)
            if other is not image:
                raise InputError(
                    f"{other.name} and {image.name} would share {text}: rename one, or leave it out with --exclude."
                )
        if self.overwrite:
            return images
        needed = [image for text, image in first.items() if not text.exists()]
        if len(needed) < len(images):
            logger.info("%d images have a .txt file already (--overwrite replaces it)", len(images) - len(needed))
        return needed

    def write(self, image: Path, answer: str | None) -> None:
        """Write the file of an image with an answer, atomically; none for an image that cannot be read."""
        if answer is None:
            return
        path, text = image.with_suffix(".txt"), f"{self.prefix}{' '.join(answer.split())}{self.suffix}\n"
        if self.overwrite or not path.exists():
            write_text(path, text)
