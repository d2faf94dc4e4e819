"""What an IR is computed in on this device, and why: the CPU's instructions and the IR's stamp decide, nothing else.

Where nothing is known to be better, OpenVINO's own choice stands: bf16 where the CPU has it, else f32. The measurements
behind the exceptions: `python -m benchmarks.precision`; benchmarks/README.md, "Precision". What somebody gives as
`ov_config` goes before all of them.
"""

import os
import platform
import re
from dataclasses import dataclass
from typing import NamedTuple

import openvino as ov
import psutil
import torch


@dataclass(frozen=True)
class Cpu:
    """What of a CPU decides how fast it multiplies.

    Attributes:
        amx: tiles (Xeons from 2023 on), for products of 8 bit and of bf16.
        bf16: vectors of bf16. On AMD's CPUs (Zen 4) faster than f32, on an Intel Xeon without AMX slower.
        vnni: vectors of 8 bit.
        amd, arm: whose it is or of which kind, if not Intel's.
    """

    amx: bool = False
    bf16: bool = False
    vnni: bool = False
    amd: bool = False
    arm: bool = False

    @classmethod
    def here(cls) -> "Cpu":
        """This machine's, as far as oneDNN may use it (its variable ONEDNN_MAX_CPU_ISA can forbid AMX)."""
        has, core = torch.cpu.get_capabilities(), ov.Core()
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        return cls(
            amx=bool(has.get("amx_bf16")) and "AMX" in os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX").upper(),
            bf16="BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
            vnni=bool(has.get("avx512_vnni") or has.get("avx_vnni")),
            amd="AMD" in name,
            arm=platform.machine().lower() in ("aarch64", "arm64") or bool(re.search("ARM|Apple|Neoverse", name)),
        )


class Chosen(NamedTuple):
    """What to compute in.

    Attributes:
        properties: for `ov.Core.compile_model`.
        reason: a sentence for people.
        bf16: whether that is bf16, on a CPU that has it: what it reads can then be rounded beforehand.
    """

    properties: dict
    reason: str
    bf16: bool = False


PRECISION, GROUP = "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# Numbers of an activation that share a scale where weights share one by the row: more were slower in the vision encoder
# and less close, fewer slower in both models. Where weights have groups, it must be theirs.
ROW_GROUP = 128


def choose(
    part: str, stamp: dict[str, str], device: str = "CPU", ov_config: dict | None = None, cpu: Cpu | None = None
) -> Chosen:
    """What one of the two IRs is computed in.

    Args:
        part: "vision" or "language".
        stamp: of the IR (`ir.ir_stamp`): `format` and `group_size` decide.
        device: only for a CPU anything is chosen. ("AUTO" is left alone: which device it takes is known only when the
            model is compiled.)
        ov_config: OpenVINO properties that go before those chosen.
        cpu: default `Cpu.here()`.
    """
    given = dict(ov_config or {})
    if device.split(".")[0] != "CPU":
        return Chosen(given, f"as {device} has it")
    if str(given.get("EXECUTION_MODE_HINT")).endswith("ACCURACY"):  # what is chosen here would undo it
        return Chosen(given, "all in f32, for EXECUTION_MODE_HINT is ACCURACY")
    cpu, weights = cpu or Cpu.here(), stamp.get("format", "16 bit")
    precision, why = language_precision(weights, cpu) if part == "language" else vision_precision(cpu)
    properties: dict = {PRECISION: precision} if precision else {}
    reason = f"{weights} weights, in {precision or ('bf16' if cpu.bf16 else 'f32')}: {why}"
    by_row = part == "vision" or stamp.get("group_size") == "-1"
    group = ROW_GROUP if by_row else int(stamp.get("group_size", 0))  # 0: compressed before the stamp said it
    # weights that are only stored in 8 or 4 bits; a static "int8" has its activations' scales in the graph
    if weights.endswith("sym") and cpu.vnni and group:
        properties[GROUP] = group
        reason += f"; {group} numbers of an activation share a scale" + ", as weights do" * (not by_row)
    overridden = [f"{name}={given[name]}" for name in properties if name in given]
    reason += f" (but as given, {', '.join(overridden)})" * bool(overridden)
    properties |= given
    computed = str(properties.get(PRECISION, "bf16"))  # text, or OpenVINO's Type
    return Chosen(properties, reason, cpu.bf16 and ("bf16" in computed or "bfloat16" in computed))


def language_precision(weights: str, cpu: Cpu) -> tuple[str | None, str]:
    """Precision, None for OpenVINO's own choice, and why. A token waits for the weights to be read."""
    if weights.startswith("int") and cpu.amx:
        return "f32", "with AMX, a token takes half to three quarters of bf16's time"
    return None, "OpenVINO's choice for this CPU"


def vision_precision(cpu: Cpu) -> tuple[str | None, str]:
    """Precision, None for OpenVINO's own choice, and why. A picture waits for products only."""
    if cpu.bf16 and not (cpu.amx or cpu.amd or cpu.arm):
        return "f32", "without AMX, an Intel CPU is slower in bf16"
    return None, "OpenVINO's choice for this CPU"


def cores() -> int:
    """Physical cores that this process may run on; OpenVINO takes as many threads."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def check_device(device: str) -> None:
    """Refuses a device that OpenVINO does not find here; what is made of several ("AUTO:GPU,CPU") it looks at itself.

    Raises:
        ValueError: with those that it finds.
    """
    found = [*ov.Core().available_devices, "AUTO"]
    if ":" not in device and device.split(".")[0] not in {name.split(".")[0] for name in found}:
        raise ValueError(f"There is no device {device} here, only {', '.join(found)}.")


def has_own_memory(device: str) -> bool:
    """Whether an OpenVINO device computes in memory of its own, as a graphics card does: the machine's free memory then
    says nothing about what fits. ("AUTO" does not tell.)"""
    try:
        return ov.Core().get_property(device, "DEVICE_TYPE") == ov.properties.device.Type.DISCRETE
    except RuntimeError:
        return False
