"""Checkpoint -> the IRs that suit this machine, as `plan.py` has it: what the notebook does in cells, in one call."""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from ov_mllama.convert import checkpoint_folder, convert_mllama
from ov_mllama.machine import Machine
from ov_mllama.plan import Plan, plan
from ov_mllama.settings import Settings

NEEDS_NO_PICTURES = "INT8 weights compression"


def plan_here(checkpoint: str | Path, model_dir: str | Path, vision: str | None = None) -> Plan:
    """What to do with a checkpoint on this machine, as it is now.

    Args:
        checkpoint: hub id or local folder. Of one on the hub only the config is fetched, for a gated one after a login.
        model_dir: where the converted model will be.
        vision: option for the vision encoder; default what suits this CPU.
    Raises:
        ValueError, FileNotFoundError, PermissionError: as `checkpoint_folder`, each naming the fix.
    """
    config = AutoConfig.from_pretrained(checkpoint_folder(checkpoint, weights=False))  # refuses what is no name, too
    index = "model.safetensors.index.json"
    downloaded = Path(checkpoint).is_dir() or isinstance(try_to_load_from_cache(str(checkpoint), index), str)
    here = Machine.here(model_dir)
    made = sum(path.stat().st_size for path in Path(model_dir).glob("*.bin"))  # its room counts as free
    return plan(config, replace(here, disk=here.disk + made), Settings(), downloaded, vision)


def prepare(checkpoint: str | Path, model_dir: str | Path) -> Path:
    """Converts and compresses a checkpoint by data-free means as the plan for this machine says; whatever is there
    already is kept.

    Returns:
        model_dir as a Path.
    Raises:
        ValueError, FileNotFoundError, PermissionError, OSError, MemoryError: as the steps, each naming the fix.
    """
    made = plan_here(checkpoint, model_dir, NEEDS_NO_PICTURES)
    print(made, *made.lacking, sep="\n")
    model_dir = convert_mllama(checkpoint, model_dir, language_model=made.write_16_bit)
    # not before: NNCF, once imported, has a hand in what torch traces, and torch then says so
    from ov_mllama.compress import compress_language_model, make_vision_encoder

    compress_language_model(model_dir, Settings(), checkpoint=None if made.write_16_bit else checkpoint)
    make_vision_encoder(model_dir, NEEDS_NO_PICTURES)
    return model_dir
