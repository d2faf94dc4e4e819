"""IR files: written atomically, by one process at a time, stamped with their provenance, checked when read."""

import contextlib
import errno
import hashlib
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import openvino as ov
from filelock import FileLock, Timeout

from .companions import check_companions, names_in, stamp_of
from .errors import DiskError, InputError, NotFoundError, OutOfMemoryError
from .memory import free_disk, free_memory
from .reference import Reference

logger = logging.getLogger(__name__)

# Increase whenever a graph's inputs, outputs or meaning change: IRs of another version are rebuilt, never loaded. Note
# the cost in CHANGELOG.md; tests/export/test_convert.py detects a graph that changed without it. Not for an output that
# one feature alone reads, such as `shapes.QUERIES`: IRs without it are loaded, and the feature's error has the fix.
CONVERTER_VERSION = "5"

VISION_ENCODER_NAME = "openvino_vision_encoder.xml"
LANGUAGE_MODEL_NAME = "openvino_language_model.xml"
DRAFT_MODEL_NAME = "openvino_draft_model.xml"
DRAFT_FOLDER = "draft"  # of a draft model, in the folder of the target model
NO_FINGERPRINT = "0" * 16


# ---- Writing ----


def check_disk_and_memory(folder: Path, disk: float, memory: float, advice: str) -> None:
    """Raise a DiskError or OutOfMemoryError unless a step fits on this machine.

    Args:
        folder: of the result, which takes `disk` bytes.
        memory: peak bytes of the process, without mapped files.
        advice: the fix, which ends the message.
    """
    free = free_disk(folder)
    if free < disk:
        raise DiskError(
            errno.ENOSPC,
            f"{folder} needs {disk / 1e9:.1f} GB of disk; only {free / 1e9:.1f} GB are free. Free some, or choose a "
            "folder on another disk.",
        )
    available = free_memory()
    if available < memory:
        raise OutOfMemoryError(
            f"This needs {memory / 1e9:.1f} GB of memory; only {available / 1e9:.1f} GB are available: {advice}."
        )


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Create a folder and lock it, waiting for any other process; then remove partial files of killed ones, whose locks
    the system releases. DiskError if it cannot be written to."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                logger.info("⌛ Waiting for another process to finish writing into %s", folder)
                stack.enter_context(lock.acquire())
        except OSError as error:
            text = (
                f"{folder} cannot be written to ({error.strerror}): choose another folder, or change its permissions."
            )
            raise DiskError(error.errno, text) from error
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        yield


def fingerprint(*paths: Path) -> str:
    """Hash large files by their sizes and 64 evenly spaced samples of 64 KiB each."""
    digest, sample = hashlib.sha256(), 1 << 16
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}:".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(sample, size // 64)):
                file.seek(start)
                digest.update(file.read(sample))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def atomic_write(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder whose files move into `folder` on success, .xml files last: after a kill in between,
    `ir_stamp` rejects an old .xml beside a new .bin."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".xml"):
            path.replace(folder / path.name)


def save_ir(model: ov.Model, path: Path, stamp: dict[str, str]) -> None:
    """Write an IR atomically, with its `stamp` (see `ir_stamp`); DiskError if that fails, as on a full disk."""
    for key, value in {**stamp, "openvino": ov.get_version(), "weights": NO_FINGERPRINT}.items():
        model.set_rt_info(value, ["mllama", key])
    with atomic_write(path.parent) as folder:
        part = folder / path.name
        # 16-bit weights stay as they are; the rest (norms, rotary frequencies) must stay in f32
        try:
            ov.save_model(model, part, compress_to_fp16=False)
        except RuntimeError as error:  # "iostream error" on a full disk
            raise DiskError(errno.EIO, f"{path} could not be written; is its disk full? ({error})") from error
        text = part.read_text(encoding="utf-8")
        weights = fingerprint(part.with_suffix(".bin"))
        text = text.replace(f'<weights value="{NO_FINGERPRINT}"', f'<weights value="{weights}"')
        part.write_text(text, encoding="utf-8")


# ---- Reading ----


def ir_stamp(path: Path) -> dict[str, str]:
    """Read the stamp that `save_ir` wrote into an IR.

    Returns:
        `converter_version`, `checkpoint` (its fingerprint), `format` of its weights ("16 bit", "int4_asym", "q4_k_m"
        ...), `padding_tiles` ("alike" or "each", see `convert.padding_tiles_are_alike`), `vision_layers` and `row_mask`
        (see `reference.Reference`; not of a draft model), `openvino` (version), `weights` (fingerprint of the .bin), if
        compressed the number of `samples`, of a language model also `group_size` (weights per scale) and `taken_over`
        (number of matrices that are stored as in the checkpoint, or "all"). Empty for an IR that is missing,
        incomplete, of another program, or beside another's .bin.
    """
    text = complete_xml(path)
    stamp = parse_stamp(text)
    return stamp if text and stamp.get("weights") == fingerprint(path.with_suffix(".bin")) else {}


def display_name(model_dir: Path, language: dict[str, str], vision: dict[str, str], device: str) -> str:
    """Describe a model by its IRs' stamps: "Llama-3.2-11B-Vision-Instruct · INT4, pictures INT8 · CPU"."""
    stored = [stamp.get("format", "16 bit") for stamp in (language, vision)]
    formats = [
        text.split("_")[0].replace("int", "INT") if text.startswith("int") else text.upper().replace(" BIT", " bit")
        for text in stored
    ]
    return f"{model_dir.resolve().name} · {formats[0]}, pictures {formats[1]} · {device}"


def complete_xml(path: Path) -> str:
    """Read an IR's .xml; empty if it is incomplete or has no .bin."""
    if not (path.is_file() and path.with_suffix(".bin").is_file()):
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if text.rstrip().endswith("</net>") else ""


def parse_stamp(text: str) -> dict[str, str]:
    """Parse the stamp in an .xml, unverified."""
    section = text.rpartition("<mllama>")[2].partition("</mllama>")[0]
    return dict(re.findall(r'<(\w+) value="([^"]*)"', section))


def external_stamp(path: Path) -> dict[str, str]:
    """Read the `ir_stamp` that an IR inherited from a 16-bit one through NNCF and `ov.save_model`, its weights verified
    by size only; empty for other IRs."""
    text = complete_xml(path)
    stamp = parse_stamp(text)
    if stamp.get("format") != "16 bit" or "<nncf>" not in text:
        return {}
    ends = [int(offset) + int(size) for offset, size in re.findall(r'offset="(\d+)" size="(\d+)"', text)]
    if path.with_suffix(".bin").stat().st_size < max(ends, default=0):
        return {}
    return {**stamp, "format": "int, not by this project" if "<weight_compression>" in text else "16 bit"}


def is_current(path: Path, expected: dict[str, str]) -> bool:
    """Return whether an IR is complete, readable by this OpenVINO, and has the items `expected` in its stamp."""
    stamp = ir_stamp(path)
    return expected.items() <= stamp.items() and not needs_newer_openvino(stamp)


def provenance(path: Path) -> dict[str, str]:
    """Return the items of an IR's stamp that IRs made from it inherit."""
    shared = ("converter_version", "checkpoint", "padding_tiles", *Reference._fields)
    return {key: value for key, value in ir_stamp(path).items() if key in shared}


def check_model_dir(model_dir: Path, names: tuple[str, ...] | str) -> dict[str, dict[str, str]]:
    """Return the `ir_stamp` of each IR, after checking that they belong together.

    Raises:
        NotFoundError: if one is missing.
        InputError: if one is incomplete, foreign or outdated, or they and the companions are of different checkpoints
            or references.
    """
    model_dir, names = Path(model_dir), (names,) if isinstance(names, str) else names
    maker = "make_draft_model" if DRAFT_MODEL_NAME in names else "convert_mllama"
    for name in ("config.json", *names):
        if not (model_dir / name).is_file():
            if name.startswith("llm_"):
                made = ", ".join(sorted(path.name for path in model_dir.glob("llm_*.xml"))) or "none"
                raise NotFoundError(
                    f"{model_dir / name} is missing: run convert_mllama and compress_language_model, or choose "
                    f"another: {made}."
                )
            raise NotFoundError(f"{model_dir / name} is missing: run {maker}(model_id, '{model_dir}') first.")
    stamps = {name: ir_stamp(model_dir / name) for name in names}
    for name in [name for name, stamp in stamps.items() if not stamp]:
        stamps[name] = external_stamp(model_dir / name)
        if stamps[name]:
            warnings.warn(
                f"{model_dir / name} was not written by this project: its provenance and integrity are unknown.",
                stacklevel=3,
            )
    for name, stamp in stamps.items():
        if not stamp:
            raise InputError(
                f"{model_dir / name} is incomplete, beside another model's .bin, or not written by convert_mllama: "
                "delete it and convert again."
            )
        if stamp["converter_version"] != CONVERTER_VERSION:
            raise InputError(
                f"{model_dir / name} was made by converter version {stamp['converter_version']}; this is version "
                f"{CONVERTER_VERSION}: run convert_mllama again, which replaces outdated files."
            )
        if needs_newer_openvino(stamp):
            raise InputError(
                f"{model_dir / name} was made with OpenVINO {stamp['openvino']}, newer than {ov.get_version()} here: "
                "install the versions of requirements.txt, or run convert_mllama again."
            )
    if len({stamp["checkpoint"] for stamp in stamps.values()}) > 1:
        raise InputError(
            f"{' and '.join(names)} in {model_dir} come from different checkpoints: run convert_mllama again into "
            "another folder."
        )
    if len({tuple(stamp.get(key) for key in Reference._fields) for stamp in stamps.values()}) > 1:
        raise InputError(
            f"{' and '.join(names)} in {model_dir} follow different references: run convert_mllama again, and compress."
        )
    check_companions(model_dir, next(iter(stamps.values()))["checkpoint"], maker)
    return stamps


def outdated_files(folder: Path, checkpoint: str) -> list[Path]:
    """List the .xml and .bin files in a folder that this project made of another checkpoint, the draft model included;
    never the user's own files."""
    found = []
    for path in [*folder.glob("openvino_*.xml"), *folder.glob("llm_*.xml")]:
        made_of = parse_stamp(complete_xml(path)).get("checkpoint", checkpoint)
        if made_of != checkpoint and not external_stamp(path):
            found += [path, path.with_suffix(".bin")]
    if stamp_of(folder).get("checkpoint") != checkpoint and (folder / DRAFT_FOLDER / DRAFT_MODEL_NAME).is_file():
        draft = folder / DRAFT_FOLDER
        names = {DRAFT_MODEL_NAME, DRAFT_MODEL_NAME.replace(".xml", ".bin"), ".lock", *names_in(draft)}
        found += [draft / name for name in sorted(names)]
    return found


def needs_newer_openvino(stamp: dict[str, str]) -> bool:
    """Return whether an IR was made by a newer OpenVINO than this one, which reads IRs of older ones only."""

    def release(version: str) -> tuple[int, ...]:  # "2026.4.1-1234-abc"
        return tuple(int(number) for number in version.split("-")[0].split("."))

    return release(stamp["openvino"]) > release(ov.get_version())


def newest(model_dir: Path, original: str) -> str:
    """Return the file name of the newest compressed IR of the folder's checkpoint and this version; else of the 16-bit
    one.

    Args:
        original: of the 16-bit IR, LANGUAGE_MODEL_NAME or VISION_ENCODER_NAME.
    Raises:
        NotFoundError: if there is none.
    """
    expected = {"converter_version": CONVERTER_VERSION}
    encoder = ir_stamp(model_dir / VISION_ENCODER_NAME)  # always there, and of the folder's checkpoint
    expected |= {key: encoder[key] for key in ("checkpoint", *Reference._fields) if key in encoder}
    compressed = "llm_*.xml" if original == LANGUAGE_MODEL_NAME else f"{Path(original).stem}_*.xml"
    files = sorted(model_dir.glob(compressed), key=lambda path: path.stat().st_mtime, reverse=True)
    fitting = (path.name for path in [*files, model_dir / original] if is_current(path, expected))
    name = next(fitting, None)
    if name is None:
        raise NotFoundError(
            f"{model_dir} holds no {original}, nor a compressed one, for this version: run convert_mllama(model_id, "
            f"'{model_dir}') first."
        )
    return name
