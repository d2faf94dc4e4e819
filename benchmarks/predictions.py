"""Predicted and measured time of images, a prompt and tokens on this CPU: python -m benchmarks.predictions MODEL_DIR

MODEL_DIR holds IRs made of `benchmarks.make_checkpoint`, such as `make build/slice/config.json` writes; every language
model and vision encoder in it is measured, all of a kind in turn, round after round, and the fastest round counts. The
predictions are the plan's (`ov_mllama/export/costs.py`), from speeds that are measured before and after; the faster
count. OV_CPU_MAX_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 simulate an older CPU.
"""

import argparse
import os
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

TILES, TOKENS = (1, 2, 4), (1, 4, PROMPT)


def measured_seconds(files: list[Path], rounds: int, steps: int) -> dict[tuple[str, int], float]:
    """Return the fastest seconds of each IR and number of tiles or tokens.

    Args:
        steps: inferences in a row of a step of few tokens, of which the fastest counts.
    """
    vision = "vision" in files[0].name
    inputs, seconds = inputs_of(files[0].parent, vision, TOKENS), {}
    requests = {}
    for path in files:
        chosen = choose("vision" if vision else "language", ir_stamp(path))
        requests[path.stem] = ov.Core().compile_model(path, "CPU", chosen.properties).create_infer_request()
        infer(requests[path.stem], inputs[1])  # repacks the weights
    for _ in range(rounds):
        for name, request in requests.items():
            for count, feed in inputs.items():
                for _ in range(1 if vision or count == PROMPT else steps):
                    took = infer(request, feed)[0]
                    seconds[name, count] = min(seconds.get((name, count), took), took)
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
    config, speed, rows = AutoConfig.from_pretrained(options.model_dir), measure(), []
    seconds = {}
    for files in groups_of(options.model_dir, *(part in options.parts for part in ("vision", "language"))):
        if files and all(path.is_file() for path in files):
            seconds |= measured_seconds(files, options.rounds, options.steps)
    speed = faster(speed, measure())
    for (name, count), took in seconds.items():
        vision, stamp = "vision" in name, ir_stamp(options.model_dir / f"{name}.xml")
        predicted = predicted_seconds(config, speed, stamp, vision).get(count)
        what = f"image, {count} tiles" if vision else f"step, {count} tokens"
        ratio = f"{predicted / took:.2f}" if predicted else ""
        rows.append((what, format_of(stamp), took, predicted, ratio))
    print(f"ISA: {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all')}; read {speed.read / 1e9:.1f} GB/s")
    for name, rate in speed.products.items():
        print(f"{name}: {rate / 1e9:.1f} G/s")
    print("| | format | predicted | measured | ratio |\n| --- | --- | --- | --- | --- |")
    for what, form, took, predicted, ratio in rows:
        expected = f"{1000 * predicted:.0f} ms" if predicted else ""
        print(f"| {what} | {form} | {expected} | {1000 * took:.0f} ms | {ratio} |")
    if options.json:
        names = ("what", "format", "measured_s", "predicted_s")
        figures = [dict(zip(names, row[:4], strict=True)) for row in rows]
        report({**provenance("benchmarks.predictions"), "speed": asdict(speed), "figures": figures}, options.json)


if __name__ == "__main__":
    main()
