"""A checkpoint: where it is found, its identity, its weights, and whether each tensor has its place in the model.

Only headers of the weights are read before they are loaded, so a bad checkpoint is refused before anything is written.
"""

import errno
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx  # the version that the hub's client uses
from transformers import AutoConfig, MllamaForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ov_mllama.runtime.companions import source_digest
from ov_mllama.runtime.errors import AccessError, DiskError, InputError, NotFoundError
from ov_mllama.runtime.ir import CONVERTER_VERSION
from ov_mllama.runtime.reference import Reference

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "golden.*"]
MODEL_TYPES = {  # model_type of config.json: its use here, and an example
    "mllama": "this converter takes Llama 3.2 Vision ones (model_type 'mllama'), such as "
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama": "a draft model is a Llama for text (model_type 'llama'), such as meta-llama/Llama-3.2-1B-Instruct",
}

FULL_HASH_MAX_BYTES = 64_000_000  # of all weights; larger ones are sampled
SAMPLE_BYTES, SAMPLES_PER_FILE = 1 << 16, 64
HEADER_MAX_BYTES = 100_000_000  # the limit of safetensors itself

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# buffers that older versions of transformers saved and newer ones compute
IGNORED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"
# prefixes that trainers add to the tensors of a model they wrap
WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "base_layer.")
ADAPTER_FIX = (
    "merge the adapter into its base model (peft: merge_and_unload) and convert what save_pretrained writes then."
)


# ---- Checkpoint -----------------------------------------------------------------------------------------------------


class Checkpoint:
    """A checkpoint in a local folder, downloaded first if need be.

    Args:
        model_id: hub id or local folder.
        model_type: expected `model_type`, of MODEL_TYPES.
        with_weights: False fetches the config alone.
    Attributes:
        folder: the given one, or the hub's cached download.
        config: as transformers reads it.
    Raises:
        InputError: another model type, or a folder without safetensors.
        NotFoundError: no such folder or repository, or no network to fetch it.
        AccessError: a gated repository, without access for the token at hand.
    """

    def __init__(self, model_id: str | Path, model_type: str = "mllama", with_weights: bool = True):
        folder = Path(model_id)
        if not folder.is_dir():
            folder = download(str(model_id), DOWNLOAD_PATTERNS if with_weights else ["config.json"])
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint or a hub id."
            )
        self.folder, self.config = folder, AutoConfig.from_pretrained(folder)
        if self.config.model_type != model_type:
            raise InputError(f"{model_id} is a '{self.config.model_type}' checkpoint; {MODEL_TYPES[model_type]}.")
        if with_weights and not any(folder.glob("*.safetensors")):
            self._refuse_without_weights()

    def _refuse_without_weights(self) -> None:
        if any(self.folder.glob("*.xml")):
            raise InputError(
                f"{self.folder} is a converted model: give it as model_dir (make chat MODEL_DIR={self.folder}), or the "
                "checkpoint it was made of."
            )
        raise InputError(
            f"{self.folder} has a config but no *.safetensors weights: download it completely, or save the model with "
            "save_pretrained(..., safe_serialization=True). Pickled .bin weights are not loaded."
        )

    @cached_property
    def fingerprint(self) -> str:
        """The identity of config and weights, as `checkpoint_fingerprint`."""
        return checkpoint_fingerprint(self.folder)

    @cached_property
    def source_digest(self) -> str:
        """The identity of the files that an IR's companions are made of."""
        return source_digest(self.folder)

    def stamp(self, reference: Reference | None = None) -> dict[str, str]:
        """Return the part of a stamp that all IRs of this checkpoint share.

        Args:
            reference: that they follow; None for a draft model, for which references do not differ.
        """
        follows = reference._asdict() if reference else {}
        return {"converter_version": CONVERTER_VERSION, "checkpoint": self.fingerprint, **follows}

    def check_apart(self, out_dir: Path) -> None:
        """Refuse the checkpoint's own folder for its IRs, whose config would replace its own.

        Raises:
            InputError: if `out_dir` is the checkpoint's folder.
        """
        if self.folder.resolve() == out_dir.resolve():
            raise InputError(f"{out_dir} is the checkpoint itself: choose another folder for its IRs.")

    def load(self, kind: Any = MllamaForConditionalGeneration) -> Any:
        """Load the model, as `load_checkpoint`."""
        return load_checkpoint(self.folder, kind)


def load_checkpoint(folder: Path, kind: Any = MllamaForConditionalGeneration) -> Any:
    """Load a checkpoint in 16 bit on the CPU, its weights memory-mapped from the safetensors files.

    Args:
        kind: the model's class, LlamaForCausalLM for a draft model.
    Raises:
        InputError: as `check_tensors`.
    """
    check_tensors(folder, kind)
    dtype = AutoConfig.from_pretrained(folder).dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def download(model_id: str, patterns: list[str]) -> Path:
    """Download a repository's files that match `patterns`, and return their folder in the hub's cache.

    Raises:
        AccessError, NotFoundError: as `Checkpoint`.
        DiskError: if the cache cannot be written.
    """
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except GatedRepoError as error:
        raise AccessError(
            f"{model_id} is gated: accept its licence on https://huggingface.co/{model_id}, then log in with "
            "`huggingface_hub.login()` or set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, ValueError) as error:  # ValueError: not of the form "owner/name"
        raise NotFoundError(
            f"'{model_id}' is neither a folder here nor a repository on the Hugging Face hub; check the spelling, and "
            "for a private repository log in with `huggingface_hub.login()`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise DiskError(
                number,
                f"{model_id} could not be written to {HF_HUB_CACHE} ({error.strerror}): free disk space, or set "
                "HF_HOME to a folder on another disk",
            ) from error
        raise NotFoundError(
            f"{model_id} could not be fetched from the Hugging Face hub ({type(error).__name__}) and is not in the "
            "local cache; check the network, or give the folder of a checkpoint on this disk."
        ) from error


# ---- Files ----------------------------------------------------------------------------------------------------------


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


def checkpoint_fingerprint(folder: Path) -> str:
    """Return the identity of a checkpoint's config and weights.

    Weights of up to FULL_HASH_MAX_BYTES are hashed completely. Of larger ones the hash covers each file's header, size,
    modification time and SAMPLES_PER_FILE samples: every changed tensor shows, and a copy with other times is another
    checkpoint.

    Raises:
        InputError: as `weight_files` and `read_header`.
    """
    files = weight_files(folder)
    small = sum(path.stat().st_size for path in files) <= FULL_HASH_MAX_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        header, stat = read_header(path)[0], path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0{len(header)}\0".encode() + header)
        if not small:
            digest.update(f"{stat.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            step = SAMPLE_BYTES if small else max(SAMPLE_BYTES, stat.st_size // SAMPLES_PER_FILE)
            for start in range(0, stat.st_size, step):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


# ---- Tensors --------------------------------------------------------------------------------------------------------


class TensorNames:
    """The names that a model has for the tensors of a checkpoint, by transformers' own renaming rules.

    Args:
        model: on the meta device.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.expected = model, model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def of(self, name: str) -> str | None:
        """Return the model's name for a checkpoint's tensor; None if it has none."""
        for renamings, converters in ((self.renamings, self.converters), ([], [])):
            place, _ = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.expected)
            if place in self.expected:
                return place
        return None

    def tied(self, name: str) -> set[str]:
        """Return the names that share a tensor with `name`."""
        pairs = getattr(self.model, "all_tied_weights_keys", {}).items()
        return {other for pair in pairs if name in pair for other in pair if other != name}


def check_tensors(folder: Path, kind: Any) -> None:
    """Refuse a checkpoint with missing or unexpected tensors, or tensors of another shape than the model's.

    Args:
        kind: the model's class.
    Raises:
        InputError: with numbers, names and the fix; or as `weight_files` and `read_header`.
    """
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        names = TensorNames(kind(config))
    unexpected, reshaped, found = [], [], set()
    for path in weight_files(folder):
        for name, tensor in read_header(path)[1].items():
            place = names.of(name)
            if place is None:
                unexpected += [name] * (not re.search(IGNORED, name))
                continue
            found.add(place)
            shape, expected = tensor["shape"], list(names.expected[place].shape)
            if shape != expected:
                reshaped.append(f"{name}: {shape} instead of {expected}")
    missing = [name for name in names.expected if name not in found and not names.tied(name) & found]
    complaints = [
        f"{len(missing)} of {len(names.expected)} tensors are missing, such as {missing[0]}" if missing else "",
        f"{len(unexpected)} are unexpected, such as {unexpected[0]}" if unexpected else "",
        f"{len(reshaped)} have another shape, such as {reshaped[0]}" if reshaped else "",
    ]
    if missing or unexpected or reshaped:
        raise InputError(f"{folder}: {'; '.join(filter(None, complaints))}. To fix it, {fix_for(unexpected, names)}")


def fix_for(unexpected: list[str], names: TensorNames) -> str:
    """Return the fix for tensors of these names, which the model does not know."""
    if any("lora_" in name for name in unexpected):
        return ADAPTER_FIX
    for name in unexpected[:1]:
        for part in (*WRAPPERS, *(name[: dot.end()] for dot in re.finditer(r"\.", name))):
            if part in name and names.of(name.replace(part, "")):
                return f"remove '{part}' from the tensors' names" + (
                    f"; or, if it is an adapter, {ADAPTER_FIX}" if part in WRAPPERS[:1] else "."
                )
    return "download it again, or save the whole model with transformers' save_pretrained, with its own config.json."
