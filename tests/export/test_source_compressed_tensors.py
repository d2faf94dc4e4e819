"""Checkpoints that compressed-tensors 0.20.1 wrote, against its own decompressed weights, bit for bit."""

import json
import shutil
from pathlib import Path

import compressed_tensors.quantization as ct
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, MllamaForConditionalGeneration

from conftest import F32
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.runtime.errors import InputError
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint

TEXT = "re:.*language_model.*"
VISION = "re:.*vision_model.*"
DYNAMIC = dict(num_bits=8, dynamic=True, strategy="token")
FLOAT = dict(num_bits=8, type="float")
FLOAT_INPUT = dict(type="float", **DYNAMIC)
GROUPS = dict(num_bits=4, strategy="group", group_size=32)
LINEAR = ["Linear"]


def scheme(weights: dict, inputs: dict | None = None, targets=LINEAR, **settings) -> dict:
    return dict(targets=list(targets), weights=weights, input_activations=inputs, **settings)


KINDS = {  # groups, ignored modules, and the format that compressed-tensors names
    "fp8 per tensor": ([scheme(dict(FLOAT, strategy="tensor"), FLOAT_INPUT)], ["re:.*lm_head"], "float-quantized"),
    "fp8 static": ([scheme(dict(FLOAT, strategy="tensor"), FLOAT)], ["re:.*lm_head"], "float-quantized"),
    "fp8 dynamic": (
        [scheme(dict(FLOAT, strategy="channel"), FLOAT_INPUT)],
        [VISION, "re:.*lm_head"],
        "float-quantized",
    ),
    "fp8 in blocks": (
        [scheme(dict(FLOAT, strategy="block", block_structure=[24, 40]), FLOAT_INPUT)],
        ["re:.*layers.1.*"],
        "float-quantized",
    ),
    "fp8, weights alone": ([scheme(dict(FLOAT, strategy="channel"))], [], "naive-quantized"),
    "int8": ([scheme(dict(num_bits=8, strategy="channel"), DYNAMIC)], [], "int-quantized"),
    "int8 asymmetric": ([scheme(dict(num_bits=8, strategy="channel", symmetric=False), DYNAMIC)], [], "int-quantized"),
    "int8 packed": ([scheme(dict(num_bits=8, strategy="channel"))], ["re:.*lm_head"], "pack-quantized"),
    "int8 packed in groups": (
        [scheme(dict(GROUPS, num_bits=8, symmetric=False))],
        ["re:.*lm_head"],
        "pack-quantized",
    ),
    "int4": ([scheme(GROUPS)], [VISION, "re:.*lm_head"], "pack-quantized"),
    "int4 asymmetric": ([scheme(dict(GROUPS, symmetric=False))], ["re:.*lm_head"], "pack-quantized"),
    "int4 by rows": ([scheme(dict(num_bits=4, strategy="channel"))], [], "pack-quantized"),
    "int4 by rows, asymmetric": (
        [scheme(dict(num_bits=4, strategy="channel", symmetric=False))],
        [],
        "pack-quantized",
    ),
    "int4 and embeddings": ([scheme(GROUPS, targets=["Linear", "Embedding"])], [VISION], "pack-quantized"),
    "mixed": (
        [
            scheme(dict(GROUPS, symmetric=False), targets=["re:.*mlp.*"]),
            scheme(dict(FLOAT, strategy="channel"), FLOAT_INPUT, targets=[VISION]),
            scheme(dict(num_bits=8, strategy="channel"), DYNAMIC),
        ],
        ["re:.*lm_head"],
        "mixed-precision",
    ),
}


def calibrate(model: torch.nn.Module) -> None:
    """Set scales and zero points from the weights' extremes, as a calibration without data does."""
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        weight, rows = module.weight.data, len(module.weight)
        if args.strategy == "block":
            high, wide = args.block_structure
            padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
            weight = padded.unflatten(0, (-1, high)).unflatten(-1, (-1, wide)).transpose(1, 2).flatten(2)
        elif args.strategy == "group":
            weight = weight.view(rows, -1, args.group_size)
        weight = weight.flatten() if args.strategy == "tensor" else weight
        keep = args.strategy == "channel"
        scale, zero = calculate_qparams(weight.amin(-1, keep), weight.amax(-1, keep), args)
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.5)


def write(source: Path, folder: Path, groups: list[dict], ignore: list[str], dtype=torch.bfloat16) -> dict:
    """Write a checkpoint with compressed-tensors, and return its own decompressed weights."""
    model = MllamaForConditionalGeneration.from_pretrained(source, dtype=dtype)
    config = ct.QuantizationConfig(
        config_groups={f"group_{index}": ct.QuantizationScheme(**group) for index, group in enumerate(groups)},
        ignore=ignore,
    )
    ct.apply_quantization_config(model, config, show_progress=False)
    calibrate(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    names = MllamaForConditionalGeneration(model.config).state_dict()
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name in names}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("source") / "16-bit")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """`written(kind)`: folder and decompressed weights, once for each kind."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("written")
            made[kind] = folder, write(source, folder, *KINDS[kind][:2])
        return made[kind]

    return of


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_equal_decompressed_ones(written, kind):
    folder, expected = written(kind)
    assert settings(folder)["format"] == KINDS[kind][2]
    checkpoint = Checkpoint(folder)
    tensors = checkpoint.tensors()
    assert {*tensors} == {*expected}
    for name, tensor in tensors.items():
        actual = tensor.read()
        assert tensor.shape == actual.shape, name
        assert tensor.dtype == actual.dtype == expected[name].dtype, name
        assert torch.equal(actual, expected[name]), name
    assert checkpoint.source.kind.startswith("compressed-tensors ")


def test_scales_in_half_precision_give_weights_in_it(source, tmp_path):
    expected = write(source, tmp_path, [scheme(dict(GROUPS, symmetric=False))], ["re:.*lm_head"], torch.float16)
    for name, tensor in Checkpoint(tmp_path).tensors().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor.read(), expected[name]), name


# ---- 4 bits taken over ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int4") or kind == "mixed"])
def test_packed_weights_are_the_same(written, kind):
    folder, expected = written(kind)
    tensors = {name: tensor for name, tensor in Checkpoint(folder).tensors().items() if tensor.pack}
    assert tensors
    assert kind != "mixed" or all("mlp" in name for name in tensors)
    for name, tensor in tensors.items():
        packed = tensor.pack()
        assert packed.values.dtype == packed.zero_points.dtype == np.uint8
        assert packed.scales.dtype == np.float16
        assert max(packed.values.max(), packed.zero_points.max()) <= 15
        weights = (packed.values.astype(np.float32) - packed.zero_points) * packed.scales
        assert torch.equal(torch.from_numpy(weights.reshape(tensor.shape)).to(tensor.dtype), expected[name]), name


def test_scales_beyond_half_precision_are_not_taken_over(written, tmp_path):
    folder = written("int4")[0]
    name = first(folder, "weight_scale")
    small = changed(folder, tmp_path, lambda tensors: {name: tensors[name] * 1e-7})
    before, after = (
        {name for name, tensor in Checkpoint(at).tensors().items() if tensor.pack} for at in (folder, small)
    )
    assert len(before - after) == 1
    assert not after - before


def test_columns_in_the_order_of_an_index_are_dequantised(written, tmp_path):
    """As compressed-tensors before 0.20 wrote them: no version that installs today does."""
    folder, expected = written("int4 asymmetric")
    name = first(folder, "weight_packed").removesuffix("_packed")
    shape = load_file(folder / "model.safetensors")[f"{name}_shape"].tolist()
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0))  # of stored columns
    groups = torch.arange(shape[1])[order] // 32

    def reorder(tensors):
        values = unpack_from_int32(tensors[f"{name}_packed"], 4, shape)
        return {f"{name}_packed": pack_to_int32(values[:, order], 4), f"{name}_g_idx": groups.int()}

    tensors = Checkpoint(changed(folder, tmp_path / "ordered", reorder)).source.tensors()
    place = dict(zip(tensors, Checkpoint(folder).tensors(), strict=True))[name]
    assert torch.equal(tensors[name].read(), expected[place][:, order])
    assert tensors[name].pack is None
    unused = changed(folder, tmp_path / "unused", lambda _: {f"{name}_g_idx": torch.full((shape[1],), -1).int()})
    unused = Checkpoint(unused).source.tensors()[name]
    assert torch.equal(unused.read(), expected[place])
    assert unused.pack


# ---- Conversion -----------------------------------------------------------------------------------------------------


def test_converted_model_equals_transformers_with_decompressed_weights(written, tmp_path):
    folder, expected = written("mixed")
    model = MllamaForConditionalGeneration(Checkpoint(folder).config).float().eval()
    model.load_state_dict(expected)
    converted = OVMLlamaForConditionalGeneration(convert_mllama(folder, tmp_path / "ov"), ov_config=F32)
    inputs = image_inputs(folder)
    with torch.no_grad():
        right = model(**inputs).logits
    assert (converted(**inputs).logits - right).abs().max() < 1e-3


def image_inputs(folder: Path):
    """The processor's output for an image and a question."""
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
    return processor(text="<|image|>what is it", images=[image], return_tensors="pt", add_special_tokens=False)


# ---- Refused --------------------------------------------------------------------------------------------------------


def first(folder: Path, part: str) -> str:
    """The name of a text layer's tensor that ends so."""
    names = sorted(load_file(folder / "model.safetensors"))
    return next(name for name in names if name.endswith(part) and "language_model" in name)


def changed(folder: Path, copy: Path, change) -> Path:
    """A copy of a checkpoint with the tensors that `change` makes of its own; None removes one."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in {**tensors, **change(tensors)}.items() if tensor is not None}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


UNREAD = {
    "nvfp4": (dict(format="nvfp4-pack-quantized"), "format nvfp4-pack-quantized .*convert the 16-bit checkpoint"),
    "mxfp4": (dict(format="mxfp4-pack-quantized"), "format mxfp4-pack-quantized"),
    "marlin": (dict(format="marlin-24"), "format marlin-24"),
    "not compressed": (dict(format="dense"), "format dense"),
    "sparse": (dict(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights .*sparse-24-bitmask.*16-bit"),
    "rotated": (dict(transform_config={"config_groups": {"v": {"type": "hadamard"}}}), "rotated weights.*16-bit"),
    "three bits": (dict(num_bits=3), "format pack-quantized .3-bit int, one scale for each group., which is not read"),
    "fp4": (dict(num_bits=4, type="float"), "4-bit float"),
    "by heads": (dict(strategy="attn_head"), "one scale for each attn_head"),
    "no groups": (dict(config_groups={}), "has no config_groups with weights"),
    "a list of groups": (dict(config_groups=[1]), "has no config_groups with weights"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_refused_by_config_alone(written, tmp_path, case):
    change, said = UNREAD[case]
    folder = shutil.copytree(written("int4")[0], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    for key, value in change.items():
        inner = quantization["config_groups"]["group_0"]["weights"]
        (inner if key in inner else quantization)[key] = value
    if "format" in change:
        quantization["config_groups"]["group_0"]["format"] = None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").touch()  # not opened
    with pytest.raises(InputError, match=said) as error:
        convert_mllama(folder, tmp_path / "ov")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()


LEFT_OVER = {
    "no scale": ("int4", "weight_scale", None, "weight_scale is missing beside .*weight_packed: download"),
    "no shape": ("int4", "weight_shape", None, "weight_shape is missing beside .*weight_packed"),
    "no values": ("int4", "weight_packed", None, "weight is missing beside .*weight_scale"),
    "no scale of fp8": ("fp8 dynamic", "weight_scale", None, "is quantised .torch.float8_e4m3fn., but .* no scale"),
    "a scale too few": (
        "int4",
        "weight_scale",
        lambda scale: scale[:-1],
        r"weight_scale is \[63, 3\] instead of \[64, 3\]",
    ),
    "half the values": ("int4", "weight_packed", lambda words: words[:, ::2], r"weight_packed is \[\d+, \d\] instead"),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_tensors_without_their_companions_are_refused(written, tmp_path, case):
    kind, part, change, said = LEFT_OVER[case]
    folder = written(kind)[0]
    name = first(folder, part)
    folder = changed(folder, tmp_path / "changed", lambda all: {name: change and change(all[name]).contiguous()})
    with pytest.raises(InputError, match=said) as error:
        convert_mllama(folder, tmp_path / "ov")
    assert name.rpartition(".")[0] in str(error.value)
    assert not (tmp_path / "ov").exists()


def test_a_module_of_no_group_is_refused(written, tmp_path):
    folder = shutil.copytree(written("mixed")[0], tmp_path / "changed")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"Linear"', '"Other"'))
    with pytest.raises(InputError, match="is quantised, but none of the 3 config_groups is for it"):
        Checkpoint(folder).tensors()
