"""Answer queue of the chat: one question at a time, saved while it is written, whether or not a page is open."""

import asyncio
import contextlib
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ov_mllama.chat.decoding import Decoding, GenerationSettings
from ov_mllama.chat.messages import details_of, to_messages
from ov_mllama.chat.recorded_queries import RecordedQueries
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, FAILED, STOPPED, WAITING, Turn
from ov_mllama.runtime.errors import UserError
from ov_mllama.runtime.images import DETAILS
from ov_mllama.runtime.inference import Cancelled, Progress
from ov_mllama.runtime.prompts import (
    FifoLock,
    escape_special_tokens,
    picture_tensors,
    prompt_tensors,
    stream_words,
)

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 2.0
GRACE_S = 2.0  # between the removal of an image and the end of its encoding: a sent question empties its text box first


class RunningAnswer(NamedTuple):
    """An answer under way, and its progress."""

    task: asyncio.Task
    progress: Progress


class Chat:
    """A model that answers one question at a time; others wait in a queue. Answers continue without an open page;
    `begin` and `stop` belong to one event loop.

    Args:
        model, processor: as for `prompts.prompt_tensors` and `stream_words`.
        conversations: where answers are saved.
        options: `generate` arguments for every question.

    Attributes:
        queue: FIFO queue of questions.
        prefetcher: encodes images while questions about them are typed.
        recorded: the last answers' queries, for heat maps.
    """

    def __init__(self, model, processor, conversations: Conversations, **options):
        self.model, self.processor, self.conversations = model, processor, conversations
        self.prefetcher = Prefetcher(model, processor)
        self.queue = FifoLock()
        self.recorded = RecordedQueries()
        self.decoding = Decoding(model, processor, options)
        self._running: dict[Conversation, RunningAnswer] = {}
        self._writer = ThreadPoolExecutor(1, "saves")  # in order, off the event loop
        self._failed: set[Conversation] = set()  # whose retry is scheduled

    def answering(self, conversation: Conversation) -> RunningAnswer | None:
        """Return the answer under way in a conversation; None if there is none."""
        return self._running.get(conversation)

    def begin(self, conversation: Conversation, settings: GenerationSettings, uploads: Collection[Path] = ()) -> None:
        """Begin to answer a conversation's last question, or to continue its answer.

        Args:
            uploads: its images under the names that were prefetched.
        """
        turns, progress = [*conversation.turns], Progress()  # a copy: another variant may be shown meanwhile
        turn = turns[-1]
        turn.note, turn.state = "", WAITING
        task = asyncio.create_task(self._answer_and_save(conversation, turns, progress, settings, uploads))
        self._running[conversation] = RunningAnswer(task, progress)

        def ended(_) -> None:
            if turn.state == WAITING:  # cancelled before its first step
                turn.state = STOPPED
            del self._running[conversation]
            self.save(conversation)

        task.add_done_callback(ended)

    def remove_encoded(self, pictures: Iterable[Path]) -> None:
        """Delete what the model has encoded of a deleted conversation's pictures, on disk too."""
        if not hasattr(self.model, "remove_images"):
            return
        for picture in pictures:
            with contextlib.suppress(UserError, OSError):  # missing, or broken
                for detail in DETAILS:
                    self.model.remove_images(**picture_tensors(self.model, self.processor, picture, detail))

    async def stop(self, conversation: Conversation) -> None:
        """Cancel the answer under way, if any, and those begun meanwhile; wait until they have ended and were saved."""
        while running := self._running.get(conversation):
            running.task.cancel()
            await asyncio.wait([running.task])
            await asyncio.sleep(0)  # its callback
            await asyncio.to_thread(self.flush)

    def save(self, conversation: Conversation) -> None:
        """Save a conversation as it is now, in a thread. A failure is put into `unsaved`, and retried every
        SAVE_EVERY_S seconds."""
        self._writer.submit(self._write, conversation, self.conversations.snapshot(conversation))

    def flush(self) -> None:
        """Wait until all pending saves have been tried."""
        self._writer.submit(lambda: None).result()

    def _write(self, conversation: Conversation, row: list | None) -> None:
        try:
            self.conversations.write(conversation, row)
            conversation.unsaved = ""
        except (sqlite3.Error, OSError) as error:
            conversation.unsaved = f"This chat could not be saved ({error}). Retrying every few seconds."
            logger.warning("A chat could not be saved, retrying: %s", error)
            if conversation not in self._failed:
                self._failed.add(conversation)
                retry = threading.Timer(SAVE_EVERY_S, self._retry_save, [conversation])
                retry.daemon = True
                retry.start()

    def _retry_save(self, conversation: Conversation) -> None:
        self._failed.discard(conversation)
        if conversation.unsaved:
            with contextlib.suppress(RuntimeError):  # the program ends
                self.save(conversation)

    async def _answer_and_save(self, conversation, turns, progress: Progress, settings: GenerationSettings, uploads):
        async def save_often() -> None:
            while True:
                self.save(conversation)
                await asyncio.sleep(SAVE_EVERY_S)

        saving = asyncio.create_task(save_often())
        try:
            await self.answer(turns, progress, settings, uploads)
        finally:
            saving.cancel()

    async def answer(
        self, turns: Sequence[Turn], progress: Progress, settings: GenerationSettings, uploads: Collection[Path] = ()
    ) -> None:
        """Answer the last turn, or continue its answer: append the text as it comes, then set note and state. An error
        goes into the note; cancelled, the turn is STOPPED within a token.

        Args:
            progress: updated with each stage.
            uploads: as for `begin`.
        """
        turn, limit = turns[-1], int(settings.max_new_tokens)
        turn.answer = turn.answer.rstrip("\ufffd")  # some of a character's tokens, at the token limit
        prefill = escape_special_tokens(turn.answer)
        settings = settings._replace(schema="") if prefill else settings  # which a matcher would begin anew
        try:
            messages, pictures = to_messages(turns, settings.system)

            def finish(stats, hit_limit: bool) -> None:
                turn.note = " · ".join([stats.times, *turn.remarks, *remarks])
                turn.state = CUT if hit_limit else ANSWERED

            with self.prefetcher.hold(uploads, turn.detail):
                async with self.queue.turn(progress):
                    progress.enter("Opening the question’s pictures" if pictures else "Preparing the question")
                    prompt = (messages, pictures, limit, details_of(turns), prefill)
                    inputs, remarks = await asyncio.to_thread(prompt_tensors, self.model, self.processor, *prompt)
                    arguments, text = await asyncio.to_thread(self.decoding.arguments, settings)
                    recording = {} if prefill else self.recorded.begin(self.model, inputs)
                    arguments = {**inputs, **arguments, **recording}
                    words = stream_words(self.model, self.processor, finish, progress, **arguments)
                    async with contextlib.aclosing(words):
                        async for piece in words:
                            turn.answer = text.extended(turn.answer, piece)
                    turn.answer = text.completed(turn.answer)
                    self.recorded.put(turns, recording.get("queries"))
        except asyncio.CancelledError:
            turn.state = STOPPED
            raise
        except UserError as error:
            turn.state, turn.note = FAILED, str(error)
        except Exception as error:  # the page shows it and stays usable; the log has the traceback
            logger.exception("A question could not be answered")
            turn.state, turn.note = FAILED, f"{type(error).__name__}: {error}"


def now() -> float:
    """Return `time.monotonic`, and infinity once the program ends, when everything has expired."""
    return time.monotonic() if threading.main_thread().is_alive() else math.inf


class ImageAt(NamedTuple):
    """An image at a detail."""

    path: Path
    detail: str


class AbandonedImage(NamedTuple):
    """An event that is set once nobody awaits an image any more."""

    prefetcher: "Prefetcher"
    image: ImageAt

    def is_set(self) -> bool:
        return not self.prefetcher.is_awaited(self.image)


class EncodingState(NamedTuple):
    """State of an image that is being encoded, for display."""

    progress: Progress

    def __str__(self) -> str:
        return f"encoding ... {str(self.progress).partition(' ... ')[2]}"


class Prefetcher:
    """Encodes images of questions that are being typed, one at a time, with lower priority than prompts.

    Errors are not raised: the question about the image raises them again. There is a thread only while there is work.

    Args:
        model, processor: as for `prompts.prompt_tensors`.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self._states: dict[ImageAt, object] = {}  # of begun images, for display
        self._expiry: dict[tuple[Hashable, ImageAt], float] = {}  # of each owner's images, by `now`
        self._begun: set[ImageAt] = set()  # awaited images that were tried already
        self._working = False
        self._lock = threading.Lock()

    def prefetch(self, owner: Hashable, paths: Collection[Path], detail: str = "high") -> None:
        """Set the images that an owner, such as a page, awaits; its others are cancelled after GRACE_S.

        Args:
            paths: of all of them, earlier ones too; none when the owner leaves.
            detail: of all of them.
        """
        images = [ImageAt(path, detail) for path in paths]
        with self._lock:
            self._drop_expired()
            soon = now() + GRACE_S
            for (other, image), expiry in self._expiry.items():
                if other == owner and image not in images:
                    self._expiry[other, image] = min(expiry, soon)
            self._expiry |= {(owner, image): math.inf for image in images}
            if images and not self._working:
                self._working = True
                threading.Thread(target=self._work, name="image prefetch").start()

    def is_awaited(self, image: ImageAt) -> bool:
        """Return whether any owner awaits an image."""
        time_s = now()
        with self._lock:
            return any(expiry > time_s for (_, awaited), expiry in self._expiry.items() if awaited == image)

    def states(self, owner: Hashable) -> list[str]:
        """Return the states of an owner's images, for display: "known" once they are encoded."""
        with self._lock:
            images = [image for (other, image), expiry in self._expiry.items() if other == owner and expiry == math.inf]
            return [str(self._states.get(image, "waiting")) for image in images]

    @contextlib.contextmanager
    def hold(self, paths: Collection[Path], detail: str) -> Iterator[None]:
        """Hold those of a question's images that are awaited until the block ends: its text box is empty meanwhile."""
        question = object()
        self.prefetch(question, [path for path in paths if self.is_awaited(ImageAt(path, detail))], detail)
        try:
            yield
        finally:
            self.prefetch(question, [])

    def _drop_expired(self) -> None:
        time_s = now()
        self._expiry = {key: expiry for key, expiry in self._expiry.items() if expiry > time_s}
        self._begun &= {image for _, image in self._expiry}
        self._states = {image: state for image, state in self._states.items() if image in self._begun}

    def _next(self) -> ImageAt | None:
        """Return the image awaited longest that was not tried yet; None ends the thread."""
        with self._lock:
            self._drop_expired()
            image = next((image for _, image in self._expiry if image not in self._begun), None)
            self._working = image is not None
            if image is not None:
                self._begun.add(image)
            return image

    def _work(self) -> None:
        while (image := self._next()) is not None:
            try:
                self._encode(image)
            except Cancelled:
                self._begun.discard(image)  # it may be added again
            except Exception:
                self._states[image] = "not encoded"
                logger.debug("%s was not prefetched", image, exc_info=True)

    def _encode(self, image: ImageAt) -> None:
        tensors, progress = picture_tensors(self.model, self.processor, *image), Progress()
        self._states[image] = EncodingState(progress)
        self.model.encode_images(**tensors, stop=AbandonedImage(self, image), progress=progress)
        self._states[image] = "known"
