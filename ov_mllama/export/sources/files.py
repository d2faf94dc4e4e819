"""Safetensors files: which of a folder's hold the weights, their headers, and the tensors in them."""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ov_mllama.export.sources.tensors import Tensor
from ov_mllama.runtime.errors import InputError

HEADER_MAX_BYTES = 100_000_000  # the limit of safetensors itself
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download the checkpoint again, completely."
FIX = "convert the 16-bit checkpoint that it was made of, this program compresses it itself."
ADAPTER_FIX = (
    "merge the adapter into its base model (peft: merge_and_unload) and convert what save_pretrained writes then."
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}


def stored_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files by their stored names, each mapped when it is read.

    Raises:
        InputError: as `read_header`, for a tensor of a type that torch lacks, or one that two files hold.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, entry in read_header(path)[1].items():
            if str(entry.get("dtype")) not in DTYPES:
                raise InputError(f"{path}: {name} is of the type {entry.get('dtype')}, which is not read.")
            if name in tensors:
                raise InputError(f"{path} holds {name}, as another file of its folder does: remove one of them.")
            read = partial(read_tensor, path, name)
            tensors[name] = Tensor(tuple(entry["shape"]), DTYPES[entry["dtype"]], read, mapped=True)
        check_layout(path)
    return tensors


def check_layout(path: Path) -> None:
    """Raise an InputError if the tensors of a header do not fill a safetensors file."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{path} is no valid safetensors file ({error}): download it again.") from error


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return a tensor of a safetensors file, mapped."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads: WEIGHTS, else the shards that the index names.

    Raises:
        InputError: if there is neither, or a shard of the index is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        fix = ADAPTER_FIX if any("adapter" in name for name in found) else "download it again, completely."
        raise InputError(f"{folder} holds {', '.join(found)}, but no {WEIGHTS} and no {INDEX}: {fix}")
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in shards):  # another folder's, or no text
            raise ValueError("no names of files beside it")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / INDEX} is no index of weights{hint(folder / INDEX)}") from error
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent or not shards:
        names = f", such as {absent[0]}" if absent else ""
        raise InputError(
            f"{len(absent)} of the {len(shards)} files that {folder / INDEX} names are missing{names}: download the "
            "checkpoint again, completely."
        )
    return [folder / name for name in shards]


def read_header(path: Path) -> tuple[bytes, dict[str, dict]]:
    """Return the header of a safetensors file: its bytes, and `shape`, `dtype` and `data_offsets` by tensor.

    Raises:
        InputError: if it is no safetensors file, or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, HEADER_MAX_BYTES) else b""
    try:
        tensors = json.loads(text)
        tensors.pop("__metadata__", None)
        needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        _ = [tuple(tensor["shape"]) for tensor in tensors.values()]
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file{hint(path)}") from error
    if size < needed:
        raise InputError(f"{path} is truncated, {size:,} of {needed:,} bytes: download it again.")
    return text, tensors


def hint(path: Path) -> str:
    """Return the end of an error about a broken file: what it is instead, and the fix."""
    with path.open("rb") as file:
        head = file.read(200).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return f" but a Git LFS pointer to one: run `git lfs pull` in {path.parent}, or download the file."
    if head.startswith(b"<"):
        return " but a web page: download it again, with a login if the repository asks for one."
    return f" ({path.stat().st_size:,} bytes): download it again."
