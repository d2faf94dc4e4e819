"""Exact match of the demo checkpoint on held-out questions: python -m demo_model.evaluate --questions 2000

It runs PyTorch in f32 with the checkpoint's processor and greedy `generate`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, MllamaForConditionalGeneration

from demo_model.scenes import draw, random_scene
from ov_mllama.runtime.images import DETAILS, at_detail
from ov_mllama.runtime.prompts import prompts_about

SIZES = ((112, 112), (224, 112), (112, 224), (224, 224), (336, 112), (112, 448), (100, 80), (300, 200), (500, 500))


def heldout_samples(count: int, seed: int = 2026, follow_ups: bool = False) -> Iterator[dict]:
    """Yield `count` held-out questions as {"image": PIL image, "question", "answer", "task"}, one for each image; with
    `follow_ups` also an earlier question and its right answer, as "before"."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = random_scene(rng, *SIZES[rng.integers(len(SIZES))], held_out=True)
        task, question, answer = scene.questions[rng.integers(len(scene.questions))]
        sample = {"image": Image.fromarray(draw(scene, rng)), "question": question, "answer": answer, "task": task}
        if follow_ups:
            _, *before = scene.questions[rng.integers(len(scene.questions))]
            sample["before"] = [before]
        yield sample


def ask(model, processor, samples: list[dict], max_new_tokens: int = 80) -> list[str]:
    """Return the model's greedy answers to a batch of samples."""
    inputs = prompts_about(processor, samples)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Print the exact match by task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--follow-ups", action="store_true", help="ask each behind another question about its picture")
    parser.add_argument("--detail", choices=DETAILS, default="high", help="low: every picture shrunk into one tile")
    parser.add_argument("--show-errors", type=int, default=0)
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.model)
    model = MllamaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    samples, results, errors = list(heldout_samples(options.questions, follow_ups=options.follow_ups)), {}, []
    for sample in samples:
        sample["image"] = at_detail(sample["image"], options.detail, model.config.vision_config.image_size)
    for start in tqdm(range(0, len(samples), 50)):
        batch = samples[start : start + 50]
        for sample, answer in zip(batch, ask(model, processor, batch), strict=True):
            results.setdefault(sample["task"], []).append(answer == sample["answer"])
            if answer != sample["answer"]:
                errors.append(f"{sample['image'].size} {sample['question']} {sample['answer']} <- {answer}")
    for error in errors[: options.show_errors]:
        print(error)
    for task, right in sorted(results.items()):
        print(f"| {task} | {len(right)} | {100 * np.mean(right):.1f} % |")
    right = [value for values in results.values() for value in values]
    print(f"| **all** | {len(right)} | **{100 * np.mean(right):.1f} %** |")


if __name__ == "__main__":
    main()
