"""State of each request from its place in the queue to its last token."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future

import torch
from llguidance import LLMatcher

from ov_mllama.runtime.batch import Prefill
from ov_mllama.serving.detokenizer import Detokenizer
from ov_mllama.serving.logprobs import TokenLogprob, token_logprob
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ApiError
from ov_mllama.serving.sampling import adjust_logits, grammar_error, mask_logits, sample


class Reservation:
    """A request's share of the queue, from before its body is read until its answer ends.

    Attributes:
        nbytes: see `Scheduler.resize`.
        waiting: whether it counts against `max_queue`.
        submitted: whether the queue has the request, and releases this with its last token.
    """

    def __init__(self):
        self.nbytes, self.waiting, self.submitted = 0, True, False


class Sequence:
    """Prompt, tokens and text of one answer.

    Args:
        put_chunk: called from the model's thread with each chunk of text, and with None at the end.
        matcher: of the request's grammar; None for free text.

    Attributes:
        cancelled: set it to end the answer after the current token.
        finish_reason: OpenAI's, or "cancelled" or "error"; None before the end.
        error: why the sequence failed while others of its batch continue.
        prompt_tokens: those of the prompt, once it has begun.
        logprobs: of the answer's tokens, if the request has `logprobs`; without the end token's.
        max_new_tokens: the request's, or fewer if the context leaves fewer.
        started_s, first_token_s, ended_s: times (`time.perf_counter`) of its prompt's start, its first and last token.
    """

    def __init__(
        self,
        request: GenerationRequest,
        put_chunk: Callable[[str | None], None],
        matcher: LLMatcher | None,
        tokenizer,
    ):
        self.request, self.put_chunk, self.matcher = request, put_chunk, matcher
        self.detokenizer = Detokenizer(tokenizer, request.stop)
        self.cancelled = threading.Event()
        self.finish_reason: str | None = None
        self.error: ApiError | None = None
        self.prompt_tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._logprob: TokenLogprob | None = None  # the next token's
        self.max_new_tokens = request.max_new_tokens
        self.started_s = self.first_token_s = self.ended_s = 0.0
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.detokenizer.tokens)

    @property
    def last_token(self) -> int:
        return self.detokenizer.tokens[-1]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt; 0 before it has begun."""
        return len(self.prompt_tokens)

    def start(self, started_s: float, prompt_tokens: list[int], context_length: int) -> None:
        """Set what is known once its prompt begins."""
        self.started_s, self.prompt_tokens = started_s, prompt_tokens
        self.max_new_tokens = min(self.request.max_new_tokens, context_length - len(prompt_tokens))

    def sample(self, logits: torch.Tensor) -> int:
        """Return the next token for logits f32 [vocabulary]."""
        options = self.request
        adjusted = adjust_logits(logits, options, self.prompt_tokens, self.detokenizer.tokens)
        try:
            if self.matcher:
                adjusted = mask_logits(adjusted, self.matcher)
        except ApiError as error:
            self.error = error
            return 0
        token = sample(adjusted, options.temperature, options.top_k, options.top_p, options.min_p, self._generator)
        if options.logprobs is not None:
            self._logprob = token_logprob(logits, token, options.logprobs)
        return token

    def append_token(self, token: int, eos_token_ids: list[int]) -> None:
        """Append a token, and end the sequence where it does."""
        if self.finish_reason:
            return
        if not self.num_tokens:
            self.first_token_s = time.perf_counter()
        if self.matcher and not (self.error or self.matcher.consume_token(token)):
            self.error = grammar_error(self.matcher.get_error())
        if self.error:
            self._finish("error")
            return
        if token in eos_token_ids or token in self.request.stop_token_ids:
            self.detokenizer.tokens.append(token)
            self._finish("stop")
            return
        if self._logprob:
            self.logprobs.append(self._logprob)
        if chunk := self.detokenizer.put(token):
            self.put_chunk(chunk)
        if self.detokenizer.stopped or (self.matcher and self.matcher.is_stopped()):
            self._finish("stop")
        elif self.num_tokens >= self.max_new_tokens:
            self._finish("length")
        elif self.cancelled.is_set():
            self._finish("cancelled")

    def _finish(self, reason: str) -> None:
        self.finish_reason, self.ended_s = reason, time.perf_counter()
        if chunk := self.detokenizer.flush():
            self.put_chunk(chunk)
        self.put_chunk(None)  # others of the batch may run for minutes


class PendingRequest:
    """A request from the queue to the end of its answer.

    Args:
        prompt: the messages in the chat template.
        matcher: of the request's grammar; None for free text.
        image_tiles: number of computed tiles by `ImageFile.key`.

    Attributes:
        sequence: the answer.
        prefill: its prompt, being prepared by another thread; None while it waits.
        remarks: on its images, once they are decoded (`images.load_image`).
        exclusive: whether it must run without others, because a batch with it failed.
        finished: whether there will be no more chunks.
        on_finish: called once there will be no more, in any thread.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt: str,
        matcher: LLMatcher | None,
        tokenizer,
        reservation: Reservation,
        image_tiles: dict[int, int],
    ):
        self._loop, self._chunks = asyncio.get_running_loop(), asyncio.Queue()
        self.request, self.prompt = request, prompt
        self.sequence = Sequence(request, self._put_chunk, matcher, tokenizer)
        self.reservation, self.image_tiles = reservation, image_tiles
        self.prefill: Future[Prefill] | None = None
        self.exclusive = self.finished = False
        self.remarks: list[str] = []
        self.on_finish: Callable[[], None] = lambda: None
        self.error: Exception | None = None

    @property
    def ended(self) -> bool:
        """True if there will be no more tokens."""
        return self.finished or self.sequence.finish_reason is not None or self.sequence.cancelled.is_set()

    @property
    def prefilled(self) -> Prefill | None:
        """The prompt once it is prepared; None after an error too."""
        return self.prefill.result() if self.prefill and self.prefill.done() and not self.prefill.exception() else None

    def _put_chunk(self, chunk: str | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)
        except RuntimeError:  # the loop is closed: no client is left
            self.sequence.cancelled.set()

    def finish(self, error: Exception | None = None) -> None:
        """End the stream of chunks, with an error unless the answer is complete."""
        if not self.finished:
            self.finished, self.request.images = True, []
            self.error = self.sequence.error or (error if self.sequence.finish_reason is None else None)
            self._put_chunk(None)
            self.on_finish()

    async def chunks(self) -> AsyncGenerator[str]:
        """Yield the answer's text. Closing the generator cancels the request.

        Raises:
            ApiError: if the request failed.
        """
        try:
            while (chunk := await self._chunks.get()) is not None:
                yield chunk
        finally:
            self.sequence.cancelled.set()
        if error := self.error or self.sequence.error:
            raise error
