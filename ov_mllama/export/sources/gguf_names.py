"""Tensors of Ollama's GGUF files of Llama 3.2 Vision by the names of transformers, Ollama's changes undone.

Names and changes are those of Ollama's converter (convert/convert_mllama.go, 0.4 to 0.24), in two generations: two
files up to 0.6, and one file since 0.7.1. What 0.7.0 wrote for a week, with other gates, is refused.
"""

import re
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from transformers import MllamaConfig

from ov_mllama.export.sources.gguf import GgufFile, Stored
from ov_mllama.export.sources.gguf_blocks import tensor_of
from ov_mllama.export.sources.meta import ROPE
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

PULL = "pull the model again (ollama pull llama3.2-vision)."
TOWER = "model.vision_model."
TEXT = (
    (r"^token_embd\.", "model.language_model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^output_norm\.", "model.language_model.norm."),
    (r"^blk\.", "model.language_model.layers."),
    (r"(layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
    (r"(layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
    (r"(layers\.\d+)\.ffn_(gate|up|down)\.", r"\1.mlp.\2_proj."),
    (r"(layers\.\d+)\.attn_([qkv])\.", r"\1.self_attn.\2_proj."),
    (r"(layers\.\d+)\.attn_output\.", r"\1.self_attn.o_proj."),
    (r"(layers\.\d+)\.cross_attn_([qkvo]_proj|[qk]_norm)\.", r"\1.cross_attn.\2."),
)
VISION = (
    (r"^mm\.0\.", "model.multi_modal_projector."),
    (r"^v\.class_embd$", f"{TOWER}class_embedding"),
    (r"^v\.patch_embd\.", f"{TOWER}patch_embedding."),
    (r"^v\.position_embd\.weight$", f"{TOWER}gated_positional_embedding.embedding"),
    (r"^v\.tile_position_embd\.gate$", f"{TOWER}gated_positional_embedding.gate"),
    (r"^v\.tile_position_embd\.", f"{TOWER}gated_positional_embedding.tile_embedding."),
    (r"^v\.(pre|post)_tile_position_embd\.gate$", rf"{TOWER}\1_tile_positional_embedding.gate"),
    (r"^v\.(pre|post)_tile_position_embd\.", rf"{TOWER}\1_tile_positional_embedding.embedding."),
    (r"^v\.(pre|post)_ln\.", rf"{TOWER}layernorm_\1."),
    (r"^v\.blk\.(\d+)\.", rf"{TOWER}transformer.layers.\1."),
    (r"^v\.global\.blk\.(\d+)\.", rf"{TOWER}global_transformer.layers.\1."),
    (r"\.(ln1|attn_norm)\.", ".input_layernorm."),
    (r"\.(ln2|ffn_norm)\.", ".post_attention_layernorm."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_(out|output)\.", ".self_attn.o_proj."),
    (r"\.(attn|ffn)_gate$", r".gate_\1"),
)
FIRST_LAYERS, SECOND_LAYERS = ("ffn_down", "ffn_up"), ("ffn_up", "ffn_down")  # fc1 and fc2 of one generation
OF_FIRST_GENERATION = "v.blk.0.ln1.weight"
ROPE_FACTORS = "rope_freqs.weight"
POSITION_GATE = "v.position_embd.gate"  # 1 - tanh of the gate that "v.tile_position_embd.gate" is the tanh of
GATES = re.compile(r"^v\..*gate$")
GATE_TOLERANCE = 1e-6  # relative: float32 resolves 1.2e-7, a gate that is no bfloat16 number differs by up to 2e-3


def tensors_of(files: Iterable[GgufFile], config: MllamaConfig, reordered_cross: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a model's files by the names of transformers, as they were before Ollama changed them.

    Args:
        files: one, or two of the first generation.
        config: of the model.
        reordered_cross: whether rows of the cross-attention's query and key projections are in llama.cpp's order.
            Ollama's code says so; no real file was there to confirm it.
    Raises:
        InputError: for a tensor that two files hold, gates as 0.7.0 wrote them, or other rotary frequencies.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        if doubled := sorted(stored.keys() & file.tensors.keys()):
            raise InputError(f"{file.path} holds {doubled[0]}, as the other file does: give each file once.")
        stored |= file.tensors
    check_gates(stored)
    check_rope(stored, config)
    first, second = FIRST_LAYERS if OF_FIRST_GENERATION in stored else SECOND_LAYERS
    mlp = ((rf"\.{first}\.", ".mlp.fc1."), (rf"\.{second}\.", ".mlp.fc2."))
    found = {}
    for name, tensor in stored.items():
        if name in (ROPE_FACTORS, POSITION_GATE):
            continue
        vision = name.startswith(("v.", "mm."))
        place = renamed(name, (*VISION, *mlp) if vision else TEXT)
        heads = heads_of(place, config) if reordered_cross or ".cross_attn." not in place else 0
        rows = rows_in_halves(tensor.shape[0], heads) if heads and tensor.shape else None
        gate = Tensor(tensor.shape, torch.float32, partial(opened, tensor))
        found[place] = gate if GATES.match(name) else tensor_of(name, tensor, rows)
    return found


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Return the name of transformers; an unknown one's is its own."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def heads_of(place: str, config: MllamaConfig) -> int:
    """Return the heads of a query or key projection, whose rows llama.cpp reorders; 0 for another tensor."""
    match = re.search(r"\.(self_attn|cross_attn)\.([qk])_proj\.", place)
    if not match:
        return 0
    if place.startswith(TOWER):
        return config.vision_config.attention_heads
    return config.text_config.num_attention_heads if match[2] == "q" else config.text_config.num_key_value_heads


def rows_in_halves(rows: int, heads: int) -> np.ndarray | None:
    """Return, for each row of a projection whose rotary embedding pairs halves of a head, the row in a projection that
    pairs neighbours; None if heads do not divide it, which `place` refuses for its shape."""
    if rows % (2 * heads):
        return None
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


# ---- Gates ----------------------------------------------------------------------------------------------------------


def opened(stored: Stored) -> torch.Tensor:
    """Return a gate before its tanh, f32."""
    value = stored.data.view(np.float32).astype(np.float64)
    return torch.from_numpy(np.arctanh(value)).bfloat16().float().view(stored.shape)


def check_gates(stored: dict[str, Stored]) -> None:
    """Raise an InputError unless each gate is the tanh of a bfloat16 number, as it is but for Ollama 0.7.0."""
    for name, tensor in stored.items():
        if not GATES.match(name) or name == POSITION_GATE:
            continue
        fix = f"as only Ollama 0.7.0 wrote it: {PULL}"
        value = tensor.data.reshape(-1).view(np.float32) if tensor.shape == (1,) and is_f32(tensor) else None
        if value is None:
            raise InputError(f"{name} is no single float32 number: {PULL}")
        if not abs(value[0]) < 1:
            raise InputError(f"The gate {name} is {value[0]:g}, before its tanh, {fix}")
        again = np.tanh(opened(tensor).double().numpy())
        if abs(again[0] - value[0]) > GATE_TOLERANCE * abs(value[0]):
            raise InputError(f"The gate {name} is {value[0]:g}, before its tanh, {fix}")


def is_f32(stored: Stored) -> bool:
    """Return whether a tensor is stored in float32."""
    return stored.kind.name == "F32"


def check_rope(stored: dict[str, Stored], config: MllamaConfig) -> None:
    """Raise an InputError for other rotary frequencies than Llama 3's, which a file spells out as factors."""
    tensor, text = stored.get(ROPE_FACTORS), config.text_config
    if tensor is None:
        return
    size = text.hidden_size // text.num_attention_heads
    wavelength = 2 * np.pi * text.rope_parameters["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = ROPE["low_freq_factor"], ROPE["high_freq_factor"]
    smooth = np.clip((ROPE["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / ROPE["factor"] + smooth)
    found = tensor.data.reshape(-1).view(np.float32) if is_f32(tensor) else np.zeros(0)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise InputError(f"{ROPE_FACTORS} holds other factors than Llama 3's scaling by {ROPE['factor']:g}: {PULL}")
