"""Inference precision of each IR on this device, from the CPU's instructions and the IR's stamp.

By default OpenVINO's own: bf16 where the CPU has it, else f32. Exceptions are measured by
`python -m benchmarks.precision` (benchmarks/README.md, "Precision"); a given `ov_config` overrides them.
"""

import math
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import openvino as ov
import psutil
import torch

from .errors import InputError
from .memory import CGROUPS, OWN_CGROUP, group_folders


@dataclass(frozen=True)
class Cpu:
    """Matrix instructions of a CPU.

    Attributes:
        amx: tiles (Xeons from 2023 on), for products in 8 bit and bf16.
        bf16: vectors of bf16; faster than f32 on AMD (Zen 4), slower on an Intel Xeon without AMX.
        vnni: vectors of 8 bit.
        amd, arm: the kind, if not Intel's.
    """

    amx: bool = False
    bf16: bool = False
    vnni: bool = False
    amd: bool = False
    arm: bool = False

    @property
    def in_8_bit(self) -> bool:
        """True if products of compressed weights are computed in 8 bit; of ARM CPUs it is not known, and assumed."""
        return self.vnni or self.arm

    @classmethod
    def here(cls) -> "Cpu":
        """Detect this machine's, as far as OpenVINO and its oneDNN may use it (`may_use`)."""
        has, core = torch.cpu.get_capabilities(), ov.Core()
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        return cls(
            amx=bool(has.get("amx_bf16")) and may_use("amx"),
            bf16="BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") and may_use("bf16"),
            vnni=bool(has.get("avx512_vnni") or has.get("avx_vnni")) and may_use("vnni"),
            amd="AMD" in name,
            arm=platform.machine().lower() in ("aarch64", "arm64") or bool(re.search("ARM|Apple|Neoverse", name)),
        )


# Instruction sets that include an attribute of `Cpu`, as OV_CPU_MAX_ISA and ONEDNN_MAX_CPU_ISA name them
CAPS = {"amx": "AMX", "bf16": "AMX|FP16|BF16|VNNI_2", "vnni": "AMX|FP16|BF16|VNNI"}


def may_use(attribute: str) -> bool:
    """Return whether the variables that simulate an older CPU allow an attribute of `Cpu`."""
    caps = (os.environ.get(name, "").upper() for name in ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA"))
    return all(re.search(f"^$|ALL|DEFAULT|{CAPS[attribute]}", cap) for cap in caps)


class Chosen(NamedTuple):
    """The result of `choose`.

    Attributes:
        properties: for `ov.Core.compile_model`.
        reason: for display.
        bf16: whether a CPU computes in bf16, so that inputs may be rounded beforehand.
    """

    properties: dict
    reason: str
    bf16: bool = False


PRECISION, GROUP = "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# Activations per scale where weights have a scale per row: larger groups were slower in the vision encoder and less
# exact, smaller ones slower in both models. Where weights have groups, theirs is required.
ROW_GROUP = 128


def choose(
    part: str, stamp: dict[str, str], device: str = "CPU", ov_config: dict | None = None, cpu: Cpu | None = None
) -> Chosen:
    """Choose the precision of an IR.

    Args:
        part: "vision" or "language".
        stamp: of the IR (`ir.ir_stamp`): `format` and `group_size` count.
        device: on other devices than a CPU, "AUTO" included, OpenVINO's defaults apply.
        ov_config: OpenVINO properties that override the choice.
        cpu: default `Cpu.here()`.
    """
    given = dict(ov_config or {})
    if device.split(".")[0] != "CPU":
        return Chosen(given, f"{device}'s default")
    if str(given.get("EXECUTION_MODE_HINT")).endswith("ACCURACY"):  # any choice would undo it
        return Chosen(given, "all in f32, as EXECUTION_MODE_HINT is ACCURACY")
    cpu, weights = cpu or Cpu.here(), stamp.get("format", "16 bit")
    precision, why = None, "OpenVINO's choice for this CPU"
    # generating is bound by memory bandwidth, encoding an image by arithmetic
    if part == "language" and weights.startswith("int") and cpu.amx:
        precision, why = "f32", "with AMX, a token takes half to three quarters of bf16's time"
    if part == "vision" and cpu.bf16 and not (cpu.amx or cpu.amd or cpu.arm):
        precision, why = "f32", "without AMX, an Intel CPU is slower in bf16"
    if not (cpu.bf16 or cpu.arm):  # OpenVINO's choice too, unless ONEDNN_MAX_CPU_ISA alone simulates an older CPU
        precision = "f32"
    properties: dict = {PRECISION: precision} if precision else {}
    reason = f"{weights} weights, in {precision or ('bf16' if cpu.bf16 else 'f32')}: {why}"
    by_row = part == "vision" or stamp.get("group_size") == "-1"
    group = ROW_GROUP if by_row else int(stamp.get("group_size", 0))  # 0: compressed before stamps had it
    # weights that are only stored in 8 or 4 bits; a static "int8" has its activations' scales in the graph
    if weights.endswith("sym") and not cpu.in_8_bit:
        properties[GROUP] = 0  # likewise
    elif weights.endswith("sym") and cpu.vnni and group:
        properties[GROUP] = group
        reason += f"; {group} activations share a scale" + ", as weights do" * (not by_row)
    overridden = [f"{name}={given[name]}" for name in properties if name in given]
    reason += f" (overridden by {', '.join(overridden)})" * bool(overridden)
    properties |= given
    computed = str(properties.get(PRECISION, "bf16"))  # text, or OpenVINO's Type
    return Chosen(properties, reason, cpu.bf16 and ("bf16" in computed or "bfloat16" in computed))


def cores() -> int:
    """Return the physical cores that this process may use: OpenVINO's threads on a CPU whose cores are alike."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def quota(groups: Path = CGROUPS, own: Path = OWN_CGROUP) -> float:
    """Return the cores' worth of time that control groups grant this process (`docker run --cpus`); infinity without a
    limit."""
    limits = []
    for folder in group_folders(groups, own):
        words = (folder / "cpu.max").read_text(encoding="utf-8").split() if (folder / "cpu.max").is_file() else ["max"]
        limits += [int(words[0]) / int(words[1])] if words[0] != "max" else []
    return min(limits, default=math.inf)


def check_device(device: str) -> None:
    """Raise an InputError for a device that OpenVINO does not find; combinations ("AUTO:GPU,CPU") it checks itself."""
    found = [*ov.Core().available_devices, "AUTO"]
    if ":" not in device and device.split(".")[0] not in {name.split(".")[0] for name in found}:
        raise InputError(f"There is no device {device} here: choose one of {', '.join(found)}.")


def has_own_memory(device: str) -> bool:
    """Return whether a device has memory of its own, as a graphics card, so that the machine's free memory does not
    limit it. ("AUTO" does not tell.)"""
    try:
        return ov.Core().get_property(device, "DEVICE_TYPE") == ov.properties.device.Type.DISCRETE
    except RuntimeError:
        return False
