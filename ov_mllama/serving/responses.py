"""OpenAI's Responses API: POST /v1/responses with texts, images and tools, complete or streamed. Nothing is stored."""

import json
import secrets
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from ov_mllama.serving.openai_formats import COMPACT, usage_of
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest, brief
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_texts, finish_reason_of, remarks_of
from ov_mllama.serving.tools import CallSplitter, ToolCall

# Parameters that would change the answer and are not supported -> values with which they change nothing
NEUTRAL: dict[str, tuple] = {
    "background": (False,),
    "conversation": (),
    "include": (["reasoning.encrypted_content"],),  # there is none
    "previous_response_id": (),
    "prompt": (),
    "reasoning": (),
    "top_logprobs": (0,),
    "truncation": ("disabled", "auto"),
}
# Parameters of chat completions that are passed on
PASSED = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("tool_choice", "parallel_tool_calls"),
)


class TextOptions(BaseModel):
    """`text` of a request."""

    format: dict[str, Any] | None = None


class ResponsesRequest(BaseModel):
    """Body of POST /v1/responses, as far as it is supported.

    Attributes:
        input: a user's text, or messages.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=-1, lt=2**31)
    stream: bool | None = False
    text: TextOptions | None = None

    def chat_completion(self) -> ChatCompletionRequest:
        """Return the equivalent chat completion request; the input is moved out of this one.

        Raises:
            ApiError: naming the field that is invalid or not supported.
        """
        extra = self.model_extra or {}
        for name, neutral in NEUTRAL.items():
            value = extra.get(name)
            if value is not None and value not in ("", [], {}, *neutral):
                advice = "send the earlier turns as input" if name in ("previous_response_id", "conversation") else ""
                message = f"{name} is not supported: {advice or 'leave it out'}."
                raise ApiError(400, message, "unsupported_parameter", name)
        given, self.input = self.input, ""
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields = {name: extra[name] for name in PASSED if extra.get(name) is not None}
        try:
            return ChatCompletionRequest.model_validate(
                {
                    "model": self.model,
                    "messages": [*system, *messages_of(items)],
                    "tools": [chat_tool(tool) for tool in extra.get("tools") or []],
                    "max_tokens": self.max_output_tokens,
                    "response_format": self._response_format(),
                    **fields,
                }
            )
        except ValueError as error:
            wrong = getattr(error, "errors", lambda **_: [])(include_url=False, include_input=False)
            param = ".".join(map(str, wrong[0]["loc"])) if wrong else None
            message = f"{param}: {wrong[0]['msg'] if wrong else error}"
            raise ApiError(400, message[:500], "invalid_value", param) from None

    def _response_format(self) -> dict[str, Any] | None:
        """Return `text.format` as chat completions have it: there a schema's fields are one level deeper."""
        form = self.text.format if self.text else None
        if form and form.get("type") == "json_schema":
            return {"type": "json_schema", "json_schema": {name: form.get(name) for name in ("name", "schema")}}
        return form


def messages_of(items: list[Any]) -> list[dict[str, Any]]:
    """Return the items of the input as a chat completion's messages, calls one after the other as one message.

    Raises:
        ApiError: if one is neither a message nor a function's call or output.
    """
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else item
        if kind == "message":
            messages.append(item)
        elif kind == "function_call":
            function = {name: item.get(name) for name in ("name", "arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if messages and messages[-1].get("tool_calls"):
                messages[-1]["tool_calls"].append(call)
            else:
                messages.append({"role": "assistant", "tool_calls": [call]})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        else:
            message = f"An item of input is a message, function_call or function_call_output, not {brief(kind)}."
            raise ApiError(400, message, "invalid_value", f"input[{i}]")
    return messages


def chat_tool(tool: Any) -> Any:
    """Return a tool as chat completions have it: there a function's fields are one level deeper."""
    if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool:
        return {"type": "function", "function": tool}
    return tool


def renamed(error: ApiError) -> ApiError:
    """Return an error of the equivalent chat completion request, which names this API's field."""
    detail = error.body["error"]
    for theirs, ours in (
        ("messages", "input"),
        ("response_format", "text.format"),
        ("max_tokens", "max_output_tokens"),
    ):
        if str(detail["param"]).startswith(theirs):
            detail["param"] = ours
    return error


class ResponseFormat:
    """Format of an answer, complete or as a stream of server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, pending: PendingRequest, request: ResponsesRequest, model_name: str):
        self._pending, self._request, self._model_name = pending, request, model_name
        self._id, self._item_id = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._created, self._sent, self._number = int(time.time()), "", 0
        self._splitter, self._begun = CallSplitter(pending), False

    async def full_response(self, http: HttpRequest) -> JSONResponse:
        """Return the complete answer.

        Raises:
            ApiError: if the request failed.
        """
        [text] = await complete_texts([self._pending], http)
        text = self._splitter.put(text)
        rest, calls = self._splitter.end()
        return JSONResponse(self._finished([self._call_item(call) for call in calls] or [self._text_item(text + rest)]))

    def _response(self, status: str, output: list[dict[str, Any]], **fields) -> dict[str, Any]:
        extra = self._request.model_extra or {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": self._request.instructions,
            "max_output_tokens": self._request.max_output_tokens,
            "metadata": extra.get("metadata") or {},
            "model": self._model_name,
            "output": output,
            "parallel_tool_calls": bool(extra.get("parallel_tool_calls")),
            "previous_response_id": None,
            "store": False,
            "temperature": extra.get("temperature"),
            "text": {"format": (self._request.text and self._request.text.format) or {"type": "text"}},
            "tool_choice": extra.get("tool_choice") or "auto",
            "tools": extra.get("tools") or [],
            "top_p": extra.get("top_p"),
            "usage": None,
            **fields,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _text_item(self, text: str) -> dict[str, Any]:
        return self._message(self._status, [text_part(text)])

    def _call_item(self, call: ToolCall) -> dict[str, Any]:
        function = call.as_openai()["function"]
        item = {"id": f"fc_{call.id}", "type": "function_call", "call_id": call.id, "status": "completed"}
        return {**item, **function}

    def _finished(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        counts = usage_of([self._pending], 1)
        usage = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return self._response(
            self._status, output, usage=usage, incomplete_details=details, **remarks_of([self._pending])
        )

    @property
    def _status(self) -> str:
        return "incomplete" if finish_reason_of(self._pending) == "length" else "completed"

    # ---- Streams ----

    def _event(self, kind: str, **fields) -> str:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(data, separators=COMPACT)}\n\n"

    def _part_event(self, kind: str, **fields) -> str:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def begin(self) -> str:
        begun = self._response("in_progress", [])
        events = [self._event(f"response.{kind}", response=begun) for kind in ("created", "in_progress")]
        return "".join([*events, *([] if self._pending.request.tools else [self._begin_text()])])

    def _begin_text(self) -> str:
        self._begun = True
        item = self._message("in_progress", [])
        added = self._event("response.output_item.added", output_index=0, item=item)
        return added + self._part_event("response.content_part.added", part=text_part(""))

    def waiting(self) -> str:
        return ": waiting\n\n"  # a comment

    def chunk(self, text: str, index: int = 0) -> str:
        text = self._splitter.put(text)
        return self._delta(text) if text else self.waiting()

    def _delta(self, text: str) -> str:
        begin = "" if self._begun else self._begin_text()
        self._sent += text
        return begin + self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def end(self) -> str:
        rest, calls = self._splitter.end()
        if calls:
            events = [self._call_events(index, call) for index, call in enumerate(calls)]
            output = [self._call_item(call) for call in calls]
        else:
            events = [self._delta(rest)] if rest else [] if self._begun else [self._begin_text()]
            part, item = text_part(self._sent), self._text_item(self._sent)
            events += [
                self._part_event("response.output_text.done", text=self._sent, logprobs=[]),
                self._part_event("response.content_part.done", part=part),
                self._event("response.output_item.done", output_index=0, item=item),
            ]
            output = [item]
        return "".join([*events, self._event(f"response.{self._status}", response=self._finished(output))])

    def _call_events(self, index: int, call: ToolCall) -> str:
        """Return the events of a call, whose arguments come at once."""
        item = self._call_item(call)
        begun = {**item, "status": "in_progress", "arguments": ""}
        kind, place = "response.function_call_arguments", {"item_id": item["id"], "output_index": index}
        return "".join(
            [
                self._event("response.output_item.added", output_index=index, item=begun),
                self._event(f"{kind}.delta", **place, delta=item["arguments"]),
                self._event(f"{kind}.done", **place, name=item["name"], arguments=item["arguments"]),
                self._event("response.output_item.done", output_index=index, item=item),
            ]
        )

    def error(self, error: ApiError) -> str:
        detail = error.body["error"]
        return self._event("error", code=detail["code"], message=detail["message"], param=detail["param"])


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
