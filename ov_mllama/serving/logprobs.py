"""Log probabilities of an answer's tokens, by the model alone: before penalties, temperature and schemas."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token.

    Attributes:
        top: the most probable tokens there, with theirs.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """Return the log probability of a token and of the `count` most probable ones, for logits f32 [vocabulary]."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))


def chat_logprobs(tokenizer, logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """Return log probabilities as chat completions have them."""
    content = [
        {**as_openai(tokenizer, each.token, each.logprob), "top_logprobs": [as_openai(tokenizer, *t) for t in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer, logprobs: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """Return log probabilities as text completions have them.

    Args:
        offset: where the first token begins in the answer's text.
    """
    tokens = [tokenizer.decode([each.token]) for each in logprobs]
    offsets = list(accumulate(map(len, tokens), initial=offset))
    top = [{tokenizer.decode([token]): value for token, value in each.top} for each in logprobs]
    values = [each.logprob for each in logprobs]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets[:-1]}


def as_openai(tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """Return a token with its log probability; `bytes` is null for a part of a character."""
    text = tokenizer.decode([token])
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
