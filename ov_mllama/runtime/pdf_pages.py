"""Pages of PDF files as images, by pypdfium2, which the extra [pdf] installs."""

import io
import math
import threading
from pathlib import Path

from PIL import Image

from .errors import ImageError

DPI = 150
MAX_PAGE_PIXELS = 5_000_000  # a larger page is drawn smaller; 4 times what four tiles hold
PDFIUM = threading.Lock()  # it is not safe in threads


def pdf_pages(file: Path | io.BytesIO, name: str, first: int, count: int) -> tuple[list[Image.Image], int]:
    """Return pages of a PDF as images in RGB, and the number of its pages.

    Args:
        first: number from 1 of the first page.
        count: pages at most.
    Raises:
        ImageError: if pypdfium2 is missing, or the PDF is broken, encrypted, or has no such page.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ImageError(f'{name} is a PDF, for which pypdfium2 is missing: pip install ".[pdf]".') from error
    source = file.getvalue() if isinstance(file, io.BytesIO) else file
    with PDFIUM:
        try:
            pdf = pypdfium2.PdfDocument(source)
        except pypdfium2.PdfiumError as error:
            encrypted = "password" in str(error).lower()
            advice = "is encrypted: save it without a password" if encrypted else "is a broken PDF: save it anew"
            raise ImageError(f"{name} {advice}.") from error
        try:
            total = len(pdf)
            if not 1 <= first <= total:
                raise ImageError(f"{name} has {total} page{'s' * (total != 1)}: page={first} is none of them.")
            return [drawn(pdf[index]) for index in range(first - 1, min(total, first - 1 + count))], total
        except pypdfium2.PdfiumError as error:
            raise ImageError(f"{name} has a broken page ({error}): save it anew.") from error
        finally:
            pdf.close()


def drawn(page) -> Image.Image:
    """Return a page of a PDF as an image."""
    width, height = page.get_size()  # in points of 1/72 inch
    scale = min(DPI / 72, math.sqrt(MAX_PAGE_PIXELS / max(1, width * height)))
    bitmap = page.render(scale=scale, rev_byteorder=True)
    try:
        return bitmap.to_pil().convert("RGB")  # a copy: PDFium frees the bitmap
    finally:
        bitmap.close()
        page.close()
