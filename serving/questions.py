"""A request in OpenAI's form -> a `Question` for the model, or a refusal in OpenAI's form."""

import base64
import binascii
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ov_mllama.conversation import plain
from ov_mllama.images import at_detail, open_picture

DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[^,;]+)*;base64,", re.ASCII | re.IGNORECASE)
MAX_PIXELS = 100_000_000  # of a request's pictures: 0.3 GB, while they wait
# What would change the answer and is not there: refused, unless it asks for nothing
UNSUPPORTED = ("tools", "functions", "logit_bias", "logprobs", "frequency_penalty", "presence_penalty", "audio")


class Refusal(Exception):
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


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchema(BaseModel):
    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class Request(BaseModel):
    """The body of POST /v1/chat/completions, as far as it is understood."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have."""
        return self.max_completion_tokens or self.max_tokens


@dataclass
class Question:
    """What the model is asked.

    Attributes:
        messages: for the chat template; their texts are `plain`.
        pictures: in the template's order.
        max_new_tokens: the answer's limit.
        temperature, top_p, seed: of sampling; a temperature of 0 takes the likeliest token.
        stop: texts before which an answer ends.
        schema: a JSON schema that the answer follows; None for free text.
    """

    messages: list[dict]
    pictures: list[Image.Image] = field(default_factory=list)
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: dict | None = None


class Reader:
    """Reads requests.

    Args:
        tile: side in pixels of the model's tiles, for `detail`.
        max_new_tokens: of a request that names no limit.
        addresses: whether pictures may be fetched from the network.
    """

    def __init__(self, tile: int, max_new_tokens: int = 512, addresses: bool = False):
        self.tile, self.max_new_tokens, self.addresses = tile, max_new_tokens, addresses

    def read(self, request: Request) -> Question:
        """Opens pictures, so it belongs into a thread.

        Raises:
            Refusal: what is not understood, and pictures that cannot be used.
        """
        extra = request.model_extra or {}
        for name in UNSUPPORTED:
            if extra.get(name):
                raise Refusal(400, f"{name} is not supported: leave it out.", "unsupported_parameter", name)
        if (request.n or 1) != 1:
            raise Refusal(400, "n must be 1: ask several times.", "unsupported_value", "n")
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stop) > 4 or not all(stop):
            raise Refusal(400, "stop takes up to 4 texts, none of them empty.", "invalid_value", "stop")
        pictures: list[Image.Image] = []
        messages = [self._message(message, i, pictures) for i, message in enumerate(request.messages)]
        return Question(
            messages,
            pictures,
            request.limit or self.max_new_tokens,
            request.temperature or 0.0,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            tuple(stop),
            schema_of(request.response_format),
        )

    def _message(self, message: dict, number: int, pictures: list[Image.Image]) -> dict:
        where, role = f"messages[{number}]", message.get("role")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise Refusal(400, f"A role is system, user or assistant, not {role!r}.", "invalid_value", f"{where}.role")
        content = message.get("content") or ""
        if not isinstance(content, str | list):
            raise Refusal(400, "A content is a text or a list of parts.", "invalid_value", f"{where}.content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read = []
        for i, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("text", "refusal") and isinstance(part.get(kind), str):
                read.append({"type": "text", "text": plain(part[kind])})
            elif kind == "image_url" and role == "user":
                field = f"{where}.content[{i}].image_url"
                pictures.append(self._picture(part, field))
                if sum(picture.width * picture.height for picture in pictures) > MAX_PIXELS:
                    sentence = f"A request's pictures have at most {MAX_PIXELS // 1_000_000} million pixels in all."
                    raise Refusal(400, sentence, "too_large", field)
                read.append({"type": "image"})
            else:
                sentence = f"A part is a text, or in a user's message an image_url, not {kind!r}."
                raise Refusal(400, sentence, "invalid_value", f"{where}.content[{i}]")
        return {"role": role, "content": read}

    def _picture(self, part: dict, where: str) -> Image.Image:
        given = part.get("image_url")
        given = {"url": given} if isinstance(given, str) else given
        url, detail = (given.get("url"), given.get("detail")) if isinstance(given, dict) else (None, None)
        if not isinstance(url, str):
            raise Refusal(400, "An image_url has a url.", "invalid_value", where)
        source: str | bytes = url
        if match := DATA_URI.match(url):
            encoded = "".join(unquote(url[match.end() :]).split())
            try:
                source = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
            except binascii.Error as error:
                raise Refusal(400, "The picture is no base64.", "invalid_base64", where) from error
        elif not url.startswith(("http://", "https://")):
            raise Refusal(400, "A picture is a data URI, data:image/...;base64,...", "invalid_image_url", where)
        elif not self.addresses:
            sentence = "Pictures are not fetched from addresses here: send a data URI, data:image/...;base64,..."
            raise Refusal(400, sentence, "invalid_image_url", where)
        try:
            picture = at_detail(open_picture(source), "high" if detail in (None, "auto") else detail, self.tile)
        except ValueError as error:
            raise Refusal(400, str(error), "invalid_image", where) from error
        picture.info["look"] = hash((url, detail))
        return picture


def schema_of(form: ResponseFormat | None) -> dict | None:
    """The JSON schema that a `response_format` asks for."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None:
        raise Refusal(400, "response_format lacks its json_schema.", "invalid_value", "response_format.json_schema")
    return form.json_schema.schema_
