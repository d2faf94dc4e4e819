"""The files beside a folder's IRs: config, generation config, tokenizer, processor, chat template, golden answer.

They belong to the IRs: STAMP_NAME names the checkpoint that they are of. It is marked unfinished before the first of
them changes and finished after the last, so that a killed conversion never leaves IRs beside another's tokenizer.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

STAMP_NAME = "companions.json"
# a person may change how it answers; the others decide what tokens and pixels mean
EDITABLE = ("generation_config.json", "chat_template.jinja")
# written beside IRs before there was STAMP_NAME
UNSTAMPED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "golden.json", "golden.png", "golden.jpg"),
)


def digest_of(*paths: Path) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def source_digest(checkpoint: Path) -> str:
    """Of a checkpoint's files that companions are made of, so that they are written anew when one changes."""
    paths = [path for path in checkpoint.iterdir() if path.is_file() and not path.name.endswith(".index.json")]
    text = [path for path in paths if path.suffix in (".json", ".jinja", ".model", ".txt")]
    return digest_of(*{*text, *(path for path in paths if path.name.startswith("golden."))})


def stamp_of(folder: Path) -> dict:
    """The content of a folder's STAMP_NAME; empty where there is none, or no readable one."""
    try:
        stamp = json.loads((folder / STAMP_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    names = stamp.get("files") if isinstance(stamp, dict) else None
    return stamp if isinstance(names, dict) and all(is_within(folder, name) for name in names) else {}


def is_within(folder: Path, name: str) -> bool:
    """Whether a relative path stays within a folder, through no link of a folder: what it names may be removed."""
    absolute = Path(name).is_absolute() or ".." in Path(name).parts
    return not absolute and (folder / name).parent.resolve().is_relative_to(folder.resolve())


def names_in(folder: Path) -> set[str]:
    """Paths in a model's folder that a conversion wrote as companions, or began to remove."""
    stamp = stamp_of(folder)
    if stamp:
        return {*stamp["files"], STAMP_NAME}
    has_irs = any(folder.glob("openvino_*.xml"))  # else its files are somebody's own
    return {name for name in UNSTAMPED if (folder / name).is_file()} if has_irs else set()


def changed(folder: Path) -> str | None:
    """Name of the first companion that is missing or another than was written; None if all are right."""
    for name, digest in stamp_of(folder).get("files", {}).items():
        path = folder / name
        if path.name.startswith("golden."):  # a question to check a device with: anybody may leave it out
            continue
        if not path.is_file() or (name not in EDITABLE and digest_of(path) != digest):
            return name
    return None


def are_current(folder: Path, checkpoint: str, source: str) -> bool:
    """Whether a folder's companions are whole, of this checkpoint, and made of such files (`source_digest`)."""
    expected = {"checkpoint": checkpoint, "source": source, "finished": True}
    return expected.items() <= stamp_of(folder).items() and not changed(folder)


def check_companions(folder: Path, checkpoint: str, maker: str = "convert_mllama") -> None:
    """Refuses a folder whose companions are not those of its IRs.

    Args:
        checkpoint: fingerprint in the IRs' stamps.
        maker: function that writes them, for the sentence.
    Raises:
        ValueError: they are unfinished, of another checkpoint, missing or changed. (EDITABLE may be changed.)
    """
    stamp, again = stamp_of(folder), f"run {maker} again"
    if not stamp.get("finished"):
        raise ValueError(
            f"The conversion into {folder} was not finished ({STAMP_NAME} is missing or says so): {again}."
        )
    if stamp.get("checkpoint") != checkpoint:
        raise ValueError(
            f"The config and tokenizer in {folder} and its IRs come from different checkpoints: {again} with the one "
            "you want, into a folder of its own."
        )
    name = changed(folder)
    if name:
        raise ValueError(
            f"{folder / name} is missing or not the one that was written with the IRs beside it; they may be of "
            f"different checkpoints: {again}. (Only {' and '.join(EDITABLE)} may be changed.)"
        )


def write_companions(
    folder: Path, checkpoint: str, source: str, save: Callable[[Path], None], outdated: Collection[Path] = ()
) -> None:
    """Replaces a folder's companions, and removes those of before and the `outdated` files.

    Whatever interrupts it, `check_companions` then refuses the folder, and the next call ends the work.

    Args:
        checkpoint: fingerprint as in the IRs' stamps.
        source: `source_digest` of the checkpoint.
        save: writes the companions into the folder that it is given.
        outdated: files within `folder`.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        save(made)
        written = sorted(path for path in made.rglob("*") if path.is_file())
        files = {path.relative_to(made).as_posix(): digest_of(path) for path in written}
        before = names_in(folder) | {path.relative_to(folder).as_posix() for path in outdated}
        stamp = {"checkpoint": checkpoint, "source": source}
        replace_stamp(
            folder, Path(scratch), {**stamp, "finished": False, "files": dict.fromkeys(before | {*files}, "")}
        )
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (made / name).replace(folder / name)
        for name in sorted(before - {*files, STAMP_NAME}):
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder within, which is then empty
                (folder / name).parent.rmdir()
        replace_stamp(folder, Path(scratch), {**stamp, "finished": True, "files": files})


def replace_stamp(folder: Path, scratch: Path, stamp: dict) -> None:
    """Writes STAMP_NAME in one step."""
    part = scratch / STAMP_NAME
    part.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / STAMP_NAME)
