"""Anonymous memory while pictures are asked about: python -m benchmarks.memory MODEL_DIR [--hoard]

After each step GB of this process, mapped files left out; `--hoard` leaves freed memory with the C library, as it is
without `ov_mllama.runtime.memory.trim_memory`.
"""

import argparse
import os
from pathlib import Path

from transformers import AutoProcessor

import ov_mllama.runtime.memory
import ov_mllama.runtime.sessions
import ov_mllama.runtime.vision
from benchmarks.benchmark import anonymous
from ov_mllama.export.samples import photographs
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import prompts_about

ASKED = ("camera", "coffee", "galaxies")  # one tile, two, four


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--hoard", action="store_true")
    options = parser.parse_args()
    if options.hoard:
        for module in (ov_mllama.runtime.vision, ov_mllama.runtime.sessions):
            module.trim_memory = lambda: None

    def note(what: str) -> None:
        print(f"{what}: {anonymous(os.getpid()):.2f} GB", flush=True)

    note("imported")
    model = OVMLlamaForConditionalGeneration(
        options.model_dir,
        language_model_name=newest(options.model_dir, LANGUAGE_MODEL_NAME),
        image_encoder_name=newest(options.model_dir, VISION_ENCODER_NAME),
    )
    note("loaded and warmed up")
    processor = AutoProcessor.from_pretrained(options.model_dir)
    samples = {sample["name"]: sample for sample in photographs()}
    for name in ASKED:
        inputs = prompts_about(processor, [samples[name]])
        model.generate(**inputs, do_sample=False, max_new_tokens=4)
        kept = (model.image_encoder.cache.nbytes + model.sessions.held_bytes) / 1e9
        note(f"after a picture of {int(inputs['aspect_ratio_mask'].sum())} tiles, {kept:.2f} GB of it kept")
    model.forget()
    note("all forgotten")


if __name__ == "__main__":
    main()
