"""Folders and models that are read by other programs, or not completely here: what each is, and what to do."""

from pathlib import Path

from ov_mllama.export.sources.lora import ADAPTER_WEIGHTS, CONFIG, is_adapter
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.ir import parse_stamp

SIXTEEN_BIT = "give the checkpoint that it was made of (config.json and *.safetensors)"
TEXT_MODELS = ("llama", "mllama_text_model")
MODEL_TYPES = {  # expected model_type of config.json: its use here, and an example
    "mllama": "this converter takes Llama 3.2 Vision ones (model_type 'mllama'), such as "
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama": "a draft model is a Llama for text (model_type 'llama'), such as meta-llama/Llama-3.2-1B-Instruct",
}


def without_config(folder: Path) -> InputError:
    """Return the error for a folder without config.json."""
    names = sorted(path.name for path in folder.iterdir())
    inner = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    if "model_index.json" in names:
        return InputError(f"{folder} is a pipeline of diffusers, which makes images; {MODEL_TYPES['mllama']}.")
    other = made_for_others(names)
    if error := holding_gguf(folder, names):
        return error
    if other:
        return InputError(f"{folder} holds {other}: {SIXTEEN_BIT}.")
    if inner:
        return InputError(f"{folder} holds no config.json, but {', '.join(inner[:3])} in it does: give that folder.")
    if weights:
        return InputError(f"{folder} holds {weights[0]}, but no config.json: copy it from the model's base.")
    if any(name.startswith("tokenizer") for name in names):
        return InputError(f"{folder} holds a tokenizer, but no config.json and no weights: download it completely.")
    return InputError(f"{folder} holds no config.json: give the folder of a Hugging Face checkpoint or a hub id.")


def made_for_others(names: list[str]) -> str:
    """Return a phrase for models in the files of other programs; empty if there is none."""
    kinds = {".ggml": "a GGML model of llama.cpp", ".onnx": "an ONNX model"}
    kinds |= {".xml": "an OpenVINO model that another program converted", ".engine": "an engine of TensorRT"}
    kinds |= {".tflite": "a TensorFlow Lite model", ".h5": "a TensorFlow model", ".msgpack": "a Flax model"}
    found = [(name, kind) for ending, kind in kinds.items() for name in names if name.endswith(ending)]
    return f"{found[0][1]} ({found[0][0]}), which is not read" if found else ""


def holding_gguf(folder: Path, names: list[str]) -> InputError | None:
    """Return the error for a folder that holds a model in GGUF, if it does."""
    found = [name for name in names if name.lower().endswith(".gguf")]
    return InputError(f"{folder} holds a model in GGUF, {found[0]}: give the file itself.") if found else None


def without_weights(folder: Path) -> InputError:
    """Return the error for a folder with config.json, but without weights that are read."""
    names = sorted(path.name for path in folder.iterdir())
    if is_adapter(folder):
        return InputError(f"{folder} holds {CONFIG} but no {ADAPTER_WEIGHTS}: download it again, completely.")
    if any(parse_stamp(path.read_text("utf-8", "replace")) for path in folder.glob("openvino_*.xml")):
        return InputError(
            f"{folder} is a converted model: give it as model_dir (make chat MODEL_DIR={folder}), or the "
            "checkpoint it was made of."
        )
    if error := holding_gguf(folder, names):
        return error
    other = made_for_others(names)
    if other:
        return InputError(f"{folder} holds {other}: {SIXTEEN_BIT}.")
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return InputError(
            f"{folder} holds pickled weights ({pickled[0]}), which can execute code and are not loaded: save the model "
            "with save_pretrained of a recent transformers, or take the repository's *.safetensors."
        )
    return InputError(
        f"{folder} has a config but no *.safetensors weights: download it completely, or save the model with "
        "save_pretrained."
    )


def another_model(folder: Path, model_type: object, expected: str) -> InputError:
    """Return the error for a checkpoint of another model.

    Args:
        model_type: of its config.json.
        expected: key of MODEL_TYPES.
    """
    what = f"{folder} is a '{model_type}' checkpoint" if model_type else f"{folder / 'config.json'} has no model_type"
    if expected == "mllama" and model_type in TEXT_MODELS:
        what += ", a language model without the half that sees images"
    elif expected == "mllama" and str(model_type).startswith("llama4"):
        what += ", Llama 4, which is another architecture"
    return InputError(f"{what}; {MODEL_TYPES[expected]}.")
