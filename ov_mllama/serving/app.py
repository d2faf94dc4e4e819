"""OpenAI-compatible server, which also speaks Ollama's API.

POST /v1/chat/completions (text and images, streamed or not, JSON schemas), GET /v1/models, GET /health; Ollama's
POST /api/chat and /api/generate with their neighbours; and with --chat the chat page. By default it listens on this
machine only and fetches no image URLs. Requests share steps of one batch, which they join and leave.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ov_mllama.chat.http_headers import SecurityHeaders
from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from ov_mllama.cli import user_path
from ov_mllama.export.prepare import files_to_load, print_load_estimate
from ov_mllama.runtime.devices import check_device
from ov_mllama.serving import load, positive
from ov_mllama.serving.arguments import add_checkpoint_arguments, prepared
from ov_mllama.serving.backend import Backend
from ov_mllama.serving.guards import (
    InternalErrors,
    TrustedHosts,
    error_response,
    key_from,
    keys_match,
    warnings_for,
)
from ov_mllama.serving.loading import Gate, bind_socket, serve_in_thread, wait_for
from ov_mllama.serving.ollama import PORT as OLLAMA_PORT
from ov_mllama.serving.ollama import OllamaApi
from ov_mllama.serving.parsing import RequestParser, check_model_name
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest
from ov_mllama.serving.scheduler import IMAGE_CACHE_BYTES, Scheduler
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_text, finish_reason_of, stream_response

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 50_000_000  # base64 makes an image a third larger
PORT = 8000  # unless --ollama
# Option names of the previous version, accepted for one version
DEPRECATED_OPTIONS = {"--addresses": "--allow-image-urls", "--line": "--max-queue", "--origins": "--cors-origins"}


def create_app(
    scheduler: Scheduler,
    model_name: str,
    key: str | None = None,
    allow_image_urls: bool = False,
    cors_origins: Sequence[str] = (),
    max_bytes: int = MAX_BODY_BYTES,
    trusted_hosts: Sequence[str] = (),
    ollama: bool = False,
) -> FastAPI:
    """Return the server's app.

    Args:
        scheduler: closed when the app shuts down.
        model_name: name by which clients request the model.
        key: bearer token that clients must send; None for none.
        allow_image_urls: fetch images from public addresses.
        cors_origins: web pages whose scripts may send requests, such as "http://localhost:3000"; "*" for any.
        max_bytes: of a request's body.
        trusted_hosts: host names of the server besides localhost and IP addresses; "*" for any.
        ollama: answer "Ollama is running" at /, which some of Ollama's clients request first.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)  # a process that exits within an inference is aborted

    app = FastAPI(title="Llama 3.2 Vision on OpenVINO", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_middleware(app, cors_origins, trusted_hosts)
    context_length = scheduler.model.config.text_config.max_position_embeddings
    backend = Backend(scheduler, RequestParser(context_length, allow_image_urls=allow_image_urls), key, max_bytes)
    model = Model(id=model_name, created=int(time.time()), object="model", owned_by="local")
    OllamaApi(backend, model_name).add_to(app, greet=ollama)

    @app.get("/health")
    async def get_health() -> JSONResponse:
        alive = scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def get_models(http: HttpRequest) -> dict:
        backend.authorize(http)
        return {"object": "list", "data": [model.model_dump()]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str, http: HttpRequest) -> dict:
        backend.authorize(http)
        check_model_name(name, model_name)
        return model.model_dump()

    @app.post("/v1/chat/completions")
    async def create_completion(http: HttpRequest):
        async with backend.receive(http, ChatCompletionRequest) as (request, reservation):
            check_model_name(request.model, model_name)
            pending = await backend.submit(request, reservation)
        if request.stream:
            return await stream_response(pending, EventStream(pending, request), http)
        return await full_response(pending, request, http)

    return app


def add_middleware(app: FastAPI, cors_origins: Sequence[str], trusted_hosts: Sequence[str]) -> None:
    """Add checks before the endpoints, and the APIs' formats of errors, unknown paths included."""

    @app.exception_handler(ApiError)
    async def on_api_error(http: HttpRequest, error: ApiError) -> JSONResponse:
        return error_response(error, http.scope)

    @app.exception_handler(HTTPException)
    async def on_http_error(http: HttpRequest, error: HTTPException) -> JSONResponse:
        message = f"{http.method} {http.url.path}: {error.detail}."
        return error_response(ApiError(error.status_code, message, headers=error.headers), http.scope)

    # a request meets the last first
    app.add_middleware(InternalErrors)
    app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrustedHosts, names=trusted_hosts)
    app.add_middleware(SecurityHeaders)


def usage_of(pending: PendingRequest) -> CompletionUsage:
    """Return the token counts of an answer."""
    prompt, answer = pending.sequence.num_prompt_tokens, pending.sequence.num_tokens
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


async def full_response(pending: PendingRequest, request: ChatCompletionRequest, http: HttpRequest) -> JSONResponse:
    """Return the complete answer."""
    message = ChatCompletionMessage(role="assistant", content=await complete_text(pending, http))
    choice = Choice(index=0, finish_reason=finish_reason_of(pending), message=message, logprobs=None)
    completion = ChatCompletion(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        object="chat.completion",
        created=int(time.time()),
        model=request.model,
        choices=[choice],
        usage=usage_of(pending),
    )
    return JSONResponse(completion.model_dump(exclude_unset=True))


class EventStream:
    """Format of a stream of OpenAI's API: server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, pending: PendingRequest, request: ChatCompletionRequest):
        self._pending, self._request = pending, request
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def _event(self, choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> str:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._request.model,
            choices=choices,
            usage=usage,
        )
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    def _delta(self, finish_reason=None, **fields) -> str:
        return self._event([ChunkChoice(index=0, delta=ChoiceDelta(**fields), finish_reason=finish_reason)])

    def begin(self) -> str:
        return self._delta(role="assistant", content="")

    def waiting(self) -> str:
        return ": waiting\n\n"  # a comment

    def chunk(self, text: str) -> str:
        return self._delta(content=text)

    def end(self) -> str:
        options = self._request.stream_options
        usage = self._event([], usage_of(self._pending)) if options and options.include_usage else ""
        return f"{self._delta(finish_reason_of(self._pending))}{usage}data: [DONE]\n\n"

    def error(self, error: ApiError) -> str:
        return f"data: {json.dumps(error.body)}\n\n"


def main(arguments: Sequence[str]) -> None:
    """Run the command `serve`.

    Args:
        arguments: those after the command's name.
    """
    options = parse_arguments(arguments)
    bypass_proxy_for_loopback()
    key = key_from(options.key, options.key_file)
    for warning in warnings_for(options.host, key, options.key is not None):
        logger.warning("❗ %s", warning)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    gate = Gate()
    with bind_socket(options.host, options.port) as listener, serve_in_thread(gate, listener) as ended:
        app, name = load_app(options, key)
        gate.open(app)
        url = f"http://{options.host}:{options.port}"
        logger.info("✅ %s is at %s/v1, for Ollama's clients at %s – Ctrl-C ends it", name, url, url)
        with contextlib.suppress(KeyboardInterrupt):
            wait_for(ended)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of `serve`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ov-mllama serve", description=__doc__, formatter_class=raw)
    model = parser.add_argument_group("model")
    add_checkpoint_arguments(model)
    model.add_argument("--language-model", help="its .xml; default: the newest compressed one, else the 16-bit one")
    model.add_argument("--image-encoder", help="its .xml; default likewise")
    model.add_argument("--device", default="CPU", help="OpenVINO device; default: CPU")
    model.add_argument("--name", help="name by which clients request the model; default: the folder's")
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1")
    access.add_argument("--port", type=int, help=f"default: {PORT}, with --ollama {OLLAMA_PORT}")
    access.add_argument(
        "--ollama", action="store_true", help="stand in for Ollama: listen at its port, and answer its probe at /"
    )
    keys = access.add_mutually_exclusive_group()
    keys.add_argument("--key-file", type=user_path, help="file with the clients' key; default: OV_MLLAMA_KEY")
    keys.add_argument("--key", help="the key itself, visible to all users of this machine")
    access.add_argument(
        "--trusted-hosts", nargs="+", default=[], metavar="NAME", help="names of this server besides --host, or '*'"
    )
    access.add_argument(
        "--cors-origins", nargs="+", default=[], metavar="URL", help="web pages whose scripts may send requests, or '*'"
    )
    access.add_argument("--allow-image-urls", action="store_true", help="fetch images from public addresses")
    access.add_argument("--chat", action="store_true", help="serve the chat page at /chat; its password is the key")
    queue = parser.add_argument_group("batches and queue")
    queue.add_argument("--batch", type=positive, default=8, help="requests that share the model's steps; default: 8")
    queue.add_argument("--max-queue", type=positive, default=32, help="requests that may wait; default: 32")
    queue.add_argument("--queue-mb", type=positive, default=500, help="memory for encoded images; default: 500 MB")
    options = parser.parse_args([current_option(argument) for argument in arguments])
    if options.port is None:
        options.port = OLLAMA_PORT if options.ollama else PORT
    return options


def current_option(argument: str) -> str:
    """Return a command-line argument with the current name of a deprecated option."""
    name, equals, value = argument.partition("=")
    if name not in DEPRECATED_OPTIONS:
        return argument
    print(f"❗ {name} is deprecated: use {DEPRECATED_OPTIONS[name]}.", file=sys.stderr)
    return f"{DEPRECATED_OPTIONS[name]}{equals}{value}"


def load_app(options: argparse.Namespace, key: str | None) -> tuple[FastAPI, str]:
    """Return the app of a model, prepared first if need be, and the model's name."""
    check_device(options.device)
    model_dir = prepared(options)
    files = files_to_load(model_dir, options.language_model, options.image_encoder)
    print_load_estimate(model_dir, options.device, *files)
    model, processor = load(model_dir, options.device, *files, image_cache_bytes=IMAGE_CACHE_BYTES)
    scheduler = Scheduler(model, processor, options.batch, options.max_queue, options.queue_mb * 1_000_000)
    name, hosts = options.name or model_dir.resolve().name, [options.host, *options.trusted_hosts]
    app = create_app(
        scheduler,
        name,
        key,
        options.allow_image_urls,
        options.cors_origins,
        trusted_hosts=hosts,
        ollama=options.ollama,
    )
    if options.chat:
        app = mount_chat(app, model, processor, options.model_dir or options.checkpoint, key)
    return app, name


def mount_chat(app: FastAPI, model, processor, checkpoint: str | Path, key: str | None) -> FastAPI:
    """Mount the chat page at /chat, with examples of the checkpoint; its password is the key, if there is one.

    Everybody with the key can log in under any name, so conversations belong to browsers instead of names.
    """
    import gradio as gr

    from ov_mllama.chat.layout import LAUNCH, make_demo
    from ov_mllama.export.calibration import questions_about

    names = ("max_file_size", "run_history", "footer_links", "css_paths", "js", "theme")
    launch = {name: LAUNCH[name] for name in names}
    demo = make_demo(model, processor, questions_about(checkpoint)[:3], by_name=False)
    auth = (lambda name, password: keys_match(password, key)) if key else None
    return gr.mount_gradio_app(app, demo, "/chat", auth=auth, show_error=False, app_kwargs=demo.app_kwargs(), **launch)
