"""Compress the IRs: the functions that the notebook calls, and its widgets.

- Settings and their combinations: `ov_mllama/export/settings.py`; their translation for NNCF:
  `ov_mllama/export/compress.py`.
- Memory, disk and time: `ov_mllama/export/costs.py`.
- Calibration samples: `ov_mllama/export/calibration.py`, imported only if needed.
"""

from pathlib import Path

import ipywidgets

from ov_mllama.export.compress import DATA_METRICS, compress_language_model, make_vision_encoder, vision_encoder_path
from ov_mllama.export.settings import (
    DATA_METRIC,
    DEFAULT_VISION_OPTION,
    GROUP_SIZES,
    INT4,
    INT8,
    VISION_OPTIONS,
    Settings,
    vision_options,
)

WIDE = {"description_width": "initial"}  # else a widget's name is truncated

__all__ = [
    "VISION_OPTIONS",
    "Settings",
    "compress",
    "compression_widgets_helper",
    "optimize_vision_encoder",
    "vision_encoder_selection_widget",
]


def compress(
    model_dir: str | Path,
    source: str | Path | None = None,
    checkpoint: str | Path | None = None,
    force: bool = False,
    **settings,
) -> Path:
    """Compress the language model's weights, unless a current IR of the same settings exists.

    Args:
        model_dir: folder written by `convert_mllama`.
        source: of calibration samples, see `data_preprocessing.load_samples`.
        checkpoint: the original, as given to `convert_mllama`: then the 16-bit IR is neither needed nor written.
        force: write it anew.
        settings: `algo`, `ratio`, `sm`, `awq`, `scale_estimation`, `lora`, `gptq`, `group_size`, `all_layers`,
            `dataset_size`, `int8_layers`, as `ov_mllama.export.settings.Settings` explains them.
    Returns:
        path of the compressed .xml in `model_dir`, its name composed from the settings.
    Raises:
        TypeError: for a setting that does not exist.
        InputError, NotFoundError, DiskError, OutOfMemoryError: as `compress_language_model`, each with the fix.
    """
    chosen, samples = Settings.of(**settings), None
    if chosen.dataset_size > 0:
        from ov_mllama.export.calibration import CalibrationSet, language_samples

        samples = CalibrationSet(language_samples, model_dir, chosen.file_name, chosen.dataset_size, source, force)
    return compress_language_model(model_dir, chosen, samples, checkpoint, force)


def optimize_vision_encoder(
    model_dir: str | Path,
    option: str,
    dataset_size: int = 8,
    source: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Make the vision encoder smaller, unless a current IR of the same option exists.

    Args:
        option: one of VISION_OPTIONS. "INT8 weights compression" needs no images: weights are stored in 8 bit and, if
            the CPU can, multiplied in 8 bit with activations rounded at run time. "INT8 quantization" has fixed ranges
            for activations, calibrated on images (NNCF runs each of them three times); "FP16" changes nothing.
        dataset_size: images to calibrate with. With 13 the demo model answers as well as without quantisation, with 4
            it loses 0.3 points, with 1 it loses 1.3 (benchmarks/README.md).
        source: of the images, see `data_preprocessing.load_samples`.
        force: write it anew.
    Returns:
        path of the .xml in `model_dir`.
    Raises:
        InputError, NotFoundError, DiskError, OutOfMemoryError: as `make_vision_encoder`, each with the fix.
    """
    path, samples = vision_encoder_path(Path(model_dir), option), None
    if option == "INT8 quantization":
        from ov_mllama.export.calibration import CalibrationSet, vision_samples

        samples = CalibrationSet(vision_samples, model_dir, path.name, dataset_size, source, force)
    return make_vision_encoder(model_dir, option, samples, force)


# ---- Widgets --------------------------------------------------------------------------------------------------------


def vision_encoder_selection_widget(device: str = "CPU") -> ipywidgets.Dropdown:
    """Return a drop-down of VISION_OPTIONS, without the calibrated one on a CPU that computes it slower than 16 bit.

    Args:
        device: on others than "CPU" all options are offered; the default is the same for all.
    """
    offered = vision_options() if device == "CPU" else [*VISION_OPTIONS]
    options = {"options": offered, "value": DEFAULT_VISION_OPTION}
    return ipywidgets.Dropdown(**options, description="Vision encoder", style=WIDE)


def compression_widgets_helper() -> tuple[ipywidgets.VBox, dict[str, ipywidgets.Widget]]:
    """Return a box to display, and the widget of each setting of `compress`:
    `compress(model_dir, **{name: widget.value for name, widget in widgets.items()})`.

    Choosing the route or the algorithm sets the other widgets to fitting defaults and disables those without effect.
    """
    route, here = ipywidgets.RadioButtons(options=["data-free", "data-aware"]), Settings.here()
    widgets = {
        "algo": ipywidgets.Dropdown(options=INT4 + INT8, value=here.algo),
        "ratio": ipywidgets.FloatSlider(min=0.0, max=1.0, step=0.1),
        "sm": ipywidgets.Dropdown(),
        "awq": ipywidgets.Checkbox(),
        "scale_estimation": ipywidgets.Checkbox(),
        "lora": ipywidgets.Checkbox(),
        "gptq": ipywidgets.Checkbox(),
        "group_size": ipywidgets.Dropdown(options=GROUP_SIZES),
        "all_layers": ipywidgets.Checkbox(),
        "dataset_size": ipywidgets.IntSlider(max=128),
    }
    for name, widget in widgets.items():
        widget.description, widget.style.description_width = name, "8em"

    def set_defaults(_=None):
        is_int4 = widgets["algo"].value in INT4
        with_data = is_int4 and route.value == "data-aware"
        widgets["sm"].options = DATA_METRICS if with_data else [None]
        defaults = {
            "ratio": 1.0,
            "awq": with_data,
            "all_layers": False,
            "group_size": here.group_size if is_int4 else -1,
        }
        data_defaults = {
            "sm": DATA_METRIC if with_data else None,
            "scale_estimation": with_data,
            "lora": False,
            "gptq": False,
        }
        for name, value in {**defaults, **data_defaults, "dataset_size": 32 * with_data}.items():
            widgets[name].value = value
            widgets[name].disabled = not (is_int4 if name in defaults else with_data)

    route.observe(set_defaults, "value")
    widgets["algo"].observe(set_defaults, "value")
    set_defaults()
    return ipywidgets.VBox([route, *widgets.values()]), widgets
