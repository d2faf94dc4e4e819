"""GPTQ, AWQ and AutoRound checkpoints, as auto-round 0.16.1 writes them: read exactly, their 4 bits taken over."""

import json
import logging
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from auto_round_files import CASES, COLUMNS, ROWS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, MllamaForConditionalGeneration

from conftest import F32
from ov_mllama.export import takeover
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama, convert_with, of_language_model, remains
from ov_mllama.export.settings import Settings
from ov_mllama.export.sources import gptq
from ov_mllama.export.sources.quantized import method_of
from ov_mllama.export.sources.tensors import Packed, Tensor
from ov_mllama.runtime.ir import ir_stamp
from ov_mllama_compression import compress
from ov_mllama_helper import OVMLlamaForConditionalGeneration

WRITER = Path(__file__).with_name("auto_round_files.py")
TAKEN = 3 * 7 + 2 * 5  # matrices in the language IR: three layers of self-attention, two of cross-attention
INT4 = dict(group_size=32)


@pytest.fixture(scope="module")
def files(nursery, tmp_path_factory):
    """Files that `auto_round_files.py` writes."""
    folder = tmp_path_factory.mktemp("auto_round")
    written = nursery.start(folder, f"import runpy; runpy.run_path({str(WRITER)!r}, run_name='__main__')", folder)
    assert written.wait(600) == 0, written.said()[-3000:]
    return folder


@pytest.fixture(scope="module")
def layers(files):
    """The tensors of each of CASES."""
    found = load_file(files / "layers.safetensors")
    return {
        case: {name.partition(".")[2]: t for name, t in found.items() if name.split(".")[0] == case} for case in CASES
    }


def config_of(case: str) -> dict:
    """The `quantization_config` of one of CASES, as auto-round would write it."""
    packing, bits, size, sym, _ = CASES[case]
    name = {"less one": "auto_round:auto_gptq", "raw": "auto_round", "awq": "auto_round:auto_awq"}[packing]
    return {"quant_method": "auto-round", "packing_format": name, "bits": bits, "group_size": size, "sym": sym}


def decoded(parts: dict[str, torch.Tensor], config: dict) -> Tensor:
    """The weight of a layer's parts."""
    stored = {f"x.{n}": Tensor(tuple(t.shape), t.dtype, lambda t=t: t, mapped=True) for n, t in parts.items()}
    method = method_of(config)
    assert method.describe(config)
    (weight,) = method.decode(stored, config).items()
    assert weight[0] == "x.weight"
    return weight[1]


# ---- Layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_packing_is_read_as_auto_round_reads_it(layers, case, monkeypatch):
    monkeypatch.setattr(gptq, "CHUNK_VALUES", COLUMNS * 40)  # more than one chunk, the last one smaller
    parts = dict(layers[case])
    expected = parts.pop("weight")
    weight = decoded(parts, config_of(case))
    assert weight.shape == (ROWS, COLUMNS)
    assert weight.dtype == torch.float16
    assert torch.equal(weight.read(), expected)

    _, bits, size, _, shuffled = CASES[case]
    assert bool(weight.pack) == (bits == 4 and not shuffled)
    if weight.pack:
        packed = weight.pack()
        assert packed.values.shape == (ROWS, COLUMNS // size if size > 0 else 1, size if size > 0 else COLUMNS)
        assert torch.equal(product(*vars(packed).values()).reshape(ROWS, COLUMNS).half(), expected)


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}),
        ("gptq-8", {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:x": {"bits": 8}}}),
        ("raw-shuffled", {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
        ("awq", {"quant_method": "awq", "w_bit": 4, "group_size": 64, "format": "gemm"}),
        ("gptq", {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2", "bits": 4}),
        ("raw", {"quant_method": "intel/auto-round", "backend": "auto_round:exllamav2", "bits": 4}),
        ("raw", {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "bits": 4}),
    ],
)
def test_each_way_to_name_a_packing(layers, case, config):
    parts = dict(layers[case])
    assert torch.equal(parts.pop("weight"), decoded(parts, config).read())


def test_zero_points_that_gptqmodel_stores_with_a_borrow():
    """gptqmodel subtracts 0x11111111 from the words of zero points, also from zeros among them."""
    zeros = np.array([[0, 5, 0, 0, 15, 1, 0, 9]])
    words = (zeros << np.arange(0, 32, 4)).sum(-1, keepdims=True) - 0x11111111
    parts = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": torch.from_numpy(words.astype(np.uint32).view(np.int32)),
        "scales": torch.ones(1, 8).half(),
    }
    weight = decoded(parts, {"quant_method": "gptq", "bits": 4, "group_size": -1})
    assert torch.equal(weight.read()[:, 0], -torch.from_numpy(zeros[0]).half())


REFUSED = {
    "GPTQ in the layout 'marlin'": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    "GPTQ in the layout 'gptq_p'": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"},
    "GPTQ in 5 bits; only 2, 3, 4, 8": {"quant_method": "gptq", "bits": 5},
    "AWQ in the version 'gemv'": {"quant_method": "awq", "bits": 4, "version": "GEMV"},
    "AWQ in the version 'llm-awq'": {"quant_method": "awq", "bits": 4, "backend": "llm-awq"},
    "AWQ in 8 bits; only 4": {"quant_method": "awq", "bits": 8},
    r"AutoRound \('auto_round:fp8_static'\)": {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"},
    r"AutoRound \('mx_fp'\)": {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"},
    r"AutoRound \('mlx'\)": {"quant_method": "auto-round", "bits": 4, "packing_format": "mlx"},
    r"AutoRound \('8-bit activations'\)": {"quant_method": "auto-round", "bits": 8, "act_bits": 8},
    r"AutoRound \('rotation'\)": {"quant_method": "auto-round", "bits": 4, "rotation_config": {"size": 32}},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_variants_that_are_not_read_are_refused_by_config(sentence):
    with pytest.raises(ValueError, match=f"{sentence}.*: convert the 16-bit checkpoint") as error:
        method_of(REFUSED[sentence]).describe(REFUSED[sentence])
    assert "\n" not in str(error.value)


BROKEN = {
    "but qzeros is missing": lambda parts: parts.pop("qzeros"),
    "but there is an unquantised weight too": lambda parts: parts.update(weight=torch.zeros(1)),
    "do not fit each other .*qweight .31": lambda parts: parts.update(qweight=parts["qweight"][:-1]),
    "do not fit each other .*g_idx .3": lambda parts: parts.update(g_idx=torch.zeros(3, dtype=torch.int32)),
    "do not fit each other .*g_idx .256": lambda parts: parts.update(g_idx=torch.full((COLUMNS,), 99)),
    "do not fit each other .*scales .96": lambda parts: parts.update(scales=parts["scales"][0]),
    "do not fit each other .*qzeros .8, 0": lambda parts: parts.update(qzeros=parts["qzeros"][:, :0]),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_parts_that_do_not_fit_are_refused_by_the_layers_name(layers, sentence):
    parts = dict(layers["raw-shuffled"])
    del parts["weight"]
    BROKEN[sentence](parts)
    with pytest.raises(ValueError, match=rf"x h.*{sentence}"):
        decoded(parts, {"quant_method": "gptq", "bits": 4, "group_size": 32})


# ---- Whole checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(files):
    """transformers' model in f32 with the weights that the checkpoint holds, those in the language IR unrounded."""
    model = MllamaForConditionalGeneration.from_pretrained(files / "source", dtype=torch.float32).eval()
    tensors = Checkpoint(files / "gptq").tensors()
    packed = takeover.packed_weights(tensors)
    for name, tensor in tensors.items():
        weight = product(*vars(packed[name]()).values()) if name in packed else tensor.read().float()
        model.get_parameter(name).data = weight.reshape(tensor.shape)
    return model


def product(values: np.ndarray, zero_points: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """The dequantised weight, unrounded."""
    return torch.from_numpy((values.astype(np.float32) - zero_points.astype(np.float32)) * scales.astype(np.float32))


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    """The vision encoder and the language model in 4 bits; the latter's path."""
    return compress(
        convert_mllama(files / "gptq", tmp_path_factory.mktemp("ov") / "ov", language_model=False),
        checkpoint=files / "gptq",
        **INT4,
    )


@pytest.fixture(scope="module")
def inputs(files):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 50, 3), dtype=np.uint8))
    return AutoProcessor.from_pretrained(files / "source")(
        text="<|image|>what is it", images=image, return_tensors="pt"
    )


def test_logits_are_those_of_the_checkpoints_own_weights(files, converted, reference, inputs):
    ir = ov.Core().read_model(converted)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):  # NNCF's, in 8 bits
        weight = reference.get_parameter(name)
        weight.data = in_8_bits(ir, list(weight.shape))
    model = OVMLlamaForConditionalGeneration(converted.parent, language_model_name=converted.name, ov_config=F32)
    with torch.no_grad():
        expected = reference(**inputs).logits
    assert expected.std() > 0.3
    assert (model(**inputs).logits - expected).abs().max() < 1e-4  # a second quantisation would be 1, f16 rounding 1e-3


def in_8_bits(ir: ov.Model, shape: list[int]) -> torch.Tensor:
    """NNCF's matrix in 8 bits of this shape, dequantised."""
    for op in ir.get_ops():
        if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.u8 and list(op.shape) == shape:
            subtract, multiply = (after(op, steps) for steps in (2, 3))
            zero_points = subtract.input_value(1).get_node().input_value(0).get_node().data
            return product(op.data, zero_points, multiply.input_value(1).get_node().data)
    raise LookupError(shape)


def after(op: ov.Node, steps: int) -> ov.Node:
    """The node that many steps after one."""
    for _ in range(steps):
        (op,) = (port.get_node() for port in op.output(0).get_target_inputs())
    return op


def matrices(path: Path) -> dict[str, list[ov.Node]]:
    """The constants of at least two axes by type."""
    found: dict[str, list[ov.Node]] = {}
    for op in ov.Core().read_model(path).get_ops():
        if op.get_type_name() == "Constant" and len(op.shape) > 1:
            found.setdefault(op.get_element_type().get_type_name(), []).append(op)
    return found


def test_nncf_leaves_alone_what_is_taken_over(files, converted):
    """And nothing is left in 16 bit: 31 matrices with their zero points in 4 bits, embedding and head in 8."""
    found = matrices(converted)
    assert len(found["u4"]) == 2 * TAKEN
    assert len(found["u8"]) == 2 * 2
    assert max(int(np.prod(op.shape)) for kind in found.keys() - {"u4", "u8"} for op in found[kind]) < 32 * 32
    stored = Checkpoint(files / "gptq").tensors()
    expected = Counter(tensor.pack().values.tobytes() for tensor in stored.values() if tensor.pack)
    written = [unpacked(op) for op in found["u4"] if op.shape[-1] > 1]
    assert Counter(values.tobytes() for values in written) <= expected
    assert ir_stamp(converted)["taken_over"] == str(TAKEN)
    assert ir_stamp(converted)["format"] == "int4_asym"


def unpacked(op: ov.Node) -> np.ndarray:
    """The values of a constant in 4 bits."""
    return ov.compile_model(ov.Model([ov.opset13.convert(op.output(0), "u8").output(0)], [], "values"), "CPU")([])[
        0
    ].copy()


def test_cpu_plugin_keeps_them_in_4_bits(converted):
    compiled = ov.Core().compile_model(converted, "CPU")
    assert weight_types(compiled)["u4"] == TAKEN


def weight_types(compiled: ov.CompiledModel) -> Counter:
    """The number of fully connected layers that compute with weights of each type."""
    layers = [op for op in compiled.get_runtime_model().get_ops() if kind(op) == "FullyConnected"]
    return Counter(op.input_value(1).get_element_type().get_type_name() for op in layers)


def kind(op: ov.Node) -> str:
    return op.get_rt_info()["layerType"].astype(str)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_cpu_plugin_keeps_every_group_size_in_4_bits(size, tmp_path):
    draw = np.random.default_rng(size)
    groups = COLUMNS // size
    packed = Packed(
        draw.integers(0, 16, (ROWS, groups, size), np.uint8),
        draw.integers(0, 16, (ROWS, groups, 1), np.uint8),
        draw.uniform(0.01, 0.02, (ROWS, groups, 1)).astype(np.float16),
    )
    x = ov.opset13.parameter([-1, COLUMNS], ov.Type.f32)
    data, places = takeover.written({"x": lambda: packed}, tmp_path)
    weight = takeover.dequantized(data, places["x"], ov.Shape([ROWS, COLUMNS]), "x")
    model = ov.Model([ov.opset13.matmul(x, weight, False, True).output(0)], [x], "layer")
    compiled = ov.compile_model(model, "CPU", F32)
    assert weight_types(compiled) == {"u4": 1}
    exact = product(*vars(packed).values()).reshape(ROWS, COLUMNS).numpy()
    inputs = draw.normal(size=(3, COLUMNS)).astype(np.float32)
    assert np.abs(compiled(inputs)[0] - inputs @ exact.T).max() < 1e-4


def test_no_16_bit_copy_is_made_of_what_is_taken_over(files, tmp_path):
    checkpoint = Checkpoint(files / "gptq")
    tensors = checkpoint.tensors()
    packed = takeover.packed_weights(tensors)
    assert len(packed) == TAKEN
    without = checkpoint.scratch_bytes(needed=partial(remains, packed))
    copied = checkpoint.scratch_bytes(needed=of_language_model) - without
    assert copied == 2 * sum(int(np.prod(tensors[name].shape)) for name in packed)
    model = checkpoint.load(scratch=tmp_path, needed=partial(remains, packed))
    assert not any(model.get_parameter(name).any() for name in packed)


def test_what_cannot_be_taken_over_is_said_once(files, tmp_path, caplog):
    """A shuffled layer is dequantised, its weight quantised again."""
    source = shutil.copytree(files / "gptq", tmp_path / "shuffled")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.2.mlp.up_proj.g_idx"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    packed = takeover.packed_weights(Checkpoint(source).tensors())
    assert len(packed) == TAKEN - 1
    caplog.set_level(logging.WARNING)
    ir, _ = convert_with(packed, Checkpoint(source), Settings(), tmp_path)
    (said,) = (record.getMessage() for record in caplog.records if "quantised again" in record.getMessage())
    assert said.startswith("⚠️ The checkpoint stores 1 matrices quantised in a way that the IR cannot take over")
    types = Counter(op.get_element_type().get_type_name() for op in ir.get_ops() if op.get_type_name() == "Constant")
    assert types["u4"] == 2 * (TAKEN - 1)


def test_a_matrix_that_is_not_in_the_graph_is_an_error_not_zeros(files, tmp_path):
    checkpoint = Checkpoint(files / "gptq")
    packed = takeover.packed_weights(checkpoint.tensors())
    vision = next(name for name in checkpoint.tensors() if name.startswith("model.vision_model"))
    with pytest.raises(
        RuntimeError, match="1 of 32 quantised matrices are not in the graph, such as model.vision_model"
    ):
        convert_with(packed | {vision: next(iter(packed.values()))}, checkpoint, Settings(), tmp_path)


def test_the_16_bit_ir_holds_the_dequantised_weights(files, inputs, tmp_path):
    model_dir = convert_mllama(files / "gptq", tmp_path / "ov")
    model = MllamaForConditionalGeneration.from_pretrained(files / "source", dtype=torch.float32).eval()
    for name, tensor in Checkpoint(files / "gptq").tensors().items():
        model.get_parameter(name).data = tensor.read().float()
    with torch.no_grad():
        expected = model(**inputs).logits
    assert (OVMLlamaForConditionalGeneration(model_dir, ov_config=F32)(**inputs).logits - expected).abs().max() < 1e-3


def test_a_variant_that_is_not_read_is_refused_before_anything_is_written(files, tmp_path):
    source = shutil.copytree(files / "gptq", tmp_path / "marlin")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="GPTQ in the layout 'marlin', which is not read: convert the 16-bit"):
        convert_mllama(source, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()
