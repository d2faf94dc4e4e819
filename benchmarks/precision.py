"""Time and error of an IR by the CPU plugin's settings: python -m benchmarks.precision MODEL_DIR/FILE.xml [...]

Every file is compiled once for each precision and group size of dynamic quantization, and all are measured in turn,
round after round. A vision encoder gets pictures of 1, 2 and 4 tiles, a language model a step of 1, 32 and 256 tokens
of text. Also printed: the error of what comes out, relative to the first file in f32 without dynamic quantization: the
norm of the difference over the norm, of the output where it is largest. `devices.py` goes by these figures.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import openvino as ov
from transformers import AutoConfig

from ov_mllama.runtime.cross_attention import no_images
from ov_mllama.runtime.ir import ir_stamp
from ov_mllama.runtime.language import language_inputs
from ov_mllama.runtime.shapes import MllamaShapes
from ov_mllama.runtime.vision import image_inputs

TILES, TOKENS = (1, 2, 4), (1, 32, 256)
RATIOS = {1: 1, 2: 2, 4: 6}  # number of tiles: a canvas of so many


def inputs_of(model_dir: Path, vision: bool, tokens: tuple[int, ...] = TOKENS) -> dict[int, dict]:
    """Return the inputs of one inference, by number of tiles or tokens."""
    shapes, rng = MllamaShapes.from_config(AutoConfig.from_pretrained(model_dir)), np.random.default_rng(0)
    if not vision:
        words = {count: rng.integers(1000, 100_000, (1, count)) % shapes.vocab_size for count in tokens}
        return {count: language_inputs(ids, no_images(shapes)) for count, ids in words.items()}
    inputs = {}
    for count in TILES:
        pixels = np.zeros((4, 3, shapes.tile_size, shapes.tile_size), np.float32)
        # smooth, as pictures are: noise alone makes activations unlike those of any picture
        waves = rng.normal(size=(count, 3, 2))[..., None] * np.linspace(0, 6, shapes.tile_size)
        pixels[:count] = np.sin(waves[:, :, 0, :, None] + waves[:, :, 1, None, :])
        inputs[count] = image_inputs(pixels, RATIOS[count], np.arange(4) < count, one_padding_tile=True)
    return inputs


def infer(request: ov.InferRequest, inputs: dict) -> tuple[float, dict]:
    """Run one inference; return its seconds, and the outputs by name."""
    if request.query_state():
        request.reset_state()
    started = time.perf_counter()
    result = request.infer(inputs, share_inputs=True)
    return time.perf_counter() - started, {port.get_any_name(): value for port, value in result.items()}


def error(outputs: dict, exact: dict) -> float:
    """Return the largest of all outputs' relative errors."""
    return max(float(np.linalg.norm(outputs[name] - exact[name]) / np.linalg.norm(exact[name])) for name in exact)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="IRs of one kind; the first is what errors are relative to")
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--groups", nargs="+", type=int, default=[0, 32, 64, 128], help="0: no dynamic quantization")
    parser.add_argument("--sizes", nargs="+", type=int, help=f"tiles, default {TILES}, or tokens, default {TOKENS}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    inputs = inputs_of(options.files[0].parent, "vision" in options.files[0].name)
    inputs = {size: feed for size, feed in inputs.items() if not options.sizes or size in options.sizes}
    core, requests, exact = ov.Core(), {}, {}
    reference = core.compile_model(options.files[0], "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"}).create_infer_request()
    for count, feed in inputs.items():
        exact[count] = {name: value.copy() for name, value in infer(reference, feed)[1].items()}
    del reference
    for path, precision, group in itertools.product(options.files, options.precisions, options.groups):
        if group != options.groups[0] and not ir_stamp(path).get("format", "").endswith("sym"):
            continue  # dynamic quantization is for compressed weights only
        config = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        requests[path.stem, precision, group] = core.compile_model(path, "CPU", config).create_infer_request()
    seconds = {key: {count: [] for count in inputs} for key in requests}
    errors = {}
    for _ in range(options.rounds + 1):  # the first compiles and repacks, and is not counted
        for key, request in requests.items():
            for count, feed in inputs.items():
                took, outputs = infer(request, feed)
                seconds[key][count].append(took)
                errors[key, count] = error(outputs, exact[count])
    print(f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}; ms, and error")
    for (name, precision, group), times in seconds.items():
        cells = [
            f"{count}: {1000 * statistics.median(took[1:]):.0f} ({errors[(name, precision, group), count]:.4f})"
            for count, took in times.items()
        ]
        print(f"{name} | {precision} | group {group} | " + " | ".join(cells))


if __name__ == "__main__":
    main()
