"""Companion files of a folder's IRs: config, generation config, tokenizer, processor, chat template, golden answer.

STAMP_NAME names the checkpoint that they belong to. It is marked unfinished before the first of them changes and
finished after the last, so that a killed conversion never leaves IRs beside another checkpoint's tokenizer.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from .errors import InputError

STAMP_NAME = "companions.json"
FORMAT = "2"  # increase to have companions of earlier versions written anew by the next conversion
# may be edited by users; the others define tokens and pixels
EDITABLE = ("generation_config.json", "chat_template.jinja")
# written beside IRs before STAMP_NAME existed
UNSTAMPED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "golden.json", "golden.png", "golden.jpg"),
)


def digest_of(*paths: Path) -> str:
    """Hash the names and contents of files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def source_digest(checkpoint: Path) -> str:
    """Hash a checkpoint's files that companions are made from."""
    paths = [path for path in checkpoint.iterdir() if path.is_file() and not path.name.endswith(".index.json")]
    text = [path for path in paths if path.suffix in (".json", ".jinja", ".model", ".txt")]
    return f"{digest_of(*{*text, *(path for path in paths if path.name.startswith('golden.'))})}-{FORMAT}"


def stamp_of(folder: Path) -> dict:
    """Read a folder's STAMP_NAME; empty if missing or invalid."""
    try:
        stamp = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    names = stamp.get("files") if isinstance(stamp, dict) else None
    return stamp if isinstance(names, dict) and all(is_within(folder, name) for name in names) else {}


def is_within(folder: Path, name: str) -> bool:
    """Return whether a relative path stays within a folder, links resolved: the file may be removed."""
    absolute = Path(name).is_absolute() or ".." in Path(name).parts
    return not absolute and (folder / name).parent.resolve().is_relative_to(folder.resolve())


def names_in(folder: Path) -> set[str]:
    """Return the relative paths of a folder's companions."""
    stamp = stamp_of(folder)
    if stamp:
        return {*stamp["files"], STAMP_NAME}
    has_irs = any(folder.glob("openvino_*.xml"))  # else the files are the user's own
    return {name for name in UNSTAMPED if (folder / name).is_file()} if has_irs else set()


def changed(folder: Path) -> str | None:
    """Return the name of the first companion that is missing or modified, if any."""
    for name, digest in stamp_of(folder).get("files", {}).items():
        path = folder / name
        if path.name.startswith("golden."):  # optional: only verifies a device
            continue
        if not path.is_file() or (name not in EDITABLE and digest_of(path) != digest):
            return name
    return None


def are_current(folder: Path, checkpoint: str, source: str) -> bool:
    """Return whether a folder's companions are complete, and of this checkpoint and `source_digest`."""
    expected = {"checkpoint": checkpoint, "source": source, "finished": True}
    return expected.items() <= stamp_of(folder).items() and not changed(folder)


def check_companions(folder: Path, checkpoint: str, maker: str = "convert_mllama") -> None:
    """Raise an InputError unless a folder's companions are complete, unmodified (except EDITABLE ones) and of its IRs'
    checkpoint; `maker` is the function to run again."""
    stamp, again = stamp_of(folder), f"run {maker} again"
    if not stamp.get("finished"):
        raise InputError(f"The conversion into {folder} was not finished (see {STAMP_NAME}): {again}.")
    if stamp.get("checkpoint") != checkpoint:
        raise InputError(
            f"The config and tokenizer in {folder} and its IRs come from different checkpoints: {again} into another "
            "folder."
        )
    name = changed(folder)
    if name:
        raise InputError(
            f"{folder / name} is missing or modified; it and the IRs may be of different checkpoints: {again}. "
            f"(Only {' and '.join(EDITABLE)} may be edited.)"
        )


def write_companions(
    folder: Path,
    checkpoint: str,
    source: str,
    save: Callable[[Path], None],
    outdated: Collection[Path] = (),
    origin: str = "",
) -> None:
    """Replace a folder's companions, and remove older and `outdated` files. If interrupted, `check_companions` rejects
    the folder until the next call.

    Args:
        checkpoint: fingerprint as in the IRs' stamps.
        source: `source_digest` of the checkpoint.
        save: writes the companions into a given folder.
        outdated: files within `folder`.
        origin: hub id or path of the checkpoint.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:

        def replace_stamp(finished: bool, files: dict[str, str]) -> None:
            stamp = {"checkpoint": checkpoint, "source": source, "finished": finished, "files": files}
            stamp |= {"origin": origin}
            part = Path(scratch, STAMP_NAME)
            part.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
            part.replace(folder / STAMP_NAME)

        made = Path(scratch, "made")
        made.mkdir()
        save(made)
        written = sorted(path for path in made.rglob("*") if path.is_file())
        files = {path.relative_to(made).as_posix(): digest_of(path) for path in written}
        before = names_in(folder) | {path.relative_to(folder).as_posix() for path in outdated}
        replace_stamp(False, dict.fromkeys(before | {*files}, ""))
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (made / name).replace(folder / name)
        for name in sorted(before - {*files, STAMP_NAME}):
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a subfolder that is now empty
                (folder / name).parent.rmdir()
        replace_stamp(True, files)
