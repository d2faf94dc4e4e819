"""Free memory and disk of this machine, and estimates of the memory that images and prompts take."""

import ctypes
import math
import shutil
import sys
from itertools import accumulate
from pathlib import Path

import psutil
from transformers import MllamaConfig

from .shapes import MllamaShapes

# Peak bytes of encoding an image, per row of its tiles and channel of the tower
VISION_ROW_BYTES = 270
# Bytes of a prompt step: per token and intermediate channel; per pair of tokens (causal mask, attention of one layer);
# per token, head and image row
MLP_BYTES, SCORE_BYTES, IMAGE_SCORE_BYTES = 28, 48, 16
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def existing(folder: str | Path) -> Path:
    """Return a folder, or its nearest parent that exists."""
    return next(path for path in [Path(folder), *Path(folder).resolve().parents] if path.is_dir())


def free_disk(folder: str | Path) -> float:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def free_memory() -> float:
    """Return the bytes that this process can still allocate: of the machine or, if less, of its control group, as in a
    container (`docker run --memory`)."""
    return min(psutil.virtual_memory().available, group_memory())


def trim_memory() -> None:
    """Return freed memory to the system (malloc_trim(3), on Linux). glibc caches allocations of up to 32 MB: 2.4 GB
    after a few images with the 11B, which `free_memory` does not count."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)


def group_memory(groups: Path = CGROUPS, own: Path = OWN_CGROUP) -> float:
    """Return the bytes left in the tightest control group (cgroup v2) of this process; infinity without one."""
    return min(map(left_in, group_folders(groups, own)), default=math.inf)


def group_folders(groups: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[Path]:
    """Return the folders of this process's control groups (cgroup v2), from the top down."""
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    paths = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    # inside a container the path is the host's and leads nowhere: its own group is then the top
    return [folder for path in paths for folder in accumulate(Path(path).parts[1:], Path.joinpath, initial=groups)]


def left_in(folder: Path) -> float:
    """Return the bytes left in one control group."""
    limit = folder / "memory.max"
    if not limit.is_file() or not limit.read_text(encoding="utf-8").strip().isdigit():  # "max"
        return math.inf
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    files = int(stat["file"]) - int(stat["shmem"])  # cached files can be dropped, shared memory cannot
    return int(limit.read_text(encoding="utf-8")) - int((folder / "memory.current").read_text(encoding="utf-8")) + files


def picture_memory(shapes: MllamaShapes, tiles: int) -> float:
    """Return the peak bytes of encoding an image of so many computed tiles, its K/V included."""
    rows = tiles * shapes.patches_per_tile
    return VISION_ROW_BYTES * rows * shapes.vision_size + shapes.cross_kv_bytes(rows)


def prompt_memory(config: MllamaConfig, batch: int, tokens: int, new: int, rows: int) -> float:
    """Return the peak bytes of one prefill step.

    Args:
        tokens: of the prompt; `new` of them are computed in this step.
        rows: K/V rows of its images.
    """
    text = getattr(config, "text_config", config)
    of_text = batch * new * (MLP_BYTES * text.intermediate_size + SCORE_BYTES * tokens)
    return of_text + new * IMAGE_SCORE_BYTES * text.num_attention_heads * rows
