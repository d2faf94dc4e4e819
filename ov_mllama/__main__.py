"""Command line: `ov-mllama COMMAND`, or `python -m ov_mllama COMMAND`; `argument_parser` has the commands."""

import argparse
import os
import sys
import threading
from importlib import import_module
from pathlib import Path

from transformers import AutoConfig

from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from ov_mllama.cli import IMAGE_STORE_MB, YES, confirm, exit_on_user_error, megabytes, root_path, user_path
from ov_mllama.export.costs import gigabytes
from ov_mllama.export.plan import markdown
from ov_mllama.export.prepare import (
    DRAFT_FOLDER,
    default_folder,
    files_to_load,
    list_models,
    plan_here,
    prepare,
    print_load_estimate,
)
from ov_mllama.export.samples import calibration_samples
from ov_mllama.runtime.checks import check_vocabulary
from ov_mllama.runtime.devices import check_device
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.ir import DRAFT_MODEL_NAME
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import load_processor
from ov_mllama.runtime.reference import NAMES
from ov_mllama.runtime.speculative import OVDraftModel

DEMO = "demo_model"
SERVING = {
    "serve": ("ov_mllama.serving.app", "serve OpenAI's and Ollama's APIs"),
    "caption": ("ov_mllama.serving.caption", "ask one question about every image of a folder"),
}
REFERENCE: dict = {
    "choices": ("auto", *NAMES),
    "default": "auto",
    "help": "code that the checkpoint's weights were trained with; default: from its config.json",
}
BASE_HELP = "hub id or folder of a LoRA adapter's base; default: the one that adapter_config.json names"
DRAFT_HELP = "hub id or folder of a small Llama with the same tokenizer, for assisted decoding"


def run_plan(options: argparse.Namespace) -> None:
    """Print the plan for a checkpoint on this machine, for a chat."""
    model_dir = options.model_dir or default_folder(options.checkpoint)
    made = plan_here(options.checkpoint, model_dir, options.draft, True, options.reference, options.base)
    print(made, *made.shortfalls, sep="\n")


def run_models(options: argparse.Namespace) -> None:
    """Print the models in Ollama's folder, and which of them can be run."""
    print(markdown(("model", "size", "can be run"), list_models()))


def run_check(options: argparse.Namespace) -> None:
    """Compare a model in GGUF with what is known of Ollama's, and both orders of rows that its converter may have."""
    from ov_mllama.export.check_gguf import compare_header, compare_orders

    print(markdown(("what", "known", "found", ""), compare_header(options.checkpoint)), flush=True)
    models = default_folder(options.checkpoint)
    folder = options.out or models.with_name(f"{models.name}-check")
    rows = compare_orders(options.checkpoint, folder, calibration_samples()[: options.captions])
    print("\nMean log-probability of a token of the right caption, in nats; the right order's is higher:\n")
    print(markdown(("caption", "rows put back, as the program does", "rows as stored"), rows))
    print(f"\nBoth conversions are left in {folder}.")


def run_prepare(options: argparse.Namespace) -> Path:
    """Convert and compress a checkpoint as planned, unless that is done."""
    model_dir = options.model_dir or default_folder(options.checkpoint)
    yes = options.yes or confirm
    return prepare(options.checkpoint, model_dir, options.draft, options.reference, options.base, yes)


def run_chat(options: argparse.Namespace) -> None:
    """Load a model and serve the chat page until Ctrl-C."""
    from ov_mllama.chat.layout import make_demo
    from ov_mllama.chat.store import Conversations
    from ov_mllama.chat.user_data import encoded_images
    from ov_mllama.export.calibration import questions_about

    check_device(options.device)
    if options.checkpoint or not options.model_dir:
        options.checkpoint = options.checkpoint or DEMO
        options.model_dir = run_prepare(options)
    model_dir = options.model_dir
    language, vision = files_to_load(model_dir, options.language_model, options.image_encoder)
    draft = load_draft(options) if options.draft else None  # made before the large model is in memory
    examples = questions_about(options.checkpoint or model_dir)[:3]
    print_load_estimate(
        model_dir, options.device, language, vision, *[Path(DRAFT_FOLDER, DRAFT_MODEL_NAME)] * bool(draft)
    )
    users = users_from(options.auth, options.auth_file)
    model = OVMLlamaForConditionalGeneration(
        model_dir,
        options.device,
        language_model_name=language,
        image_encoder_name=vision,
        warm_up=False,
        image_store=encoded_images(image_store_mb(options.image_store_mb, len(users))),
    )
    drafting: dict = {"assistant_model": draft} if draft else {}
    demo = make_demo(model, load_processor(model_dir), examples, **drafting)
    _, url, _ = demo.launch(
        server_name=options.host,
        server_port=options.port,
        root_path=options.root_path,
        auth=users or None,
        prevent_thread_lock=True,
    )
    # repacking the 11B's weights takes half a minute: meanwhile the page is open, and a first image is encoded
    parts: list = [model, *drafting.values()]
    threading.Thread(target=lambda: [part.language_model.warm_up() for part in parts], daemon=True).start()
    print(f"✅ The chat is at {url} – Ctrl-C ends it. Conversations are stored in {Conversations().folder}", flush=True)
    demo.block_thread()
    sys.stdout.flush()
    os._exit(0)  # everything is saved; Python would wait for the step under way, or crash within it


def run_compare(options: argparse.Namespace) -> None:
    """Print which reference gives right captions the higher probability."""
    from ov_mllama.export.calibration import questions_about
    from ov_mllama.export.quality import compare_references, verdict

    models = default_folder(options.checkpoint)
    folder = options.out or models.with_name(f"{models.name}-references")
    questions = questions_about(options.checkpoint)
    answered = "answer" in questions[0]  # the checkpoint's own
    samples = [{**sample, "caption": sample["answer"]} for sample in questions] if answered else calibration_samples()
    rows = compare_references(options.checkpoint, folder, samples)
    cells = [(row["picture"], *(f"{row[name]:.4f}" for name in NAMES)) for row in rows]
    cells.append(("mean", *(f"{sum(row[name] for row in rows) / len(rows):.4f}" for name in NAMES)))
    print(
        "Mean log-probability of a token of the right caption, in nats:",
        markdown(("picture", *NAMES), cells),
        sep="\n\n",
    )
    size = sum(path.stat().st_size for path in folder.glob("*/*.bin"))
    print(f"\n{verdict(rows)}\nBoth conversions, {gigabytes(size)}, are left in {folder}.")


def users_from(auth: list[str] | None, file: Path | None) -> list[tuple[str, str]]:
    """Return names and passwords for the page's login; none for a page without login.

    Args:
        auth: name and password from the command line, visible to all users of this machine.
        file: with lines NAME:PASSWORD.
    Raises:
        OSError: if the file cannot be read.
        InputError: if a line has no name or no password, or the file has no line.
    """
    if auth:
        print("❗ The password of --auth is visible to all users of this machine: use --auth-file.")
        return [(auth[0], auth[1])]
    if file is None:
        return []
    lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    users = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
    if not users or not all(len(user) == 2 and all(user) for user in users):
        raise InputError(f"{file} holds no users: give it lines NAME:PASSWORD.")
    return [(name, password) for name, password in users]


def image_store_mb(chosen: int | None, users: int) -> int:
    """Return the disk for encoded images: by default none for several users, who could learn from an answer's speed
    that another one has asked about the same image."""
    default = 0 if users > 1 else IMAGE_STORE_MB
    return default if chosen is None else chosen


def load_draft(options: argparse.Namespace) -> OVDraftModel:
    """Load the draft model; convert it first unless that is done."""
    from ov_mllama.export.compress import make_draft_model

    draft = OVDraftModel(make_draft_model(options.draft, options.model_dir / DRAFT_FOLDER), options.device)
    check_vocabulary(draft.vocab_size, AutoConfig.from_pretrained(options.model_dir).text_config.vocab_size)
    return draft


def run_serving(options: argparse.Namespace) -> None:
    """Run `serve` or `caption`, which parse the arguments after their name.

    Raises:
        ModuleNotFoundError: a package of the extra `serve` is not installed.
    """
    main = import_module(SERVING[options.command][0]).main
    main(sys.argv[sys.argv.index(options.command) + 1 :])


def add_chat_arguments(page: argparse.ArgumentParser) -> None:
    """Add the arguments of `chat`."""
    page.add_argument("--checkpoint", help=f"hub id or folder; default, without --model-dir: {DEMO}")
    page.add_argument("--base", help=BASE_HELP)
    page.add_argument(
        "--model-dir", type=user_path, help="folder of a converted model; default: models/<checkpoint's name>"
    )
    page.add_argument("--language-model", help="its .xml; default: the latest compressed one, else the 16-bit one")
    page.add_argument("--image-encoder", help="its .xml; default likewise")
    page.add_argument("--draft", help=DRAFT_HELP)
    page.add_argument("--reference", **REFERENCE)
    page.add_argument("--yes", **YES)
    page.add_argument("--device", default="CPU")
    page.add_argument(
        "--image-store-mb",
        type=megabytes,
        help="disk for encoded images, which are then encoded once; 0: none; default: 2000, with several users 0",
    )
    page.add_argument("--host", help="address to listen on; default: GRADIO_SERVER_NAME, else 127.0.0.1")
    page.add_argument("--port", type=int, help="default: the first free one from GRADIO_SERVER_PORT, else 7860, on")
    page.add_argument(
        "--root-path", type=root_path, metavar="PATH", help="path of a proxy in front; default: GRADIO_ROOT_PATH"
    )
    users = page.add_mutually_exclusive_group()
    users.add_argument("--auth-file", type=user_path, help="lines NAME:PASSWORD; users see only their own chats")
    users.add_argument("--auth", nargs=2, metavar=("NAME", "PASSWORD"), help="visible to all users of this machine")


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `serve` and `caption` parse their own arguments."""
    parser = argparse.ArgumentParser(prog="ov-mllama", description="Llama 3.2 Vision on OpenVINO.")
    parser.add_argument("--verbose", action="store_true", help="log tracebacks")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name, run, summary in (
        ("plan", run_plan, "print the steps for a checkpoint on this machine: minutes, memory, disk"),
        ("prepare", run_prepare, "convert and compress a checkpoint as planned"),
    ):
        command = commands.add_parser(name, help=summary)
        command.set_defaults(run=run)
        command.add_argument("checkpoint", nargs="?", default=DEMO, help=f"hub id or folder; default: {DEMO}")
        command.add_argument("--base", help=BASE_HELP)
        command.add_argument("--model-dir", type=user_path, help="default: models/<name of the checkpoint>")
        command.add_argument("--draft", help=DRAFT_HELP)
        command.add_argument("--reference", **REFERENCE)
        if name == "prepare":
            command.add_argument("--yes", **YES)
    page = commands.add_parser("chat", help="serve the chat page for a model, prepared first if needed")
    page.set_defaults(run=run_chat)
    add_chat_arguments(page)
    for name, (_, summary) in SERVING.items():
        commands.add_parser(name, help=summary, add_help=False).set_defaults(run=run_serving)
    models = commands.add_parser("models", help="list the models in Ollama's folder, and which of them can be run")
    models.set_defaults(run=run_models)
    check = commands.add_parser("check", help="compare Ollama's model with what is known of the real one")
    check.set_defaults(run=run_check)
    check.add_argument("checkpoint", help="ollama:NAME[:TAG], or the path of a .gguf file")
    check.add_argument("--captions", type=int, default=3, help="of packaged photographs; default: 3")
    check.add_argument("--out", type=user_path, help="folder for two conversions; default: models/<name>-check")
    compare = commands.add_parser("compare-references", help="compare Meta's and transformers' code on a checkpoint")
    compare.set_defaults(run=run_compare)
    compare.add_argument("checkpoint", help="hub id or folder")
    compare.add_argument("--out", type=user_path, help="folder for both conversions; default: models/<name>-references")
    return parser


def main() -> None:
    """Parse the arguments and run the command that they name."""
    parser = argument_parser()
    options, rest = parser.parse_known_args()
    if rest and options.run is not run_serving:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    bypass_proxy_for_loopback()
    with exit_on_user_error(options.verbose):
        options.run(options)


if __name__ == "__main__":
    main()
