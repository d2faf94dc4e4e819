"""A draft model: a small Llama with the same tokenizer, whose guesses the large model checks several at a time.

    text so far -> OVDraftModel -> a few guessed tokens -> one step of the large model -> those that are right, and one

What it guesses changes no greedy answer in f32, only how many tokens come of a step (speculative decoding,
https://arxiv.org/abs/2211.17192); at other precisions a step of several tokens may round otherwise than steps of one.
It knows text only: the picture is the large model's to look at.
"""

import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, LogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator

from .checks import check_vocabulary
from .ir import DRAFT_MODEL_NAME, check_model_dir, generation_config
from .kv_cache import Prompt
from .language import OVLanguageModel
from .shapes import MllamaShapes

# A step of so many tokens beside a step of one: the 11B in INT4, `step_ms` in benchmarks/results/11b-without-amx.json
TOKENS, STEP = (1, 2, 4, 8, 16), (1.0, 1.23, 1.41, 1.65, 2.19)


class DraftLengthPolicy:
    """How many tokens to draft next: as many as pay, by what was right of late and what a draft costs.

    Attributes:
        right: share of the guesses that were right, the latest counting most.
        cost: seconds for a guess beside those of the large model's step of one token.
    """

    MAX_DRAFT_TOKENS, PAUSES, RATE = 8, (4, 64), 0.15

    def __init__(self):
        self.acceptance_rate, self.cost = 0.5, 0.2
        self.pause = self.remaining = 0

    def count(self) -> int:
        """Tokens to draft before the next step; while they do not pay 0, but for a try after 4, 8, ..., 64 steps."""
        if self.remaining:
            self.remaining -= 1
            return 0
        return max(range(1, self.MAX_DRAFT_TOKENS + 1), key=self.gain)

    def gain(self, drafts: int) -> float:
        """Tokens a second beside a step of one token, if so many are drafted."""
        tokens = sum(self.acceptance_rate**number for number in range(drafts + 1))
        return tokens / (np.interp(drafts + 1, TOKENS, STEP) + drafts * self.cost)

    def update(self, drafted: int, accepted: int, seconds: float, step_seconds: float) -> None:
        """What came of a draft.

        Args:
            seconds: it took; step_seconds: of the large model's step that checked it.
        """
        for hit in [1] * accepted + [0] * (accepted < drafted):  # guesses behind a wrong one say nothing
            self.acceptance_rate += self.RATE * (hit - self.acceptance_rate)
        of_one = step_seconds / np.interp(drafted + 1, TOKENS, STEP)
        self.cost += self.RATE * (seconds / drafted / of_one - self.cost)
        pays = max(map(self.gain, range(1, self.MAX_DRAFT_TOKENS + 1))) > 1
        self.pause = 0 if pays else min(max(2 * self.pause, self.PAUSES[0]), self.PAUSES[1])
        self.remaining = self.pause


class OVDraftModel:
    """For `generate(..., assistant_model=OVDraftModel(folder))`. It keeps what it knows of the conversation and of how
    often it was right from one call to the next.

    Args:
        model_dir: folder of `ov_mllama.export.compress.make_draft_model`.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        drafts: how many tokens to guess at a time; default as many as pay, see `DraftLengthPolicy`.

    Raises:
        FileNotFoundError, ValueError: as `check_model_dir`.
    """

    def __init__(
        self, model_dir: str | Path, device: str = "CPU", ov_config: dict | None = None, drafts: int | None = None
    ):
        model_dir = Path(model_dir)
        stamps = check_model_dir(model_dir, (DRAFT_MODEL_NAME,))
        self.config = AutoConfig.from_pretrained(model_dir)
        self.generation_config = generation_config(model_dir, self.config)
        shapes = MllamaShapes.from_config(self.config)
        self.vocab_size = shapes.vocab_size
        self.language_model = OVLanguageModel(
            model_dir / DRAFT_MODEL_NAME, shapes, device, ov_config, stamps[DRAFT_MODEL_NAME]
        )
        self.session = self.language_model.session()
        self.schedule, self.drafts = DraftLengthPolicy(), drafts

    def draft_tokens(self, tokens: np.ndarray, count: int, ends: frozenset[int] = frozenset()) -> list[int]:
        """The `count` likeliest tokens, one after another, fewer where one of `ends` comes.

        Args:
            tokens: i64 [query], the text so far. What of it began the call before is not computed again.
        """
        guessed = [self.greedy_token(self.session.prefill(Prompt(tokens[None])), len(tokens))]
        while len(guessed) < count and guessed[-1] not in ends:
            logits = self.session.decode(np.array([guessed[-1:]]))
            guessed.append(self.greedy_token(logits, len(tokens) + len(guessed)))
        return guessed

    def greedy_token(self, logits: np.ndarray, place: int) -> int:
        """The id to guess.

        Args:
            logits: f32 [1, 1, vocab].
            place: of the token in the text; for benchmarks, which know what comes there.
        """
        return int(logits[0, -1].argmax())


class ModelDrafts(CandidateGenerator):
    """The drafts of one call of `generate`.

    Args:
        draft: whose.
        vocab_size: how many logits the large model has; other tokens, `<|image|>`, the draft model does not see.
        settings: of the call (`generation_config`): where the answer ends.
        model: the large one, for the times of its steps.

    Raises:
        ValueError: the vocabularies differ.
    """

    requires_model_outputs = False

    def __init__(self, draft: OVDraftModel, vocab_size: int, settings: GenerationConfig, model):
        check_vocabulary(draft.vocab_size, vocab_size)
        self.draft, self.vocab_size, self.model = draft, vocab_size, model
        self.max_length = settings.max_length
        ends = settings.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.guessed: list[int] = []
        self.seconds = 0.0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs):
        text = input_ids[0].numpy()
        text, self.guessed, self.seconds = text[text < self.vocab_size], [], 0.0
        room = self.max_length - input_ids.shape[1] - 1  # a step gives one token more than it checks
        room = min(room, self.draft.language_model.shapes.max_positions - len(text))
        count = min(self.draft.drafts or self.draft.schedule.count(), room)
        if count < 1 or not len(text):
            return input_ids, None
        started = time.perf_counter()
        self.guessed = self.draft.draft_tokens(text, count, self.ends)
        self.seconds = time.perf_counter() - started
        return torch.cat([input_ids, torch.tensor([self.guessed])], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        stats, right = self.model.stats, int(num_matches)
        if not stats.step_s:  # the first step checks the prompt too: its time says nothing
            stats.draft_prompt_s = self.seconds
            return
        stats.draft_s += self.seconds
        if self.guessed:
            # transformers does not count the answer's last token, be it guessed right
            right += self.guessed[right : right + 1] == input_ids[0, -1:].tolist()
            self.draft.schedule.update(len(self.guessed), right, self.seconds, stats.step_s[-1])


def in_vocabulary(input_ids: torch.LongTensor, vocab_size: int) -> torch.LongTensor:
    """Ids [batch, tokens] in which each row's first token that has a logit (BOS or padding) stands for those without.

    `<|image|>` has an embedding but no logit, and some of transformers' code indexes logits by token ids.
    """
    first = (input_ids < vocab_size).int().argmax(dim=1, keepdim=True)
    return torch.where(input_ids < vocab_size, input_ids, input_ids.gather(1, first)).clamp(max=vocab_size - 1)


class InVocabularyProcessor(LogitsProcessor):
    """A logits processor that sees no token id outside the logits."""

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor

    def __call__(self, input_ids, scores):
        return self.processor(in_vocabulary(input_ids, scores.shape[-1]), scores)


class InVocabularyDrafts(CandidateGenerator):
    """Drafts for assisted decoding by a generator that sees no token id outside the logits.

    Args:
        drafts: the generator.
        vocab_size: how many logits there are.
        back_off: after a draft of which nothing was right, do without for 1, 3, 7, then 15 steps, so that text that
            does not repeat the prompt costs next to nothing more. Not for an assistant model: it has its own schedule,
            and a cache that wants to see every step.
    """

    LONGEST_PAUSE = 15

    def __init__(self, drafts: CandidateGenerator, vocab_size: int, back_off: bool):
        self.drafts, self.vocab_size, self.back_off = drafts, vocab_size, back_off
        self.pause = self.remaining = 0

    @property
    def requires_model_outputs(self) -> bool:
        return self.drafts.requires_model_outputs

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs):
        if self.remaining:
            self.remaining -= 1
            return input_ids, None
        candidates, logits = self.drafts.get_candidates(in_vocabulary(input_ids, self.vocab_size), **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        drafted = scores.shape[1] - 1
        if self.back_off and drafted:
            self.pause = 0 if num_matches else min(2 * self.pause + 1, self.LONGEST_PAUSE)
            self.remaining = self.pause
        self.drafts.update_candidate_strategy(input_ids, scores, num_matches)
