"""The source of a checkpoint in GGUF: "ollama:NAME[:TAG]", the path of a .gguf file, or two with a comma between."""

import shutil
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

LICENSES = "license-*.txt"  # copies of Ollama's licences, beside the IRs
OTHER_HALF = "put the other file beside it, or give both, as MODEL.gguf,PROJECTOR.gguf"


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
    else:
        paths = gguf_paths(name)
        for path in paths:
            if not path.is_file():
                raise NotFoundError(f"{path} does not exist: check the spelling.")
    files = sorted(with_other_half([read_gguf(path) for path in paths]), key=has_text, reverse=True)
    metadata: dict[str, Any] = {}
    for file in files:
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


def has_vision(file: GgufFile) -> bool:
    """Return whether a file holds a vision encoder."""
    return any(name.startswith("v.") for name in file.tensors)


def with_other_half(files: list[GgufFile]) -> list[GgufFile]:
    """Return a model's files, with the one beside a single half that holds the other half, if there is one."""
    if len(files) > 1 or (has_text(files[0]) and has_vision(files[0])) or files[0].path.suffix != ".gguf":
        return files
    wanted = has_vision if has_text(files[0]) else has_text
    others = [path for path in sorted(files[0].path.parent.glob("*.gguf")) if path != files[0].path]
    fitting = [file for file in map(read_gguf, others) if wanted(file) and not (has_text(file) and has_vision(file))]
    return [*files, *fitting] if len(fitting) == 1 else files


def check_halves(files: list[GgufFile], label: str) -> None:
    """Raise an InputError unless files hold both a language model and a vision encoder."""
    if not any(map(has_text, files)):
        raise InputError(f"{label} holds a vision encoder without its language model: {OTHER_HALF}.")
    if not any(map(has_vision, files)):
        raise InputError(f"{label} holds a language model without its vision encoder: {OTHER_HALF}.")
