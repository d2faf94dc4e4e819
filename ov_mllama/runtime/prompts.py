"""Prompts and answers of chat, server and captions: messages to tensors, and streaming of the generated text."""

import asyncio
import contextlib
import itertools
import re
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import jinja2
import torch
from transformers import AutoProcessor
from transformers.generation.streamers import AsyncTextIteratorStreamer

from .errors import InputError, TemplateError
from .generation import token_ids
from .images import at_detail, load_image
from .inference import POLL_S, Cancelled, Progress, acquire

STOP_WITHIN_S = 0.5  # longest wait for the current step after a stop, see `stream_words`
GREEDY = {"do_sample": False, "temperature": None, "top_p": None}


def load_processor(model_dir: str | Path):
    """Return the processor of a converted model: its images as in Meta's code, its batches padded on the left."""
    processor = AutoProcessor.from_pretrained(model_dir, backend="pil")
    tokenizer = processor.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    return processor


def apply_template(processor, messages: list[dict]) -> str:
    """Return messages in the chat template, with the generation prompt.

    Raises:
        TemplateError: if the template refuses them, or there is none.
    """
    if not processor.chat_template:
        raise TemplateError("The model's folder holds no chat template: run convert_mllama again, which writes one.")
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as error:  # the latter where it joins what the conversation lacks
        raise TemplateError(f"The model's chat template refuses the conversation: {error}") from error


def escape_special_tokens(text: str) -> str:
    """Break special tokens such as "<|eot_id|>", also across a join of texts, by a zero-width space; replace lone
    surrogates by U+FFFD."""
    valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"(^|<)\|", "\\1\u200b|", valid)


def prompts_about(processor, samples: list[dict]) -> dict[str, torch.Tensor]:
    """Return a left-padded batch of prompts: the "question" of each sample about its "image", after the (question,
    answer) pairs "before", if any."""
    text: list[str] = []
    for sample in samples:
        texts = [*(part for pair in sample.get("before", ()) for part in pair), sample["question"]]
        contents = [[{"type": "text", "text": part}] for part in texts]
        contents[0] = [{"type": "image"}, *contents[0]]
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        text.append(apply_template(processor, messages))
    pad = processor.tokenizer.pad_token_id
    return padded([prompt_inputs(processor, t, [s["image"]]) for t, s in zip(text, samples, strict=True)], pad)


def prompt_inputs(processor, text: str, images: list) -> dict[str, torch.Tensor]:
    """Return the processor's tensors of one prompt, a text of the chat template, and its images."""
    nested = [images] if images else None
    return dict(processor(text=[text], images=nested, add_special_tokens=False, return_tensors="pt"))


def padded(prompts: list[dict[str, torch.Tensor]], pad_token: int | None) -> dict[str, torch.Tensor]:
    """Join prompts (`prompt_inputs`) with equally many images into a left-padded batch. (A tokenizer's padding side is
    shared by all threads, and may be right.)"""
    fill = {"input_ids": pad_token or 0, "attention_mask": 0, "cross_attention_mask": 0}
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {}
    for name in prompts[0]:
        rows = [prompt[name] for prompt in prompts]
        if name in fill:  # [1, tokens, ...]
            blanks = [row.new_full((1, length - row.shape[1], *row.shape[2:]), fill[name]) for row in rows]
            rows = [torch.cat(pair, 1) for pair in zip(blanks, rows, strict=True)]
        batch[name] = torch.cat(rows)
    return batch


def prompt_text(model, processor, messages: list[dict], max_new_tokens: int) -> str:
    """Apply the chat template, with the generation prompt.

    Raises:
        TemplateError: as `apply_template`.
        InputError: if the text exceeds the model's context.
    """
    text = apply_template(processor, messages)
    length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    context = model.config.text_config.max_position_embeddings
    if length + max_new_tokens > context:
        raise InputError(
            f"The conversation has {length} tokens, which with {max_new_tokens} for the answer exceed the model's "
            f"context of {context}: start a new one, or request a shorter answer."
        )
    return text


def prompt_tensors(
    model,
    processor,
    messages: list[dict],
    pictures: list,
    max_new_tokens: int,
    detail: str | Sequence[str] = "high",
    prefill: str = "",
):
    """Return the processor's tensors for a conversation, and remarks on its images (`load_image`).

    Args:
        messages: for the chat template; texts after `escape_special_tokens`.
        pictures: for `load_image`, in the template's order.
        max_new_tokens: of the answer, which the context must hold too.
        detail: "high" or "low" for all images, or one for each, see `images.at_detail`.
        prefill: beginning of the answer, which the model continues.
    Raises:
        InputError: for an invalid image or `detail`, or as `prompt_text`.
    """
    begun = len(processor.tokenizer(prefill, add_special_tokens=False)["input_ids"]) if prefill else 0
    text = prompt_text(model, processor, messages, begun + max_new_tokens) + prefill
    opened = [load_image(picture) for picture in pictures]
    tile = model.config.vision_config.image_size
    details = [detail] * len(opened) if isinstance(detail, str) else detail
    images = [at_detail(image, each, tile) for image, each in zip(opened, details, strict=True)] or None
    inputs = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
    return inputs, [image.info["remark"] for image in opened if "remark" in image.info]


def picture_tensors(model, processor, picture, detail: str = "high") -> dict[str, torch.Tensor]:
    """Return an image's tensors for `encode_images`, equal to those of `prompt_tensors`."""
    image = at_detail(load_image(picture), detail, model.config.vision_config.image_size)
    inputs = processor(text=processor.image_token, images=[image], add_special_tokens=False, return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}


def sampling(temperature: float, top_p: float, top_k: int | None = None) -> dict:
    """Return arguments of `generate`; a temperature of 0 is greedy.

    Args:
        top_k: None for the checkpoint's.
    """
    limit = {} if top_k is None else {"top_k": top_k}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, **limit} if temperature > 0 else GREEDY


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch within the block, and put its state back after it; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def hit_token_limit(
    output: torch.Tensor, prompt_tokens: int, max_new_tokens: int, eos_token_id: int | list[int] | None
) -> bool:
    """Return whether an answer, in `output` of `generate`, i64 [1, prompt and answer], ended by the token limit."""
    answer = output[0, prompt_tokens:]
    return len(answer) >= max_new_tokens and int(answer[-1]) not in token_ids(eos_token_id)


class FifoLock:
    """Asynchronous lock with a first-in-first-out queue."""

    def __init__(self):
        self._queue: list[object] = []  # the holder first

    @contextlib.asynccontextmanager
    async def turn(self, progress: Progress) -> AsyncGenerator[None]:
        """Hold the lock within the block; `progress` is updated with the queue's length."""
        ticket, shown = object(), 0
        self._queue.append(ticket)
        try:
            while before := self._queue.index(ticket):
                if before != shown:
                    others = f"{before} other conversations’ answers" if before > 1 else "another conversation’s answer"
                    progress.enter(f"Waiting for {others}")
                    shown = before
                await asyncio.sleep(POLL_S)
            yield
        finally:
            self._queue.remove(ticket)


async def stream_words(
    model,
    processor,
    on_complete=lambda stats, hit_limit: None,
    progress: Progress | None = None,
    seed: int | None = None,
    **arguments,
) -> AsyncGenerator[str]:
    """Stream the text of `generate`, which runs in a thread.

    Closing the stream cancels the wait for the model, an image between two layers, a prompt within `PREFILL_TOKENS`, an
    answer within a token. A step that takes longer than `STOP_WITHIN_S` ends in the background, with the model locked.

    Args:
        model: an `OVMLlamaForConditionalGeneration`, or anything with its `generate` (`stop` and `progress` too),
            `turn` and `generation_config`.
        on_complete: called after a complete answer, holding `turn`, with the statistics and `hit_token_limit`.
        progress: updated with the current stage.
        seed: of a sampled answer; None for any.
        arguments: of `generate`, `max_new_tokens` included.
    """
    stop = threading.Event()
    progress = progress or Progress()
    progress.enter("Waiting for another answer to end")
    streamer = AsyncTextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate():
        try:
            with contextlib.suppress(Cancelled), acquire(model.turn, stop), seeded(seed):
                progress.enter("Beginning")
                output = model.generate(**arguments, streamer=streamer, stop=stop, progress=progress)
                if stop.is_set():
                    return
                length, limit = arguments["input_ids"].shape[1], arguments["max_new_tokens"]
                hit_limit = hit_token_limit(output, length, limit, model.generation_config.eos_token_id)
                on_complete(model.stats, hit_limit)
        finally:
            streamer.end()  # again after a complete answer, which the loop below does not see

    generating = asyncio.create_task(asyncio.to_thread(generate))
    try:
        async for piece in streamer:
            yield piece
        await generating  # raises its error
    finally:
        stop.set()
        await asyncio.wait([generating], timeout=STOP_WITHIN_S)
