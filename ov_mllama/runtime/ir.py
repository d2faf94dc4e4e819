"""IRs as files: written whole or not at all, by one process at a time, stamped with their origin, checked when read.

`convert.py` and `compress.py` write them, `model.py` reads them.
"""

import contextlib
import errno
import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import openvino as ov
from filelock import FileLock, Timeout
from transformers import GenerationConfig, MllamaConfig

from .companions import check_companions, names_in, stamp_of
from .memory import free_disk, free_memory
from .reference import Reference

# Raise it whenever a graph's inputs, outputs or meaning change: IRs of another version are rebuilt, never loaded.
# Say in CHANGELOG.md what that costs; tests/export/test_convert.py notices a graph that changed without it.
CONVERTER_VERSION = "5"

VISION_ENCODER_NAME = "openvino_vision_encoder.xml"
LANGUAGE_MODEL_NAME = "openvino_language_model.xml"
DRAFT_MODEL_NAME = "openvino_draft_model.xml"
DRAFT_FOLDER = "draft"  # of a draft model, in the folder of the large one

NO_FINGERPRINT = "0" * 16


# ---- Before ---------------------------------------------------------------------------------------------------------


def check_disk_and_memory(folder: Path, disk: float, memory: float, advice: str) -> None:
    """Refuses to begin what this machine has no room for.

    Args:
        folder: where the result will be written, `disk` bytes of it.
        memory: bytes that the process will take at its peak, beside files that are mapped and can be dropped.
        advice: what else to do; ends the sentence.
    Raises:
        OSError: too little disk (errno.ENOSPC); MemoryError: too little memory. Both say how much is missing.
    """
    free = free_disk(folder)
    if free < disk:
        raise OSError(
            errno.ENOSPC,
            f"{folder} will take {disk / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB left, "
            f"{(disk - free) / 1e9:.1f} GB too little: make room there, or choose a folder on another disk",
        )
    available = free_memory()
    if available < memory:
        raise MemoryError(
            f"This will take {memory / 1e9:.1f} GB of memory at its peak and {available / 1e9:.1f} GB are free, "
            f"{(memory - available) / 1e9:.1f} GB too little: {advice}."
        )


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes into `folder`, which exists and holds nothing half-written.

    Another process waits here until the first is done or gone: the system takes the lock from a process that dies.

    Raises:
        OSError: the folder cannot be written to (PermissionError where that is the reason).
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except Timeout:
                print(f"⌛ Another process is writing into {folder}: waiting for it")
                stack.enter_context(lock.acquire())
        except OSError as error:
            raise OSError(
                error.errno, f"{folder} cannot be written to ({error.strerror}): choose another folder, or allow it"
            ) from error
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        yield


# ---- Writing --------------------------------------------------------------------------------------------------------


def fingerprint(*paths: Path) -> str:
    """A cheap identity of large files: of each, its size and 64 samples of 64 KiB, spread evenly."""
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
    """A scratch folder inside `folder`, whose files move there when all of them are written; else they are dropped.

    The .xml move last. An old one beside a new .bin, as a kill between the two leaves them, is no IR to `ir_stamp`.
    """
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".xml"):
            path.replace(folder / path.name)


def save_ir(model: ov.Model, path: Path, stamp: dict[str, str]) -> None:
    """Writes an IR with its `stamp` (see `ir_stamp`), whole or not at all.

    Raises:
        OSError: it could not be written whole, as on a full disk; what was there before is kept.
    """
    for key, value in {**stamp, "openvino": ov.get_version(), "weights": NO_FINGERPRINT}.items():
        model.set_rt_info(value, ["mllama", key])
    with atomic_write(path.parent) as folder:
        part = folder / path.name
        # 16-bit weights are stored as they are; what is left in f32 (norms, rotary frequencies) must stay exact
        try:
            ov.save_model(model, part, compress_to_fp16=False)
        except RuntimeError as error:  # "iostream error" is all that OpenVINO says of a full disk
            raise OSError(errno.EIO, f"{path} could not be written; is its disk full? ({error})") from error
        text = part.read_text(encoding="utf-8")
        weights = fingerprint(part.with_suffix(".bin"))
        text = text.replace(f'<weights value="{NO_FINGERPRINT}"', f'<weights value="{weights}"')
        part.write_text(text, encoding="utf-8")


# ---- Reading --------------------------------------------------------------------------------------------------------


def ir_stamp(path: Path) -> dict[str, str]:
    """What `save_ir` wrote into an IR about its origin.

    Returns:
        `converter_version`, `checkpoint` (its fingerprint), `format` of its weights ("16 bit", "int4_asym", ...),
        `padding_tiles` ("alike" or "each", see `convert.padding_tiles_are_alike`), `vision_layers` and `row_mask` (see
        `reference.Reference`; not of a draft model), `openvino` (its version), `weights`
        (fingerprint of the .bin) and, if compressed, `samples` it was calibrated with; of a language model also
        `group_size`, how many weights share a scale. Empty for an IR that is missing, incomplete, made by another
        program, or beside a .bin not its own.
    """
    text = whole_xml(path)
    stamp = written_stamp(text)
    return stamp if text and stamp.get("weights") == fingerprint(path.with_suffix(".bin")) else {}


def named(model_dir: Path, language: dict[str, str], vision: dict[str, str], device: str) -> str:
    """A model for people, such as "Llama-3.2-11B-Vision-Instruct · INT4, pictures INT8 · CPU".

    Args:
        language, vision: stamps of its IRs.
    """
    formats = [stamp.get("format", "16 bit").split("_")[0].replace("int", "INT") for stamp in (language, vision)]
    return f"{model_dir.resolve().name} · {formats[0]}, pictures {formats[1]} · {device}"


def whole_xml(path: Path) -> str:
    """The text of an IR's .xml that is complete and has a .bin beside it; else nothing."""
    if not (path.is_file() and path.with_suffix(".bin").is_file()):
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if text.rstrip().endswith("</net>") else ""


def written_stamp(text: str) -> dict[str, str]:
    """What an .xml says of itself, be it true or not."""
    section = text.rpartition("<mllama>")[2].partition("</mllama>")[0]
    return dict(re.findall(r'<(\w+) value="([^"]*)"', section))


def external_stamp(path: Path) -> dict[str, str]:
    """The stamp that an IR inherited from the 16-bit one which somebody gave to NNCF and saved (`nncf.quantize`,
    `nncf.compress_weights`, then `ov.save_model`). Whether its weights are whole is known by their size only.

    Returns:
        as `ir_stamp`; empty for anything else.
    """
    text = whole_xml(path)
    stamp = written_stamp(text)
    if stamp.get("format") != "16 bit" or "<nncf>" not in text:
        return {}
    ends = [int(offset) + int(size) for offset, size in re.findall(r'offset="(\d+)" size="(\d+)"', text)]
    if path.with_suffix(".bin").stat().st_size < max(ends, default=0):
        return {}
    return {**stamp, "format": "int, not by this project" if "<weight_compression>" in text else "16 bit"}


def is_current(path: Path, wanted: dict[str, str]) -> bool:
    """Whether an IR is there, whole, readable here, and says of itself what `wanted` (part of a stamp) does."""
    stamp = ir_stamp(path)
    return wanted.items() <= stamp.items() and not needs_newer_openvino(stamp)


def provenance(path: Path) -> dict[str, str]:
    """The part of an IR's stamp that its descendants share."""
    shared = ("converter_version", "checkpoint", "padding_tiles", *Reference._fields)
    return {key: value for key, value in ir_stamp(path).items() if key in shared}


def check_model_dir(model_dir: Path, names: tuple[str, ...] | str) -> dict[str, dict[str, str]]:
    """Refuses a folder whose IRs are missing, incomplete, foreign, outdated, or of two different checkpoints or
    references, or whose companions are not theirs.

    Returns:
        the `ir_stamp` of each.

    Raises:
        FileNotFoundError, ValueError: with the sentence that names the fix.
    """
    model_dir, names = Path(model_dir), (names,) if isinstance(names, str) else names
    maker = "make_draft_model" if DRAFT_MODEL_NAME in names else "convert_mllama"
    for name in ("config.json", *names):
        if not (model_dir / name).is_file():
            if name.startswith("llm_"):
                made = ", ".join(sorted(path.name for path in model_dir.glob("llm_*.xml"))) or "none"
                raise FileNotFoundError(
                    f"{model_dir / name} is missing: make it with compress, after convert_mllama, or give one of those "
                    f"that are there: {made}."
                )
            raise FileNotFoundError(f"{model_dir / name} is missing: run {maker}(model_id, '{model_dir}') first.")
    stamps = {name: ir_stamp(model_dir / name) for name in names}
    for name in [name for name, stamp in stamps.items() if not stamp]:
        stamps[name] = external_stamp(model_dir / name)
        if stamps[name]:
            warnings.warn(
                f"{model_dir / name} was not written by this project's compress or optimize_vision_encoder: its origin "
                "is not known, nor whether its weights are whole.",
                stacklevel=3,
            )
    for name, stamp in stamps.items():
        if not stamp:
            raise ValueError(
                f"{model_dir / name} is incomplete, beside a .bin of another model, or not written by convert_mllama: "
                "delete it and convert again."
            )
        if stamp["converter_version"] != CONVERTER_VERSION:
            raise ValueError(
                f"{model_dir / name} was made by converter version {stamp['converter_version']}, this is version "
                f"{CONVERTER_VERSION}: run convert_mllama again, it replaces what is outdated."
            )
        if needs_newer_openvino(stamp):
            raise ValueError(
                f"{model_dir / name} was made with OpenVINO {stamp['openvino']}, and {ov.get_version()} here may not "
                "know all that is in it: install the versions of requirements.txt, or run convert_mllama again."
            )
    if len({stamp["checkpoint"] for stamp in stamps.values()}) > 1:
        raise ValueError(
            f"{' and '.join(names)} in {model_dir} come from different checkpoints: run convert_mllama again with the "
            "one you want, into a folder of its own."
        )
    if len({tuple(stamp.get(key) for key in Reference._fields) for stamp in stamps.values()}) > 1:
        raise ValueError(
            f"{' and '.join(names)} in {model_dir} follow different references: run convert_mllama again with the one "
            "you want, and compress what was compressed."
        )
    check_companions(model_dir, next(iter(stamps.values()))["checkpoint"], maker)
    return stamps


def outdated_files(folder: Path, checkpoint: str) -> list[Path]:
    """IRs in a folder that this project made of another checkpoint, each .xml and .bin, and the draft model if the
    folder's companions are another's. Somebody's own files and IRs are none of them."""
    found = []
    for path in [*folder.glob("openvino_*.xml"), *folder.glob("llm_*.xml")]:
        made_of = written_stamp(whole_xml(path)).get("checkpoint", checkpoint)
        if made_of != checkpoint and not external_stamp(path):
            found += [path, path.with_suffix(".bin")]
    if stamp_of(folder).get("checkpoint") != checkpoint and (folder / DRAFT_FOLDER / DRAFT_MODEL_NAME).is_file():
        draft = folder / DRAFT_FOLDER
        names = {DRAFT_MODEL_NAME, DRAFT_MODEL_NAME.replace(".xml", ".bin"), ".lock", *names_in(draft)}
        found += [draft / name for name in sorted(names)]
    return found


def needs_newer_openvino(stamp: dict[str, str]) -> bool:
    """Whether an IR was made by a newer OpenVINO than this one; older ones' are read by every later release."""

    def release(version: str) -> tuple[int, ...]:  # "2026.4.1-1234-abc"
        return tuple(int(number) for number in version.split("-")[0].split("."))

    return release(stamp["openvino"]) > release(ov.get_version())


def newest(model_dir: Path, original: str) -> str:
    """File name of the language model or vision encoder to load: of those that fit the folder's checkpoint and this
    version, the compressed one made last; else the 16-bit one.

    Args:
        original: the 16-bit one's name, LANGUAGE_MODEL_NAME or VISION_ENCODER_NAME.
    Raises:
        FileNotFoundError: there is none.
    """
    wanted = {"converter_version": CONVERTER_VERSION}
    encoder = ir_stamp(model_dir / VISION_ENCODER_NAME)  # every folder has it, and it says of which checkpoint
    wanted |= {key: encoder[key] for key in ("checkpoint", *Reference._fields) if key in encoder}
    compressed = "llm_*.xml" if original == LANGUAGE_MODEL_NAME else f"{Path(original).stem}_*.xml"
    files = sorted(model_dir.glob(compressed), key=lambda path: path.stat().st_mtime, reverse=True)
    fitting = (path.name for path in [*files, model_dir / original] if is_current(path, wanted))
    name = next(fitting, None)
    if name is None:
        raise FileNotFoundError(
            f"{model_dir} holds no {original}, nor a compressed one, for this version: run convert_mllama(model_id, "
            f"'{model_dir}') first."
        )
    return name


def generation_config(model_dir: Path, config: MllamaConfig) -> GenerationConfig:
    """The checkpoint's own, or what follows from its config."""
    if (model_dir / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(model_dir)
    return GenerationConfig.from_model_config(config)
