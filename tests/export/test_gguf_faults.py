"""Damaged models in GGUF, and damaged folders of Ollama's: one sentence, no traceback, nothing written, and no memory
taken for a number in a file before its length has been checked."""

import json
import random
import re
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf_files import (
    F32,
    blob_path,
    make_wide_checkpoint,
    manifest_path,
    stored_tensors,
    write_generation_1,
    write_generation_2,
    write_gguf,
    write_ollama,
)

from ov_mllama.export import convert
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.prepare import plan_here
from ov_mllama.export.sources.gguf import read_gguf
from ov_mllama.export.sources.ollama import all_models
from ov_mllama.runtime.errors import InputError, NotFoundError, UserError

NAME, HUB = "ollama:llama3.2-vision", "registry.ollama.ai/"
HUGE = (1 << 62, (1 << 64) - 1, 1 << 33)  # counts and sizes that nothing here has


class Reached(Exception):
    """Conversion got as far as the first IR."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_wide_checkpoint(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """One file, of the second generation."""
    return write_generation_2(checkpoint, tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(scope="module")
def layout(model):
    """Bytes of the model's header, and of the file without the padding behind its last tensor."""
    reader = GGUFReader(model)
    return reader.data_offset, max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """`error_of(name)`: the sentence with which a plan and a conversion end; empty if the first IR would be built."""
    output = tmp_path / "output"

    def build(*arguments, **options):
        raise Reached

    def attempt(action) -> str:
        try:
            action()
        except UserError as error:
            return str(error)
        except Reached:
            pass
        return ""

    def error_of(name) -> str:
        planned, converted = attempt(lambda: plan_here(name, output)), attempt(lambda: convert_mllama(name, output))
        assert not output.exists() or not any(output.iterdir()), f"{name}: {list(output.iterdir())}"
        assert "\n" not in converted, converted
        assert len(converted) < 600, converted
        assert converted or not planned, f"planned: {planned}"
        return converted

    monkeypatch.setattr(convert, "build_ir", build)
    return error_of


@pytest.fixture
def crash_of(error_of):
    """`crash_of(fault, name)`: a list of the fault with the exception that is no sentence, if there is one."""

    def crash_of(fault: str, name) -> list[str]:
        try:
            error_of(name)
        except Exception as error:  # noqa: BLE001 - all of them are to be told
            return [f"{fault}: {error!r:.200}"]
        return []

    return crash_of


def damaged(path, data: bytes):
    """Write a file and return its path."""
    path.write_bytes(data)
    return path


# ---- The file ----


def test_undamaged_models_are_converted(checkpoint, model, tmp_path, error_of, monkeypatch):
    """Or the other tests would prove nothing."""
    assert error_of(model) == ""
    halves = write_generation_1(checkpoint, tmp_path / "text.gguf", tmp_path / "projector.gguf")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    write_ollama(tmp_path, "llama3.2-vision", halves)
    assert error_of(NAME) == ""


def test_truncated_anywhere(model, layout, tmp_path, error_of, times, tally):
    whole, (header, end), rng = model.read_bytes(), layout, random.Random(0)  # noqa: S311
    places = [0, 1, 4, 8, 16, 24, header - 1, header, end - 1]
    places += [rng.randrange(header) for _ in range(times(25, 250))]
    places += [rng.randrange(header, end) for _ in range(times(25, 250))]
    wrong = [place for place in places if not error_of(damaged(tmp_path / "cut.gguf", whole[:place]))]
    tally("truncated GGUF files", len(places), wrong)


def test_bits_flipped_in_the_header(model, layout, tmp_path, crash_of, times, tally):
    """Some change what nothing depends on, such as a letter of the chat template: those files are converted."""
    whole, rng, count, wrong = model.read_bytes(), random.Random(1), times(50, 1000), []  # noqa: S311
    for _ in range(count):
        data, place = bytearray(whole), rng.randrange(layout[0])
        data[place] ^= 1 << rng.randrange(8)
        wrong += crash_of(f"byte {place}", damaged(tmp_path / "flipped.gguf", bytes(data)))
    tally("flipped bits in GGUF headers", count, wrong)


def test_bytes_of_the_header_replaced(model, layout, tmp_path, crash_of, times, tally):
    whole, rng, count, wrong = model.read_bytes(), random.Random(2), times(50, 1000), []  # noqa: S311
    for _ in range(count):
        data, place = bytearray(whole), rng.randrange(layout[0] - 8)
        data[place : place + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8), struct.pack("<Q", HUGE[0])])
        wrong += crash_of(f"byte {place}", damaged(tmp_path / "replaced.gguf", bytes(data)))
    tally("replaced bytes in GGUF headers", count, wrong)


COUNTS = {  # where a count begins
    "tensors": lambda data: 8,
    "pairs of metadata": lambda data: 16,
    "letters of a key": lambda data: 24,
    "letters of a value": lambda data: data.index(b"general.architecture") + 24,
    "values in a list of numbers": lambda data: data.index(b"tokenizer.ggml.token_type") + 25 + 8,
    "texts in a list": lambda data: data.index(b"tokenizer.ggml.tokens") + 21 + 8,
    "letters of a text in a list": lambda data: data.index(b"tokenizer.ggml.tokens") + 21 + 16,
    "letters of a tensor's name": lambda data: data.index(b"token_embd.weight") - 8,
    "columns": lambda data: data.index(b"token_embd.weight") + 17 + 4,
    "rows": lambda data: data.index(b"token_embd.weight") + 17 + 12,
    "offset": lambda data: data.index(b"token_embd.weight") + 17 + 24,
}


@pytest.mark.parametrize("number", HUGE, ids=["2^62", "2^64-1", "2^33"])
@pytest.mark.parametrize("count", COUNTS)
def test_no_memory_is_taken_for_a_count(model, tmp_path, error_of, count, number):
    data = bytearray(model.read_bytes())
    data[(start := COUNTS[count](data)) : start + 8] = struct.pack("<Q", number)
    path = damaged(tmp_path / "huge.gguf", bytes(data))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert error_of(path)


BAD_VALUES = (0, 7, 4_000_000_000, -0.0, float("nan"), 1e30, "text", [1], [-1, 2], [0.5], ["a"], None)


def test_metadata_of_other_types_and_sizes(checkpoint, tmp_path, crash_of, times, tally):
    """Each key, with every kind of value. What describes a model that there could be is converted."""
    tensors, path = stored_tensors(checkpoint, "q4_K_M", 2, False, False), tmp_path / "metadata.gguf"
    metadata = read_gguf(write_generation_2(checkpoint, path)).metadata
    architecture, wrong = metadata.pop("general.architecture"), []
    pairs = [(key, value) for key in [*metadata, "general.alignment"] for value in BAD_VALUES]
    pairs = random.Random(3).sample(pairs, times(60, len(pairs)))  # noqa: S311
    for key, value in pairs:
        write_gguf(path, {**metadata, key: value}, tensors, architecture)
        wrong += crash_of(f"{key} = {value!r}", path)
    tally("metadata of other types and sizes", len(pairs), wrong)


PLACES = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_v.weight", "v.blk.0.attn_norm.weight", "v.class_embd")


def faults_of(name: str, tensors: dict) -> dict[str, dict]:
    """Return replacements in a file's tensors by what they do to one of them."""
    data, kind = tensors[name]
    numbers = np.zeros(data.shape, np.int32)
    return {
        "is missing": {name: None},
        "has more rows": {name: (np.concatenate([data, data]), kind)},
        "is one number": {name: (np.float32([0.25]), F32)},
        "is empty": {name: (data[:0], kind)},
        "holds integers": {name: (numbers, GGMLQuantizationType.I32)},
        "holds float64": {name: (numbers.astype(np.float64), GGMLQuantizationType.F64)},
        "has another name": {name: None, f"{name}.x": (data, kind)},
        "is there twice": {f"{name}.x": (data, kind)},
    }


def test_tensors_that_are_not_the_models(checkpoint, tmp_path, error_of, crash_of, times, tally):
    tensors, path = stored_tensors(checkpoint, "q4_K_M", 2, False, False), tmp_path / "tensors.gguf"
    metadata = read_gguf(write_generation_2(checkpoint, path)).metadata
    architecture, wrong, tried = metadata.pop("general.architecture"), [], 0
    for name in times(PLACES, tuple(tensors)):
        for fault, replaced in faults_of(name, tensors).items():
            write_gguf(path, metadata, {**tensors, **replaced}, architecture)
            wrong += (crashes := crash_of(f"{name} {fault}", path))
            if name in PLACES and not crashes and not error_of(path) and "float64" not in fault:
                wrong.append(f"{name} {fault}: converted")
            tried += 1
    tally("tensors that are not the model's", tried, wrong)


@pytest.mark.parametrize("value", [1.0, -1.5, float("nan"), float("inf")])
def test_gate_that_is_no_tanh(checkpoint, tmp_path, error_of, value):
    gate = {"v.global.blk.0.attn_gate": (np.float32([value]), F32)}
    assert "ollama pull" in error_of(write_generation_2(checkpoint, tmp_path / "model.gguf", tensors=gate))


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to itself", "missing", "text"])
def test_path_that_is_no_file(tmp_path, error_of, kind):
    path = tmp_path / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif kind != "missing":
        path.symlink_to(path if kind == "link to itself" else tmp_path / "nothing")
    assert str(path) in error_of(path)


def test_linked_file_is_read(model, tmp_path, error_of):
    (tmp_path / "linked.gguf").symlink_to(model)
    assert error_of(tmp_path / "linked.gguf") == ""


# ---- Ollama's folder ----


@pytest.fixture
def root(model, tmp_path, monkeypatch):
    """A folder of Ollama's with the model, to be damaged."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    write_ollama(tmp_path / "ollama", "llama3.2-vision", [model])
    return tmp_path / "ollama"


def layers_of(root) -> dict[str, str]:
    """Return the digests of a model's layers by kind."""
    manifest = json.loads(manifest_path(root, "llama3.2-vision").read_text())
    return {layer["mediaType"].rpartition(".")[2]: layer["digest"] for layer in manifest["layers"]}


@pytest.mark.parametrize("fault", ["missing", "cut", "longer", "empty", "folder", "dangling link", "link to itself"])
@pytest.mark.parametrize("layer", ["model", "license"])
def test_blob_that_is_missing_or_cut(root, error_of, layer, fault):
    blob = blob_path(root, layers_of(root)[layer])
    data = blob.read_bytes()
    blob.unlink()
    if fault == "folder":
        blob.mkdir()
    elif "link" in fault:
        blob.symlink_to(blob if fault == "link to itself" else root / "nothing")
    elif fault != "missing":
        blob.write_bytes({"cut": data[:-1], "longer": data + b" ", "empty": b""}[fault])
    error = error_of(NAME)
    assert blob.name in error
    assert "ollama pull llama3.2-vision" in error


def test_linked_blobs_and_folder_are_read(root, tmp_path, error_of, monkeypatch):
    blob = blob_path(root, layers_of(root)["model"])
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(root)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "linked"))
    assert error_of(NAME) == ""


LAYER = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'0' * 64}", "size": 1}
MANIFESTS = {
    "nothing": b"",
    "half": b'{"schemaVersion": 2, "layers": [',
    "zeros": bytes(500),
    "no text": b"\xff\xfe\x00\xd8",
    "number": b"5",
    "text": b'"layers"',
    "list": b"[]",
    "null": b"null",
    "no layers": b"{}",
    "null for layers": b'{"layers": null}',
    "number for layers": b'{"layers": 5}',
    "layers by name": b'{"layers": {"model": "sha256"}}',
    "empty layers": b'{"layers": []}',
    "nested": b'{"layers": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "large": b" " * 3_000_000 + b'{"layers": []}',
    "large number": b'{"layers": [' + b"9" * 10_000 + b"]}",
    **{f"layer {value!r}": json.dumps({"layers": [value]}).encode() for value in (None, 5, "x", [], {}, [[]])},
    **{
        f"digest {digest!r:.50}": json.dumps({"layers": [{**LAYER, "digest": digest}]}).encode()
        for digest in (
            *(None, 5, [], "", "sha256:", "sha256:abc", "sha256-" + "0" * 64, "sha512:" + "0" * 64),
            *("sha256:../../secret.gguf", "../secret.gguf", "/etc/passwd", "sha256:" + "../" * 21 + "a"),
            *("sha256:" + "0" * 64 + "/../x", "sha256:" + "0" * 64 + "\n", "sha256:" + "\u0660" * 64, "sha256:\0"),
        )
    },
    **{
        f"size {size!r}": json.dumps({"layers": [{**LAYER, "size": size}]}).encode()
        for size in (None, "5", -1, 1e300, float("nan"), [], 1 << 70, True)
    },
    **{
        f"type {kind!r}": json.dumps({"layers": [{**LAYER, "mediaType": kind}]}).encode()
        for kind in (None, 5, [], {}, "", "application/vnd.ollama.image.", "../model")
    },
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_damaged_manifest(root, error_of, manifest):
    manifest_path(root, "llama3.2-vision").write_bytes(MANIFESTS[manifest])
    assert "llama3.2-vision" in error_of(NAME)
    [(listed, why)] = all_models()
    assert listed.name == "llama3.2-vision:latest"
    assert why


def test_digest_that_leads_out_of_the_blobs(root, model, error_of):
    (root / "blobs" / "sha256-x").mkdir()
    shutil.copy(model, root / "secret.gguf")
    layer = {**LAYER, "digest": "sha256:x/../../secret.gguf", "size": model.stat().st_size}
    manifest_path(root, "llama3.2-vision").write_text(json.dumps({"layers": [layer]}))
    assert "manifest" in error_of(NAME)


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to itself"])
def test_manifest_that_is_no_file(root, error_of, kind):
    path = manifest_path(root, "llama3.2-vision")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "link to itself" else root / "nothing")
    assert "ollama pull llama3.2-vision" in error_of(NAME)
    assert not list(all_models())


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ":",
            "a:",
            "/etc/passwd",
            "../secret",
            "a/../../secret",
            "a/..",
            "..",
            "library/..:latest",
            "a:../secret",
        ),
        *("a/b/c/d", "a//b", "a\0b", "a b", "a:b:c", "a:b/c", "-a", "~", "\u00e4"),
    ],
)
def test_name_that_is_none_of_ollamas(root, error_of, name):
    with pytest.raises((InputError, NotFoundError)):
        Checkpoint(f"ollama:{name}")
    assert error_of(f"ollama:{name}")


@pytest.mark.parametrize(("name", "place"), [("../secret", "secret/latest"), ("a:../secret", HUB + "library/secret")])
def test_name_that_leads_out_of_the_manifests(root, error_of, name, place):
    manifest = root / "manifests" / place
    manifest.parent.mkdir(exist_ok=True)
    shutil.copy(manifest_path(root, "llama3.2-vision"), manifest)
    (root / "manifests" / HUB / "library" / "a").mkdir()
    assert "no name of Ollama's" in error_of(f"ollama:{name}")


@pytest.mark.parametrize("place", ["nothing", "file", "~nobody-here/models", ""])
def test_folder_of_ollamas_that_is_none(root, error_of, monkeypatch, place):
    (root / "file").write_text("")
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(root / place) if place.isalpha() else place)
    error = error_of(NAME)
    assert "OLLAMA_MODELS" in error or place in error
