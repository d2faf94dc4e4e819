"""Batched answers: one thread takes the requests that wait, first come, first served, and runs them in batches."""

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ov_mllama.runtime.errors import ImageError, InputError, NumericalError, OutOfMemoryError, TemplateError
from ov_mllama.runtime.generation import end_tokens
from ov_mllama.runtime.inference import Cancelled
from ov_mllama.runtime.memory import trim_memory
from ov_mllama.runtime.prompts import GREEDY, padded, prompt_inputs, prompt_text
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ApiError, internal_error
from ov_mllama.serving.sampling import GrammarCompiler
from ov_mllama.serving.sequences import AllCancelled, PendingRequest, Reservation, Sampler, StopCheck

MAX_BATCH_TILES = 16  # of different images: each request of a batch waits for all of them
IMAGE_TENSORS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
IMAGE_CACHE_BYTES = 2_000_000_000  # encoded images: MAX_BATCH_TILES tiles of the 11B
QUEUE_BYTES = 500_000_000  # of requests that are read, wait or run
FIRST_BATCH_S = 10.0  # duration that is assumed before there was a batch; it suits the 11B
ERROR_PAUSE_S = 0.5  # after an error that no request caused
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
        self._open, self._last_batch_s = True, FIRST_BATCH_S
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True if requests are answered."""
        return self._thread.is_alive()

    # ---- The queue ----

    def reservations(self) -> list[Reservation]:
        """Return those of this moment."""
        return list(self._reservations)

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
                matcher = await asyncio.wrap_future(self._compiling.submit(self.grammars.compile, request.schema))
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
        """Return a request's messages in the chat template, or its text."""
        try:
            return request_prompt(self.model, self.processor, request)
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
        """Stop the thread after the current batch."""
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

    # ---- The thread that runs batches ----

    def _run(self) -> None:
        try:
            while self._open:
                self._run_once()
        finally:  # for any reason: no client waits forever
            with self._changed:
                self._open = False
                waiting, self._waiting = self._waiting, deque()
            for pending in waiting:
                self._finish(pending, shutting_down())

    def _run_once(self) -> None:
        """Run a batch. No error ends the thread, not even SystemExit: there is no other that answers."""
        batch: list[PendingRequest] = []
        try:
            if batch := self._admit():
                self._run_or_requeue(batch)
        except BaseException as error:  # noqa: BLE001
            with self._changed:  # the first that waits may be the reason
                batch = batch or [self._waiting.popleft() for _ in range(min(1, len(self._waiting)))]
            internal = internal_error(error)
            for pending in batch:
                self._finish(pending, internal)
            if not batch:
                time.sleep(ERROR_PAUSE_S)

    def _admit(self) -> list[PendingRequest]:
        """Wait for a request, and remove it and those that can share its steps from the queue; [] at shutdown."""
        with self._changed:
            self._changed.wait_for(lambda: self._drop_cancelled() or not self._open)
            if not self._open:
                return []
            first, batch, tiles = self._waiting[0], [], dict[int, int]()
            for pending in self._waiting:
                union = tiles | pending.image_tiles
                # else the processor pads with blank images, and the model attends to one of them
                alike = len(pending.request.images) == len(first.request.images) and not pending.exclusive
                if pending is first or (alike and sum(union.values()) <= self._max_tiles()):
                    batch.append(pending)
                    tiles = union
                if first.exclusive or len(batch) == self.max_batch:
                    break
            for pending in batch:
                self._waiting.remove(pending)
                pending.reservation.waiting = False
            return batch

    def _run_or_requeue(self, batch: list[PendingRequest]) -> None:
        started, api_error = time.perf_counter(), None
        try:
            self._generate(batch)
        except Cancelled:
            pass
        except Exception as error:  # noqa: BLE001 - `api_error_for` logs it
            unfinished = [pending for pending in batch if not pending.finished]
            if len(unfinished) > 1 and not any(pending.sequence.num_tokens for pending in unfinished):
                # one may have failed the others; what needs too much memory together may fit one by one
                for pending in unfinished:
                    pending.exclusive = pending.reservation.waiting = True
                with self._changed:
                    self._waiting.extendleft(reversed(unfinished))
                return
            api_error = api_error_for(error, len(batch))
        for pending in batch:
            self._finish(pending, api_error)
        self._last_batch_s = time.perf_counter() - started
        trim_memory()  # or freed memory of batches of many sizes adds up

    def _generate(self, batch: list[PendingRequest]) -> None:
        sequences, prompts, started_s = [], [], time.perf_counter()
        context = self.model.config.text_config.max_position_embeddings
        for pending in batch:
            inputs = self._inputs(pending)
            if inputs and (len(batch) == 1 or encode_images(self.model, pending, inputs)):
                pending.sequence.start(started_s, inputs["input_ids"][0].tolist(), context)
                sequences.append(pending.sequence)
                prompts.append(inputs)
        if not prompts:
            return
        self.model.generate(
            **padded(prompts, self.processor.tokenizer.pad_token_id),
            **GREEDY,
            max_new_tokens=max(sequence.max_new_tokens for sequence in sequences),
            logits_processor=[Sampler(sequences)],
            stopping_criteria=[StopCheck(sequences, self.eos_token_ids)],
            stop=AllCancelled(sequences),
        )

    def _inputs(self, pending: PendingRequest) -> dict | None:
        """Return a request's tensors, its images decoded one by one. None if it is cancelled, or finished here by an
        error that concerns no other request of the batch, such as a broken image."""
        if pending.sequence.cancelled.is_set():
            return None
        side = self.model.config.vision_config.image_size
        try:
            images = []
            for image in pending.request.images:
                images.append(image.decode(side))
            pending.remarks = [image.info["remark"] for image in images if "remark" in image.info]
            return prompt_inputs(self.processor, pending.prompt, images)
        except ImageError as error:
            self._finish(pending, ApiError(400, str(error), "invalid_image", image.param))
        except Exception as error:  # noqa: BLE001
            self._finish(pending, internal_error(error))
        return None


def request_prompt(model, processor, request: GenerationRequest) -> str:
    """Return a request's text: its messages in the chat template and the beginning of the answer, or its raw prompt.

    Raises:
        TemplateError, InputError: as `prompt_text`.
        ApiError: if a raw prompt exceeds the model's context.
    """
    if request.raw_prompt is not None:
        return raw_prompt(model, processor, request.raw_prompt)
    prefill = num_tokens(processor, request.prefill)
    return prompt_text(model, processor, request.messages, 1 + prefill) + request.prefill


def num_tokens(processor, text: str) -> int:
    """Return the number of tokens of a text."""
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def raw_prompt(model, processor, text: str) -> str:
    """Return a text to continue, with the token that every prompt begins with. Other special tokens may be in it, but
    no image, as there is none.

    Raises:
        ApiError: if it exceeds the model's context.
    """
    begin, image = processor.tokenizer.bos_token or "", processor.image_token
    text = begin + text.removeprefix(begin).replace(image, image.replace("|", "\u200b|", 1))
    length, context = num_tokens(processor, text), model.config.text_config.max_position_embeddings
    if not 0 < length < context:
        message = f"The prompt has {length} tokens, the model's context {context}: shorten it."
        raise ApiError(400, message, "context_length_exceeded", "prompt")
    return text


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


def encode_images(model, pending: PendingRequest, inputs: dict) -> bool:
    """Encode a request's images unless it is cancelled before or meanwhile; return False if it is."""
    if not pending.request.images:
        return True
    try:
        model.encode_images(**{name: inputs[name] for name in IMAGE_TENSORS}, stop=pending.sequence.cancelled)
    except Cancelled:
        return False
    return True


def api_error_for(error: Exception, batch_size: int) -> ApiError:
    """Return the error for the clients of a batch. Only messages about their input reach them: others name paths."""
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), "out_of_memory", error_type="server_error", headers={"Retry-After": "30"})
    if isinstance(error, InputError | NumericalError) and batch_size == 1:
        return ApiError(400, str(error), "invalid_value")
    return internal_error(error)


def shutting_down() -> ApiError:
    """Return the error of requests that the server no longer runs."""
    return ApiError(503, "The server is shutting down.", error_type="server_error")
