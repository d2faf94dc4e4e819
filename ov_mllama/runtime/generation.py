"""Generation config of a model's folder, and the tokens that end an answer: one list, from whatever names them."""

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, MllamaConfig

# of Llama 3: ends of a turn, of a message before a tool's answer, and of a text
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


def token_ids(value: object) -> list[int]:
    """Return the ids of a config's entry, which is an int, a list or None."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]


def end_tokens(settings: GenerationConfig) -> list[int]:
    """Return the tokens that end an answer; none if only the token limit does."""
    return token_ids(settings.eos_token_id)


def generation_config(model_dir: Path, config: MllamaConfig | LlamaConfig) -> GenerationConfig:
    """Read the generation config of a converted model. One without end tokens, as earlier versions wrote it, is
    completed."""
    is_there = (model_dir / "generation_config.json").is_file()
    settings = GenerationConfig.from_pretrained(model_dir) if is_there else GenerationConfig()
    if not any(is_generated(token, config) for token in end_tokens(settings)):
        complete(settings, config, AutoTokenizer.from_pretrained(model_dir))
    return settings


def is_generated(token: int, config: MllamaConfig | LlamaConfig) -> bool:
    """Return whether a token has a logit."""
    return 0 <= token < getattr(config, "text_config", config).vocab_size


def complete(settings: GenerationConfig, config: MllamaConfig | LlamaConfig, tokenizer) -> None:
    """Set the special tokens of a generation config: the end tokens are those of itself, the model's config, the
    tokenizer and the chat template.

    Args:
        tokenizer: with its chat template, if any.
    """
    text = getattr(config, "text_config", config)
    named = [getattr(each, "eos_token_id", None) for each in (settings, config, text, tokenizer)]
    found = [*(token for value in named for token in token_ids(value)), *ends_of_turns(tokenizer)]
    settings.eos_token_id = list(dict.fromkeys(token for token in found if is_generated(token, config))) or None
    for name in ("bos_token_id", "pad_token_id"):
        if not token_ids(getattr(settings, name)):
            setattr(settings, name, getattr(tokenizer, name))


def ends_of_turns(tokenizer) -> list[int]:
    """Return the END_TOKENS in a tokenizer's chat template, and the added token that it writes behind an answer."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return []
    found = [tokenizer.convert_tokens_to_ids(name) for name in END_TOKENS if name in template]
    answer = "It is a dog."
    roles = {"user": "What is it?", "assistant": answer}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in roles.items()]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001 - whatever a template raises: it is no template for this conversation
        return token_ids(found)
    behind = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    return token_ids([*[token for token in behind if token in tokenizer.added_tokens_decoder][:1], *found])
