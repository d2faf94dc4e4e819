"""The model behind the endpoints of both APIs: access to it, and the way of a request into its queue."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from starlette.requests import Request as HttpRequest

from ov_mllama.serving.guards import check_key
from ov_mllama.serving.metrics import Metrics
from ov_mllama.serving.parsing import Body, GenerationRequest, RequestParser, check_content_type, read_body
from ov_mllama.serving.protocol import ChatCompletionRequest
from ov_mllama.serving.scheduler import Scheduler
from ov_mllama.serving.sequences import PendingRequest, Reservation
from ov_mllama.serving.tools import apply_tools

KEY_HEADERS = ("x-api-key", "api-key")  # in place of Authorization
MAX_SHORT_BODY_BYTES = 1_000_000  # of requests that do not enter the queue


class Backend:
    """Access to a scheduler.

    Args:
        parser: of the requests' bodies.
        key: bearer token that clients must send; None for none.
        max_bytes: of a request's body.
    """

    def __init__(self, scheduler: Scheduler, parser: RequestParser, key: str | None, max_bytes: int):
        self.scheduler, self.parser, self.key, self.metrics = scheduler, parser, key, Metrics()
        self.max_bytes = min(max_bytes, scheduler.queue_bytes)

    def authorize(self, http: HttpRequest) -> None:
        """Check a request's key.

        Raises:
            ApiError: if it is wrong or missing.
        """
        given = [http.headers.get(name) for name in KEY_HEADERS]
        check_key(http.headers.get("authorization") or f"Bearer {next(filter(None, given), '')}", self.key)

    @contextlib.asynccontextmanager
    async def receive(self, http: HttpRequest, body_type: type[Body]) -> AsyncIterator[tuple[Body, Reservation]]:
        """Read a request's body. Yields it with its place in the queue, which is released after the block unless
        `submit` was called.

        Raises:
            ApiError: if it is not allowed, too large or invalid, or if the queue is full.
        """
        self.authorize(http)
        check_content_type(http)
        reservation = self.scheduler.reserve()  # before anything large is read
        try:
            body = await read_body(http, self.max_bytes, lambda nbytes: self.scheduler.resize(reservation, nbytes))
            yield await self.parser.validate(body, body_type), reservation
        finally:
            if not reservation.submitted:
                self.scheduler.release(reservation)

    async def receive_short(self, http: HttpRequest, body_type: type[Body]) -> Body:
        """Read the body of a request that does not enter the queue.

        Raises:
            ApiError: if it is not allowed, too large or invalid.
        """
        self.authorize(http)
        check_content_type(http)
        return await self.parser.validate(await read_body(http, MAX_SHORT_BODY_BYTES, lambda nbytes: None), body_type)

    async def submit(self, request: ChatCompletionRequest, reservation: Reservation) -> PendingRequest:
        """Append a request to the queue.

        Args:
            reservation: from `receive`.
        Raises:
            ApiError: if it is invalid, unsupported or too long.
        """
        pending = await self.scheduler.submit(await self._convert(request, reservation), reservation)
        self.metrics.watch(pending)
        return pending

    async def submit_choices(self, request: ChatCompletionRequest, reservation: Reservation) -> list[PendingRequest]:
        """Append a request to the queue once for each of its prompts and choices (`n`), with seeds one after the other.

        Raises:
            ApiError: as `submit`, or if the queue does not hold all.
        """
        generation = await self._convert(request, reservation)
        pendings: list[PendingRequest] = []
        try:
            for i, prompt in enumerate(prompt for prompt in request.prompts for _ in range(request.n or 1)):
                seed = None if generation.seed is None else generation.seed + i
                raw_prompt = generation.raw_prompt if prompt is None else prompt
                choice = dataclasses.replace(generation, seed=seed, raw_prompt=raw_prompt)
                pendings.append(await self.scheduler.submit(choice, None if i else reservation))
                self.metrics.watch(pendings[-1])
        except BaseException:
            for pending in pendings:
                pending.sequence.cancelled.set()
            raise
        return pendings

    async def _convert(self, request: ChatCompletionRequest, reservation: Reservation) -> GenerationRequest:
        size = reservation.nbytes
        generation = await self.parser.convert(
            request, lambda fetched: self.scheduler.resize(reservation, size + fetched)
        )
        return await asyncio.to_thread(apply_tools, self.scheduler.processor, generation)
