"""Questions -> answers, written into their conversations one at a time, whoever watches."""

import asyncio
import contextlib
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ov_mllama.chat.store import ANSWERED, CUT, FAILED, STOPPED, WAITING, Conversation, Conversations, Turn
from ov_mllama.runtime.errors import InputError, UserError
from ov_mllama.runtime.inference import Cancelled, Progress
from ov_mllama.runtime.prompts import (
    FifoLock,
    escape_special_tokens,
    picture_tensors,
    prompt_tensors,
    sampling,
    stream_words,
)

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 2.0  # of an answer under way


class GenerationSettings(NamedTuple):
    """How to answer.

    Attributes:
        system: prompt; may be empty.
        max_new_tokens: the answer's limit.
        temperature, top_p: of sampling; a temperature of 0 takes the likeliest token (greedy).
    """

    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9


class Answering(NamedTuple):
    """An answer under way: its task, and what it waits for."""

    task: asyncio.Task
    progress: Progress


def to_messages(turns: Sequence[Turn], system: str = "") -> tuple[list[dict], list[Path]]:
    """A conversation for the chat template, and its pictures in the template's order.

    Args:
        turns: the last one is the question; of those before, the ones without an answer are left out.
        system: system prompt; may be empty.
    Raises:
        ValueError: there is no question.
    """
    *before, question = turns
    if not question.pictures and not question.question.strip():
        raise InputError("There is no question yet: write one, or add a picture.")
    messages = [message("system", system)] if system.strip() else []
    for turn in before:
        if turn.answer:
            messages += [message("user", turn.question, turn.pictures), message("assistant", turn.answer)]
    messages.append(message("user", question.question, question.pictures))
    asked = [turn for turn in before if turn.answer] + [question]
    return messages, [picture for turn in asked for picture in turn.pictures]


def message(role: str, text: str, pictures: Collection[Path] = ()) -> dict:
    """For the chat template: pictures first, then text in which nothing is a special token."""
    texts = [{"type": "text", "text": escape_special_tokens(text.strip())}] if text.strip() else []
    return {"role": role, "content": [*({"type": "image"} for _ in pictures), *texts]}


class Chat:
    """A model that answers one question at a time, whoever asks: the others stand in line. Answers are written on when
    no page looks at them; `begin` and `stop` belong to one event loop.

    Args:
        model, processor: as for `prompts.prompt_tensors` and `stream_words`.
        conversations: where answers are kept.
        options: of `generate`, for every question.

    Attributes:
        line: of the questions.
        ahead: pictures that are encoded while questions about them are written.
    """

    def __init__(self, model, processor, conversations: Conversations, **options):
        self.model, self.processor, self.conversations, self.options = model, processor, conversations, options
        self.ahead = Prefetcher(model, processor)
        self.line = FifoLock()
        self._under_way: dict[Conversation, Answering] = {}
        self._writer = ThreadPoolExecutor(1, "saves")  # in order, and the page does not wait for the disk
        self._failed: set[Conversation] = set()  # to be written again in a moment

    def answering(self, conversation: Conversation) -> Answering | None:
        """The answer that a conversation waits for."""
        return self._under_way.get(conversation)

    def begin(self, conversation: Conversation, wishes: GenerationSettings, uploads: Collection[Path] = ()) -> None:
        """Begins to answer a conversation's last question.

        Args:
            uploads: its pictures as `ahead` knows them.
        """
        turn, progress = conversation.turns[-1], Progress()
        turn.answer, turn.note, turn.state = "", "", WAITING
        task = asyncio.create_task(self._answer_and_save(conversation, progress, wishes, uploads))
        self._under_way[conversation] = Answering(task, progress)

        def ended(_) -> None:
            if turn.state == WAITING:  # given up before its first step
                turn.state = STOPPED
            del self._under_way[conversation]
            self.save(conversation)

        task.add_done_callback(ended)

    async def stop(self, conversation: Conversation) -> None:
        """Ends the answer under way, if there is one, and waits until it has ended and was saved, and those begun
        meanwhile too."""
        while answering := self._under_way.get(conversation):
            answering.task.cancel()
            await asyncio.wait([answering.task])
            await asyncio.sleep(0)  # its callback
            await asyncio.to_thread(self.flush)

    def save(self, conversation: Conversation) -> None:
        """Save a conversation as it is now, in a thread. If that fails, `unsaved` says why, and it is tried again every
        SAVE_EVERY_S seconds."""
        self._writer.submit(self._write, conversation, self.conversations.snapshot(conversation))

    def flush(self) -> None:
        """Wait until everything that was to be saved has been tried."""
        self._writer.submit(lambda: None).result()

    def _write(self, conversation: Conversation, row: list | None) -> None:
        try:
            self.conversations.write(conversation, row)
            conversation.unsaved = ""
        except (sqlite3.Error, OSError) as error:
            conversation.unsaved = f"This chat could not be saved ({error}). It is tried again every few seconds."
            logger.warning("A chat could not be saved, and is tried again: %s", error)
            if conversation not in self._failed:
                self._failed.add(conversation)
                again = threading.Timer(SAVE_EVERY_S, self._save_again, [conversation])
                again.daemon = True
                again.start()

    def _save_again(self, conversation: Conversation) -> None:
        self._failed.discard(conversation)
        if conversation.unsaved:
            with contextlib.suppress(RuntimeError):  # the program ends
                self.save(conversation)

    async def _answer_and_save(self, conversation, progress: Progress, wishes: GenerationSettings, uploads) -> None:
        async def save_often() -> None:
            while True:
                self.save(conversation)
                await asyncio.sleep(SAVE_EVERY_S)

        saving = asyncio.create_task(save_often())
        try:
            await self.answer(conversation.turns, progress, wishes, uploads)
        finally:
            saving.cancel()

    async def answer(
        self, turns: Sequence[Turn], progress: Progress, wishes: GenerationSettings, uploads: Collection[Path] = ()
    ) -> None:
        """Writes the last turn's answer into it, word by word, and at its end its note and state. Whatever goes wrong
        is said there; cancelled, the turn is STOPPED within a token.

        Args:
            progress: told what is waited for.
            uploads: as for `begin`.
        """
        turn, limit = turns[-1], int(wishes.max_new_tokens)
        try:
            messages, pictures = to_messages(turns, wishes.system)
            arguments = {**self.options, **sampling(wishes.temperature, wishes.top_p), "max_new_tokens": limit}

            def note(stats, cut: bool) -> None:
                turn.note = " · ".join([stats.times, *turn.remarks, *said])
                turn.state = CUT if cut else ANSWERED

            with self.ahead.holding(uploads):
                async with self.line.turn(progress):
                    progress.enter("Opening the question’s pictures" if pictures else "Preparing the question")
                    inputs, said = await asyncio.to_thread(
                        prompt_tensors, self.model, self.processor, messages, pictures, limit
                    )
                    words = stream_words(self.model, self.processor, note, progress, **{**inputs, **arguments})
                    async with contextlib.aclosing(words):
                        async for piece in words:
                            turn.answer += piece
        except asyncio.CancelledError:
            turn.state = STOPPED
            raise
        except UserError as error:
            turn.state, turn.note = FAILED, str(error)
        except Exception as error:  # whatever it is, the page says it and stays usable; the log has the rest
            logger.exception("A question could not be answered")
            turn.state, turn.note = FAILED, f"{type(error).__name__}: {error}"


logger = logging.getLogger(__name__)

GRACE_S = 2.0  # a picture is given up so long after it was taken away: a question that is sent empties its box first


def clock() -> float:
    """`time.monotonic`, and the end of all time once the program ends: nothing is wanted any more then."""
    return time.monotonic() if threading.main_thread().is_alive() else math.inf


class Unwanted(NamedTuple):
    """An event that is set once nobody wants a picture any more."""

    ahead: "Prefetcher"
    picture: Path

    def is_set(self) -> bool:
        return not self.ahead.wants(self.picture)


class Prefetcher:
    """Encodes pictures that somebody is about to ask about, one at a time and after those of prompts.

    Errors are silent here: the question about the picture says them. There is a thread only while there is work.

    Args:
        model, processor: as for `prompts.prompt_tensors`.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self._until: dict[tuple[Hashable, Path], float] = {}  # when an owner's picture is given up, by `clock`
        self._begun: set[Path] = set()  # of those wanted, whatever came of it
        self._working = False
        self._lock = threading.Lock()

    def want(self, owner: Hashable, pictures: Collection[Path]) -> None:
        """Sets which pictures an owner, such as a page, is about to ask about; others of its are given up soon.

        Args:
            pictures: all of them, those named before too; none when it goes away.
        """
        with self._lock:
            self._drop_expired()
            soon = clock() + GRACE_S
            for (who, picture), until in self._until.items():
                if who == owner and picture not in pictures:
                    self._until[who, picture] = min(until, soon)
            self._until |= {(owner, picture): math.inf for picture in pictures}
            if pictures and not self._working:
                self._working = True
                threading.Thread(target=self._work, name="pictures ahead").start()

    def wants(self, picture: Path) -> bool:
        """Whether anybody wants a picture."""
        now = clock()
        with self._lock:
            return any(until > now for (_, wanted), until in self._until.items() if wanted == picture)

    @contextlib.contextmanager
    def holding(self, pictures: Collection[Path]) -> Iterator[None]:
        """Of a question's pictures, those that are wanted stay so while it waits: its box is empty meanwhile."""
        question = object()
        self.want(question, [picture for picture in pictures if self.wants(picture)])
        try:
            yield
        finally:
            self.want(question, [])

    def _drop_expired(self) -> None:
        now = clock()
        self._until = {wanted: until for wanted, until in self._until.items() if until > now}
        self._begun &= {picture for _, picture in self._until}

    def _next(self) -> Path | None:
        """The picture wanted longest that was not begun; None ends the thread."""
        with self._lock:
            self._drop_expired()
            picture = next((picture for _, picture in self._until if picture not in self._begun), None)
            self._working = picture is not None
            if picture is not None:
                self._begun.add(picture)
            return picture

    def _work(self) -> None:
        while (picture := self._next()) is not None:
            try:
                tensors = picture_tensors(self.model, self.processor, picture)
                self.model.encode_images(**tensors, stop=Unwanted(self, picture))
            except Cancelled:
                self._begun.discard(picture)  # it may come back
            except Exception:
                logger.debug("%s was not encoded ahead", picture, exc_info=True)
