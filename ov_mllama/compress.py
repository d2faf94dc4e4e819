"""IR -> smaller IR: INT4 and INT8 weights for the language model, INT8 for the vision encoder, with NNCF.

This file knows NNCF's settings and which of them go together. They write an IR's file name; nothing reads it back.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets
import nncf
import openvino as ov
from nncf import CompressWeightsMode, SensitivityMetric
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from transformers import AutoConfig, AutoProcessor, MllamaConfig

from data_preprocessing import prepare_dataset_llm, prepare_dataset_vision
from ov_mllama.convert import checkpoint_folder, checkpoint_stamp, convert_language_model, load_checkpoint
from ov_mllama.files import (
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_model_dir,
    check_room,
    is_current,
    origin,
    save_ir,
    writing,
)
from ov_mllama.graphs import MllamaShapes
from ov_mllama.vision import OVImageEncoder

INT4, INT8 = ("int4_asym", "int4_sym"), ("int8_asym", "int8_sym")
GROUP_SIZES = (32, 64, 128, -1)
DATA_FREE_METRIC = "weight_quantization_error"
DATA_METRICS = tuple(metric.value for metric in SensitivityMetric if metric.value != DATA_FREE_METRIC)
LIBRARIES = 0.7e9  # bytes: OpenVINO, torch, NNCF
VISION_OPTIONS = {"FP16": "", "INT8 quantization": "_int8", "INT8 weights compression": "_int8_wc"}


# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How the language model's weights are compressed; fields as in `compress`."""

    algo: str
    ratio: float
    sm: str | None
    awq: bool
    scale_estimation: bool
    lora: bool
    gptq: bool
    group_size: int
    all_layers: bool
    dataset_size: int
    int8_layers: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Such as llm_int4_asym_r10_gs64_max_activation_variance_awq_scale_all_layers.xml."""
        parts = ["llm", self.algo]
        if self.algo in INT4:
            parts += [f"r{self.ratio * 10:g}", f"gs{self.group_size}"]
        flags = {
            self.sm: self.sm,
            "awq": self.awq,
            "scale": self.scale_estimation,
            "lora": self.lora,
            "gptq": self.gptq,
            "all_layers": self.all_layers,
        }
        parts += [name for name, chosen in flags.items() if chosen]
        parts += [f"int8_{name}" for name in self.int8_layers]
        return "_".join(parts) + ".xml"

    def check(self, config: MllamaConfig) -> None:
        """Refuses what NNCF would refuse, some of it only after minutes.

        Raises:
            ValueError: with the reason and the nearest settings that work.
        """
        with_data = [name for name in ("scale_estimation", "lora", "gptq") if getattr(self, name)]
        if self.sm not in (None, DATA_FREE_METRIC):
            with_data.append(f"sm='{self.sm}'")
        if self.algo not in INT4 + INT8:
            raise ValueError(f"algo='{self.algo}' is none of {', '.join(INT4 + INT8)}.")
        if self.dataset_size < 0:
            raise ValueError(f"dataset_size={self.dataset_size} is no number of samples: use 0 for none, or 32.")
        if self.algo in INT8:
            only_int4 = with_data + [name for name in ("awq", "all_layers", "sm", "int8_layers") if getattr(self, name)]
            only_int4 += ["ratio"] * (self.ratio != 1) + ["group_size"] * (self.group_size != -1)
            only_int4 += ["dataset_size"] * (self.dataset_size > 0)
            if only_int4:
                raise ValueError(
                    f"{self.algo} compresses every layer to 8 bit, one scale a channel, without data: leave out "
                    f"{', '.join(dict.fromkeys(only_int4))}, or choose algo='int4_asym'."
                )
            return
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} is a share of the layers: use 0 (none in 4 bit) to 1 (all).")
        if with_data and not self.dataset_size:
            raise ValueError(
                f"{', '.join(with_data)} need calibration samples: set dataset_size=32, or leave them out (awq works "
                "without data too)."
            )
        if self.gptq and self.lora:
            raise ValueError("gptq and lora exclude each other: set one of them to False.")
        text = config.text_config
        channels = (text.hidden_size, text.intermediate_size)
        if self.group_size != -1 and (self.group_size < 1 or any(channel % self.group_size for channel in channels)):
            fitting = [size for size in GROUP_SIZES if size == -1 or not any(c % size for c in channels)]
            raise ValueError(
                f"group_size={self.group_size} does not divide this model's {channels[0]} and {channels[1]} channels: "
                f"use one of {', '.join(map(str, fitting))} (-1: one group a channel)."
            )

    def room(self, config: MllamaConfig) -> tuple[float, float]:
        """Bytes of disk that the result takes, and of memory at the peak of making it (beside mapped files).

        Sums of what NNCF 3.4 was seen to hold at once, on random weights of the 11B's widths (README, "What it costs").
        """
        text = config.text_config
        mlp = text.num_hidden_layers * text.intermediate_size * text.hidden_size  # weights in one of its three matrices
        heads = text.num_attention_heads
        attention = 2 * text.num_hidden_layers * text.hidden_size**2 * (heads + text.num_key_value_heads) // heads
        embedding = text.vocab_size * text.hidden_size  # as large as the head
        layers = 3 * mlp + attention
        in_4_bit = self.ratio * (layers + 2 * embedding * self.all_layers) if self.algo in INT4 else 0
        disk = 1.02 * (layers + 2 * embedding - 0.47 * in_4_bit)
        memory = LIBRARIES + max(disk, 10.5 * embedding)  # the head in float32, its integers, and what is between
        if self.awq:
            memory += 4 * mlp  # the two larger matrices of each MLP, scaled, in 16 bit
        if self.dataset_size:  # NNCF runs the uncompressed model, whose weights are then held in 16 bit, packed
            memory = max(memory, LIBRARIES + 2.3 * layers + 2 * embedding + vision_bytes(config))
        return disk, memory

    def nncf_arguments(self) -> dict:
        """For `nncf.compress_weights`; the samples come as `dataset` beside it."""
        arguments = {"mode": CompressWeightsMode(self.algo)}
        if self.algo in INT8:
            return arguments
        if self.dataset_size:
            arguments["subset_size"] = self.dataset_size
        if self.int8_layers:
            patterns = [rf".*{name.replace('.', '[.]')}/.*" for name in self.int8_layers]
            arguments["ignored_scope"] = nncf.IgnoredScope(patterns=patterns)
        return {
            **arguments,
            "ratio": self.ratio,
            "group_size": self.group_size,
            "all_layers": self.all_layers,
            "sensitivity_metric": SensitivityMetric(self.sm) if self.sm else None,
            "awq": self.awq,
            "scale_estimation": self.scale_estimation,
            "lora_correction": self.lora,
            "gptq": self.gptq,
        }


def vision_bytes(config: MllamaConfig) -> float:
    """Size of the vision encoder's linear layers in 16 bit."""
    vision = config.vision_config
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return 2 * layer * (vision.num_hidden_layers + vision.num_global_layers)


# ---- Language model -------------------------------------------------------------------------------------------------


def compress(
    model_dir: str | Path,
    algo: str = "int4_asym",
    ratio: float = 1.0,
    sm: str | None = None,
    awq: bool = False,
    scale_estimation: bool = False,
    lora: bool = False,
    gptq: bool = False,
    group_size: int | None = None,
    all_layers: bool = False,
    dataset_size: int = 0,
    force: bool = False,
    int8_layers: tuple[str, ...] = (),
    source: str | Path | None = None,
    checkpoint: str | Path | None = None,
) -> Path:
    """Compresses the language model's weights; an IR of the same settings that is there already is kept.

    Args:
        model_dir: folder written by `convert_mllama`.
        algo: "int4_asym", "int4_sym", "int8_asym" or "int8_sym" (or nncf.CompressWeightsMode's members).
        ratio: share of the layers in 4 bit, 0 to 1; the others, chosen by `sm`, get 8.
        sm: sensitivity metric (nncf.SensitivityMetric). Default "max_activation_variance" with data, NNCF's
            "weight_quantization_error" without.
        awq: activation-aware scaling; without data, from the weights alone. For the 11B it takes more memory than a
            16 GB machine has.
        scale_estimation, lora, gptq: corrections that need data.
        group_size: weights that share a scale: 32, 64, 128, or -1 for a whole channel. Default 64 (INT8: -1).
        all_layers: embedding and `lm_head` in 4 bit as well, else in 8.
        dataset_size: calibration samples; 0 for none.
        force: make it anew.
        int8_layers: layers to keep in 8 bit, by the end of their names, such as "cross_attn.o_proj".
        source: of calibration samples, see `data_preprocessing.load_samples`.
        checkpoint: the original, as given to `convert_mllama`. With it the uncompressed IR is neither needed nor
            written; the result is the same (with scale_estimation, up to the rounding of a few scales).
    Returns:
        path of the compressed .xml in `model_dir`, its name composed from the settings.
    Raises:
        ValueError: settings that do not go together; an IR that is not whole.
        FileNotFoundError: nothing to compress, or no calibration samples.
        OSError, MemoryError: too little room, with the settings that need less.
    """
    model_dir = Path(model_dir)
    settings = Settings(
        algo=getattr(algo, "value", algo),  # a member of NNCF's enum, or its value
        ratio=ratio,
        sm=getattr(sm, "value", sm) or ("max_activation_variance" if dataset_size else None),
        awq=awq,
        scale_estimation=scale_estimation,
        lora=lora,
        gptq=gptq,
        group_size=group_size or (64 if algo in INT4 else -1),
        all_layers=all_layers,
        dataset_size=dataset_size,
        int8_layers=tuple(int8_layers),
    )
    check_model_dir(model_dir, (VISION_ENCODER_NAME,) if checkpoint else (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME))
    config = AutoConfig.from_pretrained(model_dir)
    settings.check(config)
    source_model = checkpoint_folder(checkpoint) if checkpoint else model_dir / LANGUAGE_MODEL_NAME
    stamp = checkpoint_stamp(source_model) if checkpoint else origin(source_model)
    stamp["samples"] = f"{dataset_size} of {source}" if dataset_size else "0"

    def make() -> ov.Model:
        dataset = calibration(model_dir, dataset_size, source) if dataset_size else None
        if checkpoint:
            model = convert_language_model(load_checkpoint(source_model))
        else:
            model = ov.Core().read_model(source_model)
        return compress_weights(model, settings, dataset)

    less = "leave out the calibration data (dataset_size=0)" if dataset_size else "set awq=False" if awq else ""
    room = *settings.room(config), less or "close other programs"
    return make_ir("Compressed model", model_dir / settings.file_name, stamp, room, make, force)


def make_ir(
    what: str,
    path: Path,
    stamp: dict[str, str],
    room: tuple[float, float, str],
    make: Callable[[], ov.Model],
    force: bool,
) -> Path:
    """Writes the IR that `make` returns, unless the same is there already; says so either way.

    Args:
        room: bytes of disk, bytes of memory, and what needs less, for `check_room`.
    """
    if is_current(path, stamp) and not force:
        print(f"✅ {what} already exists and can be found in {path}")
        return path
    check_room(path.parent, *room)
    with writing(path.parent):
        if force or not is_current(path, stamp):  # asked again: another process may just have made it
            print(f"⌛ {what}: making {path.name} in {room[1] / 1e9:.1f} GB of memory...")
            save_ir(make(), path, stamp)
    print(f"✅ {what} can be found in {path}")
    return path


def compress_weights(model: ov.Model, settings: Settings, dataset: nncf.Dataset | None = None) -> ov.Model:
    """The language model with compressed weights. NNCF leaves ignored layers in 16 bit: a second pass gives them 8."""
    with quiet_nncf():
        model = nncf.compress_weights(model, dataset=dataset, **settings.nncf_arguments())
        if settings.int8_layers:
            model = nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)
    return model


def calibration(model_dir: Path, count: int, source: str | Path | None) -> nncf.Dataset:
    """Samples for the language model, each picture encoded by the uncompressed vision encoder when its turn comes."""
    shapes = MllamaShapes.from_config(AutoConfig.from_pretrained(model_dir))
    encoder = OVImageEncoder(model_dir / VISION_ENCODER_NAME, shapes, cache_bytes=0)
    return nncf.Dataset(prepare_dataset_llm(AutoProcessor.from_pretrained(model_dir), encoder, count, source))


@contextlib.contextmanager
def quiet_nncf():
    """NNCF's progress bars stay; its log, and torch's word on CUDA that NNCF's first use brings up, do not."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- Vision encoder -------------------------------------------------------------------------------------------------


def optimize_vision_encoder(
    model_dir: str | Path,
    option: str,
    dataset_size: int = 8,
    source: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Makes the vision encoder smaller; an IR of the same option that is there already is kept.

    Args:
        option: one of VISION_OPTIONS. "INT8 quantization" computes in 8 bit and is calibrated with pictures (NNCF runs
            each of them twice); "INT8 weights compression" only stores in 8 bit; "FP16" changes nothing.
        dataset_size: pictures to calibrate with. For the demo model 13 lose nothing, 4 cost 0.3 points, 1 costs 1.3
            (README, "What it costs").
        source: of the pictures, see `data_preprocessing.load_samples`.
    Returns:
        path of the .xml in `model_dir`.
    Raises:
        ValueError: unknown option; FileNotFoundError: no pictures; OSError, MemoryError: too little room.
    """
    model_dir = Path(model_dir)
    if option not in VISION_OPTIONS:
        raise ValueError(f"'{option}' is none of {', '.join(VISION_OPTIONS)}.")
    original = model_dir / VISION_ENCODER_NAME
    path = original.with_stem(original.stem + VISION_OPTIONS[option])
    check_model_dir(model_dir, (VISION_ENCODER_NAME,))
    if path == original:
        return original
    quantized = option == "INT8 quantization"
    config = AutoConfig.from_pretrained(model_dir)
    stamp = {**origin(original), "samples": f"{dataset_size} of {source}" if quantized else "0"}

    def make() -> ov.Model:
        model = ov.Core().read_model(original)
        with quiet_nncf():
            if not quantized:
                return nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)
            processor = AutoProcessor.from_pretrained(model_dir)
            return quantize_vision_encoder(model, prepare_dataset_vision(processor, dataset_size, source), dataset_size)

    memory = quantization_memory(config) if quantized else LIBRARIES + vision_bytes(config)
    less = 'choose "INT8 weights compression", which needs no calibration' if quantized else "close other programs"
    return make_ir(f"Vision encoder, {option}", path, stamp, (vision_bytes(config), memory, less), make, force)


def quantization_memory(config: MllamaConfig) -> float:
    """Bytes at the peak of quantizing the vision encoder: seen to grow so with the 11B tower's layers and rows."""
    vision = config.vision_config
    rows = MllamaShapes.from_config(config).patches_per_tile
    activations = 51 * rows * vision.hidden_size * (vision.num_hidden_layers + vision.num_global_layers)
    return LIBRARIES + 0.4e9 + 9.3 * vision_bytes(config) + activations


def quantize_vision_encoder(model: ov.Model, samples: Iterable[dict], count: int) -> ov.Model:
    """INT8 post-training quantisation with SmoothQuant (https://arxiv.org/abs/2211.10438), its alpha as in the seed.

    Attention is quantised too: on a Xeon with AMX that takes as long as leaving it out would, without AMX a quarter
    less, and the demo model loses nothing by it.

    NNCF's statistics hold every layer's activations at once: 21 GB for the 11B and its four tiles. They are ranges over
    rows, so the first tile of each picture has to do; on the demo model it loses nothing (README, "What it costs").

    Args:
        model: the vision encoder; comes back with its own number of tiles.
        samples: from `prepare_dataset_vision`.
    """

    def first_tile(sample):
        return {**sample, "aspect_ratio_mask": sample["aspect_ratio_mask"][:1]}

    tiles = list(model.input("aspect_ratio_mask").shape)
    model.reshape({"aspect_ratio_mask": [1]})
    quantized = nncf.quantize(
        model,
        nncf.Dataset(samples, first_tile),
        subset_size=count,
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=AdvancedQuantizationParameters(
            smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=0.6)
        ),
    )
    quantized.reshape({"aspect_ratio_mask": tiles})
    return quantized


# ---- Widgets --------------------------------------------------------------------------------------------------------


def vision_encoder_selection_widget(device: str) -> ipywidgets.Dropdown:
    """A drop-down of VISION_OPTIONS: quantised on CPUs; elsewhere, where that is not verified, compressed weights."""
    default = "INT8 quantization" if device == "CPU" else "INT8 weights compression"
    return ipywidgets.Dropdown(options=list(VISION_OPTIONS), value=default, description="Vision Encoder")


def compression_widgets_helper() -> tuple[ipywidgets.VBox, dict[str, ipywidgets.Widget]]:
    """A box to show, and in it the widget of each argument of `compress`:
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
        widget.description = name

    def set_defaults(_=None):
        is_int4 = widgets["algo"].value in INT4
        with_data = is_int4 and route.value == "data-aware"
        widgets["sm"].options = DATA_METRICS if with_data else [None]
        defaults = {"ratio": 1.0, "awq": with_data, "all_layers": False, "group_size": 64 if is_int4 else -1}
        data_defaults = {"sm": widgets["sm"].options[0], "scale_estimation": with_data, "lora": False, "gptq": False}
        for name, value in {**defaults, **data_defaults, "dataset_size": 32 * with_data}.items():
            widgets[name].value = value
            widgets[name].disabled = not (is_int4 if name in defaults else with_data)

    route.observe(set_defaults, "value")
    widgets["algo"].observe(set_defaults, "value")
    set_defaults()
    return ipywidgets.VBox([route, *widgets.values()]), widgets
