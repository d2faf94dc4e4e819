"""Ollama's API, for programs that speak no other: POST /api/chat and /api/generate, GET /api/tags, /api/version and
/api/ps, POST /api/show. What manages models is rejected, as this server has one, which stays loaded."""

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ov_mllama.export.costs import weights
from ov_mllama.serving.backend import Backend
from ov_mllama.serving.ollama_protocol import DEFAULTS, ChatBody, GenerateBody, GenerationBody, NameBody
from ov_mllama.serving.protocol import ApiError
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_texts, finish_reason_of, remarks_of, stream_response
from ov_mllama.serving.tools import CallSplitter, knows_tools

PORT = 11434  # Ollama's
VERSION = "0.24.0"  # the last release of Ollama that ran this model; some clients require a minimum
ALIAS = "llama3.2-vision"  # Ollama's name of the model, accepted with any tag
NEVER = "2300-01-01T00:00:00Z"  # when the model is unloaded
NDJSON = "application/x-ndjson"
REJECTED = {  # path -> methods, why and what to do instead
    "/api/create": (["POST"], "This server creates no models: run `ov-mllama prepare`, and serve the result."),
    "/api/blobs/{digest}": (["HEAD", "POST"], "This server stores no files of models: run `ov-mllama prepare`."),
    "/api/copy": (["POST"], "This server copies no models: rename its model with `ov-mllama serve --name`."),
    "/api/delete": (["DELETE"], "This server deletes no models: remove the model's folder."),
    "/api/push": (["POST"], "This server uploads no models: upload the model's folder yourself."),
    "/api/embed": (["POST"], "This model computes no embeddings: use another server for them."),
    "/api/embeddings": (["POST"], "This model computes no embeddings: use another server for them."),
}


class OllamaApi:
    """Endpoints of Ollama's API.

    Args:
        model_name: name of the model that is served, which clients may also call `ALIAS`.
        any_model: answer requests for a model of any name.
    """

    def __init__(self, backend: Backend, model_name: str, any_model: bool = False):
        self.backend, self.model_name, self.any_model, self.started = backend, model_name, any_model, now()

    def add_to(self, app: FastAPI, greet: bool) -> None:
        """Add the endpoints to an app.

        Args:
            greet: whether to add one at /, for clients that check whether Ollama is there.
        """
        router = APIRouter(include_in_schema=False)
        for path, endpoint in (
            ("/api/chat", self.chat),
            ("/api/generate", self.generate),
            ("/api/show", self.show),
            ("/api/pull", self.pull),
        ):
            router.add_api_route(path, endpoint, methods=["POST"])
        for path, endpoint in (("/api/tags", self.tags), ("/api/version", self.version), ("/api/ps", self.ps)):
            router.add_api_route(path, endpoint, methods=["GET", "HEAD"])
        for path, (methods, message) in REJECTED.items():
            router.add_api_route(path, self._rejecting(message), methods=methods)
        if greet:
            router.add_api_route("/", lambda: PlainTextResponse("Ollama is running"), methods=["GET", "HEAD"])
        app.include_router(router)

    def _rejecting(self, message: str) -> Callable:
        async def reject(http: HttpRequest) -> Response:
            self.backend.authorize(http)
            raise ApiError(501, message)

        return reject

    def _check_name(self, name: str) -> None:
        """Check that a request is for the model that is served.

        Raises:
            ApiError: if it names another one.
        """
        if self.any_model:
            return
        if name.removesuffix(":latest") != self.model_name.removesuffix(":latest") and name.partition(":")[0] != ALIAS:
            raise ApiError(404, f"model '{name[:100]}' not found")  # as Ollama words it, which clients compare

    # ---- Answers ----

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, ChatBody, lambda text: {"message": {"role": "assistant", "content": text}})

    async def generate(self, http: HttpRequest) -> Response:
        return await self._answer(http, GenerateBody, lambda text: {"response": text})

    async def _answer(
        self, http: HttpRequest, body_type: type[GenerationBody], wrap: Callable[[str], dict[str, Any]]
    ) -> Response:
        """Return an answer. A request with nothing to answer is only acknowledged: Ollama would load the model for it,
        or unload it, and here it stays loaded."""
        received_s = time.perf_counter()
        async with self.backend.receive(http, body_type) as (body, reservation):
            self._check_name(body.model)
            if body.is_empty:
                reason = "unload" if body.unloads else "load"
                return JSONResponse({**head(body.model), **wrap(""), "done": True, "done_reason": reason})
            request = body.chat_completion(self.model_name)
            pending = await self.backend.submit(request, reservation)
        lines = Lines(pending, body.model, wrap, received_s)
        if body.streams:
            return await stream_response([pending], lines, http)
        [text] = await complete_texts([pending], http)
        return JSONResponse(lines.last(text))

    # ---- The model ----

    async def tags(self, http: HttpRequest) -> dict:
        """List the model under its name and `ALIAS`, as after `ollama cp`: clients check that their name is listed."""
        self.backend.authorize(http)
        names = dict.fromkeys((with_tag(self.model_name), with_tag(ALIAS)))
        return {"models": [{**self._entry(name), "modified_at": self.started} for name in names]}

    async def ps(self, http: HttpRequest) -> dict:
        self.backend.authorize(http)
        entry = self._entry(with_tag(self.model_name))
        return {"models": [{**entry, "expires_at": NEVER, "size_vram": 0, "context_length": self._context_length}]}

    async def version(self, http: HttpRequest) -> dict:
        self.backend.authorize(http)
        return {"version": VERSION}

    async def show(self, http: HttpRequest) -> dict:
        body = await self.backend.receive_short(http, NameBody)
        self._check_name(body.model_name)
        config = self.backend.scheduler.model.config
        text, vision = config.text_config, config.vision_config
        return {
            "modelfile": f"# The folder of {self.model_name}, served by ov-mllama",
            "parameters": "\n".join(f"{name:<30} {value}" for name, value in DEFAULTS.items()),
            "template": self.backend.scheduler.processor.chat_template or "",
            "details": self._details(),
            "model_info": {
                "general.architecture": "mllama",
                "general.basename": self.model_name,
                "general.parameter_count": self._parameter_count,
                "mllama.attention.head_count": text.num_attention_heads,
                "mllama.attention.head_count_kv": text.num_key_value_heads,
                "mllama.block_count": text.num_hidden_layers,
                "mllama.context_length": self._context_length,
                "mllama.embedding_length": text.hidden_size,
                "mllama.feed_forward_length": text.intermediate_size,
                "mllama.vocab_size": text.vocab_size,
                "mllama.vision.block_count": vision.num_hidden_layers,
                "mllama.vision.image_size": vision.image_size,
                "mllama.vision.max_num_tiles": vision.max_num_tiles,
                "mllama.vision.patch_size": vision.patch_size,
            },
            "capabilities": [
                "completion",
                "vision",
                *(["tools"] if knows_tools(self.backend.scheduler.processor) else []),
            ],
            "modified_at": self.started,
        }

    async def pull(self, http: HttpRequest) -> Response:
        """Succeed at once for the model that is served: many clients pull before they request anything."""
        body = await self.backend.receive_short(http, NameBody)
        name = body.model_name
        try:
            self._check_name(name)
        except ApiError as error:
            advice = "this server downloads none, start it with `ov-mllama serve --checkpoint NAME`"
            raise ApiError(error.status, f"{error}: {advice}.") from None
        line = json.dumps({"status": "success"}) + "\n"
        return Response(line, media_type="application/json" if body.stream is False else NDJSON)

    @property
    def _context_length(self) -> int:
        return self.backend.scheduler.model.config.text_config.max_position_embeddings

    @property
    def _parameter_count(self) -> int:
        """Number of weights, without small tensors."""
        counted = weights(self.backend.scheduler.model.config)
        return int(counted.language + counted.vision)

    def _details(self) -> dict[str, Any]:
        quantization = self.backend.scheduler.model.about.rsplit(" · ", 2)[1]
        return {
            "parent_model": "",
            "format": "openvino",
            "family": "mllama",
            "families": ["mllama"],
            "parameter_size": f"{self._parameter_count / 1e9:.1f}B",
            "quantization_level": quantization,
        }

    def _entry(self, name: str) -> dict[str, Any]:
        """Return what lists have on the model."""
        model = self.backend.scheduler.model
        return {
            "name": name,
            "model": name,
            "size": model.disk_bytes,
            "digest": hashlib.sha256(model.about.encode()).hexdigest(),  # clients want one; equal for both names
            "details": self._details(),
        }


class Lines:
    """Format of a stream of Ollama's API: one JSON object a line, the last one with times and counts.

    Args:
        model: name of the model in the request.
        wrap: returns the fields of a text.
        received_s: `time.perf_counter` when the request began.
    """

    media_type = NDJSON

    def __init__(self, pending: PendingRequest, model: str, wrap: Callable[[str], dict[str, Any]], received_s: float):
        self._pending, self._model, self._wrap, self._received_s = pending, model, wrap, received_s
        self._splitter = CallSplitter(pending)

    def begin(self) -> str:
        return ""

    def waiting(self) -> str:
        return as_line({**head(self._model), **self._wrap(""), "done": False})

    def chunk(self, text: str, index: int = 0) -> str:
        return as_line({**head(self._model), **self._wrap(self._splitter.put(text)), "done": False})

    def end(self) -> str:
        last = self.last("")
        calls = last.get("message", {}).pop("tool_calls", None)
        if not calls:
            return as_line(last)
        message = {**last["message"], "tool_calls": calls}
        return as_line({**head(self._model), "message": message, "done": False}) + as_line(last)

    def error(self, error: ApiError) -> str:
        return as_line({"error": str(error)})

    def last(self, text: str) -> dict[str, Any]:
        """Return the last object. `load_duration` is the time until the request's batch began, and
        `prompt_eval_duration` includes the encoding of images."""
        sequence = self._pending.sequence
        text = self._splitter.put(text)
        rest, calls = self._splitter.end()
        wrapped = self._wrap(text + rest)
        if calls:
            wrapped["message"]["tool_calls"] = [call.as_ollama() for call in calls]
        return {
            **head(self._model),
            **wrapped,
            "done": True,
            "done_reason": finish_reason_of(self._pending),
            "total_duration": nanoseconds(time.perf_counter() - self._received_s),
            "load_duration": nanoseconds(sequence.started_s - self._received_s),
            "prompt_eval_count": sequence.num_prompt_tokens,
            "prompt_eval_duration": nanoseconds(sequence.first_token_s - sequence.started_s),
            "eval_count": sequence.num_tokens,
            "eval_duration": nanoseconds(sequence.ended_s - sequence.first_token_s),
            **remarks_of([self._pending]),
        }


def now() -> str:
    """Return the time as in RFC 3339, in UTC."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def head(model: str) -> dict[str, Any]:
    """Return what every object of an answer begins with."""
    return {"model": model, "created_at": now()}


def as_line(value: dict[str, Any]) -> str:
    """Return an object as a line of JSON."""
    return json.dumps(value) + "\n"


def nanoseconds(seconds: float) -> int:
    """Return a duration in ns, at least 1: clients divide by it."""
    return max(1, round(seconds * 1e9))


def with_tag(name: str) -> str:
    """Return a model's name with a tag."""
    return name if ":" in name else f"{name}:latest"
