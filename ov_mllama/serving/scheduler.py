"""Continuous batching: one thread prefills newcomers in chunks between the steps that running answers share.

waiting -> preparing (by other threads: images are encoded) -> prefilling -> running
"""

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ov_mllama.runtime.batch import SHARED_PREFILL_TOKENS, Batch, Prefill
from ov_mllama.runtime.errors import ImageError, InputError, NumericalError, OutOfMemoryError, TemplateError
from ov_mllama.runtime.generation import end_tokens
from ov_mllama.runtime.inference import Cancelled, check_stop
from ov_mllama.runtime.memory import trim_memory
from ov_mllama.runtime.prompts import prompt_inputs, prompt_text
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ApiError, internal_error
from ov_mllama.serving.sampling import GrammarCompiler
from ov_mllama.serving.sequences import PendingRequest, Reservation

MAX_BATCH_TILES = 16  # of different images: each running answer reads its own at each step
IMAGE_CACHE_BYTES = 2_000_000_000  # encoded images: MAX_BATCH_TILES tiles of the 11B
QUEUE_BYTES = 500_000_000  # of requests that are read, wait or run
FIRST_BATCH_S = 10.0  # duration of an answer that is assumed before there was one; it suits the 11B
ERROR_PAUSE_S = 0.5  # after an error that no request caused
TURN_PAUSE_S = 0.0002  # between steps: a lock that is taken again at once is never free for other threads
MAX_RETRY_AFTER_S = 60  # clients do not wait longer at a time


class Scheduler:
    """Queue and batches of requests.

    Args:
        model, processor: as for `prompts.prompt_tensors`.
        max_batch: sequences that share a step. Each has its own share of the KV cache.
        max_queue: requests that may wait, including those whose bodies are being read.
        queue_bytes: that all requests may hold, from the first byte read until their answers end.
    """

    def __init__(self, model, processor, max_batch: int = 8, max_queue: int = 32, queue_bytes: int = QUEUE_BYTES):
        self.model, self.processor = model, processor
        self.max_batch, self.max_queue, self.queue_bytes = max_batch, max_queue, queue_bytes
        self.eos_token_ids = end_tokens(model.generation_config)
        self.grammars = GrammarCompiler(processor.tokenizer, self.eos_token_ids)
        self._compiling = ThreadPoolExecutor(1, "grammars")  # or slow ones take all threads that read requests
        self._reservations: set[Reservation] = set()
        self._waiting: deque[PendingRequest] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._last_batch_s = FIRST_BATCH_S  # duration of the last answer
        self._preparing: list[PendingRequest] = []
        self._prefilling: deque[PendingRequest] = deque()  # each gets a chunk in turn
        self._running: list[PendingRequest] = []  # by row of `_batch`
        self._batch = Batch(model)
        # texts do not wait for images, which are encoded one by one
        self._pools = {True: ThreadPoolExecutor(1, "images"), False: ThreadPoolExecutor(1, "texts")}
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True if requests are answered."""
        return self._thread.is_alive()

    # ---- The queue ----

    def reserve(self) -> Reservation:
        """Reserve a place in the queue, for `submit` or `release`.

        Raises:
            ApiError: if the queue is full, or nothing is answered any more.
        """
        if not (self._open and self.alive):
            raise ApiError(503, "The server no longer answers: restart it.", error_type="server_error")
        with self._changed:
            self._drop_cancelled()
            if sum(reservation.waiting for reservation in self._reservations) >= self.max_queue:
                raise queue_full(f"{self.max_queue} requests wait already", self._last_batch_s)
            reservation = Reservation()
            self._reservations.add(reservation)
            return reservation

    def resize(self, reservation: Reservation, nbytes: int) -> None:
        """Set the bytes that a request holds.

        Raises:
            ApiError: if all requests would hold more than `queue_bytes`.
        """
        with self._changed:
            self._drop_cancelled()
            if sum(other.nbytes for other in self._reservations) - reservation.nbytes + nbytes > self.queue_bytes:
                reason = f"The requests that wait hold {self.queue_bytes / 1e6:.0f} MB already"
                raise queue_full(reason, self._last_batch_s)
            reservation.nbytes = nbytes

    def release(self, reservation: Reservation) -> None:
        """Release a reservation."""
        with self._changed:
            self._reservations.discard(reservation)

    async def submit(self, request: GenerationRequest, reservation: Reservation | None = None) -> PendingRequest:
        """Append a request to the queue.

        Args:
            reservation: from `reserve`; None makes one.
        Raises:
            ApiError: if the queue is full, the request exceeds the context, or its schema is invalid.
        """
        reservation = reservation or self.reserve()
        try:
            self.resize(reservation, request.nbytes)
            prompt = await asyncio.to_thread(self._prompt, request)  # a second for each megabyte
            matcher, tiles = None, {image.key: computed_tiles(self.model, image) for image in request.images}
            if request.schema is not None:
                loop = asyncio.get_running_loop()
                matcher = await loop.run_in_executor(self._compiling, self.grammars.compile, request.schema)
            pending = PendingRequest(request, prompt, matcher, self.processor.tokenizer, reservation, tiles)
            with self._changed:
                if not (self._open and self.alive):
                    raise shutting_down()
                reservation.submitted = True
                self._waiting.append(pending)
                self._changed.notify()
            return pending
        except BaseException:
            self.release(reservation)
            raise

    def _prompt(self, request: GenerationRequest) -> str:
        """Return a request's messages in the chat template."""
        try:
            shortest = 1 if request.fit_context else request.max_new_tokens
            return prompt_text(self.model, self.processor, request.messages, shortest)
        except TemplateError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from error
        except InputError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from error

    def _max_tiles(self) -> int:
        """Return the tiles of a batch: more than the image cache holds would evict its first image before the last is
        encoded."""
        encoder = self.model.image_encoder
        tile_bytes = encoder.shapes.cross_kv_bytes(encoder.shapes.patches_per_tile)
        return min(MAX_BATCH_TILES, encoder.cache.max_bytes // tile_bytes)

    def close(self) -> None:
        """Stop the thread after the answers that have begun."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> deque[PendingRequest]:
        """Finish cancelled requests, whose images would occupy the queue; return those that wait."""
        for pending in [each for each in self._waiting if each.sequence.cancelled.is_set()]:
            self._waiting.remove(pending)
            self._finish(pending)
        return self._waiting

    def _finish(self, pending: PendingRequest, error: Exception | None = None) -> None:
        """Finish a request and release its reservation."""
        pending.finish(error)
        self.release(pending.reservation)

    # ---- The thread that answers ----

    @property
    def _active(self) -> list[PendingRequest]:
        return [*self._preparing, *self._prefilling, *self._running]

    def _run(self) -> None:
        try:
            while self._open or self._active:
                self._run_once()
        finally:  # for any reason: no client waits forever
            with self._changed:
                self._open = False
                waiting, self._waiting = self._waiting, deque()
            for pending in [*waiting, *self._active]:
                self._finish(pending, shutting_down())

    def _run_once(self) -> None:
        """Wait for something to do, and run a step. No error ends the thread, not even SystemExit: there is no other
        that answers."""
        concerned: list[PendingRequest] = []
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._admit() or not (self._open or self._preparing))
            concerned = self._active
            if concerned:
                self._step()
        except BaseException as error:  # noqa: BLE001
            with self._changed:  # the first that waits may be the reason
                concerned = concerned or [self._waiting.popleft() for _ in range(min(1, len(self._waiting)))]
            internal = internal_error(error)
            self._batch.clear()
            for pending in concerned:
                self._remove(pending)
                self._finish(pending, internal)
            if not concerned:
                time.sleep(ERROR_PAUSE_S)

    def _admit(self) -> bool:
        """Admit requests that wait, and those that are prepared to be prefilled; return whether there is a step to run.
        For holders of `_changed`."""
        self._drop_cancelled()
        for pending in [each for each in self._preparing if each.prefill and each.prefill.done()]:
            self._preparing.remove(pending)
            self._prefilling.append(pending)
        while new := self._admissible():
            self._waiting.remove(new)
            new.reservation.waiting = False
            self._preparing.append(new)
            new.prefill = self._pools[bool(new.request.images)].submit(self._prepare, new)
            new.prefill.add_done_callback(self._wake)
        return bool(self._prefilling or self._running)

    def _wake(self, _) -> None:
        with self._changed:
            self._changed.notify()

    def _admissible(self) -> PendingRequest | None:
        """Return the first request that fits beside the active ones. Images, encoded one by one, are admitted in order;
        texts may overtake them, but nobody overtakes one that must run alone."""
        active = self._active
        if not self._open or len(active) >= self.max_batch or any(pending.exclusive for pending in active):
            return None
        tiles = dict[int, int]()
        for pending in active:
            tiles |= pending.image_tiles
        full = any(pending.request.images for pending in self._preparing)
        for pending in self._waiting:
            if pending.exclusive:
                return None if active else pending
            if not pending.image_tiles:
                return pending
            full = full or bool(tiles) and sum((tiles | pending.image_tiles).values()) > self._max_tiles()
            if not full:
                return pending
            full = True
        return None

    def _prepare(self, pending: PendingRequest) -> Prefill:
        """Return a request's prompt, its images encoded, in a thread of `_pools`."""
        check_stop(pending.sequence.cancelled)
        inputs = self._inputs(pending)
        sequence, context = pending.sequence, self.model.config.text_config.max_position_embeddings
        if sequence.num_tokens:  # it runs again, after a failure of others
            tokens = torch.tensor([sequence.detokenizer.tokens])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
        else:
            sequence.start(time.perf_counter(), inputs["input_ids"].shape[1], context)
        return Prefill(self.model, inputs, sequence.cancelled)

    def _inputs(self, pending: PendingRequest) -> dict:
        """Return a request's tensors, its images decoded one by one."""
        side, images = self.model.config.vision_config.image_size, []
        for image in pending.request.images:
            try:
                images.append(image.decode(side))
            except ImageError as error:
                raise ApiError(400, str(error), "invalid_image", image.param) from error
        return prompt_inputs(self.processor, pending.prompt, images)

    def _step(self) -> None:
        """Compute a chunk of one newcomer, who joins after its last one, and a token of each running answer."""
        with self.model.turn:
            try:
                self._requeue_lost()
                self._leave()
                if self._prefilling:
                    self._prefill()
                if self._running:
                    logits = self._batch.decode([pending.sequence.last_token for pending in self._running])
                    for pending, row in zip(self._running, logits, strict=True):
                        self._append_token(pending, row)
                self._leave()
            except Exception as error:  # noqa: BLE001 - `api_error_for` logs it
                self._fail(self._running, error)
                self._batch.clear()
        time.sleep(TURN_PAUSE_S)

    def _prefill(self) -> None:
        """Compute a chunk of the newcomer whose turn it is."""
        pending = self._prefilling[0]
        self._prefilling.rotate(-1)
        try:
            prefill = pending.prefill.result()
            logits = prefill.step(SHARED_PREFILL_TOKENS if self._running else 0)
        except BaseException as error:  # noqa: BLE001 - of this request only
            self._fail([pending], error, may_be_of_others=isinstance(error, MemoryError))
            self._requeue_lost()
            return
        if logits is not None:
            self._append_token(pending, logits)
            if not pending.ended:
                self._prefilling.remove(pending)
                self._running.append(pending)
                self._batch.join(prefill)

    def _append_token(self, pending: PendingRequest, logits: np.ndarray) -> None:
        """Sample the next token of an answer; an error is of this answer only."""
        try:
            token = pending.sequence.sample(torch.from_numpy(logits))
            pending.sequence.append_token(token, self.eos_token_ids)
        except BaseException as error:  # noqa: BLE001
            self._finish(pending, internal_error(error))

    def _leave(self) -> None:
        """Finish requests that have ended, and free their memory."""
        if rows := [row for row, pending in enumerate(self._running) if pending.ended]:
            self._batch.leave(rows)
        ended = [pending for pending in [*self._prefilling, *self._running] if pending.ended]
        for pending in ended:
            if prefill := pending.prefilled:
                prefill.close()
            self._remove(pending)
            self._finish(pending)
            self._last_batch_s = time.perf_counter() - pending.sequence.started_s
        if ended:
            trim_memory()  # or freed memory of many sizes adds up

    def _remove(self, pending: PendingRequest) -> None:
        """Remove a request from the active ones."""
        for stage in (self._preparing, self._prefilling, self._running):
            if pending in stage:
                stage.remove(pending)
        pending.prefill = None

    def _fail(self, failed: list[PendingRequest], error: BaseException, may_be_of_others: bool = True) -> None:
        """Finish requests with an error, or requeue them to run one by one if others may have caused it: what needs too
        much memory together may fit alone."""
        if may_be_of_others and len(self._active) > 1:
            self._requeue(failed, exclusive=True)
            return
        for pending in [*failed]:
            self._remove(pending)
            self._finish(pending, None if isinstance(error, Cancelled) else api_error_for(error))

    def _requeue(self, failed: list[PendingRequest], exclusive: bool = False) -> None:
        """Put requests in front of those that wait; their answers are continued."""
        failed = [*failed]
        for pending in failed:
            self._remove(pending)
            pending.reservation.waiting, pending.exclusive = True, pending.exclusive or exclusive
        with self._changed:
            self._waiting.extendleft(reversed(failed))

    def _requeue_lost(self) -> None:
        """Requeue requests whose KV caches a failed inference of another has reset."""
        self._requeue([pending for pending in self._prefilling if (each := pending.prefilled) and each.lost])
        if self._batch.lost:
            self._requeue(self._running)
            self._batch.clear()


def queue_full(reason: str, last_batch_s: float) -> ApiError:
    """Return the error of requests that the queue does not hold."""
    seconds = round(min(MAX_RETRY_AFTER_S, max(1, last_batch_s)))
    headers = {"Retry-After": str(seconds)}
    message = f"{reason}: try again in {seconds} s."
    return ApiError(429, message, "rate_limit_exceeded", error_type="requests", headers=headers)


def computed_tiles(model, image: ImageFile) -> int:
    """Return the number of tiles that are computed for an image, an empty one included."""
    vision, limit = model.config.vision_config, model.config.vision_config.max_num_tiles
    return min(image.real_tiles(vision.image_size, limit) + 1, limit) if model.image_encoder.padding_alike else limit


def api_error_for(error: BaseException) -> ApiError:
    """Return the error for a client. Only messages about its input reach it: others name paths."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), "out_of_memory", error_type="server_error", headers={"Retry-After": "30"})
    if isinstance(error, InputError | NumericalError):
        return ApiError(400, str(error), "invalid_value")
    return internal_error(error)


def shutting_down() -> ApiError:
    """Return the error of requests that the server no longer runs."""
    return ApiError(503, "The server is shutting down.", error_type="server_error")
