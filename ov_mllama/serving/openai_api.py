"""OpenAI's API: models and chat completions."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from openai.types import Model
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ov_mllama.serving.backend import Backend
from ov_mllama.serving.logprobs import chat_logprobs
from ov_mllama.serving.parsing import check_model_name
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_texts, finish_reason_of, stream_response


class OpenAiApi:
    """Endpoints of OpenAI's API.

    Args:
        model_name: name of the model that is served.
        any_model: answer requests for a model of any name.
    """

    def __init__(self, backend: Backend, model_name: str, any_model: bool = False):
        self.backend, self.model_name, self.any_model = backend, model_name, any_model
        self._started = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        """Add the endpoints to an app."""
        router = APIRouter()
        router.add_api_route("/v1/models", self.models, methods=["GET", "HEAD"])
        router.add_api_route("/v1/models/{name:path}", self.model, methods=["GET", "HEAD"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.include_router(router)

    async def models(self, http: HttpRequest) -> dict[str, Any]:
        self.backend.authorize(http)
        return {"object": "list", "data": [self._entry(self.model_name)]}

    async def model(self, name: str, http: HttpRequest) -> dict[str, Any]:
        self.backend.authorize(http)
        return self._entry(self._served(name))

    async def chat(self, http: HttpRequest) -> Response:
        async with self.backend.receive(http, ChatCompletionRequest) as (request, reservation):
            request.model = self._served(request.model)
            pendings = await self.backend.submit_choices(request, reservation)
        if request.stream:
            return await stream_response(pendings, EventStream(pendings, request), http)
        return await full_response(pendings, request, http)

    def _served(self, name: str | None) -> str:
        """Return the name that a request gives the model.

        Raises:
            ApiError: if it names another one than the one served.
        """
        if self.any_model:
            return name or self.model_name
        return check_model_name(name, self.model_name)

    def _entry(self, name: str) -> dict[str, Any]:
        """Return what lists have on the model."""
        return Model(id=name, created=self._started, object="model", owned_by="local").model_dump()


def usage_of(pendings: Sequence[PendingRequest]) -> dict[str, int]:
    """Return the token counts of the choices of a request."""
    prompt = pendings[0].sequence.num_prompt_tokens
    answers = sum(pending.sequence.num_tokens for pending in pendings)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


async def full_response(
    pendings: Sequence[PendingRequest], request: ChatCompletionRequest, http: HttpRequest
) -> JSONResponse:
    """Return the complete answers."""
    choices = [
        {
            "index": index,
            "finish_reason": finish_reason_of(pending),
            "message": {"role": "assistant", "content": text},
            "logprobs": logprobs_of(pending),
        }
        for index, (pending, text) in enumerate(zip(pendings, await complete_texts(pendings, http), strict=True))
    ]
    return JSONResponse(
        {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.model,
            "choices": choices,
            "usage": usage_of(pendings),
        }
    )


def logprobs_of(pending: PendingRequest, first: int = 0) -> dict[str, Any] | None:
    """Return the log probabilities of an answer's tokens from `first` on, None if they are not requested."""
    if pending.request.logprobs is None:
        return None
    sequence = pending.sequence
    return chat_logprobs(sequence.detokenizer.tokenizer, sequence.logprobs[first:])


class EventStream:
    """Format of a stream of OpenAI's API: server-sent events.

    A chunk has the log probabilities of all tokens that are there by then, also of those whose text comes later.
    """

    media_type = "text/event-stream"

    def __init__(self, pendings: Sequence[PendingRequest], request: ChatCompletionRequest):
        self._pendings, self._request = pendings, request
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._num_logprobs = [0] * len(pendings)  # that are sent

    def _event(self, choices: list[dict[str, Any]], **fields) -> str:
        chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._request.model,
            "choices": choices,
            **fields,
        }
        return event(chunk)

    def _delta(self, index: int, finish_reason: str | None = None, **delta) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        pending, first = self._pendings[index], self._num_logprobs[index]
        if new := len(pending.sequence.logprobs) - first:
            self._num_logprobs[index] += new
            choice["logprobs"] = logprobs_of(pending, first)
        return self._event([choice])

    def begin(self) -> str:
        return "".join(self._delta(index, role="assistant", content="") for index in range(len(self._pendings)))

    def waiting(self) -> str:
        return ": waiting\n\n"  # a comment

    def chunk(self, text: str, index: int = 0) -> str:
        return self._delta(index, content=text)

    def end(self) -> str:
        ends = [self._delta(index, finish_reason_of(pending)) for index, pending in enumerate(self._pendings)]
        options = self._request.stream_options
        if options and options.include_usage:
            ends.append(self._event([], usage=usage_of(self._pendings)))
        return "".join([*ends, "data: [DONE]\n\n"])

    def error(self, error: ApiError) -> str:
        return event(error.body)


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"
