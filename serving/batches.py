"""Questions that wait share the model's steps: one thread takes them in batches, in the order in which they came."""

import asyncio
import contextlib
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from llguidance import LLMatcher
from transformers.models.mllama.image_processing_mllama import get_optimal_tiled_canvas

from ov_mllama.conversation import prompt_text
from ov_mllama.inference import Stopped
from ov_mllama.machine import give_back
from serving.questions import Question, Refusal
from serving.rows import Choice, Ends, Row, Schemas

logger = logging.getLogger(__name__)

TILES = 16  # that a batch has at most, of different pictures: each of its questions waits for all of them
PICTURE_TENSORS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
IMAGE_ROOM = 2_000_000_000  # bytes of encoded pictures to keep: so many tiles, of the 11B
SAID_PLAINLY = (ValueError, FloatingPointError)  # the model's refusals are sentences already


class Asked:
    """A question in line, and what its answer consists of so far.

    Args:
        text: the question as the chat template writes it.
        matcher: that the answer follows; None for free text.

    Attributes:
        row: of the batch that answers it.
        alone: whether it shares no steps, because a batch with it went wrong.
    """

    def __init__(self, question: Question, text: str, matcher: LLMatcher | None, tokenizer):
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.question, self.text, self.row = question, text, Row(question, self._say, matcher, tokenizer)
        self.alone = False
        self.error: Exception | None = None

    def _say(self, piece: str | None) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    def end(self, error: Exception | None = None) -> None:
        """There will be no more."""
        self.error = error
        self._say(None)

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as it comes. Closing it ends the answer with the token under way.

        Raises:
            Refusal: it could not be answered.
        """
        try:
            while (piece := await self._pieces.get()) is not None:
                yield piece
        finally:
            self.row.cancelled.set()
        if self.error:
            raise self.error


class AllCancelled:
    """An event that is set once nobody waits for a batch any more."""

    def __init__(self, batch: Sequence[Asked]):
        self.batch = batch

    def is_set(self) -> bool:
        return all(asked.row.cancelled.is_set() for asked in self.batch)


class Batches:
    """Answers questions, several at once where several wait.

    Args:
        model, processor: as for `conversation.prompt_tensors`.
        size: how many share a step. Each takes its own room in the KV cache.
        line: how many may wait.
    """

    def __init__(self, model, processor, size: int = 8, line: int = 32):
        self.model, self.processor, self.size, self.line = model, processor, size, line
        # padding is a switch of the tokenizer, for all threads that use it: the one that pads has its own
        self._padding = copy.deepcopy(processor)
        ends = model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        self.schemas = Schemas(processor.tokenizer, self.ends)
        self._waiting: deque[Asked] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._took_s = 10.0  # the last batch; before there is one, a guess that suits the 11B
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    async def ask(self, question: Question) -> Asked:
        """Puts a question in line.

        Raises:
            Refusal: too many wait already, the context is too short for it, or its schema is none.
        """
        text, matcher = await asyncio.to_thread(self._read, question)  # a second for each megabyte of text
        asked = Asked(question, text, matcher, self.processor.tokenizer)
        with self._changed:
            self.check_room()
            self._waiting.append(asked)
            self._changed.notify()
        return asked

    def _read(self, question: Question) -> tuple[str, LLMatcher | None]:
        """A question as the chat template writes it, and what its answer follows."""
        try:
            text = prompt_text(self.model, self.processor, question.messages, question.max_new_tokens)
        except ValueError as error:
            raise Refusal(400, str(error), "context_length_exceeded", "messages") from error
        return text, self.schemas.matcher(question.schema) if question.schema is not None else None

    def check_room(self) -> None:
        """Raises Refusal: too many wait already."""
        with self._changed:
            if (waiting := len(self._line())) < self.line:
                return
        seconds = round(min(60, max(1, self._took_s)))  # clients wait no longer at a time
        sentence = f"{waiting} requests wait already: try again in {seconds} s."
        headers = {"Retry-After": str(seconds)}
        raise Refusal(429, sentence, "rate_limit_exceeded", kind="requests", headers=headers)

    def close(self) -> None:
        """Ends the thread, after the batch under way."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _line(self) -> deque[Asked]:
        """Who waits, without those that have gone: neither they nor their pictures keep a place."""
        for asked in [each for each in self._waiting if each.row.cancelled.is_set()]:
            self._waiting.remove(asked)
            asked.end()
        return self._waiting

    def _next(self) -> list[Asked]:
        """The question that waits longest, and those after it that can share its steps; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._line() or not self._open)
            if not self._open:
                return []
            first, batch, tiles = self._waiting[0], [], dict[int, int]()
            for asked in self._waiting:
                together = tiles | self._tiles(asked.question)
                # else the processor fills up with blank pictures, and the model looks at one of them
                alike = len(asked.question.pictures) == len(first.question.pictures) and not asked.alone
                if asked is first or (alike and sum(together.values()) <= TILES):
                    batch.append(asked)
                    tiles = together
                if first.alone or len(batch) == self.size:
                    break
            for asked in batch:
                self._waiting.remove(asked)
            return batch

    def _tiles(self, question: Question) -> dict[int, int]:
        """How many tiles a question's pictures have, by numbers by which the same picture is known again."""
        vision = self.model.config.vision_config
        side, most = vision.image_size, vision.max_num_tiles
        tiles = {}
        for picture in question.pictures:
            high, wide = get_optimal_tiled_canvas(picture.height, picture.width, most, side)
            tiles[picture.info.get("look", id(picture))] = (high // side) * (wide // side)
        return tiles

    def _work(self) -> None:
        while batch := self._next():
            started, error = time.perf_counter(), None
            try:
                self._answer(batch)
            except Stopped:
                pass
            except Exception as failed:  # noqa: BLE001 - `refusal_of` says it
                if len(batch) > 1 and not any(asked.row.words.tokens for asked in batch):
                    # one may have spoiled it for the others; what has no room together may have it one by one
                    for asked in batch:
                        asked.alone = True
                    with self._changed:
                        self._waiting.extendleft(reversed(batch))
                    continue
                error = refusal_of(failed, len(batch))
            for asked in batch:
                asked.end(error if asked.row.finish is None else None)
            self._took_s = time.perf_counter() - started
            give_back()  # or a server keeps, of many sizes of batches, what each has freed

    def _answer(self, batch: list[Asked]) -> None:
        images = [asked.question.pictures for asked in batch]
        inputs = self._padding(
            text=[asked.text for asked in batch],
            images=images if images[0] else None,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        if images[0] and len(batch) > 1:
            there = self._looked_at(inputs, batch)
            batch, inputs = [batch[i] for i in there], {name: tensor[there] for name, tensor in inputs.items()}
            if not batch:
                return
        rows = [asked.row for asked in batch]
        for row, mask in zip(rows, inputs["attention_mask"], strict=True):
            row.prompt_tokens = int(mask.sum())
        self.model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=max(row.question.max_new_tokens for row in rows),
            logits_processor=[Choice(rows)],
            stopping_criteria=[Ends(rows, self.ends)],
            stop=AllCancelled(batch),
        )

    def _looked_at(self, inputs, batch: list[Asked]) -> list[int]:
        """Encodes the pictures of each row; those of clients that have gone, or go meanwhile, are left out. Returns the
        rows of the others: nobody waits for pictures that nobody asks about."""
        there = []
        for i, asked in enumerate(batch):
            tensors = {name: inputs[name][i : i + 1] for name in PICTURE_TENSORS}
            with contextlib.suppress(Stopped):
                self.model.encode_images(**tensors, stop=asked.row.cancelled)
                there.append(i)
        return there


def refusal_of(error: Exception, questions: int) -> Refusal:
    """What is said of an error to those who share a batch of so many questions."""
    if isinstance(error, MemoryError):
        return Refusal(503, str(error), "out_of_memory", kind="server_error", headers={"Retry-After": "30"})
    if isinstance(error, SAID_PLAINLY) and questions == 1:
        return Refusal(400, str(error), "invalid_value")
    logger.error("A batch could not be answered", exc_info=error)
    return Refusal(500, f"{type(error).__name__}: {error}", kind="server_error")
