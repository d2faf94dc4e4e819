"""What a draft model brings, by the share of its guesses that are right: python -m benchmarks.draft_model DIR DRAFT_DIR

Answers are dictated, for random weights have nothing to say, and so are guesses: each right or wrong by chance, seeded.
Both models compute all the same, so all that either costs is in the times. Plain decoding and decoding with drafts take
turns in one process; the rate is over the time from the first token of the answer to the last.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessorList

from benchmarks.benchmark import Dictated, provenance, rounded
from ov_mllama.draft_model import OVDraftModel, Schedule
from ov_mllama.files import VISION_ENCODER_NAME, newest
from ov_mllama.model import OVMLlamaForConditionalGeneration

SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)
PROMPT, ANSWER = 32, 64


class Guessing(OVDraftModel):
    """Computes its guesses, then gives those that are dictated."""

    def dictate(self, answer: np.ndarray, share: float, drafts: int | None) -> None:
        """From now on each guess is right with a chance of `share`."""
        self.answer, self.share, self.drafts = answer, share, drafts
        self.rng, self.schedule = np.random.default_rng(0), Schedule()
        self.session.reset()

    def likeliest(self, logits, place):
        right = self.rng.random() < self.share
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
    parser.add_argument("--rounds", type=int, default=2)
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
    rates: dict = {}
    for _ in range(options.rounds):
        for drafts in (None, 3, 5):
            for share in SHARES:
                plain = rate(model, text, settings)
                draft.dictate(numbers[0].numpy(), share, drafts)
                rates.setdefault(str(drafts or "adaptive"), {}).setdefault(share, []).append(
                    rate(model, text, settings, assistant_model=draft) / plain
                )
                stats = model.stats
                print(drafts, share, f"{rates[str(drafts or 'adaptive')][share][-1]:.2f}", stats, flush=True)
    result = {
        **provenance("benchmarks.draft_model"),
        "tokens_per_s_over_plain": {
            name: {share: float(np.median(values)) for share, values in shares.items()}
            for name, shares in rates.items()
        },
    }
    if options.json:
        options.json.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
