"""What a draft model brings, by how often it is right: python -m benchmarks.draft_model DIR DRAFT_DIR

Answers are dictated, for random weights have nothing to say, and so are guesses: each right or wrong by chance, seeded.
Both models compute all the same, so all that either costs is in the times. Plain decoding and decoding with drafts take
turns in one process; the rate is over the time from the first token of the answer to the last, and that in which the
draft model reads the prompt. Keys of the JSON, by number of drafts and each guess's chance of being right: gain, tokens
a second over plain decoding's, median and each round's; accepted, the share of all guesses that were right and not
behind a wrong one; guess_over_token, the draft model's time for a guess over the large one's for a token.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessorList

from benchmarks.benchmark import Dictated, provenance, report
from ov_mllama.runtime.ir import VISION_ENCODER_NAME, newest
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.speculative import DraftLengthPolicy, OVDraftModel

CHANCES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
PROMPT, ANSWER = 32, 64


class Guessing(OVDraftModel):
    """Computes its guesses, then gives those that are dictated."""

    def dictate(self, answer: np.ndarray, chance: float, drafts: int | None) -> None:
        """From now on each guess is right with this chance."""
        self.answer, self.chance, self.drafts = answer, chance, drafts
        self.rng, self.schedule = np.random.default_rng(0), DraftLengthPolicy()
        self.session.reset()

    def greedy_token(self, logits, place):
        right = self.rng.random() < self.chance
        return int(self.answer[min(place, len(self.answer) - 1)]) if right else int(logits[0, -1].argmax())


def rate(model, text, options, **more) -> float:
    """Tokens a second after the first."""
    started = time.perf_counter()
    model.generate(**text, **options, **more)
    return (ANSWER - 1) / (time.perf_counter() - started - model.stats.prefill_s)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("draft_dir", type=Path)
    parser.add_argument("--language-model", required=True, help="its file, such as llm_int4_asym_r10_gs64.xml")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0], help="fixed numbers to try; 0: as many as pay")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = OVMLlamaForConditionalGeneration(
        options.model_dir,
        language_model_name=options.language_model,
        image_encoder_name=newest(options.model_dir, VISION_ENCODER_NAME),
        check_golden=False,
    )
    draft = Guessing(options.draft_dir)
    draft.language_model.warm_up()
    numbers = torch.arange(1000, 1000 + PROMPT + ANSWER)[None]
    text = {"input_ids": numbers[:, :PROMPT]}
    settings = {"do_sample": False, "max_new_tokens": ANSWER, "eos_token_id": None}
    settings["logits_processor"] = LogitsProcessorList([Dictated(numbers)])
    draft.dictate(numbers[0].numpy(), 1.0, None)
    rate(model, text, settings, assistant_model=draft)  # kernels for steps of several tokens are made once
    result: dict = {**provenance("benchmarks.draft_model"), "by_drafts": {}}
    measured: dict = {(drafts, chance): [] for drafts in options.drafts for chance in CHANCES}
    for _ in range(options.rounds):
        for (drafts, chance), rounds in measured.items():
            plain = rate(model, text, settings)
            draft.dictate(numbers[0].numpy(), chance, drafts or None)
            gain, stats = rate(model, text, settings, assistant_model=draft) / plain, model.stats
            rounds.append(
                (gain, stats.accepted_tokens / stats.drafted_tokens, stats.draft_s / stats.drafted_tokens * plain)
            )
            print(drafts, chance, *(f"{number:.2f}" for number in rounds[-1]), stats, flush=True)
    for (drafts, chance), rounds in measured.items():
        gain, accepted, guess = np.median(rounds, axis=0)
        entry = {"gain": gain, "rounds": [each for each, *_ in rounds], "accepted": accepted, "guess_over_token": guess}
        result["by_drafts"].setdefault(str(drafts or "as many as pay"), {})[chance] = entry
    report(result, options.json)


if __name__ == "__main__":
    main()
