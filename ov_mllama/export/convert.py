"""Checkpoint -> two OpenVINO IRs: the graphs of `graphs.py`, traced by `tracing.py`, written by `ir.py`.

This file knows checkpoints and what goes with them. It does not know how the IRs are run (`model.py`) or made smaller
(`compress.py`).
"""

import errno
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx  # whichever it uses
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from ov_mllama.export.checkpoint import check_tensors, checkpoint_fingerprint
from ov_mllama.export.costs import CONVERSION_MEMORY, conversion_seconds, duration
from ov_mllama.export.graphs import LanguageModel, VisionEncoder
from ov_mllama.export.tracing import make_stateful, name_ports, trace
from ov_mllama.runtime.companions import are_current, source_digest, write_companions
from ov_mllama.runtime.ir import (
    CONVERTER_VERSION,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_disk_and_memory,
    exclusive_lock,
    is_current,
    outdated_files,
    save_ir,
)
from ov_mllama.runtime.reference import TRANSFORMERS, Reference, described, reference_of
from ov_mllama.runtime.shapes import MllamaShapes

DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "golden.*"]  # of a checkpoint on the hub

# ---- Graphs ---------------------------------------------------------------------------------------------------------


def vision_encoder_example(config: MllamaConfig) -> dict[str, torch.Tensor]:
    """Example inputs for the vision encoder (shapes in `VisionEncoder.forward`); values do not matter.

    Tracing runs the module and keeps every activation: 10 GB for the 11B tower and four tiles. So there is no tile
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
    """Example inputs for two rows of two new tokens after two old ones and, if there are images, three rows of one."""
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
    """Whether the embeddings of the tiles beyond each canvas are the same for all of them, as zeros are: then one
    padding tile can stand for all. Meta's are zero, as transformers' own converter writes them
    (convert_mllama_weights_to_hf.py); a fine-tune of the tower may have changed that.
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
    """The vision tower, the projector and the cross-attention K/V projections as one OpenVINO model, for one image."""
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
    """The language model as one stateful OpenVINO model (ports as in `LanguageModel.forward`, plus `beam_idx`)."""
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


TAKEN = {  # model_type: what this converter makes of it, and an example
    "mllama": "this converter takes Llama 3.2 Vision ones (model_type 'mllama'), such as "
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama": "a draft model is a Llama for text (model_type 'llama'), such as meta-llama/Llama-3.2-1B-Instruct",
}


def checkpoint_folder(model_id: str | Path, weights: bool = True, wanted: str = "mllama") -> Path:
    """The local folder of a checkpoint: itself, or the hub's cached download.

    Args:
        weights: False fetches its config alone.
        wanted: its `model_type`, of TAKEN.
    Raises:
        ValueError: not such a checkpoint, or its folder holds no safetensors.
        FileNotFoundError: no such folder or repository, or no network to fetch it.
        PermissionError: the repository is gated and the token at hand has no access.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        folder = _download(str(model_id), DOWNLOADED if weights else ["config.json"])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint or a hub id.")
    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type != wanted:
        raise ValueError(f"{model_id} is a '{model_type}' checkpoint; {TAKEN[wanted]}.")
    if weights and any(folder.glob("*.xml")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} is a converted model: give it as model_dir (make chat MODEL_DIR={folder}), or the checkpoint it "
            "was made of."
        )
    if weights and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has a config but no *.safetensors weights: download it completely, or save the model with "
            "save_pretrained(..., safe_serialization=True). Pickled .bin weights are not loaded."
        )
    return folder


def _download(model_id: str, files: list[str]) -> Path:
    try:
        return Path(snapshot_download(model_id, allow_patterns=files))
    except GatedRepoError as error:
        raise PermissionError(
            f"{model_id} is gated: accept its licence on https://huggingface.co/{model_id}, then log in with "
            "`huggingface_hub.login()` or set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, ValueError) as error:  # ValueError: not of the form "owner/name"
        raise FileNotFoundError(
            f"'{model_id}' is neither a folder here nor a repository on the Hugging Face hub; check the spelling, and "
            "for a private repository log in with `huggingface_hub.login()`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise OSError(
                error.errno,
                f"{model_id} could not be written to {HF_HUB_CACHE} ({error.strerror}): make room there, or let "
                "HF_HOME name a folder on another disk",
            ) from error
        raise FileNotFoundError(
            f"{model_id} could not be fetched from the Hugging Face hub ({type(error).__name__}) and is not in the "
            "local cache; check the network, or give the folder of a checkpoint on this disk."
        ) from error


def check_apart(source: Path, out_dir: Path) -> None:
    """Refuses to write IRs into the checkpoint's own folder: the config that goes beside them would replace its own.

    Raises:
        ValueError: it is that.
    """
    if source.resolve() == out_dir.resolve():
        raise ValueError(f"{out_dir} is the checkpoint itself: choose another folder for its IRs.")


def checkpoint_stamp(folder: Path, reference: Reference | None = None) -> dict[str, str]:
    """What the IRs that this version of the converter makes of a checkpoint say of their origin.

    Args:
        reference: they follow; None for a draft model, which has no part in what references differ in.
    """
    follows = reference._asdict() if reference else {}
    return {"converter_version": CONVERTER_VERSION, "checkpoint": checkpoint_fingerprint(folder), **follows}


def convert_mllama(
    model_id: str | Path, out_dir: str | Path, language_model: bool = True, reference: str = "auto"
) -> Path:
    """Converts a Mllama checkpoint to OpenVINO; whatever `out_dir` already holds of it, whole, is kept.

    What it holds of another checkpoint is replaced or removed: config, tokenizer, templates, IRs, draft model. Files
    that no conversion wrote stay.

    Args:
        model_id: hub id or local folder of any Mllama checkpoint (11B, 90B, Guard, fine-tunes). A bfloat16 or float16
            checkpoint keeps its weights bit for bit; a float32 one is stored as float16.
        out_dir: folder for `openvino_vision_encoder.xml`, `openvino_language_model.xml` (and their .bin), the config,
            the generation config and the processor with its chat template.
        language_model: False leaves it to `compress(..., checkpoint=model_id)`, which then never writes it in 16 bit.
        reference: "meta", "transformers" or "auto", see `reference_of`: what the projector reads, and whether tokens
            before an image attend to it. Meta's weights that a transformers since 4.55 saved again need "meta".
    Returns:
        out_dir as a Path.
    Raises:
        ValueError, FileNotFoundError, PermissionError: as `checkpoint_folder`, each naming the fix; ValueError too if
            out_dir is the checkpoint's own folder, for another `reference`, or as `check_tensors`, before anything is
            written.
        OSError, MemoryError: too little room (`check_disk_and_memory`); parts that are done are kept, a rerun does the
            rest.
    """
    out_dir = Path(out_dir)
    source = checkpoint_folder(model_id)
    check_apart(source, out_dir)
    chosen, why = reference_of(source, reference)
    stamp = checkpoint_stamp(source, chosen)
    parts = {"vision encoder": (out_dir / VISION_ENCODER_NAME, VisionEncoder, convert_vision_encoder)}
    if language_model:
        parts["language model"] = (out_dir / LANGUAGE_MODEL_NAME, LanguageModel, convert_language_model)
    companions = stamp["checkpoint"], source_digest(source)
    if all(is_current(path, stamp) for path, _, _ in parts.values()) and are_current(out_dir, *companions):
        print(f"✅ {out_dir} already holds the converted model")
        return out_dir

    print(f"Reference: {described(chosen)} ({why})")
    print("⌛ Load original model")
    model = load_checkpoint(source)
    sizes = {what: written_bytes(parts[what][1](model)) for what in parts}
    missing = sum(size for what, size in sizes.items() if not is_current(parts[what][0], stamp))
    check_disk_and_memory(out_dir, missing, CONVERSION_MEMORY, "close other programs")
    with exclusive_lock(out_dir):
        if not are_current(out_dir, *companions):
            save = partial(save_companions, source, model)
            write_companions(out_dir, *companions, save, outdated_files(out_dir, stamp["checkpoint"]))
        for what, (path, _, convert) in parts.items():
            if not is_current(path, stamp):  # asked again: another process may just have made it
                size, seconds = f"{sizes[what] / 1e6:,.0f} MB", duration(conversion_seconds(sizes[what]))
                print(f"⌛ Convert {what}, {size}: about {seconds} on two cores...")
                told = {"format": "16 bit"}
                if what == "vision encoder":
                    told["padding_tiles"] = "alike" if padding_tiles_are_alike(model) else "each"
                save_ir(convert(model, chosen), path, stamp | told)
                print(f"✅ {what.capitalize()} successfully converted")
    print(f"✅ Model successfully converted and can be found in {out_dir}")
    return out_dir


def written_bytes(part: torch.nn.Module) -> int:
    """Of an IR in 16 bit. The vision encoder holds whole cross-attention layers, of which queries are not its own."""
    names = dict(part.named_parameters())
    return 2 * sum(
        weight.numel() for name, weight in names.items() if not re.match(r"cross_attentions\.\d+\.[qo]_", name)
    )


def load_checkpoint(folder: Path, kind: Any = MllamaForConditionalGeneration):
    """The checkpoint in 16 bit on the CPU, its weights memory-mapped from the safetensors files.

    Args:
        kind: its class, LlamaForCausalLM for a draft model.
    Raises:
        ValueError: as `check_tensors`.
    """
    check_tensors(folder, kind)
    dtype = AutoConfig.from_pretrained(folder).dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def save_companions(source: Path, model: MllamaForConditionalGeneration, folder: Path) -> None:
    """Writes what running the model needs beside the IRs: config, generation config, processor, chat template; and the
    golden answer, where the checkpoint brings one with its picture."""
    model.config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(source)
    processor.save_pretrained(folder)
    if not processor.chat_template:
        print("⚠️ No chat template: this is a model to continue text, which cannot be asked; take an -Instruct one")
    if (source / "golden.json").is_file():
        picture = source / Path(json.loads((source / "golden.json").read_text(encoding="utf-8"))["picture"]).name
        for path in (source / "golden.json", picture) if picture.is_file() else ():
            shutil.copy(path, folder)
