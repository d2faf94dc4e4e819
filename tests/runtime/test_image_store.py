"""Encoded images on disk: what is read is what was written, within bounds, private, and never at an answer's cost."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from conftest import F32
from ov_mllama.runtime import image_store
from ov_mllama.runtime.image_cache import EncodedImage
from ov_mllama.runtime.image_store import ImageStore, read_image
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.shapes import MllamaShapes

TENSORS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
SHAPES = MllamaShapes(
    max_num_tiles=4,
    patches_per_tile=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    self_layers=(0, 2),
    cross_layers=(1, 3),
    vocab_size=10,
    embeddings=18,
    max_positions=64,
)
ONE_FILE = 8 + SHAPES.cross_kv_bytes(SHAPES.patches_per_tile) // 2 + 4  # bytes of one tile


@pytest.fixture(autouse=True)
def _ample_disk(monkeypatch):
    monkeypatch.setattr(image_store, "free_disk", lambda folder: 1e12)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "data" / "images")


@pytest.fixture
def load(pair, store):
    """Loads a model with the store, as a program that begins anew does."""

    def load(given=store, model_dir=pair.model_dir, **config):
        return OVMLlamaForConditionalGeneration(
            model_dir, ov_config=config or F32, warm_up=False, check_golden=False, image_store=given
        )

    return load


def image_of(seed=0, tiles=1, scale=1.0) -> EncodedImage:
    rng = np.random.default_rng(seed)
    shapes = {name: SHAPES.cross_kv_shape(name, 1, tiles * SHAPES.patches_per_tile) for name in SHAPES.cross_kv_names}
    arrays = {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return EncodedImage(arrays, np.arange(1, tiles + 1))


def files(store) -> list[str]:
    return sorted(path.name for path in store.folder.glob("*"))


def assert_same(one: EncodedImage, other: EncodedImage) -> None:
    assert one.tile_counts.tolist() == other.tile_counts.tolist()
    assert one.key_values.keys() == other.key_values.keys()
    for name, array in one.key_values.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, other.key_values[name])


def counted(model) -> list:
    """A list that grows with each image that the model encodes."""
    runs, infer = [], model.image_encoder._infer
    model.image_encoder._infer = lambda *given: runs.append(1) or infer(*given)
    return runs


# ---- Files ----


@pytest.mark.parametrize("tiles", [1, 3, 4])
def test_image_read_is_the_image_written_and_both_are_rounded(store, tiles):
    image, exact = image_of(tiles=tiles), image_of(tiles=tiles)
    store.put("a", image)
    assert_same(store.get("a", SHAPES), image)
    for name, array in image.key_values.items():
        np.testing.assert_array_equal(array, exact.key_values[name].astype(np.float16).astype(np.float32))
    assert store.get("b", SHAPES) is None


def test_image_beyond_float16_stays_exact_and_is_not_stored(store):
    image, exact = image_of(scale=1e5), image_of(scale=1e5)
    store.put("a", image)
    assert_same(image, exact)
    assert not store.holds("a")


def test_store_stays_within_its_budget_and_evicts_the_least_recently_used(store):
    store.max_bytes = 3 * ONE_FILE
    for number, key in enumerate("abc"):
        store.put(key, image_of(number))
        os.utime(store.folder / f"{key}.kv16", ns=(number, number))
    assert store.get("a", SHAPES)
    store.put("d", image_of(3))
    assert files(store) == ["a.kv16", "c.kv16", "d.kv16"]
    store.put("e", image_of(4, tiles=2))
    assert files(store) == ["d.kv16", "e.kv16"] or files(store) == ["a.kv16", "e.kv16"]
    assert sum(path.stat().st_size for path in store.folder.iterdir()) <= store.max_bytes


def test_image_larger_than_the_budget_evicts_nothing(store):
    store.max_bytes = 2 * ONE_FILE
    store.put("a", image_of())
    store.put("b", image_of(1, tiles=4))
    assert files(store) == ["a.kv16"]


@pytest.mark.parametrize("damage", ["cut", "one tile less", "longer", "bit", "counts", "empty", "zeros", "text"])
def test_broken_file_is_deleted_and_never_read(store, damage, caplog):
    store.put("a", image_of(tiles=2))
    path = store.folder / "a.kv16"
    data = bytearray(path.read_bytes())
    if damage in ("bit", "counts"):
        data[len(data) // 2 if damage == "bit" else 0] ^= 1
    changed = {
        "cut": data[:-7],
        "longer": data + b"0",
        "empty": b"",
        "zeros": bytes(len(data)),
        "text": b"a broken file",
    }
    changed["one tile less"] = data[: ONE_FILE - 4] + data[-4:]
    path.write_bytes(changed.get(damage, data))
    assert store.get("a", SHAPES) is None
    assert files(store) == []
    assert "encoded again" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="permissions as on POSIX")
def test_folder_and_files_are_their_users_alone(store):
    before = os.umask(0)
    try:
        store.put("a", image_of())
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (store.folder.parent, store.folder, store.folder / "a.kv16")]
    assert modes == [0o700, 0o700, 0o600]


def test_full_disk_leaves_the_image_rounded_and_nothing_behind(store, monkeypatch, caplog):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    image, exact = image_of(), image_of()
    store.put("a", image)
    assert files(store) == []
    assert "No space left" in caplog.text
    assert (
        image.key_values["cross_attn_key_values.1.key"].tolist()
        == np.float16(exact.key_values["cross_attn_key_values.1.key"]).tolist()
    )


def test_last_gigabyte_of_the_disk_is_left(store, monkeypatch, caplog):
    monkeypatch.setattr(image_store, "free_disk", lambda folder: 1e9)
    store.put("a", image_of())
    assert not store.folder.exists()
    assert "only 1.0 GB of disk are free" in caplog.text


def test_folder_that_cannot_be_used_is_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    store = ImageStore(tmp_path / "file")
    store.put("a", image_of())
    assert store.get("a", SHAPES) is None
    assert not store.holds("a")
    store.remove("a")


def test_partial_files_of_killed_processes_are_deleted_once_old(store):
    store.put("a", image_of())
    for name, age_s in (("old.part", 2 * image_store.PARTIAL_S), ("new.part", 0)):
        (store.folder / name).write_bytes(b"0")
        os.utime(store.folder / name, (time.time() - age_s,) * 2)
    store.put("b", image_of(1))
    assert files(store) == ["a.kv16", "b.kv16", "new.part"]


WRITE = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_image_store as test
store = test.ImageStore(sys.argv[3], 4 * test.ONE_FILE)
test.image_store.free_disk = lambda folder: 1e12
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    for key in range(8):
        image = store.get(str(key), test.SHAPES)
        if image is None:
            store.put(str(key), test.image_of(key))
        else:
            expected = test.image_of(key)
            for name, array in image.key_values.items():
                assert (array == expected.key_values[name].astype("f2")).all()
"""


def test_two_processes_at_once_read_only_what_is_right(store):
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]  # noqa: PTH120
    command = [sys.executable, "-c", WRITE, *folders, str(store.folder)]
    root = os.path.dirname(folders[1])  # noqa: PTH120
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
    programs = [subprocess.Popen(command, **pipes) for _ in range(2)]  # noqa: S603
    for program in programs:
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        program.stdin.write("\n")
        program.stdin.flush()
    for program in programs:
        _, errors = program.communicate(timeout=60)
        assert program.returncode == 0, errors
        assert "encoded again" not in errors
    kept = [store.folder / name for name in files(store)]
    assert {path.suffix for path in kept} == {".kv16"}
    assert 0 < len(kept) <= 4
    for path in kept:
        read_image(path, SHAPES)


# ---- Model ----


def test_model_begun_anew_encodes_nothing_and_gives_the_same_logits(pair, load):
    inputs, first = pair.inputs("two images"), load()
    expected = first(**inputs).logits
    assert len(files(first.image_encoder.store)) == 2
    second = load()
    runs = counted(second)
    assert second.holds_images(**{name: inputs[name] for name in TENSORS})
    assert torch.equal(second(**inputs).logits, expected)
    assert not runs
    assert second.stats.images_cached == 2
    second.image_encoder.forget()
    assert torch.equal(second(**inputs).logits, expected)
    exact = pair.ov(**inputs).logits
    assert 0 < (exact - expected).abs().max() < 1e-2


def test_model_without_a_store_or_of_no_bytes_is_exact_and_writes_nothing(pair, load, store):
    inputs = pair.inputs("wide")
    for given in (None, ImageStore(store.folder, 0)):
        assert torch.equal(load(given)(**inputs).logits, pair.ov(**inputs).logits)
    assert not store.folder.exists()


def test_broken_file_is_encoded_anew(pair, load, store):
    inputs = pair.inputs("wide")
    expected = load()(**inputs).logits
    [path] = store.folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    model = load()
    runs = counted(model)
    assert torch.equal(model(**inputs).logits, expected)
    assert len(runs) == 1
    assert path.read_bytes() == whole


def test_disk_that_is_full_breaks_no_answer(pair, load, monkeypatch):
    inputs = pair.inputs("wide")
    expected = load()(**inputs).logits
    model = load(ImageStore("/proc/no/folder"))
    assert torch.equal(model(**inputs).logits, expected)


def test_another_precision_or_ir_is_another_key(pair, load, store, tmp_path):
    inputs, other = pair.inputs("wide"), shutil.copytree(pair.model_dir, tmp_path / "other")
    xml = other / "openvino_vision_encoder.xml"
    load()(**inputs)
    same = load(model_dir=other)
    assert same.holds_images(**{name: inputs[name] for name in TENSORS})
    xml.write_text(xml.read_text().replace('name="pixel_values"', 'name="pixel_values" '))
    changed = load(model_dir=other)
    assert not changed.holds_images(**{name: inputs[name] for name in TENSORS})
    bf16 = load(INFERENCE_PRECISION_HINT="bf16")
    assert not bf16.holds_images(**{name: inputs[name] for name in TENSORS})
    bf16(**inputs)
    assert len(files(store)) == 2
    groups = load(INFERENCE_PRECISION_HINT="bf16", DYNAMIC_QUANTIZATION_GROUP_SIZE=64)
    assert not groups.holds_images(**{name: inputs[name] for name in TENSORS})


def test_another_image_is_another_key(pair, load):
    model = load()
    model(**pair.inputs("wide"))
    assert not model.holds_images(**{name: pair.inputs("tall")[name] for name in TENSORS})


def test_removed_images_are_gone_from_memory_and_disk(pair, load, store):
    model, inputs = load(), pair.inputs("two images")
    tensors = {name: inputs[name] for name in TENSORS}
    model.encode_images(**tensors)
    model.remove_images(**tensors)
    assert files(store) == []
    assert not model.holds_images(**tensors)
    model.remove_images(**tensors)
    model.remove_images(None, None, None)


def test_stored_image_does_not_wait_for_one_being_encoded(pair, load):
    load()(**pair.inputs("wide"))
    model = load()
    with model.image_encoder._turn:
        reading = threading.Thread(target=model.encode_images, args=[pair.inputs("wide")[name] for name in TENSORS])
        reading.start()
        reading.join(60)
        assert not reading.is_alive()


def test_golden_answer_verifies_the_encoder_and_not_the_store(demo_dir, store, monkeypatch):
    """Else a device whose driver is broken would pass with what another one has encoded."""
    seen = []
    monkeypatch.setattr(
        "ov_mllama.runtime.model.check_golden_answer", lambda model, *given: seen.append(model.image_encoder.store)
    )
    model = OVMLlamaForConditionalGeneration(demo_dir, ov_config=F32, warm_up=False, image_store=store)
    assert seen == [None]
    assert model.image_encoder.store is store


def test_logs_are_the_librarys(store, caplog):
    with caplog.at_level(logging.WARNING):
        (store.folder).mkdir(parents=True)
        (store.folder / "a.kv16").write_bytes(b"broken")
        store.get("a", SHAPES)
    assert caplog.records[0].name == "ov_mllama.runtime.image_store"
