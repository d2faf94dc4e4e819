"""Continuous batching: requests that wait are admitted while others run, first come, first served."""

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ov_mllama.runtime.batch import Prefill
from ov_mllama.runtime.errors import ImageError, InputError, NumericalError, OutOfMemoryError, TemplateError
from ov_mllama.runtime.generation import end_tokens
from ov_mllama.runtime.inference import Cancelled, check_stop
from ov_mllama.runtime.memory import trim_memory
from ov_mllama.runtime.prompts import prompt_inputs, prompt_text
from ov_mllama.serving.engine import Engine
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ApiError, internal_error
from ov_mllama.serving.request_queue import RequestQueue, shutting_down
from ov_mllama.serving.sampling import GrammarCompiler
from ov_mllama.serving.sequences import PendingRequest, Reservation

MAX_BATCH_TILES = 16  # of different images: each running answer reads its own at each step
IMAGE_CACHE_BYTES = 2_000_000_000  # encoded images: MAX_BATCH_TILES tiles of the 11B
QUEUE_BYTES = 500_000_000  # of requests that are read, wait or run
ERROR_PAUSE_S = 0.5  # after an error that no request caused
TURN_PAUSE_S = 0.0002  # between steps: a lock that is taken again at once is never free for other threads


class Scheduler(RequestQueue):
    """Queue and batches of requests.

    Args:
        model, processor: as for `prompts.prompt_tensors`.
        max_batch: sequences that share a step. Each has its own share of the KV cache.
        max_queue, queue_bytes: as for `RequestQueue`.
    """

    def __init__(self, model, processor, max_batch: int = 8, max_queue: int = 32, queue_bytes: int = QUEUE_BYTES):
        self.model, self.processor = model, processor
        super().__init__(max_queue, queue_bytes)
        self.max_batch = max_batch
        self.eos_token_ids = end_tokens(model.generation_config)
        self.grammars = GrammarCompiler(processor.tokenizer, self.eos_token_ids)
        self._compiling = ThreadPoolExecutor(1, "grammars")  # or slow ones take all threads that read requests
        self._engine = Engine(model, self.eos_token_ids, self._end, self._requeue)
        # texts do not wait for images, which are encoded one by one
        self._pools = {True: ThreadPoolExecutor(1, "images"), False: ThreadPoolExecutor(1, "texts")}
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True if requests are answered."""
        return self._thread.is_alive()

    # ---- The queue ----

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
            if request.repetition_penalty is None:
                request.repetition_penalty = self.model.generation_config.repetition_penalty or 1.0
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
        """Return a request's messages in the chat template, or its text."""
        if request.raw_prompt is not None:
            return self._raw_prompt(request.raw_prompt)
        try:
            prefill = self.processor.tokenizer(request.prefill, add_special_tokens=False)["input_ids"]
            return prompt_text(self.model, self.processor, request.messages, 1 + len(prefill)) + request.prefill
        except TemplateError as error:
            raise ApiError(400, str(error), "invalid_value", "messages") from error
        except InputError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from error

    def _raw_prompt(self, text: str) -> str:
        """Return a text to continue, with the token that every prompt begins with. Other special tokens may be in it,
        but no image, as there is none."""
        tokenizer, image = self.processor.tokenizer, self.processor.image_token
        begin = tokenizer.bos_token or ""
        text = begin + text.removeprefix(begin).replace(image, image.replace("|", "\u200b|", 1))
        length, context = len(tokenizer(text, add_special_tokens=False)["input_ids"]), self._context_length
        if not 0 < length < context:
            message = f"The prompt has {length} tokens, the model's context {context}: shorten it."
            raise ApiError(400, message, "context_length_exceeded", "prompt")
        return text

    @property
    def _context_length(self) -> int:
        return self.model.config.text_config.max_position_embeddings

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

    # ---- The thread that answers ----

    def _run(self) -> None:
        try:
            while self._open or self._engine.active:
                self._run_once()
        finally:  # for any reason: no client waits forever
            with self._changed:
                self._open = False
                waiting, self._waiting = self._waiting, deque()
            for pending in [*waiting, *self._engine.active]:
                self._finish(pending, shutting_down())

    def _run_once(self) -> None:
        """Wait for something to do, and run a step. No error ends the thread, not even SystemExit: there is no other
        that answers."""
        concerned: list[PendingRequest] = []
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._admit() or not (self._open or self._engine.preparing))
            concerned = self._engine.active
            if self._engine.step():
                trim_memory()  # or freed memory of many sizes adds up
            time.sleep(TURN_PAUSE_S)
        except BaseException as error:  # noqa: BLE001
            internal = internal_error(error)
            self._engine.fail(internal) if concerned else self._fail_first(internal)

    def _fail_first(self, error: ApiError) -> None:
        """Finish the first request that waits: it may be the reason of an error that no active one has caused."""
        with self._changed:
            first = self._waiting.popleft() if self._waiting else None
        if first:
            self._finish(first, error)
        else:
            time.sleep(ERROR_PAUSE_S)

    def _admit(self) -> bool:
        """Admit requests that wait, and return whether there is a step to run. For holders of `_changed`."""
        self._drop_cancelled()
        engine = self._engine
        engine.collect()
        while pending := self._admissible():
            # first: it raises if the system has no thread left
            pending.prefill = self._pools[bool(pending.request.images)].submit(self._prepare, pending)
            self._waiting.remove(pending)
            pending.reservation.waiting = False
            engine.preparing.append(pending)
            pending.prefill.add_done_callback(self._wake)
        engine.collect()  # what was prepared before its callback was added, which then notified nobody
        return bool(engine.prefilling or engine.running)

    def _wake(self, _) -> None:
        with self._changed:
            self._changed.notify()

    def _admissible(self) -> PendingRequest | None:
        """Return the first request that fits beside the active ones. Images, encoded one by one, are admitted in order;
        texts may overtake them, but nobody overtakes one that must run alone."""
        active = self._engine.active
        if not self._open or len(active) >= self.max_batch or any(pending.exclusive for pending in active):
            return None
        tiles = dict[int, int]()
        for pending in active:
            tiles |= pending.image_tiles
        full = any(pending.request.images for pending in self._engine.preparing)
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
        sequence = pending.sequence
        if not sequence.num_tokens:  # else it is continued, after a failure of others
            sequence.start(time.perf_counter(), inputs["input_ids"][0].tolist(), self._context_length)
        return Prefill(self.model, inputs, sequence.cancelled, sequence.detokenizer.tokens)

    def _inputs(self, pending: PendingRequest) -> dict:
        """Return a request's tensors, its images decoded one by one."""
        side, images = self.model.config.vision_config.image_size, []
        for image in pending.request.images:
            try:
                images.append(image.decode(side))
            except ImageError as error:
                raise ApiError(400, str(error), "invalid_image", image.param) from error
        pending.remarks = [image.info["remark"] for image in images if "remark" in image.info]
        return prompt_inputs(self.processor, pending.prompt, images)

    def _end(self, pending: PendingRequest, error: BaseException | None = None) -> None:
        """Finish an active request."""
        if error is not None and not isinstance(error, ApiError):
            error = None if isinstance(error, Cancelled) else api_error_for(error)
        self._finish(pending, error)
        if started_s := pending.sequence.started_s:  # else its prompt could not be prepared
            self._last_batch_s = time.perf_counter() - started_s

    def _requeue(self, pendings: list[PendingRequest]) -> None:
        """Put active requests in front of those that wait."""
        with self._changed:
            for pending in pendings:
                pending.reservation.waiting = True
            self._waiting.extendleft(reversed(pendings))


def computed_tiles(model, image: ImageFile) -> int:
    """Return the number of tiles that are computed for an image, an empty one included."""
    vision, limit = model.config.vision_config, model.config.vision_config.max_num_tiles
    return min(image.real_tiles(vision.image_size, limit) + 1, limit) if model.image_encoder.padding_alike else limit


def api_error_for(error: BaseException) -> ApiError:
    """Return the error for a client. Only messages about its input reach it: others name paths."""
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, str(error), "out_of_memory", error_type="server_error", headers={"Retry-After": "30"})
    if isinstance(error, InputError | NumericalError):
        return ApiError(400, str(error), "invalid_value")
    return internal_error(error)
