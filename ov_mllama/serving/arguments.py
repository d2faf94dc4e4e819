"""Arguments of `serve` and `caption` that choose the model, and the folder of the converted one."""

import argparse
from pathlib import Path

from ov_mllama.cli import YES, confirm, user_path
from ov_mllama.export.prepare import default_folder, prepare
from ov_mllama.runtime.reference import NAMES


def add_checkpoint_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the arguments that `prepared` reads."""
    parser.add_argument("--checkpoint", default="demo_model", help="hub id or folder; default: demo_model")
    parser.add_argument("--base", help="of a LoRA adapter, as for `ov-mllama prepare`")
    parser.add_argument("--reference", default="auto", choices=("auto", *NAMES), help="as for `ov-mllama prepare`")
    parser.add_argument("--yes", **YES)
    parser.add_argument("--model-dir", type=user_path, help="folder of a converted model; default: models/<its name>")


def prepared(options: argparse.Namespace) -> Path:
    """Return the folder of the converted model, which is made first if need be."""
    if options.model_dir:
        return options.model_dir
    folder, yes = default_folder(options.checkpoint), options.yes or confirm
    return prepare(options.checkpoint, folder, reference=options.reference, base=options.base, yes=yes)
