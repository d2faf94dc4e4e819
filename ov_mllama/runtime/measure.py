"""Speed of this machine's CPU, measured once through OpenVINO in a few seconds: matrix products and memory reads.

Each product is computed as a model's are: in the precision of `devices.choose`, with OpenVINO's threads and kernels, so
that cores, affinity, quotas and instructions count as far as OpenVINO uses them.
"""

import json
import logging
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import openvino as ov
import psutil
from openvino import opset13 as op

from .devices import Cpu, choose, cores, quota
from .ir import atomic_write

logger = logging.getLogger(__name__)

# Rows and columns of the matrices: the 11B's vision MLP, and a part of an MLP of its language model
WIDTHS = {"vision": ((5120, 1280), (1280, 5120)), "language": ((8192, 4096),)}
TOKEN, PROMPT, IMAGE = 1, 128, 400  # rows of activations: a token, a step of a prompt, enough of an image
READ_BYTES = 1 << 28  # read to measure memory: more than caches hold
TOKEN_BYTES = 1 << 27  # of matrices for a token, which come from memory each time: likewise
ROUNDS, LEAST_S = 3, 0.08  # each product is repeated so often, and so long
BUSY_PERCENT, BUSY_S = 25, 0.1  # of all CPUs, over so many seconds: then others are computing
# Stamps (`ir.ir_stamp`) of the measured formats
FORMATS: dict[str, dict[str, str]] = {
    "16 bit": {"format": "16 bit"},
    "int8": {"format": "int8_asym", "group_size": "-1"},
    "int4_asym, groups of 64": {"format": "int4_asym", "group_size": "64"},
    "int4_sym, groups of 128": {"format": "int4_sym", "group_size": "128"},
    "q4_k_m": {"format": "q4_k_m", "group_size": "32"},
    "q8_0": {"format": "q8_0", "group_size": "32"},
}
# Types of values, zero points (None: there are none) and scales. Most of a Q4_K_M is Q4_K, which is measured; the rest,
# Q6_K, is about as fast
STORED: dict[str, tuple[ov.Type, ov.Type | None, ov.Type]] = {
    "int8_asym": (ov.Type.u8, ov.Type.u8, ov.Type.f16),
    "int4_asym": (ov.Type.u4, ov.Type.u4, ov.Type.f16),
    "int4_sym": (ov.Type.i4, None, ov.Type.f16),
    "q4_k_m": (ov.Type.u4, ov.Type.f32, ov.Type.f32),
    "q8_0": (ov.Type.i8, None, ov.Type.f32),
}
ROWS = {"vision": (IMAGE,), "language": (TOKEN, PROMPT)}
PRODUCTS = [("vision", form, IMAGE) for form in ("16 bit", "int8")]
# a token in 16 bit waits for memory alone
PRODUCTS += [
    ("language", form, rows) for form in FORMATS for rows in ROWS["language"] if (form, rows) != ("16 bit", TOKEN)
]
METHOD = 3  # raise when measurements change: older ones in the cache no longer count


@dataclass(frozen=True)
class Speed:
    """Speed of a CPU.

    Attributes:
        threads: that OpenVINO computes with.
        read: bytes per second from memory.
        products: multiply-adds per second, by `name_of` part, format and rows.
    """

    threads: int
    read: float
    products: dict[str, float]

    def rate(self, part: str, form: str, rows: int) -> float:
        """Return the multiply-adds per second of a product in PRODUCTS."""
        return self.products[name_of(part, form, rows)]


def name_of(part: str, form: str, rows: int) -> str:
    """Return the name of a measured product.

    Args:
        part: "vision" or "language", which may be computed in different precisions.
        form: of FORMATS.
        rows: TOKEN, PROMPT or IMAGE.
    """
    return f"{part}, {form}, {rows}"


def measure(cpu: Cpu | None = None) -> Speed:
    """Measure this machine's speed."""
    cpu, busy = cpu or Cpu.here(), is_busy()
    products, threads = {}, 1
    for part, form, rows in PRODUCTS:
        model = matrices(part, form) if rows > TOKEN else token_matrices(form)
        compiled = ov.Core().compile_model(model, "CPU", choose(part, FORMATS[form], cpu=cpu).properties)
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        count = len(model.outputs) * sum(rows * columns for rows, columns in WIDTHS[part])
        seconds = seconds_of(compiled, np.ones((1, rows, WIDTHS[part][0][1]), np.float32), busy)
        products[name_of(part, form, rows)] = rows * count / seconds
    # OpenVINO does not count a quota: its threads run until that is used up, and then wait
    share = min(1.0, quota() / threads)
    return Speed(threads, share * measure_read(busy), {name: share * rate for name, rate in products.items()})


def is_busy() -> bool:
    """Return whether other programs use a good part of the CPUs now."""
    return psutil.cpu_percent(BUSY_S) > BUSY_PERCENT


def measure_read(busy: bool) -> float:
    """Return the bytes per second that OpenVINO reads from memory with all threads."""
    values = np.ones((READ_BYTES // 4096, 1024), np.float32)
    read = op.parameter(values.shape, np.float32)
    model = ov.Model([op.reduce_max(read, np.array([1]))], [read])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return values.nbytes / seconds_of(compiled, values, busy)


def seconds_of(compiled: ov.CompiledModel, values: np.ndarray, busy: bool) -> float:
    """Return the seconds of an inference, the first, which repacks weights, left out.

    Args:
        busy: other programs are computing: then these are seconds of CPU time over threads, which come close to what
            the inference takes without them.
    """
    threads = compiled.get_property("INFERENCE_NUM_THREADS")
    request, times, of_cpu = compiled.create_infer_request(), [], []
    while len(times) < 1 + ROUNDS or sum(times[1:]) < LEAST_S:
        began, started = time.process_time(), time.perf_counter()
        request.infer({0: values}, share_inputs=True)
        times.append(time.perf_counter() - started)
        of_cpu.append((time.process_time() - began) / threads)
    return min((of_cpu if busy and sys.platform != "win32" else times)[1:])  # Windows counts it in steps of 16 ms


def matrices(part: str, form: str) -> ov.Model:
    """Return the products of a part with weights in a format of FORMATS, as its IR has them."""
    result = given = op.parameter([1, -1, WIDTHS[part][0][1]], np.float32)
    for shape in WIDTHS[part]:
        result = op.gelu(op.matmul(result, weights(shape, FORMATS[form]), False, True), "erf")
    return ov.Model([result], [given])


def token_matrices(form: str) -> ov.Model:
    """Return products of one input with TOKEN_BYTES of matrices of the language model in a format of FORMATS."""
    (shape,) = WIDTHS["language"]
    bits = 4 if STORED[FORMATS[form]["format"]][0].bitwidth == 4 else 8
    count = -(-TOKEN_BYTES * 8 // (bits * math.prod(shape)))
    given = op.parameter([1, -1, shape[1]], np.float32)
    return ov.Model([op.matmul(given, weights(shape, FORMATS[form]), False, True) for _ in range(count)], [given])


def weights(shape: tuple[int, int], stamp: dict[str, str]) -> ov.Output:
    """Return a matrix of arbitrary numbers in a format, decompressed to f32. They differ: OpenVINO folds equal ones."""
    (rows, columns), form = shape, stamp["format"]
    if form == "16 bit":
        return op.convert(constant(ov.Type.bf16, shape), "f32")
    kind, zero_points, scales = STORED[form]
    group = int(stamp["group_size"])
    groups = (rows,) if group == -1 else (rows, columns // group)
    matrix = op.convert(constant(kind, (*groups, columns if group == -1 else group)), scales)
    if zero_points:
        matrix = op.subtract(matrix, in_type(constant(zero_points, (*groups, 1)), scales))
    matrix = op.multiply(matrix, constant(scales, (*groups, 1)))
    return in_type(matrix if group == -1 else op.reshape(matrix, np.array(shape), False), ov.Type.f32)


def in_type(values: ov.Output, kind: ov.Type) -> ov.Output:
    """Return values converted to a type, unless they have it: OpenVINO would not recognise compressed weights."""
    return values if values.get_element_type() == kind else op.convert(values, kind)


def constant(kind: ov.Type, shape: tuple[int, ...]) -> ov.Output:
    """Return a constant of numbers that differ; floating-point ones are between 0.007 and 1.9."""
    tensor = ov.Tensor(kind, ov.Shape(shape))
    if kind == ov.Type.f32:
        tensor.data[:] = np.resize(np.linspace(0.007, 1.9, 997, dtype=np.float32), tensor.data.shape)
    elif kind.is_real():
        lowest = 0x3C00 if kind == ov.Type.bf16 else 0x2000
        tensor.data.view(np.uint16)[:] = np.resize(
            np.arange(lowest, lowest + 0x3F0, dtype=np.uint16), tensor.data.shape
        )
    else:  # in 4 bit a byte holds two
        tensor.data.view(np.uint8)[:] = np.resize(np.arange(251, dtype=np.uint8), tensor.data.shape)
    return op.constant(tensor)


# ---- Cache ----


def speed_here(cpu: Cpu | None = None, file: Path | None = None) -> Speed:
    """Return this machine's speed, from the cache if the same CPU, versions and threads were measured before.

    A cache that cannot be read counts as empty, one that cannot be written is left out.

    Args:
        file: of the cache; default: `cache_file()`. Delete it to measure anew.
    """
    cpu, file = cpu or Cpu.here(), file or cache_file()
    key, cached = machine_key(cpu), read_cache(file)
    if key not in cached:
        logger.info("⌛ Measuring the speed of this machine's CPU, once")
        cached[key] = measure(cpu)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file.parent) as scratch:
                text = json.dumps({name: asdict(speed) for name, speed in cached.items()}, indent=1)
                Path(scratch, file.name).write_text(text, encoding="utf-8")
        except OSError as error:
            logger.debug("%s was not written: %s", file, error)
    return cached[key]


def cache_file() -> Path:
    """Return the file of measurements in the user's cache folder."""
    folder = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "ov-mllama", "speed.json")


def machine_key(cpu: Cpu) -> str:
    """Return a text that differs where speeds may: CPU, its instructions and how many threads may run, OpenVINO, and
    what is measured."""
    name = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    instructions = " ".join(field for field, has in asdict(cpu).items() if has)
    parts = (name, instructions, f"{cores()} cores", f"quota {quota():.2g}", ov.__version__, f"method {METHOD}")
    return "; ".join(parts)


def read_cache(file: Path) -> dict[str, Speed]:
    """Return the valid measurements of a cache file, by `machine_key`."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {key: Speed(**entry) for key, entry in entries.items() if is_valid(entry)}
    except (OSError, ValueError, AttributeError):
        return {}


def is_valid(entry: object) -> bool:
    """Return whether an entry of the cache file is a complete measurement of positive numbers."""
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(Speed)}:
        return False
    products = entry["products"]
    if not isinstance(products, dict) or products.keys() != {name_of(*product) for product in PRODUCTS}:
        return False
    numbers = [entry["threads"], entry["read"], *products.values()]
    return all(type(number) in (int, float) and 0 < number < math.inf for number in numbers)
