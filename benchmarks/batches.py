"""What prompts that share each step bring: python -m benchmarks.batches MODEL_DIR [--sizes 1 2 4 8 16]

The prompts are questions of different lengths about one picture of one tile, which is encoded once; each row has its
own copy of its K/V, as rows with different pictures have. All sizes take turns, round after round. Printed: for each
size the prompt's seconds, the milliseconds of a step (medians), and tokens a second over those of one prompt.
"""

import argparse
from pathlib import Path

import numpy as np
from transformers import AutoProcessor

from benchmarks.benchmark import provenance, report
from ov_mllama.export.samples import photographs
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import prompts_about

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--language-model", help="its file; default the newest compressed one")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = OVMLlamaForConditionalGeneration(
        options.model_dir,
        language_model_name=options.language_model or newest(options.model_dir, LANGUAGE_MODEL_NAME),
        image_encoder_name=newest(options.model_dir, VISION_ENCODER_NAME),
        check_golden=False,
    )
    processor, samples = AutoProcessor.from_pretrained(options.model_dir), photographs()
    picture = next(sample["image"] for sample in samples if sample["name"] == "camera")  # one tile
    prompts: dict[int, list[float]] = {}
    steps: dict[int, list[float]] = {}
    for _ in range(options.rounds):
        for size in options.sizes:
            asked = [{"image": picture, "question": samples[i % len(samples)]["question"]} for i in range(size)]
            model.sessions.forget()  # every prompt is read whole
            model.generate(**prompts_about(processor, asked), **GREEDY)
            prompts.setdefault(size, []).append(model.stats.prefill_s)
            steps.setdefault(size, []).extend(model.stats.step_s)
            print(size, model.stats, flush=True)
    one = np.median(steps[options.sizes[0]]) / options.sizes[0]
    result = {
        **provenance("benchmarks.batches"),
        "prompt_s": {size: float(np.median(seconds)) for size, seconds in prompts.items()},
        "step_ms": {size: 1000 * float(np.median(seconds)) for size, seconds in steps.items()},
        "tokens_per_s_over_one": {size: float(size * one / np.median(seconds)) for size, seconds in steps.items()},
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
