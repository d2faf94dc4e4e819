"""Answers of both APIs, complete or as streams, cancelled when the client disconnects."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Literal, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from ov_mllama.serving.protocol import ApiError, internal_error
from ov_mllama.serving.sequences import PendingRequest

KEEPALIVE_S = 10.0  # between keep-alive messages until the first token: proxies close what is silent for a minute
POLL_S = 0.25  # interval of checks that the client is still connected


class StreamFormat(Protocol):
    """Texts of which a stream consists, in the format of an API."""

    media_type: str

    def begin(self) -> str:
        """Return what precedes the answer."""

    def waiting(self) -> str:
        """Return a keep-alive message, which clients skip."""

    def chunk(self, text: str, index: int = 0) -> str:
        """Return a part of the answer, or of one of several."""

    def end(self) -> str:
        """Return what follows the answer."""

    def error(self, error: ApiError) -> str:
        """Return what ends the stream in place of an answer's end."""


def finish_reason_of(pending: PendingRequest) -> Literal["length", "stop"]:
    """Return why an answer ended, in the terms of both APIs."""
    return "length" if pending.sequence.finish_reason == "length" else "stop"


def remarks_of(pendings: Sequence[PendingRequest]) -> dict[str, list[str]]:
    """Return the field with remarks on a request's images, such as further pages; no field if there are none."""
    remarks = dict.fromkeys(remark for pending in pendings for remark in pending.remarks)
    return {"remarks": [*remarks]} if remarks else {}


@contextlib.asynccontextmanager
async def cancel_on_disconnect(pendings: Sequence[PendingRequest], http: HttpRequest) -> AsyncIterator[None]:
    """Cancel requests when their client disconnects, which nothing else detects before there is a response."""

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(POLL_S)
        cancel_all(pendings)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def cancel_all(pendings: Sequence[PendingRequest]) -> None:
    """Cancel requests."""
    for pending in pendings:
        pending.sequence.cancelled.set()


async def complete_texts(pendings: Sequence[PendingRequest], http: HttpRequest) -> list[str]:
    """Return the complete answers.

    Raises:
        ApiError: if one of the requests failed.
    """
    texts = [""] * len(pendings)
    async with cancel_on_disconnect(pendings, http), contextlib.aclosing(merged_chunks(pendings)) as chunks:
        async for index, chunk in chunks:
            texts[index] += chunk
    return texts


async def merged_chunks(pendings: Sequence[PendingRequest]) -> AsyncGenerator[tuple[int, str]]:
    """Yield the chunks of several answers, each with its answer's index, in the order of their arrival. Closing the
    generator cancels the requests.

    Raises:
        ApiError: if one of the requests failed.
    """
    queue: asyncio.Queue[tuple[int, str] | Exception | None] = asyncio.Queue()

    async def forward(index: int, pending: PendingRequest) -> None:
        try:
            async with contextlib.aclosing(pending.chunks()) as chunks:
                async for chunk in chunks:
                    queue.put_nowait((index, chunk))
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised below
            queue.put_nowait(error)

    forwarding = [asyncio.create_task(forward(index, pending)) for index, pending in enumerate(pendings)]
    try:
        running = len(forwarding)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item:
                yield item
            else:
                running -= 1
    finally:
        for task in forwarding:
            task.cancel()
        cancel_all(pendings)


async def stream_response(
    pendings: Sequence[PendingRequest], form: StreamFormat, http: HttpRequest
) -> StreamingResponse:
    """Return the answers as a stream. Errors before the first chunk are ordinary responses; if it takes long, the
    stream begins with keep-alive messages, so that proxies do not close the connection.

    Raises:
        ApiError: if the request fails before that.
    """
    chunks = merged_chunks(pendings)
    first = asyncio.ensure_future(anext(chunks, None))

    def cancel() -> None:
        first.cancel()
        cancel_all(pendings)

    try:
        async with cancel_on_disconnect(pendings, http):
            await asyncio.wait([first], timeout=KEEPALIVE_S)
        if first.done():
            first.result()
    except BaseException:
        cancel()
        raise

    async def parts() -> AsyncIterator[str]:
        try:
            yield form.begin()
            while not first.done():
                yield form.waiting()
                await asyncio.wait([first], timeout=KEEPALIVE_S)
            if item := await first:
                yield form.chunk(item[1], item[0])
            async for index, text in chunks:
                yield form.chunk(text, index)
            yield form.end()
        except Exception as error:  # noqa: BLE001 - `internal_error` logs it
            yield form.error(error if isinstance(error, ApiError) else internal_error(error))
        finally:
            cancel()

    return StreamingResponse(parts(), media_type=form.media_type, headers={"Cache-Control": "no-cache"})
