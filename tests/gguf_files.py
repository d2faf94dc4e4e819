"""Ollama's files of a tiny Mllama: GGUF in both generations, the folder they lie in, and the weights a reader returns.

Written from Ollama's tables of names, shapes and types, and sharing no code with the reader. `gguf` reads K-quants and
does not write them, so they are packed here.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, MllamaConfig, MllamaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tiny_mllama import make_checkpoint

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
Q4_K, Q6_K, Q8_0 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0
FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_K_M": 15}
BLOCK = 256  # weights in a block of a K-quant
DEMO = Path(__file__).resolve().parents[1] / "demo_model"

Stored = tuple[np.ndarray, GGMLQuantizationType]  # bytes of blocks, or numbers, and their type

# ---- The checkpoint ----


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make_wide_checkpoint(folder: Path, heads: int = 8, kv_heads: int = 2, seed: int = 0) -> Path:
    """Write a random checkpoint like Meta's whose rows K-quants can hold, with the demo's 512 tokens; return its
    folder. No tensor is zero, and gates have both signs."""
    make_checkpoint(
        folder,
        heads=heads,
        kv_heads=kv_heads,
        rope=ROPE,
        cross_layers=(1, 3),
        seed=seed,
        vision_layers=4,
        intermediate=(1, 2),
        meta=True,
        spread=0.05,
        tokenizer=AutoTokenizer.from_pretrained(DEMO),
        text={"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "max_position_embeddings": 131072},
        vision={"hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "vision_output_dim": 3 * BLOCK},
    )
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name, tensor in sorted(tensors.items()):
        if name.endswith("bias"):
            tensor.normal_(std=0.1, generator=generator)
        elif is_gate(name):
            tensor.mul_(torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1)
    save_file(tensors, path, metadata={"format": "pt"})
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.image_mean, processor.image_processor.image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    processor.save_pretrained(folder)
    return folder


def is_gate(name: str) -> bool:
    """Return whether a tensor of the model is one of its gates."""
    return name.endswith(("gate", "gate_attn", "gate_ffn"))


def state_of(folder: Path) -> tuple[MllamaConfig, dict[str, torch.Tensor]]:
    """Return a checkpoint's config, and its tensors by the names that transformers has for them now."""
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    return model.config, model.state_dict()


# ---- Names ----


TEXT, VISION = "model.language_model", "model.vision_model"
TEXT_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    **{f"cross_attn_{part}": f"cross_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"cross_attn_{part}": f"cross_attn.{part}" for part in ("q_norm", "k_norm")},
    **{gate: gate for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate")},
}
VISION_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "attn_gate": "gate_attn",
    "ffn_gate": "gate_ffn",
}
FIRST_GENERATION = {  # the MLP's two names change places
    "attn_norm": "ln1",
    "ffn_norm": "ln2",
    "attn_output": "attn_out",
    "ffn_up": "ffn_down",
    "ffn_down": "ffn_up",
}
SINGLE = {
    "token_embd": f"{TEXT}.embed_tokens",
    "output_norm": f"{TEXT}.norm",
    "output": "lm_head",
    "v.class_embd": f"{VISION}.class_embedding",
    "v.patch_embd": f"{VISION}.patch_embedding",
    "v.position_embd.weight": f"{VISION}.gated_positional_embedding.embedding",
    "v.tile_position_embd": f"{VISION}.gated_positional_embedding.tile_embedding",
    "v.tile_position_embd.gate": f"{VISION}.gated_positional_embedding.gate",
    "v.pre_tile_position_embd": f"{VISION}.pre_tile_positional_embedding.embedding",
    "v.pre_tile_position_embd.gate": f"{VISION}.pre_tile_positional_embedding.gate",
    "v.post_tile_position_embd": f"{VISION}.post_tile_positional_embedding.embedding",
    "v.post_tile_position_embd.gate": f"{VISION}.post_tile_positional_embedding.gate",
    "v.pre_ln": f"{VISION}.layernorm_pre",
    "v.post_ln": f"{VISION}.layernorm_post",
    "mm.0": "model.multi_modal_projector",
}
POSITION_GATE = "v.position_embd.gate"  # the complement of the tiles', and no tensor of the model


def parts_of(config: MllamaConfig, generation: int) -> Iterator[tuple[str, str]]:
    """Yield the names in a GGUF file and in transformers, most without `.weight` or `.bias`."""
    yield from SINGLE.items()
    for layer in range(config.text_config.num_hidden_layers):
        for ours, theirs in TEXT_LAYER.items():
            yield f"blk.{layer}.{ours}", f"{TEXT}.layers.{layer}.{theirs}"
    vision = config.vision_config
    for prefix, tower, layers in (
        ("v.blk", "transformer", vision.num_hidden_layers),
        ("v.global.blk", "global_transformer", vision.num_global_layers),
    ):
        for layer in range(layers):
            for ours, theirs in VISION_LAYER.items():
                name = FIRST_GENERATION.get(ours, ours) if generation == 1 else ours
                yield f"{prefix}.{layer}.{name}", f"{VISION}.{tower}.layers.{layer}.{theirs}"


def names_of(config: MllamaConfig, state: Mapping[str, Any], generation: int) -> dict[str, str]:
    """Return the model's names by the file's: of every tensor of the model, once."""
    ends = "", ".weight", ".bias"
    names = {a + end: b + end for a, b in parts_of(config, generation) for end in ends if b + end in state}
    assert sorted(names.values()) == sorted(state)
    return names


# ---- Values ----


def heads_of(name: str, config: MllamaConfig) -> int:
    """Return the heads by which a matrix's rows are reordered; 0 if they are not."""
    if re.fullmatch(r"v\.(global\.)?blk\.\d+\.attn_[qk]\.weight", name):
        return config.vision_config.attention_heads
    if re.fullmatch(r"blk\.\d+\.(attn_q|cross_attn_q_proj)\.weight", name):
        return config.text_config.num_attention_heads
    if re.fullmatch(r"blk\.\d+\.(attn_k|cross_attn_k_proj)\.weight", name):
        return config.text_config.num_key_value_heads
    return 0


def reordered(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a matrix with the halves of each head's rows interleaved, as llama.cpp's rotary embedding has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def restored(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `reordered`."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope_factors(config: MllamaConfig) -> np.ndarray:
    """Return by how much llama3's scaling divides each frequency, as llama.cpp's converter computes it."""
    text = config.text_config
    rope = text.rope_parameters
    size = text.hidden_size // text.num_attention_heads
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return (1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))).astype(np.float32)


def more_bits(layer: int, layers: int) -> bool:
    """Return whether llama.cpp's mix gives six bits to values and down projections of this layer."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(name: str, weight: np.ndarray, config: MllamaConfig, types: str, generation: int) -> GGMLQuantizationType:
    """Return the type of a tensor in a file of `types`, a key of FILE_TYPES."""
    in_vision = name.startswith(("v.", "mm."))
    if weight.ndim < 2 or "position_embd" in name:
        return F32
    if types == "f16" or (in_vision and (generation == 1 or "attn_v" not in name)):
        return F16
    if types == "q8_0":
        return Q8_0
    layer = re.match(r"(?:v\.|v\.global\.)?blk\.(\d+)\.(attn_v|ffn_down)\.", name)
    layers = config.vision_config.num_hidden_layers if in_vision else config.text_config.num_hidden_layers
    return Q6_K if name == "output.weight" or (layer and more_bits(int(layer[1]), layers)) else Q4_K


def stored(weight: np.ndarray, kind: GGMLQuantizationType) -> Stored:
    """Return a tensor in a type of `type_of`."""
    packers = {Q4_K: pack_q4_k, Q6_K: pack_q6_k}
    return (packers[kind](weight) if kind in packers else quantize(weight, kind)), kind


def values_of(name: str, tensor: torch.Tensor, config: MllamaConfig, raw_vision: bool) -> np.ndarray:
    """Return a tensor of the model as its file has it, in float32."""
    values, heads = tensor.float().numpy(), heads_of(name, config)
    if raw_vision and name.startswith("v."):
        return values
    if name.startswith("v.") and name.endswith("gate"):
        return np.tanh(values)
    return reordered(values, heads) if heads else values


# ---- K-quants ----


def divided(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return quotients, zero where the divisor is."""
    return np.divide(values, by, out=np.zeros(np.broadcast_shapes(values.shape, by.shape), np.float32), where=by != 0)


def pack_q4_k(weight: np.ndarray) -> np.ndarray:
    """Quantise rows of multiples of BLOCK weights to Q4_K."""
    groups = weight.astype(np.float32).reshape(-1, 8, 32)
    low = np.minimum(groups.min(-1), 0)
    scales, mins = (groups.max(-1) - low) / 15, -low
    d, dmin = ((of.max(-1, keepdims=True) / 63).astype(np.float16) for of in (scales, mins))
    scales, mins = (divided(of, by.astype(np.float32)).round().clip(0, 63) for of, by in ((scales, d), (mins, dmin)))
    step, offset = (d.astype(np.float32) * scales)[..., None], (dmin.astype(np.float32) * mins)[..., None]
    weights = divided(groups + offset, step).round().clip(0, 15)
    return q4_k_blocks(d, dmin, scales, mins, weights).reshape(len(weight), -1)


def q4_k_blocks(d: np.ndarray, dmin: np.ndarray, scales: np.ndarray, mins: np.ndarray, weights: np.ndarray):
    """Return blocks of Q4_K, [blocks, 144]: group by group `d * scales * weights - dmin * mins`.

    Args:
        d, dmin: float16, [blocks, 1].
        scales, mins: 0 to 63, [blocks, 8].
        weights: 0 to 15, [blocks, 8, 32].
    """
    scales, mins, weights = (array.astype(np.uint8) for array in (scales, mins, weights))
    first = [array[:, :4] | (array[:, 4:] >> 4) << 6 for array in (scales, mins)]
    last = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    pairs = (weights[:, 0::2] | weights[:, 1::2] << 4).reshape(len(d), -1)
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), *first, last, pairs], axis=1)


def pack_q6_k(weight: np.ndarray) -> np.ndarray:
    """Quantise rows of multiples of BLOCK weights to Q6_K."""
    groups = weight.astype(np.float32).reshape(-1, 16, 16)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
    scales = -extreme / 32  # of either sign, so that the extreme weight is -32
    d = (np.abs(scales).max(-1, keepdims=True) / 127).astype(np.float16)
    scales = divided(scales, d.astype(np.float32)).round().clip(-128, 127)
    weights = divided(groups, (d.astype(np.float32) * scales)[..., None]).round().clip(-32, 31)
    return q6_k_blocks(d, scales, weights).reshape(len(weight), -1)


def q6_k_blocks(d: np.ndarray, scales: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return blocks of Q6_K, [blocks, 210]: group by group `d * scales * weights`.

    Args:
        d: float16, [blocks, 1].
        scales: -128 to 127, [blocks, 16].
        weights: -32 to 31, [blocks, 16, 16].
    """
    unsigned = (weights + 32).astype(np.uint8)
    halves = unsigned.reshape(-1, 2, 2, 64)
    low = (halves[:, :, 0] & 15) | (halves[:, :, 1] & 15) << 4
    quarters = unsigned.reshape(-1, 2, 4, 32) >> 4
    high = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    parts = low, high, scales.astype(np.int8).view(np.uint8), d.view(np.uint8)
    return np.concatenate([part.reshape(len(d), -1) for part in parts], axis=1)


Q4_K_QUIRKS = {  # d, dmin, scales, mins
    "scale zero, minimum not": (1e-3, 1e-2, 0, 9),
    "d zero, minimum not": (0.0, 1e-2, 7, 9),
    "all zero": (0.0, 0.0, 0, 0),
    "negative d": (-2e-3, 1e-3, 5, 3),
    "negative dmin": (2e-3, -1e-3, 5, 3),
    "small scale, largest minimum": (1e-5, 3e-3, 1, 63),
    "zero point of no float16": (6e-8, 8e-3, 1, 63),
    "largest scales and minimums": (3e-4, 2e-3, 63, 63),
}
Q6_K_QUIRKS = {  # d, scales
    "d zero": (0.0, 5),
    "scale zero": (1e-3, 0),
    "negative d": (-1e-4, 30),
    "lowest scale": (5e-5, -128),
    "highest scale": (5e-5, 127),
    "tiny d": (6e-8, 100),
}


def quirky(blocks: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return blocks of a matrix with Q4_K_QUIRKS or Q6_K_QUIRKS in its first ones, their weights random."""
    random = np.random.default_rng(0)
    if kind == Q4_K:
        d, dmin, scales, mins = (np.array(column)[:, None] for column in zip(*Q4_K_QUIRKS.values(), strict=True))
        weights, eight = random.integers(0, 16, (len(d), 8, 32)), np.ones((1, 8), np.uint8)
        made = q4_k_blocks(d.astype(np.float16), dmin.astype(np.float16), scales * eight, mins * eight, weights)
    elif kind == Q6_K:
        d, scales = (np.array(column)[:, None] for column in zip(*Q6_K_QUIRKS.values(), strict=True))
        weights = random.integers(-32, 32, (len(d), 16, 16))
        made = q6_k_blocks(d.astype(np.float16), scales * np.ones((1, 16), np.int8), weights)
    else:
        return blocks
    flat = blocks.reshape(-1, made.shape[1]).copy()
    flat[: len(made)] = made
    return flat.reshape(blocks.shape)


# ---- Metadata ----


def text_metadata(folder: Path, config: MllamaConfig, types: str, generation: int) -> dict[str, Any]:
    """Return a language model's metadata; Python's floats are stored in 32 bit, integers as unsigned ones."""
    text = config.text_config
    return {
        "general.file_type": FILE_TYPES[types],
        "general.quantization_version": 2,
        "mllama.block_count": text.num_hidden_layers,
        "mllama.context_length": text.max_position_embeddings,
        "mllama.embedding_length": text.hidden_size,
        "mllama.feed_forward_length": text.intermediate_size,
        "mllama.attention.head_count": text.num_attention_heads,
        "mllama.attention.head_count_kv": text.num_key_value_heads,
        "mllama.attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "mllama.rope.freq_base": text.rope_parameters["rope_theta"],
        "mllama.rope.dimension_count": text.hidden_size // text.num_attention_heads,
        "mllama.vocab_size": text.vocab_size,
        "mllama.attention.cross_attention_layers": text.cross_attention_layers,
        **tokenizer_metadata(folder, "smaug-bpe" if generation == 1 else "llama-bpe"),
    }


def tokenizer_metadata(folder: Path, splitting: str) -> dict[str, Any]:
    """Return a tokenizer's metadata, from its tokenizer.json and chat template."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = {**tokenizer["model"]["vocab"], **special}
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],  # control, normal
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": ids["<|eot_id|>"],
        "tokenizer.ggml.padding_token_id": ids["<|finetune_right_pad_id|>"],
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    }


def vision_metadata(config: MllamaConfig, generation: int) -> dict[str, Any]:
    """Return a vision tower's metadata. Intermediate layers are counted as in Meta's own configs."""
    vision = config.vision_config
    last = {"projection_dim": config.text_config.hidden_size} if generation == 1 else {"num_channels": 3}
    settings = {
        "block_count": vision.num_hidden_layers,
        "global.block_count": vision.num_global_layers,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "attention.head_count": vision.attention_heads,
        "attention.layer_norm_epsilon": vision.norm_eps,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "max_num_tiles": vision.max_num_tiles,
        "intermediate_layers_indices": vision.intermediate_layers_indices,
        **last,
    }
    return {f"mllama.vision.{name}": value for name, value in settings.items()}


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Add values by their Python types."""
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in metadata.items():
        adders[type(value)](key, value)


# ---- GGUF files ----


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Stored], architecture="mllama") -> Path:
    """Write a GGUF file.

    Args:
        metadata: by key; None leaves a key out.
        tensors: by name; None leaves a tensor out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, {key: value for key, value in metadata.items() if value is not None})
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor[0]), raw_dtype=tensor[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(folder: Path, types: str, generation: int, raw_vision: bool, quirks: bool) -> dict[str, Stored]:
    """Return all tensors of a checkpoint by their names in a file."""
    config, state = state_of(folder)
    tensors = {"rope_freqs.weight": (rope_factors(config), F32)}
    for name, source in names_of(config, state, generation).items():
        values = values_of(name, state[source], config, raw_vision)
        kind = type_of(name, values, config, types, generation)
        data, kind = stored(values, kind)
        tensors[name] = (quirky(data, kind) if quirks else data), kind
    gate = tensors["v.tile_position_embd.gate"][0]
    return {**tensors, POSITION_GATE: ((gate if raw_vision else 1 - gate), F32)}


def write_generation_2(
    folder: Path,
    path: Path,
    *,
    types: str = "q4_K_M",
    raw_vision: bool = False,
    quirks: bool = False,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Stored | None] | None = None,
) -> Path:
    """Write a checkpoint as one file and return its path.

    Args:
        types: of FILE_TYPES.
        raw_vision: as between 14 and 21 May 2025: gates of the vision tower without tanh, its rows not reordered.
        quirks: the first blocks of every K-quantised matrix are those of `quirky`.
        metadata: other values than the checkpoint's, None for none.
        tensors: others than the checkpoint's by their names in the file, None for none.
    """
    config = MllamaConfig.from_pretrained(folder)
    settings = {**text_metadata(folder, config, types, 2), **vision_metadata(config, 2), **(metadata or {})}
    return write_gguf(path, settings, {**stored_tensors(folder, types, 2, raw_vision, quirks), **(tensors or {})})


def write_generation_1(
    folder: Path,
    text_path: Path,
    projector_path: Path,
    *,
    types: str = "q4_K_M",
    quirks: bool = False,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Stored | None] | None = None,
) -> tuple[Path, Path]:
    """Write a checkpoint as two files and return their paths.

    Args:
        types, quirks, metadata, tensors: as for `write_generation_2`; those of the vision tower and the projector
            begin with "mllama.vision.", "v." and "mm.".
    """
    config = MllamaConfig.from_pretrained(folder)
    every = {**stored_tensors(folder, types, 1, False, quirks), **(tensors or {})}
    both = {**text_metadata(folder, config, types, 1), **(metadata or {})}
    vision = {key: value for key, value in both.items() if key.startswith("mllama.vision.")}
    projector = {name: tensor for name, tensor in every.items() if name.startswith(("v.", "mm."))}
    write_gguf(
        text_path,
        {key: value for key, value in both.items() if key not in vision},
        {name: tensor for name, tensor in every.items() if name not in projector},
    )
    settings = {"general.type": "projector", "general.file_type": 1, **vision_metadata(config, 1), **vision}
    return text_path, write_gguf(projector_path, settings, projector)


def write_text_model(path: Path, architecture: str = "llama") -> Path:
    """Write a file of another model, for text, with two tensors, and return its path."""
    settings = {
        "general.file_type": 1,
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
    }
    weight = np.ones((2, 32), np.float16)
    return write_gguf(
        path, settings, {"token_embd.weight": (weight, F16), "output.weight": (weight, F16)}, architecture
    )


def expected_tensors(folder: Path, *paths: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint's file, or two, in float32 by the model's names: those of the checkpoint,
    rounded to 16 bit where the file does so; quantised ones as `gguf` dequantises them."""
    config, state = state_of(folder)
    found = {tensor.name: tensor for path in paths for tensor in GGUFReader(path).tensors}
    expected = {}
    for name, source in names_of(config, state, 2 if "v.blk.0.attn_norm.weight" in found else 1).items():
        kind, original = found[name].tensor_type, state[source].float()
        if kind == F32:
            expected[source] = original
        elif kind == F16:
            expected[source] = original.half().float()
        else:
            values, heads = dequantize(found[name].data, kind), heads_of(name, config)
            expected[source] = torch.from_numpy(restored(values, heads) if heads else values)
    return expected


# ---- Ollama's folder ----


IMAGE = "application/vnd.ollama.image."
TEMPLATE = """\
{{- range $index, $_ := .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}
{{- if gt (len (slice $.Messages $index)) 1 }}<|eot_id|>
{{- else if ne .Role "assistant" }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{{ end }}
{{- end }}"""
LICENSES = ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n", "**Llama 3.2** **Acceptable Use Policy**\n")
PARAMS = {"temperature": 0.6, "top_p": 0.9}


def blob_path(root: Path, digest: str) -> Path:
    """Return the file of a digest, "sha256:" and hexadecimal digits."""
    return root / "blobs" / digest.replace(":", "-")


def manifest_path(root: Path, name: str, tag: str = "latest") -> Path:
    """Return the manifest's file of a model: "name", "namespace/name" or "host/namespace/name"."""
    parts = name.split("/")
    return root.joinpath("manifests", *("registry.ollama.ai", "library")[: 3 - len(parts)], *parts, tag)


def add_blob(root: Path, media_type: str, content: bytes | Path) -> dict[str, Any]:
    """Add a blob and return its entry of a manifest."""
    data = content.read_bytes() if isinstance(content, Path) else content
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    path = blob_path(root, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def write_ollama(
    root: Path,
    name: str,
    files: list[Path],
    *,
    tag: str = "latest",
    template: str = TEMPLATE,
    params: Mapping[str, Any] | None = PARAMS,
    licenses: tuple[str, ...] = LICENSES,
    family: str = "mllama",
) -> Path:
    """Write a model as Ollama has it on disk, and return its manifest's path.

    Args:
        root: of OLLAMA_MODELS; other models may lie in it.
        name: as for `manifest_path`.
        files: the model's, and the projector's if it is another.
        params: None for no such layer.
    """
    kinds = ("model", "projector")
    layers = [add_blob(root, IMAGE + kind, file) for kind, file in zip(kinds, files, strict=False)]
    layers.append(add_blob(root, f"{IMAGE}template", template.encode()))
    layers += [add_blob(root, f"{IMAGE}license", text.encode()) for text in licenses]
    if params is not None:
        layers.append(add_blob(root, f"{IMAGE}params", f"{json.dumps(params, separators=(',', ':'))}\n".encode()))
    config = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": "10.7B",
        "file_type": "Q4_K_M",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": add_blob(root, "application/vnd.docker.container.image.v1+json", json.dumps(config).encode()),
        "layers": layers,
    }
    path = manifest_path(root, name, tag)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return path
