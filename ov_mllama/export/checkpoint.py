"""A checkpoint: where it is found, its identity, and its weights in 16 bit, which the files of `sources` read.

Only headers of the weights are read before they are loaded, so a bad checkpoint is refused before anything is written.
"""

import contextlib
import hashlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import MllamaForConditionalGeneration

from ov_mllama.export.sources.files import AGAIN, read_header
from ov_mllama.export.sources.find import OWN_CONFIG, find_source, last_line
from ov_mllama.export.sources.gguf_source import gguf_source
from ov_mllama.export.sources.hub import as_on_the_hub, download, preview
from ov_mllama.export.sources.lora import CONFIG, base_names, merge, overlay
from ov_mllama.export.sources.model_id import is_gguf, local_path, origin_of
from ov_mllama.export.sources.names import TensorNames, place
from ov_mllama.export.sources.others import without_weights
from ov_mllama.export.sources.tensors import Tensor, computed_bytes, materialize, weight_dtype
from ov_mllama.export.takeover import TAKEN
from ov_mllama.runtime.companions import FORMAT as COMPANIONS_FORMAT
from ov_mllama.runtime.companions import source_digest
from ov_mllama.runtime.errors import AccessError, InputError, NotFoundError
from ov_mllama.runtime.ir import CONVERTER_VERSION
from ov_mllama.runtime.reference import Reference, reference_of

logger = logging.getLogger(__name__)

FULL_HASH_MAX_BYTES = 64_000_000  # of all weights; larger ones are sampled
SAMPLE_BYTES, SAMPLES_PER_FILE = 1 << 16, 64

Needed = Callable[[str], bool]  # whether a tensor of this name, of the model's, is needed


def every(name: str) -> bool:
    """Return that a tensor of any name is needed."""
    return True


class Checkpoint:
    """A checkpoint in a local folder, downloaded first if need be; a LoRA adapter with its base.

    Args:
        model_id: hub id, local folder, or a model in GGUF: "ollama:NAME[:TAG]", or the path of a .gguf file.
        model_type: expected `model_type`, "mllama" or "llama".
        with_weights: False fetches configs and headers alone: tensors can then be checked, but not read.
        base: hub id or folder of the model that an adapter was trained on; default: as its config names it.
    Attributes:
        name: as given.
        folder: the given one, the hub's cached download, or a temporary one that is removed with this object, of a
            preview or for the settings of a model in GGUF.
        origin: hub id, absolute path, or complete name of a model in GGUF.
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
        _above: tuple[Path, ...] = (),
    ):
        self.name, self.origin, self._to_download = str(model_id), origin_of(model_id), 0
        folder = local_path(model_id)
        if is_gguf(model_id):
            folder, self.source = self._temporary_folder(), gguf_source(model_id, model_type)
        elif not folder.is_dir():
            if with_weights:
                folder = download(str(model_id))
            else:
                scratch = self._temporary_folder()
                with as_on_the_hub(scratch, self.origin):
                    folder, self._to_download = preview(str(model_id), scratch)
        self.folder = folder
        if not is_gguf(model_id):
            with self._errors():
                self.source = find_source(folder, model_type)
                if not self.source.weights:
                    raise without_weights(folder)
        if base and not self.source.adapter:
            raise InputError(f"{self.name} is no LoRA adapter: leave the base out.")
        self._adapters = (*_above, folder.resolve())
        self.base = self._find_base(base, model_type, with_weights) if self.source.adapter else None
        self.config: Any = self.base.config if self.base else self.source.config
        self._placed: dict[Any, dict[str, Tensor]] = {}

    def __str__(self) -> str:
        return self.name

    @property
    def download_bytes(self) -> int:
        """Bytes that are still to be downloaded, those of an adapter's base included; 0 if the weights can be read."""
        return self._to_download + (self.base.download_bytes if self.base else 0)

    def _temporary_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="ov-mllama-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _find_base(self, given: str | Path | None, model_type: str, with_weights: bool) -> "Checkpoint":
        names = [str(given)] if given else base_names(self.source.adapter, self.folder)
        problem: Exception | None = None
        for name in names:
            if Path(name).is_dir() and Path(name).resolve() in self._adapters:  # also where adapters name each other
                continue
            try:
                base = Checkpoint(name, model_type, with_weights, _above=self._adapters)
            except NotFoundError as error:
                problem = problem or error
            except AccessError as error:
                problem = error
            except InputError as error:
                raise InputError(f"{self.name} is a LoRA adapter, its base cannot be used: {error}") from error
            else:
                logger.info("LoRA adapter %s, merged into its base %s (%s)", self.name, name, base.source.kind)
                return base
        tried = ", ".join(names) or f"not named in {CONFIG}"
        advice = "give its folder or hub id with --base (BASE= of make, base= in Python)"
        if isinstance(problem, AccessError):
            raise AccessError(f"The base of the LoRA adapter {self.name}: {problem} Or {advice}.") from problem
        raise NotFoundError(f"The base of the LoRA adapter {self.name} was not found ({tried}): {advice}.") from problem

    @classmethod
    def of(cls, model_id: "str | Path | Checkpoint", **options: Any) -> "Checkpoint":
        """Return the checkpoint itself, or the one of a hub id or folder, made with these options."""
        return model_id if isinstance(model_id, Checkpoint) else cls(model_id, **options)

    def _errors(self) -> contextlib.AbstractContextManager:
        """Return a context whose errors name the hub id instead of a preview's folder."""
        return as_on_the_hub(self.folder, self.origin) if self._to_download else contextlib.nullcontext()

    @cached_property
    def fingerprint(self) -> str:
        """The identity of config and weights, as `identity`."""
        own = identity(self.source.settings, self.source.weights)
        return combined(own, self.base.fingerprint) if self.base else own

    @cached_property
    def source_digest(self) -> str:
        """The identity of the files that an IR's companions are made of."""
        inside = self.source.save_settings is not None
        own = combined(self.fingerprint, COMPANIONS_FORMAT) if inside else source_digest(self.folder)
        return combined(own, self.base.source_digest) if self.base else own

    @cached_property
    def settings_folder(self) -> Path:
        """The folder with config, tokenizer and templates: the checkpoint's own; of an adapter a temporary one, where
        its own replace its base's; of a model in GGUF one that they are written into."""
        if self.source.save_settings:
            self.source.save_settings(self.folder)
        if not self.base:
            return self.folder
        folder = self._temporary_folder()
        overlay(self.folder, self.base.settings_folder, folder)
        return folder

    @property
    def folders(self) -> list[Path]:
        """The checkpoint's folder and, of an adapter, those of its base."""
        return [self.folder, *(self.base.folders if self.base else [])]

    def reference(self, name: str = "auto") -> tuple[Reference, str]:
        """Return the reference to convert the checkpoint with, and the reason, as `reference_of`."""
        weights = self.base or self
        if name == "auto" and weights.source.reference:
            return weights.source.reference, weights.source.kind
        return reference_of(self.settings_folder, name)

    @cached_property
    def own_form(self) -> str:
        """The format, such as "q4_k_m", of a checkpoint whose language model is taken over completely; else empty."""
        if not self.source.form:
            return ""
        matrices = {
            name: tensor for name, tensor in self.tensors().items() if len(tensor.shape) > 1 and TAKEN.match(name)
        }
        whole = all(tensor.pack for name, tensor in matrices.items() if not name.endswith("embed_tokens.weight"))
        return self.source.form if whole else ""

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
        if kind not in self._placed:
            with self._errors():
                model = self._empty_model(kind)
                stored = self.source.tensors()
                if self.base:
                    base, names = self.base.tensors(kind), TensorNames(model)
                    self._placed[kind] = merge(base, stored, self.source.adapter, names, self.folder)
                else:
                    self._placed[kind] = place(stored, model, self.name if self.source.save_settings else self.folder)
        return self._placed[kind]

    def _empty_model(self, kind: Any) -> torch.nn.Module:
        try:
            with torch.device("meta"):
                return kind(self.config)
        except Exception as error:  # noqa: BLE001 - such as ZeroDivisionError for no heads
            config = self.base.folder if self.base else self.folder
            problem = f"{type(error).__name__}: {last_line(error)}"
            if self.source.save_settings:
                raise InputError(f"The metadata of {self.name} describe no model ({problem}): {AGAIN}") from error
            raise InputError(f"{config / 'config.json'} describes no model ({problem}): {OWN_CONFIG}") from error

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
            scratch: folder for a temporary file of `scratch_bytes`, freed with the model; default: the system's, which
                may be in memory.
            needed: whether a tensor of this name is needed; others are zeros if they would have to be computed.
        Raises:
            InputError: as `tensors`, or for a checkpoint without its weights.
            DiskError: if the scratch folder's disk is full.
        """
        if self.download_bytes:
            raise InputError(f"{self.origin} is not downloaded: open it with its weights.")
        tensors = self.tensors(kind)
        dtype = weight_dtype(tensors)
        left_out = frozenset(name for name in tensors if not needed(name))
        state = materialize(tensors, dtype, scratch or Path(tempfile.gettempdir()), left_out)
        return kind.from_pretrained(None, config=self.config, state_dict=state, dtype=dtype).eval()


def load_checkpoint(folder: str | Path, kind: Any = MllamaForConditionalGeneration, scratch: Path | None = None) -> Any:
    """Load a checkpoint, as `Checkpoint.load`.

    Args:
        folder: or hub id.
        kind: the model's class, LlamaForCausalLM for a draft model.
        scratch: as for `Checkpoint.load`.
    """
    return Checkpoint(folder, "mllama" if kind is MllamaForConditionalGeneration else "llama").load(kind, scratch)


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
