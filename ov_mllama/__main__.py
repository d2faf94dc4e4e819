"""The command line, in the project's folder: `python -m ov_mllama plan`, `prepare`, `chat`; what the notebook does."""

import argparse
import logging
import sys
import threading
from pathlib import Path

from transformers import AutoConfig, AutoProcessor

from ov_mllama.costs import gigabytes
from ov_mllama.draft_model import OVDraftModel
from ov_mllama.files import DRAFT_MODEL_NAME, LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_model_dir, newest
from ov_mllama.machine import free_memory
from ov_mllama.model import OVMLlamaForConditionalGeneration
from ov_mllama.plan import loading
from ov_mllama.prepare import DRAFT_FOLDER, default_folder, plan_here, prepare

DEMO = "demo_model"
DRAFT_HELP = "hub id or folder of a small Llama with the same tokenizer, to guess ahead"


def run_plan(options: argparse.Namespace) -> None:
    """Says what this machine would do with a checkpoint."""
    model_dir = options.model_dir or default_folder(options.checkpoint)
    made = plan_here(options.checkpoint, model_dir, options.draft, for_chat=True)
    print(made, *made.lacking, sep="\n")


def run_prepare(options: argparse.Namespace) -> Path:
    """Converts and compresses a checkpoint as planned, where that is not done yet."""
    return prepare(options.checkpoint, options.model_dir or default_folder(options.checkpoint), options.draft)


def run_chat(options: argparse.Namespace) -> None:
    """Loads a model, opens the page, waits for Ctrl-C."""
    from data_preprocessing import questions_about
    from gradio_helper import make_demo

    if options.checkpoint or not options.model_dir:
        options.checkpoint = options.checkpoint or DEMO
        options.model_dir = run_prepare(options)
    elif options.draft:
        from ov_mllama.compress import make_draft_model

        make_draft_model(options.draft, options.model_dir / DRAFT_FOLDER)  # while nothing large is in memory
    model_dir = options.model_dir
    language = options.language_model or newest(model_dir, LANGUAGE_MODEL_NAME)
    vision = options.image_encoder or newest(model_dir, VISION_ENCODER_NAME)
    check_model_dir(model_dir, (language, vision))
    print(f"⌛ Loading {language} and {vision} from {model_dir}", flush=True)
    draft = {"assistant_model": OVDraftModel(model_dir / DRAFT_FOLDER, options.device)} if options.draft else {}
    files = [model_dir / language, model_dir / vision, *[model_dir / DRAFT_FOLDER / DRAFT_MODEL_NAME] * len(draft)]
    weights = sum(path.with_suffix(".bin").stat().st_size for path in files)
    step, free = loading(AutoConfig.from_pretrained(model_dir), weights), free_memory()
    print(f"   about {step.time} on two cores; answers take up to {gigabytes(step.cost.memory)} of memory", flush=True)
    if free < step.cost.memory:
        print(f"⚠️ Only {gigabytes(free)} are free: close other programs, or all of it will be slow", flush=True)
    model = OVMLlamaForConditionalGeneration(
        model_dir, options.device, language_model_name=language, image_encoder_name=vision, warm_up=False
    )
    examples = questions_about(options.checkpoint or model_dir)[:3]
    demo = make_demo(model, AutoProcessor.from_pretrained(model_dir), examples, **draft)
    auth = tuple(options.auth) if options.auth else None
    _, url, _ = demo.launch(server_port=options.port, auth=auth, prevent_thread_lock=True)
    # weights are repacked, half a minute of the 11B, while somebody reads the page and a first picture is encoded
    parts: list = [model, *draft.values()]
    threading.Thread(target=lambda: [part.language_model.warm_up() for part in parts], daemon=True).start()
    print(f"✅ The chat is at {url} – Ctrl-C ends it", flush=True)
    demo.block_thread()


def main() -> None:
    """Reads the arguments and runs the command that they name."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ov_mllama").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m ov_mllama", description="Llama 3.2 Vision on OpenVINO.")
    commands = parser.add_subparsers(required=True)
    for name, run, says in (
        ("plan", run_plan, "says what this machine does with a checkpoint: minutes, memory, disk"),
        ("prepare", run_prepare, "does it: converts and compresses"),
    ):
        command = commands.add_parser(name, help=says)
        command.set_defaults(run=run)
        command.add_argument("checkpoint", nargs="?", default=DEMO, help=f"hub id or folder; default: {DEMO}")
        command.add_argument("--model-dir", type=Path, help="default: models/<name of the checkpoint>")
        command.add_argument("--draft", help=DRAFT_HELP)
    page = commands.add_parser("chat", help="opens the chat on a model, prepared first if need be")
    page.set_defaults(run=run_chat)
    page.add_argument("--checkpoint", help=f"hub id or folder; default, without --model-dir: {DEMO}")
    page.add_argument("--model-dir", type=Path, help="folder of a converted model; default: models/<checkpoint's name>")
    page.add_argument("--language-model", help="its .xml; default: the compressed one made last, else the 16-bit one")
    page.add_argument("--image-encoder", help="its .xml; default likewise")
    page.add_argument("--draft", help=DRAFT_HELP)
    page.add_argument("--device", default="CPU")
    page.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    page.add_argument("--auth", nargs=2, metavar=("NAME", "PASSWORD"))
    options = parser.parse_args()
    try:
        options.run(options)
    except (OSError, ValueError, MemoryError) as refusal:  # a sentence that names the fix
        logging.getLogger("ov_mllama").debug("Where it was refused", exc_info=True)
        sys.exit(f"❌ {refusal}")


if __name__ == "__main__":
    main()
