"""Images without a prompt: encoded ahead of it, and deleted."""

from .checks import images_alone
from .vision import ImageInputs, OVImageEncoder


class PrefetchMixin:
    """Methods of a model on images alone. Their tensors come from the processor, as for `forward`; they do not take
    `turn`."""

    image_encoder: OVImageEncoder

    def encode_images(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, stop=None, progress=None) -> list[float]:
        """Prefetch images into the cache, see `OVImageEncoder.prefetch`."""
        images = self._images(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        return self.image_encoder.prefetch(images, stop, progress) if images else []

    def remove_images(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask) -> None:
        """Delete encoded images from memory and from disk."""
        images = self._images(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        if images:
            self.image_encoder.remove(images)

    def _images(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask) -> ImageInputs | None:
        shape, config = self.image_encoder.pixels_shape, self.config  # type: ignore[attr-defined]
        return images_alone(pixel_values, aspect_ratio_ids, aspect_ratio_mask, shape, config)
