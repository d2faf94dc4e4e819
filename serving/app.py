"""An OpenAI-compatible server: python -m serving.app [--checkpoint ID] [--key SECRET] [--chat]

POST /v1/chat/completions (texts and pictures, whole or streamed, JSON schemas), GET /v1/models, GET /health; with
--chat the chat page too. It listens on this machine only, fetches nothing from addresses, and answers questions that
wait together in one batch.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ov_mllama.ending import end_soon, said_plainly
from ov_mllama.machine import check_device
from ov_mllama.prepare import default_folder, files_to_load, prepare, say_what_loads
from ov_mllama.reference import NAMES
from serving import load, positive
from serving.batches import IMAGE_ROOM, Asked, Batches
from serving.questions import Reader, Refusal, Request

MAX_BYTES = 50_000_000  # of a request's body: base64 makes a picture a third larger
SAY_EVERY_S = 10.0  # that an answer is still waited for: proxies cut what is silent for a minute
LOOK_EVERY_S = 0.25  # whether a client that waits is still there


def create_app(
    batches: Batches,
    name: str,
    key: str | None = None,
    addresses: bool = False,
    origins: Sequence[str] = (),
    max_bytes: int = MAX_BYTES,
) -> FastAPI:
    """The server's endpoints.

    Args:
        batches: what answers; closed when the app ends.
        name: of the model.
        key: that clients give as a bearer token; None asks for none.
        addresses: whether pictures may be fetched from the network.
        origins: of web pages whose scripts may ask, such as "http://localhost:3000".
        max_bytes: of a request.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batches.close)  # a process that ends within an inference is aborted

    app = FastAPI(title="Llama 3.2 Vision on OpenVINO", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    reader = Reader(batches.model.config.vision_config.image_size, addresses=addresses)
    here = Model(id=name, created=int(time.time()), object="model", owned_by="local")

    def check_name(given: str) -> None:
        if given != name:
            raise Refusal(404, f"The model {given!r} is not here, {name!r} is.", "model_not_found", "model")

    def allow(http: HttpRequest) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not same(given, key):
            raise Refusal(401, "Incorrect API key provided.", "invalid_api_key")

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(http: HttpRequest) -> dict:
        allow(http)
        return {"object": "list", "data": [here.model_dump()]}

    @app.get("/v1/models/{given:path}")
    async def model(given: str, http: HttpRequest) -> dict:
        allow(http)
        check_name(given)
        return here.model_dump()

    @app.post("/v1/chat/completions")
    async def complete(http: HttpRequest):
        allow(http)
        batches.check_room()  # before anything large is read
        request = await request_of(http, max_bytes)
        check_name(request.model)
        question = await asyncio.to_thread(reader.read, request)
        asked = await batches.ask(question)
        return await (stream if request.stream else whole)(asked, request, http)

    errors_in_openais_form(app)
    return app


def errors_in_openais_form(app: FastAPI) -> None:
    """Whatever is not answered, a path that is not there included."""

    @app.exception_handler(Refusal)
    async def refused(http: HttpRequest, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def not_here(http: HttpRequest, error: HTTPException) -> JSONResponse:
        refusal = Refusal(error.status_code, f"{http.method} {http.url.path}: {error.detail}.")
        return JSONResponse(refusal.body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(http: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(Refusal(500, f"{type(error).__name__}: {error}", kind="server_error").body, 500)


def same(given: str, key: str) -> bool:
    """Whether a key is right, in a time that does not say how much of it is."""
    return secrets.compare_digest(given.encode(), key.encode())


async def request_of(http: HttpRequest, max_bytes: int) -> Request:
    """A request, or a refusal that names the field."""
    # any web page may make its reader's browser send other types, here too; for this one the browser asks first (CORS)
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "A request is JSON: send it with the header 'Content-Type: application/json'.")
    try:
        return Request.model_validate_json(await body_of(http, max_bytes))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(map(str, wrong["loc"]))
        raise Refusal(400, f"{where or 'The body'}: {wrong['msg']}", "invalid_value", where or None) from error


async def body_of(http: HttpRequest, max_bytes: int) -> bytes:
    """A request's body, read no further than it may be long."""
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > max_bytes:
            raise Refusal(
                413, f"A request has at most {max_bytes // 1_000_000} MB: send smaller pictures.", "too_large"
            )
    return bytes(body)


def usage(asked: Asked) -> CompletionUsage:
    """What an answer took."""
    prompt, answer = asked.row.prompt_tokens, len(asked.row.words.tokens)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


@contextlib.asynccontextmanager
async def while_there(asked: Asked, http: HttpRequest) -> AsyncIterator[None]:
    """Ends the answer once its client goes away, which nothing else says before there is a response."""

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(LOOK_EVERY_S)
        asked.row.cancelled.set()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def whole(asked: Asked, request: Request, http: HttpRequest) -> JSONResponse:
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


def finish_of(asked: Asked):
    """Why an answer ended, in OpenAI's words."""
    return "length" if asked.row.finish == "length" else "stop"


async def stream(asked: Asked, request: Request, http: HttpRequest) -> StreamingResponse:
    """The answer as server-sent events. What goes wrong before it begins is an error as usual; where that takes long,
    it begins with comments, so that nothing between here and the client takes it for dead."""
    pieces = asked.pieces()
    first = asyncio.ensure_future(anext(pieces, ""))

    def leave() -> None:
        first.cancel()
        asked.row.cancelled.set()

    try:
        async with while_there(asked, http):
            await asyncio.wait([first], timeout=SAY_EVERY_S)
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
                await asyncio.wait([first], timeout=SAY_EVERY_S)
            if await first:
                yield words(content=first.result())
            async for piece in pieces:
                yield words(content=piece)
            yield words(finish_of(asked))
            if request.stream_options and request.stream_options.include_usage:
                yield event([], usage(asked))
            yield "data: [DONE]\n\n"
        except Refusal as refusal:
            yield f"data: {json.dumps(refusal.body)}\n\n"
        finally:
            leave()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo_model", help="hub id or folder, prepared first if need be")
    parser.add_argument("--reference", default="auto", choices=("auto", *NAMES), help="as for ov_mllama prepare")
    parser.add_argument("--model-dir", type=Path, help="folder of a converted model; default: models/<its name>")
    parser.add_argument("--language-model", help="its .xml; default: the compressed one made last, else the 16-bit one")
    parser.add_argument("--image-encoder", help="its .xml; default likewise")
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model, as clients say it; default: the folder's")
    parser.add_argument("--key", help="that clients must give; default: OV_MLLAMA_KEY of the environment, else none")
    parser.add_argument("--addresses", action="store_true", help="fetch pictures from addresses that clients name")
    parser.add_argument("--origins", nargs="+", default=[], help="of web pages whose scripts may ask, or '*' for any")
    parser.add_argument("--batch", type=positive, default=8, help="how many questions share the model's steps")
    parser.add_argument("--line", type=positive, default=32, help="how many may wait")
    parser.add_argument("--chat", action="store_true", help="the chat page too, at /chat; with a key as its password")
    options = parser.parse_args()
    place = bound(options.host, options.port)
    check_device(options.device)
    folder = default_folder(options.checkpoint)
    model_dir = options.model_dir or prepare(options.checkpoint, folder, reference=options.reference)
    files = files_to_load(model_dir, options.language_model, options.image_encoder)
    say_what_loads(model_dir, options.device, *files)
    model, processor = load(model_dir, options.device, *files, image_cache_bytes=IMAGE_ROOM)
    batches = Batches(model, processor, options.batch, options.line)
    name, key = options.name or model_dir.resolve().name, options.key or os.environ.get("OV_MLLAMA_KEY")
    app = create_app(batches, name, key, options.addresses, options.origins)
    if options.chat:
        app = mount_chat(app, model, processor, options.model_dir or options.checkpoint, key)
    print(f"✅ {name} is at http://{options.host}:{options.port}/v1 – Ctrl-C ends it", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    end_soon(server)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[place])


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, taken before minutes are spent on a model; who comes meanwhile waits.

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
    """The chat page, at /chat, whose password is the key, if there is one; its examples are the checkpoint's."""
    import gradio as gr

    from data_preprocessing import questions_about
    from gradio_helper import LAUNCH, make_demo

    looks = {name: LAUNCH[name] for name in ("max_file_size", "footer_links", "css_paths", "js", "theme")}
    demo = make_demo(model, processor, questions_about(checkpoint)[:3])
    auth = (lambda name, given: same(given, key)) if key else None
    return gr.mount_gradio_app(app, demo, "/chat", auth=auth, **looks)


if __name__ == "__main__":
    with said_plainly():
        main()
