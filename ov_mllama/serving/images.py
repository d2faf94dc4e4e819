"""Images of requests: encoded until their batch runs."""

import io
from dataclasses import dataclass

from PIL import ExifTags, Image
from transformers.models.mllama.image_processing_mllama import get_optimal_tiled_canvas

from ov_mllama.runtime.errors import ImageError
from ov_mllama.runtime.image_files import open_error, open_image, reduction
from ov_mllama.runtime.image_sources import is_pdf
from ov_mllama.runtime.images import at_detail, load_image

MAX_REQUEST_IMAGES = 16  # the smallest takes as many pixels of the processor as four tiles
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageFile:
    """An encoded image file of which only the header has been read.

    Attributes:
        data: the file's bytes.
        width, height: in pixels, as decoded.
        detail: see `ov_mllama.runtime.images.at_detail`.
        param: path of the request's field, for errors.
    """

    data: bytes
    width: int
    height: int
    detail: str = "high"
    param: str | None = None

    @classmethod
    def from_bytes(cls, data: bytes, detail: str = "high", param: str | None = None) -> "ImageFile":
        """Read the header of a file.

        Raises:
            ImageError: if it is not an image of a known format, or too large.
        """
        file = io.BytesIO(data)
        if is_pdf(file):
            raise ImageError("The image is a PDF: send images of its pages.")
        with open_image(file, "The image") as image:
            try:
                width, height = decoded_size(image)
            except Exception as error:  # broken files make decoders raise anything
                raise open_error("The image", error) from error
        return cls(data, width, height, detail, param)

    @property
    def key(self) -> int:
        """Hash that is equal for equal images."""
        return hash((self.data, self.detail))

    def real_tiles(self, side: int, max_tiles: int) -> int:
        """Return the number of tiles of `side` pixels that the image fills."""
        if self.detail == "low":
            return 1
        high, wide = get_optimal_tiled_canvas(self.height, self.width, max_tiles, side)
        return (high // side) * (wide // side)

    def decode(self, side: int) -> Image.Image:
        """Return the image as RGB, shrunk into a tile of `side` pixels if `detail` is "low".

        Raises:
            ImageError: if it is broken after its header.
        """
        return at_detail(load_image(self.data), self.detail, side)


def decoded_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height that an image, opened but not decoded, will have: upright (EXIF), a large one smaller."""
    factor = reduction(*image.size)
    width, height = (-(-side // factor) for side in image.size)
    # getexif() decodes a PNG without EXIF in its header; TIFF's size is upright already
    has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    swapped = has_exif and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return (height, width) if swapped else (width, height)
