"""A server that listens before its model is loaded, and answers 503 until then."""

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

RETRY_AFTER_S = 10


class Gate:
    """ASGI application that answers 503 until it is opened, and then delegates to another one."""

    def __init__(self):
        self.app = None
        self._started: Future = Future()
        self._delegate: Future = Future()

    def open(self, app) -> None:
        """Start an application's lifespan and delegate to it. Call it from another thread than the server's.

        Raises:
            Exception: of the application's startup.
        """
        self._delegate.set_result(app)
        self._started.result()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self.app:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await SecurityHeaders(respond_loading)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1013})

    async def _lifespan(self, receive, send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        shutdown, delegate = asyncio.ensure_future(receive()), asyncio.wrap_future(self._delegate)
        await asyncio.wait([shutdown, delegate], return_when=asyncio.FIRST_COMPLETED)
        if delegate.done():
            await self._run_lifespan(delegate.result(), shutdown)
        await shutdown
        await send({"type": "lifespan.shutdown.complete"})

    async def _run_lifespan(self, app, shutdown: asyncio.Future) -> None:
        """Run an application's lifespan, which must begin and end in one task."""
        try:
            async with app.router.lifespan_context(app):
                self.app = app
                self._started.set_result(None)
                await shutdown
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)


async def respond_loading(scope, receive, send) -> None:
    """ASGI application that responds while the model is loaded."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    if scope["path"].removeprefix(scope.get("root_path", "")) == "/health":
        response = JSONResponse({"status": "loading"}, 503, headers)
    else:
        message = f"The model is being loaded: try again in {RETRY_AFTER_S} s."
        error = ApiError(503, message, "model_loading", error_type="server_error", headers=headers)
        response = error_response(error, scope)
    await response(scope, receive, send)


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket, bound before minutes are spent on a model.

    Raises:
        OSError: if the address is in use or invalid.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # on Windows SO_REUSEADDR would let a second server have the port too
    option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
    listener.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # else another program may bind to it meanwhile
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"{host}:{port} is not available ({reason}): choose another port with --port.") from error
    return listener


@contextlib.contextmanager
def serve_in_thread(app, listener: socket.socket) -> Iterator[threading.Event]:
    """Run a server in a thread, so that a model can be loaded, and the loading interrupted, at the same time. Yields an
    event that is set once the server has ended. It shuts down at the end of the block.

    Args:
        listener: bound socket.
    """
    server, ended = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on")), threading.Event()
    shutdown_promptly(server)

    def run() -> None:
        try:
            server.run([listener])
        finally:
            ended.set()

    threading.Thread(target=run, name="server", daemon=True).start()
    try:
        yield ended
    finally:
        server.should_exit = True
        wait_for(ended)


def wait_for(ended: threading.Event) -> None:
    """Wait for an event, interruptibly on all systems. (A thread whose `join` is interrupted counts as ended in Python
    3.11 though it is not.)"""
    while not ended.wait(0.5):
        pass
