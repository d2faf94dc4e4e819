"""Pixels of any mode, bit depth, colour profile and transparency as RGB of 8 bits, a strip at a time."""

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageCms

from .errors import ImageError

STRIP_PIXELS = 1_000_000  # that are converted at a time
BIT_RANGES = {255: 8, 1023: 10, 4095: 12, 16383: 14, 65535: 16}  # greatest value -> bits
GREY_DEEP = ("I", "F")  # first letters of the modes with more than 8 bits
MIN_8_BIT_FLOAT = 128  # greatest value from which floats beyond 1 are taken for 0 to 255
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF tag and its value, as in X-rays
LIGHT, DARK = 200, 55  # luminance that cannot be told from white, from black
VISIBLE_ALPHA = 32
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
PROFILE_MODES = ("RGB", "RGBA", "CMYK", "L")  # in which ICC profiles are followed


def strips(size: tuple[int, int], factor: int = 1) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of full width that cover an image, their heights multiples of `factor` but for the last one's."""
    width, height = size
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def assemble(size: tuple[int, int], factor: int, mode: str, part: Callable[[tuple], Image.Image]) -> Image.Image:
    """Return an image of strips, `part` of each box, made smaller by `factor`."""
    result = Image.new(mode, tuple(-(-side // factor) for side in size))
    for box in strips(size, factor):
        strip = part(box)
        result.paste(strip.reduce(factor) if factor > 1 else strip, (0, box[1] // factor))
    return result


def to_rgb(image: Image.Image, name: str, remarks: list[str], factor: int = 1) -> Image.Image:
    """Convert a decoded image of any mode to a new one in RGB, made smaller by `factor`, and append to `remarks`."""
    if image.mode.startswith(GREY_DEEP):
        return deep_to_rgb(image, name, remarks, factor)
    if factor > 1:
        image = smaller(image, factor)
    image = to_srgb(image)
    if image.has_transparency_data:
        return on_ground(image, name, remarks)
    return image if factor > 1 and image.mode == "RGB" else image.convert("RGB")


def smaller(image: Image.Image, factor: int) -> Image.Image:
    """Return an image of 8 bits made smaller by averaging."""
    mode = "RGBA" if image.has_transparency_data else {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
    result = assemble(image.size, factor, mode, lambda box: image.crop(box).convert(mode))
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return result


# ---- Transparency ---------------------------------------------------------------------------------------------------


def on_ground(image: Image.Image, name: str, remarks: list[str]) -> Image.Image:
    """Return an image on white; on black if white would hide it, such as white writing."""
    ground = "black" if is_hidden_by_white(image) else "white"
    if ground == "black":
        remarks.append(f"{name} is light on a transparent ground: it is shown on black.")

    def part(box):
        strip = image.crop(box).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", strip.size, ground), strip).convert("RGB")

    return assemble(image.size, 1, "RGB", part)


def is_hidden_by_white(image: Image.Image) -> bool:
    """Return whether an image is partly transparent, and most of what is visible is light and hardly anything dark."""
    counts = np.zeros(256, int)
    for box in strips(image.size):
        strip = image.crop(box).convert("RGBA")
        visible = strip.getchannel("A").point([255 * (alpha >= VISIBLE_ALPHA) for alpha in range(256)])
        counts += strip.convert("L").histogram(visible)
    visible, light, dark = counts.sum(), counts[LIGHT:].sum(), counts[:DARK].sum()
    return visible < 0.95 * image.width * image.height and light > 0.5 * visible and dark < 0.05 * visible


# ---- Colour profiles ------------------------------------------------------------------------------------------------


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB by its ICC profile; the image itself if it has none, or a broken or unsuitable one."""
    profile, mode = image.info.get("icc_profile"), image.mode
    mode = "RGBA" if image.has_transparency_data else "RGB" if mode == "P" else mode
    if not profile or mode not in PROFILE_MODES:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):  # exactly as it is
            return image
        target = "RGBA" if mode == "RGBA" else "RGB"
        transform = ImageCms.ImageCmsTransform(source, SRGB, mode, target, 0)  # fails for another colour space
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return assemble(image.size, 1, target, lambda box: transform.apply(image.crop(box).convert(mode)))


# ---- More than 8 bits -----------------------------------------------------------------------------------------------


def deep_to_rgb(image: Image.Image, name: str, remarks: list[str], factor: int) -> Image.Image:
    """Return an image of 16 or 32 bits or floats in RGB, by the range of its values."""

    def rows(box) -> np.ndarray:
        return np.asarray(image.crop(box))

    low, high, gaps = extremes(rows, image.size, name)
    if image.mode == "F":
        is_8_bit = low >= 0 and MIN_8_BIT_FLOAT <= high <= 255
        black, white = (0, 1) if low >= 0 and high <= 1 else (0, 255) if is_8_bit else (low, high)
    else:
        black, white = (0, bit_range(high)) if low >= 0 and high <= 65535 else (low, high)
    if (black, white) not in ((0, 1), (0, 255), (0, 65535)) or (white == 255 and image.mode.startswith("I;16")):
        remarks.append(range_remark(name, low, high, black, white))
    if gaps:
        remarks.append(f"{name} has {gaps} values that are not finite: they are shown black.")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC, 1) == WHITE_IS_ZERO:  # Pillow inverts 8 bits only
        black, white = white, black
    grey = assemble(image.size, factor, "L", lambda box: Image.fromarray(to_8_bits(rows(box), black, white)))
    return grey.convert("RGB")


def bit_range(high: float) -> int:
    """Return the greatest value of the smallest of BIT_RANGES that holds `high`."""
    return next(limit for limit in BIT_RANGES if high <= limit)


def range_remark(name: str, low: float, high: float, black: float, white: float) -> str:
    """Return a remark on how values are shown."""
    if black == 0 and white in BIT_RANGES:
        return f"{name} has values up to {high:g}: it is read as an image of {BIT_RANGES[int(white)]} bits."
    return f"{name} has values from {low:g} to {high:g}: the lowest is shown black, the highest white."


def extremes(rows: Callable[[tuple], np.ndarray], size: tuple[int, int], name: str) -> tuple[float, float, int]:
    """Return the lowest and the highest finite value, and the number of values that are not finite.

    Raises:
        ImageError: if none is finite.
    """
    low, high, gaps = np.inf, -np.inf, 0
    for box in strips(size):
        values = rows(box)
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            gaps += values.size - int(finite.sum())
            values = values[finite]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        raise ImageError(f"{name} has no finite value: give numbers from 0 to 255.")
    return low, high, gaps


def to_8_bits(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Scale numbers so that `black` becomes 0 and `white` 255; what is not finite becomes 0."""
    if values.dtype.kind == "f":
        values = np.where(np.isfinite(values), values, values.dtype.type(black))
    elif (black, white) == (0, 255):
        return values.astype(np.uint8)
    if black:
        values = values - np.float64(black)
    return np.round(values * np.float32(255 / ((white - black) or 1))).astype(np.uint8)


# ---- Arrays ---------------------------------------------------------------------------------------------------------


def from_array(
    array: np.ndarray, remarks: list[str], channels_first: bool, factor_for: Callable[[int, int], int]
) -> Image.Image:
    """Convert an array in one of the layouts of `images.load_image` to RGB.

    Args:
        channels_first: if both could be meant.
        factor_for: returns by how much to make an image of such a width and height smaller; may raise.
    """
    array = channels_last(array, channels_first)
    height, width = array.shape[:2]
    factor = factor_for(width, height)
    if array.dtype.kind not in "buif":
        raise ImageError(f"An array of {array.dtype} is no image: give numbers from 0 to 255.")
    black, white = array_range(array, remarks)

    def part(box):
        values = to_8_bits(array[box[1] : box[3]], black, white)
        return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values)

    mode = {3: "RGB", 4: "RGBA"}.get(array.shape[2] if array.ndim == 3 else 1, "L")
    return to_rgb(assemble((width, height), factor, mode, part), "The array", remarks)


def channels_last(array: np.ndarray, channels_first: bool) -> np.ndarray:
    """Return an array as [height, width] or [height, width, channels].

    Raises:
        ImageError: if it has another layout.
    """
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    shape = list(array.shape)
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)) or not array.size:
        raise ImageError(f"An array of shape {shape} is no image: give [height, width, channels], 1, 3 or 4 channels.")
    return array


def array_range(array: np.ndarray, remarks: list[str]) -> tuple[float, float]:
    """Return the values of an array that are black and white, and append to `remarks`.

    Raises:
        ImageError: for values below 0 or above 65535.
    """
    if array.dtype == np.uint8:
        return 0, 255
    low, high, gaps = extremes(lambda box: array[box[1] : box[3]], array.shape[1::-1], "The array")
    if not (low >= 0 and high <= 65535):
        raise ImageError(
            f"An array with values from {low:g} to {high:g} is no image: give numbers from 0 to 255, or floats from "
            "0 to 1; a processor's pixel_values are for the model."
        )
    if gaps:
        remarks.append(f"The array has {gaps} values that are not finite: they are shown black.")
    if array.dtype == bool or (array.dtype.kind == "f" and high <= 1):
        return 0, 1
    white = bit_range(high)
    if white not in (255, 65535) or (white == 255 and array.dtype == np.uint16):
        remarks.append(range_remark("The array", low, high, 0, white))
    return 0, white
