"""Whatever a person may call a picture -> RGB, the right way up, or a sentence that says why not.

This file knows nothing of models: the chat, the calibration data and the notebook open their pictures with it.
"""

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

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic", ".heif")
MAX_PIXELS = 50_000_000  # a picture's; a small file can unfold to any number
MAX_BYTES = 50_000_000  # of a file from the network
SECONDS = 30  # for all of it to arrive


class PictureError(ValueError):
    """A picture that cannot be used; its text is a sentence for the person who gave it."""


def open_picture(source) -> Image.Image:
    """A picture as RGB, the right way up (EXIF), transparent parts white, 16 bits a channel brought down to 8.

    Of an animation or of several pages it is the first; a warning says so, and `info["remark"]` of the result.

    Args:
        source: path of a file; its contents as bytes; an address, "https://..." or "http://..."; a PIL image; or an
            array or tensor, [height, width], [height, width, channels] or [channels, height, width] of 1, 3 or 4
            channels (where both could be meant, channels are last in an array and first in a tensor), with values
            from 0 to 255, floats also from 0 to 1, uint16 to 65535. Leading axes of 1 are dropped.
    Raises:
        PictureError: it is missing, no picture, broken, or too large. `readable_formats` are read, whatever the file's
            name.
        MemoryError, OSError: this machine cannot open it now (no memory, no permission, too many open files, a disk
            that fails), which says nothing about the picture.
    """
    name = "The picture"
    if hasattr(source, "detach"):  # a tensor, on whatever device
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
        raise PictureError(f"A {type(source).__name__} is no picture: give a path, an address, an image or an array.")
    try:
        image = Image.open(file, formats=readable_formats())
    except IsADirectoryError as error:
        raise PictureError(f"{name} is a folder: give one of the pictures in it.") from error
    except Image.DecompressionBombError as error:
        raise too_large(name) from error
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise unopened(name, error) from error
    with image:
        return decoded(image, name)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """FORMATS, and where pillow-heif is installed HEIC, in which iPhones keep their photographs."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


DETAILS = ("low", "high")


def at_detail(image: Image.Image, detail: str, tile: int) -> Image.Image:
    """The picture as the model shall see it: "high" as it is, in up to four tiles; "low" shrunk into one tile, which is
    encoded in a quarter to a half of the time and hides what is small. As other programs' option of that name.

    Args:
        tile: its side in pixels.
    Raises:
        ValueError: another `detail`.
    """
    if detail not in DETAILS:
        raise ValueError(f"detail='{detail}' is none of {', '.join(DETAILS)}.")
    if detail == "high" or max(image.size) <= tile:
        return image
    small = image.copy()
    small.thumbnail((tile, tile), Image.Resampling.BICUBIC)
    return small


def decoded(image: Image.Image, name: str) -> Image.Image:
    """An opened picture, read and converted."""
    if image.width * image.height > MAX_PIXELS:
        raise too_large(name, f"{image.width} × {image.height}")
    try:
        # an MPO is a photograph with another one behind it, such as its preview
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        result = to_rgb(ImageOps.exif_transpose(image), name)
    except PictureError:
        raise
    except Exception as error:
        raise unopened(name, error) from error
    if animated:
        result.info["remark"] = f"{name} has several frames: the first one is used."
        warnings.warn(result.info["remark"], stacklevel=3)
    return result


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture of any mode as a new one in RGB."""
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
    """An array in one of the layouts of `open_picture` as a picture of 8 bits a channel."""
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    layout = f"An array of shape {list(array.shape)}"
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or not array.size:
        raise PictureError(f"{layout} is no picture: give [height, width, channels] with 1, 3 or 4 channels.")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise too_large("The array", f"{array.shape[1]} × {array.shape[0]}")
    if array.dtype.kind not in "buif":
        raise PictureError(f"An array of {array.dtype} is no picture: give numbers from 0 to 255.")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 65535):  # NaN too
        raise PictureError(
            f"An array with values from {low:g} to {high:g} is no picture: give numbers from 0 to 255, or floats from "
            "0 to 1; a processor's pixel_values are for the model."
        )
    if array.dtype == bool or (array.dtype.kind == "f" and high <= 1):
        array = array * np.float32(255)
    elif array.dtype == np.uint16 or high > 255:
        array = array / np.float32(257)  # 65535 is 255 * 257
    array = np.round(array).astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def download(url: str) -> bytes:
    """The file at an http(s) address, its certificate checked, of at most MAX_BYTES and within SECONDS.

    Raises:
        PictureError: no such file, none in time, too large, or a web page.
    """
    with ThreadPoolExecutor(1) as executor:  # Jupyter's own thread has a loop already
        return executor.submit(asyncio.run, fetch(url)).result()


async def fetch(url: str, **client) -> bytes:
    """`download`, within a loop.

    Args:
        client: options of `httpx.AsyncClient`, such as a `transport` that reaches less.
    """
    if not url.startswith(("http://", "https://")):
        raise PictureError(f"{url} is no address of a picture: give one that begins with https://, or a path.")
    try:
        return await content_of(url, **client)
    except PictureError:
        raise
    except TimeoutError as error:
        raise PictureError(f"{url} did not arrive within {SECONDS} seconds: try again, or save it first.") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise PictureError(f"{url} could not be fetched ({error or type(error).__name__}).") from error


async def content_of(url: str, **client) -> bytes:
    """`fetch` without its errors' sentences."""
    content = bytearray()
    async with (
        asyncio.timeout(SECONDS),
        httpx.AsyncClient(follow_redirects=True, timeout=SECONDS, **client) as opened,
        opened.stream("GET", url) as response,
    ):
        response.raise_for_status()
        kind = response.headers.get("content-type", "")
        if kind.startswith("text/"):
            raise PictureError(f"{url} is a page ({kind.split(';')[0]}), no picture: give the picture's own address.")
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_BYTES:
                raise PictureError(f"{url} has more than {MAX_BYTES // 1_000_000} MB: save it and make it smaller.")
    return bytes(content)


def too_large(name: str, size: str = "too many") -> PictureError:
    """The refusal of a picture of so many pixels."""
    limit = f"{MAX_PIXELS / 1e6:.0f} million pixels"
    return PictureError(f"{name} has {size} pixels: make it smaller, at most {limit}.")


# a path that leads nowhere; a text too long for a path, and a broken file that leads before its start
NOT_HERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NO_PICTURE = (None, errno.ENAMETOOLONG, errno.EINVAL)


def unopened(name: str, error: Exception) -> Exception:
    """The error to raise where a picture was not opened: a PictureError, unless the machine is at fault."""
    number = getattr(error, "errno", None)
    # Pillow's decoders say it in words
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "out of memory" in str(error).lower():
        return MemoryError(f"{name} finds no memory to be opened in: close other programs, or try again later.")
    if isinstance(error, OSError) and number in NOT_HERE:
        return PictureError(f"{name} is not here: add the picture again, or check its path.")
    if isinstance(error, OSError) and number not in NO_PICTURE:
        return OSError(number, f"{name} could not be read ({error.strerror}): try again, or check disk and permissions")
    return unreadable(name)


def unreadable(name: str) -> PictureError:
    """The refusal of what no decoder can read."""
    return PictureError(f"{name} is not a picture that can be read: use a whole PNG, JPEG or WebP file.")
