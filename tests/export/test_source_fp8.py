"""Checkpoints in FP8, quantised by transformers' own operations, against what it dequantises them to on a CPU."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, FbgemmFp8Config, FineGrainedFP8Config, MllamaForConditionalGeneration
from transformers.integrations import fbgemm_fp8
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from conftest import F32
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.runtime.errors import InputError
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint

LARGEST = torch.finfo(torch.float8_e4m3fn).max
KINDS = {
    "blocks": FineGrainedFP8Config(weight_block_size=(16, 32), modules_to_not_convert=["lm_head", "vision_model"]),
    "small blocks": FineGrainedFP8Config(weight_block_size=(4, 16), modules_to_not_convert=["lm_head", "layers.1."]),
    "one scale": FineGrainedFP8Config(weight_block_size=None, modules_to_not_convert=[]),
}


def is_linear(name: str) -> bool:
    return name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "projector.weight", "lm_head.weight"))


def quantised(source: Path, folder: Path, settings: dict, quantise) -> Path:
    """A copy of a checkpoint with what `quantise` makes of its linear layers."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    skipped, tensors = settings.get("modules_to_not_convert") or [], {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        chosen = is_linear(name) and not any(part in name for part in skipped)
        tensors |= quantise(name, tensor) if chosen else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_rows(values: torch.Tensor, **_) -> tuple[torch.Tensor, torch.Tensor]:
    """FBGEMM's quantisation, a kernel of GPUs: values in FP8 and a scale for each row."""
    scale = values.float().abs().amax(-1) / LARGEST
    return (values.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def changed(folder: Path, copy: Path, change) -> Path:
    """A copy of a checkpoint with the tensors that `change` makes of its own; None removes one."""
    shutil.copytree(folder, copy)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in {**tensors, **change(tensors)}.items() if tensor is not None}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("source") / "16-bit")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """Checkpoints by kind, those of KINDS and "rows"."""
    folder, made = tmp_path_factory.mktemp("written"), {}
    for kind, config in KINDS.items():
        operation = Fp8Quantize(SimpleNamespace(quantization_config=config))
        quantise = lambda name, tensor, operation=operation: operation.convert({name: tensor})  # noqa: E731
        made[kind] = quantised(source, folder / kind, config.to_dict(), quantise)

    def in_rows(name, tensor):
        values, scale = by_rows(tensor)
        return {name: values, f"{name}_scale": scale[:, None]}

    made["rows"] = quantised(source, folder / "rows", FbgemmFp8Config().to_dict(), in_rows)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_what_transformers_dequantises(written, kind):
    model = MllamaForConditionalGeneration.from_pretrained(
        written[kind], dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    expected, checkpoint = model.state_dict(), Checkpoint(written[kind])
    tensors = checkpoint.tensors()
    assert {*tensors} == {*expected}
    computed = [name for name, tensor in tensors.items() if not tensor.mapped]
    assert len(computed) > 10
    assert ("lm_head.weight" in computed) == (kind == "one scale")
    for name, tensor in tensors.items():
        assert torch.equal(tensor.read().to(torch.bfloat16), expected[name]), name
    assert checkpoint.source.kind == {"blocks": "fp8 in blocks of 16 x 32", "one scale": "fp8"}.get(
        kind, "fp8 in blocks of 4 x 16"
    )


def test_rows_equal_what_fbgemms_layer_computes(written, monkeypatch):
    """transformers' layer with its operation that a CPU has, `torch._scaled_mm`, of an identity matrix."""
    monkeypatch.setattr(fbgemm_fp8, "_is_torch_xpu_available", True)
    ones = lambda values, **_: (values.to(torch.float8_e4m3fn), torch.ones(len(values)))  # noqa: E731
    monkeypatch.setattr(fbgemm_fp8, "quantize_fp8_per_row", ones, raising=False)
    stored, tensors = load_file(written["rows"] / "model.safetensors"), Checkpoint(written["rows"]).source.tensors()
    layers = [name for name in stored if f"{name}_scale" in stored]
    assert len(layers) > 10
    assert {*tensors} == {*stored} - {f"{name}_scale" for name in layers}
    for name in layers:
        rows, columns = stored[name].shape
        layer = fbgemm_fp8.FbgemmFp8Linear(columns, rows, bias=False)
        layer.weight.data, layer.weight_scale.data = stored[name], stored[f"{name}_scale"]
        expected = layer(torch.eye(columns, dtype=torch.bfloat16)).T
        assert torch.equal(tensors[name].read().to(torch.bfloat16), expected), name
    assert Checkpoint(written["rows"]).source.kind == "fbgemm_fp8"


def test_blocks_at_the_edges_may_be_smaller(source, tmp_path):
    """As DeepSeek's and vLLM's are; transformers reads whole blocks only."""

    def quantise(name, tensor):
        high, wide = -(-tensor.shape[0] // 24), -(-tensor.shape[1] // 40)
        scale = torch.rand(high, wide) + 0.5
        return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    settings = {"quant_method": "fp8", "weight_block_size": [24, 40], "activation_scheme": "dynamic"}
    folder = quantised(source, tmp_path / "edges", settings, quantise)
    stored, tensors = load_file(folder / "model.safetensors"), Checkpoint(folder).source.tensors()
    for name in tensors:
        if f"{name}_scale_inv" in stored:
            scale = stored[f"{name}_scale_inv"].repeat_interleave(24, 0).repeat_interleave(40, 1)
            expected = stored[name].float() * scale[: len(stored[name]), : stored[name].shape[1]]
            assert torch.equal(tensors[name].read(), expected), name


def test_one_scale_of_vllm_and_those_of_activations_are_read(source, tmp_path):
    def quantise(name, tensor):
        scale = tensor.float().abs().max() / LARGEST
        values = (tensor.float() / scale).to(torch.float8_e4m3fn)
        return {name: values, f"{name}_scale": scale, name.replace(".weight", ".input_scale"): torch.ones(())}

    settings = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    folder = quantised(source, tmp_path / "static", settings, quantise)
    stored, tensors = load_file(folder / "model.safetensors"), Checkpoint(folder).source.tensors()
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    assert not any(name.endswith("scale") for name in tensors)
    assert torch.equal(tensors[name].read(), stored[name].float() * stored[f"{name}_scale"])


def test_converted_model_equals_transformers(written, tmp_path):
    folder = written["blocks"]
    model = MllamaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    converted = OVMLlamaForConditionalGeneration(convert_mllama(folder, tmp_path / "ov"), ov_config=F32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="<|image|>what is it", images=[image], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        right = model.float().eval()(**inputs).logits
    assert (converted(**inputs).logits - right).abs().max() < 1e-3


REFUSED = {
    "no scale": (lambda scale, weight: (None, weight), r"is quantised \(torch.float8_e4m3fn\), but .* no scale"),
    "no weight": (lambda scale, weight: (scale, None), "q_proj.weight is missing beside .*q_proj.weight_scale_inv"),
    "16 bit": (lambda scale, weight: (scale, weight.bfloat16()), "q_proj.weight is torch.bfloat16, not in FP8 beside"),
    "a scale too few": (
        lambda scale, weight: (scale[1:].clone(), weight),
        r"weight_scale_inv is \[3, 2\] instead of \[4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_without_their_companions_are_refused(written, tmp_path, case):
    change, said = REFUSED[case]
    stored = load_file(written["blocks"] / "model.safetensors")
    name = next(name for name in stored if name.endswith("q_proj.weight") and f"{name}_scale_inv" in stored)

    def apply(tensors):
        scale, weight = change(tensors[f"{name}_scale_inv"], tensors[name])
        return {f"{name}_scale_inv": scale, name: weight}

    with pytest.raises(InputError, match=said) as error:
        convert_mllama(changed(written["blocks"], tmp_path / "changed", apply), tmp_path / "ov")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()


def test_scales_in_powers_of_two_are_refused_by_config_alone(written, tmp_path):
    folder = shutil.copytree(written["blocks"], tmp_path / "changed")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"scale_fmt": "float"', '"scale_fmt": "ue8m0"'))
    (folder / "model.safetensors").write_bytes(b"")  # not opened
    with pytest.raises(InputError, match="scales in ue8m0, which are not read: convert the 16-bit checkpoint"):
        convert_mllama(folder, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()
