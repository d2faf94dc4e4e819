"""A request over HTTP -> `Request` and `Question`, in bounded time and memory."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request as HttpRequest

from ov_mllama.serving.addresses import fetch_images
from ov_mllama.serving.protocol import ApiError, Question, Request, RequestParser, brief

BODY_S = 120.0  # for a request's body to arrive: it holds a place


def reading(reader: RequestParser, name: str) -> Callable:
    """`read(body, hold)` -> a request and its question. One at a time: what it takes beside the queue's bytes, it takes
    once."""
    thread = ThreadPoolExecutor(1, "reading")

    async def read(body: bytearray, hold: Callable[[int], None]) -> tuple[Request, Question]:
        loop, size = asyncio.get_running_loop(), len(body)
        request = await loop.run_in_executor(thread, reader.parse, body)
        check_name(request.model, name)
        if reader.addresses:
            await fetch_images(request.messages, lambda fetched: hold(size + fetched))
        return request, await loop.run_in_executor(thread, reader.read, request)

    return read


def check_name(given: str, name: str) -> None:
    """Raises ApiError: a request is for another model."""
    if given != name:
        raise ApiError(404, f"The model {brief(given)} is not here, {name!r} is.", "model_not_found", "model")


def check_type(http: HttpRequest) -> None:
    """Raises ApiError: a request does not say that it is JSON."""
    # any web page may make its reader's browser send other types, here too; for this one the browser asks first (CORS)
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "A request is JSON: send it with the header 'Content-Type: application/json'.")


async def body_of(http: HttpRequest, max_bytes: int, hold: Callable[[int], None]) -> bytearray:
    """A request's body, read no further than it may be long.

    Args:
        hold: told how long it is so far; raises where that is too much for the queue.
    """
    too_large = ApiError(413, f"A request has at most {max_bytes // 1_000_000} MB: send smaller pictures.", "too_large")
    if int(http.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in http.stream():
                body += chunk
                hold(len(body))
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The request did not arrive within {BODY_S:.0f} seconds.", "timeout") from error
    return body
