"""Checkpoint -> the IRs that suit this machine, as `plan.py` has it; what a chat needs of them also in one call."""

import json
import os
import secrets
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig

from ov_mllama.export.convert import checkpoint_folder, checkpoint_stamp, convert_mllama
from ov_mllama.export.costs import gigabytes
from ov_mllama.export.plan import Machine, Plan, Step, loading, plan
from ov_mllama.export.settings import DEFAULT_VISION_OPTION, Settings
from ov_mllama.runtime.checks import check_vocabulary
from ov_mllama.runtime.devices import has_own_memory
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
from ov_mllama.runtime.reference import reference_of


def default_folder(checkpoint: str | Path) -> Path:
    """Return the folder for a checkpoint's IRs: models/<its name>, in the user's cache if the current folder is
    read-only; <its name>-ov if that is the checkpoint itself."""
    models, name = Path("models"), Path(checkpoint).name
    if not (models / name).is_dir() and not is_writable(models if models.is_dir() else models.parent):
        models = Path(os.environ.get("LOCALAPPDATA") or Path.home() / ".cache", "ov-mllama", "models")
    folder = models / name
    return folder.with_name(f"{name}-ov") if folder.resolve() == Path(checkpoint).resolve() else folder


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
    checkpoint: str | Path,
    model_dir: str | Path,
    draft: str | Path | None = None,
    for_chat: bool = False,
    reference: str = "auto",
) -> Plan:
    """What to do with a checkpoint on this machine, as it is now.

    Args:
        checkpoint: hub id or local folder. Of one on the hub only the config is fetched, for a gated one after a login.
        model_dir: where the converted model will be; what is there already is not counted.
        draft: the draft model's hub id or folder, if there is to be one.
        for_chat: as for `plan`.
        reference: as for `convert_mllama`; IRs that follow another are made anew.
    Raises:
        ValueError, FileNotFoundError, PermissionError: as `checkpoint_folder`, each naming the fix; and ValueError: the
            draft model has another vocabulary, or there is no such reference.
    """
    source = checkpoint_folder(checkpoint, weights=Path(checkpoint).is_dir())
    config, here = AutoConfig.from_pretrained(source), Machine.here(model_dir, HF_HUB_CACHE)
    downloaded, made = has_weights(source), made_of(source, model_dir, reference)
    if not draft:
        return plan(config, here, Settings(), downloaded, made, for_chat=for_chat)
    draft_source = checkpoint_folder(draft, weights=Path(draft).is_dir(), wanted="llama")
    draft_config = AutoConfig.from_pretrained(draft_source)
    check_vocabulary(draft_config.vocab_size, config.text_config.vocab_size)
    made += made_of(draft_source, Path(model_dir, DRAFT_FOLDER), reference=None)
    return plan(config, here, Settings(), downloaded, made, draft_config, has_weights(draft_source), for_chat)


def made_of(source: Path, folder: str | Path, reference: str | None = "auto") -> list[str]:
    """File names of the IRs in a folder that were made of a checkpoint; while that is not downloaded, of any.

    Args:
        reference: they follow, as for `convert_mllama`; None for a draft model, which follows none.
    """
    follows = reference_of(source, reference)[0] if reference else None
    wanted = checkpoint_stamp(source, follows) if has_weights(source) else {"converter_version": CONVERTER_VERSION}
    return [path.name for path in Path(folder).glob("*.xml") if is_current(path, wanted)]


def loading_here(model_dir: str | Path, *files: str | Path) -> Step:
    """What it takes to load these IRs of a folder, by their .xml, and to answer with them."""
    config, paths = AutoConfig.from_pretrained(model_dir), [Path(model_dir, file) for file in files]
    return loading(config, sum(path.with_suffix(".bin").stat().st_size for path in paths))


def files_to_load(model_dir: Path, language: str | None = None, vision: str | None = None) -> tuple[str, str]:
    """Names of a folder's language model and vision encoder, the compressed ones made last where none are given.

    Raises:
        FileNotFoundError, ValueError: as `check_model_dir`.
    """
    files = language or newest(model_dir, LANGUAGE_MODEL_NAME), vision or newest(model_dir, VISION_ENCODER_NAME)
    check_model_dir(model_dir, files)
    return files


def print_load_estimate(model_dir: str | Path, device: str, *files: str | Path) -> None:
    """Says what is loaded, how long that takes and how much memory it is to answer with, and whether that is there.

    Args:
        files: as for `loading_here`; the language model and the vision encoder first.
    """
    step, free = loading_here(model_dir, *files), free_memory()
    most = gigabytes(step.cost.memory)
    print(f"⌛ Loading {files[0]} and {files[1]} from {model_dir}", flush=True)
    print(f"   about {step.time} on two cores; an answer takes up to {most} of memory", flush=True)
    if free < step.cost.memory and not has_own_memory(device):
        print(f"⚠️ Only {gigabytes(free)} are free: close other programs, or all of it will be slow", flush=True)


def has_weights(folder: Path) -> bool:
    """Whether all of a checkpoint's weights are in a folder: a download may have been interrupted."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():  # of a part of many, it may be on its way
        return any("-of-" not in path.name for path in folder.glob("*.safetensors"))
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return all((folder / name).is_file() for name in set(files))


def prepare(
    checkpoint: str | Path, model_dir: str | Path, draft: str | Path | None = None, reference: str = "auto"
) -> Path:
    """Converts and compresses a checkpoint by data-free means as the plan for this machine says, for a chat; whatever
    is there already is kept.

    Args:
        checkpoint, model_dir, draft, reference: as for `plan_here`; the draft model goes to DRAFT_FOLDER in model_dir.
    Returns:
        model_dir as a Path.
    Raises:
        ValueError, FileNotFoundError, PermissionError, OSError, MemoryError: as the steps, each naming the fix.
    """
    made = plan_here(checkpoint, model_dir, draft, for_chat=True, reference=reference)
    print(made, *made.shortfalls, sep="\n")
    made.check_disk()
    model_dir = convert_mllama(checkpoint, model_dir, language_model=made.write_16_bit, reference=reference)
    # not before: NNCF, once imported, has a hand in what torch traces, and torch then says so
    from ov_mllama.export.compress import compress_language_model, make_draft_model, make_vision_encoder

    compress_language_model(model_dir, Settings(), checkpoint=checkpoint)
    if draft:
        make_draft_model(draft, model_dir / DRAFT_FOLDER)
    make_vision_encoder(model_dir, DEFAULT_VISION_OPTION)
    return model_dir
