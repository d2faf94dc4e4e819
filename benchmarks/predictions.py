"""Predicted and measured time of images, a prompt and tokens on this CPU: python -m benchmarks.predictions MODEL_DIR

MODEL_DIR holds IRs made of `benchmarks.make_checkpoint`, such as `make build/slice/config.json` writes; every language
model and vision encoder in it is measured, all of a kind in turn, round after round, and the fastest round counts. The
predictions are the plan's (`ov_mllama/export/costs.py`), from speeds that are measured before and after; the faster
count. OV_CPU_MAX_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 simulate an older CPU.

Beside each time stands the CPU time that it took, over the number of threads: on a machine that other programs use as
well, the time it would take without them.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import openvino as ov
from transformers import AutoConfig, MllamaConfig

from benchmarks.benchmark import provenance, report
from benchmarks.precision import infer, inputs_of
from ov_mllama.export.costs import image_seconds, prompt_seconds, token_seconds
from ov_mllama.runtime.devices import choose
from ov_mllama.runtime.ir import ir_stamp
from ov_mllama.runtime.measure import FORMATS, PROMPT, Speed, measure

TILES, TOKENS = (1, 2, 4), (1, 2, 4, 8, 16, PROMPT)


def measured_seconds(files: list[Path], rounds: int, steps: int) -> dict[tuple[str, int], tuple[float, float]]:
    """Return the least seconds of each IR and number of tiles or tokens, and those of CPU time over threads.

    Args:
        steps: inferences in a row of a step of few tokens, of which the fastest counts.
    """
    vision = "vision" in files[0].name
    inputs, seconds = inputs_of(files[0].parent, vision, TOKENS), {}
    requests, threads = {}, 1
    for path in files:
        chosen = choose("vision" if vision else "language", ir_stamp(path))
        compiled = ov.Core().compile_model(path, "CPU", chosen.properties)
        requests[path.stem], threads = compiled.create_infer_request(), compiled.get_property("INFERENCE_NUM_THREADS")
        infer(requests[path.stem], inputs[1])  # repacks the weights
    for _ in range(rounds):
        for name, request in requests.items():
            for count, feed in inputs.items():
                for _ in range(1 if vision or count == PROMPT else steps):
                    began = time.process_time()
                    took = infer(request, feed)[0], (time.process_time() - began) / threads
                    before = seconds.get((name, count), took)
                    seconds[name, count] = min(before[0], took[0]), min(before[1], took[1])
                print(f"{name}, {count}: {seconds[name, count]}", file=sys.stderr)
    return seconds


def predicted_seconds(config: MllamaConfig, speed: Speed, stamp: dict[str, str], vision: bool) -> dict[int, float]:
    """Return what the plan predicts for an IR, by number of tiles or tokens; nothing for other formats."""
    form = format_of(stamp)
    if vision:
        return {tiles: image_seconds(config, speed, tiles, form) for tiles in TILES if form in ("16 bit", "int8")}
    if form not in FORMATS:
        return {}
    return {1: token_seconds(config, speed, form), PROMPT: prompt_seconds(config, speed, form)}


def format_of(stamp: dict[str, str]) -> str:
    """Return an IR's format, as `measure.FORMATS` names it."""
    form = stamp.get("format", "16 bit")
    if form == "int8":
        return "int8, calibrated"
    if form in FORMATS:  # a checkpoint's own
        return form
    return f"{form}, groups of {stamp['group_size']}" if form.startswith("int4") else form.split("_")[0]


def groups_of(folder: Path, vision: bool, language: bool) -> Iterator[list[Path]]:
    """Yield the IRs loaded at once: encoders; the language model in 16 bit, which is large; compressed ones."""
    if vision:
        yield sorted(folder.glob("openvino_vision_encoder*.xml"))
    if language:
        yield [folder / "openvino_language_model.xml"]
        yield sorted(folder.glob("llm_*.xml"))


def faster(one: Speed, other: Speed) -> Speed:
    """Return the faster of two measurements, figure by figure."""
    products = {name: max(rate, other.products[name]) for name, rate in one.products.items()}
    return Speed(one.threads, max(one.read, other.read), products)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("vision", "language"), default=["vision", "language"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of few tokens, in each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config, speed, rows, figures = AutoConfig.from_pretrained(options.model_dir), measure(), [], []
    seconds = {}
    for files in groups_of(options.model_dir, *(part in options.parts for part in ("vision", "language"))):
        if files and all(path.is_file() for path in files):
            seconds |= measured_seconds(files, options.rounds, options.steps)
    speed = faster(speed, measure())
    for (name, count), (took, busy) in seconds.items():
        vision, stamp = "vision" in name, ir_stamp(options.model_dir / f"{name}.xml")
        predicted = predicted_seconds(config, speed, stamp, vision).get(count)
        what = f"image, {count} tiles" if vision else f"step, {count} tokens"
        ratio = f"{predicted / took:.2f} ({predicted / busy:.2f})" if predicted else ""
        rows.append((what, format_of(stamp), predicted, took, busy, ratio))
        known = {name: stamp[name] for name in ("format", "group_size") if name in stamp}
        times = {"predicted_s": predicted, "measured_s": took, "cpu_s": busy}
        figures.append({"part": "vision" if vision else "language", "stamp": known, "count": count, **times})
    print(f"ISA: {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all')}; read {speed.read / 1e9:.1f} GB/s")
    for name, rate in speed.products.items():
        print(f"{name}: {rate / 1e9:.1f} G/s")
    print("| | format | predicted | measured (of CPU time) | ratio |\n| --- | --- | --- | --- | --- |")
    for what, form, predicted, took, busy, ratio in rows:
        expected = f"{1000 * predicted:.0f} ms" if predicted else ""
        print(f"| {what} | {form} | {expected} | {1000 * took:.0f} ms ({1000 * busy:.0f}) | {ratio} |")
    if options.json:
        isa = os.environ.get("OV_CPU_MAX_ISA", "all")
        report(
            {**provenance("benchmarks.predictions"), "isa": isa, "speed": asdict(speed), "figures": figures},
            options.json,
        )


if __name__ == "__main__":
    main()
