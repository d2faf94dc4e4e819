"""A vision encoder that was split and joined is the same, and quantising its pieces is quantising it."""

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

import ov_mllama.export.compress
from conftest import DEMO, F32
from data_preprocessing import prepare_dataset_vision
from demo_model import SAMPLES
from ov_mllama.export import piecewise
from ov_mllama.export.compress import quantize_vision_encoder
from ov_mllama.export.convert import convert_mllama
from ov_mllama.runtime.ir import VISION_ENCODER_NAME


@pytest.fixture(scope="module")
def encoder_in_f16(tmp_path_factory):
    """The demo's vision encoder in float16: SmoothQuant rounds scaled weights to their type, and in bfloat16 that moves
    by up to a percent what layers behind them are calibrated with in the whole model, and not in pieces."""
    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(DEMO, folder / "checkpoint", ignore=shutil.ignore_patterns("*.py", "samples", "draft"))
    tensors = load_file(DEMO / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "checkpoint/model.safetensors")
    return convert_mllama(folder / "checkpoint", folder / "ov", language_model=False) / VISION_ENCODER_NAME


@pytest.fixture
def model(encoder_in_f16):
    return ov.Core().read_model(encoder_in_f16)


@pytest.fixture(scope="module")
def samples(demo_dir):
    """Pictures with all the tiles that the processor makes."""
    return list(prepare_dataset_vision(AutoProcessor.from_pretrained(demo_dir), 8, SAMPLES))


def outputs(model: ov.Model, samples: list[dict]) -> list[list[np.ndarray]]:
    """K/V of each sample, in f32."""
    compiled = ov.Core().compile_model(model, "CPU", F32)
    return [list(compiled(sample).to_tuple()) for sample in samples]


def ports(model: ov.Model) -> list[list[tuple]]:
    """Names, shapes and types of inputs and of outputs, in order."""
    both = model.inputs, model.outputs
    return [[(port.names, port.partial_shape, port.element_type) for port in side] for side in both]


@pytest.mark.parametrize("layers", [2, 8])
def test_pieces_joined_are_the_model(model, samples, layers, tmp_path):
    before = ports(model)
    joined = piecewise.quantize_in_pieces(model, samples[:1], lambda piece, _: piece, tmp_path, layers)
    assert ports(joined) == ports(model) == before
    pixels = np.random.default_rng(0).normal(size=samples[0]["pixel_values"].shape).astype(np.float32)
    # real tiles, canvas, and how many tiles each stands for; the last may be a padding tile that stands for several
    tiles = [(1, 1, [1]), (1, 1, [1, 3]), (2, 2, [1, 1]), (2, 2, [1, 1, 2]), (4, 6, [1] * 4)]
    each = [
        {
            "pixel_values": pixels[: len(counts)],
            "aspect_ratio_ids": np.array([ratio]),
            "real_tiles": np.array(real),
            "tile_counts": np.array(counts),
        }
        for real, ratio, counts in tiles
    ]
    for expected, actual in zip(outputs(model, each), outputs(joined, each), strict=True):
        assert all(np.array_equal(*pair) for pair in zip(expected, actual, strict=True))


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_pieces_end_where_layers_are_handed_on_and_where_encoders_end(demo_dir, model, layers):
    vision = AutoConfig.from_pretrained(demo_dir).vision_config
    names = [[node.get_friendly_name() for node in nodes] for nodes in piecewise.layer_outputs(model).values()]
    assert [len(encoder) for encoder in names] == [vision.num_hidden_layers, vision.num_global_layers]
    ends = piecewise.piece_ends(model, layers)
    local = [index for index, name in enumerate(names[0]) if name in ends]
    needed = {*vision.intermediate_layers_indices, vision.num_hidden_layers - 1}
    assert set(local) == needed if layers == 8 else set(local) >= needed
    assert ends[-1] == names[1][-1]
    assert max(np.diff([-1, *local])) <= layers
    assert len(ends) - len(local) == -(-vision.num_global_layers // layers)


@pytest.mark.parametrize("layers", [1, 8])
def test_no_piece_computes_what_another_does(model, layers):
    """Linear layers, that is; how many tiles and rows there are, each finds out by itself."""

    def linear(part):
        return [op.get_friendly_name() for op in part.get_ops() if op.get_type_name() in ("MatMul", "Convolution")]

    parts = piecewise.split(model, layers)
    assert sorted(name for part in parts for name in linear(part)) == sorted(linear(model))
    assert all(linear(part) for part in parts)
    assert all(port.get_target_inputs() for part in parts for port in part.inputs)


def test_an_encoder_with_other_names_is_refused(model):
    for node in model.get_ops():
        if "layers.1.mlp.fc2" in node.get_friendly_name():
            node.set_friendly_name("renamed " + node.get_friendly_name())
    with pytest.raises(ValueError, match=r"\[0, 2, 3\].*Convert it again"):
        piecewise.split(model, 4)
    parameter = ops.parameter([1], ov.Type.f32)
    with pytest.raises(ValueError, match="none"):
        piecewise.split(ov.Model([parameter], [parameter]), 4)


def test_no_room_for_calibration_data(model, samples, monkeypatch, tmp_path):
    monkeypatch.setattr(piecewise.tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left.*fewer images"):
        piecewise.quantize_in_pieces(model, samples[:1], lambda piece, _: piece, tmp_path)


# ---- Quantised ------------------------------------------------------------------------------------------------------


def quantizers(model: ov.Model) -> dict[str, np.ndarray]:
    """The ranges of the activations' quantisers, by the name of the node that they read."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "FakeQuantize":
            read, *bounds = (node.input_value(i).get_node() for i in range(3))
            found.setdefault(read.get_friendly_name(), []).append([bound.data.item() for bound in bounds])
    return {name: np.array(sorted(ranges)) for name, ranges in found.items()}


def errors(actual: list, expected: list) -> np.ndarray:
    """Relative error of each output over all samples."""
    actual, expected = (
        [np.concatenate([array.ravel() for array in port]) for port in zip(*each, strict=True)]
        for each in (actual, expected)
    )
    return np.array([np.linalg.norm(a - e) / np.linalg.norm(e) for a, e in zip(actual, expected, strict=True)])


def test_quantized_in_pieces_is_quantized(model, samples, monkeypatch, tmp_path):
    in_pieces = quantize_vision_encoder(model, samples, len(samples), tmp_path)
    whole_at_once = lambda model, samples, quantize, _: quantize(model, list(samples))  # noqa: E731
    monkeypatch.setattr(ov_mllama.export.compress, "quantize_in_pieces", whole_at_once)
    whole = quantize_vision_encoder(model, samples, len(samples), tmp_path)
    assert ports(in_pieces) == ports(whole) == ports(model)

    # the same quantisers; the plugin fuses a piece's operations otherwise, which moves f32's last digits
    expected, actual = quantizers(whole), quantizers(in_pieces)
    assert expected.keys() == actual.keys()
    for name, ranges in expected.items():
        np.testing.assert_allclose(actual[name], ranges, rtol=1e-3, err_msg=name)

    # values at a rounding boundary fall to the other side: outputs differ, by far less than quantising changes them
    exact, of_whole, of_pieces = (outputs(each, samples) for each in (model, whole, in_pieces))
    lost = errors(of_whole, exact)
    assert (errors(of_pieces, exact) < 1.02 * lost).all()
    assert (errors(of_pieces, of_whole) < 0.2 * lost).all()
