"""The demo checkpoint without its training: configuration, tokenizer, chat template, processor.

Everything has the form of Llama-3.2-11B-Vision-Instruct, only smaller; `<|image|>` is the one token beyond the logits.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)

TILE, PATCH = 112, 14  # pixels
ABOUT = (
    "This is a demo of 4 million parameters. It knows drawings of shapes, their colours and places, and handwritten "
    "digits, and nothing else."
)
VOCABULARY = 512
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
IMAGE = "<|image|>"

# Llama 3's rule for splitting text before byte pairs are merged
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for block in message['content'] %}
            {%- if block['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif block['type'] == 'text' %}
                {{- block['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCABULARY` tokens on `texts`, with Llama 3.2's special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # too few words to fill the vocabulary: reserved tokens do, as in the original
    reserved = VOCABULARY - len(SPECIAL) - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([*SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(reserved)), IMAGE])
    return llama_tokenizer(tokenizer)


def llama_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that knows `SPECIAL` for transformers: BOS first by default, padding on the left."""
    bos = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> MllamaProcessor:
    """Return a processor for up to four tiles of `TILE` pixels, colours normalised as in the original."""
    images = MllamaImageProcessor(
        size={"height": TILE, "width": TILE},
        max_image_tiles=4,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(tokenizer: PreTrainedTokenizerFast) -> MllamaForConditionalGeneration:
    """Return the untrained model, its gates half open: at zero, transformers' default, it would see no image."""
    token = tokenizer.convert_tokens_to_ids
    eos = [token("<|end_of_text|>"), token("<|eom_id|>"), token("<|eot_id|>")]
    config = MllamaConfig(
        about=ABOUT,
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 3],
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            "bos_token_id": token("<|begin_of_text|>"),
            "eos_token_id": eos,
            "pad_token_id": token("<|finetune_right_pad_id|>"),
        },
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": TILE,
            "patch_size": PATCH,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [1, 3],
            "vision_output_dim": 3 * 128,
        },
        image_token_index=token(IMAGE),
    )
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and "gate_proj" not in name:
                if "embedding" not in name or name.endswith(".gate"):
                    parameter.fill_(0.5)
            elif "tile_embedding" in name or "tile_positional_embedding" in name:
                parameter.zero_()
    model.generation_config = GenerationConfig(
        bos_token_id=config.text_config.bos_token_id, eos_token_id=eos, pad_token_id=config.text_config.pad_token_id
    )
    return model


def save(model: MllamaForConditionalGeneration, processor: MllamaProcessor, folder: Path) -> None:
    """Write the checkpoint as save_pretrained does, weights in bfloat16."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)


TILE_EMBEDDINGS = (
    "pre_tile_positional_embedding.embedding.weight",
    "gated_positional_embedding.tile_embedding.weight",
    "post_tile_positional_embedding.embedding.weight",
)


def clear_padding_embeddings(tensors: dict[str, torch.Tensor], config: MllamaConfig) -> None:
    """Set the embeddings of the tiles beyond each canvas to zero, in place, as transformers' converter does for Meta's
    checkpoints: all padding tiles are then equal (`ov_mllama.export.graphs.VisionEncoder`).

    Args:
        tensors: of a state dict, by name; those other than TILE_EMBEDDINGS are not changed.
    """
    vision = config.vision_config
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith(TILE_EMBEDDINGS)]:
            for ratio, (high, wide) in enumerate([(0, 0), *vision.supported_aspect_ratios]):
                tensors[name][ratio].view(vision.max_num_tiles, -1)[high * wide :] = 0
