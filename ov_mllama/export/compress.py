"""Compress IRs with NNCF: INT4 and INT8 weights for the language model, INT8 for the vision encoder.

`settings.py` has the settings, which compose an IR's file name; nothing parses it. Calibration samples are
`calibration.py`'s; here they are an iterable with a `name` and a `count`.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import nncf
import numpy as np
import openvino as ov
from nncf import CompressWeightsMode, SensitivityMetric
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from ov_mllama.export.build import Companions, build_ir
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.companion_files import save_generation_config
from ov_mllama.export.convert import convert_with, own_ir, taken_over, with_scratch
from ov_mllama.export.costs import compression_cost, vision_cost
from ov_mllama.export.piecewise import quantize_in_pieces
from ov_mllama.export.settings import DATA_FREE_METRIC, DEFAULT_VISION_OPTION, INT8, VISION_OPTIONS, Settings
from ov_mllama.export.takeover import packed_weights
from ov_mllama.runtime.errors import InputError, NotFoundError
from ov_mllama.runtime.ir import (
    DRAFT_MODEL_NAME,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_model_dir,
    ir_stamp,
    provenance,
)
from ov_mllama.runtime.reference import Reference

logger = logging.getLogger(__name__)

DATA_METRICS = tuple(metric.value for metric in SensitivityMetric if metric.value != DATA_FREE_METRIC)


class Samples(Protocol):
    """Calibration samples, each an IR's inputs by port name.

    Attributes:
        name: for the IR's stamp: other samples make another IR.
        count: requested number.
    """

    name: str
    count: int

    def __iter__(self) -> Iterator[dict]: ...


# ---- Language model -------------------------------------------------------------------------------------------------


def compress_language_model(
    model_dir: str | Path,
    settings: Settings,
    samples: Samples | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    force: bool = False,
) -> Path:
    """Compress the language model's weights, unless a current IR of the same settings exists.

    Args:
        model_dir: folder written by `convert_mllama`.
        samples: at least `settings.dataset_size` samples of the language IR's inputs; opened only if needed.
        checkpoint: the original, as given to `convert_mllama`. With it the uncompressed IR is neither needed nor
            written; the result is the same (with scale_estimation, up to the rounding of a few scales). It follows the
            reference that the folder's vision encoder does.
        force: write it anew.
    Returns:
        path of the compressed .xml in `model_dir`, its name composed from the settings.
    Raises:
        InputError: for settings that do not go together, or an incomplete IR.
        NotFoundError: if there is nothing to compress, or no calibration samples.
        DiskError, OutOfMemoryError: as `build_ir`, with the settings that need less.
    """
    model_dir = Path(model_dir)
    original = model_dir / LANGUAGE_MODEL_NAME
    own = None if original.is_file() else own_ir(model_dir)
    source = Checkpoint.of(checkpoint) if checkpoint else None
    if own and not (source and source.fingerprint != ir_stamp(own)["checkpoint"]):
        logger.info("✅ %s holds the checkpoint's own quantised weights: there is nothing to compress", own)
        return own
    if not original.is_file() and not checkpoint and (model_dir / VISION_ENCODER_NAME).is_file():
        raise NotFoundError(
            f"{original} is missing: give the checkpoint it was left out of, compress(..., checkpoint=model_id), or "
            "have it written by convert_mllama."
        )
    needed = (VISION_ENCODER_NAME,) if checkpoint else (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)
    encoder = check_model_dir(model_dir, needed)[VISION_ENCODER_NAME]
    config = AutoConfig.from_pretrained(model_dir)
    settings.check(config)
    reference = Reference.of(encoder)
    stamp = source.stamp(reference) if source else provenance(original)
    if stamp.get("checkpoint") != encoder["checkpoint"]:
        raise InputError(
            f"{model_dir} was converted from another checkpoint than {checkpoint}, or from that before it changed: run "
            f"convert_mllama('{checkpoint}', '{model_dir}', language_model=False) first, or choose another folder."
        )
    packed = packed_weights(source.tensors()) if source else {}
    stamp |= {"format": settings.algo, "group_size": str(settings.group_size)} | taken_over(packed)
    stamp["samples"] = samples.name if samples and settings.dataset_size else "0"
    mapped: list = []  # memory of the model's constants, until it is written

    def make() -> ov.Model:
        dataset = nncf.Dataset(samples) if samples and settings.dataset_size else None
        with quiet_nncf():
            if not source:
                return compress_weights(ov.Core().read_model(original), settings, dataset)
            model, data = convert_with(packed, source, settings, model_dir, reference=reference)
            mapped.append(data)
            return compress_weights(model, settings, dataset)

    advice = "leave out the calibration data (dataset_size=0)" if settings.dataset_size else ""
    advice = advice or ("set awq=False" if settings.awq else "close other programs")
    path, cost = model_dir / settings.file_name, compression_cost(settings, config)
    cost = with_scratch(cost, source, packed) if source else cost
    build_ir(path, stamp, cost, make, "Compressed model", advice, force=force)
    return path


def make_draft_model(
    checkpoint: str | Path, out_dir: str | Path, settings: Settings | None = None, force: bool = False
) -> Path:
    """Convert and compress a Llama for text in one go, to draft tokens for a larger model with the same tokenizer.

    Args:
        checkpoint: hub id or local folder, such as meta-llama/Llama-3.2-1B-Instruct for the 11B and the 90B.
        out_dir: a folder of its own, for `openvino_draft_model.xml` (and .bin), config and tokenizer.
        settings: without calibration data; default INT4.
        force: write it anew.
    Returns:
        out_dir as a Path, for `ov_mllama.runtime.speculative.OVDraftModel`.
    Raises:
        InputError, NotFoundError, AccessError: as `Checkpoint`.
        InputError: for settings that do not go together.
        DiskError, OutOfMemoryError: as `build_ir`.
    """
    out_dir, settings, source = Path(out_dir), settings or Settings.here(), Checkpoint(checkpoint, "llama")
    source.check_apart(out_dir)
    settings.check(source.config)
    if settings.dataset_size:
        raise InputError("A draft model is compressed without data: leave dataset_size out.")
    stamp = source.stamp() | {"format": settings.algo, "group_size": str(settings.group_size)}
    packed = packed_weights(source.tensors(LlamaForCausalLM))
    stamp |= {"settings": settings.file_name} | taken_over(packed)
    mapped: list = []  # memory of the model's constants, until it is written

    def make() -> ov.Model:
        with quiet_nncf():
            model, data = convert_with(packed, source, settings, out_dir, LlamaForCausalLM)
            mapped.append(data)
            return compress_weights(model, settings)

    companions = Companions(out_dir, source, partial(save_draft_companions, source))
    cost = with_scratch(compression_cost(settings, source.config), source, packed, LlamaForCausalLM)
    build_ir(out_dir / DRAFT_MODEL_NAME, stamp, cost, make, "Draft model", companions=companions, force=force)
    return out_dir


def save_draft_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what running a draft model needs beside its IR: config, generation config, tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.settings_folder)
    checkpoint.config.save_pretrained(folder)
    save_generation_config(checkpoint.settings_folder, checkpoint.config, tokenizer, folder)
    tokenizer.save_pretrained(folder)


def compress_weights(model: ov.Model, settings: Settings, dataset: nncf.Dataset | None = None) -> ov.Model:
    """Compress the language model's weights. NNCF leaves ignored layers in 16 bit: a second pass gives them 8."""
    model = nncf.compress_weights(model, dataset=dataset, **nncf_arguments(settings))
    if settings.int8_layers:
        model = nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)
    return model


def nncf_arguments(settings: Settings) -> dict:
    """Return arguments of `nncf.compress_weights`, all but `dataset`."""
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
    """Silence NNCF's log, and torch's warning about CUDA that it causes; progress bars stay."""
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
    model_dir: str | Path, option: str, samples: Samples | None = None, force: bool = False
) -> Path:
    """Make the vision encoder smaller, unless a current IR of the same option exists.

    Args:
        option: one of VISION_OPTIONS.
        samples: to calibrate "INT8 quantization" with, as the vision IR's inputs; the other options need none.
        force: write it anew.
    Returns:
        path of the .xml in `model_dir`.
    Raises:
        InputError: for an unknown option, or if one that needs samples gets none.
        NotFoundError: if the samples cannot be found.
        DiskError, OutOfMemoryError: as `build_ir`.
    """
    model_dir = Path(model_dir)
    path, original = vision_encoder_path(model_dir, option), model_dir / VISION_ENCODER_NAME
    quantized = option == "INT8 quantization"
    if quantized and not (samples and samples.count):
        raise InputError(
            f"{option} needs images: give samples, as `optimize_vision_encoder` of ov_mllama_compression does, or "
            f'choose "{DEFAULT_VISION_OPTION}".'
        )
    check_model_dir(model_dir, (VISION_ENCODER_NAME,))
    if path == original:
        return original
    stamp = {**provenance(original), "format": "int8" if quantized else "int8_asym"}
    stamp["samples"] = samples.name if samples and quantized else "0"

    def make() -> ov.Model:
        model = ov.Core().read_model(original)
        with quiet_nncf():
            if samples and quantized:
                return quantize_vision_encoder(model, samples, samples.count, model_dir)
            return nncf.compress_weights(model, mode=CompressWeightsMode.INT8_ASYM)

    cost = vision_cost(option, AutoConfig.from_pretrained(model_dir), samples.count if samples else 0)
    advice = f'choose "{DEFAULT_VISION_OPTION}", which needs no calibration' if quantized else "close other programs"
    build_ir(path, stamp, cost, make, f"Vision encoder, {option}", advice, force=force)
    return path


def vision_encoder_path(model_dir: Path, option: str) -> Path:
    """Return the .xml of an option of VISION_OPTIONS.

    Raises:
        InputError: for an unknown option.
    """
    if option not in VISION_OPTIONS:
        raise InputError(f"'{option}' is none of {', '.join(VISION_OPTIONS)}.")
    original = model_dir / VISION_ENCODER_NAME
    return original.with_stem(original.stem + VISION_OPTIONS[option])


def quantize_vision_encoder(model: ov.Model, samples: Iterable[dict], count: int, folder: Path) -> ov.Model:
    """Quantise the vision encoder to INT8 after training, with SmoothQuant (https://arxiv.org/abs/2211.10438).

    Alpha is as published. Attention is quantised too: on a Xeon with AMX that runs as fast as without it, elsewhere a
    quarter faster, and the demo model answers as well.

    Only the first tile of each image is used: statistics are ranges over rows, and the demo model answers as well
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
