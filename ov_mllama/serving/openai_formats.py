"""Answers in the formats of OpenAI's chat and text completions, complete or as streams."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from ov_mllama.serving.logprobs import chat_logprobs
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest
from ov_mllama.serving.sequences import PendingRequest
from ov_mllama.serving.streaming import complete_texts, finish_reason_of, remarks_of

COMPACT = (",", ":")  # separators of JSON, as OpenAI sends it


def usage_of(pendings: Sequence[PendingRequest], n: int | None) -> dict[str, int]:
    """Return the token counts of a request, which has `n` choices for each prompt."""
    prompts = sum(pending.sequence.num_prompt_tokens for pending in pendings[:: n or 1])
    answers = sum(pending.sequence.num_tokens for pending in pendings)
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}


def logprobs_of(pending: PendingRequest, first: int = 0) -> dict[str, Any] | None:
    """Return the log probabilities of an answer's tokens from `first` on, None if they are not requested."""
    if pending.request.logprobs is None:
        return None
    sequence = pending.sequence
    return chat_logprobs(sequence.detokenizer.tokenizer, sequence.logprobs[first:])


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

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        pending = self.pendings[index]
        message = {"role": "assistant", "content": text}
        reason = finish_reason_of(pending)
        return {"index": index, "finish_reason": reason, "message": message, "logprobs": logprobs_of(pending)}

    # ---- Streams ----

    def _event(self, choices: list[dict[str, Any]], **fields) -> str:
        return event({**self._head(self.kind_of_chunk), "choices": choices, **fields})

    def _delta(self, index: int, finish_reason: str | None = None, **delta) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        pending, first = self.pendings[index], self._num_logprobs[index]
        if new := len(pending.sequence.logprobs) - first:
            self._num_logprobs[index] += new
            choice["logprobs"] = logprobs_of(pending, first)
        return choice

    def begin(self) -> str:
        indices = range(len(self.pendings))
        return "".join(self._event([self._delta(index, role="assistant", content="")]) for index in indices)

    def waiting(self) -> str:
        return ": waiting\n\n"  # a comment

    def chunk(self, text: str, index: int = 0) -> str:
        return self._event([self._delta(index, content=text)])

    def end(self) -> str:
        reasons = map(finish_reason_of, self.pendings)
        remarks = remarks_of(self.pendings)
        ends = [self._event([self._delta(index, reason)], **remarks) for index, reason in enumerate(reasons)]
        options = self.request.stream_options
        if options and options.include_usage:
            ends.append(self._event([], usage=usage_of(self.pendings, self.request.n)))
        return "".join([*ends, "data: [DONE]\n\n"])

    def error(self, error: ApiError) -> str:
        return event(error.body)


class TextFormat(ChatFormat):
    """Format of a text completion."""

    prefix, kind, kind_of_chunk = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        reason = finish_reason_of(self.pendings[index])
        return {"index": index, "finish_reason": reason, "text": text, "logprobs": None}

    def _delta(self, index: int, finish_reason: str | None = None, **delta) -> dict[str, Any]:
        text = delta.get("content", "")
        return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None}

    def begin(self) -> str:
        return ""
