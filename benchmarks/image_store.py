"""Savings and costs of images on disk: python -m benchmarks.image_store MODEL_DIR [--questions 500] [--tiles 1 2 4]

Prints the seconds to encode an image of the model and to read it, and to write and read one of the 11B's shape, from
the disk itself and from the system's cache, the fastest of five; with --questions, how many of the demo model's greedy
answers 16 bits change, and how far they move its logits.
"""

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from demo_model.evaluate import heldout_samples
from ov_mllama.runtime.image_cache import EncodedImage
from ov_mllama.runtime.image_store import ImageStore
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import load_processor, picture_tensors, prompts_about
from ov_mllama.runtime.shapes import MllamaShapes

CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
FULL = MllamaShapes(4, 1601, 32, 8, 128, tuple(i for i in range(40) if i not in CROSS_LAYERS), CROSS_LAYERS, 0, 0, 0)
SIZES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}  # in tiles
ROUNDS = 5
ACCURATE = {"EXECUTION_MODE_HINT": "ACCURACY"}


def load(model_dir: Path, **options) -> OVMLlamaForConditionalGeneration:
    """Return the model of the newest IRs."""
    names = [newest(model_dir, name) for name in (LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME)]
    return OVMLlamaForConditionalGeneration(
        model_dir,
        language_model_name=names[0],
        image_encoder_name=names[1],
        warm_up=False,
        check_golden=False,
        **options,
    )


def drop_from_cache(folder: Path) -> None:
    """Make the system read the files of a folder from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(function, *arguments, before=lambda: None, rounds: int = 1, **named) -> float:
    """Return the seconds of the fastest of several calls, each after another call that is not timed."""
    took = []
    for _ in range(rounds):
        before()
        started = time.perf_counter()
        function(*arguments, **named)
        took.append(time.perf_counter() - started)
    return min(took)


def print_of_model(model_dir: Path, store: ImageStore, tiles: list[int]) -> None:
    """Print times of a model's images."""
    model, processor = load(model_dir, image_store=store), load_processor(model_dir)
    side, rng = model.shapes.tile_size, np.random.default_rng(0)
    for count in tiles:
        wide, high = SIZES[count]
        image = Image.fromarray(rng.integers(0, 256, (high * side, wide * side, 3), dtype=np.uint8))
        tensors = picture_tensors(model, processor, image)
        encoded = seconds(model.encode_images, **tensors)

        def forget() -> None:
            model.forget()
            drop_from_cache(store.folder)

        cold = seconds(model.encode_images, before=forget, rounds=ROUNDS, **tensors)
        warm = seconds(model.encode_images, before=model.forget, rounds=ROUNDS, **tensors)
        print(f"{count} tiles: encoded and written in {encoded:.2f} s, read in {cold:.3f} s, again in {warm:.3f} s")


def print_of_full_size(store: ImageStore, tiles: list[int]) -> None:
    """Print times of random K/V of the 11B's shape."""
    rng = np.random.default_rng(0)
    for count in tiles:
        rows, columns = FULL.patches_per_tile, min(count + 1, 4)  # with an empty tile that is computed
        shapes = {name: FULL.cross_kv_shape(name, 1, rows * columns) for name in FULL.cross_kv_names}
        image = EncodedImage(
            {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}, np.ones(columns, np.int64)
        )
        written = seconds(store.put, str(count), image, rounds=ROUNDS)
        drop = functools.partial(drop_from_cache, store.folder)
        cold = seconds(store.get, str(count), FULL, before=drop, rounds=ROUNDS)
        warm = seconds(store.get, str(count), FULL, rounds=ROUNDS)
        print(
            f"the 11B's shape, {count} tiles, {image.nbytes / 2e6:.0f} MB: written in {written:.2f} s, read in "
            f"{cold:.2f} s, again in {warm:.2f} s"
        )


def print_of_answers(model_dir: Path, store: ImageStore, count: int) -> None:
    """Print what 16 bits change."""
    exact, rounded = load(model_dir, ov_config=ACCURATE), load(model_dir, ov_config=ACCURATE, image_store=store)
    processor, changed, difference = load_processor(model_dir), 0, 0.0
    for sample in tqdm(heldout_samples(count), total=count):
        inputs = prompts_about(processor, [sample])
        answers = [model.generate(**inputs, do_sample=False, max_new_tokens=80) for model in (exact, rounded)]
        changed += not torch.equal(*answers)
        logits = [model(**inputs, logits_to_keep=1).logits for model in (exact, rounded)]
        difference = max(difference, float((logits[0] - logits[1]).abs().max()))
    print(f"{changed} of {count} answers differ; the largest difference of a logit is {difference:.2g}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--questions", type=int, default=0)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 4], choices=SIZES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        if options.questions:
            print_of_answers(options.model_dir, ImageStore(Path(folder, "demo")), options.questions)
            return
        print_of_model(options.model_dir, ImageStore(Path(folder, "model")), options.tiles)
        print_of_full_size(ImageStore(Path(folder, "full")), options.tiles)


if __name__ == "__main__":
    main()
