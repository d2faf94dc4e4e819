"""Checkpoints of the hub before their weights are downloaded: plans, refusals, bytes sent; too little memory; names."""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from fake_hub import Hub, serving
from huggingface_hub import constants, snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import DEMO
from ov_mllama import cli
from ov_mllama.__main__ import main
from ov_mllama.export import prepare as preparing
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama, of_language_model, of_vision_encoder
from ov_mllama.export.machine import Machine
from ov_mllama.export.plan import Files, plan
from ov_mllama.export.prepare import default_folder, plan_here, prepare
from ov_mllama.export.settings import Settings
from ov_mllama.export.sources import hub as hubs
from ov_mllama.export.sources.files import INDEX, stored_tensors
from ov_mllama.export.sources.tensors import Tensor, materialize, weight_dtype
from ov_mllama.runtime import companions
from tiny_mllama import make_checkpoint, make_llama

SHARD = "model-00002-of-00002.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LITTLE = 0.3e9  # bytes of memory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(Hub(), monkeypatch, tmp_path / "cache") as running:
        running.folders["owner/demo"] = DEMO
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr("ov_mllama.export.machine.free_memory", lambda: LITTLE)


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def split(folder: Path) -> Path:
    """The folder's weights in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names, (first, second) = sorted(tensors), ("model-00001-of-00002.safetensors", SHARD)
    parts = {first: names[::2], second: names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def with_config(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def with_tensors(folder: Path, change) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


# ---- What is known --------------------------------------------------------------------------------------------------


def test_plan_of_a_hub_id_is_the_folders_and_fetches_no_weights(hub, tmp_path):
    made, local = (plan_here(name, tmp_path / "ov", for_chat=True) for name in ("owner/demo", DEMO))
    patterns = [path for pattern in hubs.DOWNLOAD_PATTERNS for path in DEMO.glob(pattern)]
    rest = sum(path.stat().st_size for path in {*patterns} if path.suffix != ".json" or path.name == "tokenizer.json")
    assert made.steps["download"].cost.disk == rest > weights_of(DEMO)
    assert {name: made.steps[name] for name in local.steps} == local.steps
    assert hub.sent[".safetensors"] <= hubs.FIRST_BYTES < weights_of(DEMO) / 100
    assert "tokenizer.json" not in {path.name for path in (tmp_path / "cache").rglob("*")}


def test_downloaded_checkpoint_is_no_preview(hub, tmp_path):
    convert_mllama("owner/demo", tmp_path / "ov", language_model=False)
    sent = hub.sent.total()
    source = Checkpoint("owner/demo", with_weights=False)
    assert not source.download_bytes
    assert source.fingerprint == Checkpoint(DEMO).fingerprint
    assert "download" not in plan_here("owner/demo", tmp_path / "ov").steps
    assert hub.sent.total() == sent


def test_downloaded_weights_without_the_tokenizer_are_completed(hub, tmp_path):
    """As transformers leaves them, where only the model was loaded."""
    folder = Path(snapshot_download("owner/demo", allow_patterns=["*.safetensors", "config.json"]))
    assert not (folder / "tokenizer.json").exists()
    sent = hub.sent[".safetensors"]
    assert "download" not in plan_here("owner/demo", tmp_path / "ov").steps
    assert hub.sent[".safetensors"] == sent


@pytest.mark.parametrize("sharded", [False, True])
def test_preview_places_every_tensor_and_reads_none(hub, tiny, tmp_path, sharded):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    hub.folders["owner/tiny"] = split(folder) if sharded else folder
    source, local = Checkpoint("owner/tiny", with_weights=False), Checkpoint(folder)
    found, expected = source.tensors(), local.tensors()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }
    with pytest.raises(ValueError, match="owner/tiny is not downloaded"):
        source.load()
    preview = source.folder
    assert preview.is_dir()
    del source, found
    assert not preview.exists()


def test_float32_takes_its_download_and_a_file_in_16_bit_for_a_while(hub, tmp_path):
    folder = hub.folders["owner/f32"] = make_checkpoint(tmp_path / "f32", dtype=torch.float32)
    source = Checkpoint(folder)
    made = plan_here("owner/f32", tmp_path / "ov", for_chat=True)
    assert weights_of(folder) < made.steps["download"].cost.disk < weights_of(folder) + 1e5
    parts = {"convert": of_vision_encoder, "compress": of_language_model}
    for name, needed in parts.items():
        assert made.steps[name].scratch == source.scratch_bytes(needed=needed) > 0
        assert "for a while" in str(made.steps[name])
    assert made.disk == sum(step.cost.disk for step in made.steps.values()) + made.steps["compress"].scratch


def test_temporary_file_counts_as_disk(tmp_path):
    config = Checkpoint(DEMO).config
    steps = plan(config, Machine(1e12, 1e12), Settings(), files=Files(language=50e9, vision=1e9), for_chat=True)
    lacking = plan(config, Machine(1e12, 50e9), Settings(), files=Files(language=50e9, vision=1e9), for_chat=True)
    assert not steps.shortfalls
    assert re.search(r"write 50\.\d GB and 50\.0 GB of disk are free", " ".join(lacking.shortfalls))


def test_integers_that_describe_a_quantisation_are_fetched_too(hub, tmp_path):
    folder = shutil.copytree(make_checkpoint(tmp_path / "source"), tmp_path / "quantised")
    state = torch.tensor(list(b'{"shape": [3, 4]}'), dtype=torch.uint8)
    extra = {"x.quant_state": state, "y.weight_shape": torch.tensor([7, 9]), "z": torch.ones(5000, dtype=torch.uint8)}
    with_tensors(folder, lambda tensors: tensors | extra)
    hub.folders["owner/quantised"] = folder
    source = Checkpoint("owner/quantised", with_weights=False)
    stored = stored_tensors(source.source.weights)
    assert bytes(stored["x.quant_state"].read().tolist()) == b'{"shape": [3, 4]}'
    assert stored["y.weight_shape"].read().tolist() == [7, 9]
    assert not stored["z"].read().any()
    with pytest.raises(ValueError, match="owner/quantised: 3 are unexpected"):
        source.tensors()


def test_draft_model_of_the_hub_is_checked_too(hub, tmp_path):
    made = plan_here(DEMO, tmp_path / "ov", DEMO / "draft")
    hub.folders["owner/draft"] = DEMO / "draft"
    remote = plan_here(DEMO, tmp_path / "ov", "owner/draft")
    assert remote.steps["draft"] == made.steps["draft"]
    assert remote.steps["download"].cost.disk > weights_of(DEMO / "draft")
    broken = tmp_path / "broken"
    make_llama(512).half().save_pretrained(broken)
    shutil.copy(DEMO / "draft/tokenizer.json", broken)
    with_tensors(broken, lambda tensors: {name: value for name, value in tensors.items() if "layers.1." not in name})
    hub.folders["owner/broken"] = broken
    with pytest.raises(ValueError, match="owner/broken: 9 of .* tensors are missing"):
        plan_here(DEMO, tmp_path / "ov", "owner/broken")


# ---- Refused --------------------------------------------------------------------------------------------------------


def without_lm_head(folder):
    with_tensors(folder, lambda tensors: {name: value for name, value in tensors.items() if "lm_head" not in name})


def with_a_shorter_head(folder):
    with_tensors(
        folder,
        lambda tensors: {name: value[:-8].clone() if "lm_head" in name else value for name, value in tensors.items()},
    )


def without_a_shard(folder):
    (split(folder) / SHARD).unlink()


def with_a_truncated_shard(folder):
    path = split(folder) / SHARD
    os.truncate(path, path.stat().st_size - 1)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


REFUSED = {
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"owner/bad on the hub has no tokenizer \(tokenizer.json.*tokenizer.model\): choose another repository",
    ),
    "no lm_head": (without_lm_head, "owner/bad: 1 of .* are missing, such as lm_head.weight"),
    "another shape": (with_a_shorter_head, "owner/bad: 1 have another shape, such as .*lm_head"),
    "a missing shard": (
        without_a_shard,
        f"owner/bad on the hub lacks 1 of the files .* such as {SHARD}: choose another",
    ),
    "truncated": (with_a_truncated_shard, f"owner/bad: {SHARD} is truncated, .* bytes: choose another repository"),
    "pointer": (
        lambda folder: (folder / "model.safetensors").write_bytes(POINTER),
        "owner/bad: model.safetensors is no safetensors file but a Git LFS pointer to one: choose another repository",
    ),
    "another model": (
        lambda folder: with_config(folder, model_type="llava"),
        "owner/bad is a 'llava' checkpoint; this converter takes Llama 3.2 Vision",
    ),
    "unknown quantisation": (
        lambda folder: with_config(folder, quantization_config={"quant_method": "from_elsewhere"}),
        "quantised with 'from_elsewhere', which is not read .*: convert the 16-bit checkpoint",
    ),
    "pickled": (pickled, r"owner/bad has a config but no \*\.safetensors weights: choose another repository"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_before_the_download(hub, tiny, tmp_path, monkeypatch, case):
    spoil, said = REFUSED[case]
    folder = hub.folders["owner/bad"] = shutil.copytree(tiny, tmp_path / "bad")
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hubs, "download", lambda _: pytest.fail("downloaded"))
    for command in ("plan", "prepare"):
        monkeypatch.setattr(sys, "argv", ["ov-mllama", command, "owner/bad"])
        with pytest.raises(SystemExit, match=said) as refused:
            main()
        sentence = str(refused.value)
        assert "\n" not in sentence
        assert tempfile.gettempdir() not in sentence
    assert not (tmp_path / "models").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_hub_without_access_or_network_is_refused_as_before(hub, tmp_path, monkeypatch):
    hub.folders["owner/gated"] = DEMO
    hub.gated.add("owner/gated")
    with pytest.raises(PermissionError, match="owner/gated is gated: accept its licence"):
        plan_here("owner/gated", tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository"):
        plan_here("owner/private", tmp_path)
    plan_here("owner/demo", tmp_path)
    hub.parts = False
    with pytest.raises(FileNotFoundError, match="server sends no parts of files: download it, and give its folder"):
        plan_here("owner/demo", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="owner/demo could not be fetched from the Hugging Face hub"):
        plan_here("owner/demo", tmp_path)


# ---- Too little memory or disk --------------------------------------------------------------------------------------


def commands(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ov-mllama", *arguments])
    main()


@pytest.mark.parametrize("command", ["prepare", "chat", "serve", "caption"])
def test_plan_that_lacks_memory_stops_before_the_download(hub, tmp_path, monkeypatch, little_memory, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    given = {"prepare": ["owner/demo"], "caption": [".", "--checkpoint", "owner/demo"]}
    Image.new("RGB", (9, 9)).save("image.png")
    with pytest.raises(SystemExit, match=r"of memory and 0.3 GB are free: close other programs.*--yes") as refused:
        commands(monkeypatch, command, *given.get(command, ["--checkpoint", "owner/demo"]))
    assert str(refused.value).startswith("❌")
    assert hub.sent[".safetensors"] <= hubs.FIRST_BYTES
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("answer", "goes_on"), [("y", True), ("Yes ", True), ("n", False), ("", False), (EOFError, False)]
)
def test_terminal_is_asked(hub, tmp_path, monkeypatch, little_memory, answer, goes_on):
    asked = []

    def answers(question):
        asked.append(question)
        if answer is EOFError:
            raise EOFError
        return answer

    def convert(*arguments, **options):
        raise RuntimeError("went on")

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answers)
    monkeypatch.setattr(preparing, "convert_mllama", convert)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError if goes_on else SystemExit, match="went on" if goes_on else "0.3 GB are free"):
        commands(monkeypatch, "prepare", "owner/demo")
    assert asked == ["Go on all the same? [y/N] "]


def test_yes_goes_on_without_a_question(tmp_path, monkeypatch, little_memory, caplog):
    """And where all is made there is nothing to stop: a server starts again, however little is free."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    with pytest.raises(MemoryError, match="0.3 GB are free"):
        prepare(DEMO, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()
    folder = prepare(DEMO, tmp_path / "ov", yes=True)
    assert "0.3 GB are free" in caplog.text
    assert prepare(DEMO, folder, yes=lambda: pytest.fail("asked")) == folder


def test_confirm_without_a_terminal_is_no(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as pythonw
    assert not cli.confirm()


def test_notebook_of_a_small_machine_shows_the_shortfall_and_goes_on(hub, tmp_path, little_memory):
    made = plan_here("owner/demo", tmp_path / "ov")
    assert "0.3 GB are free" in made.shortfalls[0]
    assert made.check_disk() is None


# ---- Names ----------------------------------------------------------------------------------------------------------


def converted(folder: Path, **stamp) -> None:
    folder.mkdir(parents=True)
    (folder / companions.STAMP_NAME).write_text(json.dumps({"checkpoint": "0", "source": "0", "files": {}, **stamp}))


def test_snapshot_of_the_hubs_cache_is_called_after_its_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub/models--owner--Some-Model/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    assert default_folder(snapshot) == default_folder("owner/Some-Model") == Path("models/Some-Model")
    converted(Path("models/Some-Model"), origin="owner/Some-Model")
    assert default_folder(snapshot) == Path("models/Some-Model")
    assert default_folder("other/Some-Model") == Path("models/other--Some-Model")
    converted(Path("models/other--Some-Model"), origin="third/one")
    assert default_folder("other/Some-Model") == Path("models/other--Some-Model-2")


def test_two_checkpoints_of_one_name_do_not_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = make_checkpoint(tmp_path / "a/Same", seed=1)
    second = make_checkpoint(tmp_path / "b/Same", seed=2)
    folders = []
    for source in (first, second, first, second):
        folders.append(convert_mllama(source, default_folder(source), language_model=False))
    assert folders == [Path("models/Same"), Path("models/Same-2")] * 2
    for source, folder in zip((first, second), folders, strict=False):
        assert companions.stamp_of(folder)["checkpoint"] == Checkpoint(source).fingerprint
    with_config(first, note="changed")  # the same checkpoint, trained on: converted again in its place
    assert default_folder(first) == Path("models/Same")
    moved = shutil.move(second, tmp_path / "c" / "Same")
    assert default_folder(moved) == Path("models/Same-2")
    for folder in {*folders}:  # as earlier versions left them
        stamp = companions.stamp_of(folder)
        stamp.pop("origin")
        (folder / companions.STAMP_NAME).write_text(json.dumps(stamp))
    assert default_folder(moved) == Path("models/Same-2")
    assert default_folder("owner/Same") == Path("models/Same")


def test_folder_of_another_checkpoint_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "models/Same")
    assert default_folder("models/Same") == Path("models/Same-ov")
    assert default_folder("owner/Same") == Path("models/owner--Same")


def test_home_and_current_folder_are_checkpoints_too(tmp_path, monkeypatch, capsys):
    make_checkpoint(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert default_folder("~/mine").name == "mine"
    commands(monkeypatch, "plan", "~/mine", "--model-dir", "~/ov")
    monkeypatch.chdir(tmp_path / "mine")
    assert default_folder(".") == Path("models/mine")
    commands(monkeypatch, "plan", ".")
    assert capsys.readouterr().out.count("compress the language model") == 2
    assert not (tmp_path / "mine/~").exists()


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_one_computed_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    """Tensors of a float32 checkpoint that are alive at once, those mapped from the checkpoint's file aside."""
    tensors = Checkpoint(make_checkpoint(tmp_path / "f32", dtype=torch.float32)).tensors()
    alive, most = set(), []

    class Watched(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def watched(tensor: Tensor) -> Tensor:
        def read():
            value = torch.Tensor._make_subclass(Watched, tensor.read())
            alive.add(id(value))
            most.append(len(alive))
            return value

        return Tensor(tensor.shape, tensor.dtype, read)

    monkeypatch.setattr("ov_mllama.export.sources.tensors.WRITTEN_AT_ONCE", 1000)  # parts of most tensors
    dtype = weight_dtype(tensors)
    made = materialize({name: watched(tensor) for name, tensor in tensors.items()}, dtype, tmp_path)
    assert dtype == torch.float16
    assert len(most) == len(tensors)
    assert max(most) <= 1
    assert all(torch.equal(made[name], tensors[name].read().half()) for name in tensors)
