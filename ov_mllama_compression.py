"""IR -> smaller IR: what the notebook calls, and the widgets that choose.

- Which settings there are and go together: `ov_mllama/export/settings.py`; what NNCF is told:
  `ov_mllama/export/compress.py`.
- What it will take in memory, disk and time: `ov_mllama/export/costs.py`.
- Where calibration samples come from: `data_preprocessing.py`, loaded only where they are needed.
"""

from functools import cache, partial
from pathlib import Path

import ipywidgets

from ov_mllama.export.compress import DATA_METRICS, compress_language_model, make_vision_encoder, vision_encoder_path
from ov_mllama.export.settings import (
    DATA_METRIC,
    DEFAULT_SOURCES,
    DEFAULT_VISION_OPTION,
    GROUP_SIZES,
    INT4,
    INT8,
    VISION_OPTIONS,
    Settings,
)
from ov_mllama.runtime.ir import ir_stamp

WIDE = {"description_width": "initial"}  # else a widget's name is cut

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
    """Compresses the language model's weights; an IR of the same settings that is there already is kept.

    Args:
        model_dir: folder written by `convert_mllama`.
        source: of calibration samples, see `data_preprocessing.load_samples`.
        checkpoint: the original, as given to `convert_mllama`: then the 16-bit IR is neither needed nor written.
        force: make it anew.
        settings: `algo`, `ratio`, `sm`, `awq`, `scale_estimation`, `lora`, `gptq`, `group_size`, `all_layers`,
            `dataset_size`, `int8_layers`, as `ov_mllama.export.settings.Settings` explains them.
    Returns:
        path of the compressed .xml in `model_dir`, its name composed from the settings.
    Raises:
        TypeError, ValueError, FileNotFoundError, OSError, MemoryError: as `compress_language_model`, each with the fix.
    """
    chosen = Settings.of(**settings)
    chosen_samples = cache(
        partial(available_samples, Path(model_dir) / chosen.file_name, chosen.dataset_size, source, force)
    )
    return compress_language_model(
        model_dir,
        chosen,
        lambda: language_samples(model_dir, *chosen_samples()),
        lambda: "{} of {}".format(*chosen_samples()),
        checkpoint,
        force,
    )


def available_samples(path: Path, count: int, source: str | Path | None, force: bool) -> tuple[int, str | Path]:
    """The number and source of calibration samples, as the IR's stamp names them.

    Args:
        count: that were asked for; a smaller source has fewer, see `count_samples`.
        source: None for the default that the IR at `path` was made with, else the default that is in reach.
    """
    from ov_mllama.export.calibration import count_samples, default_source

    if source is None:
        _, _, made_with = ir_stamp(path).get("samples", "").partition(" of ")
        source = made_with if made_with in DEFAULT_SOURCES and not force else default_source()
    return count_samples(source, count), source


def language_samples(model_dir: str | Path, count: int, source: str | Path | None):
    """Samples for the language model, each picture encoded by the uncompressed vision encoder when its turn comes."""
    from transformers import AutoConfig, AutoProcessor

    from ov_mllama.export.calibration import prepare_dataset_llm
    from ov_mllama.runtime.ir import VISION_ENCODER_NAME
    from ov_mllama.runtime.shapes import MllamaShapes
    from ov_mllama.runtime.vision import OVImageEncoder

    shapes = MllamaShapes.from_config(AutoConfig.from_pretrained(model_dir))
    encoder = OVImageEncoder(Path(model_dir) / VISION_ENCODER_NAME, shapes, cache_bytes=0)
    return prepare_dataset_llm(AutoProcessor.from_pretrained(model_dir, backend="pil"), encoder, count, source)


def optimize_vision_encoder(
    model_dir: str | Path,
    option: str,
    dataset_size: int = 8,
    source: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Makes the vision encoder smaller; an IR of the same option that is there already is kept.

    Args:
        option: one of VISION_OPTIONS. "INT8 weights compression" needs no pictures: weights are stored in 8 bit, and
            where the CPU can, multiplied in 8 bit with activations that are rounded as they come. "INT8 quantization"
            has fixed ranges for them, found with pictures (NNCF runs each of them three times); "FP16" changes nothing.
        dataset_size: pictures to calibrate with. For the demo model 13 lose nothing, 4 cost 0.3 points, 1 costs 1.3
            (benchmarks/README.md).
        source: of the pictures, see `data_preprocessing.load_samples`.
    Returns:
        path of the .xml in `model_dir`.
    Raises:
        ValueError, FileNotFoundError, OSError, MemoryError: as `make_vision_encoder`, each with the fix.
    """
    path = vision_encoder_path(Path(model_dir), option)
    chosen_samples = cache(partial(available_samples, path, dataset_size, source, force))
    return make_vision_encoder(
        model_dir,
        option,
        dataset_size,
        lambda: image_samples(model_dir, *chosen_samples()),
        lambda: "{} of {}".format(*chosen_samples()),
        force,
    )


def image_samples(model_dir: str | Path, count: int, source: str | Path | None):
    """Samples for the vision encoder."""
    from transformers import AutoProcessor

    from ov_mllama.export.calibration import prepare_dataset_vision

    return prepare_dataset_vision(AutoProcessor.from_pretrained(model_dir, backend="pil"), count, source)


# ---- Widgets --------------------------------------------------------------------------------------------------------


def vision_encoder_selection_widget(device: str = "CPU") -> ipywidgets.Dropdown:
    """A drop-down of VISION_OPTIONS.

    Args:
        device: there for the published notebook's sake: the same is chosen at first for all.
    """
    options = {"options": list(VISION_OPTIONS), "value": DEFAULT_VISION_OPTION}
    return ipywidgets.Dropdown(**options, description="Vision encoder", style=WIDE)


def compression_widgets_helper() -> tuple[ipywidgets.VBox, dict[str, ipywidgets.Widget]]:
    """A box to show, and in it the widget of each setting of `compress`:
    `compress(model_dir, **{name: widget.value for name, widget in widgets.items()})`.

    Choosing the route or the algorithm sets the rest to defaults that go with it, and locks what it has no use for.
    """
    route = ipywidgets.RadioButtons(options=["data-free", "data-aware"])
    widgets = {
        "algo": ipywidgets.Dropdown(options=INT4 + INT8),
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
        defaults = {"ratio": 1.0, "awq": with_data, "all_layers": False, "group_size": 64 if is_int4 else -1}
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
