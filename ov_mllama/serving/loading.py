"""A server that is there before its model is: until then it says so."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import uvicorn
from starlette.responses import JSONResponse

from ov_mllama.chat.http_headers import SecurityHeaders
from ov_mllama.cli import shutdown_promptly
from ov_mllama.serving.guards import error_response
from ov_mllama.serving.protocol import ApiError

TRY_AGAIN_S = 10


class Gate:
    """ASGI application that answers 503 until it is opened, and then as another does."""

    def __init__(self):
        self.app = None
        self._opened: Future = Future()
        self._given: Future = Future()

    def open(self, app) -> None:
        """Answer as an application, once its lifespan has begun. From another thread than the server's.

        Raises:
            Exception: whatever its start raises.
        """
        self._given.set_result(app)
        self._opened.result()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self.app:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await SecurityHeaders(loading)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1013})

    async def _lifespan(self, receive, send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        ending, given = asyncio.ensure_future(receive()), asyncio.wrap_future(self._given)
        await asyncio.wait([ending, given], return_when=asyncio.FIRST_COMPLETED)
        if given.done():
            await self._live(given.result(), ending)
        await ending
        await send({"type": "lifespan.shutdown.complete"})

    async def _live(self, app, ending: asyncio.Future) -> None:
        """An application's lifespan, in one task from its beginning to its end."""
        try:
            async with app.router.lifespan_context(app):
                self.app = app
                self._opened.set_result(None)
                await ending
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)


async def loading(scope, receive, send) -> None:
    """ASGI application that says that there is no model yet."""
    headers = {"Retry-After": str(TRY_AGAIN_S)}
    if scope["path"] == "/health":
        answer = JSONResponse({"status": "loading"}, 503, headers)
    else:
        sentence = f"The model is being loaded: try again in {TRY_AGAIN_S} s."
        answer = error_response(ApiError(503, sentence, "model_loading", kind="server_error", headers=headers))
    await answer(scope, receive, send)


@contextlib.contextmanager
def running(app, place: socket.socket) -> Iterator[threading.Event]:
    """A server in a thread of its own, so that a model can be loaded, and the loading interrupted, beside it: an event
    that is set once it has ended. It is told to end, promptly, when the block does.

    Args:
        place: the socket that it listens on.
    """
    server, ended = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on")), threading.Event()
    shutdown_promptly(server)

    def run() -> None:
        try:
            server.run([place])
        finally:
            ended.set()

    threading.Thread(target=run, name="server", daemon=True).start()
    try:
        yield ended
    finally:
        server.should_exit = True
        wait_for(ended)


def wait_for(ended: threading.Event) -> None:
    """Wait for an event; it can be interrupted on all systems. (A thread whose `join` is interrupted counts as ended in
    Python 3.11 though it is not.)"""
    while not ended.wait(0.5):
        pass
