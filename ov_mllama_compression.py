"""What the notebook calls to make the two IRs smaller."""

from ov_mllama.compress import (
    VISION_OPTIONS,
    compress,
    compression_widgets_helper,
    optimize_vision_encoder,
    vision_encoder_selection_widget,
)

__all__ = [
    "VISION_OPTIONS",
    "compress",
    "compression_widgets_helper",
    "optimize_vision_encoder",
    "vision_encoder_selection_widget",
]
