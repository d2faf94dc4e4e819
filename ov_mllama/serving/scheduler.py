"""Questions that wait share the model's steps: one thread takes them in batches, in the order in which they came."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher

from ov_mllama.runtime.images import PictureError
from ov_mllama.runtime.inference import Cancelled
from ov_mllama.runtime.memory import trim_memory
from ov_mllama.runtime.prompts import padded, prompt_inputs, prompt_text
from ov_mllama.serving.protocol import ApiError, Question, failure
from ov_mllama.serving.sequences import GrammarCompiler, Sampler, Sequence, StopCheck

TILES = 16  # that a batch has at most, of different pictures: each of its questions waits for all of them
PICTURE_TENSORS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
IMAGE_CACHE_BYTES = 2_000_000_000  # bytes of encoded pictures to keep: so many tiles, of the 11B
QUEUE_BYTES = 500_000_000  # of requests that are read, wait or are answered
PAUSE_S = 0.5  # after an error that is no question's
USER_ERRORS = (ValueError, FloatingPointError, PictureError)  # the model's refusals are sentences already


class Place:
    """A request's place in the queue, from before its body is read until its answer ends.

    Attributes:
        nbytes: that it holds, see `Scheduler.hold`.
        in_line: whether it counts among those that wait.
    """

    def __init__(self):
        self.nbytes, self.in_line = 0, True


class PendingRequest:
    """A question in line, and what its answer consists of so far.

    Args:
        text: the question as the chat template writes it.
        matcher: that the answer follows; None for free text.
        place: its own in the queue.
        tiles: computed tiles of its images, by `ImageFile.key`.

    Attributes:
        row: of the batch that answers it.
        alone: whether it shares no steps, because a batch with it went wrong.
        ended: whether there will be no more.
    """

    def __init__(self, question: Question, text: str, matcher: LLMatcher | None, tokenizer, place: Place, tiles: dict):
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue()
        self.question, self.text, self.row = question, text, Sequence(question, self._say, matcher, tokenizer)
        self.place, self.tiles = place, tiles
        self.alone = self.ended = False
        self.error: Exception | None = None

    def _say(self, piece: str | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody is there any more
            self.row.cancelled.set()

    def end(self, error: Exception | None = None) -> None:
        """There will be no more, as an answer that is whole already was told."""
        if not self.ended:
            self.ended, self.question.pictures = True, []
            self.error = self.row.error or (error if self.row.finish is None else None)
            self._say(None)

    async def pieces(self) -> AsyncGenerator[str]:
        """The answer as it comes. Closing it ends the answer with the token under way.

        Raises:
            ApiError: it could not be answered.
        """
        try:
            while (piece := await self._pieces.get()) is not None:
                yield piece
        finally:
            self.row.cancelled.set()
        if error := self.error or self.row.error:
            raise error


class AllCancelled:
    """An event that is set once nobody waits for a batch any more."""

    def __init__(self, batch: list[PendingRequest]):
        self.batch = batch

    def is_set(self) -> bool:
        return all(asked.row.cancelled.is_set() for asked in self.batch)


class Scheduler:
    """Answers questions, several at once where several wait.

    Args:
        model, processor: as for `prompts.prompt_tensors`.
        size: how many share a step. Each takes its own room in the KV cache.
        line: how many may wait, those whose bodies are being read among them.
        queue_bytes: that all requests may hold, from the first byte that is read until their answers end.
    """

    def __init__(self, model, processor, size: int = 8, max_queue: int = 32, queue_bytes: int = QUEUE_BYTES):
        self.model, self.processor, self.size, self.max_queue = model, processor, size, max_queue
        self.queue_bytes = queue_bytes
        ends = model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        self.schemas = GrammarCompiler(processor.tokenizer, self.ends)
        self._compiling = ThreadPoolExecutor(1, "schemas")  # or slow ones take all threads that read requests
        self._places: set[Place] = set()
        self._waiting: deque[PendingRequest] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._took_s = 10.0  # the last batch; before there is one, a guess that suits the 11B
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive()

    # ---- The queue ----

    def enter(self) -> Place:
        """A place in the queue, which `ask` takes, or `leave`.

        Raises:
            ApiError: too many wait already, or nothing is answered any more.
        """
        if not (self._open and self.alive):
            raise ApiError(503, "The server answers nothing any more: restart it.", kind="server_error")
        with self._changed:
            self._line()  # frees the places of those that have gone
            if sum(place.in_line for place in self._places) >= self.max_queue:
                raise self._full(f"{self.max_queue} requests wait already")
            place = Place()
            self._places.add(place)
            return place

    def hold(self, place: Place, nbytes: int) -> None:
        """Says how many bytes a request holds now.

        Raises:
            ApiError: that is more than there is room for.
        """
        with self._changed:
            self._line()
            if sum(other.nbytes for other in self._places) - place.nbytes + nbytes > self.queue_bytes:
                raise self._full(f"The requests that wait hold {self.queue_bytes / 1e6:.0f} MB already")
            place.nbytes = nbytes

    def leave(self, place: Place) -> None:
        """Frees a place."""
        with self._changed:
            self._places.discard(place)

    def _full(self, sentence: str) -> ApiError:
        seconds = round(min(60, max(1, self._took_s)))  # clients wait no longer at a time
        headers = {"Retry-After": str(seconds)}
        sentence = f"{sentence}: try again in {seconds} s."
        return ApiError(429, sentence, "rate_limit_exceeded", kind="requests", headers=headers)

    async def ask(self, question: Question, place: Place | None = None) -> PendingRequest:
        """Puts a question in line.

        Args:
            place: from `enter`; None enters.
        Raises:
            ApiError: too many wait already, the context is too short for it, or its schema is none.
        """
        place = place or self.enter()
        try:
            self.hold(place, question.nbytes)
            text = await asyncio.to_thread(self._text, question)  # a second for each megabyte
            matcher, tiles = None, {picture.key: self._tiles(picture) for picture in question.pictures}
            if question.schema is not None:
                loop = asyncio.get_running_loop()
                matcher = await loop.run_in_executor(self._compiling, self.schemas.matcher, question.schema)
            asked = PendingRequest(question, text, matcher, self.processor.tokenizer, place, tiles)
            with self._changed:
                if not (self._open and self.alive):
                    raise ApiError(503, "The server is ending.", kind="server_error")
                self._waiting.append(asked)
                self._changed.notify()
            return asked
        except BaseException:
            self.leave(place)
            raise

    def _text(self, question: Question) -> str:
        """A question as the chat template writes it."""
        try:
            return prompt_text(self.model, self.processor, question.messages, question.max_new_tokens)
        except ValueError as error:
            if type(error) is not ValueError:  # of the inside
                raise
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from error

    def _tiles(self, picture) -> int:
        """Tiles of an image that are computed, an empty one among them."""
        vision, encoder = self.model.config.vision_config, self.model.image_encoder
        most = vision.max_num_tiles
        return min(picture.real_tiles(vision.image_size, most) + 1, most) if encoder.padding_alike else most

    def _most_tiles(self) -> int:
        """Tiles of a batch: no more than the image cache holds, or its first is evicted before its last is encoded."""
        encoder = self.model.image_encoder
        return min(TILES, encoder.kept.max_bytes // encoder.shapes.cross_kv_bytes(encoder.shapes.patches_per_tile))

    def close(self) -> None:
        """Ends the thread, after the batch under way."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _line(self) -> deque[PendingRequest]:
        """Who waits, without those that have gone: neither they nor their pictures keep a place."""
        for asked in [each for each in self._waiting if each.row.cancelled.is_set()]:
            self._waiting.remove(asked)
            self._end(asked)
        return self._waiting

    def _end(self, asked: PendingRequest, error: Exception | None = None) -> None:
        """Ends a question's answer and frees its place."""
        asked.end(error)
        self.leave(asked.place)

    # ---- The thread that answers ----

    def _work(self) -> None:
        try:
            while self._open:
                self._work_once()
        finally:  # whatever has ended it, nobody waits for ever
            with self._changed:
                self._open = False
                left, self._waiting = self._waiting, deque()
            for asked in left:
                self._end(asked, ApiError(503, "The server is ending.", kind="server_error"))

    def _work_once(self) -> None:
        """Answers a batch. No error ends the thread, not even one that would end a program: nobody else answers."""
        batch: list[PendingRequest] = []
        try:
            if batch := self._next():
                self._answer_or_requeue(batch)
        except BaseException as error:  # noqa: BLE001
            with self._changed:  # the one in front may be the reason
                batch = batch or [self._waiting.popleft() for _ in range(min(1, len(self._waiting)))]
            refusal = failure(error)
            for asked in batch:
                self._end(asked, refusal)
            if not batch:
                time.sleep(PAUSE_S)

    def _next(self) -> list[PendingRequest]:
        """The question that waits longest, and those after it that can share its steps; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._line() or not self._open)
            if not self._open:
                return []
            first, batch, tiles = self._waiting[0], [], dict[int, int]()
            for asked in self._waiting:
                together = tiles | asked.tiles
                # else the processor fills up with blank pictures, and the model looks at one of them
                alike = len(asked.question.pictures) == len(first.question.pictures) and not asked.alone
                if asked is first or (alike and sum(together.values()) <= self._most_tiles()):
                    batch.append(asked)
                    tiles = together
                if first.alone or len(batch) == self.size:
                    break
            for asked in batch:
                self._waiting.remove(asked)
                asked.place.in_line = False
            return batch

    def _answer_or_requeue(self, batch: list[PendingRequest]) -> None:
        started, error = time.perf_counter(), None
        try:
            self._answer(batch)
        except Cancelled:
            pass
        except Exception as failed:  # noqa: BLE001 - `refusal_of` says it
            left = [asked for asked in batch if not asked.ended]
            if len(left) > 1 and not any(asked.row.words.tokens for asked in left):
                # one may have spoiled it for the others; what has no room together may have it one by one
                for asked in left:
                    asked.alone = asked.place.in_line = True
                with self._changed:
                    self._waiting.extendleft(reversed(left))
                return
            error = refusal_of(failed, len(batch))
        for asked in batch:
            self._end(asked, error)
        self._took_s = time.perf_counter() - started
        trim_memory()  # or a server keeps, of many sizes of batches, what each has freed

    def _answer(self, batch: list[PendingRequest]) -> None:
        prompts = []
        for asked in batch:
            inputs = self._inputs(asked)
            if inputs and (len(batch) == 1 or encoded(self.model, asked, inputs)):
                prompts.append((asked, inputs))
        if not prompts:
            return
        rows = [asked.row for asked, _ in prompts]
        for row, (_, inputs) in zip(rows, prompts, strict=True):
            row.prompt_tokens = inputs["input_ids"].shape[1]
        self.model.generate(
            **padded([inputs for _, inputs in prompts], self.processor.tokenizer.pad_token_id),
            do_sample=False,
            temperature=None,
            top_p=None,
            max_new_tokens=max(row.question.max_new_tokens for row in rows),
            logits_processor=[Sampler(rows)],
            stopping_criteria=[StopCheck(rows, self.ends)],
            stop=AllCancelled([asked for asked, _ in prompts]),
        )

    def _inputs(self, asked: PendingRequest) -> dict | None:
        """A question's tensors, its images decoded one after the other; None if it has gone or has been ended, as one
        whose image is broken: the others of its batch have nothing to do with it."""
        if asked.row.cancelled.is_set():
            return None
        side = self.model.config.vision_config.image_size
        try:
            images = []
            for picture in asked.question.pictures:
                images.append(picture.decode(side))
            return prompt_inputs(self.processor, asked.text, images)
        except PictureError as error:
            self._end(asked, ApiError(400, str(error), "invalid_image", picture.param))
        except Exception as error:  # noqa: BLE001
            self._end(asked, failure(error))
        return None


def encoded(model, asked: PendingRequest, inputs: dict) -> bool:
    """Encodes the images of a question, unless its client has gone, or goes meanwhile: nobody waits for images that
    nobody asks about. Returns whether it is still there."""
    if not asked.question.pictures:
        return True
    try:
        model.encode_images(**{name: inputs[name] for name in PICTURE_TENSORS}, stop=asked.row.cancelled)
    except Cancelled:
        return False
    return True


def refusal_of(error: Exception, questions: int) -> ApiError:
    """The refusal for those who share a batch of so many questions. Only what the model says of a question is told;
    other errors' texts are of the inside, those of subclasses of ValueError too."""
    if type(error) is MemoryError and str(error):
        return ApiError(503, str(error), "out_of_memory", kind="server_error", headers={"Retry-After": "30"})
    if type(error) in USER_ERRORS and questions == 1:
        return ApiError(400, str(error), "invalid_value")
    return failure(error)
