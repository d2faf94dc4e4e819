"""Pages of PDF files as images, by pypdfium2, which the extra [pdf] installs."""

import contextlib
import io
import math
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from .errors import ImageError

DPI = 150
MAX_PAGE_PIXELS = 5_000_000  # a larger page is drawn smaller; 4 times what four tiles hold
PDFIUM = threading.Lock()  # it is not safe in threads


@contextlib.contextmanager
def opened(file: Path | io.BytesIO, name: str) -> Iterator:
    """Open a PDF.

    Raises:
        ImageError: if pypdfium2 is missing, or the PDF is broken or encrypted.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImageError(f'{name} is a PDF, for which pypdfium2 is missing: pip install ".[pdf]".') from error
    with PDFIUM:
        try:
            with pypdfium2.PdfDocument(file.getvalue() if isinstance(file, io.BytesIO) else file) as pdf:
                yield pdf
        except pypdfium2.PdfiumError as error:
            encrypted = "password" in str(error).lower()
            advice = "is encrypted: save it without a password" if encrypted else "is a broken PDF: save it anew"
            raise ImageError(f"{name} {advice}.") from error


def pdf_pages(
    file: Path | io.BytesIO, name: str, first: int, count: int, max_pixels: int = MAX_PAGE_PIXELS
) -> tuple[list[Image.Image], int]:
    """Return pages of a PDF as images in RGB, and the number of its pages.

    Args:
        first: number from 1 of the first page.
        count: pages at most.
        max_pixels: of a page; a larger one is drawn smaller.
    Raises:
        ImageError: as `opened`, or if it has no such page.
    """
    with opened(file, name) as pdf:
        total = len(pdf)
        if not 1 <= first <= total:
            raise ImageError(f"{name} has {total} page{'s' * (total != 1)}: page={first} is none of them.")
        return [drawn(pdf[index], max_pixels) for index in range(first - 1, min(total, first - 1 + count))], total


def page_sizes(file: Path | io.BytesIO, name: str, limit: int) -> list[tuple[int, int]]:
    """Return width and height in pixels of each page of a PDF.

    Raises:
        ImageError: as `opened`, or if it has no page or more than `limit`.
    """
    with opened(file, name) as pdf:
        if not 1 <= len(pdf) <= limit:
            raise ImageError(f"{name} has {len(pdf)} pages: give one of 1 to {limit}.")
        sizes = []
        for page in pdf:
            scale = scale_of(page)
            width, height = (math.ceil(side * scale) for side in page.get_size())
            sizes.append((width, height))
        return sizes


def scale_of(page, max_pixels: int = MAX_PAGE_PIXELS) -> float:
    """Return the pixels per point of 1/72 inch at which a page is drawn."""
    width, height = page.get_size()
    longer = max_pixels / max(1, width, height)  # the other side may be far below a pixel, and becomes one
    return min(DPI / 72, math.sqrt(max_pixels / max(1, width * height)), longer)


def drawn(page, max_pixels: int) -> Image.Image:
    """Return a page of a PDF as an image."""
    bitmap = page.render(scale=scale_of(page, max_pixels), rev_byteorder=True)
    try:
        return bitmap.to_pil().convert("RGB")  # a copy: PDFium frees the bitmap
    finally:
        bitmap.close()
        page.close()
