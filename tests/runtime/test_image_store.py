"""Encoded images on disk: what is read is what was written, within bounds, private, and never at an answer's cost."""

import logging
import os
import shutil
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import F32
from ov_mllama.runtime import image_store
from ov_mllama.runtime.image_cache import EncodedImage
from ov_mllama.runtime.image_store import ImageStore, read_image
from ov_mllama.runtime.ir import VISION_ENCODER_NAME
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.shapes import MllamaShapes
from ov_mllama.runtime.vision import ImageInputs, OVImageEncoder, image_keys

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
def open_encoder(pair, store):
    """Opens a vision encoder with the store, as a program that begins anew does."""

    def open_encoder(given=store, model_dir=pair.model_dir, **config):
        encoder = OVImageEncoder(model_dir / VISION_ENCODER_NAME, pair.ov.shapes, ov_config=config or F32)
        if given is not None:
            encoder.use_store(given)
        return encoder

    return open_encoder


def images_of(pair, case: str) -> ImageInputs:
    inputs = pair.inputs(case)
    return ImageInputs(*(inputs[name].numpy() for name in ImageInputs._fields))


def holds(encoder, images: ImageInputs) -> bool:
    return all(encoder.holds(key) for row in image_keys(images) for key in row)


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


def counted(encoder) -> list:
    """A list that grows with each image that is encoded."""
    runs, infer = [], encoder._infer
    encoder._infer = lambda *given: runs.append(1) or infer(*given)
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


@pytest.mark.parametrize(
    "damage", ["cut", "one tile less", "longer", "bit", "counts", "empty", "no tile", "zeros", "text"]
)
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
    changed["no tile"] = bytes(4)  # with the checksum of nothing
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


def test_file_appears_complete(store, monkeypatch):
    seen, replace = [], Path.replace

    def observed(part, target):
        seen.append((part.stat().st_size, target.exists()))
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", observed)
    store.put("a", image_of())
    assert seen == [(ONE_FILE, False)]


def test_full_disk_leaves_the_image_rounded_and_nothing_behind(store, monkeypatch, caplog):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
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
import numpy as np
from ov_mllama.runtime import image_store
from ov_mllama.runtime.image_cache import EncodedImage
from ov_mllama.runtime.shapes import MllamaShapes

image_store.free_disk = lambda folder: 1e12
shapes = MllamaShapes(**eval(sys.argv[2]))
store = image_store.ImageStore(sys.argv[1], int(sys.argv[3]))
sizes = {name: shapes.cross_kv_shape(name, 1, shapes.patches_per_tile) for name in shapes.cross_kv_names}
for turn in range(200):
    image = store.get(str(turn % 8), shapes)
    if image is None:
        arrays = {name: np.full(size, turn % 8, np.float32) for name, size in sizes.items()}
        store.put(str(turn % 8), EncodedImage(arrays, np.ones(1, np.int64)))
    else:
        assert all((array == turn % 8).all() for array in image.key_values.values())
"""


def test_two_processes_at_once_read_only_what_is_right(store, start):
    programs = [start(WRITE, store.folder, vars(SHAPES), 4 * ONE_FILE) for _ in range(2)]
    for program in programs:
        assert program.wait(60) == 0, program.said()
        assert "encoded again" not in program.said()
    assert {name.partition(".")[2] for name in files(store)} == {"kv16"}
    assert 0 < len(files(store)) <= 4
    for name in files(store):
        read_image(store.folder / name, SHAPES)


# ---- Encoder ----


def test_encoder_begun_anew_encodes_nothing_and_returns_the_same_numbers(pair, open_encoder):
    images, first, second = images_of(pair, "two images"), open_encoder(), open_encoder()
    expected = first.encode(images)
    assert len(files(first.store)) == 2
    runs = counted(second)
    for _ in range(2):
        found = second.encode(images)
        assert found.cached == 2
        second.forget()
        for name, array in expected.key_values.items():
            np.testing.assert_array_equal(found.key_values[name], array)
    assert not runs
    exact = open_encoder(None).encode(images)
    for name, array in expected.key_values.items():
        np.testing.assert_allclose(array, exact.key_values[name], rtol=2**-11, atol=1e-7)


def test_encoder_without_a_store_or_with_one_of_no_bytes_is_exact_and_writes_nothing(pair, open_encoder, store):
    images = images_of(pair, "wide")
    expected = pair.ov.image_encoder.encode(images)
    for given in (None, ImageStore(store.folder, 0)):
        found = open_encoder(given).encode(images)
        for name, array in expected.key_values.items():
            np.testing.assert_array_equal(found.key_values[name], array)
    assert not store.folder.exists()


def test_image_of_a_broken_file_is_encoded_and_stored_again(pair, open_encoder, store):
    images = images_of(pair, "wide")
    open_encoder().encode(images)
    [path] = store.folder.iterdir()
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    encoder = open_encoder()
    runs = counted(encoder)
    assert encoder.encode(images).cached == 0
    assert len(runs) == 1
    assert path.read_bytes() == complete


def test_another_precision_or_ir_is_another_key(pair, open_encoder, store, tmp_path):
    images, other = images_of(pair, "wide"), shutil.copytree(pair.model_dir, tmp_path / "other")
    open_encoder().encode(images)
    assert holds(open_encoder(model_dir=other), images)
    for suffix in (".xml", ".bin"):
        with (other / VISION_ENCODER_NAME).with_suffix(suffix).open("ab") as file:
            file.write(b"\n")
        assert not holds(open_encoder(model_dir=other), images)
        shutil.copy((pair.model_dir / VISION_ENCODER_NAME).with_suffix(suffix), other)
    half = {"INFERENCE_PRECISION_HINT": "bf16"}
    for config in (half, half | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}, {"INFERENCE_PRECISION_HINT": "f32"}):
        encoder = open_encoder(**config)
        assert not holds(encoder, images)
        encoder.encode(images)
    assert len(files(store)) == 4
    assert holds(open_encoder(**F32, INFERENCE_NUM_THREADS=1), images)


def test_another_image_is_another_key(pair, open_encoder):
    encoder = open_encoder()
    encoder.encode(images_of(pair, "wide"))
    assert not holds(encoder, images_of(pair, "tall"))


def test_stored_image_does_not_wait_for_one_being_encoded(pair, open_encoder):
    open_encoder().encode(images_of(pair, "wide"))
    encoder = open_encoder()
    with encoder._turn:
        reading = threading.Thread(target=encoder.prefetch, args=[images_of(pair, "wide")], daemon=True)
        reading.start()
        reading.join(60)
        assert not reading.is_alive()


def test_stored_image_needs_memory_for_its_keys_and_values_only(pair, open_encoder):
    images, encoder = images_of(pair, "wide"), open_encoder()
    keys = image_keys(images)
    to_encode = open_encoder().memory_for(images, keys)
    encoded = encoder.encode(images)
    assert encoder.memory_for(images, keys) == 0
    to_read = open_encoder().memory_for(images, keys)
    assert to_read == sum(array.nbytes for array in encoded.key_values.values()) < to_encode


# ---- Model ----


def test_model_reads_what_another_one_has_encoded_until_it_is_removed(pair, store):
    inputs = pair.inputs("two images")
    tensors = {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    options = dict(ov_config=F32, warm_up=False, image_store=store)
    first, second = (OVMLlamaForConditionalGeneration(pair.model_dir, **options) for _ in range(2))
    expected = first(**inputs).logits
    assert torch.equal(second(**inputs).logits, expected)
    assert second.stats.images_cached == 2
    assert 0 < (pair.ov(**inputs).logits - expected).abs().max() < 1e-2
    second.remove_images(**tensors)
    second.remove_images(None, None, None)
    assert files(store) == []
    assert second.image_encoder.cache.nbytes == 0


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
