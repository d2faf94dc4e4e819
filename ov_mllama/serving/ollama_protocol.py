"""Ollama's wire format: bodies of requests, and their translation into `ChatCompletionRequest`."""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ov_mllama.serving.protocol import NEUTRAL, ApiError, ChatCompletionRequest, brief

DEFAULTS = {"temperature": 0.6, "top_p": 0.9}  # of the file `params` in Ollama's llama3.2-vision
TOP_K = 40  # Ollama's default for all models
NUM_CTX = 4096  # tokens; Ollama's default
REPEAT_LAST_N = 64  # likewise
FILL_CONTEXT = -2  # value of num_predict
NO_DURATION = re.compile(r"0+(\.0+)?\s*[a-zµ]*", re.IGNORECASE)
# Fields that would change the answer and are not supported -> what to do instead
UNSUPPORTED = {
    "context": "send the earlier turns as messages to /api/chat",
    "height": "this model makes no images",
    "logprobs": "leave it out",
    "raw": "send messages to /api/chat, for the model's own chat template",
    "steps": "this model makes no images",
    "suffix": "this model cannot fill in text, leave it out",
    "template": "the model's own chat template is used, leave it out",
    "think": "this model has no thinking mode, leave it out",
    "tools": "send messages to /api/chat",
    "top_logprobs": "leave it out",
    "width": "this model makes no images",
}


class Options(BaseModel):
    """`options` of a request.

    Others that would change the answer are rejected by `ChatCompletionRequest.check_supported` unless their value is
    neutral; those that concern the machine (num_thread, num_gpu, num_batch, use_mmap, num_keep, ...) are ignored.

    Attributes:
        seed: negative for none.
        num_predict: token limit; -2 for what the context leaves, -1 or 0 for that but at most `num_ctx`.
        repeat_last_n: tokens that the penalties regard; -1 for `num_ctx`, 0 for no penalties.
        num_ctx: see `num_predict`; a prompt may be longer, as the model's whole context is always available.
    """

    model_config = ConfigDict(extra="allow")

    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    num_predict: int | None = Field(None, ge=FILL_CONTEXT, lt=2**31)
    num_ctx: int | None = Field(None, ge=0, lt=2**31)
    stop: str | list[str] | None = None
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repeat_last_n: int | None = Field(None, ge=-1, lt=2**31)

    def parameters(self) -> dict[str, Any]:
        """Return the equivalent parameters of OpenAI's API and its extensions."""
        names = {*DEFAULTS, "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
        given = self.model_dump(include={*names, "repeat_last_n"}, exclude_none=True)
        given = {**DEFAULTS, "top_k": TOP_K, "repeat_last_n": REPEAT_LAST_N, **given}
        if given["repeat_last_n"] == -1:
            given["repeat_last_n"] = self.num_ctx or NUM_CTX
        if not given["top_p"]:  # the most probable token
            given |= {"temperature": 0, "top_p": 1}
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            **given,
            "seed": None if self.seed is None or self.seed < 0 else self.seed,
            "stop": [stop for stop in stops if stop],
            "max_tokens": self._token_limit(),
            **{name: value for name, value in (self.model_extra or {}).items() if name in NEUTRAL},
        }

    def _token_limit(self) -> int:
        """Return the token limit, which may exceed the context."""
        if self.num_predict == FILL_CONTEXT:
            return 2**31 - 1
        if self.num_predict is not None and self.num_predict > 0:
            return self.num_predict
        return self.num_ctx or NUM_CTX


class GenerationBody(BaseModel):
    """Fields that the bodies of /api/chat and /api/generate share.

    Attributes:
        keep_alive: without effect, as the model stays loaded.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = True
    format: Any = None
    options: Options | None = None
    keep_alive: float | str | None = None

    @property
    def streams(self) -> bool:
        """True if the answer is a stream, the default in Ollama's API."""
        return self.stream is not False

    @property
    def unloads(self) -> bool:
        """True if Ollama would unload the model after this request."""
        return bool(NO_DURATION.fullmatch(str(self.keep_alive)))

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to generate: Ollama then only loads the model, or unloads it."""
        raise NotImplementedError

    def messages_with_parts(self) -> list[dict[str, Any]]:
        """Return the messages in OpenAI's format."""
        raise NotImplementedError

    def chat_completion(self, model_name: str) -> ChatCompletionRequest:
        """Return the equivalent request of OpenAI's API.

        Raises:
            ApiError: naming the field that is invalid or unsupported.
        """
        for name, advice in UNSUPPORTED.items():
            if (self.model_extra or {}).get(name):
                raise ApiError(400, f"{name} is not supported: {advice}.")
        return ChatCompletionRequest(
            model=model_name,
            messages=self.messages_with_parts(),
            response_format=self._response_format(),
            tools=self.offered_tools,
            **(self.options or Options()).parameters(),
        )

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Tools that the model may call, in OpenAI's format."""
        return None

    def _response_format(self) -> Any:
        if self.format is None or self.format == "":
            return None
        if self.format == "json":
            return {"type": "json_object"}
        if not isinstance(self.format, dict):
            raise ApiError(400, f'format is "json" or a JSON schema, not {brief(self.format)}.')
        return {"type": "json_schema", "json_schema": {"schema": self.format}}


class GenerateBody(GenerationBody):
    """Body of POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    images: list[str] | None = None

    @property
    def is_empty(self) -> bool:
        return not self.prompt

    def messages_with_parts(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": parts(self.prompt, self.images)}]


class ChatMessage(BaseModel):
    """Message of a chat. Its `thinking` is not part of a prompt."""

    role: str
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[Any] | None = None

    def with_parts(self) -> dict[str, Any]:
        """Return the message in OpenAI's format."""
        calls = {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": self.role, "content": parts(self.content, self.images), **calls}


class ChatBody(GenerationBody):
    """Body of POST /api/chat."""

    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def is_empty(self) -> bool:
        return not self.messages

    def messages_with_parts(self) -> list[dict[str, Any]]:
        return [message.with_parts() for message in self.messages or []]

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        return self.tools


class NameBody(BaseModel):
    """Body of requests about a model.

    Attributes:
        name: as earlier versions of Ollama called `model`.
    """

    model: str | None = None
    name: str | None = None
    stream: bool | None = True

    @property
    def model_name(self) -> str:
        """The model's name.

        Raises:
            ApiError: if there is none.
        """
        if name := self.model or self.name:
            return name
        raise ApiError(400, "model is required: give a name that GET /api/tags lists.")


def parts(text: str | None, images: list[str] | None) -> list[dict[str, Any]]:
    """Return the content of a message in OpenAI's format, its images first as in Ollama's prompts."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": data_uri(image)} for image in images or []]
    return [*content, {"type": "text", "text": text or ""}] if text or not content else content


def data_uri(image: str) -> str:
    """Return a base64-encoded image as a data URI, which it may be already.

    Raises:
        ApiError: if it is a URL to fetch.
    """
    if image.startswith(("http://", "https://")):
        raise ApiError(400, "An image is a URL, which Ollama's API does not fetch: send the image itself in base64.")
    return image if image[:5].lower() == "data:" else f"data:application/octet-stream;base64,{image}"
