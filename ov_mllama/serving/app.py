"""OpenAI-compatible server, which also speaks Ollama's API.

POST /v1/chat/completions, /v1/responses and /v1/completions (text and images, streamed or not, JSON schemas), GET
/v1/models, /health and /metrics; Ollama's POST /api/chat and /api/generate with their neighbours; and with --chat the
chat page. By default it listens on this machine only and fetches no image URLs. Requests share
steps of one batch, which they join and leave.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ov_mllama.chat.http_headers import SecurityHeaders
from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from ov_mllama.chat.user_data import encoded_images
from ov_mllama.cli import IMAGE_STORE_MB, megabytes, root_path, user_path
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
from ov_mllama.serving.metrics import CONTENT_TYPE, CountResponses, Metrics
from ov_mllama.serving.ollama import PORT as OLLAMA_PORT
from ov_mllama.serving.ollama import OllamaApi
from ov_mllama.serving.openai_api import OpenAiApi
from ov_mllama.serving.parsing import RequestParser
from ov_mllama.serving.paths import CanonicalPaths, ProxiedPath, hint
from ov_mllama.serving.protocol import ApiError
from ov_mllama.serving.scheduler import IMAGE_CACHE_BYTES, Scheduler

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
    any_model: bool = False,
    max_tokens: int | None = None,
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
        any_model: answer requests for a model of any name.
        max_tokens: token limit of answers whose requests set none; None for what the context leaves.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)  # a process that exits within an inference is aborted

    app = FastAPI(title="Llama 3.2 Vision on OpenVINO", docs_url=None, redoc_url=None, lifespan=lifespan)
    text = scheduler.model.config.text_config
    parser = RequestParser(text.max_position_embeddings, max_tokens, allow_image_urls, text.vocab_size)
    backend = Backend(scheduler, parser, key, max_bytes)
    OpenAiApi(backend, model_name, any_model).add_to(app)
    OllamaApi(backend, model_name, any_model).add_to(app, greet=ollama)
    add_middleware(app, cors_origins, trusted_hosts, backend.metrics)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def get_health() -> JSONResponse:
        alive = scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def get_metrics(http: HttpRequest) -> PlainTextResponse:
        backend.authorize(http)
        return PlainTextResponse(backend.metrics.text(scheduler), media_type=CONTENT_TYPE)

    return app


def add_middleware(app: FastAPI, cors_origins: Sequence[str], trusted_hosts: Sequence[str], metrics: Metrics) -> None:
    """Add checks before the endpoints, and the APIs' formats of errors, unknown paths included."""

    @app.exception_handler(ApiError)
    async def on_api_error(http: HttpRequest, error: ApiError) -> JSONResponse:
        return error_response(error, http.scope)

    @app.exception_handler(HTTPException)
    async def on_http_error(http: HttpRequest, error: HTTPException) -> JSONResponse:
        allowed = (error.headers or {}).get("Allow")
        message = hint(http.method, http.scope["path"], error.status_code, allowed)
        return error_response(ApiError(error.status_code, message, headers=error.headers), http.scope)

    # a request meets the last first
    app.add_middleware(InternalErrors)
    app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrustedHosts, names=trusted_hosts)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(CountResponses, metrics=metrics)
    app.add_middleware(CanonicalPaths)


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
    proxied = ProxiedPath(gate, urlsplit(options.root_path).path)
    with bind_socket(options.host, options.port) as listener, serve_in_thread(proxied, listener) as ended:
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
    model.add_argument(
        "--image-store-mb",
        type=megabytes,
        default=IMAGE_STORE_MB,
        help=f"disk for encoded images, which are then encoded once; 0: none; default: {IMAGE_STORE_MB}",
    )
    model.add_argument("--name", help="name by which clients request the model; default: the folder's")
    model.add_argument(
        "--max-tokens", type=positive, help="of answers whose request sets no limit; default: what the context leaves"
    )
    model.add_argument("--any-model", action="store_true", help="answer requests for a model of any name")
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1")
    access.add_argument("--port", type=int, help=f"default: {PORT}, with --ollama {OLLAMA_PORT}")
    access.add_argument(
        "--root-path", type=root_path, default="", metavar="PATH", help="path at which a proxy serves all of this"
    )
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
    store = encoded_images(options.image_store_mb)
    model, processor = load(model_dir, options.device, *files, image_cache_bytes=IMAGE_CACHE_BYTES, image_store=store)
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
        any_model=options.any_model,
        max_tokens=options.max_tokens,
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
    # with a root_path of its own, as from GRADIO_ROOT_PATH, a mounted page finds no route; ProxiedPath gives it one
    return gr.mount_gradio_app(
        app, demo, "/chat", auth=auth, root_path="", show_error=False, app_kwargs=demo.app_kwargs(), **launch
    )
