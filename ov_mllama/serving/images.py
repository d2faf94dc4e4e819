"""Images of requests: encoded until their batch runs."""

import io
from dataclasses import dataclass

from PIL import ExifTags, Image
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

from ov_mllama.runtime.image_files import open_error, open_image, reduction
from ov_mllama.runtime.images import at_detail, load_image
from ov_mllama.runtime.pdf_pages import page_sizes

MAX_REQUEST_IMAGES = 16  # the smallest takes as many pixels of the processor as four tiles
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageFile:
    """An encoded image file, or a page of a PDF, of which only the header has been read.

    Attributes:
        data: the file's bytes, shared by the pages of a PDF.
        width, height: in pixels, as decoded.
        detail: see `ov_mllama.runtime.images.at_detail`.
        param: path of the request's field, for errors.
        page: number from 1; None for an image.
    """

    data: bytes
    width: int
    height: int
    detail: str = "high"
    param: str | None = None
    page: int | None = None

    @classmethod
    def from_bytes(cls, data: bytes, detail: str = "high", param: str | None = None) -> "ImageFile":
        """Read the header of an image file.

        Raises:
            ImageError: if it is not an image of a known format, or too large.
        """
        with open_image(io.BytesIO(data), "The image") as image:
            try:
                width, height = decoded_size(image)
            except Exception as error:  # broken files make decoders raise anything
                raise open_error("The image", error) from error
        return cls(data, width, height, detail, param)

    @classmethod
    def pages_of(cls, data: bytes, detail: str = "high", param: str | None = None) -> "list[ImageFile]":
        """Read the sizes of a PDF's pages.

        Raises:
            ImageError: if it cannot be read, or has more than MAX_REQUEST_IMAGES pages.
        """
        sizes = page_sizes(io.BytesIO(data), "The PDF", MAX_REQUEST_IMAGES)
        return [cls(data, *size, detail, param, page) for page, size in enumerate(sizes, 1)]

    @property
    def key(self) -> int:
        """Hash that is equal for equal images."""
        return hash((self.data, self.detail, self.page))

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
        return at_detail(load_image(self.data, self.page), self.detail, side)


def decoded_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height that an image, opened but not decoded, will have: upright (EXIF), a large one smaller."""
    factor = reduction(*image.size)
    width, height = (-(-side // factor) for side in image.size)
    # getexif() decodes a PNG without EXIF in its header; TIFF's size is upright already
    has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    swapped = has_exif and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return (height, width) if swapped else (width, height)
