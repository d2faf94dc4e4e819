"""Meta's own checkpoints, consolidated.*.pth with params.json, by the names and in the layout of transformers.

Names, shards and layout are those of llama-models 0.3.0 (llama3/multimodal/model.py, checkpoint.py); constants that are
in no file, and tables of positions by aspect ratio, of transformers 4.46.3 (convert_mllama_weights_to_hf.py).
"""

import json
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MllamaConfig
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from ov_mllama.export.sources.files import AGAIN, hint
from ov_mllama.export.sources.meta_tokenizer import MAX_POSITIONS, SPECIAL, SPECIAL_TOKENS, STOPS
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

PARAMS = "params.json"
VISION: dict[str, Any] = {  # of the one vision tower that Meta published
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "patch_size": 14,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
}
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TEXT_LAYER = (  # names within a layer, and transformers'
    (r"^attention\.w([qkvo])\.", r"{}.\1_proj."),
    (r"^attention\.([qk])_norm\.", r"{}.\1_norm."),
    (r"^attention_norm\.", "input_layernorm."),
    (r"^ffn_norm\.", "post_attention_layernorm."),
    (r"^feed_forward\.w1\.", "mlp.gate_proj."),
    (r"^feed_forward\.w2\.", "mlp.down_proj."),
    (r"^feed_forward\.w3\.", "mlp.up_proj."),
    (r"^gate_attn$", "cross_attn_attn_gate"),
    (r"^gate_ffwd$", "cross_attn_mlp_gate"),
)
OTHERS = (  # names elsewhere
    (r"^text_model\.(tok_embeddings|learnable_embedding)\.", "model.language_model.embed_tokens."),
    (r"^text_model\.norm\.", "model.language_model.norm."),
    (r"^text_model\.output\.", "lm_head."),
    (r"^vision_model\.vision_projection\.", "model.multi_modal_projector."),
    (r"^vision_model\.vision_encoder\.", "model.vision_model."),
    (r"\.resblocks\.", ".layers."),
    (r"\.attn\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.ln_(pre|post)\.", r".layernorm_\1."),
    (r"\.conv1\._linear\.", ".patch_embedding."),
    (r"_tile_pos_embed\.embedding$", "_tile_positional_embedding.embedding.weight"),
    (r"_tile_pos_embed\.", "_tile_positional_embedding."),
    (r"\.positional_embedding$", ".gated_positional_embedding.embedding"),
    (r"\.gated_positional_embedding$", ".gated_positional_embedding.tile_embedding.weight"),
    (r"\.gated_positional_embedding_gate$", ".gated_positional_embedding.gate"),
)
IGNORED = "text_model.rope.freqs"
# shards are joined along the outputs or the inputs of these; others are the same in each
OUTPUTS = re.compile(
    r"(([qkv]|gate|up)_proj|fc1|patch_embedding|embed_tokens|lm_head|multi_modal_projector)\.(weight|bias)$"
)
INPUTS = re.compile(r"(o_proj|down_proj|fc2)\.weight$")


def is_meta(folder: Path) -> bool:
    """Return whether a folder is a checkpoint as Meta distributes it."""
    return (folder / PARAMS).is_file() and not (folder / "config.json").is_file()


# ---- Config ---------------------------------------------------------------------------------------------------------


def config_of(folder: Path) -> MllamaConfig:
    """Return the config that transformers' converter gives a checkpoint.

    Raises:
        InputError: if params.json is none of Llama 3.2 Vision, or its tokenizer is missing.
    """
    try:
        params = json.loads((folder / PARAMS).read_text(encoding="utf-8"))
        params = params.get("model", params)
        if params.get("vision_num_cross_attention_layers", 0) < 1:
            text = params["dim"]  # else no params.json of Meta's
        else:
            text, vision, image_token = text_config(params), vision_config(params), params["vocab_size"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / PARAMS} is no params.json of Llama 3.2 Vision ({error!r}): {AGAIN}") from error
    if not isinstance(text, dict):
        raise InputError(
            f"{folder} is Meta's checkpoint of a Llama for text, which sees no images: take Llama 3.2 Vision; a draft "
            "model is read in Hugging Face's form (config.json and *.safetensors)."
        )
    if params.get("quantization_args"):
        raise InputError(f"{folder} is quantised by Meta (quantization_args in {PARAMS}): take the 16-bit checkpoint.")
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise InputError(
            f"{folder} holds no tokenizer.model: copy it from where {PARAMS} is from, or tokenizer.json and "
            "tokenizer_config.json from the same model on the Hugging Face hub."
        )
    return MllamaConfig(text_config=text, vision_config=vision, image_token_index=image_token, dtype=torch.bfloat16)


def cross_layers(params: dict) -> list[int]:
    """Return the places of cross-attention layers among all layers, each before a self-attention layer."""
    step = math.ceil(params["n_layers"] / params["vision_num_cross_attention_layers"])
    before = list(range(params["n_layers"] - 1, -1, -step))[: params["vision_num_cross_attention_layers"]][::-1]
    return [layer + number for number, layer in enumerate(before)]


def text_config(params: dict) -> dict:
    """Return the `text_config` of params.json."""
    multiple, inner = params["multiple_of"], int(2 * 4 * params["dim"] / 3)
    inner = int((params.get("ffn_dim_multiplier") or 1) * inner)
    first = params["vocab_size"] - SPECIAL_TOKENS
    rope = {"rope_type": "default", "rope_theta": params.get("rope_theta", 500000.0)}
    return {
        "vocab_size": params["vocab_size"],
        "hidden_size": params["dim"],
        "intermediate_size": -(-inner // multiple) * multiple,
        "num_hidden_layers": params["n_layers"] + params["vision_num_cross_attention_layers"],
        "cross_attention_layers": cross_layers(params),
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_parameters": {**rope, "rope_type": "llama3", **ROPE} if params.get("use_scaled_rope") else rope,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": first,
        "eos_token_id": [first + SPECIAL.index(name) for name in STOPS],
        "pad_token_id": first + SPECIAL.index("finetune_right_pad_id"),
    }


def vision_config(params: dict) -> dict:
    """Return the `vision_config` of params.json."""
    tiles = params.get("vision_max_num_chunks", 4)
    return {
        **VISION,
        "image_size": params["vision_chunk_size"],
        "max_num_tiles": tiles,
        "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(tiles)],
        "vision_output_dim": VISION["hidden_size"] * (1 + len(VISION["intermediate_layers_indices"])),
    }


# ---- Weights --------------------------------------------------------------------------------------------------------


def shards_of(folder: Path) -> list[Path]:
    """Return the checkpoint's files in order.

    Raises:
        InputError: if there is none, or one between others is missing.
    """
    files = sorted(folder.glob("consolidated*.pth"))
    numbers = [int(number) for path in files if (number := path.stem.rpartition(".")[2]).isdigit()]
    if not files or (numbers != [*range(len(files))] and [path.name for path in files] != ["consolidated.pth"]):
        found = ", ".join(path.name for path in files) or "no consolidated.*.pth"
        raise InputError(f"{folder} has {PARAMS}, but of the weights {found}: {AGAIN}")
    return files


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors, mapped; none of its code is executed.

    Raises:
        InputError: if it is truncated, or holds anything but tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds Python objects, which are not loaded, beside tensors{hint(path)}") from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is no file of PyTorch weights{hint(path)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} holds no state dict of tensors{hint(path)}")
    return tensors


def stored_tensors(files: list[Path], config: MllamaConfig) -> dict[str, Tensor]:
    """Return the tensors by transformers' names, joined of shards and in its layout when they are read.

    Args:
        config: as `config_of`.
    Raises:
        InputError: as `load_shard`, or if shards hold other tensors than the first.
    """
    shards = [load_shard(path) for path in files]
    for path, shard in zip(files, shards, strict=True):
        if other := sorted(shard.keys() ^ shards[0].keys()):
            raise InputError(f"{path} and {files[0].name} do not both hold {other[0]}: {AGAIN}")
    parts: dict[str, list[torch.Tensor]] = {}
    for stored in sorted(shards[0], reverse=True):  # tok_embeddings before learnable_embedding, which follows them
        if stored != IGNORED:
            name = name_of(stored, config.text_config)
            split = OUTPUTS.search(name) or INPUTS.search(name)
            parts.setdefault(name, []).extend(shard[stored] for shard in (shards if split else shards[:1]))
    return {name: tensor_of(name, tensors, config) for name, tensors in parts.items()}


def name_of(stored: str, text) -> str:
    """Return transformers' name of a tensor; an unknown one's is its own.

    Args:
        text: config of the language model.
    """
    match = re.match(r"text_model\.(layers|cross_attention_layers)\.(\d+)\.(.*)", stored)
    if not match:
        for pattern, replacement in OTHERS:
            stored = re.sub(pattern, replacement, stored)
        return stored
    kind, number, rest = match[1], int(match[2]), match[3]
    crossing = kind == "cross_attention_layers"
    places = [index for index in range(text.num_hidden_layers) if (index in text.cross_attention_layers) == crossing]
    if number >= len(places):
        return stored
    for pattern, replacement in TEXT_LAYER:
        rest = re.sub(pattern, replacement.format("cross_attn" if crossing else "self_attn"), rest)
    return f"model.language_model.layers.{places[number]}.{rest}"


def tensor_of(name: str, parts: list[torch.Tensor], config: MllamaConfig) -> Tensor:
    """Return a tensor that is joined of parts, in the layout of transformers."""
    text, vision = config.text_config, config.vision_config
    change, view = unchanged, len(parts) == 1
    if re.search(r"language_model.*self_attn\.[qk]_proj", name):
        heads = text.num_attention_heads if ".q_proj" in name else text.num_key_value_heads
        change, view = partial(halves, heads=heads), False
    elif re.search(r"(tile_embedding|tile_positional_embedding\.embedding)\.weight$", name):
        change, view = partial(by_aspect_ratio, ratios=vision.supported_aspect_ratios), False
    elif name.endswith("patch_embedding.weight"):
        change = partial(torch.reshape, shape=(-1, vision.num_channels, vision.patch_size, vision.patch_size))
    elif name.endswith("gate"):
        change = partial(torch.reshape, shape=(1,))
    axis = 1 if INPUTS.search(name) else 0
    try:
        shape = joined([part.to("meta") for part in parts], axis, change).shape
    except RuntimeError as error:
        shapes = [list(part.shape) for part in parts]
        raise InputError(f"The parts of {name} have shapes that do not match params.json, {shapes}: {AGAIN}") from error
    return Tensor(tuple(shape), parts[0].dtype, partial(joined, parts, axis, change), mapped=view)


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose layout is the same."""
    return tensor


def joined(parts: list[torch.Tensor], axis: int, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return parts joined along an axis, in another layout."""
    return change(parts[0] if len(parts) == 1 else torch.cat(parts, axis))


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a query or key projection whose rotary embedding pairs neighbours, for one that pairs halves of a head.

    Args:
        weight: [heads * size of a head, columns].
        heads: in it.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def by_aspect_ratio(grid: torch.Tensor, ratios: list[list[int]]) -> torch.Tensor:
    """Return the embeddings of each canvas's tiles: [1 + ratios, tiles * rows * channels], zero without a canvas (0)
    and beyond it.

    Args:
        grid: [tiles, tiles, rows, channels], of which each canvas is a corner.
        ratios: tiles that a canvas is high and wide.
    """
    table = grid.new_zeros(1 + len(ratios), len(grid), grid[0, 0].numel())
    for index, (high, wide) in enumerate(ratios, 1):
        table[index, : high * wide] = grid[:high, :wide].flatten(2).flatten(0, 1)
    return table.flatten(1)
