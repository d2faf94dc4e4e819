"""Faults: files that break, processes that are killed, numbers that overflow, threads that meet. The next run ends with
a right model, and a wrong one is never loaded silently."""

import contextlib
import copy
import gc
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import openvino as ov
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

import kills
from conftest import F32
from ov_mllama.export import compress, convert
from ov_mllama.export.convert import convert_mllama
from ov_mllama.runtime import ir
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_model_dir, ir_stamp
from ov_mllama.runtime.shapes import MASKED
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint

pytestmark = pytest.mark.torture
GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
IRS = (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME, *kills.SMALLER)
LONG = 600  # seconds that no process takes


@pytest.fixture(scope="module")
def quantize(times) -> bool:
    """True if processes that are killed and disks that fill come to the quantised encoder."""
    return times(False, True)


@pytest.fixture(scope="module")
def begin(nursery, tmp_path_factory, quantize):
    """`begin(checkpoint, folder)`: a process that writes everything into a folder."""
    output = tmp_path_factory.mktemp("output")
    assert nursery.start(output, "").wait(LONG) == 0  # it has imported all: that is no part of the seconds measured
    return lambda checkpoint, folder: nursery.start(output, kills.PROGRAM, checkpoint, folder, quantize)


def kill_after(process, seconds: float) -> bool:
    """Kill a process unless it ended by itself before; return whether it was killed."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    killed = process.poll() is None
    process.kill()
    return killed


def weights(folder) -> list[str]:
    """Identities of the IRs' weights; empty for those that would not be loaded."""
    return [ir_stamp(folder / name).get("weights", "") for name in IRS]


@pytest.fixture(scope="module")
def finished(pair, begin, tmp_path_factory):
    """A folder with every IR, and the seconds that `begin` took."""
    folder = tmp_path_factory.mktemp("finished")
    started = time.monotonic()
    assert begin(pair.checkpoint, folder).wait(LONG) == 0
    seconds = time.monotonic() - started
    kills.everything(pair.checkpoint, folder)
    return folder, seconds


@pytest.fixture(scope="module")
def expected(finished, quantize):
    """Identities of the weights of what `begin` makes."""
    return weights(finished[0])[: None if quantize else -1] + [""] * (not quantize)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(finished[0], tmp_path / "model")


def load(folder, names=(VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)):
    vision, language = names
    return OVMLlamaForConditionalGeneration(
        folder, ov_config=F32, image_encoder_name=vision, language_model_name=language
    )


# ---- Killed ----


def test_killed_at_any_moment(pair, begin, finished, expected, tmp_path, times, tally):
    seconds = finished[1]
    rng, wrong, count = random.Random(time.time_ns()), [], times(1, 50)  # noqa: S311
    folder, killed = tmp_path / "0", 0
    while killed < count:
        moment = rng.uniform(0.02, 1) * seconds
        if not kill_after(begin(pair.checkpoint, folder), moment):
            shutil.rmtree(folder)
            continue
        killed += 1
        if not set(weights(folder)) <= {*expected, ""}:
            wrong.append(f"after {moment:.2f} s a wrong IR passes for whole")
        if killed < count and rng.random() < 0.5:  # and again, in the same folder
            continue
        status = begin(pair.checkpoint, folder).wait(LONG)
        left = list(folder.glob(".partial-*"))
        if status or weights(folder) != expected or left:
            wrong.append(f"after a kill at {moment:.2f} s: exit {status}, {weights(folder)}, {left}")
        elif rng.random() < 0.2:
            inputs = pair.inputs("wide")
            same = load(folder).generate(**inputs, **GREEDY).tolist() == pair.ov.generate(**inputs, **GREEDY).tolist()
            wrong += [] if same else ["other tokens"]
        shutil.rmtree(folder)
        folder = tmp_path / str(killed)
    tally("kills", killed, wrong)


def test_killed_while_another_checkpoint_is_converted(
    pair, begin, other_dir, finished, expected, tmp_path, times, tally
):
    """One checkpoint's folder becomes another's or is refused: never one's weights beside the other's tokenizer."""
    seconds, count, wrong = finished[1], times(1, 20), []
    rng = random.Random(time.time_ns())  # noqa: S311
    for number in range(count):
        folder = shutil.copytree(other_dir, tmp_path / str(number))
        moment = rng.uniform(0.02, 0.6) * seconds
        kill_after(begin(pair.checkpoint, folder), moment)
        with contextlib.suppress(ValueError, FileNotFoundError):  # refused
            [checkpoint] = {stamp["checkpoint"] for stamp in check_model_dir(folder, IRS[:2]).values()}
            of = finished[0] if checkpoint == ir_stamp(finished[0] / IRS[0])["checkpoint"] else other_dir
            names = ("config.json", "tokenizer.json", "chat_template.jinja", *IRS[:2])
            wrong += [f"{name} after {moment:.2f} s" for name in names if not same_file(folder / name, of / name)]
        status = begin(pair.checkpoint, folder).wait(LONG)
        if status or weights(folder) != expected:
            wrong.append(f"after a kill at {moment:.2f} s: exit {status}, {weights(folder)}")
    tally("kills between two checkpoints", count, wrong)


def same_file(one, other) -> bool:
    """Return whether two files exist and are equal."""
    return one.is_file() and one.read_bytes() == other.read_bytes()


def test_two_processes_write_into_one_folder(pair, begin, expected, tmp_path, times, tally):
    for number in range(times(1, 5)):
        folder = tmp_path / str(number)
        processes = [begin(pair.checkpoint, folder) for _ in range(3)]
        assert [process.wait(LONG) for process in processes] == [0, 0, 0]
        assert weights(folder) == expected
        tally("processes writing into one folder at once", 3)


def test_the_second_waits_for_the_first(tmp_path, caplog):
    caplog.set_level("INFO")

    def second():
        with ir.exclusive_lock(tmp_path):
            order.append("second")

    order = []
    with ir.exclusive_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "Waiting for another process" in caplog.text


# ---- Files ----


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """The IRs of a checkpoint with the same shapes and other weights."""
    folder = tmp_path_factory.mktemp("other")
    return convert_mllama(make_checkpoint(folder / "other", seed=9), folder / "other-ov")


FAULTS = {
    "weights missing": lambda path, _: path.with_suffix(".bin").unlink(),
    "weights cut short": lambda path, _: os.truncate(path.with_suffix(".bin"), 1000),
    "weights empty": lambda path, _: os.truncate(path.with_suffix(".bin"), 0),
    "a bit of the weights": lambda path, _: flip(path.with_suffix(".bin")),
    "weights of another model": lambda path, other: shutil.copy(other.with_suffix(".bin"), path.parent),
    "graph of another model": lambda path, other: shutil.copy(other, path.parent),
    "graph missing": lambda path, _: path.unlink(),
    "graph cut short": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "graph empty": lambda path, _: os.truncate(path, 0),
    "graph no text": lambda path, _: path.write_bytes(os.urandom(1000)),
    "other converter": lambda path, _: rewrite(path, "converter_version", "1"),
    "newer OpenVINO": lambda path, _: rewrite(path, "openvino", "2099.1.0-1-abc"),
}


def rewrite(path, key, value):
    path.write_text(re.sub(f'<{key} value="[^"]*"', f'<{key} value="{value}"', path.read_text()))


@pytest.fixture(scope="module")
def answer(pair):
    """The pair's, to "wide"."""
    return pair.ov.generate(**pair.inputs("wide"), **GREEDY).tolist()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_refused_and_the_next_run_mends_it(
    pair, finished, folder, other_dir, tmp_path, fault, answer, times, tally, monkeypatch
):
    """Each IR alone is refused; both are mended. Mended is what has the same weights and graph. After one fault, or
    with --torture each, it is traced and loaded; after others what tracing returns is there already."""
    for name in IRS[:2]:
        broken = shutil.copytree(finished[0], tmp_path / f"broken {name}")
        for each in (broken, folder):
            FAULTS[fault](each / name, other_dir / name)
        with pytest.raises((ValueError, FileNotFoundError), match="convert"):
            load(broken)
        tally("broken files", 1)
    made, traced = [], fault in times(["graph of another model"], FAULTS)
    for name, by in zip(IRS[:2], ("convert_vision_encoder", "convert_language_model"), strict=True):
        read = partial(ov.Core().read_model, pair.model_dir / name)
        if not traced:
            monkeypatch.setattr(convert, by, lambda *_, name=name, read=read: made.append(name) or read())
    convert_mllama(pair.checkpoint, folder)
    assert made == ([] if traced else [*IRS[:2]])
    check_model_dir(folder, IRS[:2])
    assert weights(folder)[:2] == weights(pair.model_dir)[:2]
    for name in IRS[:2]:
        assert operations(folder / name) == operations(pair.model_dir / name)
    if traced:
        assert load(folder).generate(**pair.inputs("wide"), **GREEDY).tolist() == answer


def operations(path) -> list[tuple[str, str]]:
    """Types and output shapes of an IR's nodes, in order."""
    model = ov.Core().read_model(path)
    return [(op.get_type_name(), str([port.partial_shape for port in op.outputs()])) for op in model.get_ordered_ops()]


@pytest.mark.parametrize("name", kills.SMALLER)
@pytest.mark.parametrize("fault", ["weights cut short", "a bit of the weights", "graph cut short", "graph missing"])
def test_a_broken_smaller_ir_is_made_anew(pair, folder, finished, name, fault, times, tally, monkeypatch):
    """NNCF makes one of each kind, or with --torture all; of the others what it returns is there already."""
    FAULTS[fault](folder / name, None)
    with pytest.raises((ValueError, FileNotFoundError), match="convert|compress"):
        check_model_dir(folder, (name,))
    made = []
    if fault not in times(["a bit of the weights"], FAULTS):
        for kind, by in zip(kills.SMALLER, ("compress_weights", "quantize_vision_encoder"), strict=True):
            read = partial(ov.Core().read_model, finished[0] / kind)
            monkeypatch.setattr(compress, by, lambda *_, kind=kind, read=read: made.append(kind) or read())
    kills.everything(pair.checkpoint, folder)
    assert weights(folder) == weights(finished[0])
    assert made in ([], [name])
    tally("broken files", 1)


def test_a_folder_of_mixed_models(pair, folder, tmp_path, tally):
    other = make_checkpoint(tmp_path / "other", heads=4, kv_heads=4, tiles=2, seed=3)
    other_dir = convert_mllama(other, tmp_path / "other-ov")
    for source, names in [
        (other_dir, [VISION_ENCODER_NAME, "openvino_vision_encoder.bin"]),
        (other_dir, ["config.json"]),
    ]:
        mixed = shutil.copytree(folder, tmp_path / "mixed", dirs_exist_ok=True)
        for name in names:
            shutil.copy(source / name, mixed)
        with pytest.raises(ValueError, match="different checkpoints|describes another model"):
            load(mixed)
        shutil.rmtree(mixed)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises((ValueError, OSError)):
        load(folder)
    tally("broken files", 3)


def test_another_models_processor(pair, tmp_path):
    inputs = dict(pair.inputs("wide"))
    inputs["pixel_values"] = inputs["pixel_values"][..., :-7, :-7]
    with pytest.raises(ValueError, match="use the processor in the model's own folder"):
        pair.ov.generate(**inputs, **GREEDY)


@contextlib.contextmanager
def small_disk(folder, kilobytes: int):
    """A file system of its own at `folder`."""
    folder.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or os.geteuid() or not mount:
        pytest.skip("needs root on Linux, to mount a tmpfs")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True)  # noqa: S603
    if made.returncode:
        pytest.skip(f"cannot mount: {made.stderr.decode()}")
    try:
        yield lambda options: subprocess.run([mount, "-o", f"remount,{options}", str(folder)], check=True)  # noqa: S603
    finally:
        subprocess.run([shutil.which("umount"), "-l", str(folder)], check=True)  # noqa: S603


def test_a_disk_that_fills(pair, finished, expected, quantize, tmp_path, times, tally, monkeypatch):
    monkeypatch.setattr(convert, "check_disk_and_memory", lambda *_: None)  # or nothing would be written at all
    monkeypatch.setattr("ov_mllama.export.build.check_disk_and_memory", lambda *_: None)
    made = [path for path in finished[0].iterdir() if quantize or f"{path.stem}.xml" != kills.SMALLER[1]]
    needed = sum(path.stat().st_size for path in made) // 1024
    sizes = np.linspace(8, needed, times(2, 10), endpoint=False).astype(int).tolist()
    wrong = []
    for number, growing in enumerate(times([sizes], [[size] for size in sizes])):  # one disk, or one for each size
        folder = tmp_path / str(number)
        with small_disk(folder, growing[0]) as remount:
            for size in growing:
                remount(f"size={size}k")
                try:
                    kills.everything(pair.checkpoint, folder, quantize)
                    wrong.append(f"{size} KiB were enough for {needed}")
                except OSError:
                    pass
                if not set(weights(folder)) <= {*expected, ""} or list(folder.glob(".partial-*")):
                    wrong.append(f"{size} KiB: something half-written is left")
            remount(f"size={3 * needed}k")
            kills.everything(pair.checkpoint, folder, quantize)
            if weights(folder) != expected:
                wrong.append(f"{growing} KiB: not made whole afterwards")
    tally("full disks", len(sizes), wrong)


def test_a_folder_that_cannot_be_written_to(pair, finished, tmp_path):
    folder = tmp_path / "readonly"
    with small_disk(folder, 10_000) as remount:
        remount("ro")
        with pytest.raises(OSError, match="readonly cannot be written to.*choose another folder"):
            convert_mllama(pair.checkpoint, folder)
        remount("rw")
        shutil.copytree(finished[0], folder, dirs_exist_ok=True)
        remount("ro")
        kills.everything(pair.checkpoint, folder)  # all is there: nothing to write
        assert load(folder).generate(**pair.inputs("wide"), **GREEDY).shape[1] > 6


# ---- Numbers ----


def changed(pair, folder, change):
    """A checkpoint like the pair's, its tensors changed by `change(name, tensor)`, and its conversion."""
    checkpoint = shutil.copytree(pair.checkpoint, folder / "checkpoint")
    path = next(checkpoint.glob("*.safetensors"))
    tensors = {name: change(name, tensor.float()).to(tensor.dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return checkpoint, convert_mllama(checkpoint, folder / "ov")


def test_masks_and_scores_are_finite_in_every_precision():
    with np.errstate(over="raise"):
        for score in (-30_000, -1000, 0, 1000):
            assert np.isfinite(np.float16(MASKED) + np.float16(score))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weights = torch.tensor([MASKED, 0.0], dtype=dtype).softmax(0)
        assert weights.tolist() == [0, 1]


@pytest.fixture(scope="module")
def massive(pair, tmp_path_factory):
    """A checkpoint with residual streams far outside float16's range, as the real models' massive activations are: its
    conversion, and in transformers."""

    def change(name, tensor):
        return tensor * 3000 if name.endswith(("down_proj.weight", "embed_tokens.weight", "fc2.weight")) else tensor

    checkpoint, model_dir = changed(pair, tmp_path_factory.mktemp("massive"), change)
    hf = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    largest = max(s.abs().max() for s in hf(**pair.inputs("mixed batch"), output_hidden_states=True).hidden_states[:-1])
    assert largest > 65504
    return model_dir, hf


@pytest.mark.parametrize("hint", ["f32", "bf16", "f16"])
def test_large_activations(pair, massive, hint, tally):
    if hint.upper() not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") + ["F32"]:
        pytest.skip(f"this CPU does not compute in {hint}")
    model_dir, hf = massive
    model = OVMLlamaForConditionalGeneration(
        model_dir, ov_config=F32 if hint == "f32" else {"INFERENCE_PRECISION_HINT": hint}
    )
    inputs = pair.inputs("mixed batch")
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    if hint == "f32":
        assert model.generate(**inputs, **GREEDY).tolist() == hf.generate(**inputs, **GREEDY).tolist()
    tally("large activations", 1)


@pytest.mark.parametrize(
    ("broken", "what"), [("model.norm.weight", "logits"), ("layernorm_post.weight", "image's keys and values")]
)
def test_numbers_that_overflow_are_said(pair, tmp_path, broken, what):
    def change(name, tensor):
        return tensor * torch.inf if name.endswith(broken) else tensor

    _, model_dir = changed(pair, tmp_path, change)
    model = OVMLlamaForConditionalGeneration(model_dir, warm_up=False)
    for _ in range(2):  # and nothing of it was kept
        with pytest.raises(FloatingPointError, match=f"{what} are not finite.*INFERENCE_PRECISION_HINT"):
            model.generate(**pair.inputs("wide"), **GREEDY)
    assert model.image_encoder.cache.nbytes == 0 or what == "logits"


# ---- Use ----


@pytest.fixture
def model(fresh_model):
    return fresh_model


def test_threads_take_turns(pair, model, times, tally):
    cases, rounds = ["wide", "tall", "text only", "chat"], times(5, 100)
    expected = {case: pair.ov.generate(**pair.inputs(case), **GREEDY).tolist() for case in cases}
    wrong = []

    def ask(case):
        for _ in range(rounds):
            try:
                if model.generate(**pair.inputs(case), **GREEDY).tolist() != expected[case]:
                    wrong.append(case)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally("answers in threads", rounds * len(cases), wrong)


def test_steps_of_two_conversations_are_refused_not_mixed(pair, model):
    first = model(**pair.inputs("wide"), logits_to_keep=1)
    model(**pair.inputs("tall"), logits_to_keep=1)
    with pytest.raises(ValueError, match="another prompt since"):
        model(torch.tensor([[65]]), past_key_values=first.past_key_values)


class Raising(BaseStreamer):
    """Fails after so many tokens."""

    def __init__(self, tokens, error):
        self.left, self.error = tokens, error

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken pipe")])
@pytest.mark.parametrize("tokens", range(4))
def test_an_interrupted_call_is_followed_by_a_right_one(pair, model, error, tokens, tally):
    for case in ("wide", "chat", "text only"):
        expected = pair.ov.generate(**pair.inputs(case), **GREEDY).tolist()
        with pytest.raises(type(error)):
            model.generate(**pair.inputs(case), **GREEDY, streamer=Raising(tokens, error))
        assert model.generate(**pair.inputs(case), **GREEDY).tolist() == expected
        tally("interrupted calls", 1)


def test_many_calls_in_flat_memory(pair, model, times, tally):
    cases, calls = ["wide", "chat", "text only", "large", "mixed batch"], times(60, 600)
    inputs = {case: pair.inputs(case) for case in cases}
    expected = {case: pair.ov.generate(**inputs[case], **GREEDY).tolist() for case in cases}
    wrong, used = [], []
    for call in range(calls):
        case = cases[call % len(cases)]
        if model.generate(**inputs[case], **GREEDY).tolist() != expected[case]:
            wrong.append(case)
        used.append(psutil.Process().memory_info().rss)
    grown = np.median(used[-10:]) - np.median(used[calls // 3 :][:10])
    assert grown < 20e6, f"{grown / 1e6:.0f} MB more after {calls} calls"
    tally("calls in a row", calls, wrong)


def test_one_model_after_another(pair, other_dir):
    other = OVMLlamaForConditionalGeneration(other_dir, ov_config=F32)
    model, inputs = load(pair.model_dir), pair.inputs("wide")
    expected = pair.ov.generate(**inputs, **GREEDY).tolist()
    assert other.generate(**inputs, **GREEDY).tolist() != expected
    assert model.generate(**inputs, **GREEDY).tolist() == expected
    del other
    gc.collect()
    assert model.generate(**inputs, **GREEDY).tolist() == expected


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(pair, copied):
    with pytest.raises(TypeError, match="neither copied nor pickled.*OVMLlamaForConditionalGeneration"):
        copied(pair.ov)
