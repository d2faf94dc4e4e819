"""Convert a checkpoint to two OpenVINO IRs: the graphs of `graphs.py`, traced by `tracing.py`, written by `build.py`.

How the IRs are run is in `model.py`, how they are made smaller in `compress.py`.
"""

import logging
import re
from functools import partial
from pathlib import Path

import openvino as ov
import torch
from transformers import LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from ov_mllama.export.build import Companions, build_ir
from ov_mllama.export.checkpoint import Checkpoint, every
from ov_mllama.export.companion_files import check_companions_of, save_companions
from ov_mllama.export.costs import CONVERSION_MEMORY_BYTES, Cost, conversion_seconds
from ov_mllama.export.graphs import LanguageModel, VisionEncoder
from ov_mllama.export.tracing import make_stateful, name_ports, trace
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_disk_and_memory, is_current
from ov_mllama.runtime.reference import TRANSFORMERS, Reference, described, reference_of
from ov_mllama.runtime.shapes import MllamaShapes

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
    name_ports(ov_model, inputs, ["logits", *shapes.present_names])
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
        reference: "meta", "transformers" or "auto", see `reference_of`: the states that the projector reads, and
            whether tokens before an image attend to it. Meta's weights that a transformers since 4.55 saved again need
            "meta".
    Returns:
        out_dir as a Path.
    Raises:
        InputError, NotFoundError, AccessError: as `Checkpoint`.
        InputError: if out_dir is the checkpoint's own folder, for another `reference`, or as `check_companions_of` and
            `Checkpoint.tensors`; in each case before anything is written.
        DiskError, OutOfMemoryError: as `check_disk_and_memory`; parts that are done stay, a rerun does the rest.
    """
    checkpoint, out_dir = Checkpoint.of(model_id), Path(out_dir)
    checkpoint.check_apart(out_dir)
    chosen, why = reference_of(checkpoint.settings_folder, reference)
    stamp = checkpoint.stamp(chosen) | {"format": "16 bit"}
    companions = Companions(out_dir, checkpoint, partial(save_companions, checkpoint), remove_outdated=True)
    names = [VISION_ENCODER_NAME, *[LANGUAGE_MODEL_NAME] * language_model]
    missing = [name for name in names if not is_current(out_dir / name, stamp)]
    if not missing and companions.are_current():
        logger.info("✅ %s already holds the converted model", out_dir)
        return out_dir

    check_companions_of(checkpoint)
    logger.info("Reference: %s (%s)", described(chosen), why)
    logger.info("⌛ Loading the original model")
    needed = every if language_model else of_vision_encoder
    scratch = checkpoint.scratch_bytes(needed=needed)
    check_disk_and_memory(out_dir, scratch, CONVERSION_MEMORY_BYTES, "close other programs")
    model = checkpoint.load(scratch=out_dir, needed=needed)
    costs = {name: conversion_cost_of(MODULES[name](model)) for name in names}
    total = sum(costs[name].disk for name in missing)  # checked for all parts before the first one is written
    check_disk_and_memory(out_dir, total, CONVERSION_MEMORY_BYTES, "close other programs")
    alike = "alike" if padding_tiles_are_alike(model) else "each"
    parts = {
        VISION_ENCODER_NAME: ("Vision encoder", stamp | {"padding_tiles": alike}, convert_vision_encoder),
        LANGUAGE_MODEL_NAME: ("Language model", stamp, convert_language_model),
    }
    for name in names:
        title, expected, convert = parts[name]
        make = partial(convert, model, chosen)
        build_ir(out_dir / name, expected, costs[name], make, title, companions=companions)
    return out_dir


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
