"""Models in GGUF, in Ollama's folder or not: read exactly, and taken over as they are quantised.

`gguf_files.py` writes them, from the same tables as the reader but without its code; `gguf` dequantises.
"""

import json
import logging
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from gguf import GGUFReader
from gguf_files import F16 as F16_TYPE
from gguf_files import F32 as F32_TYPE
from gguf_files import (
    LICENSES,
    add_blob,
    blob_path,
    expected_tensors,
    make_wide_checkpoint,
    manifest_path,
    write_generation_1,
    write_generation_2,
    write_ollama,
    write_text_model,
)
from PIL import Image
from test_source_gptq import kind, unpacked, weight_types
from transformers import AutoProcessor, MllamaForConditionalGeneration

from conftest import F32
from notebook_utils import follow
from ov_mllama.__main__ import argument_parser
from ov_mllama.export.check_gguf import GATES, rows_of
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_language_model, convert_mllama, of_both
from ov_mllama.export.prepare import default_folder, plan_here, prepare
from ov_mllama.export.sources.gguf import read_gguf
from ov_mllama.export.sources.gguf_names import tensors_of
from ov_mllama.export.sources.ollama import all_models, find_model
from ov_mllama.export.takeover import packed_bytes, packed_weights, take_over
from ov_mllama.runtime.errors import DiskError, InputError, NotFoundError
from ov_mllama.runtime.ir import display_name, ir_stamp
from ov_mllama.runtime.reference import META
from ov_mllama_compression import compress
from ov_mllama_helper import OVMLlamaForConditionalGeneration


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and its files of both generations."""
    folder = tmp_path_factory.mktemp("gguf")
    source = make_wide_checkpoint(folder / "source")
    one = write_generation_1(source, folder / "text.gguf", folder / "mmproj.gguf")
    quirks = write_generation_2(source, folder / "q" / "quirks.gguf", quirks=True)
    two = write_generation_2(source, folder / "2" / "llama3.2-vision.gguf")
    return SimpleNamespace(source=source, one=one, two=two, quirks=quirks, folder=folder)


@pytest.fixture
def ollama(files, tmp_path, monkeypatch):
    """Ollama's folder with the model of `files`."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    write_ollama(tmp_path / "ollama", "llama3.2-vision", [files.two])
    return tmp_path / "ollama"


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    """The IRs of the second generation."""
    return convert_mllama(files.two, tmp_path_factory.mktemp("ov"))


# ---- Weights --------------------------------------------------------------------------------------------------------


def test_headers_equal_what_gguf_reads(files):
    for path in (files.two, *files.one):
        read, expected = read_gguf(path), GGUFReader(path)
        assert {name: field.contents() for name, field in expected.fields.items() if "GGUF." not in name} == (
            read.metadata
        )
        for tensor in expected.tensors:
            stored = read.tensors[tensor.name]
            assert (stored.kind, stored.shape) == (tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]))
            assert stored.data.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("name", ["one", "two", "quirks"])
def test_tensors_equal_the_checkpoints_or_what_gguf_dequantises(files, name):
    paths = getattr(files, name)
    paths = paths if isinstance(paths, tuple) else (paths,)
    checkpoint = Checkpoint(",".join(map(str, paths)))
    tensors, expected = checkpoint.tensors(), expected_tensors(files.source, *paths)
    assert tensors.keys() == expected.keys()
    for place, tensor in tensors.items():
        value = tensor.read()
        assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype), place
        if not tensor.pack:
            quantised = "attn.v_proj" in place and "vision" in place and name != "one"
            # Ollama's second generation quantises the vision tower's value projections, which are read in 16 bit
            torch.testing.assert_close(value.float(), expected[place], rtol=2**-11 * quantised, atol=0)
            continue
        packed, largest = tensor.pack(), float(expected[place].abs().max())
        zero_points = 0 if packed.zero_points is None else packed.zero_points
        weight = ((packed.values - np.float32(zero_points)) * packed.scales).reshape(tensor.shape)
        assert np.abs(weight - expected[place].numpy()).max() <= 1e-6 * largest, place
        assert np.isfinite(weight).all()
        torch.testing.assert_close(value.float(), expected[place], rtol=2**-11, atol=2**-24)
    assert checkpoint.own_form == "q4_k_m"


@pytest.mark.parametrize("types", ["f16", "q8_0"])
def test_other_types(files, tmp_path, types):
    path = write_generation_2(files.source, tmp_path / "other.gguf", types=types)
    checkpoint, expected = Checkpoint(path), expected_tensors(files.source, path)
    assert checkpoint.own_form == ("" if types == "f16" else "q8_0")
    for place, tensor in checkpoint.tensors().items():
        torch.testing.assert_close(tensor.read().float(), expected[place], rtol=2**-11 * bool(tensor.pack), atol=2**-24)
    convert_mllama(path, tmp_path / "ov")
    language = "openvino_language_model.xml" if types == "f16" else "llm_q8_0.xml"
    model = OVMLlamaForConditionalGeneration(tmp_path / "ov", language_model_name=language, ov_config=F32)
    assert (model(**inputs_for(tmp_path / "ov")).logits - logits_of(files, path, tmp_path / "ov")).abs().max() < 1e-3


def test_cross_attention_in_the_other_order_of_rows(files):
    file = read_gguf(files.two)
    config = Checkpoint(files.two).config
    as_stored, undone = (tensors_of([file], config, reordered_cross=undo) for undo in (False, True))
    changed = {name for name in undone if not torch.equal(undone[name].read(), as_stored[name].read())}
    assert changed == {name for name in undone if ".cross_attn.q_proj" in name or ".cross_attn.k_proj" in name}


# ---- IRs ------------------------------------------------------------------------------------------------------------


def inputs_for(model_dir):
    processor = AutoProcessor.from_pretrained(model_dir, backend="pil")
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 90, 3), np.uint8))
    return processor(
        text="<|begin_of_text|>Two<|image|>words", images=[image], add_special_tokens=False, return_tensors="pt"
    )


def logits_of(files, path, model_dir):
    """The logits of transformers' model with dequantised weights, which follows Meta's reference."""
    model = MllamaForConditionalGeneration.from_pretrained(files.source, dtype=torch.float32).eval()
    for name, value in expected_tensors(files.source, path).items():
        model.get_parameter(name).data = value.clone()
    with torch.no_grad():
        return follow(model, META)(**inputs_for(model_dir)).logits


def test_logits_are_those_of_the_dequantised_weights(files, converted):
    expected = logits_of(files, files.two, converted)
    model = OVMLlamaForConditionalGeneration(converted, language_model_name="llm_q4_k_m.xml", ov_config=F32)
    assert model.language_model.gives_queries
    actual = model(**inputs_for(converted)).logits
    assert expected.std() > 0.3
    assert (actual - expected).abs().max() < 1e-3  # of image keys and values in 16 bit; another quantisation: 1


def test_every_matrix_is_computed_as_it_is_stored(files, converted):
    compiled = ov.Core().compile_model(converted / "llm_q4_k_m.xml", "CPU")
    layers = 3 * 7 + 2 * 5 + 1  # self-attention, cross-attention, head
    types = weight_types(compiled)
    assert types["u4"] + types["i8"] == sum(types.values()) == layers
    assert types["i8"] > 1
    gathers = [op for op in compiled.get_runtime_model().get_ops() if kind(op) == "Gather"]
    assert "u4" in {op.input(0).get_element_type().get_type_name() for op in gathers}
    ir = ov.Core().read_model(converted / "llm_q4_k_m.xml")
    values = [op for op in ir.get_ops() if op.get_type_name() == "Constant" and op.get_element_type() == ov.Type.u4]
    packed = [tensor.pack() for tensor in Checkpoint(files.two).tensors().values() if tensor.pack]
    assert Counter(unpacked(op).tobytes() for op in values) <= Counter(each.values.tobytes() for each in packed)


def test_integers_and_scales_are_mapped_from_an_unnamed_file(files, tmp_path):
    checkpoint = Checkpoint(files.two)
    packed = packed_weights(checkpoint.tensors())
    model = checkpoint.load(scratch=tmp_path, needed=partial(of_both, packed))
    ir = convert_language_model(model, META)
    data = take_over(ir, model, packed, tmp_path)
    assert isinstance(data, np.memmap)
    assert not [*tmp_path.iterdir()]
    constants = [op for op in ir.get_ops() if op.get_type_name() == "Constant"]
    inside = [op for op in constants if 0 <= op.data.ctypes.data - data.ctypes.data < len(data)]
    assert sum(op.get_byte_size() for op in inside) == packed_bytes(checkpoint.tensors())
    assert sum(op.get_byte_size() for op in constants if op not in inside) < 0.02 * len(data)


def test_it_is_stamped_and_needs_no_compression(files, converted, caplog):
    stamp = ir_stamp(converted / "llm_q4_k_m.xml")
    assert (stamp["format"], stamp["taken_over"], stamp["row_mask"]) == ("q4_k_m", "all", "on")
    assert display_name(converted, stamp, stamp, "CPU") == f"{converted.name} · Q4_K_M, pictures Q4_K_M · CPU"
    caplog.set_level(logging.INFO)
    for checkpoint in (None, files.two):
        assert compress(converted, checkpoint=checkpoint) == converted / "llm_q4_k_m.xml"
    assert caplog.text.count("there is nothing to compress") == 2
    before = (converted / "llm_q4_k_m.bin").stat().st_mtime_ns
    convert_mllama(files.two, converted)
    assert (converted / "llm_q4_k_m.bin").stat().st_mtime_ns == before


def test_weights_of_another_file_are_not_compressed_into_its_folder(files, converted):
    with pytest.raises(InputError, match="was converted from another checkpoint"):
        compress(converted, checkpoint=files.quirks)


def test_a_type_that_is_not_taken_over_is_compressed_with_the_rest(files, tmp_path):
    weight = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float16)
    path = write_generation_2(
        files.source, tmp_path / "mixed.gguf", tensors={"blk.0.ffn_up.weight": (weight, F16_TYPE)}
    )
    assert Checkpoint(path).own_form == ""
    prepare(path, tmp_path / "ov")
    types = weight_types(ov.Core().compile_model(tmp_path / "ov" / "llm_int4_asym_r10_gs64.xml", "CPU"))
    assert types["u4"] + types["i8"] + types["u8"] == sum(types.values())
    assert types["u8"] == 1


# ---- Ollama's folder ------------------------------------------------------------------------------------------------


def test_prepare_by_ollamas_name(ollama, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    name = "ollama:llama3.2-vision"
    folder = default_folder(name)
    assert folder.as_posix() == "models/llama3.2-vision"
    assert default_folder(f"{name}:latest") == folder
    for longer in ("library/llama3.2-vision", "registry.ollama.ai/library/llama3.2-vision:latest"):
        assert default_folder(f"ollama:{longer}") == folder
    assert default_folder(f"{name}:90b").name == "llama3.2-vision-90b"
    steps = str(plan_here(name, folder, for_chat=True))
    assert "take over the language model, Q4_K_M as it is stored" in steps
    prepare(name, folder)
    assert {path.name for path in folder.glob("*.xml")} == {
        "llm_q4_k_m.xml",
        "openvino_vision_encoder.xml",
        "openvino_vision_encoder_int8_wc.xml",
    }
    assert [(folder / f"license-{number}.txt").read_text() for number in (1, 2)] == list(LICENSES)
    assert caplog.text.count("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT") == 1
    caplog.clear()
    prepare(name, folder)
    assert "LICENSE AGREEMENT" not in caplog.text
    assert default_folder(name) == folder
    assert "done already" in str(plan_here(name, folder, for_chat=True))
    model = OVMLlamaForConditionalGeneration(folder, language_model_name="llm_q4_k_m.xml")
    assert model.generate(**inputs_for(folder), max_new_tokens=3).shape[1] > 3


def test_models_are_listed(ollama, files, tmp_path, capsys):
    write_ollama(ollama, "library/phi4", [write_text_model(tmp_path / "phi.gguf", "phi3")], tag="14b")
    write_ollama(ollama, "someone/llama3.2-vision", [*files.one], tag="old")
    manifest_path(ollama, "broken").parent.mkdir(parents=True)
    manifest_path(ollama, "broken").write_text("{")
    huge = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{64 * 'a'}", "size": 10**400}
    manifest_path(ollama, "broken", "huge").write_text(json.dumps({"layers": [huge]}))
    manifest_path(ollama, "broken", ".DS_Store").write_text("of a file manager")
    options = argument_parser().parse_args(["models"])
    options.run(options)
    rows = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines()[2:]}
    for broken in ("broken:latest", "broken:huge"):
        assert "is no manifest of Ollama's" in rows.pop(broken)
    assert "no: another architecture, phi3" in rows.pop("phi4:14b")
    assert rows.pop("llama3.2-vision:latest").endswith("ollama:llama3.2-vision:latest |")
    assert rows.pop("someone/llama3.2-vision:old").endswith("ollama:someone/llama3.2-vision:old |")
    assert not rows
    assert Checkpoint("ollama:someone/llama3.2-vision:old").own_form == "q4_k_m"


def test_the_other_half_beside_a_file_is_found(files):
    for path in files.one:
        assert Checkpoint(path).own_form == "q4_k_m"


def test_the_other_half_is_found_among_other_files(files, tmp_path):
    text, projector = (shutil.copy(path, tmp_path / path.name.upper()) for path in files.one)
    write_text_model(tmp_path / "phi.gguf", "phi3")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    (tmp_path / "folder.gguf").mkdir()
    shutil.copy(files.two, tmp_path)
    for path in (text, projector):
        assert len(Checkpoint(path).source.weights) == 2
    shutil.copy(projector, tmp_path / "old.gguf")
    refused(text, tmp_path / "ov", "several other halves", "MMPROJ.GGUF, old.gguf", "MODEL.gguf,PROJECTOR.gguf")


@pytest.mark.parametrize("name", ["a, b.gguf", "c,d/e.gguf", "f.GGUF"])
def test_any_path_may_be_given(files, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(files.two, path)
    assert Checkpoint(path).origin == str(path)
    assert default_folder(path).name == path.stem


def test_a_folder_is_no_file_whatever_its_name(files, tmp_path):
    shutil.copytree(files.source, tmp_path / "model.gguf")
    assert Checkpoint(tmp_path / "model.gguf").source.kind == "16-bit safetensors"


def test_check_compares_with_the_real_file_and_both_orders(files, tmp_path, capsys):
    options = argument_parser().parse_args(["check", str(files.two), "--captions", "1", "--out", str(tmp_path)])
    options.run(options)
    said = capsys.readouterr().out
    assert "| tensors | 908 | 149 | different |" in said
    assert "| SHA-256, 0.009 GB | 9999d473417a |" in said
    assert "| blk.3.cross_attn_attn_gate | 0.000545501709 |" in said
    put_back, stored = map(float, re.search(r"\| (-\d+\.\d+) \| (-\d+\.\d+) \|", said).groups())
    assert put_back != stored
    file, config = read_gguf(files.two), Checkpoint(files.two).config
    gate = {
        name: replace(file.tensors[name], data=np.float32([value]).view(np.uint8)[None])
        for name, value in GATES.items()
    }
    rows = rows_of([replace(file, tensors=file.tensors | gate)])
    assert [row[-1] for row in rows] == ["different", "different", "equal", "equal"]
    assert config.text_config.num_hidden_layers == 5


# ---- Refusals -------------------------------------------------------------------------------------------------------


def refused(name, folder, *said):
    """Check that a model is refused with one sentence, before anything is written."""
    for attempt in (plan_here, convert_mllama):
        with pytest.raises((InputError, NotFoundError)) as error:
            attempt(name, folder)
        assert all(part in str(error.value) for part in said), error.value
        assert "\n" not in str(error.value)
        assert not folder.exists()


def test_files_of_ollama_0_7_0_are_refused(files, tmp_path):
    path = write_generation_2(files.source, tmp_path / "2a.gguf", raw_vision=True)
    refused(path, tmp_path / "ov", "only Ollama 0.7.0 wrote", "ollama pull llama3.2-vision")


def test_halves_are_refused(files, tmp_path):
    for path, said in zip(files.one, ("without its vision encoder", "without its language model"), strict=True):
        (tmp_path / path.stem).mkdir()
        alone = shutil.copy(path, tmp_path / path.stem / "alone.gguf")
        refused(alone, tmp_path / "ov", said, "MODEL.gguf,PROJECTOR.gguf")
    refused(f"{files.two},{files.two}", tmp_path / "ov", "as the other file does")
    phi = write_text_model(tmp_path / "phi.gguf", "phi3")
    refused(f"{files.two},{phi}", tmp_path / "ov", f"{phi} is no part of Llama 3.2 Vision (phi3)")


@pytest.mark.parametrize("architecture", ["llama", "clip", "qwen2vl"])
def test_other_models_are_refused(tmp_path, architecture):
    refused(write_text_model(tmp_path / "x.gguf", architecture), tmp_path / "ov", architecture)


def test_what_ollamas_folder_lacks_is_said(ollama, files, tmp_path):
    out = tmp_path / "ov"
    refused("ollama:llama3.3", out, "ollama:llama3.3:latest is not in", "ollama pull llama3.3:latest")
    refused("ollama:llama3.2-vision:90b", out, "ollama pull llama3.2-vision:90b", "ov-mllama models")
    for name in ("ollama:../../etc/passwd", "ollama:a/b/c/d", "ollama:", "ollama:x:../y", "ollama:/x", "ollama:x y"):
        refused(name, out, "is no name of Ollama's")
    model = blob_path(ollama, add_blob(ollama, "x", files.two)["digest"])
    model.write_bytes(model.read_bytes()[:-1])
    refused(
        "ollama:llama3.2-vision", out, f"of {files.two.stat().st_size:,} bytes", "ollama pull llama3.2-vision:latest"
    )
    model.unlink()
    refused("ollama:llama3.2-vision", out, "is missing", "ollama pull llama3.2-vision:latest")
    manifest_path(ollama, "llama3.2-vision").write_text('{"layers": [{"digest": "sha256:../../x", "size": 1}]}')
    refused("ollama:llama3.2-vision", out, "is no manifest of Ollama's")


def test_layers_of_other_models(ollama, tmp_path, caplog):
    path = manifest_path(ollama, "llama3.2-vision")
    manifest = json.loads(path.read_text())
    for layer in ("system", "messages", "tensor"):
        manifest["layers"].append(add_blob(ollama, f"application/vnd.ollama.image.{layer}", layer.encode()))
        path.write_text(json.dumps(manifest))
        if layer != "tensor":
            caplog.clear()
            Checkpoint("ollama:llama3.2-vision")
    assert caplog.text.count("of its own, which") == 2
    refused("ollama:llama3.2-vision", tmp_path / "ov", "stored as MLX tensors")


def test_a_registry_with_a_port_is_a_host(ollama, files):
    write_ollama(ollama, "localhost:5000/me/llama3.2-vision", [files.two], tag="1")
    assert Checkpoint("ollama:localhost:5000/me/llama3.2-vision:1").own_form == "q4_k_m"


def test_ollamas_folder_of_an_unknown_user_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("OLLAMA_MODELS", "~no-such-user/models")
    refused("ollama:llama3.2-vision", tmp_path / "ov", "unknown user")


def test_what_this_user_may_not_read_is_named(ollama, monkeypatch, caplog):
    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.is_file", deny)
    with pytest.raises(DiskError, match="vision.latest cannot be read .Permission denied.: run this as a user who may"):
        find_model("ollama:llama3.2-vision")
    assert not [*all_models()]
    assert "cannot be read (Permission denied): run this as a user who may" in caplog.text


@pytest.mark.parametrize("name", ["llama3.2-vision", "llama3.2-vision:latest"])
def test_ollamas_name_without_its_prefix_is_told(ollama, tmp_path, name):
    refused(name, tmp_path / "ov", f"is a model of Ollama's here: write ollama:{name}.")


def test_a_draft_model_in_gguf_is_refused(files):
    with pytest.raises(InputError, match="a draft model in GGUF is not read"):
        Checkpoint(files.two, "llama")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_freqs.weight": (np.full(16, 3, np.float32), F32_TYPE)}, "other factors than Llama 3's"),
        ({"blk.0.ffn_up.weight": None}, "1 of 147 tensors are missing"),
        (
            {"blk.0.more.weight": (np.zeros(16, np.float32), F32_TYPE)},
            "1 are unexpected, such as",
        ),
        ({"blk.0.ffn_up.weight": (np.zeros((16, 32), np.float32), F32_TYPE)}, "1 have another shape"),
        (
            {"v.global.blk.0.attn_gate": (np.zeros(2, np.float32), F32_TYPE)},
            "is no single float32 number",
        ),
        (
            {"v.global.blk.0.attn_gate": (np.full(1, np.nan, np.float32), F32_TYPE)},
            "only Ollama 0.7.0 wrote",
        ),
    ],
)
def test_other_tensors_are_refused(files, tmp_path, changes, said):
    refused(write_generation_2(files.source, tmp_path / "x.gguf", tensors=changes), tmp_path / "ov", said)


@pytest.mark.parametrize(
    ("name", "place"), [("blk.0.ffn_up.weight", 0), ("blk.0.ffn_up.weight", 2), ("output.weight", 208)]
)
@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_factors_that_are_no_numbers_are_refused(files, tmp_path, name, place, factor):
    stored = read_gguf(files.two).tensors[name]
    blocks = stored.data.copy()
    blocks[0, place : place + 2] = np.array([factor], np.float16).view(np.uint8)
    path = write_generation_2(files.source, tmp_path / "x.gguf", tensors={name: (blocks, stored.kind)})
    with pytest.raises(InputError, match="has NaN or infinity among its scales"):
        convert_mllama(path, tmp_path / "ov")
    assert not [*tmp_path.glob("ov/llm_*")]


def test_files_of_another_kind_are_refused(files, tmp_path):
    refused(tmp_path / "none.gguf", tmp_path / "ov", "does not exist")
    (tmp_path / "empty.gguf").write_bytes(b"")
    refused(tmp_path / "empty.gguf", tmp_path / "ov", "is no GGUF file")
    (tmp_path / "page.gguf").write_text("<html>")
    refused(tmp_path / "page.gguf", tmp_path / "ov", "a web page")
    (tmp_path / "folder").mkdir()
    shutil.copy(files.two, tmp_path / "folder")
    refused(tmp_path / "folder", tmp_path / "ov", files.two.name, "give the file itself")
