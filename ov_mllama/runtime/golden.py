"""Golden answer: one question whose correct answer a checkpoint may bring, to verify a device with."""

import json
import warnings
from pathlib import Path

from PIL import Image

from .prompts import apply_template, load_processor
from .reference import NAMES


def check_golden_answer(model, model_dir: Path, device: str) -> None:
    """Warn if this device answers otherwise than PyTorch did, as with some drivers (openvino_notebooks#2900). Skipped
    for a model that follows another reference than the answer.

    Args:
        model: an `OVMLlamaForConditionalGeneration`; its sessions and statistics change.
        model_dir: its folder, with golden.json: {"question", "picture", "answer"}, and "reference" of the answer,
            default "transformers".
        device: its name, for the warning.
    """
    golden = json.loads((model_dir / "golden.json").read_text(encoding="utf-8"))
    if NAMES.get(golden.get("reference", "transformers")) != model.reference:
        return
    processor = load_processor(model_dir)
    content = [{"type": "image"}, {"type": "text", "text": golden["question"]}]
    prompt = apply_template(processor, [{"role": "user", "content": content}])
    with Image.open(model_dir / golden["picture"]) as image:
        inputs = processor(text=prompt, images=[image], add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if answer != golden["answer"]:
        warnings.warn(
            f"On {device} this model answers '{answer}'; transformers answers '{golden['answer']}'. Use device='CPU', "
            "ov_config={'INFERENCE_PRECISION_HINT': 'f32'}, or another driver.",
            stacklevel=3,
        )
