"""Answers of `generate` that match a grammar, by llguidance."""

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from transformers import LogitsProcessor

from ov_mllama.runtime.errors import InputError


def schema_source(schema: dict) -> str:
    """Return a JSON schema as llguidance reads it.

    Raises:
        ValueError, RecursionError: if it is invalid.
    """
    # or an unsure model writes blanks without end
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


class MatcherCompiler:
    """Compiler of grammars for a tokenizer.

    Args:
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer, eos_token_ids: list[int]):
        self._tokenizer, self._eos_token_ids = tokenizer, eos_token_ids
        self._ll_tokenizer: LLTokenizer | None = None

    def compile(self, source: str) -> LLMatcher:
        """Return the matcher of a new answer. For one thread at a time: the largest schemas take a second.

        Raises:
            InputError: if the grammar is invalid or too complex.
        """
        if self._ll_tokenizer is None:
            self._ll_tokenizer = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self._eos_token_ids or None)
        matcher = LLMatcher(self._ll_tokenizer, source, limits=LLParserLimits(verbose_errors=False))
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars turn out too complex only here
        if matcher.is_error():
            raise InputError(matcher.get_error())
        return matcher

    def compile_schema(self, schema: dict) -> LLMatcher:
        """Return the matcher of a new answer in JSON.

        Raises:
            InputError: if the schema is invalid or too complex.
        """
        try:
            return self.compile(schema_source(schema))
        except (ValueError, RecursionError) as error:
            raise InputError(f"The schema cannot be matched: {str(error)[:300]}") from error


def mask_logits(logits: torch.Tensor, matcher: LLMatcher) -> torch.Tensor:
    """Return logits [vocabulary] that are -inf for tokens which the grammar does not allow.

    Raises:
        InputError: if the grammar becomes too complex here.
    """
    bitmask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise InputError(matcher.get_error())
    allowed = torch.zeros(len(logits), dtype=torch.bool)
    bits = np.unpackbits(bitmask, bitorder="little")[: len(logits)]
    allowed[: len(bits)] = torch.from_numpy(bits.astype(bool))
    return logits.masked_fill(~allowed, -torch.inf)


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
            except InputError as error:
                self.errors.setdefault(row, f"The schema cannot be matched: {str(error)[:300]}")
            masked[row, self._eos_token_ids[0]] = 0
        self._begun = True
        return masked
