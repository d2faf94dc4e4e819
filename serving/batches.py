"""Questions that wait share the model's steps: one thread takes them in batches, in the order in which they came."""

import asyncio
import copy
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from ov_mllama.conversation import prompt_text
from ov_mllama.inference import Stopped
from ov_mllama.machine import give_back
from serving.questions import Question, Refusal
from serving.rows import Choice, Ends, Row, Schemas

logger = logging.getLogger(__name__)

SAID_PLAINLY = (ValueError, FloatingPointError)  # the model's refusals are sentences already


class Asked:
    """A question in line, and what its answer consists of so far.

    Args:
        text: the question as the chat template writes it.

    Attributes:
        row: of the batch that answers it.
    """

    def __init__(self, question: Question, text: str, schemas: Schemas, tokenizer):
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        matcher = schemas.matcher(question.schema) if question.schema is not None else None
        self.question, self.text, self.row = question, text, Row(question, self._say, matcher, tokenizer)
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
        self._alone = 0  # how many of those in front did not fit into memory together
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def ask(self, question: Question) -> Asked:
        """Puts a question in line.

        Raises:
            Refusal: too many wait already, the context is too short for it, or its schema is none.
        """
        try:
            text = prompt_text(self.model, self.processor, question.messages, question.max_new_tokens)
        except ValueError as error:
            raise Refusal(400, str(error), "context_length_exceeded", "messages") from error
        asked = Asked(question, text, self.schemas, self.processor.tokenizer)
        with self._changed:
            if len(self._line()) >= self.line:
                sentence = f"{len(self._waiting)} requests wait already: try again in a few seconds."
                raise Refusal(429, sentence, "rate_limit_exceeded", kind="requests", headers={"Retry-After": "5"})
            self._waiting.append(asked)
            self._changed.notify()
        return asked

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
            first = self._waiting[0]
            # the processor takes pictures for all rows or for none
            batch = [asked for asked in self._waiting if bool(asked.question.pictures) == bool(first.question.pictures)]
            batch = batch[: 1 if self._alone else self.size]
            self._alone = max(0, self._alone - 1)
            for asked in batch:
                self._waiting.remove(asked)
            return batch

    def _work(self) -> None:
        while batch := self._next():
            try:
                try:
                    self._answer(batch)
                except MemoryError:  # before any of it began: what does not fit together may fit one by one
                    if len(batch) == 1 or any(asked.row.words.tokens for asked in batch):
                        raise
                    with self._changed:
                        self._waiting.extendleft(reversed(batch))
                    self._alone += len(batch)
                    continue
                error = None
            except Stopped:
                error = None
            except SAID_PLAINLY as refused:
                error = Refusal(400, str(refused), "invalid_value")
            except MemoryError as refused:
                error = Refusal(503, str(refused), "out_of_memory", kind="server_error", headers={"Retry-After": "30"})
            except Exception as failed:
                logger.exception("A batch could not be answered")
                error = Refusal(500, f"{type(failed).__name__}: {failed}", kind="server_error")
            for asked in batch:
                asked.end(error if asked.row.finish is None else None)
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
