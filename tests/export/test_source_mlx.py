"""Checkpoints of MLX: matrices that MLX 0.32.4 quantised and dequantised (mlx.safetensors, by mlx_fixture.py, which has
the command), and a whole one in its layout with mlx-vlm's names, for which no program of Apple's is needed.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, MllamaForConditionalGeneration

from conftest import F32
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.sources import mlx
from ov_mllama.export.sources.files import stored_tensors
from ov_mllama.runtime.errors import InputError
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint

FIXTURE = Path(__file__).with_name("mlx.safetensors")
CASES = {
    "bf16_4": (4, 64),
    "bf16_4_small": (4, 32),
    "bf16_8": (8, 64),
    "f16_4": (4, 64),
    "f16_8": (8, 32),
    "f32_4": (4, 128),
}
SIZE = 32  # of groups in the checkpoint


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_what_mlx_dequantises(case):
    stored = {name: tensor for name, tensor in stored_tensors([FIXTURE]).items() if name.startswith(f"{case}.")}
    expected = stored.pop(f"{case}.expected").read()
    bits, size = CASES[case]
    alone = mlx.decode(stored, {"bits": bits, "group_size": size})
    by_layer = mlx.decode(stored, {"bits": 4, "group_size": 16, case: {"bits": bits, "group_size": size}})
    for decoded in (alone, by_layer):
        assert {*decoded} == {f"{case}.weight"}
        assert decoded[f"{case}.weight"].dtype == expected.dtype
        assert decoded[f"{case}.weight"].shape == expected.shape
        assert torch.equal(decoded[f"{case}.weight"].read(), expected)


def quantise(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix in MLX's layout, 4 bit, and what it is dequantised to."""
    groups = weight.float().unflatten(1, (-1, SIZE))
    bias = groups.amin(-1, keepdim=True).to(weight.dtype)
    scale = ((groups.amax(-1, keepdim=True) - bias.float()) / 15).clamp(min=1e-6).to(weight.dtype)
    values = ((groups - bias.float()) / scale.float()).round().clamp(0, 15)
    numbers = values.flatten(1).numpy().astype(np.uint32).reshape(len(weight), -1, 8)
    words = (numbers << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    parts = {"weight": torch.from_numpy(words), "scales": scale.squeeze(-1), "biases": bias.squeeze(-1)}
    return parts, (values.to(weight.dtype) * scale + bias).flatten(1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint in mlx-vlm's form, and its dequantised weights by transformers' stored names."""
    folder = make_checkpoint(tmp_path_factory.mktemp("mlx") / "checkpoint")
    tensors, expected = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, place = name.rpartition(".")[0], name.replace("vision_model", "vision_tower")
        matrix = tensor.ndim == 2 and name.endswith(".weight") and "tile" not in name
        expected[name] = tensor
        if matrix:
            parts, expected[name] = quantise(tensor)
            module = module.replace("vision_model", "vision_tower")
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            last = name.endswith("patch_embedding.weight")
            tensors[place] = tensor.permute(0, 2, 3, 1).contiguous() if last else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    settings = {"group_size": SIZE, "bits": 4}
    rewrite(folder, quantization=settings, quantization_config=settings)
    return folder, expected


def rewrite(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_checkpoint_of_mlx_vlm_is_read(written):
    folder, expected = written
    checkpoint = Checkpoint(folder)
    tensors = checkpoint.source.tensors()
    assert checkpoint.source.kind == "MLX, 4 bit"
    assert {*tensors} == {*expected}
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.read(), expected[name]), name
    assert len(checkpoint.tensors()) == len(tensors)


def test_converted_model_equals_transformers(written, tmp_path):
    folder, _ = written
    checkpoint = Checkpoint(folder)
    model = MllamaForConditionalGeneration(checkpoint.config).float().eval()
    model.load_state_dict({name: tensor.read() for name, tensor in checkpoint.tensors().items()})
    converted = OVMLlamaForConditionalGeneration(convert_mllama(folder, tmp_path / "ov"), ov_config=F32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="<|image|>what is it", images=[image], return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        right = model(**inputs).logits
    assert (converted(**inputs).logits - right).abs().max() < 1e-3


UNREAD = {
    "mxfp4": dict(group_size=32, bits=4, mode="mxfp4"),
    "three bits": dict(group_size=32, bits=3),
    "a layer of six": {"group_size": 32, "bits": 4, "language_model.lm_head": {"group_size": 32, "bits": 6}},
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_refused_by_config_alone(written, tmp_path, case):
    folder = shutil.copytree(written[0], tmp_path / "changed")
    rewrite(folder, quantization=UNREAD[case])
    (folder / "model.safetensors").write_bytes(b"")  # not opened
    with pytest.raises(
        InputError, match=r"quantised by MLX in the mode (mxfp4, 4|affine, [36]) bit.* 16-bit checkpoint"
    ):
        convert_mllama(folder, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


LOST = {
    "scales": "lm_head.scales is missing beside",
    "biases": "lm_head.biases is missing beside",
    "weight": "lm_head.weight is missing beside",
    "scales and biases": "lm_head.weight is quantised .torch.uint32., but the checkpoint has no scale",
}


@pytest.mark.parametrize("case", LOST)
def test_tensors_without_their_companions_are_refused(written, tmp_path, case):
    folder = shutil.copytree(written[0], tmp_path / "changed")
    lost = tuple(f"lm_head.{part}" for part in case.split(" and "))
    tensors = {name: part for name, part in load_file(folder / "model.safetensors").items() if not name.endswith(lost)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=LOST[case]):
        convert_mllama(folder, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()
