"""An HTTP request -> its pydantic model -> `GenerationRequest`, in bounded time and memory."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request as HttpRequest

from ov_mllama.serving.grammars import Grammar
from ov_mllama.serving.image_urls import fetch_images
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.messages import convert_message
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest, brief
from ov_mllama.serving.tool_requests import tools_of

MAX_CHARS_PER_TOKEN = 16  # far more than any language needs: longer text is rejected before it is tokenized
BODY_TIMEOUT_S = 120.0  # for a body to arrive: the request occupies the queue meanwhile
Body = TypeVar("Body", bound=BaseModel)


@dataclass
class GenerationRequest:
    """A parsed request.

    Attributes:
        messages: for the chat template; their texts are escaped by `escape_special_tokens`.
        images: encoded, in the template's order.
        max_new_tokens: token limit of the answer, which may exceed what the model's context leaves.
        temperature, top_k, top_p, min_p, seed: sampling parameters; a temperature of 0 is greedy.
        presence_penalty, frequency_penalty, repetition_penalty, logit_bias: see `sampling.adjust_logits`; a
            repetition_penalty of None is that of generation_config.json.
        penalty_window: number of last tokens that the penalties regard; 0 for all.
        logprobs: number of most probable tokens of which log probabilities are returned; None for none at all.
        stop: strings before which the answer ends.
        stop_token_ids: tokens after which it ends, beside the model's.
        raw_prompt: text to continue without the chat template, in place of messages.
        prefill: beginning of the answer, which the model continues.
        schema: grammar that the answer must match; None for free text.
        tools: that the model may call, as for the chat template.
    """

    messages: list[dict]
    images: list[ImageFile] = field(default_factory=list)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    penalty_window: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    raw_prompt: str | None = None
    prefill: str = ""
    schema: Grammar | None = None
    tools: list[dict] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded images."""
        return sum(len(data) for data in {id(image.data): image.data for image in self.images}.values())


class RequestParser:
    """Parser of request bodies.

    Args:
        context_length: the model's, in tokens; it bounds a request's text.
        max_new_tokens: token limit of requests that set none; None for what the context leaves.
        allow_image_urls: fetch images from public addresses.
        vocab_size: the model's.
    """

    def __init__(
        self,
        context_length: int,
        max_new_tokens: int | None = None,
        allow_image_urls: bool = False,
        vocab_size: int = 2**31,
    ):
        self.vocab_size = vocab_size
        self.max_new_tokens, self.allow_image_urls = max_new_tokens or context_length, allow_image_urls
        self.max_chars = MAX_CHARS_PER_TOKEN * context_length
        self._thread = ThreadPoolExecutor(1, "parsing")  # one at a time, or the peaks of memory add up

    async def validate(self, body: bytearray, body_type: type[Body]) -> Body:
        """Parse a body, which is emptied.

        Raises:
            ApiError: naming the field that is missing or invalid.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._validate, body, body_type)

    async def convert(self, request: ChatCompletionRequest, reserve: Callable[[int], None]) -> GenerationRequest:
        """Convert a request; its messages are moved out of it.

        Args:
            reserve: called with the number of bytes of fetched images; may raise.
        Raises:
            ApiError: naming the field that is invalid, unsupported or too long.
        """
        if self.allow_image_urls:
            await fetch_images(request.messages, reserve)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._convert, request)

    def _validate(self, body: bytearray, body_type: type[Body]) -> Body:
        try:
            # each of these becomes an object a hundred times as large; base64 has none of them
            if sum(body.count(mark) for mark in b",[{") > self.max_chars:
                raise self._too_long()
            return body_type.model_validate_json(body)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            param = ".".join(map(str, wrong["loc"]))[:100]
            message = f"{param or 'The body'}: {wrong['msg'][:500]}"
            raise ApiError(400, message, "invalid_value", param or None) from None
        finally:
            body.clear()

    def _convert(self, request: ChatCompletionRequest) -> GenerationRequest:
        messages, request.messages = request.messages, []
        request.check_supported()
        tools = [{"content": json.dumps(each)} for each in (request.tools or [])]
        self._check_length([*messages, *tools, *({"content": prompt} for prompt in request.prompts if prompt)])
        images: list[ImageFile] = []
        converted = [convert_message(message, f"messages[{i}]", images) for i, message in enumerate(messages)]
        prefill = take_prefill(converted) if request.continue_final_message else ""
        tools, grammar = tools_of(request)
        greedy = request.top_p == 0  # the most probable token, as in OpenAI's API
        return GenerationRequest(
            converted,
            images,
            request.token_limit or self.max_new_tokens,
            temperature=0.0 if greedy else request.temperature or 0.0,
            top_k=request.top_k or 0,
            top_p=request.top_p or 1.0,
            min_p=request.min_p or 0.0,
            seed=None if request.seed == -1 else request.seed,
            **request.penalties,
            logit_bias=request.biases(self.vocab_size),
            logprobs=request.num_logprobs,
            stop=request.stops,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            schema=grammar,
            tools=tools,
            prefill=prefill,
        )

    def _too_long(self) -> ApiError:
        message = f"The messages have more than {self.max_chars} characters, more than any context holds: shorten them."
        return ApiError(400, message, "context_length_exceeded", "messages")

    def _check_length(self, messages: list[dict]) -> None:
        """Count each message and part as a token."""
        length = 0
        for message in messages:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            if calls := message.get("tool_calls"):
                parts = [*parts, json.dumps(calls)]
            length += MAX_CHARS_PER_TOKEN * (1 + len(parts))
            for part in parts:
                texts = [part.get("text"), part.get("refusal")] if isinstance(part, dict) else [part]
                length += sum(len(text) for text in texts if isinstance(text, str))
            if length > self.max_chars:
                raise self._too_long()


def take_prefill(messages: list[dict]) -> str:
    """Remove the last message, an assistant's, and return its text.

    Raises:
        ApiError: if it is not an assistant's.
    """
    if messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        error = "continue_final_message needs an assistant's text at the end."
        raise ApiError(400, error, "invalid_value", "continue_final_message")
    return "".join(part["text"] for part in messages.pop()["content"])


def check_model_name(name: str | None, served: str) -> str:
    """Return the name of the model that a request is for, which must be the one served.

    Raises:
        ApiError: if it names another one, or none.
    """
    if not name:
        raise ApiError(400, f"model is missing: {served!r} is served.", "invalid_value", "model")
    if name != served:
        raise ApiError(404, f"The model {brief(name)} is not here, {served!r} is.", "model_not_found", "model")
    return name


def check_content_type(http: HttpRequest) -> None:
    """Check that a request is declared to be JSON, or that it has no type and is not of a web page (litellm's).

    Raises:
        ApiError: if it is not.
    """
    # any web page can make its reader's browser send other types, here too, but not without its origin; for this one
    # the browser asks first (CORS)
    declared = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    from_page = "origin" in http.headers or "sec-fetch-site" in http.headers
    if declared != "application/json" and ("content-type" in http.headers or from_page):
        raise ApiError(415, "A request must be JSON: send the header 'Content-Type: application/json' (curl: -H).")


async def read_body(http: HttpRequest, max_bytes: int, reserve: Callable[[int], None]) -> bytearray:
    """Read a request's body.

    Args:
        reserve: called with the number of bytes so far; may raise.
    Raises:
        ApiError: if it has more than `max_bytes`, or does not arrive in time.
    """
    too_large = ApiError(413, f"A request has at most {max_bytes // 1_000_000} MB: send smaller images.", "too_large")
    if int(http.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in http.stream():
                body += chunk
                reserve(len(body))
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"The request did not arrive within {BODY_TIMEOUT_S:.0f} seconds.", "timeout") from error
    return body
