"""Calibration samples: images with captions -> inputs of the two IRs, one sample at a time.

- Where samples come from and what becomes of them: `ov_mllama/export/calibration.py`.
- Photographs that need no network: `ov_mllama/export/samples.py`.
"""

from ov_mllama.export.calibration import (
    CAPTION_COLUMNS,
    HUB_SET,
    PACKAGED,
    PHOTOGRAPHS,
    Samples,
    check_processor,
    columns,
    count_samples,
    default_source,
    load_samples,
    open_dataset,
    open_photographs,
    own_samples,
    prepare_dataset_llm,
    prepare_dataset_vision,
    processed,
    questions_about,
)

__all__ = [
    "CAPTION_COLUMNS",
    "HUB_SET",
    "PACKAGED",
    "PHOTOGRAPHS",
    "Samples",
    "check_processor",
    "columns",
    "count_samples",
    "default_source",
    "load_samples",
    "open_dataset",
    "open_photographs",
    "own_samples",
    "prepare_dataset_llm",
    "prepare_dataset_vision",
    "processed",
    "questions_about",
]
