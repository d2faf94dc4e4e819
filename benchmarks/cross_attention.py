"""One decoded token's cross-attention over a picture's rows, laid out in three ways: time and the plugin's counters.

    python -m benchmarks.cross_attention [--rows 6404] [--precision f32]

The widths are the 11B's, a layer's attention without its projections:
    as transformers   K/V as the projections leave them; heads repeated, keys transposed and scaled, a mask added
    as states         the same in the language IR's own state, for the plugin's scaled_dot_product_attention
    as this project   K/V un-repeated, keys transposed and scaled when the picture was encoded, one zero for a mask
"""

import argparse
import statistics
import time
from collections import Counter

import numpy as np
import openvino as ov
import torch
import torch.nn.functional as F
from openvino.passes import MakeStateful, Manager  # noqa: TID251
from torch import nn
from transformers.models.mllama.modeling_mllama import repeat_kv

HEADS, KV_HEADS, DIM = 32, 8, 128
GROUPS = HEADS // KV_HEADS


class AsTransformers(nn.Module):
    """query [1, heads, 1, dim], key and value [1, kv heads, rows, dim], bias [1, 1, 1, rows]."""

    def forward(self, query, key, value, bias):
        scores = query @ repeat_kv(key, GROUPS).transpose(2, 3) * DIM**-0.5 + bias
        return scores.softmax(-1) @ repeat_kv(value, GROUPS)


class AsStates(nn.Module):
    """The same without a mask; key and value go out as they came, to become states."""

    def forward(self, query, key, value):
        attended = F.scaled_dot_product_attention(query, repeat_kv(key, GROUPS), repeat_kv(value, GROUPS))
        return attended, key + 0, value + 0


class AsThisProject(nn.Module):
    """key [1, kv heads, dim, rows], transposed and scaled; bias [1, 1, 1, 1]; as `LanguageModel` computes it."""

    def forward(self, query, key, value, bias):
        scores = query.reshape(1, KV_HEADS, GROUPS, DIM) @ key + bias
        return (scores.softmax(-1) @ value).view(1, HEADS, 1, DIM)


def layouts(rows: int) -> dict[str, tuple[ov.Model, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """By name: the model, its inputs, and what its states have to hold."""
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((1, HEADS, 1, DIM), (1, KV_HEADS, rows, DIM), (1, KV_HEADS, rows, DIM))
    )
    ready = np.ascontiguousarray(key.swapaxes(2, 3) * DIM**-0.5)
    named = {
        "as transformers": (AsTransformers(), (query, key, value, np.zeros((1, 1, 1, rows), np.float32))),
        "as states": (AsStates(), (query, key, value)),
        "as this project": (AsThisProject(), (query, ready, value, np.zeros((1, 1, 1, 1), np.float32))),
    }
    result = {}
    for name, (module, arrays) in named.items():
        model = ov.convert_model(module, example_input=tuple(torch.from_numpy(array) for array in arrays))
        for port, array, label in zip(model.inputs, arrays, ("query", "key", "value", "bias"), strict=False):
            port.get_tensor().set_names({label})
            dynamic = {"key": 3 if name == "as this project" else 2, "value": 2, "bias": 3}.get(label)
            port.get_node().set_partial_shape(
                ov.PartialShape([-1 if axis == dynamic else size for axis, size in enumerate(array.shape)])
            )
        model.validate_nodes_and_infer_types()
        inputs, states = dict(zip(("query", "key", "value", "bias"), arrays, strict=False)), {}
        if name == "as states":
            for port, label in zip(model.outputs[1:], ("key", "value"), strict=True):
                port.get_tensor().set_names({f"{label}.out"})
            manager = Manager()
            manager.register_pass(MakeStateful({"key": "key.out", "value": "value.out"}))
            manager.run_passes(model)
            states = {label: inputs.pop(label) for label in ("key", "value")}
        result[name] = model, inputs, states
    return result


def measure(model, inputs, states, precision: str, repeats: int) -> tuple[float, Counter, np.ndarray]:
    """Median milliseconds of an inference, milliseconds by kind of node in the last one, and its output."""
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": True})
    request = compiled.create_infer_request()
    for state in request.query_state():
        state.state = ov.Tensor(next(array for label, array in states.items() if label in state.name))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        output = request.infer(inputs, share_inputs=True)[0]
        seconds.append(time.perf_counter() - started)
    nodes = Counter()
    for node in request.profiling_info:
        nodes[node.node_type] += node.real_time.total_seconds() * 1000
    return 1000 * statistics.median(seconds), nodes, np.array(output)


def main() -> None:
    """The command line: measures the layouts in turn and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6404, help="of a picture of four tiles; one has 1601")
    parser.add_argument("--precision", default="f32", choices=("f32", "bf16"))
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    outputs = []
    for name, arguments in layouts(options.rows).items():
        milliseconds, nodes, output = measure(*arguments, options.precision, options.repeats)
        spent = ", ".join(f"{kind} {time:.2f}" for kind, time in nodes.most_common() if time >= 0.01)
        print(f"{name}: {milliseconds:.2f} ms ({spent})")
        outputs.append(output)
    largest = max(np.abs(output - outputs[0]).max() for output in outputs)
    print(f"The outputs differ by {largest:.1e} at most, of values up to {np.abs(outputs[0]).max():.1e}")


if __name__ == "__main__":
    main()
