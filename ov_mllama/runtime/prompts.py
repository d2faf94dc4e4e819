"""Messages -> the model's tensors -> its words: what chat, server and captions share.

Special tokens in what people write are made harmless, the context's length is checked before pictures are opened, and
words come as they are found, until somebody stops them.
"""

import asyncio
import contextlib
import itertools
import re
import threading
from collections.abc import AsyncGenerator

import torch
from transformers.generation.streamers import AsyncTextIteratorStreamer

from .images import at_detail, open_picture
from .inference import POLL_S, Cancelled, Progress, acquire

STOP_WITHIN_S = 0.5  # a person who stopped an answer is not kept longer, see `stream_words`
GREEDY = {"do_sample": False, "temperature": None, "top_p": None}


def escape_special_tokens(text: str) -> str:
    """Text that any tokenizer takes and in which nothing is a special token, nor becomes one behind another text: a
    zero-width space keeps "<|eot_id|>" readable and harmless. Halves of characters (lone surrogates) become U+FFFD."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"(^|<)\|", "\\1\u200b|", whole)


def prompts_about(processor, samples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of prompts, each the "question" about the "image" of a sample, padded on the left. What was asked and
    answered "before", (question, answer) pairs, goes first in those that have it."""
    text: list[str] = []
    for sample in samples:
        said = [*(words for pair in sample.get("before", ()) for words in pair), sample["question"]]
        contents = [[{"type": "text", "text": words}] for words in said]
        contents[0] = [{"type": "image"}, *contents[0]]
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        text.append(processor.apply_chat_template(messages, add_generation_prompt=True))
    pad = processor.tokenizer.pad_token_id
    return padded([prompt_inputs(processor, t, [s["image"]]) for t, s in zip(text, samples, strict=True)], pad)


def prompt_inputs(processor, text: str, images: list) -> dict[str, torch.Tensor]:
    """The processor's tensors of one prompt, as the chat template writes it, and its images."""
    nested = [images] if images else None
    return dict(processor(text=[text], images=nested, add_special_tokens=False, return_tensors="pt"))


def padded(prompts: list[dict[str, torch.Tensor]], pad_token: int | None) -> dict[str, torch.Tensor]:
    """Prompts of as many images each (`prompt_inputs`) as one batch, padded on the left, so that all answers begin in
    the same column. Tokenizers that were saved for training pad on the right, and their setting is all threads'.

    Args:
        pad_token: any will do where there is None, nothing looks at it.
    """
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
    """A conversation as the chat template writes it, up to where the answer begins.

    Args:
        messages, max_new_tokens: as for `prompt_tensors`.
    Raises:
        ValueError: more text than the model's context holds.
    """
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    context = model.config.text_config.max_position_embeddings
    if length + max_new_tokens > context:
        raise ValueError(
            f"The conversation has {length} tokens, and with {max_new_tokens} for the answer that is more than the "
            f"{context} this model can hold: start a new one, or ask for a shorter answer."
        )
    return text


def prompt_tensors(model, processor, messages: list[dict], pictures: list, max_new_tokens: int, detail: str = "high"):
    """The processor's tensors for a conversation, and what is to be said of its pictures.

    Args:
        messages: for the chat template; their texts are `escape_special_tokens` already.
        pictures: whatever `open_picture` takes, in the template's order.
        max_new_tokens: room to leave for the answer.
        detail: "high" or "low", see `images.at_detail`.
    Raises:
        ValueError: a picture that cannot be used, an unknown `detail`, or more text than the model's context holds.
    """
    text = prompt_text(model, processor, messages, max_new_tokens)
    opened = [open_picture(picture) for picture in pictures]
    tile = model.config.vision_config.image_size
    images = [at_detail(image, detail, tile) for image in opened] or None
    inputs = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
    return inputs, [image.info["remark"] for image in opened if "remark" in image.info]


def picture_tensors(model, processor, picture, detail: str = "high") -> dict[str, torch.Tensor]:
    """For `encode_images`: a picture's tensors exactly as `prompt_tensors` makes them, so that it is known again.

    Args:
        picture, detail: as for `prompt_tensors`.
    Raises:
        ValueError: a picture that cannot be used.
    """
    image = at_detail(open_picture(picture), detail, model.config.vision_config.image_size)
    inputs = processor(text=processor.image_token, images=[image], add_special_tokens=False, return_tensors="pt")
    return {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}


def sampling(temperature: float, top_p: float) -> dict:
    """For `generate`; a temperature of 0 takes the likeliest token (greedy)."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else GREEDY


def hit_token_limit(
    output: torch.Tensor, prompt_tokens: int, max_new_tokens: int, eos_token_id: int | list[int]
) -> bool:
    """Whether an answer ended only because of its limit.

    Args:
        output: what `generate` returned, i64 [1, prompt and answer].
        eos_token_id: the token, or tokens, that end an answer.
    """
    answer = output[0, prompt_tokens:]
    ends = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    return len(answer) >= max_new_tokens and int(answer[-1]) not in ends


class FifoLock:
    """Questions that are answered one at a time, in the order in which they came."""

    def __init__(self):
        self._questions: list[object] = []  # the one that is answered first

    @contextlib.asynccontextmanager
    async def turn(self, progress: Progress) -> AsyncGenerator[None]:
        """Waits until it is a new question's turn, which ends with the block; `progress` is told how many go before."""
        question, said = object(), 0
        self._questions.append(question)
        try:
            while before := self._questions.index(question):
                if before != said:
                    others = f"{before} other conversations’ answers" if before > 1 else "another conversation’s answer"
                    progress.enter(f"Waiting for {others}")
                    said = before
                await asyncio.sleep(POLL_S)
            yield
        finally:
            self._questions.remove(question)


async def stream_words(
    model, processor, note=lambda stats, cut: None, progress: Progress | None = None, **arguments
) -> AsyncGenerator[str]:
    """The words of `generate` as they come, from a thread.

    Closing it stops the generation within a token, a long prompt within `PREFILL_TOKENS`, a picture between two layers,
    or what was not its turn yet. It does not wait for the end of a step that takes longer than `STOP_WITHIN_S`, as of a
    long prompt: until then it is the model's turn that is waited for.

    Args:
        model: an `OVMLlamaForConditionalGeneration`, or anything with its `generate` (`stop` and `progress` too),
            `turn` and `generation_config`.
        note: called after a whole answer, while it still is this one's turn, with the model's statistics and whether
            the limit has cut it.
        progress: told what is waited for.
        arguments: of `generate`, `max_new_tokens` among them.
    """
    stop = threading.Event()
    progress = progress or Progress()
    progress.enter("Waiting for another answer to end")
    streamer = AsyncTextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate():
        try:
            with contextlib.suppress(Cancelled), acquire(model.turn, stop):
                progress.enter("Beginning")
                output = model.generate(**arguments, streamer=streamer, stop=stop, progress=progress)
                if stop.is_set():  # and who has stopped it may be gone: the step under way took longer
                    return
                ends = model.generation_config.eos_token_id
                note(
                    model.stats,
                    hit_token_limit(output, arguments["input_ids"].shape[1], arguments["max_new_tokens"], ends),
                )
        finally:
            streamer.end()  # a second time after a whole answer, which the loop below does not see

    generating = asyncio.create_task(asyncio.to_thread(generate))
    try:
        async for piece in streamer:
            yield piece
        await generating  # raises what generate raised
    finally:
        stop.set()
        await asyncio.wait([generating], timeout=STOP_WITHIN_S)
