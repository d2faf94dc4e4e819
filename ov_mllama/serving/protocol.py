"""A request in OpenAI's form -> a `Question` for the model, or a refusal in OpenAI's form."""

import base64
import json
import logging
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ov_mllama.runtime.images import DETAILS, PictureError
from ov_mllama.runtime.prompts import escape_special_tokens
from ov_mllama.serving.images import ImageFile

logger = logging.getLogger(__name__)

DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[^,;]+)*;base64,", re.ASCII | re.IGNORECASE)
MAX_PIXELS = 100_000_000  # of a request's images: 0.3 GB, while they are decoded
MAX_IMAGES = 16  # of a request: the smallest takes as many pixels of the processor as four tiles
CHARS_PER_TOKEN = 16  # far more than any language needs: what is longer is refused before it is tokenised
MAX_STOPS, MAX_STOP_CHARS = 4, 200
SCHEMA_CHARS = 100_000
# Parameters that would change the answer and are not supported -> values with which they change nothing, beside null
# and what is empty
NEUTRAL: dict[str, tuple] = {
    # OpenAI's
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "logit_bias": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    # vLLM's, SGLang's and llama.cpp's
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "continue_final_message": (False,),
    "documents": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "mm_processor_kwargs": (),
    "n_predict": (-1,),
    "n_probs": (0,),
    "prompt_logprobs": (0, False),
    "regex": (),
    "repeat_penalty": (1,),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "stop_regex": (),
    "stop_token_ids": (),
    "structural_tag": (),
    "structured_outputs": (),
    "tfs_z": (1,),
    "thinking_token_budget": (),
    "top_a": (0,),
    "top_k": (-1, 0),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}


class ApiError(Exception):
    """What is answered instead of a completion.

    Args:
        status: of HTTP.
        message: a sentence that names the fix.
        code: OpenAI's.
        param: the field that is wrong.
        kind: OpenAI's type of error.
        headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(error: BaseException) -> ApiError:
    """Log an unexpected error; clients get a number by which the log knows it, and nothing of its text."""
    number = secrets.token_hex(4)
    logger.error("Error %s", number, exc_info=error)
    if isinstance(error, MemoryError):
        sentence = f"There is too little memory for this now (error {number} in the server's log)."
        return ApiError(503, sentence, "out_of_memory", kind="server_error", headers={"Retry-After": "30"})
    sentence = f"The server could not answer (error {number} in its log)."
    return ApiError(500, sentence, "internal_error", kind="server_error")


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchema(BaseModel):
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # with json_object, as llama.cpp and others have it


class Request(BaseModel):
    """The body of POST /v1/chat/completions, as far as it is understood."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None  # a JSON schema, as vLLM had it

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_completion_tokens or self.max_tokens


@dataclass
class Question:
    """What the model is asked.

    Attributes:
        messages: for the chat template; their texts are `escape_special_tokens`.
        pictures: encoded, in the template's order.
        max_new_tokens: the answer's limit.
        temperature, top_p, seed: of sampling; a temperature of 0 takes the likeliest token.
        stop: texts before which an answer ends.
        schema: a JSON schema that the answer follows; None for free text.
    """

    messages: list[dict]
    pictures: list[ImageFile] = field(default_factory=list)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: dict | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its images."""
        return sum(len(picture.data) for picture in self.pictures)


class RequestParser:
    """Reads requests.

    Args:
        context: tokens that the model's context holds, which bounds a request's text.
        max_new_tokens: of a request that names no limit.
        addresses: whether images may be fetched from the network.
    """

    def __init__(self, context: int, max_new_tokens: int = 512, addresses: bool = False):
        self.max_chars, self.max_new_tokens, self.addresses = CHARS_PER_TOKEN * context, max_new_tokens, addresses

    def parse(self, body: bytearray) -> Request:
        """A request, whose body is freed. It belongs into a thread.

        Raises:
            ApiError: if it is no JSON, or has a field of another type; it names the field.
        """
        try:
            # each of these becomes an object a hundred times as large; base64 has none of them
            if sum(body.count(mark) for mark in b",[{") > self.max_chars:
                raise self._too_long()
            return Request.model_validate_json(body)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, wrong["loc"]))[:100]
            sentence = f"{where or 'The body'}: {wrong['msg'][:500]}"
            raise ApiError(400, sentence, "invalid_value", where or None) from None
        finally:
            body.clear()

    def read(self, request: Request) -> Question:
        """What a request asks for, its messages moved out of it. It belongs into a thread: images are large.

        Raises:
            ApiError: if something is not understood, too long, or an image cannot be used.
        """
        messages, request.messages = request.messages, []
        check_neutral(request.model_extra or {})
        if (request.n or 1) != 1:
            raise ApiError(400, "n must be 1: ask several times.", "unsupported_value", "n")
        self._check_length(messages)
        pictures: list[ImageFile] = []
        return Question(
            [self._message(message, i, pictures) for i, message in enumerate(messages)],
            pictures,
            request.limit or self.max_new_tokens,
            request.temperature or 0.0,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            stops_of(request.stop),
            schema_of(request),
        )

    def _too_long(self) -> ApiError:
        sentence = f"The messages have more than {self.max_chars} characters, and no context holds so many: send less."
        return ApiError(400, sentence, "context_length_exceeded", "messages")

    def _check_length(self, messages: list[dict]) -> None:
        """Each message and part counts as a token."""
        length = 0
        for message in messages:
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            length += CHARS_PER_TOKEN * (1 + len(parts))
            for part in parts:
                texts = [part.get(kind) for kind in ("text", "refusal")] if isinstance(part, dict) else []
                length += sum(len(text) for text in texts if isinstance(text, str))
            if length > self.max_chars:
                raise self._too_long()

    def _message(self, message: dict, number: int, pictures: list[ImageFile]) -> dict:
        where, role = f"messages[{number}]", message.get("role")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            sentence = f"A role is system, user or assistant, not {brief(role)}."
            raise ApiError(400, sentence, "invalid_value", f"{where}.role")
        content = message.get("content") or ""
        if not isinstance(content, str | list):
            raise ApiError(400, "A content is a text or a list of parts.", "invalid_value", f"{where}.content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read = []
        for i, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("text", "refusal") and isinstance(part.get(kind), str):
                read.append({"type": "text", "text": escape_special_tokens(part[kind])})
            elif kind == "image_url" and role == "user":
                self._add(part, f"{where}.content[{i}].image_url", pictures)
                read.append({"type": "image"})
            else:
                sentence = f"A part is a text, or in a user's message an image_url, not {brief(kind)}."
                raise ApiError(400, sentence, "invalid_value", f"{where}.content[{i}]")
        return {"role": role, "content": read}

    def _add(self, part: dict, where: str, pictures: list[ImageFile]) -> None:
        """The image of a part, if there are not too many or too large ones."""
        if len(pictures) == MAX_IMAGES:
            raise ApiError(400, f"A request has at most {MAX_IMAGES} pictures.", "too_large", where)
        pictures.append(self._picture(part, where))
        if sum(picture.width * picture.height for picture in pictures) > MAX_PIXELS:
            sentence = f"A request's pictures have at most {MAX_PIXELS // 1_000_000} million pixels in all."
            raise ApiError(400, sentence, "too_large", where)

    def _picture(self, part: dict, where: str) -> ImageFile:
        given = part.pop("image_url", None)
        given = {"url": given} if isinstance(given, str | bytes) else given
        url, detail = (given.get("url"), given.get("detail")) if isinstance(given, dict) else (None, None)
        detail = "high" if detail in (None, "auto") else detail
        if detail not in DETAILS:
            sentence = f"detail is auto, {' or '.join(DETAILS)}, not {brief(detail)}."
            raise ApiError(400, sentence, "invalid_image", where)
        try:
            return ImageFile.from_bytes(self._content(url, where), detail, where)
        except PictureError as error:
            raise ApiError(400, str(error), "invalid_image", where) from error

    def _content(self, url, where: str) -> bytes:
        """The bytes of a data URI; those of an address are here already (`ov_mllama.serving.addresses`)."""
        if isinstance(url, bytes):
            return url
        if not isinstance(url, str):
            raise ApiError(400, "An image_url has a url.", "invalid_value", where)
        if match := DATA_URI.match(url):
            encoded = "".join(unquote(url[match.end() :]).split())
            try:
                return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
            except ValueError as error:  # characters beyond ASCII too
                raise ApiError(400, "The picture is no base64.", "invalid_base64", where) from error
        if not url.startswith(("http://", "https://")):
            raise ApiError(400, "A picture is a data URI, data:image/...;base64,...", "invalid_image_url", where)
        sentence = "Pictures are not fetched from addresses here: send a data URI, data:image/...;base64,..."
        raise ApiError(400, sentence, "invalid_image_url", where)


def brief(given) -> str:
    """Something that a client sent, to be quoted to it."""
    text = repr(given)
    return text if len(text) <= 50 else f"{text[:47]}..."


def check_neutral(extra: dict) -> None:
    """Raises ApiError: a parameter would change the answer and is not supported."""
    for name, given in extra.items():
        if name in NEUTRAL and given is not None and given not in ("", [], {}, *NEUTRAL[name]):
            raise ApiError(400, f"{name} is not supported: leave it out.", "unsupported_parameter", name)


def stops_of(given: str | list[str] | None) -> tuple[str, ...]:
    """Texts to stop at."""
    stops = [given] if isinstance(given, str) else given or []
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        sentence = f"stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters."
        raise ApiError(400, sentence, "invalid_value", "stop")
    return tuple(stops)


def schema_of(request: Request) -> dict | None:
    """The JSON schema that a request asks for; None for free text."""
    form, guided = request.response_format, request.guided_json
    if guided is not None:
        if form is not None and form.type != "text":
            raise ApiError(400, "Give response_format or guided_json, not both.", "invalid_value", "guided_json")
        return checked_schema(guided, "guided_json")
    if form is None:
        return None
    given = form.json_schema.schema_ if form.json_schema else form.schema_
    if form.type == "text":
        if given:
            sentence = "A schema is for a response_format of the type json_schema or json_object."
            raise ApiError(400, sentence, "invalid_value", "response_format.type")
        return None
    if given is None and form.type == "json_schema":
        raise ApiError(400, "response_format lacks its json_schema.", "invalid_value", "response_format.json_schema")
    return checked_schema({"type": "object"} if given is None else given, "response_format.json_schema")


def checked_schema(given: dict | str, where: str) -> dict:
    """A JSON schema of bounded length; vLLM takes its text too."""
    try:
        if isinstance(given, str):
            given = json.loads(given[: SCHEMA_CHARS + 1])
        length = len(json.dumps(given))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The schema is no JSON.", "invalid_json_schema", where) from error
    if not isinstance(given, dict) or length > SCHEMA_CHARS:
        sentence = f"A schema is a JSON object of at most {SCHEMA_CHARS} characters."
        raise ApiError(400, sentence, "invalid_json_schema", where)
    return given
