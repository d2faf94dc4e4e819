"""Writes a random Mllama checkpoint of the true 11B widths: python benchmarks/make_checkpoint.py --out DIR

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
from transformers import AutoProcessor, GenerationConfig, MllamaConfig, MllamaForConditionalGeneration

from demo_model.checkpoint import clear_padding_embeddings

DEMO = Path(__file__).resolve().parents[1] / "demo_model"
CROSS_ATTENTION_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
SHARD_BYTES = 500_000_000  # a tensor larger than that (embedding, head: 1.05 GB) is a shard of its own
CHUNK = 1 << 24  # values drawn at a time, in float32


def make_config(text_layers: int, vision_layers: int, global_layers: int, image_token: int) -> MllamaConfig:
    """The 11B configuration with fewer layers; the vision tower hands on those intermediate outputs that remain."""
    indices = [i for i in (3, 7, 15, 23, 30) if i < vision_layers - 1] + [vision_layers - 1] * (vision_layers < 32)
    return MllamaConfig(
        text_config={
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": text_layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "cross_attention_layers": [i for i in CROSS_ATTENTION_LAYERS if i < text_layers],
            "max_position_embeddings": 131072,
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
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": vision_layers,
            "num_global_layers": global_layers,
            "attention_heads": 16,
            "image_size": 560,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": indices,
            "vision_output_dim": 1280 * (1 + len(indices)),
        },
        image_token_index=image_token,
        dtype="bfloat16",
    )


def random_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """bf16 values that keep activations finite, from a generator that only `name` and `seed` decide."""
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
    """The safetensors shards and their index."""
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
            clear_padding_embeddings(tensors, config)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
            bar.update(2 * sum(tensor.numel() for tensor in tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def make_checkpoint(
    folder: Path, text_layers: int = 40, vision_layers: int = 32, global_layers: int = 8, seed: int = 0
) -> None:
    """Writes the checkpoint; the config last, so that an interrupted run leaves none.

    Args:
        text_layers: of the language model, cross-attention layers included (every fifth from the fourth on).
        vision_layers, global_layers: of the vision tower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(DEMO)
    processor.image_processor.size = {"height": 560, "width": 560}
    config = make_config(text_layers, vision_layers, global_layers, processor.image_token_id)
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    write_weights(folder, {name: tensor.shape for name, tensor in model.state_dict().items()}, config, seed)
    processor.save_pretrained(folder)
    GenerationConfig(eos_token_id=[128001, 128008, 128009], pad_token_id=128004).save_pretrained(folder)
    config.architectures = ["MllamaForConditionalGeneration"]
    config.save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-layers", type=int, default=40)
    parser.add_argument("--vision-layers", type=int, default=32)
    parser.add_argument("--global-layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_checkpoint(options.out, options.text_layers, options.vision_layers, options.global_layers, options.seed)


if __name__ == "__main__":
    main()
