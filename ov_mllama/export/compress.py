"""IR -> smaller IR: INT4 and INT8 weights for the language model, INT8 for the vision encoder, with NNCF.

`settings.py` says which settings there are. They write an IR's file name; nothing parses it. Where calibration
samples come from this file does not know: it is given a function that opens them.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from nncf import CompressWeightsMode, SensitivityMetric
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from ov_mllama.export.convert import (
    check_apart,
    checkpoint_folder,
    checkpoint_stamp,
    convert_language_model,
    load_checkpoint,
)
from ov_mllama.export.costs import Cost, compression_cost, duration, vision_cost
from ov_mllama.export.piecewise import quantize_in_pieces
from ov_mllama.export.settings import DATA_FREE_METRIC, DEFAULT_VISION_OPTION, INT8, VISION_OPTIONS, Settings
from ov_mllama.runtime.companions import are_current, source_digest, write_companions
from ov_mllama.runtime.ir import (
    DRAFT_MODEL_NAME,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_disk_and_memory,
    check_model_dir,
    exclusive_lock,
    is_current,
    provenance,
    save_ir,
)
from ov_mllama.runtime.reference import Reference

DATA_METRICS = tuple(metric.value for metric in SensitivityMetric if metric.value != DATA_FREE_METRIC)

Samples = Callable[[], Iterable[dict]]  # opens calibration samples, each an IR's inputs by port name


# ---- Language model -------------------------------------------------------------------------------------------------


def compress_language_model(
    model_dir: str | Path,
    settings: Settings,
    samples: Samples | None = None,
    samples_name: Callable[[], str] | str = "",
    checkpoint: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Compresses the language model's weights; an IR of the same settings that is there already is kept.

    Args:
        model_dir: folder written by `convert_mllama`.
        samples: opens at least `settings.dataset_size` samples of the language IR's inputs; called only if needed.
        samples_name: what they are, so that others make another IR; a function is called only if needed.
        checkpoint: the original, as given to `convert_mllama`. With it the uncompressed IR is neither needed nor
            written; the result is the same (with scale_estimation, up to the rounding of a few scales). It follows the
            reference that the folder's vision encoder does.
        force: make it anew.
    Returns:
        path of the compressed .xml in `model_dir`, its name composed from the settings.
    Raises:
        ValueError: settings that do not go together; an IR that is not whole.
        FileNotFoundError: nothing to compress, or no calibration samples.
        OSError, MemoryError: too little room, with the settings that need less.
    """
    model_dir = Path(model_dir)
    missing = not (model_dir / LANGUAGE_MODEL_NAME).is_file()
    if missing and not checkpoint and (model_dir / VISION_ENCODER_NAME).is_file():
        raise FileNotFoundError(
            f"{model_dir / LANGUAGE_MODEL_NAME} is missing: give the checkpoint it was left out of, "
            "compress(..., checkpoint=model_id), or have it written by convert_mllama."
        )
    needed = (VISION_ENCODER_NAME,) if checkpoint else (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)
    encoder = check_model_dir(model_dir, needed)[VISION_ENCODER_NAME]
    config = AutoConfig.from_pretrained(model_dir)
    settings.check(config)
    reference = Reference.of(encoder)
    source = checkpoint_folder(checkpoint) if checkpoint else model_dir / LANGUAGE_MODEL_NAME
    stamp = checkpoint_stamp(source, reference) if checkpoint else provenance(source)
    if stamp.get("checkpoint") != encoder["checkpoint"]:
        raise ValueError(
            f"{model_dir} was converted from another checkpoint than {checkpoint}, or from that before it changed: run "
            f"convert_mllama('{checkpoint}', '{model_dir}', language_model=False) first, or choose another folder."
        )
    stamp |= {"format": settings.algo, "group_size": str(settings.group_size)}
    stamp["samples"] = name_of(samples_name) if settings.dataset_size else "0"

    def make() -> ov.Model:
        dataset = nncf.Dataset(samples()) if samples and settings.dataset_size else None
        with quiet_nncf():
            if checkpoint:
                model = convert_language_model(load_checkpoint(source), reference)
            else:
                model = ov.Core().read_model(source)
            return compress_weights(model, settings, dataset)

    less = "leave out the calibration data (dataset_size=0)" if settings.dataset_size else ""
    less = less or ("set awq=False" if settings.awq else "close other programs")
    cost = compression_cost(settings, config)
    return make_ir("Compressed model", model_dir / settings.file_name, stamp, cost, less, make, force)


def make_draft_model(
    checkpoint: str | Path, out_dir: str | Path, settings: Settings | None = None, force: bool = False
) -> Path:
    """Converts and compresses a Llama for text in one go, to guess tokens for a larger model with the same tokenizer.

    Args:
        checkpoint: hub id or local folder, such as meta-llama/Llama-3.2-1B-Instruct for the 11B and the 90B.
        out_dir: a folder of its own, for `openvino_draft_model.xml` (and .bin), config and tokenizer.
        settings: of these, none that need calibration data; default INT4.
        force: make it anew.
    Returns:
        out_dir as a Path, for `ov_mllama.runtime.speculative.OVDraftModel`.
    Raises:
        ValueError, FileNotFoundError, PermissionError: as `checkpoint_folder`, and settings that do not go together.
        OSError, MemoryError: too little room.
    """
    out_dir, settings = Path(out_dir), settings or Settings()
    source = checkpoint_folder(checkpoint, wanted="llama")
    check_apart(source, out_dir)
    config = AutoConfig.from_pretrained(source)
    settings.check(config)
    if settings.dataset_size:
        raise ValueError("A draft model is compressed without data: leave dataset_size out.")
    stamp = checkpoint_stamp(source) | {"format": settings.algo, "group_size": str(settings.group_size)}
    stamp["settings"] = settings.file_name
    companions = stamp["checkpoint"], source_digest(source)
    force = force or not are_current(out_dir, *companions)

    def make() -> ov.Model:
        with quiet_nncf():
            model = load_checkpoint(source, LlamaForCausalLM)

            def save(folder: Path) -> None:
                model.config.save_pretrained(folder)
                model.generation_config.save_pretrained(folder)
                AutoTokenizer.from_pretrained(source).save_pretrained(folder)

            write_companions(out_dir, *companions, save)
            return compress_weights(convert_language_model(model), settings)

    cost = compression_cost(settings, config)
    make_ir("Draft model", out_dir / DRAFT_MODEL_NAME, stamp, cost, "close other programs", make, force)
    return out_dir


def make_ir(
    what: str,
    path: Path,
    stamp: dict[str, str],
    cost: Cost,
    less: str,
    make: Callable[[], ov.Model],
    force: bool,
) -> Path:
    """Writes the IR that `make` returns, unless the same is there already; says so either way.

    Args:
        less: what needs less, for `check_disk_and_memory`.
    """
    if is_current(path, stamp) and not force:
        print(f"✅ {what} already exists and can be found in {path}")
        return path
    check_disk_and_memory(path.parent, cost.disk, cost.memory, less)
    with exclusive_lock(path.parent):
        if force or not is_current(path, stamp):  # asked again: another process may just have made it
            takes = f"about {duration(cost.seconds)} on two cores and {cost.memory / 1e9:.1f} GB of memory"
            print(f"⌛ {what}: making {path.name}, {takes}...")
            save_ir(make(), path, stamp)
    print(f"✅ {what} can be found in {path}")
    return path


def compress_weights(model: ov.Model, settings: Settings, dataset: nncf.Dataset | None = None) -> ov.Model:
    """The language model with compressed weights. NNCF leaves ignored layers in 16 bit: a second pass gives them 8."""
    model = nncf.compress_weights(model, dataset=dataset, **nncf_arguments(settings))
    if settings.int8_layers:
        model = nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)
    return model


def nncf_arguments(settings: Settings) -> dict:
    """For `nncf.compress_weights`; the samples come as `dataset` beside it."""
    arguments = {"mode": CompressWeightsMode(settings.algo)}
    if settings.algo in INT8:
        return arguments
    if settings.dataset_size:
        arguments["subset_size"] = settings.dataset_size
    if settings.int8_layers:
        patterns = [rf".*{name.replace('.', '[.]')}/.*" for name in settings.int8_layers]
        arguments["ignored_scope"] = nncf.IgnoredScope(patterns=patterns)
    return {
        **arguments,
        "ratio": settings.ratio,
        "group_size": settings.group_size,
        "all_layers": settings.all_layers,
        "sensitivity_metric": SensitivityMetric(settings.sm) if settings.sm else None,
        "awq": settings.awq,
        "scale_estimation": settings.scale_estimation,
        "lora_correction": settings.lora,
        "gptq": settings.gptq,
    }


@contextlib.contextmanager
def quiet_nncf():
    """NNCF's progress bars stay; its log, and torch's word on CUDA that it brings up, do not."""
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
    samples_name: Callable[[], str] | str = "",
    force: bool = False,
) -> Path:
    """Makes the vision encoder smaller; an IR of the same option that is there already is kept.

    Args:
        option: one of VISION_OPTIONS.
        dataset_size, samples, samples_name: images to calibrate "INT8 quantization" with, as the vision IR's inputs;
            the others need none.
    Returns:
        path of the .xml in `model_dir`.
    Raises:
        ValueError: unknown option, or one that needs images and gets none; FileNotFoundError: no images to be had;
            OSError, MemoryError: too little room.
    """
    model_dir = Path(model_dir)
    path = vision_encoder_path(model_dir, option)
    if option == "INT8 quantization" and not (samples and dataset_size):
        raise ValueError(
            f"{option} needs pictures: give samples and their number, as `optimize_vision_encoder` of "
            f'ov_mllama_compression does, or choose "{DEFAULT_VISION_OPTION}".'
        )
    original = model_dir / VISION_ENCODER_NAME
    check_model_dir(model_dir, (VISION_ENCODER_NAME,))
    if path == original:
        return original
    quantized = option == "INT8 quantization"
    config = AutoConfig.from_pretrained(model_dir)
    stamp = {**provenance(original), "format": "int8" if quantized else "int8_asym"}
    stamp["samples"] = name_of(samples_name) if quantized else "0"

    def make() -> ov.Model:
        model = ov.Core().read_model(original)
        with quiet_nncf():
            if samples and quantized:
                return quantize_vision_encoder(model, samples(), dataset_size, model_dir)
            return nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)

    cost = vision_cost(option, config, dataset_size)
    less = f'choose "{DEFAULT_VISION_OPTION}", which needs no calibration' if quantized else "close other programs"
    return make_ir(f"Vision encoder, {option}", path, stamp, cost, less, make, force)


def vision_encoder_path(model_dir: Path, option: str) -> Path:
    """The .xml of an option of VISION_OPTIONS.

    Raises:
        ValueError: unknown option.
    """
    if option not in VISION_OPTIONS:
        raise ValueError(f"'{option}' is none of {', '.join(VISION_OPTIONS)}.")
    original = model_dir / VISION_ENCODER_NAME
    return original.with_stem(original.stem + VISION_OPTIONS[option])


def name_of(samples: Callable[[], str] | str) -> str:
    """The name of calibration samples."""
    return samples() if callable(samples) else samples


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
