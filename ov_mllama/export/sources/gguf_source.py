"""The source of a checkpoint in GGUF: "ollama:NAME[:TAG]", the path of a .gguf file, or two with a comma between."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gguf.constants import LlamaFileType

from ov_mllama.export.sources.gguf import GgufFile, read_gguf
from ov_mllama.export.sources.gguf_names import tensors_of
from ov_mllama.export.sources.gguf_settings import config_of, write_settings
from ov_mllama.export.sources.model_id import OLLAMA, gguf_paths
from ov_mllama.export.sources.ollama import find_model
from ov_mllama.export.sources.source import Source
from ov_mllama.runtime.errors import InputError, NotFoundError
from ov_mllama.runtime.reference import META

logger = logging.getLogger(__name__)

LICENSES = "license-*.txt"  # copies of Ollama's licences, beside the IRs
NOT_TAKEN = {  # layers of a model that `ollama create` made
    "messages": ("messages", "are not taken over: send them with each conversation"),
    "system": ("a system prompt", "is not taken over: send it with each conversation"),
}
SUFFIX = ".gguf"
GIVE_BOTH = "give both files, as MODEL.gguf,PROJECTOR.gguf"
OTHER_HALF = f"put the other file beside it, or {GIVE_BOTH}"


def gguf_source(name: str | Path, model_type: str = "mllama") -> Source:
    """Return the source of a model in GGUF, told from manifests and headers alone.

    Args:
        model_type: expected by the caller, as for `find_source`.
    Raises:
        NotFoundError: if there is no such file or model.
        InputError: for another model, a half of one, or a damaged file.
    """
    if model_type != "mllama":
        raise InputError(f"{name}: a draft model in GGUF is not read, give a Llama's folder or hub id.")
    licenses: list[Path] = []
    if str(name).startswith(OLLAMA):
        model = find_model(str(name))
        paths, licenses = model.files, [layer.path for layer in model.layers.get("license", [])]
        for kind in sorted(NOT_TAKEN.keys() & model.layers.keys()):
            logger.warning("⚠️ %s has %s of its own, which %s", name, *NOT_TAKEN[kind])
    else:
        paths = gguf_paths(name)
        for path in paths:
            if not path.is_file():
                raise NotFoundError(f"{path} does not exist: check the spelling.")
    files = sorted(with_other_half([read_gguf(path) for path in paths]), key=has_text, reverse=True)
    metadata: dict[str, Any] = {}
    for file in files:
        if len(files) > 1 and not is_mllama(file):
            raise InputError(
                f"{file.path} is no part of Llama 3.2 Vision ({file.metadata.get('general.architecture')}): take "
                "another file, or give the model's alone."
            )
        metadata = {**file.metadata, **metadata}
    label = str(name)
    if metadata.get("general.architecture") == "mllama":
        check_halves(files, label)
    config = config_of(metadata, label)
    form = format_of(metadata)
    return Source(
        f"GGUF {form.upper()}",
        config,
        settings=[],
        weights=[file.path for file in files],
        tensors=partial(tensors_of, files, config),
        quantized=form not in ("f16", "bf16", "f32"),
        reference=META,
        save_settings=partial(save_settings, metadata, licenses, label),
        form=form,
    )


def save_settings(metadata: dict[str, Any], licenses: list[Path], label: str, folder: Path) -> None:
    """Write a model's config, tokenizer, template and licences into a folder."""
    write_settings(metadata, folder, label)
    for number, path in enumerate(licenses, 1):
        shutil.copyfile(path, folder / LICENSES.replace("*", str(number)))


def format_of(metadata: dict[str, Any]) -> str:
    """Return the format of most weights, such as "q4_k_m"."""
    number = metadata.get("general.file_type")
    if type(number) is not int or number not in {*LlamaFileType}:
        return "gguf"
    return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()


# ---- Two files ------------------------------------------------------------------------------------------------------


def has_text(file: GgufFile) -> bool:
    """Return whether a file holds a language model."""
    return any(name.startswith("blk.") for name in file.tensors)


def is_complete(file: GgufFile) -> bool:
    """Return whether a file holds both."""
    return has_text(file) and has_vision(file)


def is_mllama(file: GgufFile) -> bool:
    """Return whether a file's metadata are of Llama 3.2 Vision."""
    return any(key.startswith("mllama.") for key in file.metadata)


def has_vision(file: GgufFile) -> bool:
    """Return whether a file holds a vision encoder."""
    return any(name.startswith("v.") for name in file.tensors)


def with_other_half(files: list[GgufFile]) -> list[GgufFile]:
    """Return a model's files, with the one beside a single half that holds the other half, if there is one.

    Raises:
        InputError: if several do.
    """
    first = files[0]
    if len(files) > 1 or is_complete(first) or not is_mllama(first) or first.path.suffix.lower() != SUFFIX:
        return files
    wanted = has_vision if has_text(first) else has_text
    fitting = [file for file in files_beside(first.path) if is_mllama(file) and wanted(file) and not is_complete(file)]
    if len(fitting) > 1:
        names = ", ".join(file.path.name for file in fitting)
        raise InputError(f"{first.path} has several other halves beside it, {names}: {GIVE_BOTH}.")
    return [*files, *fitting]


def files_beside(path: Path) -> Iterator[GgufFile]:
    """Yield the other GGUF files of a file's folder that can be read."""
    for other in sorted(path.parent.glob("*")):
        if other.suffix.lower() == SUFFIX and other != path and other.is_file():
            with contextlib.suppress(InputError, OSError):
                yield read_gguf(other)


def check_halves(files: list[GgufFile], label: str) -> None:
    """Raise an InputError unless files hold both a language model and a vision encoder."""
    if not any(map(has_text, files)):
        raise InputError(f"{label} holds a vision encoder without its language model: {OTHER_HALF}.")
    if not any(map(has_vision, files)):
        raise InputError(f"{label} holds a language model without its vision encoder: {OTHER_HALF}.")
