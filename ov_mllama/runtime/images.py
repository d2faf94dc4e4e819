"""Loading of images of any source and format as RGB, with errors for users. Independent of models."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import ImageError, InputError
from .image_files import check_size, decode, is_first_of_several, open_image, reduction
from .image_modes import from_array
from .image_sources import is_pdf, located
from .pdf_pages import pdf_pages

PictureError = ImageError
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".ico", ".tga"),
)
MAX_PDF_PAGES = 20  # of one `load_pages`
DETAILS = ("low", "high")


def load_image(source, page: int | None = None) -> Image.Image:
    """Load an image as RGB of 8 bits in sRGB, upright (EXIF).

    Transparent parts become white; black if white would hide the image. Values of 10 to 16 bits and floats are scaled
    by their range. An image of more than 50 million pixels is decoded at half or a quarter of its size. What is not
    shown as it is stored, such as further pages, is a warning, which is also `info["remark"]` of the result.

    Args:
        source: path of a file, also with `~`, in quotes, or as file:// URL; its contents as bytes; a data URI or
            base64; an http(s) URL; a PIL image; or an array or tensor, [height, width], [height, width, channels] or
            [channels, height, width] of 1, 3 or 4 channels (if ambiguous, last in an array and first in a tensor), from
            0 to 255, floats also 0 to 1, larger values to 1023, 4095, 16383 or 65535. Leading axes of 1 are dropped.
        page: number from 1 of a page or frame of a file; None for the first one, with a remark if there are several.
    Raises:
        ImageError: if it is missing, no image of `image_files.readable_formats`, broken, or too large.
        MemoryError, OSError: for other reasons than the image (memory, permission, open files, disk).
    """
    remarks: list[str] = []
    image = _load(source, page, remarks)
    if remarks:
        image.info["remark"] = " ".join(remarks)
        warnings.warn(image.info["remark"], stacklevel=2)
    return image


open_picture = load_image  # the name until version 3.2


def load_pages(source, limit: int = MAX_PDF_PAGES) -> list[Image.Image]:
    """Load the pages of a PDF or of a TIFF, or the frames of an animation, as `load_image` does.

    If there are more than `limit`, the first ones are loaded, with a remark on the first of them.

    Args:
        source: path, bytes, data URI or URL, as for `load_image`.
    Raises:
        InputError: for a limit below 1.
        ImageError, MemoryError, OSError: as `load_image`.
    """
    if limit < 1:
        raise InputError(f"limit={limit} loads no page: give 1 or more.")
    file, name = located(source)
    remarks: list[str] = []
    if is_pdf(file):
        pages, total = pdf_pages(file, name, 1, limit)
    else:
        with open_image(file, name) as image:
            total = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
        pages = [_load_file(file, name, number, remarks) for number in range(1, min(total, limit) + 1)]
    if total > limit:
        remarks.append(f"{name} has {total} pages: the first {limit} are used.")
    if remarks:
        pages[0].info["remark"] = " ".join(dict.fromkeys(remarks))
        warnings.warn(pages[0].info["remark"], stacklevel=2)
    return pages


def at_detail(image: Image.Image, detail: str, tile: int) -> Image.Image:
    """Shrink an image into one tile of `tile` pixels if `detail` is "low", which takes a quarter to a half of the time
    to encode and hides what is small; return it unchanged if "high". As OpenAI's option of that name.

    Raises:
        InputError: for another `detail`.
    """
    if detail not in DETAILS:
        raise InputError(f"detail='{detail}' is unknown: choose one of {', '.join(DETAILS)}.")
    if detail == "high" or max(image.size) <= tile:
        return image
    small = image.copy()
    small.thumbnail((tile, tile), Image.Resampling.BICUBIC)
    return small


def _load(source, page: int | None, remarks: list[str]) -> Image.Image:
    """Load an image, and append to `remarks`."""
    if hasattr(source, "detach"):  # a tensor on any device
        return from_array(source.detach().cpu().float().numpy(), remarks, True, array_reduction)
    if isinstance(source, np.ndarray):
        return from_array(source, remarks, False, array_reduction)
    if isinstance(source, Image.Image):
        note_frames(source, "The image", remarks)
        return decode(source, "The image", remarks)
    return _load_file(*located(source), page, remarks)


def _load_file(file: Path | io.BytesIO, name: str, page: int | None, remarks: list[str]) -> Image.Image:
    """Load an image file or a page of a PDF, and append to `remarks`."""
    if is_pdf(file):
        (image,), total = pdf_pages(file, name, 1 if page is None else page, 1)
        if total > 1 and page is None:
            remarks.append(f"{name} has {total} pages: the first one is used.")
        return image
    with open_image(file, name, page) as opened:
        if page is None:
            note_frames(opened, name, remarks)
        return decode(opened, name, remarks)


def note_frames(image: Image.Image, name: str, remarks: list[str]) -> None:
    """Append a remark on an image that is the first one of several."""
    if is_first_of_several(image):
        parts = "pages" if image.format == "TIFF" else "frames"
        remarks.append(f"{name} has several {parts}: the first one is used.")


def array_reduction(width: int, height: int) -> int:
    """Return by how much an array is made smaller."""
    check_size("The array", width, height)
    return reduction(width, height)
