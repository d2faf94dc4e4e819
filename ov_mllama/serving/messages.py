"""Messages of requests -> messages for the chat template and their images, in every form that is unambiguous."""

import io
import json
import re
from typing import Any

from ov_mllama.runtime.errors import ImageError
from ov_mllama.runtime.image_sources import decode_base64, is_pdf
from ov_mllama.runtime.images import DETAILS
from ov_mllama.runtime.prompts import escape_special_tokens
from ov_mllama.serving.images import MAX_REQUEST_IMAGES, ImageFile
from ov_mllama.serving.protocol import ApiError, brief

MAX_REQUEST_PIXELS = 100_000_000  # of all images: 0.3 GB while they are decoded
MIN_BASE64_CHARS = 40  # of an image without "data:"; shorter strings are names of files
DATA_URI = re.compile(r"data:([\w.+-]+(/[\w.+-]+)?)?(;[^,;]+)*;base64,\s*", re.ASCII | re.IGNORECASE)
TEXT_TYPES = ("text", "input_text", "output_text", "refusal")
IMAGE_TYPES = ("image_url", "input_image", "image", "file", "input_file")
# Fields of an image's part, in which it may be, and those of such a field, if it is an object
IMAGE_FIELDS = ("image_url", "image", "source", "url", "data", "base64", "file", "file_data")
URL_FIELDS = ("url", "data", "base64", "file_data")
ROLES = {"developer": "system", "ipython": "tool"}  # other names of roles -> ours
SYNONYMS = {"auto": "high", "original": "high"}  # values of `detail`
# Fields of messages that would change the answer and are not supported -> what to do instead
UNSUPPORTED = {
    "audio": "send text",
    "function_call": "send it as tool_calls",
    "images": "send them as parts of the content, of type image_url",
}


def convert_message(message: dict, param: str, images: list[ImageFile]) -> dict:
    """Return a message for the chat template, and append its images to `images`.

    Raises:
        ApiError: naming the field that is invalid or not supported.
    """
    role = message.get("role")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant", "tool"):
        error = f"A role is system, user, assistant or tool, not {brief(role)}."
        raise ApiError(400, error, "invalid_value", f"{param}.role")
    for name, advice in UNSUPPORTED.items():
        if message.get(name):
            raise ApiError(400, f"{name} is not supported: {advice}.", "unsupported_parameter", f"{param}.{name}")
    content = message.get("content") or ""
    if not isinstance(content, str | list):
        raise ApiError(400, "content must be a string or a list of parts.", "invalid_value", f"{param}.content")
    parts = [content] if isinstance(content, str) else content
    converted = []
    for i, part in enumerate(parts):
        path = f"{param}.content[{i}]"
        text = text_of(part)
        if text is not None:
            converted.append({"type": "text", "text": escape_special_tokens(text)})
        elif role == "user" and is_image(part):
            before = len(images)
            add_images(part, path, images)
            converted += [{"type": "image"}] * (len(images) - before)
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            error = f"A part is a text, or in a user's message an image_url, not {brief(kind)}."
            raise ApiError(400, error, "invalid_value", path)
    if role in ("system", "tool"):  # Meta's template writes them as a text
        result = {"role": role, "content": "".join(part["text"] for part in converted)}
        return {**result, "tool_call_id": message.get("tool_call_id")} if role == "tool" else result
    calls = convert_calls(message.get("tool_calls"), f"{param}.tool_calls") if role == "assistant" else []
    return {"role": role, "content": converted, **({"tool_calls": calls} if calls else {})}


def convert_calls(calls: Any, param: str) -> list[dict]:
    """Return an assistant's tool calls for the chat template, their arguments as objects.

    Raises:
        ApiError: if one is invalid.
    """
    converted = []
    for i, call in enumerate(calls if isinstance(calls, list) else []):
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else ("", "")
        try:
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments
            function = {"name": name, "arguments": arguments}
            function = json.loads(escape_special_tokens(json.dumps(function, ensure_ascii=False)))
        except (ValueError, RecursionError):
            function = {}
        if not (name and isinstance(function.get("name"), str) and isinstance(function["arguments"], dict)):
            error = "A call has a function with a name, and with arguments that are a JSON object."
            raise ApiError(400, error, "invalid_value", f"{param}[{i}]")
        converted.append({"id": call.get("id"), "type": "function", "function": function})
    return converted


def text_of(part: Any) -> str | None:
    """Return the text of a part, None if it is another one."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") not in TEXT_TYPES:
        return None
    text = part.get("refusal" if part.get("type") == "refusal" else "text")
    return "" if text is None and part.get("type") in TEXT_TYPES else text if isinstance(text, str) else None


def is_image(part: Any) -> bool:
    """Return whether a part is an image, or an object without a type that has one."""
    if not isinstance(part, dict):
        return False
    return part.get("type") in IMAGE_TYPES or ("type" not in part and any(part.get(name) for name in IMAGE_FIELDS[:2]))


def normalize_image(part: dict, param: str) -> tuple[dict, str]:
    """Rewrite an image's part as OpenAI has it: {"type": "image_url", "image_url": {"url", "detail"}}.

    Returns:
        Its `image_url`, and the path of the field that had the image.
    Raises:
        ApiError: if there is no image in the part, or several.
    """
    fields = [name for name in IMAGE_FIELDS if part.get(name)]
    if len(fields) != 1:
        message = f"An image has one of the fields {', '.join(IMAGE_FIELDS)}, not {len(fields)}."
        raise ApiError(400, message, "invalid_value", param)
    source = part[fields[0]]
    image = source if isinstance(source, dict) else {"url": source}
    given = [image[name] for name in URL_FIELDS if image.get(name)]
    if len(given) != 1:
        raise ApiError(400, "An image needs a url.", "invalid_value", f"{param}.{fields[0]}")
    url = given[0].strip() if isinstance(given[0], str) else given[0]
    field = image.get("field", fields[0])
    normalized = {"url": url, "detail": image.get("detail") or part.get("detail"), "field": field}
    part.clear()
    part.update(type="image_url", image_url=normalized)
    return normalized, f"{param}.{field}"


def is_web_url(url: Any) -> bool:
    """Return whether an image is one to fetch."""
    return isinstance(url, str) and url[:8].lower().startswith(("http://", "https://"))


def add_images(part: dict, param: str, images: list[ImageFile]) -> None:
    """Append a part's image, or the pages of its PDF, to `images`.

    Raises:
        ApiError: if it is invalid, or there are too many images or pixels.
    """
    source, param = normalize_image(part, param)
    added = parse_images(source, param)
    if len(images) + len(added) > MAX_REQUEST_IMAGES:
        raise ApiError(400, f"A request takes at most {MAX_REQUEST_IMAGES} images.", "too_large", param)
    images += added
    if sum(image.width * image.height for image in images) > MAX_REQUEST_PIXELS:
        message = f"A request takes at most {MAX_REQUEST_PIXELS // 1_000_000} million pixels in all its images."
        raise ApiError(400, message, "too_large", param)


def parse_images(source: dict, param: str) -> list[ImageFile]:
    """Return an image of `normalize_image`, or the pages of a PDF, which is moved out of it."""
    detail = str(source.get("detail") or "auto").strip().lower()
    detail = SYNONYMS.get(detail, detail)
    if detail not in DETAILS:
        message = f"detail is {', '.join(SYNONYMS)}, {' or '.join(DETAILS)}, not {brief(detail)}."
        raise ApiError(400, message, "invalid_image", param)
    data = image_bytes(source.pop("url"), param)
    try:
        if is_pdf(io.BytesIO(data)):
            return ImageFile.pages_of(data, detail, param)
        return [ImageFile.from_bytes(data, detail, param)]
    except ImageError as error:
        raise ApiError(400, str(error), "invalid_image", param) from error


def image_bytes(url: Any, param: str) -> bytes:
    """Return the bytes of a data URI or of base64; images of other URLs have been replaced by bytes
    (`image_urls.fetch_images`)."""
    if isinstance(url, bytes):
        return url
    if not isinstance(url, str):
        raise ApiError(400, "An image needs a url.", "invalid_value", param)
    if is_web_url(url):
        message = "This server does not fetch image URLs: send a data URI, data:image/...;base64,..."
        raise ApiError(400, message, "invalid_image_url", param)
    encoded = url[2:-1] if url[:2] in ("b'", 'b"') and url[-1:] == url[1] else url  # printed by Python
    is_uri = False
    while match := DATA_URI.match(encoded):  # some programs add it twice
        encoded, is_uri = encoded[match.end() :], True
    if not is_uri and (len(encoded) < MIN_BASE64_CHARS or ":" in encoded[:MIN_BASE64_CHARS]):
        raise ApiError(400, "An image must be a data URI: data:image/...;base64,...", "invalid_image_url", param)
    try:
        return decode_base64(encoded)
    except ImageError as error:
        raise ApiError(400, "The image is not valid base64.", "invalid_base64", param) from error
