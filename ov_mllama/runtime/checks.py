"""Input validation. OpenVINO accepts what transformers rejects (an id without embedding reads past the table), and
recovery from a failed inference is expensive (`OVLanguageModel.infer`)."""

import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from transformers import MllamaConfig

from .cross_attention import tiles_seen
from .errors import InputError, OutOfMemoryError
from .kv_cache import OVCache, Prompt
from .language import OVLanguageModel, Session, prefill_step
from .memory import free_memory, prompt_memory
from .shapes import MllamaShapes
from .vision import ImageInputs, OVImageEncoder

# Arguments of transformers' forward for internals of the compiled model
UNSUPPORTED = {
    "inputs_embeds": "give input_ids",
    "cross_attention_states": "give pixel_values and the tensors that come with them",
    "output_attentions": "leave it out",
    "output_hidden_states": "leave it out",
}
# further ones that transformers passes, without effect here
IGNORED = {"return_dict", "tokenizer", "output_router_logits", "is_first_iteration", "cache_position"}
MASK_MEANING = {
    "attention_mask": "tokens, 0 for padding",
    "aspect_ratio_mask": "an image's real tiles",
    "cross_attention_mask": "tiles that a token may see",
}


def check_arguments(arguments: dict) -> None:
    """Reject arguments of transformers' `forward` that are unsupported (InputError) or unknown (TypeError)."""
    for name, value in arguments.items():
        if name in UNSUPPORTED:
            if value is not None and value is not False:
                raise InputError(f"{name} is internal to the compiled model: {UNSUPPORTED[name]}.")
        elif name not in IGNORED and value is not None:
            raise TypeError(f"forward takes no argument '{name}': check its spelling, or leave it out.")


def as_array(name: str, tensor: torch.Tensor | None, dtype: torch.dtype = torch.int64):
    """Convert a tensor (bfloat16 pixels, boolean masks and i32 ids too) to an array of OpenVINO's type."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}: give a tensor, as the processor does (return_tensors='pt')."
        )
    if name.endswith("_ids") and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} are {tensor.dtype}: give integers, as the processor does.")
    if name.endswith("_mask") and not ((tensor == 0) | (tensor == 1)).all():
        raise InputError(f"{name} holds other numbers than 0 and 1: 1 is for {MASK_MEANING[name]}.")
    return tensor.detach().to("cpu", dtype).numpy()


def token_arrays(input_ids, attention_mask, position_ids) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Convert token ids, attention mask and positions to arrays; the last two are optional."""
    ids = as_array("input_ids", input_ids)
    if ids is None:
        raise InputError("input_ids are missing: pass all that the processor returns, model(**inputs).")
    check_shape("input_ids", ids, (-1, -1), "batch, tokens")
    return ids, as_array("attention_mask", attention_mask), as_array("position_ids", position_ids)


def image_arrays(pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask) -> ImageInputs | None:
    """Convert the processor's four image tensors to arrays; None without images."""
    if pixel_values is None:
        return None
    if aspect_ratio_ids is None or aspect_ratio_mask is None or cross_attention_mask is None:
        raise InputError(
            "pixel_values need aspect_ratio_ids, aspect_ratio_mask and, in a prompt, cross_attention_mask: pass all "
            "that the processor returns for text and images together, model.generate(**inputs)."
        )
    pixels = as_array("pixel_values", pixel_values, torch.float32)
    names = ImageInputs._fields[1:]
    others = (aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask)
    return ImageInputs(pixels, *(as_array(name, tensor) for name, tensor in zip(names, others, strict=True)))


def images_alone(
    pixel_values, aspect_ratio_ids, aspect_ratio_mask, pixels_shape: tuple, config: MllamaConfig
) -> ImageInputs | None:
    """Convert and check image tensors that come before a prompt; None without images."""
    images = image_arrays(pixel_values, aspect_ratio_ids, aspect_ratio_mask, aspect_ratio_mask)
    if images:  # as a prompt of one token would see them
        images = images._replace(cross_attention_mask=images.aspect_ratio_mask[:, None])
        check_images(images, (len(images.pixel_values), 1), pixels_shape, config)
    return images


def check_shape(name: str, array: np.ndarray | None, expected: tuple, meaning: str) -> None:
    """Reject an array of another shape; -1 in `expected` is any length."""
    if array is None:
        return
    if array.ndim != len(expected) or any(e not in (-1, a) for e, a in zip(expected, array.shape, strict=True)):
        shape = ", ".join("any" if length == -1 else str(length) for length in expected)
        raise InputError(f"{name} is {list(array.shape)} where [{shape}] is expected ({meaning}).")


def check_tokens(ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None, past: int, shapes) -> None:
    """Reject token ids [batch, query], a mask or positions that are invalid after `past` tokens in the KV cache."""
    batch, query = ids.shape
    if not batch or (past and not query):
        raise InputError(f"input_ids is {list(ids.shape)}: there is nothing to compute.")
    if ids.size and not 0 <= ids.min() <= ids.max() < shapes.embeddings:
        wrong = ids[(ids < 0) | (ids >= shapes.embeddings)][0]
        raise InputError(
            f"input_ids holds {wrong}; this model has tokens 0 to {shapes.embeddings - 1}: use the tokenizer in the "
            "model's own folder."
        )
    meaning = "batch, tokens in the cache and new ones; 4D masks are not supported"
    check_shape("attention_mask", mask, (batch, past + query), meaning)
    if positions is not None and positions.shape != (1, query):
        check_shape("position_ids", positions, (batch, query), "batch, new tokens")
    if positions is not None and positions.size and positions.min() < 0:
        raise InputError(f"position_ids begin with {positions.min()}: they count from 0.")


def check_images(images: ImageInputs, prompt: tuple[int, int], pixels_shape: tuple, config: MllamaConfig) -> None:
    """Reject images that do not match the prompt, the model, or one another.

    Args:
        prompt: its [batch, query].
        pixels_shape: of the vision encoder, [tiles, channels, height, width].
    """
    pixels, ratio_ids, tile_mask, seen = images
    batch, query = prompt
    tiles = pixels_shape[0]
    if pixels.ndim != 6 or pixels.shape[2:] != pixels_shape:
        raise InputError(
            f"pixel_values are {pixels.shape[2:]} for each image; this model takes {pixels_shape}: use the processor "
            "in the model's own folder."
        )
    check_shape("pixel_values", pixels, (batch, -1, *pixels_shape), "batch, images, tiles, channels, height, width")
    count = pixels.shape[1]
    if not count:
        raise InputError("pixel_values hold no image: leave out all four image tensors for text alone.")
    check_shape("aspect_ratio_ids", ratio_ids, (batch, count), "batch, images")
    check_shape("aspect_ratio_mask", tile_mask, (batch, count, tiles), "batch, images, tiles")
    check_shape("cross_attention_mask", seen, (batch, -1, count, tiles), "batch, tokens, images, tiles")
    if seen.shape[1] < query:
        raise InputError(
            f"cross_attention_mask is for {seen.shape[1]} tokens and input_ids has {query}: repeat its last column for "
            "the others, as generate does."
        )
    known = len(config.vision_config.supported_aspect_ratios)
    if not 0 <= ratio_ids.min() <= ratio_ids.max() <= known:
        raise InputError(
            f"aspect_ratio_ids go from {ratio_ids.min()} to {ratio_ids.max()}; this model knows 0 (no image) to "
            f"{known}: use the processor in the model's own folder."
        )
    if not (tile_mask[..., 0].all() and (np.diff(tile_mask) <= 0).all()):
        raise InputError("aspect_ratio_mask must be 1 for an image's real tiles, at least the first, then 0.")


def check_continuation(cache: OVCache, ids: np.ndarray, images: ImageInputs | None, seen: np.ndarray | None) -> Session:
    """Return the session of a cache, after checking that the new tokens can follow those in it.

    Args:
        ids: i64 [batch, query], the new tokens.
        seen: their cross-attention mask, [batch, tokens, images, tiles], or that of all tokens; optional.
    """
    batch, query = ids.shape
    if cache.session is None or cache.session.cache is not cache:
        raise InputError(
            "past_key_values is stale, as the model has begun another prompt since: give the complete text without it; "
            "its cached prefix is reused."
        )
    if images is not None:
        raise InputError("Images can only come with the prompt: give the complete text, without past_key_values.")
    if batch != cache.batch:
        raise InputError(f"input_ids has {batch} rows and past_key_values has {cache.batch}: give as many.")
    if seen is not None and cache.last_seen.shape[-1]:
        past = len(cache.positions) if seen.shape[1] != query else 0  # as transformers takes it
        new = tiles_seen(seen, seen.shape[1])[:, past : past + query]
        expected = (batch, query, cache.last_seen.shape[-1])
        if new.shape != expected or not (new == cache.last_seen).all():
            raise InputError(
                "cross_attention_mask differs from that of the prompt's last token: give the complete text again, "
                "without past_key_values."
            )
    return cache.session


def check_cache(cache, language_model: OVLanguageModel) -> None:
    """Reject transformers' own caches, which would stay empty, and those of another model."""
    if cache is not None and not isinstance(cache, OVCache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}; this model's KV cache is inside OpenVINO: leave it out at "
            "first, then give the past_key_values of the call before."
        )
    if cache is not None and cache.session is not None and cache.session.model is not language_model:
        raise InputError("past_key_values are another model's: give each model the cache that it returned itself.")


def warn_of_double_bos(ids: np.ndarray, bos: int | None) -> None:
    """Warn if both the chat template and the processor have added BOS."""
    if bos is not None and ((ids[:, :-1] == bos) & (ids[:, 1:] == bos)).any():
        warnings.warn(
            "The prompt begins with two BOS tokens, which makes answers worse: the chat template adds one, so call the "
            "processor with add_special_tokens=False.",
            stacklevel=2,
        )


def check_vocabulary(draft: int, target: int) -> None:
    """Reject a draft model with another vocabulary than the target model's."""
    if draft != target:
        raise InputError(
            f"The draft model has a vocabulary of {draft} tokens and this model one of {target}: a draft model needs "
            "the same tokenizer, such as Llama-3.2-1B-Instruct's for the 11B and the 90B."
        )


def check_prompt_fits(config: MllamaConfig, prompt: Prompt, reused: int, rows: int, token_bytes: float) -> None:
    """Check that a prompt fits into the model's context (InputError) and this machine's memory (OutOfMemoryError).

    Args:
        reused: length of its prefix in the KV cache.
        rows: K/V rows of its images.
        token_bytes: of the KV cache, per token.
    """
    batch, tokens = prompt.input_ids.shape
    context = MllamaShapes.from_config(config).max_positions
    advice = "shorten it, or split it into several prompts."
    if not 0 < tokens <= context:
        text = f"The prompt has {tokens} tokens; this model takes 1 to {context}: "
        raise InputError(text + (advice if tokens else "write a question."))
    new = tokens - reused
    memory = prompt_memory(config, batch, tokens, min(new, prefill_step(batch)), rows) + batch * new * token_bytes
    available = free_memory()
    if available < memory:
        raise OutOfMemoryError(
            f"A prompt of {tokens} tokens needs {memory / 1e9:.1f} GB of memory; only {available / 1e9:.1f} GB are "
            f"available: {advice}"
        )


def check_ports(shapes: MllamaShapes, encoder: OVImageEncoder, language_model: ov.CompiledModel, model_dir: Path):
    """Reject IRs that do not match the folder's config."""
    expected = {name: shapes.cross_kv_shape(name, 1, -1) for name in shapes.cross_kv_names}
    read = {name for port in language_model.inputs for name in port.get_names()}
    vocabulary = language_model.output("logits").partial_shape[2].get_length()
    fits = encoder.output_shapes == expected and encoder.pixels_shape[-1] == shapes.tile_size
    if not fits or not expected.keys() <= read or vocabulary != shapes.vocab_size:
        raise InputError(
            f"{model_dir / 'config.json'} describes another model than the IRs beside it: run convert_mllama again "
            "into another folder."
        )


def check_gives_queries(language_model: OVLanguageModel) -> None:
    """Reject a language IR without cross-attention queries, as earlier versions wrote it."""
    if not language_model.gives_queries:
        raise InputError(
            "The language model's IR gives no attention maps, as an earlier version made it: delete it "
            "(openvino_language_model.xml, llm_*.xml), then run `ov-mllama prepare`, or convert_mllama and compress."
        )
