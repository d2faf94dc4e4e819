"""What it costs to compute a prompt in steps, between which it can be stopped (`language.PREFILL_TOKENS`).

    python -m benchmarks.prefill MODEL_DIR FILE.xml

Prompts of random text tokens, each length with each size of step in turn, round after round. Printed: medians in
milliseconds, and the share of the time that the whole prompt takes in one step.
"""

import argparse
from pathlib import Path
from statistics import median

import numpy as np
from transformers import AutoConfig

from ov_mllama.runtime import language
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.shapes import MllamaShapes

LENGTHS, AT_ONCE = (32, 100, 256, 600), 1_000_000
STEPS = (32, 64, 128, 256, AT_ONCE)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("file", help="language model in that folder")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shapes = MllamaShapes.from_config(AutoConfig.from_pretrained(options.model_dir))
    model = language.OVLanguageModel(options.model_dir / options.file, shapes)
    session, rng = model.session(), np.random.default_rng(0)
    for length in LENGTHS:
        seconds = {step: [] for step in STEPS}
        for number in range(options.rounds + 1):
            for step in STEPS:
                language.PREFILL_TOKENS = step
                prompt = Prompt(rng.integers(0, shapes.vocab_size, (1, length)))
                session.prefill(prompt)
                if number:  # in the first round a new shape may be compiled
                    seconds[step].append(session.cache.stats.prefill_s)
        whole = median(seconds[AT_ONCE])
        shown = [
            f"{'at once' if step == AT_ONCE else step}: {1000 * median(taken):.0f} ms ({median(taken) / whole:.2f})"
            for step, taken in seconds.items()
        ]
        print(f"{length} tokens in steps of " + ", ".join(shown), flush=True)


if __name__ == "__main__":
    main()
