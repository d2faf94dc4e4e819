"""Ollama's models on this disk: where a name's files are, and a list of all.

Layout: manifests/<host>/<namespace>/<model>/<tag> is JSON that names the layers; blobs/sha256-<digest> are their files.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ov_mllama.export.sources.gguf import architecture_of
from ov_mllama.export.sources.model_id import HOST, NAMESPACE, OLLAMA, OLLAMA_PART, local_path, ollama_name
from ov_mllama.runtime.errors import DiskError, InputError, NotFoundError

logger = logging.getLogger(__name__)

SERVICE_FOLDER = Path("/usr/share/ollama/.ollama/models")  # of the service that Ollama's installer for Linux makes
LAYER = "application/vnd.ollama.image."
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
MANIFEST_MAX_BYTES, MAX_BYTES = 1 << 20, 1 << 50  # of a manifest, and of a layer
PULL = "run `ollama pull {}` again."


class Layer(NamedTuple):
    """A file of a model."""

    path: Path
    size: int


@dataclass(frozen=True)
class OllamaModel:
    """A model by its manifest.

    Attributes:
        name: as Ollama lists it, such as "llama3.2-vision:latest".
        layers: by kind, such as "model", "projector", "license", "system".
    """

    name: str
    layers: dict[str, list[Layer]]

    @property
    def files(self) -> list[Path]:
        """The GGUF files: the model, and in the first generation its projector."""
        return [layer.path for kind in ("model", "projector") for layer in self.layers.get(kind, [])]

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layers in self.layers.values() for layer in layers)

    def check(self) -> None:
        """Raise an InputError unless the files that are needed are here, completely, and all are read."""
        again = PULL.format(self.name)
        if self.layers.get("tensor"):
            raise InputError(f"{OLLAMA}{self.name} is stored as MLX tensors, which are not read: take llama3.2-vision.")
        if not self.layers.get("model"):
            raise InputError(f"{OLLAMA}{self.name} has no layer with a model in GGUF: {again}")
        if self.layers.get("adapter"):
            raise InputError(f"{OLLAMA}{self.name} has a LoRA adapter in GGUF, which is not read: name its base model.")
        for layer in [layer for kind in ("model", "projector", "license") for layer in self.layers.get(kind, [])]:
            if not layer.path.is_file():
                raise InputError(f"{layer.path.name} of {OLLAMA}{self.name} is missing: {again}")
            size = layer.path.stat().st_size
            if size != layer.size:
                raise InputError(
                    f"{layer.path.name} of {OLLAMA}{self.name} has {size:,} of {layer.size:,} bytes: {again}"
                )


def folders() -> list[Path]:
    """Return the folders in which Ollama may have its models: OLLAMA_MODELS, else the user's and the service's."""
    given = os.environ.get("OLLAMA_MODELS")
    return [local_path(given)] if given else [Path.home() / ".ollama" / "models", SERVICE_FOLDER]


def find_model(name: str) -> OllamaModel:
    """Return the model of a name such as "ollama:llama3.2-vision", with its files checked.

    Raises:
        NotFoundError: if Ollama's folder does not hold it.
        InputError: if it is no name, or as `read_manifest` and `OllamaModel.check`.
        DiskError: if the folder cannot be read.
    """
    complete = ollama_name(name)
    path, _, tag = complete.rpartition(":")
    parts = path.split("/")
    inner = Path(*[HOST, NAMESPACE][: 3 - len(parts)], *parts, tag)
    for folder in folders():
        manifest = folder / "manifests" / inner
        try:
            if manifest.is_file():
                model = read_manifest(folder, manifest, complete)
                model.check()
                return model
        except OSError as error:
            raise unreadable(error) from error
    raise NotFoundError(
        f"{OLLAMA}{complete} is not in {' or '.join(map(str, folders()))}: run `ollama pull {complete}`, or set "
        "OLLAMA_MODELS to Ollama's folder; `ov-mllama models` lists what is there."
    )


def read_manifest(folder: Path, manifest: Path, name: str) -> OllamaModel:
    """Return a model by its manifest; InputError if that is damaged."""
    try:
        text = manifest.read_bytes()[:MANIFEST_MAX_BYTES]
        layers: dict[str, list[Layer]] = {}
        for layer in json.loads(text)["layers"]:
            digest = DIGEST.fullmatch(layer["digest"])
            if not (digest and isinstance(layer["size"], int) and 0 <= layer["size"] < MAX_BYTES):
                raise ValueError("a layer without its digest or size")
            kind = str(layer["mediaType"]).removeprefix(LAYER)
            layers.setdefault(kind, []).append(Layer(folder / "blobs" / f"sha256-{digest[1]}", layer["size"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{manifest} is no manifest of Ollama's: {PULL.format(name)}") from error
    return OllamaModel(name, layers)


def unreadable(error: OSError) -> DiskError:
    """Return the error for a file of Ollama's that this user may not read."""
    return DiskError(
        error.errno,
        f"{error.filename} cannot be read ({error.strerror}): run this as a user who may read it, or set OLLAMA_MODELS "
        "to a copy of Ollama's folder",
    )


def all_models() -> Iterator[tuple[OllamaModel, str]]:
    """Yield each model in Ollama's folders, and why it cannot be run; empty if it can, as far as its header tells.
    A folder that cannot be read is logged."""
    for folder in folders():
        root = folder / "manifests"
        try:  # a tag's name leaves out files such as .DS_Store
            manifests = sorted(path for path in root.glob("*/*/*/*") if OLLAMA_PART.fullmatch(path.name))
            manifests = [path for path in manifests if path.is_file()]
        except OSError as error:
            logger.warning("⚠️ %s", unreadable(error))
            continue
        for manifest in manifests:
            *parts, tag = manifest.relative_to(root).parts
            short = parts[2:] if parts[:2] == [HOST, NAMESPACE] else parts[1:] if parts[0] == HOST else parts
            name = f"{'/'.join(short)}:{tag}"
            try:
                model = read_manifest(folder, manifest, name)
            except (InputError, OSError) as error:
                yield OllamaModel(name, {}), sentence(error)
                continue
            yield model, obstacle(model)


def obstacle(model: OllamaModel) -> str:
    """Return why a model cannot be run, by its manifest and its architecture; empty if nothing speaks against it."""
    try:
        model.check()
        architecture = architecture_of(model.files[0])
    except (InputError, OSError) as error:
        return sentence(error)
    return "" if architecture == "mllama" else f"another architecture, {architecture}"


def sentence(error: InputError | OSError) -> str:
    """Return an error's sentence."""
    return str(unreadable(error) if isinstance(error, OSError) else error)
