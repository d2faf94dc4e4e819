"""Random GGUF files of the 11B's shape, as Ollama has it: python -m benchmarks.make_gguf --out FILE

For measuring import, time and memory without the weights; its answers mean nothing. Names, shapes, types and metadata
are those of Ollama's llama3.2-vision since v0.7.1, Q4_K_M: 908 tensors in 7.8 GB. The same options and seed write the
same file, in about a minute with less than 1.5 GB of memory.

Blocks are random bytes with scales that leave activations finite: weights have a deviation of one over the root of
their number in a row. Tokens are the bytes, then words of up to four letters with all their merges.
"""

import argparse
import itertools
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import MllamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benchmarks.make_checkpoint import IMAGE_TOKEN, SHAPES, SPECIAL_TOKENS, VOCABULARY, make_config
from demo_model.checkpoint import CHAT_TEMPLATE, TILE_EMBEDDINGS, clear_padding_embeddings

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
BLOCK = 256  # weights
WORDS = 128000  # tokens before the special ones
LANGUAGE_BYTES, TOTAL_BYTES = 5.955e9, 7.8e9  # of Ollama's files of the 11B
PREFIXES = ("v.pre_tile_position_embd", "v.tile_position_embd", "v.post_tile_position_embd")  # as TILE_EMBEDDINGS
# of a random block's weights, in units of its scale; with these minimums, 7.5 scales, their mean is 0
Q4_K_DEVIATION, Q6_K_DEVIATION, Q4_K_MINIMUM = 243, 1795, 7.5


class Entry(NamedTuple):
    """A tensor's name, its shape as numpy has it, and its type."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in numbers, or in bytes of blocks."""
        size, in_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape if self.kind in (F32, F16) else (self.shape[0], self.shape[1] // size * in_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes in the file, padding not counted."""
        return math.prod(self.stored_shape) * {F32: 4, F16: 2}.get(self.kind, 1)


def more_bits(layer: int, layers: int) -> GGMLQuantizationType:
    """Return the type that llama.cpp's Q4_K_M has for values and down projections of a layer."""
    return Q6_K if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2 else Q4_K


def text_entries(config: MllamaConfig) -> Iterator[Entry]:
    """Yield the tensors of the language model."""
    text = config.text_config
    size, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    head = size // text.num_attention_heads
    keys, own = head * text.num_key_value_heads, layers - len(text.cross_attention_layers)
    attention = itertools.count()
    yield Entry("token_embd.weight", (text.vocab_size + 8, size), Q4_K)
    yield Entry("output.weight", (text.vocab_size, size), Q6_K)
    yield Entry("output_norm.weight", (size,), F32)
    yield Entry("rope_freqs.weight", (head // 2,), F32)
    for layer in range(layers):
        block = f"blk.{layer}"
        yield from (Entry(f"{block}.{norm}_norm.weight", (size,), F32) for norm in ("attn", "ffn"))
        yield from (Entry(f"{block}.ffn_{part}.weight", (inner, size), Q4_K) for part in ("gate", "up"))
        yield Entry(f"{block}.ffn_down.weight", (size, inner), more_bits(layer, layers))
        if layer in text.cross_attention_layers:
            rows = {"q": size, "k": keys, "v": keys, "o": size}
            yield from (Entry(f"{block}.cross_attn_{part}_proj.weight", (rows[part], size), Q4_K) for part in rows)
            yield from (Entry(f"{block}.cross_attn_{part}_norm.weight", (head,), F32) for part in "qk")
            yield from (Entry(f"{block}.cross_attn_{part}_gate", (1,), F32) for part in ("attn", "mlp"))
        else:
            kind = more_bits(next(attention), own)
            yield Entry(f"{block}.attn_q.weight", (size, size), Q4_K)
            yield Entry(f"{block}.attn_k.weight", (keys, size), Q4_K)
            yield Entry(f"{block}.attn_v.weight", (keys, size), kind)
            yield Entry(f"{block}.attn_output.weight", (size, size), Q4_K)


def vision_entries(config: MllamaConfig) -> Iterator[Entry]:
    """Yield the tensors of the vision tower and the projector."""
    vision = config.vision_config
    size, inner, tiles = vision.hidden_size, vision.intermediate_size, vision.max_num_tiles
    patches, canvases = (vision.image_size // vision.patch_size) ** 2 + 1, len(vision.supported_aspect_ratios) + 1
    yield Entry("v.class_embd", (size,), F32)
    yield Entry("v.patch_embd.weight", (size, 3, vision.patch_size, vision.patch_size), F16)
    yield Entry("v.position_embd.weight", (patches, size), F32)
    yield Entry("v.position_embd.gate", (1,), F32)
    for prefix, positions in zip(PREFIXES, (1, patches, 1), strict=True):
        yield Entry(f"{prefix}.weight", (canvases, tiles * positions * size), F32)
        yield Entry(f"{prefix}.gate", (1,), F32)
    for norm in ("v.pre_ln", "v.post_ln"):
        yield from (Entry(f"{norm}.{part}", (size,), F32) for part in ("weight", "bias"))
    towers = ("v.blk", vision.num_hidden_layers), ("v.global.blk", vision.num_global_layers)
    for block in (f"{tower}.{layer}" for tower, layers in towers for layer in range(layers)):
        for norm in ("attn_norm", "ffn_norm"):
            yield from (Entry(f"{block}.{norm}.{part}", (size,), F32) for part in ("weight", "bias"))
        yield from (Entry(f"{block}.attn_{part}.weight", (size, size), F16) for part in ("q", "k", "output"))
        yield Entry(f"{block}.attn_v.weight", (size, size), Q4_K)
        for part, rows, columns in (("up", inner, size), ("down", size, inner)):
            yield Entry(f"{block}.ffn_{part}.weight", (rows, columns), F16)
            yield Entry(f"{block}.ffn_{part}.bias", (rows,), F32)
        if block.startswith("v.global"):
            yield from (Entry(f"{block}.{part}_gate", (1,), F32) for part in ("attn", "ffn"))
    yield Entry("mm.0.weight", (config.text_config.hidden_size, vision.vision_output_dim), F16)
    yield Entry("mm.0.bias", (config.text_config.hidden_size,), F32)


# ---- Values ----


def random_blocks(entry: Entry, random: np.random.Generator) -> np.ndarray:
    """Return random blocks of Q4_K or Q6_K, [rows, bytes]."""
    words = random.integers(0, 1 << 64, -(-entry.nbytes // 8), dtype=np.uint64)
    blocks = words.view(np.uint8)[: entry.nbytes].reshape(-1, GGML_QUANT_SIZES[entry.kind][1])
    deviation = 1 / math.sqrt(entry.shape[1])
    if entry.kind == Q4_K:
        scale = deviation / Q4_K_DEVIATION
        blocks[:, :4] = np.array([scale, Q4_K_MINIMUM * scale], np.float16).view(np.uint8)
        blocks[:, 4:12] |= 0b10100000  # scales and minimums of 32 to 63
    else:
        scales = blocks[:, 192:208]
        scales &= 0b10111111
        scales |= ~(scales >> 1) & 0b01000000  # 64 to 127, or -128 to -65
        blocks[:, 208:] = np.array([deviation / Q6_K_DEVIATION], np.float16).view(np.uint8)
    return blocks.reshape(entry.stored_shape)


def random_numbers(entry: Entry, random: np.random.Generator, config: MllamaConfig) -> np.ndarray:
    """Return random numbers in 16 or 32 bit, all of which bfloat16 can hold but for the gates' hyperbolic tangents."""
    name, is_gate = entry.name, entry.name.endswith("_gate") or entry.name.endswith(".gate")
    if name == "rope_freqs.weight":
        return rope_factors(config)
    is_norm = ("norm" in name or "_ln" in name) and name.endswith("weight")
    if is_gate:
        mean, deviation = 0.5, 0.05
    elif is_norm or len(entry.shape) < 2:
        mean, deviation = float(is_norm), 0.02
    else:
        mean, deviation = 0.0, 1 / math.sqrt(math.prod(entry.shape[1:]))
    drawn = random.standard_normal(entry.shape, dtype=np.float32)
    drawn *= deviation
    drawn += mean
    values = torch.from_numpy(drawn)
    values.copy_(values.bfloat16())
    clear_padding(name, values, config)
    if is_gate and name.startswith("v."):
        values = values.tanh()
    return values.numpy() if entry.kind == F32 else values.half().numpy()


def clear_padding(name: str, values: torch.Tensor, config: MllamaConfig) -> None:
    """Set a table's embeddings of tiles beyond each canvas to zero, in place."""
    prefix = name.removesuffix(".weight")
    if prefix in PREFIXES:
        clear_padding_embeddings({TILE_EMBEDDINGS[PREFIXES.index(prefix)]: values}, config)


def rope_factors(config: MllamaConfig) -> np.ndarray:
    """Return by how much the scaled rotary embedding divides each frequency."""
    text = config.text_config
    size = text.hidden_size // text.num_attention_heads
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    plain = text.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    return (plain / scaled).float().numpy()


def values_of(entry: Entry, config: MllamaConfig, seed: int) -> np.ndarray:
    """Return a tensor as the file has it, from a generator that only its name and `seed` decide."""
    random = np.random.default_rng(zlib.crc32(f"{seed}:{entry.name}".encode()))
    if entry.kind in (F32, F16):
        return random_numbers(entry, random, config)
    return random_blocks(entry, random)


# ---- Metadata ----


def tokens_and_merges() -> tuple[list[str], list[str]]:
    """Return the words, each made of shorter ones, and their merges in order of length."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), []
    made = ("".join(word) for size in (1, 2, 3) for word in itertools.product("\u0120" + letters, *[letters] * size))
    for word in itertools.islice(made, WORDS - len(words)):
        words.append(word)
        merges += [f"{word[:split]} {word[split:]}" for split in range(1, len(word))]
    return words, merges


def tokenizer_metadata() -> dict[str, Any]:
    """Return the metadata of a tokenizer with the 11B's number of tokens and its special ones."""
    words, merges = tokens_and_merges()
    named = {number: token for token, number in SPECIAL_TOKENS.items()}
    reserved = itertools.count()
    special = [
        named.get(number) or f"<|reserved_special_token_{next(reserved)}|>" for number in range(WORDS, IMAGE_TOKEN + 1)
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": words + special,
        "tokenizer.ggml.token_type": [1] * len(words) + [3] * len(special),  # normal, control
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": SPECIAL_TOKENS["<|begin_of_text|>"],
        "tokenizer.ggml.eos_token_id": SPECIAL_TOKENS["<|eot_id|>"],
        "tokenizer.ggml.padding_token_id": SPECIAL_TOKENS["<|finetune_right_pad_id|>"],
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def metadata(config: MllamaConfig) -> dict[str, Any]:
    """Return the file's metadata."""
    text, vision = config.text_config, config.vision_config
    model = {
        "block_count": text.num_hidden_layers,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps,
        "rope.freq_base": text.rope_parameters["rope_theta"],
        "rope.dimension_count": text.hidden_size // text.num_attention_heads,
        "vocab_size": VOCABULARY,
        "attention.cross_attention_layers": text.cross_attention_layers,
        "vision.block_count": vision.num_hidden_layers,
        "vision.global.block_count": vision.num_global_layers,
        "vision.embedding_length": vision.hidden_size,
        "vision.feed_forward_length": vision.intermediate_size,
        "vision.attention.head_count": vision.attention_heads,
        "vision.attention.layer_norm_epsilon": vision.norm_eps,
        "vision.image_size": vision.image_size,
        "vision.patch_size": vision.patch_size,
        "vision.max_num_tiles": vision.max_num_tiles,
        "vision.num_channels": vision.num_channels,
        "vision.intermediate_layers_indices": vision.intermediate_layers_indices,
    }
    general = {"general.file_type": 15, "general.quantization_version": 2}
    return {**general, **{f"mllama.{key}": value for key, value in model.items()}, **tokenizer_metadata()}


# ---- The file ----


def make_gguf(path: Path, seed: int = 0, **layers: int) -> None:
    """Write the file, a part until it is complete, and print its sizes.

    Args:
        layers: other numbers of `text_layers` (cross-attention layers included, every fifth from the fourth on),
            `vision_layers` and `global_layers` than the 11B's.
    """
    config = make_config(**{**SHAPES["11b"], **layers})
    language, vision = list(text_entries(config)), list(vision_entries(config))
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(part, "mllama")
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in metadata(config).items():
        adders[type(value)](key, value)
    for entry in language + vision:
        blocks = None if entry.kind in (F32, F16) else entry.kind
        dtype = np.dtype(np.uint8 if blocks else np.float16 if entry.kind == F16 else np.float32)
        writer.add_tensor_info(entry.name, entry.stored_shape, dtype, entry.nbytes, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    sizes = [sum(entry.nbytes for entry in entries) for entries in (language, vision)]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=f"Writing {path}") as bar:
        for entry in language + vision:
            writer.write_tensor_data(values_of(entry, config, seed))
            bar.update(entry.nbytes)
    writer.close()
    part.rename(path)
    total = path.stat().st_size
    print(
        f"{len(language) + len(vision)} tensors: language {sizes[0] / 1e9:.3f} GB, vision {sizes[1] / 1e9:.3f} GB, "
        f"file {total / 1e9:.3f} GB"
    )
    near = all(abs(size / real - 1) < 0.01 for size, real in ((sizes[0], LANGUAGE_BYTES), (total, TOTAL_BYTES)))
    if not (layers or near):
        raise AssertionError(f"Ollama's file has {LANGUAGE_BYTES / 1e9} of {TOTAL_BYTES / 1e9} GB.")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    for part in ("text", "vision", "global"):
        parser.add_argument(f"--{part}-layers", type=int, help="default: the 11B's")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    make_gguf(options.pop("out"), **{name: value for name, value in options.items() if value is not None})


if __name__ == "__main__":
    main()
