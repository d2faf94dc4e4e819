"""Plan and make the IRs that suit this machine, see `plan.py`; what a chat needs of them also in one call."""

import logging
import os
import re
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, LlamaForCausalLM, MllamaForConditionalGeneration

from ov_mllama.export.checkpoint import Checkpoint, every
from ov_mllama.export.companion_files import check_companions_of
from ov_mllama.export.convert import convert_mllama, of_vision_encoder, remains
from ov_mllama.export.costs import gigabytes
from ov_mllama.export.machine import Machine
from ov_mllama.export.plan import Files, Plan, Step, loading, plan
from ov_mllama.export.settings import DEFAULT_VISION_OPTION, Settings
from ov_mllama.export.sources.model_id import OLLAMA, local_path, origin_of, short_name
from ov_mllama.export.sources.ollama import all_models, folders
from ov_mllama.export.takeover import packed_bytes, packed_weights
from ov_mllama.runtime.checks import check_vocabulary
from ov_mllama.runtime.companions import stamp_of
from ov_mllama.runtime.devices import has_own_memory
from ov_mllama.runtime.errors import NotFoundError, UserError
from ov_mllama.runtime.ir import (
    CONVERTER_VERSION,
    DRAFT_FOLDER,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_model_dir,
    is_current,
    newest,
)
from ov_mllama.runtime.memory import free_memory

logger = logging.getLogger(__name__)


def default_folder(checkpoint: str | Path) -> Path:
    """Return the folder for a checkpoint's IRs: models/<its name>, in the user's cache if the current folder is
    read-only; <its name>-ov if that is the checkpoint itself.

    If another checkpoint's IRs are there, it is <owner>--<its name> for one of the hub, <its name>-2 for a local one.
    """
    source, origin = local_path(checkpoint), origin_of(checkpoint)
    models, name = Path("models"), short_name(checkpoint)
    if not (models / name).is_dir() and not is_writable(models if models.is_dir() else models.parent):
        models = Path(os.environ.get("LOCALAPPDATA") or Path.home() / ".cache", "ov-mllama", "models")
    if (models / name).resolve() == source.resolve():
        name = f"{name}-ov"
    longer = name if Path(origin.split(",")[0]).is_absolute() else re.sub("[/:]", "--", origin)
    names = [name, *[longer] * (longer != name), *(f"{longer}-{number}" for number in range(2, 100))]
    return next((models / each for each in names if not is_anothers(models / each, checkpoint)), models / name)


def is_anothers(folder: Path, checkpoint: str | Path) -> bool:
    """Return whether a folder holds the IRs of another checkpoint, or is another one itself. An earlier version's stamp
    has no origin: IRs then are another's if the weights are here and differ."""
    stamp, origin = stamp_of(folder), origin_of(checkpoint)
    if not stamp:
        return any(folder.glob("*.safetensors"))
    if stamp.get("origin") == origin:
        return False
    if not local_path(checkpoint).is_dir():
        return bool(stamp.get("origin"))
    try:
        return Checkpoint(checkpoint, with_weights=False).fingerprint != stamp.get("checkpoint")
    except UserError:  # said where the checkpoint is used
        return bool(stamp.get("origin"))


def list_models() -> list[tuple[str, str, str]]:
    """Return the models in Ollama's folder: name, size, and the name to run it by, or why it cannot be run.

    Raises:
        NotFoundError: if there are none.
    """
    rows = [
        (model.name, gigabytes(model.size) if model.size else "", f"no: {why}" if why else f"{OLLAMA}{model.name}")
        for model, why in all_models()
    ]
    if not rows:
        raise NotFoundError(
            f"No models of Ollama's in {' or '.join(map(str, folders()))}: run `ollama pull llama3.2-vision`, or set "
            "OLLAMA_MODELS to its folder."
        )
    return rows


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be created in a folder; by trying, because `os.access` ignores ACLs on Windows."""
    probe = folder / f".{secrets.token_hex(8)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def plan_here(
    checkpoint: str | Path | Checkpoint,
    model_dir: str | Path,
    draft: str | Path | None = None,
    for_chat: bool = False,
    reference: str = "auto",
    base: str | Path | None = None,
) -> Plan:
    """Plan what to do with a checkpoint on this machine, with its memory and disk as they are now.

    Args:
        checkpoint: hub id, local folder or `Checkpoint`. From the hub only configs and the headers of the weights are
            fetched, of a gated one after a login.
        model_dir: folder for the converted model; current IRs in it count as done.
        draft: hub id or folder of the draft model, if any.
        for_chat: as for `plan`.
        reference: as for `convert_mllama`; IRs that follow another are not current.
        base: of a LoRA adapter, as for `Checkpoint`.
    Raises:
        InputError, NotFoundError, AccessError: as `Checkpoint` and `Checkpoint.tensors`.
        InputError: if the draft model has another vocabulary, the reference does not exist, or, of a checkpoint on this
            disk, as `check_companions_of`.
    """
    source = Checkpoint.of(checkpoint, with_weights=False, base=base)
    here, files = Machine.here(model_dir, HF_HUB_CACHE), files_of(source, MllamaForConditionalGeneration)
    made = current_irs(source, Path(model_dir), reference)
    if not source.download_bytes and VISION_ENCODER_NAME not in made:
        check_companions_of(source)
    if not draft:
        return plan(source.config, here, Settings.here(), made=made, for_chat=for_chat, files=files)
    small = Checkpoint(draft, "llama", with_weights=False)
    check_vocabulary(small.config.vocab_size, source.config.text_config.vocab_size)
    drafted = files_of(small, LlamaForCausalLM)
    made += current_irs(small, Path(model_dir, DRAFT_FOLDER))
    return plan(
        source.config,
        here,
        Settings.here(),
        made=made,
        draft=small.config,
        for_chat=for_chat,
        files=files,
        draft_files=drafted,
    )


def files_of(checkpoint: Checkpoint, kind: Any) -> Files:
    """Return the sizes of a checkpoint's files; InputError as `Checkpoint.tensors`."""
    tensors = checkpoint.tensors(kind)
    size, rest = packed_bytes(tensors), partial(remains, packed_weights(tensors))
    vision, language, both = (checkpoint.scratch_bytes(kind, needed) for needed in (of_vision_encoder, rest, every))
    form = checkpoint.own_form if kind is MllamaForConditionalGeneration else ""
    return Files(checkpoint.download_bytes, vision, language + size, both, form, size)


def current_irs(checkpoint: Checkpoint, folder: Path, reference: str | None = None) -> list[str]:
    """Return file names of a folder's IRs that were made of a checkpoint or, if it is not downloaded, of any.

    Args:
        reference: that they follow, as for `convert_mllama`; None for a draft model, which follows none.
    """
    follows = checkpoint.reference(reference)[0] if reference else None
    any_ones = {"converter_version": CONVERTER_VERSION}
    stamp = any_ones if checkpoint.download_bytes else checkpoint.stamp(follows)
    return [path.name for path in folder.glob("*.xml") if is_current(path, stamp)]


def loading_here(model_dir: str | Path, *files: str | Path) -> Step:
    """Return the step of loading these IRs of a folder, by their .xml; its memory is that of answering."""
    config, paths = AutoConfig.from_pretrained(model_dir), [Path(model_dir, file) for file in files]
    return loading(config, sum(path.with_suffix(".bin").stat().st_size for path in paths))


def files_to_load(model_dir: Path, language: str | None = None, vision: str | None = None) -> tuple[str, str]:
    """Return the names of a folder's language model and vision encoder; by default the newest compressed ones.

    Raises:
        NotFoundError, InputError: as `check_model_dir`.
    """
    files = language or newest(model_dir, LANGUAGE_MODEL_NAME), vision or newest(model_dir, VISION_ENCODER_NAME)
    check_model_dir(model_dir, files)
    return files


def print_load_estimate(model_dir: str | Path, device: str, *files: str | Path) -> None:
    """Log the IRs to be loaded, the time and memory that takes, and a warning if less memory is free.

    Args:
        files: as for `loading_here`; the language model and the vision encoder first.
    """
    step, free = loading_here(model_dir, *files), free_memory()
    peak = gigabytes(step.cost.memory)
    logger.info("⌛ Loading %s and %s from %s", files[0], files[1], model_dir)
    logger.info("   about %s on two cores; an answer takes up to %s of memory", step.time, peak)
    if free < step.cost.memory and not has_own_memory(device):
        logger.warning("⚠️ Only %s are free: close other programs, or the system will swap", gigabytes(free))


def prepare(
    checkpoint: str | Path,
    model_dir: str | Path,
    draft: str | Path | None = None,
    reference: str = "auto",
    base: str | Path | None = None,
    yes: bool | Callable[[], bool] = False,
) -> Path:
    """Convert and compress a checkpoint for a chat, without calibration data, as planned for this machine.

    Args:
        checkpoint, model_dir, draft, reference, base: as for `plan_here`; the draft model goes to DRAFT_FOLDER in
            model_dir.
        yes: whether to go on if memory or disk is short; a function is called only then.
    Returns:
        model_dir as a Path.
    Raises:
        DiskError, OutOfMemoryError: as `Plan.check`, before anything is downloaded, unless everything is made already.
        UserError: as the steps, each with the fix.
    """
    source = Checkpoint(checkpoint, with_weights=False, base=base)
    steps = plan_here(source, model_dir, draft, for_chat=True, reference=reference)
    logger.info("\n".join(map(str, (steps, *steps.shortfalls))))
    if steps.makes and steps.shortfalls and not (yes() if callable(yes) else yes):
        steps.check()
    source = Checkpoint(checkpoint, base=base) if source.download_bytes else source
    settings = Settings.here()
    settings.check(source.config)
    model_dir = convert_mllama(source, model_dir, language_model=steps.write_16_bit, reference=reference)
    # imported late: NNCF patches functions that torch traces, and torch then warns
    from ov_mllama.export.compress import compress_language_model, make_draft_model, make_vision_encoder

    compress_language_model(model_dir, settings, checkpoint=source)
    if draft:
        make_draft_model(draft, model_dir / DRAFT_FOLDER)
    make_vision_encoder(model_dir, DEFAULT_VISION_OPTION)
    return model_dir
