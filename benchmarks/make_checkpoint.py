"""Random Mllama checkpoints of the 11B's widths: python -m benchmarks.make_checkpoint --out DIR

For measuring time and memory without the gated weights; its answers mean nothing. The same options and seed write the
same files. Needs less than 2 GB of memory and, for the whole 11B shape, 21.3 GB of disk.

The widths are those of meta-llama/Llama-3.2-11B-Vision's config.json. Every matrix is different, because OpenVINO
stores equal constants once, and gates are open, because at zero (as transformers starts them) no picture would be seen.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from demo_model.checkpoint import clear_padding_embeddings

DEMO = Path(__file__).resolve().parents[1] / "demo_model"
VOCABULARY, IMAGE_TOKEN = 128256, 128256
SPECIAL_TOKENS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|finetune_right_pad_id|>": 128004,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
    "<|image|>": IMAGE_TOKEN,
}
SHARD_BYTES = 500_000_000  # a tensor larger than that (embedding, head: 1.05 GB) is a shard of its own
CHUNK = 1 << 24  # values drawn at a time, in float32


TOWER = dict(vision_size=1280, vision_layers=32, global_layers=8)
SHAPES = {
    "11b": dict(text_layers=40, hidden_size=4096, intermediate_size=14336, heads=32, **TOWER),
    "90b": dict(text_layers=100, hidden_size=8192, intermediate_size=28672, heads=64, **TOWER),
    # Llama-3.2-1B, the draft model for both: text only
    "1b": dict(text_layers=16, hidden_size=2048, intermediate_size=8192, heads=32),
    # nothing like a checkpoint that anybody has: the 11B's vocabulary and tiles on the least behind them
    "small": dict(
        text_layers=5, hidden_size=128, intermediate_size=256, heads=8, vision_size=64, vision_layers=4, global_layers=1
    ),
}


def text_settings(text_layers: int, hidden_size: int, intermediate_size: int, heads: int) -> dict:
    """Return the configuration that the language models of all shapes share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }


def make_llama_config(**widths: int) -> LlamaConfig:
    """Return the 1B's configuration, without its scaled rotary embedding.

    Args:
        widths: of `text_settings`.
    """
    return LlamaConfig(
        **text_settings(**widths),
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS["<|begin_of_text|>"],
        eos_token_id=SPECIAL_TOKENS["<|eot_id|>"],
        dtype="bfloat16",
    )


def make_config(
    text_layers: int,
    vision_layers: int,
    global_layers: int,
    image_token: int = IMAGE_TOKEN,
    hidden_size: int = 4096,
    intermediate_size: int = 14336,
    heads: int = 32,
    vision_size: int = 1280,
) -> MllamaConfig:
    """Return the 11B's configuration with fewer layers or other widths; the vision tower returns those intermediate
    states that remain."""
    indices = [i for i in (3, 7, 15, 23, 30) if i < vision_layers - 1] + [vision_layers - 1] * (vision_layers < 32)
    return MllamaConfig(
        text_config={
            **text_settings(text_layers, hidden_size, intermediate_size, heads),
            "cross_attention_layers": list(range(3, text_layers, 5)),
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        vision_config={
            "hidden_size": vision_size,
            "intermediate_size": 4 * vision_size,
            "num_hidden_layers": vision_layers,
            "num_global_layers": global_layers,
            "attention_heads": 16,
            "image_size": 560,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": indices,
            "vision_output_dim": vision_size * (1 + len(indices)),
        },
        image_token_index=image_token,
        dtype="bfloat16",
    )


def write_tokenizer(folder: Path) -> None:
    """Save the demo's tokenizer with the 11B's ids: missing words are made up, so that an answer of random weights
    has something to show, and special tokens stand behind them. (They are in the vocabulary too, or would be numbered
    anew from its end.)"""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    special = {number: token for token, number in SPECIAL_TOKENS.items()}
    words |= {special.get(number, f"\u0120word{number}"): number for number in range(len(words), IMAGE_TOKEN + 1)}
    for token in tokenizer["added_tokens"]:
        token["id"] = SPECIAL_TOKENS[token["content"]]
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [SPECIAL_TOKENS[name] for name in token["tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def random_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return bf16 values that leave activations finite, from a generator that only `name` and `seed` decide."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.empty(shape, dtype=torch.bfloat16)
    is_norm = "norm" in name and name.endswith("weight")
    if "gate" in name and "gate_proj" not in name:
        mean, deviation = 0.5, 0.05
    elif is_norm or values.ndim < 2:
        mean, deviation = float(is_norm), 0.02
    else:
        mean, deviation = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    for chunk in values.view(-1).split(CHUNK):
        chunk.copy_(torch.randn(len(chunk), generator=generator) * deviation + mean)
    return values


def write_weights(folder: Path, shapes: dict[str, torch.Size], config: MllamaConfig, seed: int) -> None:
    """Write the safetensors shards and their index."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        if size and size + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(shape)
    weight_map, total = {}, 2 * sum(map(math.prod, shapes.values()))
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Writing {folder}") as bar:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: random_tensor(name, shapes[name], seed) for name in names}
            if isinstance(config, MllamaConfig):
                clear_padding_embeddings(tensors, config)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
            bar.update(2 * sum(tensor.numel() for tensor in tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def make_checkpoint(folder: Path, shape: str = "11b", seed: int = 0, **layers: int) -> None:
    """Write the checkpoint; the config last, so that an interrupted run leaves none.

    Args:
        shape: of SHAPES.
        layers: other numbers of `text_layers` (cross-attention layers included, every fifth from the fourth on),
            `vision_layers` and `global_layers` than the shape's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(DEMO)
    processor.image_processor.size = {"height": 560, "width": 560}
    is_llama = shape == "1b"
    config = (make_llama_config if is_llama else make_config)(**{**SHAPES[shape], **layers})
    with torch.device("meta"):
        model = (LlamaForCausalLM if is_llama else MllamaForConditionalGeneration)(config)
    names = {name: tensor.shape for name, tensor in model.state_dict().items() if not (is_llama and "lm_head" in name)}
    write_weights(folder, names, config, seed)
    processor.save_pretrained(folder)
    write_tokenizer(folder)
    GenerationConfig(eos_token_id=[128001, 128008, 128009], pad_token_id=128004).save_pretrained(folder)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="11b", help="90b: the wider language model")
    for part in ("text", "vision", "global"):
        parser.add_argument(f"--{part}-layers", type=int, help="default: the shape's")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    make_checkpoint(options.pop("out"), **{name: value for name, value in options.items() if value is not None})


if __name__ == "__main__":
    main()
