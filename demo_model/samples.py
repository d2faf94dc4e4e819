"""Write demo_model/samples: a dozen held-out images of all sizes and tasks, with questions and right answers.

    python -m demo_model.samples [--seed N]

The folder is in `imagefolder` form, metadata.jsonl beside the images, for datasets.load_dataset("imagefolder", ...).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from demo_model.scenes import draw, random_scene

# (task, width, height) in pixels; a tile of the demo model is 112 x 112
IMAGES = (
    ("unusual", 224, 224),
    ("unusual", 112, 112),
    ("describe", 224, 112),
    ("count", 224, 224),
    ("place", 112, 224),
    ("colour", 112, 112),
    ("digits", 112, 112),
    ("digits", 336, 112),
    ("describe", 112, 112),
    ("count", 112, 448),
    ("place", 300, 200),  # from here on the processor has to resize
    ("unusual", 640, 480),
    ("colour", 90, 60),
)


def make_samples(folder: Path, seed: int) -> None:
    """Write an image for each of IMAGES: the first held-out scene of its size and task with more than one thing."""
    rng, lines = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for task, width, height in IMAGES:
        questions = []
        while not questions:
            scene = random_scene(rng, width, height, held_out=True)
            questions = [
                (question, answer)
                for name, question, answer in scene.questions
                if name == task and len(scene.things) > 1 and not answer.startswith("Nothing")
            ]
        name = f"{len(lines):02d}-{task}-{width}x{height}.png"
        Image.fromarray(draw(scene, rng)).save(folder / name)
        lines.append({"file_name": name, "question": questions[0][0], "answer": questions[0][1], "task": task})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=6)
    make_samples(Path(__file__).parent / "samples", parser.parse_args().seed)
