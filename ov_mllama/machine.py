"""What this machine has: free memory and disk, cores, and what its CPU multiplies with. The only file that looks."""

import ctypes
import math
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import openvino as ov
import psutil
import torch

CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# Of a control group: its controllers in OWN_GROUPS; files with its limit and its usage; in its memory.stat, what of the
# usage are files, and what of these has no other place. (Version 2, then version 1 of the kernel's interface.)
GROUP_FILES = {
    "": ("memory.max", "memory.current", "file", "shmem"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"),
}


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


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Attributes:
        memory: bytes that are free, or can be had by dropping cached files.
        disk: bytes that are free where the model will be.
        downloads: those where checkpoints are downloaded to; None where that is the same disk.
        cores: physical ones that this process may use.
    """

    memory: float
    disk: float
    cores: int = 2
    downloads: float | None = None

    @classmethod
    def here(cls, folder: str | Path, cache: str | Path | None = None) -> "Machine":
        """This machine now.

        Args:
            folder: where the model will be; it need not exist yet.
            cache: where checkpoints are downloaded to, likewise; default there too.
        """
        apart = cache is not None and existing(cache).stat().st_dev != existing(folder).stat().st_dev
        return cls(free_memory(), free_disk(folder), cores(), free_disk(cache or folder) if apart else None)


def cores() -> int:
    """Physical cores that this process may run on; OpenVINO takes as many threads."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def existing(folder: str | Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in [Path(folder), *Path(folder).resolve().parents] if path.is_dir())


def free_disk(folder: str | Path) -> float:
    """Bytes that are free on the disk of a folder, or of what will hold it."""
    return shutil.disk_usage(existing(folder)).free


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


def free_memory() -> float:
    """Bytes of memory that this process can still get: of the machine or, if that is less, of the control group that it
    is confined to, as in a container (`docker run --memory`), which the machine's own figure does not know."""
    return min(psutil.virtual_memory().available, group_memory())


def give_back() -> None:
    """Freed memory goes back to the system. glibc keeps what was allocated in pieces of up to 32 MB for later: after a
    few pictures with the 11B 2.4 GB, which no other program gets, nor does `free_memory` count them. (malloc_trim(3);
    elsewhere nothing is done.)"""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)


def group_memory(groups: Path = CONTROL_GROUPS, own: Path = OWN_GROUPS) -> float:
    """Bytes left in the tightest control group around this process, cached files not counted; infinite without one.

    Args:
        groups, own: Linux's files; given by tests.
    """
    left = math.inf
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in GROUP_FILES:
            top = groups / controllers
            # seen from inside a container the path is the host's and leads nowhere: its own group is then the top
            for folder in accumulate(Path(path).parts[1:], Path.joinpath, initial=top):
                left = min(left, left_in(folder, *GROUP_FILES[controllers]))
    return left


def left_in(folder: Path, limit_file: str, usage_file: str, files: str, kept: str) -> float:
    """Bytes left in one control group, as `group_memory`."""
    limit = folder / limit_file
    if not limit.is_file() or not limit.read_text(encoding="utf-8").strip().isdigit():  # "max"
        return math.inf
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    usage = int((folder / usage_file).read_text(encoding="utf-8")) - int(stat[files]) + int(stat[kept])
    return int(limit.read_text(encoding="utf-8")) - usage
