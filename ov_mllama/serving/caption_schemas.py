"""Answers that match a JSON schema, in batches of `generate`. Needs llguidance, of the extra `serve`."""

import torch
from llguidance import LLMatcher
from transformers import LogitsProcessor

from ov_mllama.runtime.errors import InputError
from ov_mllama.serving.grammars import json_grammar
from ov_mllama.serving.protocol import ApiError
from ov_mllama.serving.sampling import GrammarCompiler, mask_logits


def matcher_for(tokenizer, schema: str, eos_token_ids: list[int]) -> LLMatcher:
    """Compile a JSON schema.

    Raises:
        InputError: if it is invalid or too complex.
    """
    try:
        return GrammarCompiler(tokenizer, eos_token_ids).compile(json_grammar(schema, "schema"))
    except ApiError as error:
        raise InputError(str(error)) from error


class SchemaProcessor(LogitsProcessor):
    """Logits processor that leaves the tokens which a schema allows, and an end token after a complete answer.

    Attributes:
        errors: by row, why an answer ended early.
    """

    def __init__(self, matcher: LLMatcher, rows: int, eos_token_ids: list[int]):
        self._matchers = [matcher.deep_copy() for _ in range(rows)]
        self._eos_token_ids, self._begun = eos_token_ids, False
        self.errors: dict[int, str] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf)
        for row, (matcher, token) in enumerate(zip(self._matchers, input_ids[:, -1].tolist(), strict=True)):
            if self._begun and not matcher.is_stopped():
                matcher.consume_token(token)
            try:
                if not matcher.is_stopped():
                    masked[row] = mask_logits(scores[row], matcher)
                    continue
            except ApiError as error:
                self.errors.setdefault(row, str(error))
            masked[row, self._eos_token_ids[0]] = 0
        self._begun = True
        return masked
