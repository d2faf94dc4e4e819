"""Folders that hold something else: each is named for what it is, in one sentence with what to do."""

import json
from pathlib import Path

import pytest

from conftest import DEMO
from ov_mllama.__main__ import main
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.runtime.errors import InputError

CONFIG = (DEMO / "config.json").read_text()


def of(model_type: str, **settings) -> dict[str, str]:
    return {"config.json": json.dumps({"model_type": model_type, **settings}), "model.safetensors": ""}


FIX = r"give the checkpoint that it was made of \(config.json and \*.safetensors\)\."
FOLDERS = {  # files and their texts, and the sentence
    "GGUF": ({"model-Q4_K_M.gguf": ""}, "holds a model in GGUF, model-Q4_K_M.gguf: give the file itself"),
    "GGUF with a config": ({"config.json": CONFIG, "mmproj.gguf": ""}, "in GGUF, mmproj.gguf: give the file itself"),
    "ONNX": (
        {"config.json": CONFIG, "decoder.onnx": "", "decoder.onnx_data": ""},
        rf"an ONNX model .*decoder.onnx.*{FIX}",
    ),
    "Optimum's IR": (
        {"config.json": CONFIG, "openvino_language_model.xml": "<net/>", "openvino_language_model.bin": ""},
        rf"an OpenVINO model that another program converted \(openvino_language_model.xml\).* {FIX}",
    ),
    "IR alone": ({"openvino_model.xml": "<net/>", "openvino_model.bin": ""}, "an OpenVINO model that another program"),
    "pickled": (
        {"config.json": CONFIG, "pytorch_model-00001-of-00002.bin": "", "pytorch_model.bin.index.json": "{}"},
        r"pickled weights \(pytorch_model-00001-of-00002.bin\), which can execute code and are not loaded: save",
    ),
    "pickled, no config": ({"checkpoint.pt": ""}, "holds checkpoint.pt, but no config.json: copy it from"),
    "weights alone": ({"model.safetensors": ""}, "holds model.safetensors, but no config.json: copy it from"),
    "config alone": ({"config.json": CONFIG}, r"has a config but no \*.safetensors weights: download it completely"),
    "tokenizer alone": (
        {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
        "a tokenizer, but no config.json and no",
    ),
    "diffusers": (
        {"model_index.json": "{}", "unet/config.json": "{}"},
        "a pipeline of diffusers, which makes images; this",
    ),
    "in a folder": (
        {"README.md": "", "checkpoint-500/config.json": CONFIG, "checkpoint-900/config.json": CONFIG},
        "no config.json, but checkpoint-500, checkpoint-900 in it does: give that folder",
    ),
    "nothing": ({"README.md": ""}, "holds no config.json: give the folder of a Hugging Face checkpoint or a hub id"),
    "text": (
        of("llama"),
        "is a 'llama' checkpoint, a language model without the half that sees images; this converter",
    ),
    "language half": (of("mllama_text_model"), "'mllama_text_model' checkpoint, a language model without the half"),
    "Llama 4": (of("llama4"), "is a 'llama4' checkpoint, Llama 4, which is another architecture; this converter takes"),
    "LLaVA": (of("llava"), "is a 'llava' checkpoint; this converter takes Llama 3.2 Vision ones"),
    "Qwen": (of("qwen2_vl"), "is a 'qwen2_vl' checkpoint; this converter takes Llama 3.2 Vision ones"),
    "unknown": (of("never_heard_of", auto_map={"AutoConfig": "code.Code"}), "is a 'never_heard_of' checkpoint; this"),
    "no type": ({"config.json": "{}", "model.safetensors": ""}, "config.json has no model_type; this converter takes"),
    "no config": ({"config.json": "<html>Log in", "model.safetensors": ""}, "config.json is no config but a web page"),
    "a list": (
        {"config.json": "[]", "model.safetensors": ""},
        r"config.json is no config \(2 bytes\): download it again",
    ),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_is_named_for_what_it_is(tmp_path, case):
    files, said = FOLDERS[case]
    with pytest.raises(InputError, match=said) as error:
        convert_mllama(write(tmp_path / "folder", files), tmp_path / "ov")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()


def test_a_vision_model_is_no_draft_model(tmp_path):
    with pytest.raises(InputError, match="is a 'mllama' checkpoint; a draft model is a Llama for text"):
        Checkpoint(write(tmp_path, {"config.json": CONFIG, "model.safetensors": ""}), "llama")


CONFIGS = {  # changed settings, and the problem that is named
    "no type of torch": (dict(dtype="bf16"), "cannot be used .*bf16"),
    "a list for a table": (dict(text_config=[]), r"cannot be used \(.*text_config"),
    "text for a number": (dict(text_config={**json.loads(CONFIG)["text_config"], "hidden_size": "64"}), "hidden_size"),
    "no heads": (
        dict(text_config={**json.loads(CONFIG)["text_config"], "num_attention_heads": 0}),
        "describes no model .ZeroDivisionError",
    ),
    "a layer beyond the tower": (
        dict(vision_config={**json.loads(CONFIG)["vision_config"], "intermediate_layers_indices": [1, 99]}),
        r"layers \[1, 99\] .* which has \d+",
    ),
    "no method": (dict(quantization_config="nf4"), "names no method of quantisation"),
    "no settings of MLX": (dict(quantization=[4]), "names no method of quantisation"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_with_values_of_other_types_is_refused(tmp_path, case):
    settings, problem = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(CONFIG), **settings}))
    (tmp_path / "model.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=rf"config.json .*{problem}.*take the config.json that belongs to the weights"):
        Checkpoint(tmp_path).tensors()


def test_home_of_an_unknown_user_is_refused_with_a_sentence(monkeypatch):
    for command in (["plan", "~nosuchuser/model"], ["prepare", "demo_model", "--model-dir", "~nosuchuser/ov"]):
        monkeypatch.setattr("sys.argv", ["ov-mllama", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code not in (0, None)
