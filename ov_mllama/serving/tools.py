"""Tools in conversations: the prompt that offers them, and the calls that an answer consists of."""

import ast
import json
import re
import secrets
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import jinja2

from ov_mllama.runtime.prompts import escape_special_tokens
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ApiError
from ov_mllama.serving.sequences import PendingRequest

PYTHON_TAG = "<|python_tag|>"  # begins a call, sometimes
MAX_CALL_CHARS = 100_000  # longer answers are texts
CALL_SEPARATORS = re.compile(r"[\s;,]*")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool in an answer."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_openai(self) -> dict[str, Any]:
        """Return the call as chat completions have it."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": self.id, "type": "function", "function": function}

    def as_ollama(self) -> dict[str, Any]:
        """Return the call as Ollama has it."""
        return {"function": {"name": self.name, "arguments": self.arguments}}


# ---- Prompts --------------------------------------------------------------------------------------------------------


def knows_tools(processor) -> bool:
    """Return whether a model's chat template has tools."""
    template = str(processor.chat_template)
    return "tools" in template and "tool_calls" in template


def apply_tools(processor, request: GenerationRequest) -> GenerationRequest:
    """Return a request whose prompt offers its tools, and whose earlier calls are separate turns.

    Raises:
        ApiError: if the chat template has no tools or refuses the conversation, or there is an image in it.
    """
    has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in request.messages)
    if not (request.tools or has_calls):
        return request
    param = "tools" if request.tools else "messages"
    if not knows_tools(processor):
        message = "The model does not support tools, as its chat template has none: use response_format with a schema."
        raise ApiError(400, message, "unsupported_parameter", param)
    if request.tools and request.images:
        message = "Tool calling does NOT work with images (Meta's model card): leave out the tools or the images."
        raise ApiError(400, message, "unsupported_parameter", param)
    request.messages = one_call_each(request.messages)
    if request.tools:
        messages = [{**message, "content": joined(message["content"])} for message in request.messages]
        tools = json.loads(escape_special_tokens(json.dumps(request.tools, ensure_ascii=False)))
        try:
            prompt = processor.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, RecursionError) as error:
            message = f"The model's chat template refuses the conversation: {error}"
            raise ApiError(400, message[:500], "invalid_value", "messages") from error
        request.raw_prompt = prompt + request.prefill
    return request


def joined(content: str | list[dict[str, Any]]) -> str:
    """Return the text of a message without images, as templates that insert tools expect it."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split messages with several calls into messages of one call, each before its result: the template takes no
    others."""
    split, rest = list[dict[str, Any]](), deque(messages)
    while rest:
        message, results = rest.popleft(), list[dict[str, Any]]()
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            split.append(message)
            continue
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        for call in calls:
            split.append({**message, "tool_calls": [call]})
            if result := next((each for each in results if each["tool_call_id"] == call["id"]), None):
                results.remove(result)
                split.append(result)
        split += results
    return split


# ---- Answers --------------------------------------------------------------------------------------------------------


class CallSplitter:
    """Separation of an answer's text from the calls that it may consist of instead."""

    def __init__(self, pending: PendingRequest):
        self._pending = pending
        self._names = {tool["function"]["name"] for tool in pending.request.tools}
        self._may_be_call, self._text = bool(self._names), ""

    def put(self, text: str) -> str:
        """Add a part of the answer, and return the text that is surely none of a call."""
        if not self._may_be_call:
            return text
        self._text += text
        if not self._text.strip() or self._text.lstrip()[0] in "{[" or self._is_tagged:
            return ""
        self._may_be_call, text, self._text = False, self._text, ""
        return text

    def end(self) -> tuple[str, list[ToolCall]]:
        """Return the text that is left, and the calls, at the end of the answer."""
        calls = parse_calls(self._text, self._names) if self._may_be_call else []
        return "" if calls else self._text, calls

    @property
    def _is_tagged(self) -> bool:
        detokenizer = self._pending.sequence.detokenizer
        return detokenizer.tokens[:1] == [detokenizer.tokenizer.convert_tokens_to_ids(PYTHON_TAG)]


def parse_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """Return the calls that an answer consists of: JSON objects, or a Python expression; [] if it is a text."""
    if len(text) > MAX_CALL_CHARS:
        return []
    for parse in (json_calls, python_calls):
        try:
            calls = parse(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if calls and all(call.name in names for call in calls):
            return calls
    return []


def json_calls(text: str) -> list[ToolCall]:
    """Parse {"name": ..., "parameters": {...}}, several of them separated by semicolons, or in a list.

    Raises:
        ValueError, TypeError: if the text is another one.
    """
    values, decoder, at = [], json.JSONDecoder(), 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values += value if isinstance(value, list) else [value]
        at = CALL_SEPARATORS.match(text, at).end()  # type: ignore[union-attr]
    return [ToolCall(value["name"], arguments_of(value)) for value in values if check_call(value)]


def check_call(value: Any) -> bool:
    """Return True for a call.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    return True


def arguments_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, which some models write as a string.

    Raises:
        ValueError: if they are no object.
    """
    arguments = call.get("parameters", call.get("arguments"))
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    return arguments


def python_calls(text: str) -> list[ToolCall]:
    """Parse `name(key=value)`, `name.call(key=value)` or a list of them, values being literals.

    Raises:
        ValueError, SyntaxError: if the text is another one.
    """
    body = ast.parse(text, mode="eval").body
    calls = []
    for node in body.elts if isinstance(body, ast.List) else [body]:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("no call")
        name = ast.unparse(node.func).removesuffix(".call")
        calls.append(ToolCall(name, {str(each.arg): ast.literal_eval(each.value) for each in node.keywords}))
    return calls
