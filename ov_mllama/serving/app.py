"""An OpenAI-compatible server: python -m ov_mllama.serving.app [--checkpoint ID] [--key-file FILE] [--chat]

POST /v1/chat/completions (texts and pictures, whole or streamed, JSON schemas), GET /v1/models, GET /health; with
--chat the chat page too. It listens on this machine only, fetches nothing from addresses, and answers questions that
wait together in one batch.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ov_mllama.chat.http_headers import SecurityHeaders
from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from ov_mllama.export.prepare import default_folder, files_to_load, prepare, print_load_estimate
from ov_mllama.runtime.devices import check_device
from ov_mllama.runtime.reference import NAMES
from ov_mllama.serving import load, positive
from ov_mllama.serving.guards import (
    Failures,
    TrustedHosts,
    check_key,
    error_response,
    key_from,
    keys_match,
    warnings_for,
)
from ov_mllama.serving.loading import Gate, running, wait_for
from ov_mllama.serving.protocol import ApiError, Request, RequestParser, failure
from ov_mllama.serving.reading import body_of, check_name, check_type, reading
from ov_mllama.serving.scheduler import IMAGE_CACHE_BYTES, PendingRequest, Scheduler

MAX_BYTES = 50_000_000  # of a request's body: base64 makes a picture a third larger
KEEPALIVE_S = 10.0  # that an answer is still waited for: proxies cut what is silent for a minute
POLL_S = 0.25  # whether a client that waits is still there


def create_app(
    batches: Scheduler,
    name: str,
    key: str | None = None,
    addresses: bool = False,
    origins: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
    trusted_hosts: Sequence[str] = (),
) -> FastAPI:
    """The server's endpoints.

    Args:
        batches: what answers; closed when the app ends.
        name: of the model.
        key: that clients give as a bearer token; None asks for none.
        addresses: whether pictures may be fetched from public addresses.
        origins: of web pages whose scripts may ask, such as "http://localhost:3000".
        max_bytes: of a request.
        trusted_hosts: by whose names clients may reach the server, beside localhost and IP addresses; "*" for any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batches.close)  # a process that ends within an inference is aborted

    app = FastAPI(title="Llama 3.2 Vision on OpenVINO", docs_url=None, redoc_url=None, lifespan=lifespan)
    guard(app, origins, trusted_hosts)
    read = reading(RequestParser(batches.model.config.text_config.max_position_embeddings, addresses=addresses), name)
    here = Model(id=name, created=int(time.time()), object="model", owned_by="local")
    max_bytes = min(max_bytes, batches.queue_bytes)

    def allow(http: HttpRequest) -> None:
        check_key(http.headers.get("authorization", ""), key)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"} if batches.alive else {"status": "failed"}, 200 if batches.alive else 503)

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> dict:
        allow(http)
        return {"object": "list", "data": [here.model_dump()]}

    @app.get("/v1/models/{given:path}")
    async def model(given: str, http: HttpRequest) -> dict:
        allow(http)
        check_name(given, name)
        return here.model_dump()

    @app.post("/v1/chat/completions")
    async def complete(http: HttpRequest):
        allow(http)
        check_type(http)
        place = batches.enter()  # before anything large is read
        hold = functools.partial(batches.hold, place)
        try:
            request, question = await read(await body_of(http, max_bytes, hold), hold)
        except BaseException:
            batches.leave(place)
            raise
        asked = await batches.ask(question, place)
        return await (stream if request.stream else whole)(asked, request, http)

    return app


def guard(app: FastAPI, origins: Sequence[str], trusted_hosts: Sequence[str]) -> None:
    """Checks before the endpoints, and the form of what is not answered, a path that is not there included."""

    @app.exception_handler(ApiError)
    async def refused(http: HttpRequest, refusal: ApiError) -> JSONResponse:
        return error_response(refusal)

    @app.exception_handler(HTTPException)
    async def not_here(http: HttpRequest, error: HTTPException) -> JSONResponse:
        refusal = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}.", headers=error.headers)
        return error_response(refusal)

    # the last is the first that a request meets
    app.add_middleware(Failures)
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(TrustedHosts, names=trusted_hosts)
    app.add_middleware(SecurityHeaders)


def usage(asked: PendingRequest) -> CompletionUsage:
    """What an answer took."""
    prompt, answer = asked.row.prompt_tokens, len(asked.row.words.tokens)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


@contextlib.asynccontextmanager
async def while_there(asked: PendingRequest, http: HttpRequest) -> AsyncIterator[None]:
    """Ends the answer once its client goes away, which nothing else says before there is a response."""

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(POLL_S)
        asked.row.cancelled.set()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def whole(asked: PendingRequest, request: Request, http: HttpRequest) -> JSONResponse:
    """The answer when it is there; nobody's if the client has gone."""
    async with while_there(asked, http), contextlib.aclosing(asked.pieces()) as pieces:
        text = "".join([piece async for piece in pieces])
    message = ChatCompletionMessage(role="assistant", content=text)
    choice = Choice(index=0, finish_reason=finish_of(asked), message=message, logprobs=None)
    completion = ChatCompletion(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        object="chat.completion",
        created=int(time.time()),
        model=request.model,
        choices=[choice],
        usage=usage(asked),
    )
    return JSONResponse(completion.model_dump(exclude_unset=True))


def finish_of(asked: PendingRequest):
    """Why an answer ended, in OpenAI's words."""
    return "length" if asked.row.finish == "length" else "stop"


async def stream(asked: PendingRequest, request: Request, http: HttpRequest) -> StreamingResponse:
    """The answer as server-sent events. What goes wrong before it begins is an error as usual; where that takes long,
    it begins with comments, so that nothing between here and the client takes it for dead."""
    pieces = asked.pieces()
    first = asyncio.ensure_future(anext(pieces, ""))

    def leave() -> None:
        first.cancel()
        asked.row.cancelled.set()

    try:
        async with while_there(asked, http):
            await asyncio.wait([first], timeout=KEEPALIVE_S)
        if first.done():
            first.result()
    except BaseException:
        leave()
        raise

    key, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def event(choices: list[ChunkChoice], used: CompletionUsage | None = None) -> str:
        chunk = ChatCompletionChunk(
            id=key, object="chat.completion.chunk", created=created, model=request.model, choices=choices, usage=used
        )
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"

    def words(finish=None, **delta) -> str:
        return event([ChunkChoice(index=0, delta=ChoiceDelta(**delta), finish_reason=finish)])

    async def events() -> AsyncIterator[str]:
        try:
            yield words(role="assistant", content="")
            while not first.done():
                yield ": waiting\n\n"
                await asyncio.wait([first], timeout=KEEPALIVE_S)
            if await first:
                yield words(content=first.result())
            async for piece in pieces:
                yield words(content=piece)
            yield words(finish_of(asked))
            if request.stream_options and request.stream_options.include_usage:
                yield event([], usage(asked))
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - `failure` logs it
            refusal = error if isinstance(error, ApiError) else failure(error)
            yield f"data: {json.dumps(refusal.body)}\n\n"
        finally:
            leave()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


AsWritten = argparse.RawDescriptionHelpFormatter


def main(arguments: Sequence[str]) -> None:
    """The command line.

    Args:
        arguments: those after the command's name.
    """
    options = parsed(arguments)
    bypass_proxy_for_loopback()
    key = key_from(options.key, options.key_file)
    for warning in warnings_for(options.host, key, options.key is not None):
        print(f"❗ {warning[0].upper()}{warning[1:]}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    gate = Gate()
    with bind_socket(options.host, options.port) as place, running(gate, place) as ended:
        app, name = loaded(options, key)
        gate.open(app)
        print(f"✅ {name} is at http://{options.host}:{options.port}/v1 – Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            wait_for(ended)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser("ov-mllama serve", description=__doc__, formatter_class=AsWritten)
    parser.add_argument("--checkpoint", default="demo_model", help="hub id or folder, prepared first if need be")
    parser.add_argument("--reference", default="auto", choices=("auto", *NAMES), help="as for ov_mllama prepare")
    parser.add_argument("--model-dir", type=Path, help="folder of a converted model; default: models/<its name>")
    parser.add_argument("--language-model", help="its .xml; default: the compressed one made last, else the 16-bit one")
    parser.add_argument("--image-encoder", help="its .xml; default likewise")
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--trusted-hosts", nargs="+", default=[], help="names of this server beside --host, or '*' for any"
    )
    parser.add_argument("--name", help="of the model, as clients say it; default: the folder's")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--key-file", type=Path, help="with the key that clients must give; default: OV_MLLAMA_KEY")
    keys.add_argument("--key", help="that clients must give, for all users of this machine to see")
    parser.add_argument(
        "--allow-image-urls", "--addresses", action="store_true", help="fetch pictures from public addresses of clients"
    )
    parser.add_argument(
        "--cors-origins", "--origins", nargs="+", default=[], help="of web pages whose scripts may ask, or '*' for any"
    )
    parser.add_argument("--batch", type=positive, default=8, help="how many questions share the model's steps")
    parser.add_argument("--max-queue", "--line", type=positive, default=32, help="how many may wait")
    parser.add_argument(
        "--queue-mb", type=positive, default=500, help="memory for the encoded pictures of all requests"
    )
    parser.add_argument("--chat", action="store_true", help="the chat page too, at /chat; with a key as its password")
    return parser.parse_args(arguments)


def loaded(options: argparse.Namespace, key: str | None) -> tuple[FastAPI, str]:
    """The app of a model, which is prepared if need be, and the model's name."""
    check_device(options.device)
    folder = default_folder(options.checkpoint)
    model_dir = options.model_dir or prepare(options.checkpoint, folder, reference=options.reference)
    files = files_to_load(model_dir, options.language_model, options.image_encoder)
    print_load_estimate(model_dir, options.device, *files)
    model, processor = load(model_dir, options.device, *files, image_cache_bytes=IMAGE_CACHE_BYTES)
    batches = Scheduler(model, processor, options.batch, options.max_queue, options.queue_mb * 1_000_000)
    name, hosts = options.name or model_dir.resolve().name, [options.host, *options.trusted_hosts]
    app = create_app(batches, name, key, options.allow_image_urls, options.cors_origins, trusted_hosts=hosts)
    if options.chat:
        app = mount_chat(app, model, processor, options.model_dir or options.checkpoint, key)
    return app, name


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, taken before minutes are spent on a model.

    Raises:
        OSError: another program has it.
    """
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
        place.listen()  # else another may be bound to it meanwhile
    except (OSError, OverflowError) as error:
        place.close()
        why = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"{host}:{port} cannot be had ({why}): choose another with --port.") from error
    return place


def mount_chat(app: FastAPI, model, processor, checkpoint: str | Path, key: str | None) -> FastAPI:
    """Mount the chat page at /chat; its password is the key, if there is one, and its examples are the checkpoint's.

    Whoever has the key may log in under any name, so names own nothing: conversations are the browser's.
    """
    import gradio as gr

    from ov_mllama.chat.layout import LAUNCH, make_demo
    from ov_mllama.export.calibration import questions_about

    looks = {
        name: LAUNCH[name] for name in ("max_file_size", "run_history", "footer_links", "css_paths", "js", "theme")
    }
    demo = make_demo(model, processor, questions_about(checkpoint)[:3], by_name=False)
    auth = (lambda name, given: keys_match(given, key)) if key else None
    return gr.mount_gradio_app(app, demo, "/chat", auth=auth, show_error=False, app_kwargs=demo.app_kwargs(), **looks)
