"""A checkpoint's weights: their files, their identity, and whether each tensor has its place in the model.

Only headers are read, so a checkpoint is refused before anything of it is loaded or written.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

ALL_BYTES = 64_000_000  # weights of at most so many bytes are hashed whole
SAMPLE, SAMPLES = 1 << 16, 64  # of a file of larger ones
MAX_HEADER = 100_000_000  # bytes, as safetensors has it

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# buffers that older versions of transformers saved and newer ones compute
IGNORED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"
# what trainers put into the names of a model that they wrapped
WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "base_layer.")
ADAPTER = "merge the adapter into its base model (peft: merge_and_unload) and convert what save_pretrained writes then."


# ---- Files ----------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: WEIGHTS, else the shards that the index names.

    Raises:
        ValueError: there is neither, or shards of the index are absent.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        fix = ADAPTER if any("adapter" in name for name in found) else "download it again, completely."
        raise ValueError(f"{folder} holds {', '.join(found)}, but no {WEIGHTS} and no {INDEX}: {fix}")
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in shards):  # another folder's, or no text
            raise ValueError("no names of files beside it")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is no index of weights{hint(folder / INDEX)}") from error
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent or not shards:
        names = f", such as {absent[0]}" if absent else ""
        raise ValueError(
            f"{len(absent)} of the {len(shards)} files that {folder / INDEX} names are missing{names}: download the "
            "checkpoint again, completely."
        )
    return [folder / name for name in shards]


def read_header(path: Path) -> tuple[bytes, dict[str, dict]]:
    """The header of a safetensors file: its bytes, and `shape`, `dtype` and `data_offsets` by tensor.

    Raises:
        ValueError: it is none, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, MAX_HEADER) else b""
    try:
        tensors = json.loads(text)
        tensors.pop("__metadata__", None)
        needed = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        _ = [tuple(tensor["shape"]) for tensor in tensors.values()]
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file{hint(path)}") from error
    if size < needed:
        raise ValueError(f"{path} is cut short, {size:,} of {needed:,} bytes: download it again.")
    return text, tensors


def hint(path: Path) -> str:
    """The end of a sentence on a broken file: what it is instead, and the fix."""
    with path.open("rb") as file:
        head = file.read(200).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return f" but a Git LFS pointer to one: run `git lfs pull` in {path.parent}, or download the file."
    if head.startswith(b"<"):
        return " but a web page: download it again, with a login if the repository asks for one."
    return f" ({path.stat().st_size:,} bytes): download it again."


def checkpoint_fingerprint(folder: Path) -> str:
    """The identity of a checkpoint's config and weights.

    Weights of up to ALL_BYTES are hashed whole. Of larger ones it takes each file's header, size, time of its last
    change and 64 samples of 64 KiB: every change of a tensor shows, and a copy with other times is another checkpoint.

    Raises:
        ValueError: as `weight_files` and `read_header`.
    """
    files = weight_files(folder)
    small = sum(path.stat().st_size for path in files) <= ALL_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        header, stat = read_header(path)[0], path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0{len(header)}\0".encode() + header)
        if not small:
            digest.update(f"{stat.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            for start in range(0, stat.st_size, SAMPLE if small else max(SAMPLE, stat.st_size // SAMPLES)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


# ---- Tensors --------------------------------------------------------------------------------------------------------


class Places:
    """Where transformers puts the tensors of a checkpoint.

    Args:
        model: on the meta device.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.expected = model, model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def of(self, name: str) -> str | None:
        """The model's name for a checkpoint's tensor; None where it has none."""
        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            place, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.expected)
            if place in self.expected:
                return place
        return None

    def tied(self, name: str) -> set[str]:
        """Those that share a tensor with `name`."""
        pairs = getattr(self.model, "all_tied_weights_keys", {}).items()
        return {other for pair in pairs if name in pair for other in pair if other != name}


def check_tensors(folder: Path, kind: Any) -> None:
    """Refuses a checkpoint of which a tensor is missing, left over, or of another shape than the model's.

    Args:
        kind: the model's class.
    Raises:
        ValueError: with numbers, names and the fix; or as `weight_files` and `read_header`.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        places = Places(kind(config))
    left, other, found = [], [], set()
    for path in weight_files(folder):
        for name, tensor in read_header(path)[1].items():
            place = places.of(name)
            if place is None:
                left += [name] * (not re.search(IGNORED, name))
                continue
            found.add(place)
            shape, expected = tensor["shape"], list(places.expected[place].shape)
            if shape != expected:
                other.append(f"{name}: {shape} instead of {expected}")
    missing = [name for name in places.expected if name not in found and not places.tied(name) & found]
    complaints = [
        f"{len(missing)} of {len(places.expected)} tensors are missing, such as {missing[0]}" if missing else "",
        f"{len(left)} are left over, such as {left[0]}" if left else "",
        f"{len(other)} have another shape, such as {other[0]}" if other else "",
    ]
    if missing or left or other:
        raise ValueError(f"{folder}: {'; '.join(filter(None, complaints))}. To mend it, {fix_for(left, places)}")


def fix_for(left: list[str], places: Places) -> str:
    """What to do about tensors of these names, which have no place."""
    if any("lora_" in name for name in left):
        return ADAPTER
    for name in left[:1]:
        for part in (*WRAPPERS, *(name[: dot.end()] for dot in re.finditer(r"\.", name))):
            if part in name and places.of(name.replace(part, "")):
                return f"remove '{part}' from the tensors' names" + (
                    f"; or, if it is an adapter, {ADAPTER}" if part in WRAPPERS[:1] else "."
                )
    return "download it again, or save the whole model with transformers' save_pretrained, with its own config.json."
