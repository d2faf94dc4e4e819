"""IR -> smaller IR: INT4 and INT8 weights for the language model, INT8 for the vision encoder, with NNCF.

This file knows NNCF's settings and which of them go together. They write an IR's file name; nothing parses it. Where
calibration samples come from it does not know: it is given a function that opens them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from nncf import CompressWeightsMode, SensitivityMetric
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from transformers import AutoConfig, MllamaConfig

from ov_mllama.convert import checkpoint_folder, checkpoint_stamp, convert_language_model, load_checkpoint
from ov_mllama.files import (
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_disk_and_memory,
    check_model_dir,
    is_current,
    origin,
    save_ir,
    writing,
)
from ov_mllama.pieces import quantize_in_pieces
from ov_mllama.plan import LIBRARIES, compression_cost, quantization_memory, vision_bytes

INT4, INT8 = ("int4_asym", "int4_sym"), ("int8_asym", "int8_sym")
GROUP_SIZES = (32, 64, 128, -1)
DATA_FREE_METRIC = "weight_quantization_error"
DATA_METRIC = "max_activation_variance"  # the default with data, as in the published notebook
DATA_METRICS = tuple(metric.value for metric in SensitivityMetric if metric.value != DATA_FREE_METRIC)
VISION_OPTIONS = {"FP16": "", "INT8 quantization": "_int8", "INT8 weights compression": "_int8_wc"}

Samples = Callable[[], Iterable[dict]]  # opens calibration samples, each an IR's inputs by port name


# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How the language model's weights are compressed. A new setting has its default and its words here, its place in
    `file_name` and in `nncf_arguments`, and, if people shall choose it, a widget in `ov_mllama_compression.py`.

    Attributes:
        algo: "int4_asym", "int4_sym", "int8_asym" or "int8_sym" (or nncf.CompressWeightsMode's members).
        ratio: share of the layers in 4 bit, 0 to 1; the others, chosen by `sm`, get 8.
        sm: sensitivity metric (nncf.SensitivityMetric). Default with data DATA_METRIC, without DATA_FREE_METRIC.
        awq: activation-aware scaling; without data, from the weights alone. For the 11B it takes more memory than a
            16 GB machine has.
        scale_estimation, lora, gptq: corrections that need data.
        group_size: weights that share a scale: 32, 64, 128, or -1 for a whole channel. INT8: -1, the default of `of`.
        all_layers: embedding and `lm_head` in 4 bit as well, else in 8.
        dataset_size: calibration samples; 0 for none.
        int8_layers: layers to keep in 8 bit, by the end of their names, such as "cross_attn.o_proj".
    """

    algo: str = "int4_asym"
    ratio: float = 1.0
    sm: str | None = None
    awq: bool = False
    scale_estimation: bool = False
    lora: bool = False
    gptq: bool = False
    group_size: int = 64
    all_layers: bool = False
    dataset_size: int = 0
    int8_layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, **settings) -> "Settings":
        """Those given, and for the rest defaults that go with them.

        Raises:
            TypeError: there is no such setting.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise TypeError(f"There is no setting {', '.join(unknown)}: there are {', '.join(known)}.")
        for name in ("algo", "sm"):
            settings[name] = getattr(settings.get(name), "value", settings.get(name))  # an NNCF enum's member, or text
        settings["algo"] = settings["algo"] or cls.algo
        settings["group_size"] = settings.get("group_size") or (64 if settings["algo"] in INT4 else -1)
        settings["sm"] = settings["sm"] or (DATA_METRIC if settings.get("dataset_size") else None)
        settings["int8_layers"] = tuple(settings.get("int8_layers", ()))
        return cls(**settings)

    @property
    def is_int4(self) -> bool:
        """Whether any layer may be in 4 bit."""
        return self.algo in INT4

    @property
    def file_name(self) -> str:
        """Such as llm_int4_asym_r10_gs64_max_activation_variance_awq_scale_all_layers.xml."""
        parts = ["llm", self.algo]
        if self.is_int4:
            parts += [f"r{self.ratio * 10:g}", f"gs{self.group_size}"]
        flags = {
            self.sm: self.sm,
            "awq": self.awq,
            "scale": self.scale_estimation,
            "lora": self.lora,
            "gptq": self.gptq,
            "all_layers": self.all_layers,
        }
        parts += [name for name, chosen in flags.items() if name and chosen]
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


# ---- Language model -------------------------------------------------------------------------------------------------


def compress_language_model(
    model_dir: str | Path,
    settings: Settings,
    samples: Samples | None = None,
    samples_name: str = "",
    checkpoint: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Compresses the language model's weights; an IR of the same settings that is there already is kept.

    Args:
        model_dir: folder written by `convert_mllama`.
        samples: opens at least `settings.dataset_size` samples of the language IR's inputs; called only if needed.
        samples_name: what they are, so that others make another IR.
        checkpoint: the original, as given to `convert_mllama`. With it the uncompressed IR is neither needed nor
            written; the result is the same (with scale_estimation, up to the rounding of a few scales).
        force: make it anew.
    Returns:
        path of the compressed .xml in `model_dir`, its name composed from the settings.
    Raises:
        ValueError: settings that do not go together; an IR that is not whole.
        FileNotFoundError: nothing to compress, or no calibration samples.
        OSError, MemoryError: too little room, with the settings that need less.
    """
    model_dir = Path(model_dir)
    check_model_dir(model_dir, (VISION_ENCODER_NAME,) if checkpoint else (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME))
    config = AutoConfig.from_pretrained(model_dir)
    settings.check(config)
    source = checkpoint_folder(checkpoint) if checkpoint else model_dir / LANGUAGE_MODEL_NAME
    stamp = checkpoint_stamp(source) if checkpoint else origin(source)
    stamp |= {"format": settings.algo, "group_size": str(settings.group_size)}
    stamp["samples"] = samples_name if settings.dataset_size else "0"

    def make() -> ov.Model:
        dataset = nncf.Dataset(samples()) if samples and settings.dataset_size else None
        model = convert_language_model(load_checkpoint(source)) if checkpoint else ov.Core().read_model(source)
        return compress_weights(model, settings, dataset)

    less = "leave out the calibration data (dataset_size=0)" if settings.dataset_size else ""
    less = less or ("set awq=False" if settings.awq else "close other programs")
    cost = *compression_cost(settings, config), less
    return make_ir("Compressed model", model_dir / settings.file_name, stamp, cost, make, force)


def make_ir(
    what: str,
    path: Path,
    stamp: dict[str, str],
    cost: tuple[float, float, str],
    make: Callable[[], ov.Model],
    force: bool,
) -> Path:
    """Writes the IR that `make` returns, unless the same is there already; says so either way.

    Args:
        cost: bytes of disk, bytes of memory, and what needs less, for `check_disk_and_memory`.
    """
    if is_current(path, stamp) and not force:
        print(f"✅ {what} already exists and can be found in {path}")
        return path
    check_disk_and_memory(path.parent, *cost)
    with writing(path.parent):
        if force or not is_current(path, stamp):  # asked again: another process may just have made it
            print(f"⌛ {what}: making {path.name} in {cost[1] / 1e9:.1f} GB of memory...")
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


def make_vision_encoder(
    model_dir: str | Path,
    option: str,
    dataset_size: int = 0,
    samples: Samples | None = None,
    samples_name: str = "",
    force: bool = False,
) -> Path:
    """Makes the vision encoder smaller; an IR of the same option that is there already is kept.

    Args:
        option: one of VISION_OPTIONS.
        dataset_size, samples, samples_name: images to calibrate "INT8 quantization" with, as the vision IR's inputs.
    Returns:
        path of the .xml in `model_dir`.
    Raises:
        ValueError: unknown option; FileNotFoundError: no images; OSError, MemoryError: too little room.
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
    stamp = {**origin(original), "format": "int8" if quantized else "int8_asym"}
    stamp["samples"] = samples_name if quantized else "0"

    def make() -> ov.Model:
        model = ov.Core().read_model(original)
        with quiet_nncf():
            if quantized and samples:
                return quantize_vision_encoder(model, samples(), dataset_size, model_dir)
            return nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)

    memory = quantization_memory(config) if quantized else LIBRARIES + vision_bytes(config)
    less = 'choose "INT8 weights compression", which needs no calibration' if quantized else "close other programs"
    return make_ir(f"Vision encoder, {option}", path, stamp, (vision_bytes(config), memory, less), make, force)


def quantize_vision_encoder(model: ov.Model, samples: Iterable[dict], count: int, folder: Path) -> ov.Model:
    """INT8 post-training quantisation with SmoothQuant (https://arxiv.org/abs/2211.10438), alpha as published.

    Attention is quantised too: on a Xeon with AMX that takes as long as leaving it out would, without AMX a quarter
    less, and the demo model loses nothing by it.

    Of each image the first tile has to do: statistics are ranges over rows, and the demo model loses nothing by it
    (benchmarks/README.md). All four tiles took 2 GB more for 4 + 1 of the 11B's layers, and over four times as long.

    Args:
        model: the vision encoder.
        samples: from `prepare_dataset_vision`.
        folder: for temporary files.
    """

    def first_tile(sample):
        one = {name: sample[name][:1] for name in ("pixel_values", "tile_counts")}
        return {**sample, **one, "real_tiles": np.array(1, np.int64)}

    smooth = AdvancedQuantizationParameters(smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=0.6))
    options = {"subset_size": count, "model_type": nncf.ModelType.TRANSFORMER, "advanced_parameters": smooth}

    def quantize(piece, inputs):
        return nncf.quantize(piece, nncf.Dataset(inputs), **options)

    return quantize_in_pieces(model, map(first_tile, samples), quantize, folder)
