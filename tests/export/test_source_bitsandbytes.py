"""Checkpoints of bitsandbytes, as its own functions dequantise them: 4 and 8 bit, with 16-bit layers between.

Rows of all matrices are multiples of the block size, as in real checkpoints: for others the CPU kernel of bitsandbytes
0.50.2 mixes up the scales (the mean error of nf4 is 0.18 instead of 0.07), while its reference code is right.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, MllamaConfig, MllamaForConditionalGeneration

from conftest import F32
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.sources import bitsandbytes
from ov_mllama.export.sources.quantized import method_of
from ov_mllama.export.sources.tensors import Tensor
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint, open_gates

SKIPPED = ["lm_head", "multi_modal_projector", "model.language_model.layers.1", "vision_model.transformer.layers.0"]
SETTINGS = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4, double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4, double, bf16 storage": dict(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    ),
    "nf4, some in 16 bit": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=SKIPPED),
    "8 bit": dict(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny checkpoint in bfloat16, its widths multiples of 64."""
    folder = make_checkpoint(tmp_path_factory.mktemp("bitsandbytes") / "original")
    config = MllamaConfig.from_pretrained(folder)
    config.text_config.intermediate_size, config.vision_config.hidden_size = 128, 64
    config.vision_config.vision_output_dim = 192
    torch.manual_seed(1)
    model = MllamaForConditionalGeneration(config)
    open_gates(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save(original, case: str):
    """Return the checkpoint's folder as transformers and bitsandbytes quantise and save it, and their model."""
    folder, config = original.with_name(case), BitsAndBytesConfig(**SETTINGS[case])
    load = MllamaForConditionalGeneration.from_pretrained
    model = load(original, quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in original.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder, model


@pytest.fixture(scope="module", params=SETTINGS)
def quantised(request, original):
    """A quantised checkpoint's folder, and the model that transformers dequantises it to."""
    folder, model = save(original, request.param)
    return folder, model.dequantize(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def nf4_saved(original):
    return save(original, "nf4, double")[0]


@pytest.fixture
def nf4(nf4_saved, tmp_path):
    """A copy of the checkpoint in nf4 with quantised scales, for tests that break it."""
    return shutil.copytree(nf4_saved, tmp_path / "nf4")


def test_every_tensor_equals_the_librarys(quantised):
    folder, model = quantised
    tensors, expected = Checkpoint(folder).tensors(), model.state_dict()
    assert {*tensors} == {*expected}
    for name, tensor in tensors.items():
        read = tensor.read()
        assert (tensor.shape, tensor.dtype) == (tuple(read.shape), read.dtype), name
        assert torch.equal(read.to(torch.bfloat16), expected[name]), name
    count = sum(not tensor.mapped for tensor in tensors.values())
    assert 10 < count < len(tensors)


@pytest.mark.parametrize("quantised", ["nf4, some in 16 bit", "8 bit"], indirect=True)
def test_converted_model_answers_as_the_dequantised_one(quantised, tmp_path, pair):
    folder, model = quantised
    converted = OVMLlamaForConditionalGeneration(convert_mllama(folder, tmp_path / "ov"), ov_config=F32)
    assert not json.loads((tmp_path / "ov" / "config.json").read_text()).get("quantization_config")
    inputs = pair.inputs("wide")
    with torch.no_grad():
        expected = model.float()(**inputs).logits
    assert (converted(**inputs).logits - expected).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "block"), [((130, 64), 64), ((7, 9), 32), ((33, 512), 4096)], ids=str)
def test_any_block_shape_and_type_equals_the_librarys(kind, nested, dtype, shape, block, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # takes a second

    monkeypatch.setattr(bitsandbytes, "CHUNK_ELEMENTS", 4096)  # several chunks of one matrix
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(shape).to(dtype), None, None, block, nested, kind)
    stored = {"x.weight": packed} | {f"x.weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    [weight] = bitsandbytes.decode({name: tensor_of(part) for name, part in stored.items()}, {}).values()
    with torch.compiler.set_stance("force_eager"):  # to compile the library's reference code takes 15 s
        assert torch.equal(weight.read(), dequantize_4bit(packed, state))


def tensor_of(part: torch.Tensor) -> Tensor:
    return Tensor(tuple(part.shape), part.dtype, lambda: part)


def test_config_without_quant_method_is_of_bitsandbytes():
    assert method_of({"load_in_4bit": True}).describe({"load_in_4bit": True}) == "bitsandbytes fp4"
    assert method_of({"quant_method": "bitsandbytes", "load_in_8bit": True}).describe is bitsandbytes.describe


QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{QUERY}{part}"}


def changed(part: str, change):
    return lambda tensors: tensors | {f"{QUERY}{part}": change(tensors[f"{QUERY}{part}"])}


STATE = ".quant_state.bitsandbytes__nf4"
BROKEN = {
    "no weight": (without(""), f"{QUERY} is missing, though .*absmax"),
    "no state": (without(STATE), f"{QUERY} is quantised, but its quant_state.* is missing"),
    "no scales": (without(".absmax"), f"{QUERY} is no complete .*absmax missing"),
    "no codes": (without(".quant_map"), "quant_map missing"),
    "no nested scales": (without(".nested_absmax"), "nested_absmax missing"),
    "plain scales": (changed(".absmax", torch.Tensor.float), "nested_absmax, nested_quant_map left over"),
    "scales of another": (changed(".absmax", lambda scales: scales[:-1].clone()), "63 values of absmax instead of 64"),
    "half a weight": (changed("", lambda packed: packed[:1024].clone()), "1,024 bytes instead of 2,048 for"),
    "garbled state": (changed(STATE, lambda text: text[:-5].clone()), "no description of a 4-bit weight"),
    "odd blocks": (
        changed(
            STATE, lambda text: torch.tensor([*bytes(text.tolist()).replace(b" 64,", b" 63,", 1)], dtype=text.dtype)
        ),
        "64 values of absmax instead of 66",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_weight_is_refused_before_anything_is_written(nf4, tmp_path, case):
    change, message = BROKEN[case]
    save_file(change(load_file(nf4 / "model.safetensors")), nf4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        convert_mllama(nf4, tmp_path / "ov")
    assert "16-bit checkpoint" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()


def test_other_4_bit_type_is_refused_by_the_config_alone(nf4, tmp_path):
    config = json.loads((nf4 / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "af4"
    (nf4 / "config.json").write_text(json.dumps(config))
    (nf4 / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="'af4', which is not read .*16-bit checkpoint"):
        Checkpoint(nf4)


def test_8_bit_weight_in_a_gpus_order_or_without_its_scales_is_refused():
    weight = torch.zeros(4, 8, dtype=torch.int8)
    parts = {"x.weight": weight, "x.SCB": torch.ones(4), "x.weight_format": torch.tensor(2, dtype=torch.uint8)}
    stored = {name: tensor_of(part) for name, part in parts.items()}
    with pytest.raises(ValueError, match="weight_format 2"):
        bitsandbytes.decode(stored, {})
    with pytest.raises(ValueError, match=r"\[3\] scales SCB"):
        bitsandbytes.decode(
            stored | {"x.weight_format": tensor_of(torch.tensor(0)), "x.SCB": tensor_of(torch.ones(3))}, {}
        )
    del stored["x.SCB"], stored["x.weight_format"]
    with pytest.raises(ValueError, match="SCB is missing"):
        bitsandbytes.decode(stored, {})
