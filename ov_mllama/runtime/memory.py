"""What this machine has: free memory and disk, cores, and what its CPU multiplies with. The only file that looks."""

import ctypes
import math
import shutil
import sys
from itertools import accumulate
from pathlib import Path

import psutil
from transformers import MllamaConfig

from .shapes import MllamaShapes

# Bytes at the peak of encoding an image, by row of its tiles and channel of the tower
VISION_ROW_BYTES = 270
# Bytes of a prompt step: by token and intermediate channel; by pair of tokens (causal mask, attention of one layer); by
# token, head and image row
MLP_BYTES, SCORE_BYTES, IMAGE_SCORE_BYTES = 28, 48, 16
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def existing(folder: str | Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in [Path(folder), *Path(folder).resolve().parents] if path.is_dir())


def free_disk(folder: str | Path) -> float:
    """Bytes that are free on the disk of a folder, or of what will hold it."""
    return shutil.disk_usage(existing(folder)).free


def free_memory() -> float:
    """Bytes of memory that this process can still get: of the machine or, if that is less, of the control group that it
    is confined to, as in a container (`docker run --memory`), which the machine's own figure does not know."""
    return min(psutil.virtual_memory().available, group_memory())


def trim_memory() -> None:
    """Freed memory goes back to the system. glibc keeps what was allocated in pieces of up to 32 MB for later: after a
    few pictures with the 11B 2.4 GB, which no other program gets, nor does `free_memory` count them. (malloc_trim(3);
    elsewhere nothing is done.)"""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)


def group_memory(groups: Path = CGROUPS, own: Path = OWN_CGROUP) -> float:
    """Bytes left in the tightest control group (cgroup v2) around this process, cached files not counted; infinite
    without one.

    Args:
        groups, own: Linux's files; given by tests.
    """
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    paths = [line.removeprefix("0::") for line in lines if line.startswith("0::")]
    # inside a container the path is the host's and leads nowhere: its own group is then the top
    folders = [folder for path in paths for folder in accumulate(Path(path).parts[1:], Path.joinpath, initial=groups)]
    return min(map(left_in, folders), default=math.inf)


def left_in(folder: Path) -> float:
    """Bytes left in one control group, as `group_memory`."""
    limit = folder / "memory.max"
    if not limit.is_file() or not limit.read_text(encoding="utf-8").strip().isdigit():  # "max"
        return math.inf
    stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    files = int(stat["file"]) - int(stat["shmem"])  # cached files can be dropped, shared memory cannot
    return int(limit.read_text(encoding="utf-8")) - int((folder / "memory.current").read_text(encoding="utf-8")) + files


def picture_memory(shapes: MllamaShapes, tiles: int) -> float:
    """Bytes that a picture takes while it is encoded, its K/V among them.

    Args:
        tiles: of it that are computed.
    """
    rows = tiles * shapes.patches_per_tile
    return VISION_ROW_BYTES * rows * shapes.vision_size + shapes.cross_kv_bytes(rows)


def prompt_memory(config: MllamaConfig, batch: int, tokens: int, new: int, rows: int) -> float:
    """Bytes that one step of a prompt takes while it is computed.

    Args:
        tokens: of the whole prompt; `new` of them are computed in this step.
        rows: K/V rows of its images.
    """
    text = getattr(config, "text_config", config)
    of_text = batch * new * (MLP_BYTES * text.intermediate_size + SCORE_BYTES * tokens)
    return of_text + new * IMAGE_SCORE_BYTES * text.num_attention_heads * rows
