"""Answers in the formats of OpenAI's chat and text completions, complete or as streams."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from ov_mllama.serving.logprobs import TokenLogprob, chat_logprobs, text_logprobs
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_texts, finish_reason_of, remarks_of
from ov_mllama.serving.tools import CallSplitter, ToolCall

COMPACT = (",", ":")  # separators of JSON, as OpenAI sends it


def usage_of(pendings: Sequence[PendingRequest], n: int | None) -> dict[str, int]:
    """Return the token counts of a request, which has `n` choices for each prompt."""
    prompts = sum(pending.sequence.num_prompt_tokens for pending in pendings[:: n or 1])
    answers = sum(pending.sequence.num_tokens for pending in pendings)
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, separators=COMPACT)}\n\n"


class ChatFormat:
    """Format of a chat completion, complete or as a stream of server-sent events.

    A chunk has the log probabilities of all tokens that are there by then, also of those whose text comes later.
    """

    media_type = "text/event-stream"
    prefix, kind, kind_of_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, pendings: Sequence[PendingRequest], request: ChatCompletionRequest):
        self.pendings, self.request = pendings, request
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._num_logprobs = [0] * len(pendings)  # that are sent
        self._splitters = [CallSplitter(pending) for pending in pendings]

    async def full_response(self, http: HttpRequest) -> JSONResponse:
        """Return the complete answers.

        Raises:
            ApiError: if the request failed.
        """
        texts = await complete_texts(self.pendings, http)
        choices = [self._choice(index, text) for index, text in enumerate(texts)]
        usage = usage_of(self.pendings, self.request.n)
        return JSONResponse({**self._head(self.kind), "choices": choices, "usage": usage, **remarks_of(self.pendings)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.request.model}

    def _logprobs(self, index: int) -> dict[str, Any] | None:
        """Return the log probabilities of an answer's tokens that are not sent yet, None if they are not requested."""
        sequence = self.pendings[index].sequence
        if self.pendings[index].request.logprobs is None:
            return None
        new = sequence.logprobs[self._num_logprobs[index] :]
        self._num_logprobs[index] += len(new)
        return self._format_logprobs(sequence.detokenizer.tokenizer, new, index)

    def _format_logprobs(self, tokenizer, logprobs: list[TokenLogprob], index: int) -> dict[str, Any]:
        return chat_logprobs(tokenizer, logprobs)

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        pending = self.pendings[index]
        text = self._splitters[index].put(text)
        rest, calls = self._rest(index)
        message: dict[str, Any] = {"role": "assistant", "content": text + rest}
        reason: str = finish_reason_of(pending)
        if calls:
            message |= {"content": None, "tool_calls": [call.as_openai() for call in calls]}
            reason = "tool_calls"
        return {"index": index, "finish_reason": reason, "message": message, "logprobs": self._logprobs(index)}

    def _rest(self, index: int) -> tuple[str, list[ToolCall]]:
        """Return what is left of an answer at its end: text, or tool calls."""
        text, calls = self._splitters[index].end()
        return text, calls[:1] if self.request.parallel_tool_calls is False else calls

    # ---- Streams ----

    def _event(self, choices: list[dict[str, Any]], **fields) -> str:
        return event({**self._head(self.kind_of_chunk), "choices": choices, **fields})

    def _delta(self, index: int, finish_reason: str | None = None, **delta) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        if len(self.pendings[index].sequence.logprobs) > self._num_logprobs[index]:
            choice["logprobs"] = self._logprobs(index)
        return choice

    def begin(self) -> str:
        indices, content = range(len(self.pendings)), None if self.pendings[0].request.tools else ""
        return "".join(self._event([self._delta(index, role="assistant", content=content)]) for index in indices)

    def waiting(self) -> str:
        return ": waiting\n\n"  # a comment

    def chunk(self, text: str, index: int = 0) -> str:
        text = self._splitters[index].put(text)
        return self._event([self._delta(index, content=text)]) if text else self.waiting()

    def end(self) -> str:
        remarks = remarks_of(self.pendings)
        ends = [self._end(index, remarks) for index in range(len(self.pendings))]
        options = self.request.stream_options
        if options and options.include_usage:
            ends.append(self._event([], usage=usage_of(self.pendings, self.request.n)))
        return "".join([*ends, "data: [DONE]\n\n"])

    def _end(self, index: int, remarks: dict[str, list[str]]) -> str:
        """Return what ends a choice, with its tool calls."""
        text, calls = self._rest(index)
        reason = "tool_calls" if calls else finish_reason_of(self.pendings[index])
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        deltas += [{"tool_calls": [{"index": i, **call.as_openai()}]} for i, call in enumerate(calls)]
        events = [self._event([self._delta(index, **delta)]) for delta in deltas]
        return "".join([*events, self._event([self._delta(index, reason)], **remarks)])

    def error(self, error: ApiError) -> str:
        return event(error.body)


class TextFormat(ChatFormat):
    """Format of a text completion."""

    prefix, kind, kind_of_chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, pendings: Sequence[PendingRequest], request: ChatCompletionRequest):
        super().__init__(pendings, request)
        self._offsets = [0] * len(pendings)  # of the next token in the answer's text

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        reason = finish_reason_of(self.pendings[index])
        return {"index": index, "finish_reason": reason, "text": text, "logprobs": self._logprobs(index)}

    def _format_logprobs(self, tokenizer, logprobs: list[TokenLogprob], index: int) -> dict[str, Any]:
        result = text_logprobs(tokenizer, logprobs, self._offsets[index])
        self._offsets[index] += sum(map(len, result["tokens"]))
        return result

    def _delta(self, index: int, finish_reason: str | None = None, **delta) -> dict[str, Any]:
        text = delta.get("content", "")
        return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": self._logprobs(index)}

    def begin(self) -> str:
        return ""
