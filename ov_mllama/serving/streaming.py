"""Answers of both APIs, complete or as streams, cancelled when the client disconnects."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
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

    def chunk(self, text: str) -> str:
        """Return a part of the answer."""

    def end(self) -> str:
        """Return what follows the answer."""

    def error(self, error: ApiError) -> str:
        """Return what ends the stream in place of an answer's end."""


def finish_reason_of(pending: PendingRequest) -> Literal["length", "stop"]:
    """Return why an answer ended, in the terms of both APIs."""
    return "length" if pending.sequence.finish_reason == "length" else "stop"


@contextlib.asynccontextmanager
async def cancel_on_disconnect(pending: PendingRequest, http: HttpRequest) -> AsyncIterator[None]:
    """Cancel a request when its client disconnects, which nothing else detects before there is a response."""

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(POLL_S)
        pending.sequence.cancelled.set()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def complete_text(pending: PendingRequest, http: HttpRequest) -> str:
    """Return the complete answer.

    Raises:
        ApiError: if the request failed.
    """
    async with cancel_on_disconnect(pending, http), contextlib.aclosing(pending.chunks()) as chunks:
        return "".join([chunk async for chunk in chunks])


async def stream_response(pending: PendingRequest, form: StreamFormat, http: HttpRequest) -> StreamingResponse:
    """Return the answer as a stream. Errors before the first chunk are ordinary responses; if it takes long, the stream
    begins with keep-alive messages, so that proxies do not close the connection.

    Raises:
        ApiError: if the request fails before that.
    """
    chunks = pending.chunks()
    first = asyncio.ensure_future(anext(chunks, ""))

    def cancel() -> None:
        first.cancel()
        pending.sequence.cancelled.set()

    try:
        async with cancel_on_disconnect(pending, http):
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
            if await first:
                yield form.chunk(first.result())
            async for chunk in chunks:
                yield form.chunk(chunk)
            yield form.end()
        except Exception as error:  # noqa: BLE001 - `internal_error` logs it
            yield form.error(error if isinstance(error, ApiError) else internal_error(error))
        finally:
            cancel()

    return StreamingResponse(parts(), media_type=form.media_type, headers={"Cache-Control": "no-cache"})
