"""Several answers in one call of `generate`: each row chooses, ends and is read as if it were alone."""

import threading
from collections.abc import Callable, Sequence

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from serving.questions import Question, Refusal

GREEDY_BELOW = 1e-5  # a temperature: what is divided by less may be infinite


class Words:
    """Tokens -> text, as soon as nothing that may follow can change it.

    Args:
        stop: texts before which it ends.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.stopped = False
        self._said = ""

    def put(self, token: int) -> str:
        """The text that a token adds for certain."""
        self.tokens.append(token)
        return self._more(self._text().rstrip("\ufffd"), held_back=True)

    def end(self) -> str:
        """What is left."""
        return self._more(self._text(), held_back=False)

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _more(self, text: str, held_back: bool) -> str:
        ends = [at for at in map(text.find, self.stop) if at >= 0]
        self.stopped = self.stopped or bool(ends)
        if ends:
            text = text[: min(ends)]
        elif held_back:  # the beginning of a text to stop at is no answer yet
            tails = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
            text = text[: len(text) - max(tails, default=0)]
        more, self._said = text[len(self._said) :], max(text, self._said, key=len)
        return more


class Schemas:
    """Makes matchers of JSON schemas for a tokenizer (llguidance).

    Args:
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer, ends: list[int]):
        self._tokenizer, self._ends = tokenizer, ends
        self._known: LLTokenizer | None = None
        self._turn = threading.Lock()

    def matcher(self, schema: dict) -> LLMatcher:
        """Follows an answer, token by token.

        Raises:
            Refusal: the schema is none.
        """
        with self._turn:
            self._known = self._known or llguidance.hf.from_tokenizer(self._tokenizer, eos_token=self._ends)
        # or a model that is unsure writes blanks without end
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(self._known, grammar)
        if matcher.is_error():
            sentence = f"The schema cannot be followed: {matcher.get_error()}"
            raise Refusal(400, sentence, "invalid_json_schema", "response_format.json_schema")
        return matcher


class Row:
    """One answer under way.

    Args:
        say: called with each piece of text, from the model's thread, and with None at the end.
        matcher: that the answer follows; None for free text.

    Attributes:
        cancelled: set it, and the answer ends with the token under way.
        finish: why it ended, in OpenAI's words; None before.
    """

    def __init__(self, question: Question, say: Callable[[str | None], None], matcher: LLMatcher | None, tokenizer):
        self.question, self.say, self.matcher = question, say, matcher
        self.words = Words(tokenizer, question.stop)
        self.cancelled = threading.Event()
        self.finish: str | None = None
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

    def take(self, token: int, ends: Sequence[int]) -> None:
        """The answer has a token more."""
        if self.finish:
            return
        if self.matcher:
            self.matcher.consume_token(token)
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


class Choice(LogitsProcessor):
    """Leaves each row the one token that it chooses, for greedy `generate` to take."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        for row, its_scores, its_choice in zip(self.rows, scores, chosen, strict=True):
            its_choice[0 if row.finish else row.choose(its_scores)] = 0
        return chosen


class Ends(StoppingCriteria):
    """Tells each row its token, and ends it when its answer does.

    Args:
        ends: tokens that end an answer.
    """

    def __init__(self, rows: Sequence[Row], ends: Sequence[int]):
        self.rows, self.ends = rows, ends

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token, self.ends)
        return torch.tensor([row.finish is not None for row in self.rows])
