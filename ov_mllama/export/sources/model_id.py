"""Names of checkpoints: hub id, local folder, or a model in GGUF, "ollama:NAME[:TAG]" or the path of a .gguf file."""

import os
import re
from pathlib import Path

from ov_mllama.runtime.errors import InputError, NotFoundError

OLLAMA = "ollama:"
OLLAMA_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # of a name of Ollama's; it becomes part of a path
PORT = re.compile(r":\d+$")  # of a host, the first of three parts
BETWEEN_FILES = re.compile(r"(?<=\.gguf)\s*,", re.IGNORECASE)  # another comma is part of a path
HOST, NAMESPACE = "registry.ollama.ai", "library"  # which Ollama leaves out of names
LATEST = "latest"  # tag of a name without one


def local_path(name: str | Path) -> Path:
    """Return a path, `~` expanded.

    Raises:
        NotFoundError: for the home folder of an unknown user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise NotFoundError(f"{name} is in the home folder of an unknown user: check the spelling.") from error


def is_gguf(name: str | Path) -> bool:
    """Return whether a name is one of a model in GGUF; a folder's is not, whatever it ends with."""
    if str(name).startswith(OLLAMA):
        return True
    return str(name).lower().endswith(".gguf") and not local_path(name).is_dir()


def gguf_paths(name: str | Path) -> list[Path]:
    """Return the paths of .gguf files, with commas between."""
    return [local_path(part.strip()) for part in BETWEEN_FILES.split(str(name))]


def ollama_name(name: str | Path) -> str:
    """Return a name as Ollama lists it: "ollama:llama3.2-vision" is "llama3.2-vision:latest".

    Raises:
        InputError: if it is none of Ollama's.
    """
    *above, last = str(name).removeprefix(OLLAMA).split("/")
    model, _, tag = last.partition(":")
    host = [PORT.sub("", above[0]), *above[1:]] if len(above) == 2 else above  # noqa: PLR2004 - host, namespace
    if not (len(above) < 3 and all(map(OLLAMA_PART.fullmatch, [*host, model, tag or LATEST]))):
        raise InputError(
            f"'{name}' is no name of Ollama's: write {OLLAMA}NAME or {OLLAMA}NAME:TAG, as `ollama list` prints it."
        )
    path = "/".join([*above, model]).removeprefix(f"{HOST}/").removeprefix(f"{NAMESPACE}/")
    return f"{path}:{tag or LATEST}"


def origin_of(model_id: str | Path) -> str:
    """Return the hub id of a checkpoint, also of a folder in the hub's cache; the absolute path of another folder; of a
    model in GGUF its name with the tag, or the absolute paths of its files."""
    folder = local_path(model_id)
    if not folder.is_dir():
        if str(model_id).startswith(OLLAMA):
            return f"{OLLAMA}{ollama_name(model_id)}"
        if is_gguf(model_id):
            return ",".join(os.path.abspath(path) for path in gguf_paths(model_id))  # noqa: PTH100 - links stay
        return str(model_id)
    path = Path(os.path.abspath(folder))  # noqa: PTH100 - `resolve` would replace the names of links
    if len(path.parts) > 3 and path.parts[-2] == "snapshots" and path.parts[-3].startswith("models--"):
        return path.parts[-3].removeprefix("models--").replace("--", "/")
    return str(path)


def short_name(model_id: str | Path) -> str:
    """Return a name for the folder of a checkpoint's IRs: of "ollama:llama3.2-vision:90b" "llama3.2-vision-90b"."""
    if str(model_id).startswith(OLLAMA):
        return ollama_name(model_id).removesuffix(f":{LATEST}").replace("/", "--").replace(":", "-")
    return gguf_paths(model_id)[0].stem if is_gguf(model_id) else Path(origin_of(model_id)).name
