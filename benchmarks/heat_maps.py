"""Do heat maps peak on what a question is about? python -m benchmarks.heat_maps MODEL_DIR [--drawings 200]

Held-out drawings of the demo model with two things or more, of all sizes, and a question about one of them. Counted are
right answers whose word about it (its colour, its kind, or where it is) has the peak of its heat map within the thing's
square: by the query that predicts the word, by the query of the word itself, and for comparison a random place.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.benchmark import provenance, report
from demo_model.evaluate import SIZES
from demo_model.scenes import Scene, Thing, draw, placed_scene, random_scene, unusual_scene
from ov_mllama.runtime.attention_maps import AnswerQueries, image_attention, peak_of, word_tokens
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import load_processor, prompts_about


def about(scene: Scene, task: str, question: str, answer: str) -> tuple[Thing, str] | None:
    """Return the one thing that a question is about and the answer's word for it; None if there is no such thing."""
    last = answer.rstrip(".").split()[-1]
    if task == "colour":
        return next(thing for thing in scene.things if f"{thing.kind} is" in answer), last
    if task == "place" and answer.startswith("At"):
        return next(thing for thing in scene.things if f"{thing.name}?" in question), last
    if task == "place":
        return next(thing for thing in scene.things if thing.place in question), last
    if task == "unusual" and not answer.startswith("Nothing"):
        thing = scene.things[0]
        return thing, thing.colour if answer.startswith("One ") else thing.kind
    return None


def samples(count: int, seed: int):
    """Yield an image, a question, its answer, the thing that it is about, the answer's word for it, and the task."""
    rng = np.random.default_rng(seed)
    while count:
        scene = random_scene(rng, *SIZES[rng.integers(len(SIZES))], True, (placed_scene, placed_scene, unusual_scene))
        found = [(each, target) for each in scene.questions if (target := about(scene, *each))]
        if len(scene.things) > 1 and found:
            (task, question, answer), (thing, word) = found[rng.integers(len(found))]
            yield Image.fromarray(draw(scene, rng)), question, answer, thing, word, task
            count -= 1


def is_on(thing: Thing, y: float, x: float, height: int, width: int) -> bool:
    """Return whether a place of an image is within a thing's square."""
    half = thing.size / 2 * min(height, width)
    return abs(x - thing.x * width) <= half and abs(y - thing.y * height) <= half


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--drawings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = OVMLlamaForConditionalGeneration(options.model_dir, ov_config={"EXECUTION_MODE_HINT": "ACCURACY"})
    processor, hits = load_processor(options.model_dir), defaultdict(lambda: defaultdict(list))
    rng = np.random.default_rng(0)
    for image, question, answer, thing, word, task in tqdm([*samples(options.drawings, options.seed)]):
        inputs = prompts_about(processor, [{"image": image, "question": question}])
        queries = AnswerQueries(inputs["input_ids"].shape[1])
        model.generate(**inputs, do_sample=False, max_new_tokens=80, queries=queries)
        if processor.decode(queries.tokens, skip_special_tokens=True) != answer:
            continue
        tokens = next(tokens for text, tokens in word_tokens(processor.tokenizer, queries.tokens) if text == word)
        for kind, chosen in (("predicting", tokens), ("own", [token + 1 for token in tokens])):
            (heat,) = image_attention(model, inputs, queries, chosen, [image])
            y, x = (np.array(peak_of(heat)) + 0.5) / heat.shape
            hits[kind][task].append(is_on(thing, y * image.height, x * image.width, image.height, image.width))
        y, x = rng.random(2)
        hits["chance"][task].append(is_on(thing, y * image.height, x * image.width, image.height, image.width))
    result = {**provenance("benchmarks.heat_maps"), "right_answers": sum(map(len, hits["own"].values()))}
    for kind, tasks in hits.items():
        result[kind] = {task: float(np.mean(found)) for task, found in sorted(tasks.items())}
        result[kind]["all"] = float(np.mean([hit for found in tasks.values() for hit in found]))
    report(result, options.json)


if __name__ == "__main__":
    main()
