"""Checkpoints that are broken, incomplete or another's: refused before anything is written, never mixed in a folder."""

import json
import os
import shutil
import warnings
from pathlib import Path

import openvino as ov
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlamaForCausalLM

from conftest import DEMO, F32
from ov_mllama.export import checkpoint as checkpoints
from ov_mllama.export import compress as compressing
from ov_mllama.export import convert
from ov_mllama.export.checkpoint import Checkpoint, checkpoint_fingerprint, load_checkpoint
from ov_mllama.export.compress import make_draft_model
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.prepare import plan_here
from ov_mllama.export.sources import files, hub
from ov_mllama.runtime import companions
from ov_mllama.runtime.ir import (
    DRAFT_FOLDER,
    DRAFT_MODEL_NAME,
    LANGUAGE_MODEL_NAME,
    VISION_ENCODER_NAME,
    check_model_dir,
    fingerprint,
)
from ov_mllama_compression import compress
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint, make_llama

IRS = (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)
DRAFT = DEMO / "draft"
GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)


def changed(source: Path, folder: Path, change) -> Path:
    """A copy of a checkpoint with the tensors that `change` makes of its own."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.py", "samples", "draft", "__pycache__"))
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(rename):
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def reshaped(tensors: dict) -> dict:
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    return tensors | {name: tensors[name][:-8].contiguous()}


# ---- Tensors without a place ----------------------------------------------------------------------------------------

LEFT_OVER = r"\d+ of \d+ tensors are missing, such as .*; \d+ are unexpected, such as {}.*"
BROKEN = {
    "any prefix": (renamed(lambda name: f"student.net.{name}"), LEFT_OVER.format("student") + "remove 'student.net.'"),
    "no lm_head": (without("lm_head"), "1 of 1?[0-9]+ tensors are missing, such as lm_head.weight"),
    "no cross-attention": (without("cross_attn"), r"\d+ of \d+ tensors are missing, such as .*cross_attn"),
    "no vision": (without("vision_model"), r"\d+ of \d+ tensors are missing, such as .*vision_model"),
    "one layer less": (without("layers.2."), "tensors are missing"),
    "one tensor more": (lambda tensors: tensors | {"extra.weight": torch.zeros(2)}, "1 are unexpected.*extra.weight"),
    "unmerged adapter": (
        lambda tensors: tensors | {"model.x.q_proj.lora_A.weight": torch.zeros(2)},
        "1 are unexpected.*merge_and_unload",
    ),
    "integers": (
        lambda tensors: {name: each.to(torch.int8) if "lm_head" in name else each for name, each in tensors.items()},
        r"1 are integers without scales, such as .*lm_head.weight \(torch.int8\)",
    ),
    "other shape": (reshaped, r"1 have another shape, such as .*lm_head.weight: \[\d+, 64\] instead of \[\d+, 64\]"),
}


PREFIXES = {
    "peft": lambda name: f"base_model.model.{name}",
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "all": lambda name: f"module._orig_mod.base_model.model.{name}",
    "within": lambda name: name.replace("layers.", "layers._orig_mod.module.").replace(
        "proj.weight", "proj.base_layer.weight"
    ),
    "some": lambda name: f"base_model.model.{name}" if "vision" in name else name,
}


@pytest.mark.parametrize("tool", PREFIXES)
def test_what_tools_add_to_names_is_removed(pair, tmp_path, tool):
    source = changed(pair.checkpoint, tmp_path / "prefixed", renamed(PREFIXES[tool]))
    found, expected = Checkpoint(source).tensors(), Checkpoint(pair.checkpoint).tensors()
    assert {*found} == {*expected}
    assert all(torch.equal(found[name].read(), expected[name].read()) for name in expected)


def test_a_tensor_under_two_names_is_refused(pair, tmp_path):
    def doubled(tensors):
        name = next(name for name in tensors if name.endswith("lm_head.weight"))
        return tensors | {f"module.{name}": torch.zeros_like(tensors[name])}

    with pytest.raises(ValueError, match="1 are there twice under different names, such as .*lm_head"):
        convert_mllama(changed(pair.checkpoint, tmp_path / "doubled", doubled), tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_without_a_place_are_refused_before_anything_is_written(pair, tmp_path, case, recwarn, capfd):
    change, said = BROKEN[case]
    broken = changed(pair.checkpoint, tmp_path / "broken", change)
    with pytest.raises(ValueError, match=said) as error:
        convert_mllama(broken, tmp_path / "ov")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_compress_from_a_broken_checkpoint_is_refused(pair, copy, tmp_path, monkeypatch):
    broken = changed(pair.checkpoint, tmp_path / "broken", without("cross_attn"))
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(ValueError, match="another checkpoint.*convert_mllama"):
        compress(copy, checkpoint=broken, group_size=32)
    expected = checkpoint_fingerprint(pair.checkpoint)
    monkeypatch.setattr(checkpoints, "identity", lambda *_: expected)
    with pytest.raises(ValueError, match="tensors are missing"):
        compress(copy, checkpoint=broken, group_size=32)
    assert sorted({path.name for path in copy.iterdir()} - {".lock"}) == sorted({*before} - {".lock"})


@pytest.mark.parametrize("change", [without("layers.1."), BROKEN["any prefix"][0]], ids=["one layer less", "prefix"])
def test_draft_models_tensors_are_checked_too(tmp_path, change):
    broken = changed(DRAFT, tmp_path / "broken", change)
    with pytest.raises(ValueError, match="tensors are missing"):
        make_draft_model(broken, tmp_path / "draft")
    assert not list(tmp_path.glob("draft/*.*ml")) + list(tmp_path.glob("draft/*.json"))


def test_tied_embeddings_and_buffers_of_older_versions_still_convert(pair, tmp_path):
    model = make_llama(512, tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "tied")
    for path in DRAFT.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    make_draft_model(tmp_path / "tied", tmp_path / "draft")

    def older(tensors):
        assert any(
            name.startswith("language_model.model.layers.0.") for name in tensors
        )  # as transformers 4 saved them
        inv_freq = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        return tensors | inv_freq

    convert_mllama(changed(pair.checkpoint, tmp_path / "older", older), tmp_path / "ov", language_model=False)

    def newest(tensors):
        names = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}
        for old, new in names.items():
            tensors = renamed(lambda name, old=old, new=new: name.replace(old, new))(tensors)
        inside = ("vision_model.", "multi_modal_projector.")
        return renamed(lambda name: f"model.{name}" if name.startswith(inside) else name)(tensors)

    convert_mllama(changed(pair.checkpoint, tmp_path / "newest", newest), tmp_path / "ov2", language_model=False)


def split(folder: Path) -> Path:
    """The checkpoint's weights in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / files.INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24\n"
)
SHARD = "model-00002-of-00002.safetensors"
FILES = {
    "pointer": (lambda path: path.write_bytes(POINTER + b"size 12345\n"), "Git LFS pointer.*`git lfs pull`"),
    "web page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>Log in</html>"), "web page"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated.*download it again"),
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "truncated.*download it again"),
    "header cut": (lambda path: os.truncate(path, 100), "no safetensors file.*download it again"),
    "empty": (lambda path: os.truncate(path, 0), "no safetensors file.*download it again"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "no safetensors file.*download it again"),
    "negative": (lambda path: rewrite(path, data_offsets=[-8, 8]), "no valid safetensors file.*download it again"),
    "overlapping": (lambda path: rewrite(path, data_offsets=[0, 2]), "no valid safetensors file.*download it again"),
    "no type": (lambda path: rewrite(path, dtype=["F16"]), r"of the type \['F16'\], which is not read"),
}


def rewrite(path: Path, **entry) -> None:
    """Change the entry of one tensor in a safetensors file's header."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[max(header, key=len)].update(entry)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:] + bytes(8))


def test_values_that_16_bit_lack_are_refused(pair, tmp_path):
    def beyond(tensors):
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        next(iter(tensors.values())).view(-1)[0] = 1e6
        return tensors

    folder = changed(pair.checkpoint, tmp_path / "beyond", beyond)
    with pytest.raises(ValueError, match="holds values beyond torch.float16's 6.55e.04, or NaN: save .* bfloat16"):
        convert_mllama(folder, tmp_path / "ov")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", FILES)
def test_what_is_no_safetensors_file_is_named_with_its_fix(pair, tmp_path, case, sharded):
    folder = changed(pair.checkpoint, tmp_path / "broken", dict)
    path = (split(folder) / SHARD) if sharded else folder / "model.safetensors"
    spoil, said = FILES[case]
    spoil(path)
    for attempt in (lambda: convert_mllama(folder, tmp_path / "ov"), lambda: plan_here(folder, tmp_path / "ov")):
        with pytest.raises(ValueError, match=f"{path.name}.*{said}"):
            attempt()
    assert not (tmp_path / "ov").exists()


def test_shards_that_are_absent_or_without_an_index(pair, tmp_path):
    folder = split(changed(pair.checkpoint, tmp_path / "sharded", dict))
    convert_mllama(folder, tmp_path / "ov", language_model=False)
    (folder / SHARD).rename(tmp_path / SHARD)
    with pytest.raises(ValueError, match=f"1 of the 2 files that .*index.json names are missing, such as {SHARD}"):
        convert_mllama(folder, tmp_path / "new")
    (tmp_path / SHARD).rename(folder / SHARD)
    (folder / files.INDEX).unlink()
    with pytest.raises(ValueError, match="no model.safetensors and no model.safetensors.index.json: download"):
        convert_mllama(folder, tmp_path / "new")
    for path in folder.glob("model-*"):
        path.unlink()
    save_file({"lora_A": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors, but no.*merge_and_unload"):
        convert_mllama(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- Identity -------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_each_tensor_of_a_small_checkpoint(tmp_path):
    folder = changed(DEMO, tmp_path / "demo", dict)
    before, data = checkpoint_fingerprint(folder), bytearray((folder / "model.safetensors").read_bytes())
    header, tensors = files.read_header(folder / "model.safetensors")
    times = (folder / "model.safetensors").stat().st_mtime_ns
    seen = set()
    for tensor in tensors.values():
        place = 8 + len(header) + sum(tensor["data_offsets"]) // 2
        data[place] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        os.utime(folder / "model.safetensors", ns=(times, times))
        seen.add(checkpoint_fingerprint(folder))
        data[place] ^= 1
    assert len(seen) == len(tensors)
    assert before not in seen


def test_fingerprint_of_a_small_checkpoint_is_its_copys(pair, tmp_path):
    shutil.copytree(pair.checkpoint, tmp_path / "copied")
    os.utime(tmp_path / "copied" / "model.safetensors", (1, 1))
    assert checkpoint_fingerprint(tmp_path / "copied") == checkpoint_fingerprint(pair.checkpoint)


def test_fingerprint_of_a_large_checkpoint_takes_headers_sizes_and_times(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FULL_HASH_MAX_BYTES", 1000)
    monkeypatch.setattr(checkpoints, "SAMPLE_BYTES", 1)
    folder = split(changed(pair.checkpoint, tmp_path / "large", dict))
    before = checkpoint_fingerprint(folder)
    assert checkpoint_fingerprint(folder) == before
    blob = shutil.move(folder / SHARD, tmp_path / "blob")  # as in the hub's cache
    (folder / SHARD).symlink_to(blob)
    assert checkpoint_fingerprint(folder) == before
    stat = blob.stat()
    header, tensors = files.read_header(blob)
    data = bytearray(blob.read_bytes())
    data[8 + len(header) + next(iter(tensors.values()))["data_offsets"][0] + 3] ^= 1
    blob.write_bytes(data)
    os.utime(blob, ns=(stat.st_mtime_ns, stat.st_mtime_ns + 1))
    assert checkpoint_fingerprint(folder) != before


def test_weights_stamp_of_an_ir_does_not_depend_on_times(pair, copy):
    path = (copy / LANGUAGE_MODEL_NAME).with_suffix(".bin")
    os.utime(path, (1, 1))
    assert fingerprint(path) == fingerprint((pair.model_dir / LANGUAGE_MODEL_NAME).with_suffix(".bin"))
    check_model_dir(copy, IRS)


# ---- Companions -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoint A with a golden answer and a chat template, B of the same shapes without either and another tokenizer;
    their conversions."""
    folder = tmp_path_factory.mktemp("two")
    first, second = make_checkpoint(folder / "A", seed=1), make_checkpoint(folder / "B", seed=2)
    for name in ("golden.json", "golden.png"):
        shutil.copy(DEMO / name, first)
    (second / "chat_template.jinja").unlink()
    (second / "generation_config.json").unlink()
    tokenizer = json.loads((second / "tokenizer_config.json").read_text())
    (second / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}))
    return first, second, convert_mllama(first, folder / "A-ov"), convert_mllama(second, folder / "B-ov")


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by relative path, without locks; of IRs nothing but that they are there."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: b"" if path.suffix in (".xml", ".bin") else path.read_bytes()
        for name, path in sorted(found.items())
        if path.name != ".lock" and name != companions.STAMP_NAME
    }


def loads_as(folder: Path) -> str | None:
    """The checkpoint's fingerprint if the folder loads; None where it is refused with the fix."""
    try:
        return check_model_dir(folder, IRS)[VISION_ENCODER_NAME]["checkpoint"]
    except (ValueError, FileNotFoundError) as error:
        assert "convert" in str(error), error  # noqa: PT017
        return None


def test_nothing_of_an_earlier_checkpoint_stays(two, tmp_path):
    _, second, first_dir, second_dir = two
    folder = shutil.copytree(first_dir, tmp_path / "folder")
    (folder / "notes.txt").write_text("mine")
    (folder / "golden.bak").write_text("mine too")
    compress(folder, group_size=32)
    make_draft_model(DRAFT, folder / DRAFT_FOLDER)
    (folder / DRAFT_FOLDER / "notes.txt").write_text("mine")
    convert_mllama(second, folder, language_model=False)
    assert not list(folder.glob("*language*")) + list(folder.glob("llm_*"))
    convert_mllama(second, folder)
    own = {"notes.txt": b"mine", "golden.bak": b"mine too", f"{DRAFT_FOLDER}/notes.txt": b"mine"}
    assert files_of(folder) == files_of(second_dir) | own
    (folder / "chat_template.jinja").write_text("by hand")  # of which B brings none
    convert_mllama(second, folder)
    assert (folder / "chat_template.jinja").read_text() == "by hand"


class Killed(BaseException):
    """As a kill: nothing that would clean up afterwards changes a file."""


def killed_at(monkeypatch, step: int) -> list[str]:
    """Lets the process die at the n-th call that moves or removes a file, and each after it do nothing."""
    calls: list[str] = []

    def dying(name, real):
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) >= step:
                raise Killed
            return real(*arguments, **options)

        return call

    for name in ("replace", "rename", "unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("draft", [False, True])
def test_conversion_killed_at_any_step_leaves_one_checkpoint_whole(two, tmp_path, monkeypatch, draft, times):
    if not draft and times(True, False):  # the same steps and fewer
        pytest.skip("with --torture")
    first, second, first_dir, second_dir = two
    whole, step, outcomes = {checkpoint_fingerprint(first): files_of(first_dir)}, 0, []
    whole[checkpoint_fingerprint(second)] = files_of(second_dir)
    start = shutil.copytree(first_dir, tmp_path / "start")
    if draft:
        make_draft_model(DRAFT, start / DRAFT_FOLDER)
        whole[checkpoint_fingerprint(first)] = files_of(start)
    irs = {path: ov.Core().read_model(second_dir / path) for path in IRS}
    monkeypatch.setattr(convert, "convert_vision_encoder", lambda *_: irs[VISION_ENCODER_NAME].clone())
    monkeypatch.setattr(convert, "convert_language_model", lambda *_: irs[LANGUAGE_MODEL_NAME].clone())
    model = Checkpoint(second).load()
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: model)
    monkeypatch.setattr(Checkpoint, "scratch_bytes", lambda *_, **__: 0)
    while True:
        step += 1
        folder = shutil.copytree(start, tmp_path / str(step))
        with monkeypatch.context() as patch:
            calls = killed_at(patch, step)
            try:
                convert_mllama(second, folder)
                ended = len(calls) < step
            except Killed:
                ended = False
        loaded = loads_as(folder)
        outcomes.append(loaded)
        if loaded:
            left = {name for name in files_of(folder) if not name.startswith(".partial")}
            assert {name: data for name, data in files_of(folder).items() if name in left} == whole[loaded], step
        convert_mllama(second, folder)
        assert loads_as(folder) == checkpoint_fingerprint(second), step
        assert files_of(folder) == files_of(second_dir), step
        shutil.rmtree(folder)
        if ended:
            break
    assert len(outcomes) > 15
    assert {*outcomes} == {*whole, None}


def test_draft_model_killed_at_any_step_is_no_mixture(tmp_path, monkeypatch):
    other = tmp_path / "other"
    make_llama(512, seed=3).to(torch.bfloat16).save_pretrained(other)
    for path in DRAFT.glob("tokenizer*"):
        shutil.copy(path, other)
    start, expected = make_draft_model(DRAFT, tmp_path / "start"), make_draft_model(other, tmp_path / "expected")
    ir = ov.Core().read_model(expected / DRAFT_MODEL_NAME)
    monkeypatch.setattr(convert, "convert_language_model", lambda *_: ir.clone())
    monkeypatch.setattr(compressing, "compress_weights", lambda model, _: model)
    model = load_checkpoint(other, LlamaForCausalLM)
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: model)
    monkeypatch.setattr(Checkpoint, "scratch_bytes", lambda *_, **__: 0)
    step, ended = 0, False
    while not ended:
        step += 1
        folder = shutil.copytree(start, tmp_path / str(step))
        with monkeypatch.context() as patch:
            calls = killed_at(patch, step)
            try:
                make_draft_model(other, folder)
                ended = len(calls) < step
            except Killed:
                pass
        try:
            [stamp] = check_model_dir(folder, (DRAFT_MODEL_NAME,)).values()
            own = start if stamp["checkpoint"] == checkpoint_fingerprint(DRAFT) else expected
            assert (folder / "config.json").read_text() == (own / "config.json").read_text()
        except ValueError as error:
            assert "make_draft_model" in str(error) or "convert" in str(error)  # noqa: PT017
        make_draft_model(other, folder)
        assert files_of(folder) == files_of(expected)
        shutil.rmtree(folder)
    assert step > 5


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json", "processor_config.json"])
def test_companion_of_another_checkpoint_is_refused(two, tmp_path, name):
    first, _, first_dir, second_dir = two
    folder = shutil.copytree(first_dir, tmp_path / "folder")
    (folder / name).write_text((second_dir / name).read_text() + "\n")
    with pytest.raises(ValueError, match=f"{name}.*different checkpoints.*convert_mllama"):
        OVMLlamaForConditionalGeneration(folder)
    (folder / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name} is missing.*convert_mllama"):
        check_model_dir(folder, IRS)
    convert_mllama(first, folder)
    OVMLlamaForConditionalGeneration(folder, check_golden=False)


def test_generation_config_and_chat_template_may_be_edited(two, tmp_path):
    first, _, first_dir, _ = two
    folder = shutil.copytree(first_dir, tmp_path / "folder")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"max_new_tokens": 3}))
    (folder / "chat_template.jinja").write_text("{{ 'mine' }}")
    (folder / "notes.txt").write_text("mine")
    assert OVMLlamaForConditionalGeneration(folder, check_golden=False).generation_config.max_new_tokens == 3
    convert_mllama(first, folder)
    assert (folder / "chat_template.jinja").read_text() == "{{ 'mine' }}"


def test_tokenizer_that_changes_in_the_checkpoint_is_copied_anew(pair, copy, tmp_path):
    checkpoint = shutil.copytree(pair.checkpoint, tmp_path / "checkpoint")
    written = (copy / VISION_ENCODER_NAME).stat().st_mtime_ns
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 77}))
    convert_mllama(checkpoint, copy)
    assert AutoProcessor.from_pretrained(copy).tokenizer.model_max_length == 77
    assert (copy / VISION_ENCODER_NAME).stat().st_mtime_ns == written


def test_folder_of_an_earlier_version_is_refused_and_converted_again(two, tmp_path):
    first, second, first_dir, second_dir = two
    folder = shutil.copytree(first_dir, tmp_path / "folder")
    (folder / companions.STAMP_NAME).unlink()
    with pytest.raises(ValueError, match="not finished.*convert_mllama"):
        OVMLlamaForConditionalGeneration(folder)
    convert_mllama(second, folder)
    assert files_of(folder) == files_of(second_dir)


def test_stamp_names_no_file_outside_its_folder(two, tmp_path):
    _, second, first_dir, _ = two
    folder, precious = shutil.copytree(first_dir, tmp_path / "folder"), tmp_path / "precious"
    precious.write_text("mine")
    for name in ("../precious", str(precious)):
        stamp = json.loads((first_dir / companions.STAMP_NAME).read_text())
        (folder / companions.STAMP_NAME).write_text(json.dumps({**stamp, "files": {name: ""}}))
        convert_mllama(second, folder)
        assert precious.read_text() == "mine"


def test_checkpoint_of_the_hub_brings_its_golden_picture(tmp_path, monkeypatch):
    def snapshot_download(name, allow_patterns, ignore_patterns):
        files = [path.name for path in DEMO.iterdir() if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(DEMO / file, tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    folder = convert_mllama("somebody/demo", tmp_path / "ov")
    assert (folder / "golden.png").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OVMLlamaForConditionalGeneration(folder, ov_config=F32)


def test_golden_answer_without_its_picture_is_left_out(tmp_path):
    checkpoint = changed(DEMO, tmp_path / "demo", dict)
    (checkpoint / "golden.png").unlink()
    folder = convert_mllama(checkpoint, tmp_path / "ov")
    assert not (folder / "golden.json").exists()
    OVMLlamaForConditionalGeneration(folder, ov_config=F32)


# ---- Names and numbers that a stranger wrote -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [7, None, ["a"], "", ".", "..", "../outside.safetensors", "/etc/passwd", "a/b", {}])
def test_index_that_names_another_folders_file_is_refused(tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="index"):
        files.weight_files(folder)


def test_shards_of_the_hubs_cache_are_links(tmp_path):
    (tmp_path / "blob").write_bytes((DEMO / "model.safetensors").read_bytes())
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "model-1.safetensors").symlink_to("../blob")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert files.weight_files(folder) == [folder / "model-1.safetensors"]


def test_deep_json_is_refused_with_a_sentence(tmp_path):
    deep = b"[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ValueError, match="no safetensors file"):
        files.read_header(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_bytes(deep)
    with pytest.raises(ValueError, match="no index of weights"):
        files.weight_files(tmp_path)
    (tmp_path / companions.STAMP_NAME).write_bytes(deep)
    assert companions.stamp_of(tmp_path) == {}


@pytest.mark.parametrize(
    "name", ["link/precious.json", "../precious.json", "a/../../precious.json", "{}/precious.json"]
)
def test_stamp_that_names_another_folders_file_removes_nothing(tmp_path, name):
    folder, precious = tmp_path / "model", tmp_path / "precious.json"
    folder.mkdir()
    precious.write_text("{}")
    (folder / "link").symlink_to(tmp_path)
    stamp = {"checkpoint": "a", "source": "b", "finished": False, "files": {name.format(tmp_path): ""}}
    (folder / companions.STAMP_NAME).write_text(json.dumps(stamp))
    companions.write_companions(folder, "a", "b", lambda made: (made / "config.json").write_text("{}"))
    assert precious.is_file()
    assert (folder / "config.json").is_file()
