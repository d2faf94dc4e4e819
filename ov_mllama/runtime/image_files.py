"""Image files, told by their content and decoded within a limit of memory."""

import contextlib
import errno
import functools
import io
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from .errors import ImageError, OutOfMemoryError
from .file_kinds import HEAD_BYTES, describe, is_heic, is_icon, is_tga
from .image_modes import to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
MAX_PIXELS = 200_000_000  # of an image; a small file can expand to any number
MAX_FULL_PIXELS = 50_000_000  # of an image that is decoded at full size; a larger one at a half or a quarter
MIN_REDUCED_PIXELS = 5_000_000  # of one decoded at a quarter: twice the width and height of what four tiles hold
MAX_DECODE_BYTES = 500_000_000  # for an image of more than MAX_FULL_PIXELS
MAX_ICON_PIXELS = 2_000_000  # half the limit of an icon, which Pillow decodes when it opens it
BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}  # of Pillow's modes; 4 for all others
DECODER_BYTES_PER_PIXEL = {"WEBP": 12, "AVIF": 4, "HEIF": 3, "TIFF": 3}  # on top, measured: buffers of the decoder
DNG_VERSION, SUB_IFDS, SUBFILE_TYPE, ROWS_PER_STRIP = 50706, 330, 254, 278  # TIFF tags
# errno of a path that does not exist; of a text that is no path, and of a broken file with an offset before its start
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NO_IMAGE = (None, errno.ENAMETOOLONG, errno.EINVAL)
PILLOW_LIMIT = threading.Lock()


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return FORMATS and, if pillow-heif is installed, HEIC, the format of iPhones."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


@contextlib.contextmanager
def pillow_limit(pixels: int | None) -> Iterator[None]:
    """Let Pillow open images of up to twice so many pixels."""
    with PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_head(file: Path | io.BytesIO) -> bytes:
    """Return the first HEAD_BYTES of a file."""
    if isinstance(file, io.BytesIO):
        return bytes(file.getbuffer()[:HEAD_BYTES])
    with file.open("rb") as opened:
        return opened.read(HEAD_BYTES)


def open_image(file: Path | io.BytesIO, name: str, page: int | None = None) -> Image.Image:
    """Open an image file, undecoded; its size is the one that it will be decoded at, but for `reduction`.

    Args:
        page: number from 1 of a page or frame.
    Raises:
        ImageError, MemoryError, OSError: as `images.load_image`.
    """
    try:
        head = read_head(file)
        if kind := describe(head):
            raise ImageError(f"{name} is {kind[0]}, no image that can be read: {kind[1]}.")
        formats = readable_formats()
        if is_heic(head) and "HEIF" not in formats:
            raise ImageError(f"{name} is HEIC: pip install pillow-heif, or convert it to JPEG.")
        if is_tga(head, file.suffix.lower() if isinstance(file, Path) else ""):
            formats = (*formats, "TGA")
        # of other formats only the header is read, and `check_size` refuses with numbers
        with pillow_limit(MAX_ICON_PIXELS if is_icon(head) else None):
            image = Image.open(file, formats=formats)
        check_kind(image, name)
        check_size(name, *image.size)
        if page is not None:
            seek(image, page, name)
        prepare_reduction(image)
        check_memory(image, name)
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder: give one of the images in it.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} holds an image of too many pixels, as no icon has: save it as PNG.") from error
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything on a broken file
        raise open_error(name, error) from error
    return image


def check_kind(image: Image.Image, name: str) -> None:
    """Raise ImageError for raw files of cameras in the form of TIFF, of which Pillow would open the thumbnail."""
    tags = getattr(image, "tag_v2", {})
    if image.format == "TIFF" and (DNG_VERSION in tags or (tags.get(SUBFILE_TYPE) == 1 and SUB_IFDS in tags)):
        raise ImageError(f"{name} is the raw data of a camera: develop it, or use the JPEG that the camera saved.")


def check_size(name: str, width: int, height: int) -> None:
    """Raise ImageError if an image has more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS // 1_000_000} million pixels"
        raise ImageError(f"{name} has {width} × {height} pixels: make it smaller, at most {limit}.")


def seek(image: Image.Image, page: int, name: str) -> None:
    """Select a page or frame of an image, by its number from 1."""
    pages = getattr(image, "n_frames", 1)
    if not 1 <= page <= pages:
        raise ImageError(f"{name} has {pages} page{'s' * (pages > 1)}: page={page} is none of them.")
    image.seek(page - 1)
    check_size(name, *image.size)


# ---- Size and memory ------------------------------------------------------------------------------------------------


def reduction(width: int, height: int) -> int:
    """Return by how much an image is made smaller: 1 up to MAX_FULL_PIXELS, else 2 or 4."""
    pixels = width * height
    return 1 if pixels <= MAX_FULL_PIXELS else 4 if pixels >= 16 * MIN_REDUCED_PIXELS else 2


def prepare_reduction(image: Image.Image) -> None:
    """Set up the decoder of a large image to make it smaller, where the format can."""
    factor = reduction(*image.size)
    if factor == 1:
        return
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // factor, image.height // factor))
    elif image.format == "JPEG2000":
        image.reduce = factor.bit_length() - 1  # type: ignore[method-assign, assignment]


def check_memory(image: Image.Image, name: str) -> None:
    """Raise ImageError if a large image takes more than MAX_DECODE_BYTES to decode."""
    width, height = image.size
    needed = decode_bytes(image)
    if needed > MAX_DECODE_BYTES:
        raise ImageError(
            f"{name} has {width} × {height} pixels, which take {needed / 1e9:.1f} GB to decode as {image.format}, more "
            f"than {MAX_DECODE_BYTES / 1e9:.1f} GB: save it as JPEG, or at half its size."
        )


def decode_bytes(image: Image.Image) -> int:
    """Return the bytes that decoding an image takes, 0 for one of at most MAX_FULL_PIXELS."""
    if image.format in ("JPEG", "MPO"):
        return coefficient_bytes(image)
    factor = reduction(*image.size)
    if factor == 1 or image.format == "JPEG2000":
        return 0
    buffers = DECODER_BYTES_PER_PIXEL.get(image.format or "", 0)
    if image.format == "TIFF" and not is_in_few_strips(image):
        buffers = 0
    each = BYTES_PER_PIXEL.get(image.mode, 4) + buffers + 2 * 4 / factor**2  # the result, and a copy of it
    return int(each * image.width * image.height)


def is_in_few_strips(image: Image.Image) -> bool:
    """Return whether a TIFF is compressed in few strips, each of which is decoded at once."""
    rows = image.tag_v2.get(ROWS_PER_STRIP, 0)  # type: ignore[attr-defined]
    return image.tile[0][0] == "libtiff" and rows > image.height / 8  # type: ignore[attr-defined]


def coefficient_bytes(image: Image.Image) -> int:
    """Return the bytes that a large progressive JPEG's decoder holds: all coefficients, also if it makes it smaller."""
    scale = getattr(image, "decoderconfig", None)
    if not (scale and image.info.get("progressive")):
        return 0
    sampling = [(across, down) for _, across, down, _ in image.layer]  # type: ignore[attr-defined]
    densest = max(across * down for across, down in sampling)
    samples = sum(across * down for across, down in sampling) / densest
    return int(2 * samples * image.width * image.height * scale[0] ** 2)


# ---- Decoding -------------------------------------------------------------------------------------------------------


def decode(image: Image.Image, name: str, remarks: list[str]) -> Image.Image:
    """Decode an opened image to a new one in RGB, upright by EXIF, and append to `remarks`."""
    check_size(name, *image.size)
    try:
        # TIFF's size is checked again, with its tiles', which may be larger than the image
        with pillow_limit(MAX_PIXELS // 2) if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        result = to_rgb(image, name, remarks, reduction(*image.size))
        result.info = {}
        result.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(result, in_place=True)  # after it was made smaller
        return result
    except ImageError:
        raise
    except Exception as error:
        raise open_error(name, error) from error


def is_first_of_several(image: Image.Image) -> bool:
    """Return whether an opened image is at the first of several frames or pages. An MPO is a photograph with another
    one after it, such as its preview."""
    try:
        return image.format != "MPO" and image.tell() == 0 and getattr(image, "is_animated", False)
    except Exception:  # noqa: BLE001 - broken after its first frame
        return False


def open_error(name: str, error: Exception) -> Exception:
    """Return the error to raise if an image was not opened: an ImageError, unless the machine failed."""
    number = getattr(error, "errno", None)
    # Pillow's decoders have only a text
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "out of memory" in str(error).lower():
        return OutOfMemoryError(f"{name} does not fit in memory: close other programs, or try again later.")
    if isinstance(error, OSError) and number in MISSING:
        return ImageError(f"{name} is missing: add the image again, or check its path.")
    if isinstance(error, OSError) and number not in NO_IMAGE:
        return OSError(number, f"{name} could not be read ({error.strerror}): try again, or check disk and permissions")
    return ImageError(f"{name} is not an image that can be read: use an intact PNG, JPEG or WebP file.")
