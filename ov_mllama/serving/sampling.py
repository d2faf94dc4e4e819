"""The next token of a sequence: grammars (llguidance), penalties, temperature, top_k, top_p, min_p."""

import torch
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ov_mllama.chat import schema_matcher
from ov_mllama.runtime.errors import InputError
from ov_mllama.serving.grammars import Grammar
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ApiError

MIN_TEMPERATURE = 1e-5  # lower ones are greedy: logits divided by them may be infinite


class GrammarCompiler:
    """Compiler of grammars for a tokenizer.

    Args:
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer, eos_token_ids: list[int]):
        self._compiler = schema_matcher.MatcherCompiler(tokenizer, eos_token_ids)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Return the matcher of a new answer. For one thread at a time: the largest schemas take a second.

        Raises:
            ApiError: if the grammar is invalid or too complex.
        """
        try:
            return self._compiler.compile(source_of(grammar))
        except (ValueError, GbnfToLarkError, RecursionError) as error:
            raise grammar_error(str(error), grammar) from error


def source_of(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it; GBNF, llama.cpp's language, becomes Lark."""
    if grammar.kind == "json":
        return schema_matcher.schema_source(grammar.source)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    return LLMatcher.grammar_from_lark(any_to_lark(grammar.source))


def grammar_error(reason: str, grammar: Grammar | None = None) -> ApiError:
    """Return the error of a grammar that cannot be matched."""
    schema = grammar is None or grammar.kind == "json"
    message = f"The {'schema' if schema else 'grammar'} cannot be matched: {reason[:300]}"
    code = "invalid_json_schema" if schema else "invalid_value"
    return ApiError(400, message, code, grammar.param if grammar else "response_format.json_schema")


def mask_logits(logits: torch.Tensor, matcher: LLMatcher) -> torch.Tensor:
    """Return logits [vocabulary] that are -inf for tokens which the grammar does not allow.

    Raises:
        ApiError: if the grammar becomes too complex here.
    """
    try:
        return schema_matcher.mask_logits(logits, matcher)
    except InputError as error:
        raise grammar_error(str(error)) from error


def adjust_logits(
    logits: torch.Tensor, request: GenerationRequest, prompt: list[int], answer: list[int]
) -> torch.Tensor:
    """Return logits f32 [vocabulary] after a request's penalties and `logit_bias`.

    Args:
        prompt, answer: tokens so far, of which the last `penalty_window` count. The repetition penalty is for both, as
            in vLLM; the others are for the answer, as in OpenAI's API.
    """
    logits, first = logits.clone(), -request.penalty_window
    if request.repetition_penalty not in (None, 1):
        tokens = {token for token in (prompt + answer)[first:] if token < len(logits)}  # an image's has no logit
        seen = torch.tensor([*tokens], dtype=torch.long)
        scores = logits[seen]
        factor = request.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    if request.presence_penalty or request.frequency_penalty:
        generated, counts = torch.tensor(answer[first:], dtype=torch.long).unique(return_counts=True)
        logits[generated] -= request.presence_penalty + request.frequency_penalty * counts
    for token, bias in request.logit_bias.items():
        logits[token] += bias
    return logits


def sample(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, generator: torch.Generator
) -> int:
    """Sample a token of logits f32 [vocabulary]; a `top_k` of 0 or -1 is none."""
    if temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    logits = (logits / temperature)[None]
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    if min_p > 0:
        logits = MinPLogitsWarper(min_p)(None, logits)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
