"""Parts of a token's time: python -m benchmarks.token_time MODEL_DIR [--plot FILE.svg]

The plugin's counters of steps of one token behind a picture of four tiles and a question, summed by what they are for,
beside the bytes that each part reads and the share of the memory's speed that it reaches; what is left of the step is
Python's and the plugin's own. Counters cost time themselves: the step without them is printed too. (The CPU plugin's
are means over all inferences of a model so far, which is why this one is not warmed up and the means are taken apart.)
"""

import argparse
import re
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from transformers import AutoProcessor

from benchmarks.benchmark import bandwidth, provenance, report
from ov_mllama.export import costs
from ov_mllama.export.samples import photographs
from ov_mllama.runtime.checks import image_arrays
from ov_mllama.runtime.cross_attention import tiles_seen
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import prompts_about
from ov_mllama.runtime.vision import ImageInputs, image_keys

PARTS = {  # what an operation's name or type begins with or holds, the first that fits
    "head": r"lm_head",
    "MLPs' weights": r"\.mlp\.\w+_proj",
    "attention's weights": r"_attn\.\w+_proj",
    "attention over text": r"ScaledDotProductAttention",
    "attention over the picture": r"cross_attn_key_values|aten::(matmul|softmax)",
}
REST, OUTSIDE = "norms and the rest", "Python and the plugin"
STEPS = 20


def part_of(name: str) -> str:
    """Return the part that an operation belongs to, of PARTS, or REST."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), REST)


def steps(model, inputs, count: int):
    """Yield the infer request and the seconds of each of `count` steps of one token behind a prompt."""
    images = image_arrays(*(inputs[name] for name in ImageInputs._fields))
    ids, session = inputs["input_ids"].numpy(), model.language_model.session()
    prompt = Prompt(ids, seen=tiles_seen(images.cross_attention_mask, ids.shape[1]), image_keys=image_keys(images))
    session.prefill(prompt, model.image_encoder.encode(images))
    for token in range(count):
        started = time.perf_counter()
        session.decode(np.array([[1000 + token]]))
        yield session._request, time.perf_counter() - started  # noqa: SLF001, whose counters nobody else needs


def read_bytes(config, rows: int, in_bf16: bool) -> dict[str, float]:
    """Return the bytes that a token reads of each part of a model with INT4 weights, its head in INT8."""
    size, text = costs.weights(config), config.text_config
    in_4_bit = costs.INT8_BYTES_PER_WEIGHT * (1 - costs.INT4_SAVING)
    head_dim = text.hidden_size // text.num_attention_heads
    layers = len(text.cross_attention_layers)
    return {
        "head": costs.INT8_BYTES_PER_WEIGHT * size.head,
        "MLPs' weights": in_4_bit * 3 * size.mlp,
        "attention's weights": in_4_bit * size.attention,
        "attention over the picture": (2 if in_bf16 else 4) * 2 * layers * rows * text.num_key_value_heads * head_dim,
    }


def plot(seconds: dict[str, float], path: Path) -> None:
    """Plot one bar, part beside part."""
    figure, axis = plt.subplots(figsize=(9, 1.9), layout="constrained")
    left = 0.0
    for part, taken in seconds.items():
        axis.barh(0, 1000 * taken, left=1000 * left, label=f"{part}, {1000 * taken:.0f} ms")
        left += taken
    axis.set(xlabel="ms of a token", yticks=[])
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--picture", default="galaxies", help="of ov_mllama.export.samples; default one of four tiles")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = newest(options.model_dir, LANGUAGE_MODEL_NAME), newest(options.model_dir, VISION_ENCODER_NAME)
    files = {"language_model_name": names[0], "image_encoder_name": names[1], "check_golden": False}
    sample = next(sample for sample in photographs() if sample["name"] == options.picture)
    inputs = prompts_about(AutoProcessor.from_pretrained(options.model_dir), [sample])

    model = OVMLlamaForConditionalGeneration(options.model_dir, **files)
    without = [taken for _, taken in steps(model, inputs, STEPS)]
    del model
    model = OVMLlamaForConditionalGeneration(options.model_dir, **files, ov_config={"PERF_COUNT": "YES"}, warm_up=False)
    totals: list[Counter] = []
    walls = []
    for request, taken in steps(model, inputs, STEPS):
        total: Counter = Counter()
        for info in request.profiling_info:  # inferences so far: the prompt, and each step
            total[part_of(f"{info.node_name} {info.node_type}")] += info.real_time.total_seconds() * (len(totals) + 2)
        totals.append(total)
        walls.append(taken)
    seconds = {part: float(np.median(np.diff([total[part] for total in totals]))) for part in (*PARTS, REST)}
    seconds[OUTSIDE] = float(np.median(walls)) - sum(seconds.values())
    rows = int(inputs["aspect_ratio_mask"].sum()) * model.shapes.patches_per_tile
    speed, read = bandwidth(), read_bytes(model.config, rows, model.language_model.reads_bf16)
    result = {
        **provenance("benchmarks.token_time"),
        "bandwidth_gb_s": speed,
        "step_ms": 1000 * float(np.median(without)),
        "step_with_counters_ms": 1000 * float(np.median(walls)),
        "parts": {
            part: {"ms": 1000 * taken}
            | ({"gb": read[part] / 1e9, "share": read[part] / 1e9 / taken / speed} if part in read else {})
            for part, taken in seconds.items()
        },
    }
    if options.plot:
        plot(seconds, options.plot)
    report(result, options.json)


if __name__ == "__main__":
    main()
