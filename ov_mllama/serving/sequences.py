"""Several answers in one call of `generate`: each row chooses, ends and is read as if it were alone."""

import threading
from collections.abc import Callable

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from ov_mllama.serving.protocol import ApiError, Question

GREEDY_BELOW = 1e-5  # a temperature: what is divided by less may be infinite
CHAR_TOKENS = 8  # that may be one character: a byte each, and what a tokenizer may add; garbage is longer


class Detokenizer:
    """Tokens -> text, as soon as nothing that may follow can change it.

    Only the last tokens are decoded, and only the text they add is searched: a token costs the same at any length.

    Args:
        stop: texts before which it ends.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.stopped = False
        self._begin = self._done = 0  # tokens from _begin on are decoded together; text is there of those before _done
        self._held = ""  # text that may be the beginning of one to stop at

    def put(self, token: int) -> str:
        """The text that a token adds for certain."""
        self.tokens.append(token)
        return self._more(self._new(), held_back=True)

    def end(self) -> str:
        """The text that was held back."""
        return self._more(self._new(whole=False), held_back=False)

    def _new(self, whole: bool = True) -> str:
        """Text of the tokens that have none yet; "" while it may end within a character.

        Args:
            whole: False takes what there is.
        """
        # with the tokens before: some tokenizers write a blank only between two words
        before = self._decoded(self.tokens[self._begin : self._done])
        text = self._decoded(self.tokens[self._begin :])
        unsure = len(text) <= len(before) or text.endswith("\ufffd")
        if whole and unsure and len(self.tokens) - self._done < CHAR_TOKENS:
            return ""
        self._begin, self._done = self._done, len(self.tokens)
        return text[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _more(self, text: str, held_back: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + text, ""
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        if held_back:  # the beginning of a text to stop at is no answer yet
            tails = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            certain = len(text) - max(tails, default=0)
            text, self._held = text[:certain], text[certain:]
        return text


class GrammarCompiler:
    """Makes matchers of JSON schemas for a tokenizer (llguidance).

    Args:
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer, ends: list[int]):
        self._tokenizer, self._ends = tokenizer, ends
        self._known: LLTokenizer | None = None

    def matcher(self, schema: dict) -> LLMatcher:
        """Follows an answer, token by token. For one thread at a time: the largest schemas take a second.

        Raises:
            ApiError: the schema is none, or too complex.
        """
        self._known = self._known or llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self._ends)
        try:
            # or a model that is unsure writes blanks without end
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise unfollowed(str(error)) from error
        matcher = LLMatcher(self._known, grammar, limits=LLParserLimits(verbose_errors=False))
        if not matcher.is_error():
            matcher.compute_bitmask()  # some schemas are only then too complex
        if matcher.is_error():
            raise unfollowed(matcher.get_error())
        return matcher


def unfollowed(reason: str) -> ApiError:
    """The refusal of a schema."""
    sentence = f"The schema cannot be followed: {reason[:300]}"
    return ApiError(400, sentence, "invalid_json_schema", "response_format.json_schema")


class Sequence:
    """One answer under way.

    Args:
        say: called with each piece of text, from the model's thread, and with None at the end.
        matcher: that the answer follows; None for free text.

    Attributes:
        cancelled: set it, and the answer ends with the token under way.
        finish: why it ended, in OpenAI's words; None before.
        error: why it failed, though the others of its batch go on.
    """

    def __init__(self, question: Question, say: Callable[[str | None], None], matcher: LLMatcher | None, tokenizer):
        self.question, self.say, self.matcher = question, say, matcher
        self.words = Detokenizer(tokenizer, question.stop)
        self.cancelled = threading.Event()
        self.finish: str | None = None
        self.error: ApiError | None = None
        self.prompt_tokens = 0
        self._random = torch.Generator()
        if question.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(question.seed)

    def choose(self, scores: torch.Tensor) -> int:
        """The next token of scores f32 [vocabulary]."""
        if self.matcher:
            allowed = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            if self.matcher.is_error():  # too complex from here on
                self.error = unfollowed(self.matcher.get_error())
                return 0
            bits = np.unpackbits(allowed, bitorder="little")[: len(scores)]
            mask = torch.zeros(len(scores), dtype=torch.bool)
            mask[: len(bits)] = torch.from_numpy(bits.astype(bool))
            scores = scores.masked_fill(~mask, -torch.inf)
        if self.question.temperature < GREEDY_BELOW:
            return int(scores.argmax())
        scores = (scores / self.question.temperature)[None]
        if self.question.top_p < 1:
            scores = TopPLogitsWarper(self.question.top_p)(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))

    def take(self, token: int, ends: list[int]) -> None:
        """The answer has a token more."""
        if self.finish:
            return
        if self.matcher and not (self.error or self.matcher.consume_token(token)):
            self.error = unfollowed(self.matcher.get_error())
        if self.error:
            self._end("error")
            return
        if token in ends:
            self.words.tokens.append(token)
            self._end("stop")
            return
        if piece := self.words.put(token):
            self.say(piece)
        if self.words.stopped or (self.matcher and self.matcher.is_stopped()):
            self._end("stop")
        elif len(self.words.tokens) >= self.question.max_new_tokens:
            self._end("length")
        elif self.cancelled.is_set():
            self._end("cancelled")

    def _end(self, finish: str) -> None:
        self.finish = finish
        if piece := self.words.end():
            self.say(piece)
        self.say(None)  # others of the batch may have minutes to go


class Sampler(LogitsProcessor):
    """Leaves each row the one token that it chooses, for greedy `generate` to take."""

    def __init__(self, rows: list[Sequence]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        for row, its_scores, its_choice in zip(self.rows, scores, chosen, strict=True):
            its_choice[0 if row.finish else row.choose(its_scores)] = 0
        return chosen


class StopCheck(StoppingCriteria):
    """Tells each row its token, and ends it when its answer does.

    Args:
        ends: tokens that end an answer.
    """

    def __init__(self, rows: list[Sequence], ends: list[int]):
        self.rows, self.ends = rows, ends

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token, self.ends)
        return torch.tensor([row.finish is not None for row in self.rows])
