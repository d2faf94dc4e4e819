"""Random tiny Mllama checkpoints, complete with processor, for comparing against transformers. No network."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)

from conftest import LLAMA3_ROPE
from demo_model.checkpoint import CHAT_TEMPLATE, IMAGE, SPECIAL, clear_padding_embeddings, llama_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, then the special tokens; BOS is added unless asked not to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # <|image|> last: its id equals vocab_size, outside the logits, as in the real checkpoints
    tokenizer.add_special_tokens([*SPECIAL, IMAGE])
    return llama_tokenizer(tokenizer)


def make_checkpoint(
    folder: Path,
    heads: int = 8,
    kv_heads: int = 2,
    tiles: int = 4,
    image_size: int = 28,
    rope: dict | None = LLAMA3_ROPE,
    cross_layers: tuple[int, ...] = (1, 3),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    zero_padding: bool = False,
    vision_layers: int = 3,
    intermediate: tuple[int, ...] = (0, 2),
    meta: bool = False,
    spread: float = 0.2,
    tokenizer: PreTrainedTokenizerFast | None = None,
    text: dict | None = None,
    vision: dict | None = None,
) -> Path:
    """Writes a random checkpoint of five text and 3+2 vision layers, every gate open, and returns its folder.

    Args:
        zero_padding: the embeddings of padding tiles are zero, as in Meta's checkpoints.
        intermediate: layers of `vision_layers` whose states the projector reads.
        meta: the position tables of all canvases are parts of one, as in Meta's, and the config says that Meta's own
            converter wrote it.
        spread: standard deviation of the weights.
        tokenizer: with Llama 3.2's special tokens and `<|image|>` last; default: `byte_tokenizer`.
        text, vision: other settings of `text_config` and `vision_config` than these.
    """
    tokenizer = tokenizer or byte_tokenizer()
    ratios = (
        [[1, 1], [1, 2], [2, 1]] if tiles == 2 else [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, IMAGE)}
    eos = [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]]
    config = MllamaConfig(
        text_config={
            "vocab_size": len(tokenizer) - 1,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 5,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "cross_attention_layers": list(cross_layers),
            "max_position_embeddings": 512,
            "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": spread,
            "bos_token_id": ids["<|begin_of_text|>"],
            "eos_token_id": eos,
            "pad_token_id": ids["<|finetune_right_pad_id|>"],
            **(text or {}),
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": vision_layers,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": image_size,
            "patch_size": 7,
            "max_num_tiles": tiles,
            "intermediate_layers_indices": list(intermediate),
            "vision_output_dim": 32 * (1 + len(intermediate)),
            "supported_aspect_ratios": ratios,
            "initializer_range": spread,
            **(vision or {}),
        },
        image_token_index=ids["<|image|>"],
    )
    torch.manual_seed(seed)
    model = MllamaForConditionalGeneration(config)
    open_gates(model)
    if zero_padding:
        clear_padding_embeddings(model.state_dict(), config)
    if meta:
        share_position_tables(model)
    model.to(dtype).save_pretrained(folder)
    if meta:
        written_by(folder, "4.45.0.dev0")
    GenerationConfig(
        bos_token_id=ids["<|begin_of_text|>"], eos_token_id=eos, pad_token_id=ids["<|finetune_right_pad_id|>"]
    ).save_pretrained(folder)
    images = MllamaImageProcessor(size={"height": image_size, "width": image_size}, max_image_tiles=tiles)
    MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def share_position_tables(model: MllamaForConditionalGeneration) -> None:
    """Has each canvas's position tables be the corner of one random grid of tiles, zero beyond, as Meta's are."""
    tower, vision = model.model.vision_model, model.config.vision_config
    tiles = vision.max_num_tiles
    tables = (
        tower.pre_tile_positional_embedding.embedding,
        tower.gated_positional_embedding.tile_embedding,
        tower.post_tile_positional_embedding.embedding,
    )
    with torch.no_grad():
        for table in tables:
            grid = torch.randn(tiles, tiles, table.weight.shape[1] // tiles)
            table.weight.zero_()
            for ratio, (high, wide) in enumerate(vision.supported_aspect_ratios, 1):
                corner = grid[:high, :wide].flatten() / 2
                table.weight[ratio, : len(corner)] = corner


def written_by(folder: Path, version: str | None) -> Path:
    """Has a checkpoint's config say that this version of transformers wrote it, or, None, nothing of it."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "transformers_version": version}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def make_llama(vocab_size: int, seed: int = 0, **settings) -> LlamaForCausalLM:
    """A random Llama for text.

    Args:
        settings: others of `LlamaConfig` than these.
    """
    torch.manual_seed(seed)
    widths = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**widths, **settings})).eval()


def open_gates(model: MllamaForConditionalGeneration) -> None:
    """transformers starts gates at zero (closed), where a comparison would see nothing of the picture; tile
    embeddings and norm weights get values too, so that swapping them would show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and "gate_proj" not in name:
                parameter.uniform_(0.4, 1.2)
            elif "embedding" in name and "patch" not in name:
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.6, 1.4) if name.endswith("weight") else parameter.normal_(std=0.1)
