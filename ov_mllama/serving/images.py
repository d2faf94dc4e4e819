"""Images as requests hold them: encoded, until their batch begins."""

import io
from dataclasses import dataclass

from PIL import ExifTags, Image
from transformers.models.mllama.image_processing_mllama import get_optimal_tiled_canvas

from ov_mllama.runtime.images import MAX_PIXELS, at_detail, open_picture, readable_formats, too_large, unreadable

SIDEWAYS = range(5, 9)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class ImageFile:
    """An encoded image, of which only the header has been read.

    Attributes:
        data: the file's bytes.
        width, height: in pixels, the right way up (EXIF).
        detail: see `ov_mllama.runtime.images.at_detail`.
        param: the request's field that holds it, for errors.
    """

    data: bytes
    width: int
    height: int
    detail: str = "high"
    param: str | None = None

    @classmethod
    def from_bytes(cls, data: bytes, detail: str = "high", param: str | None = None) -> "ImageFile":
        """Read a file's header.

        Raises:
            PictureError: if it is no image of a known format, or has more than `ov_mllama.runtime.images.MAX_PIXELS`.
        """
        try:
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                width, height = upright_size(image)
        except Image.DecompressionBombError as error:
            raise too_large("The picture") from error
        except Exception as error:  # decoders raise whatever a broken file makes them stumble over
            raise unreadable("The picture") from error
        if width * height > MAX_PIXELS:
            raise too_large("The picture", f"{width} × {height}")
        return cls(data, width, height, detail, param)

    @property
    def key(self) -> int:
        """A number by which the same image is known again."""
        return hash((self.data, self.detail))

    def real_tiles(self, side: int, max_tiles: int) -> int:
        """Tiles of `side` pixels that the image fills."""
        if self.detail == "low":
            return 1
        high, wide = get_optimal_tiled_canvas(self.height, self.width, max_tiles, side)
        return (high // side) * (wide // side)

    def decode(self, side: int) -> Image.Image:
        """The image as RGB, shrunk into a tile of `side` pixels if `detail` is "low".

        Raises:
            PictureError: if it is broken behind its header.
        """
        return at_detail(open_picture(self.data), self.detail, side)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once EXIF's orientation is applied, of an image that is opened but not decoded."""
    # getexif() decodes a PNG that has none in its header; TIFF's size is upright already
    has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    turned = has_exif and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return image.size[::-1] if turned else image.size
