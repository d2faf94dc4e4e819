"""Opening of images of any source and format as RGB, with errors for users. Independent of models."""

import asyncio
import errno
import functools
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageOps

from .errors import ImageError, InputError, OutOfMemoryError

PictureError = ImageError
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif")
MAX_PIXELS = 50_000_000  # of an image; a small file can expand to any number
MAX_BYTES = 50_000_000  # of a download
SECONDS = 30  # of a download, in total
DETAILS = ("low", "high")
# errno of a path that does not exist; of a text that is no path, and of a broken file with an offset before its start
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NO_IMAGE = (None, errno.ENAMETOOLONG, errno.EINVAL)


def open_picture(source) -> Image.Image:
    """Open an image as RGB of 8 bits, upright (EXIF), transparent parts white.

    Of an animation or several pages it is the first, with a warning, which is also `info["remark"]` of the result.

    Args:
        source: path of a file; its contents as bytes; an http(s) URL; a PIL image; or an array or tensor, [height,
            width], [height, width, channels] or [channels, height, width] of 1, 3 or 4 channels (if ambiguous, last in
            an array and first in a tensor), from 0 to 255, floats also 0 to 1, uint16 to 65535. Leading axes of 1 are
            dropped.
    Raises:
        ImageError: if it is missing, no image of `readable_formats`, broken, or too large.
        MemoryError, OSError: for other reasons than the image (memory, permission, open files, disk).
    """
    name = "The image"
    if hasattr(source, "detach"):  # a tensor on any device
        return to_rgb(from_array(source.detach().cpu().float().numpy(), channels_first=True), name)
    if isinstance(source, np.ndarray):
        return to_rgb(from_array(source), name)
    if isinstance(source, Image.Image):
        return decoded(source, name)
    if isinstance(source, str) and "://" in source:
        name = source
        file: io.BytesIO | Path = io.BytesIO(download(source))
    elif isinstance(source, bytes):
        file = io.BytesIO(source)
    elif isinstance(source, str | Path):
        file = Path(source)
        name = file.name or str(source)
    else:
        raise ImageError(f"A {type(source).__name__} is no image: give a path, a URL, a PIL image or an array.")
    try:
        image = Image.open(file, formats=readable_formats())
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder: give one of the images in it.") from error
    except Image.DecompressionBombError as error:
        raise too_large(name) from error
    except Exception as error:  # decoders raise anything on a broken file
        raise open_error(name, error) from error
    with image:
        return decoded(image, name)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return FORMATS and, if pillow-heif is installed, HEIC, the format of iPhones."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


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


def decoded(image: Image.Image, name: str) -> Image.Image:
    """Decode and convert an opened image."""
    if image.width * image.height > MAX_PIXELS:
        raise too_large(name, f"{image.width} × {image.height}")
    try:
        # an MPO is a photograph with another one after it, such as its preview
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        result = to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except Exception as error:
        raise open_error(name, error) from error
    if animated:
        result.info["remark"] = f"{name} has several frames: the first one is used."
        warnings.warn(result.info["remark"], stacklevel=3)
    return result


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image of any mode to a new one in RGB."""
    if image.mode.startswith(("I", "F")):
        image = from_array(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    result = image.convert("RGB")
    result = result.copy() if result is image else result
    result.info = {}
    return result


def from_array(array: np.ndarray, channels_first: bool = False) -> Image.Image:
    """Convert an array in one of the layouts of `open_picture` to an image of 8 bits."""
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    shape = list(array.shape)
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or not array.size:
        raise ImageError(f"An array of shape {shape} is no image: give [height, width, channels], 1, 3 or 4 channels.")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise too_large("The array", f"{array.shape[1]} × {array.shape[0]}")
    if array.dtype.kind not in "buif":
        raise ImageError(f"An array of {array.dtype} is no image: give numbers from 0 to 255.")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 65535):  # NaN too
        raise ImageError(
            f"An array with values from {low:g} to {high:g} is no image: give numbers from 0 to 255, or floats from "
            "0 to 1; a processor's pixel_values are for the model."
        )
    if array.dtype == bool or (array.dtype.kind == "f" and high <= 1):
        array = array * np.float32(255)
    elif array.dtype == np.uint16 or high > 255:
        array = array / np.float32(257)  # 65535 is 255 * 257
    array = np.round(array).astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def download(url: str) -> bytes:
    """Run `fetch` in a thread, as Jupyter's has a running event loop."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, fetch(url)).result()


async def fetch(url: str, **client) -> bytes:
    """Download a file, its certificate checked, of at most MAX_BYTES and within SECONDS.

    Args:
        client: options of `httpx.AsyncClient`, such as a restricted `transport`.
    Raises:
        ImageError: if there is no such file, or it is late, too large, or a web page.
    """
    if not url.startswith(("http://", "https://")):
        raise ImageError(f"{url} is no URL of an image: give one that begins with https://, or a path.")
    content = bytearray()
    try:
        async with (
            asyncio.timeout(SECONDS),
            httpx.AsyncClient(follow_redirects=True, timeout=SECONDS, **client) as opened,
            opened.stream("GET", url) as response,
        ):
            response.raise_for_status()
            kind = response.headers.get("content-type", "")
            if kind.startswith("text/"):
                raise ImageError(f"{url} is a page ({kind.split(';')[0]}), no image: give the image's own URL.")
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ImageError(f"{url} has more than {MAX_BYTES // 1_000_000} MB: save it and make it smaller.")
    except ImageError:
        raise
    except TimeoutError as error:
        raise ImageError(f"{url} did not arrive within {SECONDS} seconds: try again, or save it first.") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ImageError(f"{url} could not be fetched ({error or type(error).__name__}).") from error
    return bytes(content)


def too_large(name: str, size: str = "too many") -> ImageError:
    """Return the error for an image of so many pixels."""
    limit = f"{MAX_PIXELS / 1e6:.0f} million pixels"
    return ImageError(f"{name} has {size} pixels: make it smaller, at most {limit}.")


def unreadable(name: str) -> ImageError:
    """Return the error for a file that no decoder can read."""
    return ImageError(f"{name} is not an image that can be read: use an intact PNG, JPEG or WebP file.")


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
    return unreadable(name)
