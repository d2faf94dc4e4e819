"""Sources of images as people write them: paths, URLs, data URIs, bytes."""

import base64
import binascii
import io
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

from .downloads import download
from .errors import ImageError
from .image_files import read_head

NAMED_IN_ERRORS = 100  # first characters of a file's name
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A", "JVBER")  # of images and PDFs


def located(source) -> tuple[Path | io.BytesIO, str]:
    """Return the file that a source names, or its contents, and its name in errors.

    Raises:
        ImageError: if it names none, or cannot be downloaded.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), "The image"
    if isinstance(source, Path):
        return located_path(str(source))
    if not isinstance(source, str):
        raise ImageError(f"A {type(source).__name__} is no image: give a path, a URL, a PIL image or an array.")
    text = unquoted(source)
    scheme = text[:8].lower()
    if scheme.startswith("data:") and "," in text:
        return io.BytesIO(from_data_uri(text)), "The image"
    if scheme.startswith("file:"):
        return located_path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))
    if "://" in text and not os.path.exists(source):  # noqa: PTH110 - also for texts that are no path
        return io.BytesIO(download(text)), text
    if len(text) > NAMED_IN_ERRORS and text.startswith(BASE64_STARTS) and not is_file(text):
        return io.BytesIO(decode_base64(text)), "The image"
    return located_path(source)


def located_path(text: str) -> tuple[Path, str]:
    """Return a path, if it does not exist as it is written without quotes and blanks and with `~` expanded, and its
    name in errors."""
    path = Path(text if is_file(text) else os.path.expanduser(unquoted(text)))  # noqa: PTH111 - raises nothing
    return path, (path.name or str(path))[:NAMED_IN_ERRORS]


def is_file(text: str) -> bool:
    """Return whether a text is the path of a file."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def unquoted(text: str) -> str:
    """Return a text without blanks and quotes around it, as file managers copy paths."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def from_data_uri(uri: str) -> bytes:
    """Return the contents of a data URI.

    Raises:
        ImageError: if it is not valid.
    """
    kind, _, content = uri.partition(",")
    if re.search(r";\s*base64\s*$", kind, re.IGNORECASE):
        return decode_base64(content)
    return urllib.parse.unquote_to_bytes(content)


def decode_base64(text: str) -> bytes:
    """Decode base64 of both alphabets, in lines or percent-encoded, with or without its padding.

    Raises:
        ImageError: if it is not valid.
    """
    text = "".join((urllib.parse.unquote(text) if "%" in text else text).split())
    alphabet = b"-_" if "-" in text or "_" in text else None
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), alphabet, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("The image is not valid base64: encode the bytes of its file.") from error


def is_pdf(file: Path | io.BytesIO) -> bool:
    """Return whether a file is a PDF, False if it cannot be read."""
    try:
        return read_head(file).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"%PDF-")
    except (OSError, ValueError):  # for `open_image` to raise
        return False
