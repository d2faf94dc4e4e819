"""Speculative decoding (https://arxiv.org/abs/2211.17192) with a draft model: a small Llama with the same tokenizer.

    text so far -> OVDraftModel -> draft tokens -> one step of the target model -> accepted tokens, and one more

Greedy answers in f32 do not change; at other precisions a step of several tokens may round otherwise than steps of one.
The draft model sees text only.
"""

import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, LogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator

from .checks import check_vocabulary
from .devices import Cpu
from .generation import end_tokens, generation_config
from .ir import DRAFT_MODEL_NAME, check_model_dir
from .kv_cache import Prompt
from .language import OVLanguageModel
from .shapes import MllamaShapes

# Relative time of a step by its tokens, in INT4: the 11B, `step_ms` in benchmarks/results/11b-without-amx.json
TOKENS, STEP = (1, 2, 4, 8, 16), (1.0, 1.23, 1.41, 1.65, 2.19)
STEP_WITHOUT_VNNI = (1.0, 1.33, 2.33, 2.69, 4.7)  # a slice on a Zen 3, which computes rather than waits for memory


class DraftLengthPolicy:
    """Draft length with the highest expected speed, from moving averages.

    Attributes:
        acceptance_rate: share of accepted draft tokens.
        cost: time of a draft token, relative to the target model's step of one token.
        step: relative time of the target model's steps of TOKENS.
    """

    MAX_DRAFT_TOKENS, PAUSES, RATE = 8, (4, 64), 0.15

    def __init__(self, step: tuple[float, ...] = STEP):
        self.acceptance_rate, self.cost, self.step = 0.5, 0.2, step
        self.pause = self.remaining = 0

    def count(self) -> int:
        """Return the tokens to draft next; while drafts do not pay 0, except for a try after 4, 8, ..., 64 steps."""
        if self.remaining:
            self.remaining -= 1
            return 0
        return max(range(1, self.MAX_DRAFT_TOKENS + 1), key=self.gain)

    def gain(self, drafts: int) -> float:
        """Return the speed with so many draft tokens, relative to none."""
        tokens = sum(self.acceptance_rate**number for number in range(drafts + 1))
        return tokens / (np.interp(drafts + 1, TOKENS, self.step) + drafts * self.cost)

    def update(self, drafted: int, accepted: int, seconds: float, step_seconds: float) -> None:
        """Record a draft of `seconds`, and the target model's step that checked it."""
        for hit in [1] * accepted + [0] * (accepted < drafted):  # tokens after a rejected one do not count
            self.acceptance_rate += self.RATE * (hit - self.acceptance_rate)
        of_one = step_seconds / np.interp(drafted + 1, TOKENS, self.step)
        self.cost += self.RATE * (seconds / drafted / of_one - self.cost)
        pays = max(map(self.gain, range(1, self.MAX_DRAFT_TOKENS + 1))) > 1
        self.pause = 0 if pays else min(max(2 * self.pause, self.PAUSES[0]), self.PAUSES[1])
        self.remaining = self.pause


class OVDraftModel:
    """Draft model for `generate(..., assistant_model=OVDraftModel(folder))`; KV cache and acceptance rate persist.

    Args:
        model_dir: folder of `ov_mllama.export.compress.make_draft_model`.
        device, ov_config: as for `OVMLlamaForConditionalGeneration`.
        drafts: draft length; default adaptive, see `DraftLengthPolicy`.
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
        self.schedule, self.drafts = DraftLengthPolicy(STEP if Cpu.here().in_8_bit else STEP_WITHOUT_VNNI), drafts

    def draft_tokens(self, tokens: np.ndarray, count: int, ends: frozenset[int] = frozenset()) -> list[int]:
        """Generate up to `count` greedy tokens after the text i64 [query], until one of `ends`."""
        drafted = [self.greedy_token(self.session.prefill(Prompt(tokens[None])), len(tokens))]
        while len(drafted) < count and drafted[-1] not in ends:
            logits = self.session.decode(np.array([drafted[-1:]]))
            drafted.append(self.greedy_token(logits, len(tokens) + len(drafted)))
        return drafted

    def greedy_token(self, logits: np.ndarray, place: int) -> int:
        """Return the likeliest token of logits f32 [1, 1, vocab]; `place` in the text is for benchmarks."""
        return int(logits[0, -1].argmax())


class ModelDrafts(CandidateGenerator):
    """Draft source of one call of `generate`.

    Args:
        vocab_size: number of the target model's logits; other tokens (`<|image|>`) are hidden from the draft model.
        settings: `generation_config` of the call.
        model: the target model, for the times of its steps.
    """

    requires_model_outputs = False

    def __init__(self, draft: OVDraftModel, vocab_size: int, settings: GenerationConfig, model):
        check_vocabulary(draft.vocab_size, vocab_size)
        self.draft, self.vocab_size, self.model = draft, vocab_size, model
        self.max_length = settings.max_length
        self.ends = frozenset(end_tokens(settings))
        self.drafted: list[int] = []
        self.seconds = 0.0

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs):
        text = input_ids[0].numpy()
        text, self.drafted, self.seconds = text[text < self.vocab_size], [], 0.0
        limit = self.max_length - input_ids.shape[1] - 1  # a step gives one token more than it checks
        limit = min(limit, self.draft.language_model.shapes.max_positions - len(text))
        count = min(self.draft.drafts or self.draft.schedule.count(), limit)
        if count < 1 or not len(text):
            return input_ids, None
        started = time.perf_counter()
        self.drafted = self.draft.draft_tokens(text, count, self.ends)
        self.seconds = time.perf_counter() - started
        return torch.cat([input_ids, torch.tensor([self.drafted])], dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches) -> None:
        stats, accepted = self.model.stats, int(num_matches)
        if not stats.step_s:  # the first step includes the prompt: its time does not count
            stats.draft_prompt_s = self.seconds
            return
        stats.draft_s += self.seconds
        if self.drafted:
            # transformers never counts the answer's last token as accepted
            accepted += self.drafted[accepted : accepted + 1] == input_ids[0, -1:].tolist()
            self.draft.schedule.update(len(self.drafted), accepted, self.seconds, stats.step_s[-1])


def in_vocabulary(input_ids: torch.LongTensor, vocab_size: int) -> torch.LongTensor:
    """Replace tokens without logit (`<|image|>`), by which transformers may index logits, by the first token of their
    row that has one (BOS or padding)."""
    first = (input_ids < vocab_size).int().argmax(dim=1, keepdim=True)
    return torch.where(input_ids < vocab_size, input_ids, input_ids.gather(1, first)).clamp(max=vocab_size - 1)


class InVocabularyProcessor(LogitsProcessor):
    """Wrapper of a logits processor that passes `in_vocabulary` ids."""

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor

    def __call__(self, input_ids, scores):
        return self.processor(in_vocabulary(input_ids, scores.shape[-1]), scores)


class InVocabularyDrafts(CandidateGenerator):
    """Wrapper of a candidate generator that passes `in_vocabulary` ids.

    Args:
        back_off: after a draft without accepted tokens, pause for 1, 3, 7, then 15 steps, so that text that does not
            repeat the prompt is hardly slower. Not for an assistant model: its cache must see every step.
    """

    MAX_PAUSE_STEPS = 15

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
            self.pause = 0 if num_matches else min(2 * self.pause + 1, self.MAX_PAUSE_STEPS)
            self.remaining = self.pause
        self.drafts.update_candidate_strategy(input_ids, scores, num_matches)
