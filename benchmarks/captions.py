"""Images a minute with and without encoding ahead: python -m benchmarks.captions MODEL_DIR [--json FILE]

The same photographs are captioned in both ways by turns: encoded in a thread while the batch before is answered, as
`ov-mllama caption` does, and one after the other. Keys of the JSON: pictures_per_minute and cpu_s_per_picture (of all
threads; a busy machine changes it less) of each run, and ratios of their means.
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.benchmark import provenance, report
from ov_mllama.export.samples import photographs
from ov_mllama.serving.caption_answers import Captioner, Settings, Task, answer_tasks, prompt_texts


def measure(captioner: Captioner, tasks: list[Task], batch: int, ahead: bool) -> tuple[float, float]:
    """Return images a minute and CPU seconds per image, the model loaded and nothing encoded."""
    captioner.model.forget()
    started, cpu_s = time.perf_counter(), time.process_time()
    if ahead:
        list(answer_tasks(captioner, tasks, batch))
    else:
        for start in range(0, len(tasks), batch):
            captioner.answer(captioner.prepare(tasks[start : start + batch]))
    return 60 * len(tasks) / (time.perf_counter() - started), (time.process_time() - cpu_s) / len(tasks)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = Settings(max_new_tokens=options.tokens)
    captioner = Captioner(options.model_dir, prompt_texts(options.model_dir, settings), settings, options.batch)
    samples = photographs()
    runs: dict[str, list[tuple[float, float]]] = {"one after the other": [], "ahead": []}
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for number in range(options.images):
            path = Path(folder, f"{number}.png")
            samples[number % len(samples)]["image"].rotate(number).save(path)
            tasks.append(Task(str(number), str(path), settings.questions[0]))
        for _ in range(options.rounds):
            for name, values in runs.items():
                values.append(measure(captioner, tasks, options.batch, name == "ahead"))
                print(f"{name}: {values[-1][0]:.1f} images a minute, {values[-1][1]:.1f} s of CPU each", flush=True)
    result: dict = provenance("benchmarks.captions")
    for index, key in enumerate(("pictures_per_minute", "cpu_s_per_picture")):
        result[key] = {name: [run[index] for run in values] for name, values in runs.items()}
        result[f"{key}_ratio"] = sum(result[key]["ahead"]) / sum(result[key]["one after the other"])
    report(result, options.json)


if __name__ == "__main__":
    main()
