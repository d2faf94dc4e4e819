"""OpenAI's API: models and chat completions."""

import json
import secrets
import time
from typing import Any

from fastapi import APIRouter, FastAPI
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ov_mllama.serving.backend import Backend
from ov_mllama.serving.parsing import check_model_name
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_text, finish_reason_of, stream_response


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
            pending = await self.backend.submit(request, reservation)
        if request.stream:
            return await stream_response(pending, EventStream(pending, request), http)
        return await full_response(pending, request, http)

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
