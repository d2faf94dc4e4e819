"""A checkpoint: where it is found, its identity, and its weights in 16 bit, which the files of `sources` read.

Only headers of the weights are read before they are loaded, so a bad checkpoint is refused before anything is written.
"""

import errno
import hashlib
import logging
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx  # the version that the hub's client uses
from transformers import LlamaForCausalLM, MllamaForConditionalGeneration

from ov_mllama.export.sources.files import read_header
from ov_mllama.export.sources.find import find_source
from ov_mllama.export.sources.lora import CONFIG, base_names, merge, overlay
from ov_mllama.export.sources.names import TensorNames, place
from ov_mllama.export.sources.others import without_weights
from ov_mllama.export.sources.tensors import Tensor, computed_bytes, materialize, weight_dtype
from ov_mllama.runtime.companions import source_digest
from ov_mllama.runtime.errors import AccessError, DiskError, InputError, NotFoundError
from ov_mllama.runtime.ir import CONVERTER_VERSION
from ov_mllama.runtime.reference import Reference

logger = logging.getLogger(__name__)

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "golden.*"]
FULL_HASH_MAX_BYTES = 64_000_000  # of all weights; larger ones are sampled
SAMPLE_BYTES, SAMPLES_PER_FILE = 1 << 16, 64

Needed = Callable[[str], bool]  # whether a tensor of this name, of the model's, is needed


def every(name: str) -> bool:
    """Return that a tensor of any name is needed."""
    return True


class Checkpoint:
    """A checkpoint in a local folder, downloaded first if need be; a LoRA adapter with its base.

    Args:
        model_id: hub id or local folder.
        model_type: expected `model_type`, "mllama" or "llama".
        with_weights: False fetches the config alone, of what is not in a local folder.
        base: hub id or folder of the model that an adapter was trained on; default: as its config names it.
    Attributes:
        name: as given.
        folder: the given one, or the hub's cached download.
        base: the adapter's, as a checkpoint; None for a model.
        config: as transformers reads it, of the unquantised model.
    Raises:
        InputError: another model type, a kind that is not read, or a base for what is no adapter.
        NotFoundError: no such folder or repository, or no network to fetch it; or no base of an adapter.
        AccessError: a gated repository, without access for the token at hand.
    """

    def __init__(
        self,
        model_id: str | Path,
        model_type: str = "mllama",
        with_weights: bool = True,
        base: str | Path | None = None,
    ):
        self.name, folder = str(model_id), Path(model_id).expanduser()
        local = folder.is_dir()
        if not local:
            folder = download(str(model_id), DOWNLOAD_PATTERNS if with_weights else ["config.json", CONFIG])
        self.folder, self.source = folder, find_source(folder, model_type)
        if (with_weights or local) and not self.source.weights:
            raise without_weights(folder)
        if base and not self.source.adapter:
            raise InputError(f"{folder} is no LoRA adapter: leave the base out.")
        self.base = self._find_base(base, model_type, with_weights) if self.source.adapter else None
        self.config: Any = self.base.config if self.base else self.source.config

    def __str__(self) -> str:
        return self.name

    def _find_base(self, given: str | Path | None, model_type: str, with_weights: bool) -> "Checkpoint":
        names = [str(given)] if given else base_names(self.source.adapter, self.folder)
        problem: Exception | None = None
        for name in names:
            if Path(name).is_dir() and Path(name).samefile(self.folder):
                continue
            try:
                base = Checkpoint(name, model_type, with_weights)
            except NotFoundError as error:
                problem = problem or error
            except AccessError as error:
                problem = error
            except InputError as error:
                raise InputError(f"{self.folder} is a LoRA adapter, its base cannot be used: {error}") from error
            else:
                logger.info("LoRA adapter %s, merged into its base %s (%s)", self.folder, name, base.source.kind)
                return base
        tried = ", ".join(names) or f"not named in {CONFIG}"
        advice = "give its folder or hub id with --base (BASE= of make, base= in Python)"
        if isinstance(problem, AccessError):
            raise AccessError(f"The base of the LoRA adapter {self.folder}: {problem} Or {advice}.") from problem
        raise NotFoundError(
            f"The base of the LoRA adapter {self.folder} was not found ({tried}): {advice}."
        ) from problem

    @classmethod
    def of(cls, model_id: "str | Path | Checkpoint") -> "Checkpoint":
        """Return the checkpoint itself, or the one of a hub id or folder."""
        return model_id if isinstance(model_id, Checkpoint) else cls(model_id)

    @cached_property
    def fingerprint(self) -> str:
        """The identity of config and weights, as `identity`."""
        own = identity(self.source.settings, self.source.weights)
        return combined(own, self.base.fingerprint) if self.base else own

    @cached_property
    def source_digest(self) -> str:
        """The identity of the files that an IR's companions are made of."""
        own = source_digest(self.folder)
        return combined(own, self.base.source_digest) if self.base else own

    @cached_property
    def settings_folder(self) -> Path:
        """The folder with config, tokenizer and templates: the checkpoint's own; of an adapter a temporary one, where
        its own replace its base's."""
        if not self.base:
            return self.folder
        self._settings = tempfile.TemporaryDirectory(prefix="ov-mllama-")  # removed with the checkpoint
        overlay(self.folder, self.base.settings_folder, Path(self._settings.name))
        return Path(self._settings.name)

    @property
    def folders(self) -> list[Path]:
        """The checkpoint's folder and, of an adapter, those of its base."""
        return [self.folder, *(self.base.folders if self.base else [])]

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
            InputError: if `out_dir` is the checkpoint's folder, or its base's.
        """
        if out_dir.resolve() in [folder.resolve() for folder in self.folders]:
            raise InputError(f"{out_dir} is the checkpoint itself: choose another folder for its IRs.")

    # ---- Weights ----------------------------------------------------------------------------------------------------

    def tensors(self, kind: Any = MllamaForConditionalGeneration) -> dict[str, Tensor]:
        """Return the weights by the model's names, read when needed.

        Args:
            kind: the model's class, LlamaForCausalLM for a draft model.
        Raises:
            InputError: without weights, or as `read_header` and `place`.
        """
        with torch.device("meta"):
            model = kind(self.config)
        if not self.base:
            return place(self.source.tensors(), model, self.folder)
        base, adapter = self.base.tensors(kind), self.source.tensors()
        return merge(base, adapter, self.source.adapter, TensorNames(model), self.folder)

    def check_adapter(self) -> None:
        """Refuse an adapter that does not fit its base's config; the base's weights need not be there.

        Raises:
            InputError: as `merge`.
        """
        if self.base and self.source.weights:
            kind = MllamaForConditionalGeneration if self.config.model_type == "mllama" else LlamaForCausalLM
            with torch.device("meta"):
                names = TensorNames(kind(self.config))
            base = {name: Tensor(tuple(each.shape), each.dtype, each.clone) for name, each in names.expected.items()}
            merge(base, self.source.tensors(), self.source.adapter, names, self.folder)

    def scratch_bytes(self, kind: Any = MllamaForConditionalGeneration, needed: Needed = every) -> int:
        """Return the disk that `load` takes for a while: of needed weights that are not stored in 16 bit."""
        tensors = self.tensors(kind)
        dtype = weight_dtype(tensors)
        return computed_bytes({name: tensor for name, tensor in tensors.items() if needed(name)}, dtype)

    def load(
        self, kind: Any = MllamaForConditionalGeneration, scratch: Path | None = None, needed: Needed = every
    ) -> Any:
        """Load the model in 16 bit on the CPU, its weights mapped from files.

        Args:
            kind: as for `tensors`.
            scratch: folder for a temporary file of `scratch_bytes`, freed with the model; default: the system's.
            needed: whether a tensor of this name is needed; others are zeros if they would have to be computed.
        Raises:
            InputError: as `tensors`.
            DiskError: if the scratch folder's disk is full.
        """
        tensors = self.tensors(kind)
        dtype = weight_dtype(tensors)
        left_out = frozenset(name for name in tensors if not needed(name))
        state = materialize(tensors, dtype, scratch or Path(tempfile.gettempdir()), left_out)
        return kind.from_pretrained(None, config=self.config, state_dict=state, dtype=dtype).eval()


def load_checkpoint(folder: str | Path, kind: Any = MllamaForConditionalGeneration) -> Any:
    """Load a checkpoint, as `Checkpoint.load`.

    Args:
        folder: or hub id.
        kind: the model's class, LlamaForCausalLM for a draft model.
    """
    return Checkpoint(folder, "mllama" if kind is MllamaForConditionalGeneration else "llama").load(kind)


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


def identity(settings: list[Path], weights: list[Path]) -> str:
    """Return the identity of a checkpoint's config and weights.

    Weights of up to FULL_HASH_MAX_BYTES are hashed completely. Of larger ones the hash covers each file's header, size,
    modification time and SAMPLES_PER_FILE samples: every changed tensor shows, and a copy with other times is another
    checkpoint.

    Args:
        settings: files that are hashed completely.
        weights: files of weights.
    Raises:
        InputError: as `read_header`.
    """
    small = sum(path.stat().st_size for path in weights) <= FULL_HASH_MAX_BYTES
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in settings))
    for path in weights:
        header, stat = read_header(path)[0] if path.suffix == ".safetensors" else b"", path.stat()
        digest.update(f"\0{path.name}\0{stat.st_size}\0{len(header)}\0".encode() + header)
        if not small:
            digest.update(f"{stat.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            step = SAMPLE_BYTES if small else max(SAMPLE_BYTES, stat.st_size // SAMPLES_PER_FILE)
            for start in range(0, stat.st_size, step):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def combined(*digests: str) -> str:
    """Return one digest of several."""
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()[:16]


def checkpoint_fingerprint(folder: Path) -> str:
    """Return the `identity` of a checkpoint in a local folder."""
    return Checkpoint(folder).fingerprint
