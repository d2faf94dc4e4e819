"""Convert a checkpoint to two OpenVINO IRs: the graphs of `graphs.py`, traced by `tracing.py`, written by `build.py`.

How the IRs are run is in `model.py`, how they are made smaller in `compress.py`.
"""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from transformers import LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from ov_mllama.export.build import Companions, build_ir
from ov_mllama.export.checkpoint import Checkpoint, every
from ov_mllama.export.companion_files import check_companions_of, save_companions
from ov_mllama.export.costs import CONVERSION_MEMORY_BYTES, Cost, conversion_seconds, taking_over_cost
from ov_mllama.export.graphs import LanguageModel, VisionEncoder
from ov_mllama.export.settings import Settings, own_name
from ov_mllama.export.takeover import (
    PackedWeights,
    packed_bytes,
    packed_weights,
    take_over,
    warn_of_second_quantization,
)
from ov_mllama.export.tracing import make_stateful, name_ports, trace
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_disk_and_memory, ir_stamp, is_current
from ov_mllama.runtime.reference import TRANSFORMERS, Reference, described
from ov_mllama.runtime.shapes import QUERIES, MllamaShapes

logger = logging.getLogger(__name__)

# ---- Graphs ---------------------------------------------------------------------------------------------------------


def vision_encoder_example(config: MllamaConfig) -> dict[str, torch.Tensor]:
    """Return example inputs for the vision encoder (shapes in `VisionEncoder.forward`); values do not matter.

    Tracing runs the module and holds every activation: 10 GB for the 11B tower and four tiles. So there is no tile
    here, and the layers see one row; the graph records lengths and splits all the same.
    """
    vision = config.vision_config
    return {
        "pixel_values": torch.zeros(0, vision.num_channels, vision.image_size, vision.image_size),
        "aspect_ratio_ids": torch.ones(1, dtype=torch.int64),
        "real_tiles": torch.tensor(0),
        "tile_counts": torch.zeros(0, dtype=torch.int64),
    }


def language_model_example(shapes: MllamaShapes) -> dict:
    """Return example inputs: two sequences of two new tokens after two cached ones, and three rows of an image."""
    batch, queries, past, rows = 2, 2, 2, 3
    cache = (batch, shapes.num_kv_heads, past, shapes.head_dim)
    example = {
        "input_ids": torch.ones(batch, queries, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + queries, dtype=torch.int64),
        "position_ids": torch.arange(past, past + queries).expand(batch, -1),
        "logits_to_keep": torch.tensor(1),
        "past_key_values": [(torch.zeros(cache), torch.zeros(cache)) for _ in shapes.self_layers],
    }
    if shapes.cross_layers:
        tensors = [torch.zeros(shapes.cross_kv_shape(name, batch, rows)) for name in shapes.cross_kv_names]
        example["cross_attention_bias"] = torch.zeros(batch, 1, queries, rows)
        example["sees_image"] = torch.ones(batch, queries, 1)
        example["cross_attn_key_values"] = list(zip(tensors[::2], tensors[1::2], strict=True))
    return example


def padding_tiles_are_alike(model: MllamaForConditionalGeneration) -> bool:
    """Return whether the embeddings of all tiles beyond each canvas are equal: then one padding tile can stand for all.

    Meta's are zero, as transformers' own converter writes them (convert_mllama_weights_to_hf.py); a fine-tune of the
    tower may have changed that.
    """
    tower, shapes = model.model.vision_model, MllamaShapes.from_config(model.config)
    tables = (
        tower.pre_tile_positional_embedding.embedding,
        tower.gated_positional_embedding.tile_embedding,
        tower.post_tile_positional_embedding.embedding,
    )
    for table in tables:
        for ratio, tiles in enumerate(shapes.canvas_tiles):
            padding = table.weight[ratio].view(shapes.max_num_tiles, -1)[tiles:]
            if len(padding) and not (padding == padding[0]).all():
                return False
    return True


def convert_vision_encoder(model: MllamaForConditionalGeneration, reference: Reference = TRANSFORMERS) -> ov.Model:
    """Convert the vision tower, the projector and the cross-attention K/V projections to one model, for one image."""
    shapes, vision = MllamaShapes.from_config(model.config), model.config.vision_config
    ov_model = trace(VisionEncoder(model, reference), vision_encoder_example(model.config))
    inputs = {
        "pixel_values": [-1, vision.num_channels, vision.image_size, vision.image_size],
        "aspect_ratio_ids": [1],
        "real_tiles": [],
        "tile_counts": [-1],
    }
    name_ports(ov_model, inputs, shapes.cross_kv_names)
    return ov_model


def convert_language_model(
    model: MllamaForConditionalGeneration | LlamaForCausalLM, reference: Reference = TRANSFORMERS
) -> ov.Model:
    """Convert the language model to one stateful model (ports as in `LanguageModel.forward`, plus `beam_idx`)."""
    shapes = MllamaShapes.from_config(model.config)
    ov_model = trace(LanguageModel(model, reference), language_model_example(shapes))
    inputs = {
        "input_ids": [-1, -1],
        "attention_mask": [-1, -1],
        "position_ids": [-1, -1],
        "logits_to_keep": [],
        **{name: [-1, shapes.num_kv_heads, -1, shapes.head_dim] for name in shapes.past_names},
    }
    if shapes.cross_layers:
        inputs |= {"cross_attention_bias": [-1, 1, -1, -1], "sees_image": [-1, -1, 1]}
        inputs |= {name: list(shapes.cross_kv_shape(name, -1, -1)) for name in shapes.cross_kv_names}
    queries = [QUERIES] if shapes.cross_layers else []
    name_ports(ov_model, inputs, ["logits", *queries, *shapes.present_names])
    make_stateful(ov_model, shapes)
    return ov_model


# ---- Files ----------------------------------------------------------------------------------------------------------


def convert_mllama(
    model_id: str | Path | Checkpoint, out_dir: str | Path, language_model: bool = True, reference: str = "auto"
) -> Path:
    """Convert a Mllama checkpoint to OpenVINO; IRs in `out_dir` that are current stay.

    Files of another checkpoint are replaced or removed: config, tokenizer, templates, IRs, draft model. Files that no
    conversion wrote stay.

    Args:
        model_id: hub id, local folder or `Checkpoint` of any Mllama checkpoint (11B, 90B, Guard, fine-tunes). A
            bfloat16 or float16 checkpoint's weights are stored bit for bit; a float32 one's as float16.
        out_dir: folder for `openvino_vision_encoder.xml`, `openvino_language_model.xml` (and their .bin), the config,
            the generation config and the processor with its chat template.
        language_model: False leaves it to `compress(..., checkpoint=model_id)`, which then never writes it in 16 bit.
        reference: "meta", "transformers" or "auto", see `Checkpoint.reference`: the states that the projector reads,
            and whether tokens before an image attend to it. Meta's weights that a transformers since 4.55 saved again
            need "meta".
    Returns:
        out_dir as a Path. The language model of a checkpoint with an `own_form`, such as Ollama's Q4_K_M, is always
        written, as `own_name`: there is nothing to compress.
    Raises:
        InputError, NotFoundError, AccessError: as `Checkpoint`.
        InputError: if out_dir is the checkpoint's own folder, for another `reference`, or as `check_companions_of` and
            `Checkpoint.tensors`; in each case before anything is written.
        DiskError, OutOfMemoryError: as `check_disk_and_memory`; parts that are done stay, a rerun does the rest.
    """
    checkpoint, out_dir = Checkpoint.of(model_id), Path(out_dir)
    checkpoint.check_apart(out_dir)
    chosen, why = checkpoint.reference(reference)
    stamp = checkpoint.stamp(chosen) | {"format": "16 bit"}
    companions = Companions(out_dir, checkpoint, partial(save_companions, checkpoint), remove_outdated=True)
    packed = packed_weights(checkpoint.tensors()) if checkpoint.own_form else {}
    language_name = own_name(checkpoint.own_form) if packed else LANGUAGE_MODEL_NAME
    stamps = {VISION_ENCODER_NAME: stamp}
    if language_model or packed:
        stamps[language_name] = stamp | (own_stamp(checkpoint.own_form) if packed else {})
    missing = [name for name, expected in stamps.items() if not is_current(out_dir / name, expected)]
    if not missing and companions.are_current():
        logger.info("✅ %s already holds the converted model", out_dir)
        return out_dir

    check_companions_of(checkpoint)
    logger.info("Reference: %s (%s)", described(chosen), why)
    logger.info("⌛ Loading the original model")
    needed = partial(of_both, packed) if packed else every if language_model else of_vision_encoder
    scratch = checkpoint.scratch_bytes(needed=needed)
    check_disk_and_memory(out_dir, scratch, CONVERSION_MEMORY_BYTES, "close other programs")
    model = checkpoint.load(scratch=out_dir, needed=needed)
    costs = {name: conversion_cost_of(MODULES.get(name, LanguageModel)(model)) for name in stamps}
    if packed:
        costs[language_name] = taking_over_cost(packed_bytes(checkpoint.tensors()))
    total = sum(costs[name].disk for name in missing)  # checked for all parts before the first one is written
    if language_name in missing and packed:
        total += costs[language_name].disk  # a temporary copy
    check_disk_and_memory(out_dir, total, CONVERSION_MEMORY_BYTES, "close other programs")
    alike = "alike" if padding_tiles_are_alike(model) else "each"
    mapped: list = []  # memory of the language model's constants, until it is written

    def make_language_model() -> ov.Model:
        ov_model = convert_language_model(model, chosen)
        mapped.append(take_over(ov_model, model, packed, out_dir))
        return ov_model

    makers: dict[str, Callable[[], ov.Model]] = {
        VISION_ENCODER_NAME: partial(convert_vision_encoder, model, chosen),
        language_name: make_language_model,
    }
    titles = {VISION_ENCODER_NAME: "Vision encoder", language_name: "Language model"}
    stamps[VISION_ENCODER_NAME] |= {"padding_tiles": alike}
    for name, expected in stamps.items():
        build_ir(out_dir / name, expected, costs[name], makers[name], titles[name], companions=companions)
    return out_dir


# ---- Quantised weights that are taken over --------------------------------------------------------------------------


def own_stamp(form: str) -> dict[str, str]:
    """Return the part of its stamp that tells how its weights are stored."""
    return {"format": form, "taken_over": "all"}


def own_ir(model_dir: Path) -> Path | None:
    """Return the .xml of a folder's language model in its checkpoint's own format, if there is one."""
    paths = sorted(model_dir.glob("llm_*.xml"))
    return next((path for path in paths if ir_stamp(path).get("taken_over") == "all"), None)


def taken_over(packed: PackedWeights) -> dict[str, str]:
    """Return the stamp's item for matrices that are taken over; none if there are none."""
    return {"taken_over": str(len(packed))} if packed else {}


def remains(packed: PackedWeights, name: str) -> bool:
    """Return whether the language model's IR needs a tensor in 16 bit."""
    return of_language_model(name) and name not in packed


def of_both(packed: PackedWeights, name: str) -> bool:
    """Return whether one of both IRs needs a tensor in 16 bit."""
    return of_vision_encoder(name) or remains(packed, name)


def with_scratch(
    cost: Cost, source: Checkpoint, packed: PackedWeights, kind: Any = MllamaForConditionalGeneration
) -> Cost:
    """Return the cost of compressing a checkpoint's language model, with the temporary files that loading it takes."""
    scratch = source.scratch_bytes(kind, partial(remains, packed)) + packed_bytes(source.tensors(kind))
    return cost._replace(disk=cost.disk + scratch)


def convert_with(
    packed: PackedWeights,
    source: Checkpoint,
    settings: Settings,
    folder: Path,
    kind: Any = MllamaForConditionalGeneration,
    reference: Reference = TRANSFORMERS,
) -> tuple[ov.Model, np.ndarray]:
    """Convert the language model, with matrices as the checkpoint stores them and the others in 16 bit.

    Args:
        packed: as `packed_weights`.
        settings: with which the others are compressed next.
        folder: for temporary files.
        kind: the model's class.
    Returns:
        the model, and memory that its constants share, as `take_over`.
    """
    if source.source.quantized and settings.is_int4:
        warn_of_second_quantization(source.tensors(kind))
    model = source.load(kind, folder, partial(remains, packed))
    ov_model = convert_language_model(model, reference)
    return ov_model, take_over(ov_model, model, packed, folder)


def of_vision_encoder(name: str) -> bool:
    """Return whether the vision encoder's IR needs a tensor of the checkpoint."""
    return name.startswith(("model.vision_model.", "model.multi_modal_projector.")) or ".cross_attn." in name


def of_language_model(name: str) -> bool:
    """Return whether the language model's IR needs a tensor of the checkpoint."""
    return not name.startswith(("model.vision_model.", "model.multi_modal_projector."))


MODULES = {VISION_ENCODER_NAME: VisionEncoder, LANGUAGE_MODEL_NAME: LanguageModel}


def conversion_cost_of(module: torch.nn.Module) -> Cost:
    """Return the cost of converting a module: exact on disk, where `costs.conversion_cost` estimates from a config.

    The vision encoder holds complete cross-attention layers, whose query and output projections are not in its IR.
    """
    weights = [
        weight for name, weight in module.named_parameters() if not re.match(r"cross_attentions\.\d+\.[qo]_", name)
    ]
    size = 2 * sum(weight.numel() for weight in weights)
    return Cost(size, CONVERSION_MEMORY_BYTES, conversion_seconds(size))
