"""What it would bring and cost to keep encoded pictures in 16 bit instead of 32.

    python -m benchmarks.kept_pictures [--model-dir models/demo_model] [--questions 500] [--full-size]

Prints how many answers of the demo model change; or with --full-size, bytes and milliseconds (medians of five) for
random K/V as large as the 11B's for a picture of four tiles.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoProcessor

from demo_model.evaluate import heldout_samples
from ov_mllama.export.quality import batches, greedy
from ov_mllama.runtime.image_cache import EncodedImage, ImageCache
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration


def converted(image: EncodedImage, dtype: torch.dtype) -> EncodedImage:
    """The same, its K/V in another type (by torch, which takes a quarter of numpy's time)."""
    arrays = {name: torch.from_numpy(array).to(dtype).numpy() for name, array in image.key_values.items()}
    return EncodedImage(arrays, image.tile_counts)


class HalfKeptImages(ImageCache):
    """Kept in 16 bit, handed out in 32."""

    def get(self, key):
        image = super().get(key)
        return image and converted(image, torch.float32)

    def put(self, key, image):
        super().put(key, converted(image, torch.float16))


def print_cost(image: EncodedImage) -> None:
    """Bytes and milliseconds of one picture."""
    there, back = [], []
    for _ in range(5):
        started = time.perf_counter()
        half = converted(image, torch.float16)
        between = time.perf_counter()
        converted(half, torch.float32)
        there.append(between - started)
        back.append(time.perf_counter() - between)
    print(
        f"{image.nbytes / 1e6:.1f} MB in 32 bit, {half.nbytes / 1e6:.1f} MB in 16; {1000 * median(there):.0f} ms to "
        f"convert when kept, {1000 * median(back):.0f} ms at each prompt"
    )


def answers(model, processor, samples: list[dict]) -> list[list[int]]:
    """Tokens of the answers about pictures that are kept already."""
    result = []
    for batch in tqdm(batches(samples), leave=False):
        greedy(model, processor, batch)  # keeps them
        result += greedy(model, processor, batch)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-dir", type=Path, default=Path("models/demo_model"))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--full-size", action="store_true", help="only the cost, of the 11B's K/V for four tiles")
    options = parser.parse_args()
    if options.full_size:
        rows, rng = 4 * 1601, np.random.default_rng(0)
        key_values = {str(i): rng.standard_normal((1, 8, rows, 128), np.float32) for i in range(16)}
        print_cost(EncodedImage(key_values, np.ones(4, np.int64)))
        return
    model = OVMLlamaForConditionalGeneration(options.model_dir, ov_config={"EXECUTION_MODE_HINT": "ACCURACY"})
    processor, samples = AutoProcessor.from_pretrained(options.model_dir), list(heldout_samples(options.questions))
    exact = answers(model, processor, samples)
    model.forget()
    model.image_encoder.cache = HalfKeptImages(model.image_encoder.cache.max_bytes)
    half = answers(model, processor, samples)
    print(f"{sum(a != b for a, b in zip(exact, half, strict=True))} of {len(samples)} answers differ")


if __name__ == "__main__":
    main()
