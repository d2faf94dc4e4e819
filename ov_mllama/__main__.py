"""The command line: `python -m ov_mllama chat`, in the project's folder. It wires all together as the notebook does."""

import argparse
import logging
from pathlib import Path

from transformers import AutoProcessor

from ov_mllama.convert import convert_mllama
from ov_mllama.files import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama.model import OVMLlamaForConditionalGeneration


def chat(options: argparse.Namespace) -> None:
    """Loads a model, opens the page, waits for Ctrl-C."""
    from gradio_helper import make_demo

    model_dir = options.model_dir or convert_mllama("demo_model", "models/demo_model")
    language = options.language_model or newest(model_dir, LANGUAGE_MODEL_NAME)
    vision = options.image_encoder or newest(model_dir, VISION_ENCODER_NAME)
    print(f"⌛ Loading {language} and {vision} from {model_dir}", flush=True)
    model = OVMLlamaForConditionalGeneration(
        model_dir, options.device, language_model_name=language, image_encoder_name=vision
    )
    demo = make_demo(model, AutoProcessor.from_pretrained(model_dir))
    auth = tuple(options.auth) if options.auth else None
    _, url, _ = demo.launch(server_port=options.port, auth=auth, prevent_thread_lock=True)
    print(f"✅ The chat is at {url} – Ctrl-C ends it", flush=True)
    demo.block_thread()


def main() -> None:
    """Reads the arguments and runs the command that they name."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ov_mllama").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m ov_mllama", description=__doc__.partition(":")[0])
    commands = parser.add_subparsers(required=True)
    page = commands.add_parser("chat", help="opens the chat on a converted model")
    page.set_defaults(run=chat)
    page.add_argument("--model-dir", type=Path, help="folder of convert_mllama; default: the demo model's")
    page.add_argument("--language-model", help="its .xml; default: the compressed one made last, else the 16-bit one")
    page.add_argument("--image-encoder", help="its .xml; default likewise")
    page.add_argument("--device", default="CPU")
    page.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    page.add_argument("--auth", nargs=2, metavar=("NAME", "PASSWORD"))
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
