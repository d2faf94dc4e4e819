"""Files that convert_mllama writes and reuses, and its errors."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import openvino as ov
import pytest
import torch
from safetensors import safe_open

from conftest import ROOT
from ov_mllama.export import checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.sources import hub
from ov_mllama.export.sources.tensors import Tensor, weight_dtype
from ov_mllama.runtime import ir, memory
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, ir_stamp
from ov_mllama.runtime.shapes import QUERIES
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint


@pytest.fixture(scope="module")
def vision_ir(pair):
    return ov.Core().read_model(pair.model_dir / VISION_ENCODER_NAME)


@pytest.fixture(scope="module")
def language_ir(pair):
    return ov.Core().read_model(pair.model_dir / LANGUAGE_MODEL_NAME)


def names(ports):
    return [port.get_any_name() for port in ports]


def node_types(model):
    return [op.get_type_name() for op in model.get_ops()]


# ---- The graphs ----


def test_ports(pair, vision_ir, language_ir):
    cross = pair.ov.shapes.cross_kv_names
    assert cross == [f"cross_attn_key_values.{i}.{part}" for i in (1, 3) for part in ("key", "value")]
    assert names(vision_ir.inputs) == ["pixel_values", "aspect_ratio_ids", "real_tiles", "tile_counts"]
    assert names(vision_ir.outputs) == cross
    assert sorted(names(language_ir.inputs)) == sorted(
        ["input_ids", "attention_mask", "position_ids", "beam_idx", "logits_to_keep"]
        + ["cross_attention_bias", "sees_image", *cross]
    )
    assert names(language_ir.outputs) == ["logits", QUERIES]


def test_text_cache_is_state_and_image_cache_is_not(pair, language_ir):
    """Both have "key_values" in their names: choosing states by substring takes the pictures in too."""
    assert len(language_ir.get_variables()) == 2 * len(pair.ov.shapes.self_layers)
    for name in pair.ov.shapes.cross_kv_names:
        consumers = language_ir.input(name).get_target_inputs()
        assert {consumer.get_node().get_type_name() for consumer in consumers} == {"MatMul"}


def test_image_heads_are_not_repeated(pair, vision_ir):
    kv_heads = pair.ov.shapes.num_kv_heads
    assert kv_heads < pair.ov.shapes.num_heads
    assert {port.partial_shape[1].get_length() for port in vision_ir.outputs} == {kv_heads}


def test_vision_attention_needs_no_mask_of_rows_by_rows(pair, vision_ir):
    """Valid-first: two attentions a layer; beside query, key and value (and scale) at most a bias for each key."""
    attentions = [op for op in vision_ir.get_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    vision = pair.ov.config.vision_config
    assert len(attentions) == 2 * (vision.num_hidden_layers + vision.num_global_layers)
    for op in attentions:
        masks = [i.get_partial_shape() for i in op.input_values()[3:] if i.get_partial_shape().rank.get_length() >= 2]
        assert all([axis.to_string() for axis in mask][:3] == ["1", "1", "1"] for mask in masks)


def test_plugin_fuses_the_text_cache(pair):
    compiled = ov.Core().compile_model(pair.model_dir / LANGUAGE_MODEL_NAME, "CPU")

    def kind(op):
        return op.get_rt_info()["layerType"].astype(str)

    attentions = [op for op in compiled.get_runtime_model().get_ops() if kind(op) == "ScaledDotProductAttention"]
    assert len(attentions) == len(pair.ov.shapes.self_layers)
    for op in attentions:
        # unfused, key and value would come through Concat, Gather and Broadcast nodes
        assert [kind(value.get_node()) for value in op.input_values()].count("MemoryInput") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16bit_weights_stay_as_they_are(tmp_path, dtype):
    """Each linear layer's constant is bit for bit the checkpoint's tensor."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    model = ov.Core().read_model(convert_mllama(checkpoint, tmp_path / "ov") / LANGUAGE_MODEL_NAME)
    wide = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant" and op.get_element_type() in (ov.Type.bf16, ov.Type.f16):
            # an equal array type on both sides: the raw 16 bits
            wide[tuple(op.shape), op.get_data().view("uint16").tobytes()] = op
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        linear = [n for n in file.keys() if "language_model" in n and n.endswith("proj.weight")]  # noqa: SIM118
        cross = [n for n in linear if ".cross_attn.k_proj" in n or ".cross_attn.v_proj" in n]
        assert len(cross) == 4  # these live in the vision IR
        for name in set(linear) - set(cross):
            tensor = file.get_tensor(name)
            assert (tuple(tensor.shape), tensor.view(torch.uint16).numpy().tobytes()) in wide, name


def test_weights_dequantised_to_float16_keep_their_bits():
    half = Tensor((2, 2), torch.float16, lambda: torch.zeros(2, 2).half())
    brain = Tensor((9, 9), torch.bfloat16, lambda: torch.zeros(9, 9).bfloat16(), mapped=True)
    assert weight_dtype({"few": half, "many": brain}) == torch.float16
    assert weight_dtype({"few": replace(half, mapped=True), "many": brain}) == torch.bfloat16


def test_float32_checkpoints_are_stored_as_float16(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    model = ov.Core().read_model(convert_mllama(checkpoint, tmp_path / "ov") / LANGUAGE_MODEL_NAME)
    large = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.get_data().flat) > 1000]
    assert {op.get_element_type() for op in large} == {ov.Type.f16}


# ---- Files ----


def test_folder_is_complete(pair):
    present = {path.name for path in pair.model_dir.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= present
    assert {"openvino_vision_encoder.bin", "openvino_language_model.bin"} <= present
    assert not [name for name in present if name.startswith(".partial")]


def test_second_run_reuses(pair, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_: pytest.fail("loaded the checkpoint again"))
    assert convert_mllama(pair.checkpoint, pair.model_dir) == pair.model_dir


def test_only_what_is_missing_is_made(pair, copy):
    kept = (copy / VISION_ENCODER_NAME).stat().st_mtime_ns
    (copy / LANGUAGE_MODEL_NAME).unlink()
    convert_mllama(pair.checkpoint, copy)
    assert (copy / VISION_ENCODER_NAME).stat().st_mtime_ns == kept
    OVMLlamaForConditionalGeneration(copy)


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_truncated_files_are_noticed_and_rebuilt(pair, copy, suffix):
    path = (copy / LANGUAGE_MODEL_NAME).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="convert again"):
        OVMLlamaForConditionalGeneration(copy)
    convert_mllama(pair.checkpoint, copy)
    assert ir_stamp(copy / LANGUAGE_MODEL_NAME) == ir_stamp(pair.model_dir / LANGUAGE_MODEL_NAME)
    OVMLlamaForConditionalGeneration(copy)


def test_interrupted_run_leaves_nothing_that_passes_for_finished(pair, tmp_path, monkeypatch):
    save = ov.save_model

    def interrupted(model, path, **kwargs):
        save(model, path, **kwargs)
        if "language" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(ov, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_mllama(pair.checkpoint, tmp_path)
    monkeypatch.undo()
    assert ir_stamp(tmp_path / VISION_ENCODER_NAME)
    assert not (tmp_path / LANGUAGE_MODEL_NAME).exists()
    with pytest.raises(FileNotFoundError, match="convert_mllama"):
        OVMLlamaForConditionalGeneration(tmp_path)
    (tmp_path / ".partial-killed").mkdir()  # what a killed process leaves
    convert_mllama(pair.checkpoint, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in pair.model_dir.iterdir()}


def test_full_disk_keeps_what_was_there(pair, copy, monkeypatch):
    def full(model, path, **_):
        path.with_suffix(".bin").write_bytes(b"half")
        raise RuntimeError("basic_ios::clear: iostream error")  # what OpenVINO 2026.4 raises on a full tmpfs

    before = {path.name: path.stat().st_size for path in copy.iterdir()}
    monkeypatch.setattr(ov, "save_model", full)
    model = ov.Core().read_model(copy / LANGUAGE_MODEL_NAME)
    with pytest.raises(OSError, match="disk full"):
        ir.save_ir(model, copy / LANGUAGE_MODEL_NAME, {"checkpoint": "another"})
    assert {path.name: path.stat().st_size for path in copy.iterdir()} == before


@pytest.mark.parametrize(
    ("module", "function", "answer", "error"),
    [
        ("shutil", "disk_usage", SimpleNamespace(free=1000), OSError),
        ("psutil", "virtual_memory", SimpleNamespace(available=1000), MemoryError),
    ],
)
def test_too_little_room_is_said_before_anything_is_written(
    pair, tmp_path, monkeypatch, module, function, answer, error
):
    monkeypatch.setattr(getattr(memory, module), function, lambda *_: answer)
    with pytest.raises(error, match="only .* GB are (free|available)"):
        convert_mllama(pair.checkpoint, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_checkpoint_is_converted_anew(pair, copy, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=5)
    before = ir_stamp(copy / LANGUAGE_MODEL_NAME)
    convert_mllama(other, copy)
    assert ir_stamp(copy / LANGUAGE_MODEL_NAME) != before


# ---- Refusals: a sentence that names the fix ----


def test_other_converter_version(pair, copy):
    for name in (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME):
        text = (copy / name).read_text()
        (copy / name).write_text(re.sub('(<converter_version value=)"[0-9]+"', r'\1"0"', text))
    with pytest.raises(ValueError, match="converter version 0.*run convert_mllama again"):
        OVMLlamaForConditionalGeneration(copy)
    convert_mllama(pair.checkpoint, copy)
    OVMLlamaForConditionalGeneration(copy)


def test_parts_of_different_checkpoints(pair, copy, tmp_path):
    other = convert_mllama(make_checkpoint(tmp_path / "other", seed=5), tmp_path / "other-ov")
    for suffix in (".xml", ".bin"):
        shutil.copy((other / VISION_ENCODER_NAME).with_suffix(suffix), copy)
    with pytest.raises(ValueError, match="different checkpoints"):
        OVMLlamaForConditionalGeneration(copy)


def test_ir_missing(pair):
    with pytest.raises(FileNotFoundError, match="run convert_mllama and compress_language_model, or choose another"):
        OVMLlamaForConditionalGeneration(pair.model_dir, language_model_name="llm_int4.xml")


def test_not_a_mllama_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' checkpoint.*Llama 3.2 Vision"):
        convert_mllama(tmp_path, tmp_path / "ov")


def test_no_weights(pair, tmp_path):
    shutil.copy(pair.checkpoint / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no \\*.safetensors weights"):
        convert_mllama(tmp_path, tmp_path / "ov")


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        convert_mllama(tmp_path, tmp_path / "ov")


def hub_response(status: int, code: str | None = None):
    import httpx

    request = httpx.Request("GET", "https://huggingface.co/api/models/meta-llama/x")
    return httpx.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)


def hub_raises(monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)


def test_gated_repository(tmp_path, monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    hub_raises(monkeypatch, GatedRepoError("gated", response=hub_response(403, "GatedRepo")))
    with pytest.raises(PermissionError, match="accept its licence.*HF_TOKEN"):
        convert_mllama("meta-llama/Llama-3.2-11B-Vision-Instruct", tmp_path)


def test_unknown_repository(tmp_path, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    hub_raises(monkeypatch, RepositoryNotFoundError("none", response=hub_response(401, "RepoNotFound")))
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository"):
        convert_mllama("meta-llama/Llama-9", tmp_path)


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository"):
        convert_mllama(tmp_path / "not" / "here", tmp_path / "ov")


def test_no_network(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub_raises(monkeypatch, LocalEntryNotFoundError("cannot reach the hub"))
    with pytest.raises(FileNotFoundError, match="check the network"):
        convert_mllama("meta-llama/Llama-3.2-11B-Vision-Instruct", tmp_path)


# ---- The converter's version ----

GRAPHS = ROOT / "tests/graphs.json"  # the graphs of CONVERTER_VERSION, by name of the file


def graph_fingerprint(path) -> str:
    """Of a graph's ports, operations and how they are connected; not of its weights and names."""
    model, numbers, lines = ov.Core().read_model(path), {}, []
    for number, op in enumerate(model.get_ordered_ops()):
        numbers[op.get_friendly_name()] = number
        inputs = [numbers[value.get_node().get_friendly_name()] for value in op.input_values()]
        outputs = [f"{out.get_element_type()}{out.get_partial_shape()}" for out in op.outputs()]
        lines.append(f"{op.get_type_name()} {inputs} {outputs}")
    lines += [
        f"{port.get_any_name()} {port.element_type}{port.partial_shape}" for port in [*model.inputs, *model.outputs]
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_a_graph_that_changes_has_a_new_version(pair):
    """After a change: raise CONVERTER_VERSION, unless the comment there has an exception, say in CHANGELOG.md what it
    costs, and write what this prints."""
    known = json.loads(GRAPHS.read_text())
    now = {name: graph_fingerprint(pair.model_dir / name) for name in (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)}
    assert known == {"converter_version": ir.CONVERTER_VERSION, **now}, json.dumps(now)


def test_the_changelog_knows_the_version():
    assert f"## Converter version {ir.CONVERTER_VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()
