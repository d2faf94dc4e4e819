"""OpenAI's API: models, chat completions, text completions and responses."""

import time
from typing import Any

from fastapi import APIRouter, FastAPI
from openai.types import Model
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ov_mllama.serving.backend import Backend
from ov_mllama.serving.openai_formats import ChatFormat, TextFormat
from ov_mllama.serving.parsing import check_model_name
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest, CompletionRequest
from ov_mllama.serving.responses import ResponseFormat, ResponsesRequest, renamed
from ov_mllama.serving.streaming import stream_response


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
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/v1/completions", self.complete, methods=["POST"])
        router.add_api_route("/v1/responses", self.respond, methods=["POST"])
        app.include_router(router)

    async def models(self, http: HttpRequest) -> dict[str, Any]:
        self.backend.authorize(http)
        return {"object": "list", "data": [self._entry(self.model_name)]}

    async def model(self, name: str, http: HttpRequest) -> dict[str, Any]:
        self.backend.authorize(http)
        return self._entry(self._served(name))

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, ChatCompletionRequest, ChatFormat)

    async def complete(self, http: HttpRequest) -> Response:
        return await self._answer(http, CompletionRequest, TextFormat)

    async def _answer(
        self, http: HttpRequest, body_type: type[ChatCompletionRequest], form_type: type[ChatFormat]
    ) -> Response:
        async with self.backend.receive(http, body_type) as (request, reservation):
            request.model = self._served(request.model)
            pendings = await self.backend.submit_choices(request, reservation)
        form = form_type(pendings, request)
        return await stream_response(pendings, form, http) if request.stream else await form.full_response(http)

    async def respond(self, http: HttpRequest) -> Response:
        async with self.backend.receive(http, ResponsesRequest) as (request, reservation):
            model = self._served(request.model)
            try:
                pending = await self.backend.submit(request.chat_completion(), reservation)
            except ApiError as error:
                raise renamed(error) from None
        form = ResponseFormat(pending, request, model)
        return await stream_response([pending], form, http) if request.stream else await form.full_response(http)

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
