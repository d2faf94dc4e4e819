"""What may be asked of the model: every input is checked before anything is computed, and refused with a sentence.

OpenVINO takes what transformers refuses (an id that has no embedding reads past the table), and an inference that fails
half way costs more than a refusal (`OVLanguageModel.infer`).
"""

import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from transformers import MllamaConfig

from .cross_attention import tiles_seen
from .kv_cache import OVCache, Prompt
from .language import OVLanguageModel, Session, prefill_step
from .memory import free_memory, prompt_memory
from .shapes import MllamaShapes
from .vision import ImageInputs, OVImageEncoder

# forward's arguments for what stays inside OpenVINO
INSIDE = {
    "inputs_embeds": "tokens are embedded inside the model: give input_ids",
    "cross_attention_states": "images are encoded inside the model: give pixel_values and what comes with them",
    "output_attentions": "attention is computed inside the model, and its weights do not come out: leave it out",
    "output_hidden_states": "hidden states stay inside the model: leave it out",
}
# further ones that transformers passes along, and that change nothing here
HARMLESS = {"return_dict", "tokenizer", "output_router_logits", "is_first_iteration", "cache_position"}


MASKED_ARE = {  # what a 1 says, by mask
    "attention_mask": "tokens, 0 for padding",
    "aspect_ratio_mask": "an image's real tiles",
    "cross_attention_mask": "tiles that a token may see",
}


def check_arguments(arguments: dict) -> None:
    """Refuses arguments of transformers' `forward` that cannot be served; None and False ask for nothing.

    Raises:
        ValueError: what stays inside; TypeError: no such argument.
    """
    for name, value in arguments.items():
        if name in INSIDE:
            if value is not None and value is not False:
                raise ValueError(f"{name} cannot be served: {INSIDE[name]}.")
        elif name not in HARMLESS and value is not None:
            raise TypeError(f"forward takes no argument '{name}': check its spelling, or leave it out.")


def as_array(name: str, tensor: torch.Tensor | None, dtype: torch.dtype = torch.int64):
    """A tensor as an array of OpenVINO's type: bfloat16 pixels, boolean masks and i32 ids are taken too."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}: give a tensor, as the processor does (return_tensors='pt')."
        )
    if name.endswith("_ids") and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} are {tensor.dtype}: give integers, as the processor does.")
    if name.endswith("_mask") and not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError(f"{name} holds other numbers than 0 and 1: 1 is for {MASKED_ARE[name]}.")
    return tensor.detach().to("cpu", dtype).numpy()


def token_arrays(input_ids, attention_mask, position_ids) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Token ids, attention mask and positions as arrays; the last two may be left out.

    Raises:
        ValueError: no ids, or not [batch, tokens].
    """
    ids = as_array("input_ids", input_ids)
    if ids is None:
        raise ValueError("input_ids are missing: give the model all that the processor returns, model(**inputs).")
    check_shape("input_ids", ids, (-1, -1), "batch, tokens")
    return ids, as_array("attention_mask", attention_mask), as_array("position_ids", position_ids)


def image_arrays(pixel_values, aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask) -> ImageInputs | None:
    """The processor's four image tensors as arrays; None without images.

    Raises:
        ValueError: pixels without the others.
    """
    if pixel_values is None:
        return None
    if aspect_ratio_ids is None or aspect_ratio_mask is None or cross_attention_mask is None:
        raise ValueError(
            "pixel_values need aspect_ratio_ids, aspect_ratio_mask and, in a prompt, cross_attention_mask beside them: "
            "pass all that the processor returns for text and images together, model.generate(**inputs)."
        )
    pixels = as_array("pixel_values", pixel_values, torch.float32)
    names = ImageInputs._fields[1:]
    others = (aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask)
    return ImageInputs(pixels, *(as_array(name, tensor) for name, tensor in zip(names, others, strict=True)))


def images_alone(
    pixel_values, aspect_ratio_ids, aspect_ratio_mask, pixels_shape: tuple, config: MllamaConfig
) -> ImageInputs | None:
    """Image tensors before there is a prompt, as arrays, checked as by `check_images`; None without images."""
    images = image_arrays(pixel_values, aspect_ratio_ids, aspect_ratio_mask, aspect_ratio_mask)
    if images:  # as a prompt of one token would see them
        images = images._replace(cross_attention_mask=images.aspect_ratio_mask[:, None])
        check_images(images, (len(images.pixel_values), 1), pixels_shape, config)
    return images


def check_shape(name: str, array: np.ndarray | None, expected: tuple, meaning: str) -> None:
    """Refuses an array of another shape; -1 in `expected` is any length."""
    if array is None:
        return
    if array.ndim != len(expected) or any(e not in (-1, a) for e, a in zip(expected, array.shape, strict=True)):
        wanted = ", ".join("any" if length == -1 else str(length) for length in expected)
        raise ValueError(f"{name} is {list(array.shape)} where [{wanted}] is expected ({meaning}).")


def check_tokens(ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None, past: int, shapes) -> None:
    """Refuses token ids, an attention mask or positions that the model has no answer to.

    Args:
        ids: i64 [batch, query].
        past: tokens in the KV cache.
        shapes: `MllamaShapes` of the model.
    """
    batch, query = ids.shape
    if not batch or (past and not query):
        raise ValueError(f"input_ids is {list(ids.shape)}: there is nothing to compute.")
    if ids.size and not 0 <= ids.min() <= ids.max() < shapes.embeddings:
        wrong = ids[(ids < 0) | (ids >= shapes.embeddings)][0]
        raise ValueError(
            f"input_ids holds {wrong}, and this model has tokens 0 to {shapes.embeddings - 1}: use the tokenizer in "
            "the model's own folder."
        )
    meaning = "batch, tokens in the cache and new ones; 4D masks are not taken"
    check_shape("attention_mask", mask, (batch, past + query), meaning)
    if positions is not None and positions.shape != (1, query):
        check_shape("position_ids", positions, (batch, query), "batch, new tokens")
    if positions is not None and positions.size and positions.min() < 0:
        raise ValueError(f"position_ids begin with {positions.min()}: they count from 0.")


def check_images(images: ImageInputs, prompt: tuple[int, int], pixels_shape: tuple, config: MllamaConfig) -> None:
    """Refuses images that do not go with the prompt, the model, or one another.

    Args:
        prompt: its [batch, query].
        pixels_shape: that the vision encoder takes, [tiles, channels, height, width].
    """
    pixels, ratio_ids, tile_mask, seen = images
    batch, query = prompt
    tiles = pixels_shape[0]
    if pixels.ndim != 6 or pixels.shape[2:] != pixels_shape:
        raise ValueError(
            f"pixel_values are {pixels.shape[2:]} for each picture, and this model takes {pixels_shape}: use the "
            "processor in the model's own folder."
        )
    check_shape("pixel_values", pixels, (batch, -1, *pixels_shape), "batch, images, tiles, channels, height, width")
    count = pixels.shape[1]
    if not count:
        raise ValueError("pixel_values hold no image: leave out all four image tensors for text alone.")
    check_shape("aspect_ratio_ids", ratio_ids, (batch, count), "batch, images")
    check_shape("aspect_ratio_mask", tile_mask, (batch, count, tiles), "batch, images, tiles")
    check_shape("cross_attention_mask", seen, (batch, -1, count, tiles), "batch, tokens, images, tiles")
    if seen.shape[1] < query:
        raise ValueError(
            f"cross_attention_mask is for {seen.shape[1]} tokens and input_ids has {query}: repeat its last column for "
            "the others, as generate does."
        )
    known = len(config.vision_config.supported_aspect_ratios)
    if not 0 <= ratio_ids.min() <= ratio_ids.max() <= known:
        raise ValueError(
            f"aspect_ratio_ids go from {ratio_ids.min()} to {ratio_ids.max()}, and this model knows 0 (no image) to "
            f"{known}: use the processor in the model's own folder."
        )
    if not (tile_mask[..., 0].all() and (np.diff(tile_mask) <= 0).all()):
        raise ValueError("aspect_ratio_mask is 1 for an image's real tiles, one at least and first of all, and then 0.")


def check_continuation(cache: OVCache, ids: np.ndarray, images: ImageInputs | None, seen: np.ndarray | None) -> Session:
    """Refuses to go on with a conversation that is gone, or otherwise than it went; else returns its session.

    Args:
        ids: i64 [batch, query], the new tokens.
        seen: the cross-attention mask beside them, [batch, tokens, images, tiles], of the new tokens or of all; None if
            there is none.
    """
    batch, query = ids.shape
    if cache.session is None or cache.session.cache is not cache:
        raise ValueError(
            "This cache's tokens are gone: the model has begun another prompt since. Start anew: give the whole text "
            "without past_key_values, and what is still in the KV cache is not computed again."
        )
    if images is not None:
        raise ValueError("Pictures can only come with the prompt: call without past_key_values, with all the text.")
    if batch != cache.batch:
        raise ValueError(f"input_ids has {batch} rows, and the conversation in past_key_values has {cache.batch}.")
    if seen is not None and cache.last_seen.shape[-1]:
        past = len(cache.positions) if seen.shape[1] != query else 0  # as transformers takes it
        new = tiles_seen(seen, seen.shape[1])[:, past : past + query]
        expected = (batch, query, cache.last_seen.shape[-1])
        if new.shape != expected or not (new == cache.last_seen).all():
            raise ValueError(
                "cross_attention_mask shows later tokens other tiles than it showed the prompt's last one: give the "
                "whole text again, without past_key_values."
            )
    return cache.session


def check_cache(cache, language_model: OVLanguageModel) -> None:
    """Refuses transformers' own caches, which would stay empty, and those of another model.

    Raises:
        ValueError: with what to do instead.
    """
    if cache is not None and not isinstance(cache, OVCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, and this model keeps its KV cache inside OpenVINO: leave it "
            "out at first, then give what the call before returned as past_key_values."
        )
    if cache is not None and cache.session is not None and cache.session.model is not language_model:
        raise ValueError("past_key_values are another model's: give each model the cache that it returned itself.")


def warn_of_double_bos(ids: np.ndarray, bos: int | None) -> None:
    """The classic mistake: the chat template writes BOS, and the processor another one before it."""
    if bos is not None and ((ids[:, :-1] == bos) & (ids[:, 1:] == bos)).any():
        warnings.warn(
            "The prompt begins with two BOS tokens, which makes answers worse: the chat template has written one, so "
            "call the processor with add_special_tokens=False.",
            stacklevel=2,
        )


def check_vocabulary(draft: int, large: int) -> None:
    """Refuses a draft model with another vocabulary than the large model's.

    Raises:
        ValueError: so many tokens it has, and so many it would need.
    """
    if draft != large:
        raise ValueError(
            f"The draft model has a vocabulary of {draft} tokens and this model one of {large}: a draft model needs "
            "the same tokenizer, such as Llama-3.2-1B-Instruct's for the 11B and the 90B."
        )


def check_prompt_fits(config: MllamaConfig, prompt: Prompt, reused: int, rows: int, column_bytes: float) -> None:
    """Refuses a prompt that the context or this machine's memory cannot hold.

    Args:
        reused: tokens at its beginning that are in the KV cache already.
        rows: K/V rows that it reads of its images.
        column_bytes: of the KV cache, for each token.
    Raises:
        ValueError: no tokens, or more than the context holds; MemoryError: more than the memory does.
    """
    batch, tokens = prompt.input_ids.shape
    context = MllamaShapes.from_config(config).max_positions
    advice = "shorten it, or ask about its parts one by one."
    if not 0 < tokens <= context:
        raise ValueError(
            f"The prompt has {tokens} tokens, and this model takes 1 to {context}: "
            + (advice if tokens else "write a question.")
        )
    new = tokens - reused
    memory = prompt_memory(config, batch, tokens, min(new, prefill_step(batch)), rows) + batch * new * column_bytes
    available = free_memory()
    if available < memory:
        raise MemoryError(
            f"A prompt of {tokens} tokens takes {memory / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            f"free, {(memory - available) / 1e9:.1f} GB too little: {advice}"
        )


def check_ports(shapes: MllamaShapes, encoder: OVImageEncoder, language_model: ov.CompiledModel, model_dir: Path):
    """Refuses IRs that are not what the folder's config describes.

    Raises:
        ValueError: with the sentence that names the fix.
    """
    expected = {name: shapes.cross_kv_shape(name, 1, -1) for name in shapes.cross_kv_names}
    read = {name for port in language_model.inputs for name in port.get_names()}
    vocabulary = language_model.output("logits").partial_shape[2].get_length()
    fits = encoder.output_shapes == expected and encoder.pixels_shape[-1] == shapes.tile_size
    if not fits or not expected.keys() <= read or vocabulary != shapes.vocab_size:
        raise ValueError(
            f"{model_dir / 'config.json'} describes another model than the IRs beside it: run convert_mllama again, "
            "into a folder of its own."
        )
