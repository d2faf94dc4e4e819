"""Does this device answer as PyTorch did? A checkpoint may bring one question with its right answer."""

import json
import warnings
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor

from .reference import NAMES


def check_golden_answer(model, model_dir: Path, device: str) -> None:
    """Warns where this device answers otherwise than PyTorch did, as some drivers make models do
    (openvino_notebooks#2900). The demo checkpoint brings such an answer: load it first on a device you do not know.
    A model that follows another reference than the answer is not asked.

    Args:
        model: an `OVMLlamaForConditionalGeneration`; its conversations and statistics are not put back.
        model_dir: its folder, with golden.json: {"question", "picture", "answer"}, and "reference", which the answer
            follows, default "transformers".
        device: its name, for the warning.
    """
    golden = json.loads((model_dir / "golden.json").read_text(encoding="utf-8"))
    if NAMES.get(golden.get("reference", "transformers")) != model.reference:
        return
    processor = AutoProcessor.from_pretrained(model_dir, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": golden["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(model_dir / golden["picture"]) as picture:
        inputs = processor(text=prompt, images=[picture], add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if answer != golden["answer"]:
        warnings.warn(
            f"On {device} this model answers '{answer}' where transformers answers '{golden['answer']}'. Use "
            "device='CPU', or ov_config={'INFERENCE_PRECISION_HINT': 'f32'}, or another driver.",
            stacklevel=3,
        )
