"""Arguments of the command `caption`."""

import argparse
from pathlib import Path

from transformers import AutoConfig

from ov_mllama.cli import IMAGE_STORE_MB, megabytes, user_path
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.images import DETAILS
from ov_mllama.runtime.shapes import MllamaShapes
from ov_mllama.serving import positive
from ov_mllama.serving.arguments import add_checkpoint_arguments
from ov_mllama.serving.caption_files import printable
from ov_mllama.serving.caption_sidecars import Sidecars

MAX_TEMPERATURE = 2.0


def image_folder(text: str) -> Path | None:
    """Parse the folder of images; None for an empty one, as of a variable that is not set."""
    return user_path(text) if text.strip() else None


def temperature(text: str) -> float:
    """Parse a temperature."""
    if not 0 <= float(text) <= MAX_TEMPERATURE:
        raise ValueError
    return float(text)


def parser_of_command(description: str) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("ov-mllama caption", description=description, formatter_class=raw)
    parser.add_argument("images", type=image_folder, metavar="FOLDER", help="folder of images")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--question", default="Describe this image.", help="default: 'Describe this image.'")
    asked.add_argument("--question-file", type=user_path, help="a question per line; each image is encoded once")
    add_checkpoint_arguments(parser)
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--detail", choices=DETAILS, default="high", help="low: one tile, less time; default: high")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="token limit; default: 128")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="default: 0, the most probable tokens")
    parser.add_argument("--schema", type=user_path, help="file with a JSON schema that answers match")
    found = parser.add_argument_group("images")
    found.add_argument("--recursive", action=argparse.BooleanOptionalAction, default=True, help="subfolders too")
    found.add_argument("--include", action="append", default=[], help="pattern such as '*.jpg'; may be repeated")
    found.add_argument("--exclude", action="append", default=[], help="pattern such as 'drafts/*'; may be repeated")
    found.add_argument("--limit", type=positive, help="at most so many images of the folder")
    found.add_argument("--shuffle", action="store_true", help="in random order, the same each time")
    results = parser.add_argument_group("results")
    out = Path("captions.parquet")
    results.add_argument(
        "--out", type=user_path, default=out, help=".parquet, .csv, .jsonl or .json; default: %(default)s"
    )
    results.add_argument("--sidecar", action="store_true", help="also write a .txt file beside each image")
    results.add_argument("--prefix", default="", help="of each .txt file")
    results.add_argument("--suffix", default="", help="of each .txt file")
    results.add_argument("--overwrite", action="store_true", help="replace .txt files; default: leave out their images")
    work = parser.add_argument_group("work")
    work.add_argument("--batch", type=positive, default=4, help="answers that share the model's steps; default: 4")
    work.add_argument(
        "--image-store-mb",
        type=megabytes,
        help="disk for encoded images, which a second question about them reads; 0: none; default: "
        f"{IMAGE_STORE_MB} if that holds all of the folder's, else none",
    )
    work.add_argument("--threads", type=positive, help="of each process; default: its share of the cores")
    work.add_argument("--workers", type=positive, default=1, help="processes that load the model, on Ray; default: 1")
    work.add_argument("--address", help="of a Ray cluster, or 'local'; default: this process, without Ray")
    return parser


def store_megabytes(chosen: int | None, images: int, model_dir: Path) -> int:
    """Return the disk for encoded images: by default none if it does not hold all, as each would be evicted before the
    next run reads it."""
    shapes = MllamaShapes.from_config(AutoConfig.from_pretrained(model_dir))
    largest = shapes.cross_kv_bytes(shapes.max_num_tiles * shapes.patches_per_tile) // 2  # in 16 bit
    default = IMAGE_STORE_MB if images * largest <= IMAGE_STORE_MB * 1_000_000 else 0
    return default if chosen is None else chosen


def questions_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the questions of the command line.

    Raises:
        InputError: if the file cannot be read or holds none.
    """
    if options.question_file is None:
        return (printable(options.question),)
    try:
        lines = options.question_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{options.question_file} is no UTF-8 text: save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{options.question_file} cannot be read ({error.strerror}): check the path.") from error
    questions = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not questions:
        raise InputError(f"{options.question_file} holds no questions: write one per line.")
    return questions


def sidecars_of(options: argparse.Namespace, questions: int) -> Sidecars | None:
    """Return what writes .txt files, if that is chosen.

    Raises:
        InputError: for several questions, or options without --sidecar.
    """
    if not options.sidecar:
        if options.prefix or options.suffix or options.overwrite:
            raise InputError("--prefix, --suffix and --overwrite are for .txt files: add --sidecar.")
        return None
    if questions > 1:
        raise InputError(
            f"A .txt file holds one answer, but there are {questions} questions: give one with --question."
        )
    return Sidecars(printable(options.prefix), printable(options.suffix), options.overwrite)
