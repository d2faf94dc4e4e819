"""Drafts of assisted decoding, and token ids without logits kept from code that cannot bear them."""

import torch
from transformers import LogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator


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
