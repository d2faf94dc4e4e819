"""OpenAI's wire format: the body of a chat completion request, checks of its parameters, and errors."""

import logging
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)

MAX_STOPS, MAX_STOP_CHARS = 16, 200
MAX_CHOICES = 8  # `n`
MAX_LOGPROBS = 20  # `top_logprobs`
MAX_TOKEN_IDS = 1024  # in logit_bias and stop_token_ids
# Parameters that would change the answer and are not supported -> values with which they change nothing, beside null
# and empty ones
NEUTRAL: dict[str, tuple] = {
    # OpenAI's
    "functions": (),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    # vLLM's, SGLang's and llama.cpp's
    "allowed_token_ids": (),
    "bad_words": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "ebnf": (),
    "echo": (False,),
    "grammar": (),
    "guided_whitespace_pattern": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "mm_processor_kwargs": (),
    "n_predict": (-1,),
    "n_probs": (0,),
    "prompt_logprobs": (0, False),
    "regex": (),
    "skip_special_tokens": (True,),
    "stop_regex": (),
    "structural_tag": (),
    "tfs_z": (1,),
    "thinking_token_budget": (),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}


class ApiError(Exception):
    """An error that is returned to the client.

    Args:
        status: HTTP status code.
        message: one sentence that names the fix.
        code: OpenAI's error code.
        param: path of the invalid field.
        error_type: OpenAI's error type.
        headers: additional response headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        error_type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def internal_error(error: BaseException) -> ApiError:
    """Log an unexpected error; the client gets the log entry's number and none of its text."""
    number = secrets.token_hex(4)
    logger.error("Error %s", number, exc_info=error)
    if isinstance(error, MemoryError):
        message = f"There is too little memory for this now (error {number} in the server's log)."
        return ApiError(503, message, "out_of_memory", error_type="server_error", headers={"Retry-After": "30"})
    message = f"The server could not answer (error {number} in its log)."
    return ApiError(500, message, "internal_error", error_type="server_error")


class StreamOptions(BaseModel):
    """`stream_options` of a request."""

    include_usage: bool | None = False


class JsonSchema(BaseModel):
    """`json_schema` of a response format."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """`response_format` of a request."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # with json_object, as llama.cpp and others have it


class ChatCompletionRequest(BaseModel):
    """Body of POST /v1/chat/completions, as far as it is supported."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=-1, lt=2**31)  # -1 and 0: none, as for many clients
    max_completion_tokens: int | None = Field(None, ge=-1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # this and min_p as in vLLM; 0 or -1: all tokens
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=0, le=MAX_CHOICES)  # 0: 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None  # this and the next three as in earlier versions of vLLM
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None  # vLLM's present name: {"json": schema}, {"regex": ...}, ...
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)  # vLLM's name
    repeat_penalty: float | None = Field(None, gt=0, le=10)  # llama.cpp's and Ollama's
    repeat_last_n: int | None = Field(None, ge=-1, lt=2**31)  # tokens that penalties regard; -1: all, 0: no penalties
    logit_bias: dict[int, float] | None = Field(None, max_length=MAX_TOKEN_IDS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_TOKEN_IDS)
    continue_final_message: bool | None = None  # this and add_generation_prompt as in vLLM
    add_generation_prompt: bool | None = None

    @property
    def prompts(self) -> list[str | None]:
        """Texts that are continued without the chat template; [None] for `messages`."""
        return [None]

    @property
    def token_limit(self) -> int | None:
        """Maximum number of new tokens; None if the request sets none."""
        limits = (self.max_completion_tokens, self.max_tokens)
        return next((limit for limit in limits if limit and limit > 0), None)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings.

        Raises:
            ApiError: if there are too many, or one is too long.
        """
        stops = list(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or []))
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
            message = f"stop takes up to {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters."
            raise ApiError(400, message, "invalid_value", "stop")
        return tuple(stops)

    @property
    def penalties(self) -> dict[str, Any]:
        """Penalties under their names in `GenerationRequest`.

        Raises:
            ApiError: if the same one is given twice.
        """
        if self.repeat_last_n == 0:
            return {"repetition_penalty": 1.0}
        if None not in (self.repetition_penalty, self.repeat_penalty):
            message = "Give repetition_penalty or repeat_penalty, not both."
            raise ApiError(400, message, "invalid_value", "repeat_penalty")
        return {
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": self.repetition_penalty or self.repeat_penalty,
            "penalty_window": max(0, self.repeat_last_n or 0),
        }

    def biases(self, vocab_size: int) -> dict[int, float]:
        """Return `logit_bias`.

        Raises:
            ApiError: if a token or value is out of range.
        """
        biases = self.logit_bias or {}
        if not all(0 <= token < vocab_size and -100 <= bias <= 100 for token, bias in biases.items()):
            message = f"logit_bias maps tokens below {vocab_size} to values from -100 to 100."
            raise ApiError(400, message, "invalid_value", "logit_bias")
        return biases

    @property
    def num_logprobs(self) -> int | None:
        """`top_logprobs` of each token; None for no log probabilities.

        Raises:
            ApiError: if `top_logprobs` is given without `logprobs`.
        """
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", "invalid_value", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    def check_supported(self) -> None:
        """Check that no parameter would change the answer without being supported.

        Raises:
            ApiError: naming the parameter.
        """
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value is not None and value not in ("", [], {}, *NEUTRAL[name]):
                raise ApiError(400, f"{name} is not supported: leave it out.", "unsupported_parameter", name)
        if self.add_generation_prompt is False and not self.continue_final_message:
            message = "add_generation_prompt: false needs continue_final_message: true."
            raise ApiError(400, message, "unsupported_parameter", "add_generation_prompt")


class CompletionRequest(ChatCompletionRequest):
    """Body of POST /v1/completions, with the parameters of a chat completion.

    Attributes:
        prompt: text to continue, or several.
        logprobs: what `top_logprobs` is in chat completions.
    """

    messages: list[dict[str, Any]] = Field(default_factory=list, max_length=0)
    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)  # type: ignore[assignment]

    @property
    def prompts(self) -> list[str | None]:
        return [self.prompt] if isinstance(self.prompt, str) else [*self.prompt]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check_supported(self) -> None:
        super().check_supported()
        if not 0 < len(self.prompts) * (self.n or 1) <= MAX_CHOICES:
            message = f"A request has 1 to {MAX_CHOICES} prompts and choices in all."
            raise ApiError(400, message, "invalid_value", "prompt")
        for name in ("suffix", "continue_final_message", "tools"):
            if getattr(self, name, None):
                message = f"{name} is not supported by /v1/completions: leave it out."
                raise ApiError(400, message, "unsupported_parameter", name)


def brief(value) -> str:
    """Return a client's value, shortened, for an error message."""
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:47]}..."
