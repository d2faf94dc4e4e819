"""The photographs of installed packages are here, credited, of every shape, and what a model is calibrated with where
there is no network, instead of the demo's drawings."""

import json
import socket
from collections import Counter

import numpy as np
import pytest
from huggingface_hub.utils import httpx
from PIL import Image
from transformers import AutoProcessor

from conftest import DEMO, ROOT, demo_samples
from data_preprocessing import (
    HUB_SET,
    PHOTOGRAPHS,
    load_samples,
    own_samples,
    prepare_dataset_vision,
    questions_about,
)
from ov_mllama.export import calibration
from ov_mllama.export import samples as packaged
from ov_mllama.export.samples import CROPS, FILES, QUESTION, calibration_samples

LICENCES = ("public domain", "CC0", "CC BY 2.0")
SIZE = {"height": 560, "width": 560}  # the 11B's tile


@pytest.fixture(scope="module")
def samples():
    return calibration_samples()


@pytest.fixture
def no_network(monkeypatch):
    """Addresses that were asked for; none is found."""
    asked = []

    def getaddrinfo(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_every_photograph_is_here_with_its_question_and_credit():
    found = packaged.photographs()
    assert len({each["name"] for each in found}) == len(found) >= 8
    for each in found:
        assert each["image"].mode == "RGB"
        assert np.asarray(each["image"]).std() > 10, each["name"]
        assert each["question"].endswith("?")
        assert each["caption"].endswith(".")
        assert any(licence in each["credit"] for licence in LICENCES)
        assert "https://" in each["credit"] or "http://" in each["credit"]


def test_licences_are_what_the_packages_say():
    """Next to where a package describes a picture it says the licence that FILES claims."""
    fetchers = packaged.installed("skimage/data/_fetchers.py").read_text(encoding="utf-8")
    readme = packaged.installed("sklearn/datasets/images/README.txt").read_text(encoding="utf-8")
    for file, credit in FILES.values():
        author, *_, address = credit.split(", ")
        if file.startswith("sklearn"):
            assert address in readme
            assert "creativecommons.org/licenses/by/2.0" in readme
            continue
        docstring = next(text for text in fetchers.split("\ndef ") if f'"data/{file.rpartition("/")[2]}"' in text)
        assert ("CC0" if "CC0" in credit else "public domain") in docstring
        if "CC0" in credit:
            assert author in docstring
        else:
            assert address in docstring


def test_crops_lie_inside_their_photographs():
    for crop in CROPS:
        with Image.open(packaged.installed(FILES[crop.file][0])) as image:
            left, top, right, bottom = crop.box
            assert 0 <= left < right <= image.width, crop
            assert 0 <= top < bottom <= image.height, crop


def test_calibration_samples_are_different_and_the_same_every_time(samples):
    assert len(samples) >= 32  # what the data-aware route takes by default
    pixels = [(sample["image"].size, sample["image"].tobytes()) for sample in samples]
    assert len(set(pixels)) == len(samples)
    assert len({sample["caption"] for sample in samples}) == len(samples)
    assert [(sample["image"].size, sample["image"].tobytes()) for sample in calibration_samples()] == pixels


def test_calibration_samples_have_every_shape(samples):
    """Tiles on the 11B's canvases, as its processor places them."""
    processor = AutoProcessor.from_pretrained(DEMO).image_processor
    canvases = Counter()
    for sample in samples:
        tensors = processor(sample["image"], size=SIZE, return_tensors="np")
        assert tensors["pixel_values"].shape[-2:] == (560, 560)
        tiles = int(tensors["aspect_ratio_mask"].sum())
        wide, tall = np.sign(np.subtract(sample["image"].size, sample["image"].size[::-1]))
        canvases[tiles, "square" if tiles in (1, 4) else "wide" if wide > tall else "tall"] += 1
    assert set(canvases) == {(1, "square"), (4, "square"), *((n, way) for n in (2, 3) for way in ("wide", "tall"))}
    assert min(canvases.values()) >= 2
    assert 3 * canvases[1, "square"] <= 2 * len(samples)


# ---- As calibration data --------------------------------------------------------------------------------------------


def all_of(source) -> list[dict]:
    return list(load_samples(source, 100))


def test_without_the_hub_it_is_photographs_and_it_is_said(samples, monkeypatch, caplog):
    def out_of_reach(name):
        assert name == HUB_SET
        raise ConnectionError("no network")

    monkeypatch.setattr(calibration, "get_dataset_split_names", out_of_reach)
    answers = {sample["answer"] for sample in all_of(None)}
    assert answers == {sample["caption"] for sample in samples}
    said = [line for line in caplog.messages if HUB_SET in line]
    assert len(said) == 1
    assert "out of reach: using the photographs" in said[0]


def test_the_hub_is_asked_once_however_often_samples_are_gone_through(monkeypatch):
    asked = []

    def out_of_reach(name):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(calibration, "get_dataset_split_names", out_of_reach)
    data = prepare_dataset_vision(AutoProcessor.from_pretrained(DEMO), 2)
    first, second = ([inputs["pixel_values"] for inputs in data] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert asked == [HUB_SET]


def test_photographs_need_no_network(samples, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_caption = {sample["caption"]: sample for sample in samples}
    loaded = all_of(PHOTOGRAPHS)
    assert not no_network
    assert len(loaded) == len(samples)  # fewer than were asked for, as from a small folder
    for sample in loaded:
        original = by_caption[sample["answer"]]
        assert sample["question"] == original["question"]
        np.testing.assert_array_equal(np.asarray(sample["image"]), np.asarray(original["image"]))
    assert {sample["question"] for sample in loaded} > {QUESTION}
    assert [sample["answer"] for sample in load_samples(PHOTOGRAPHS, 5)] == [sample["answer"] for sample in loaded[:5]]
    assert not list(tmp_path.iterdir())


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / PHOTOGRAPHS).mkdir()
    Image.new("RGB", (60, 60)).save(tmp_path / PHOTOGRAPHS / "mine.png")
    (tmp_path / PHOTOGRAPHS / "metadata.jsonl").write_text('{"file_name": "mine.png", "caption": "mine"}\n')
    monkeypatch.chdir(tmp_path)
    assert [sample["answer"] for sample in all_of(PHOTOGRAPHS)] == ["mine"]


def test_photographs_become_the_vision_encoders_inputs():
    inputs = list(prepare_dataset_vision(AutoProcessor.from_pretrained(DEMO), 3, PHOTOGRAPHS))
    assert len(inputs) == 3
    assert all(set(each) == {"pixel_values", "aspect_ratio_ids", "real_tiles", "tile_counts"} for each in inputs)
    assert len({each["pixel_values"].tobytes() for each in inputs}) == 3


@pytest.mark.parametrize("package", ["skimage", "sklearn"])
def test_a_missing_package_is_named_with_the_fix(package, monkeypatch):
    find = packaged.find_spec
    monkeypatch.setattr(packaged, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(FileNotFoundError, match=rf"{package}/.* is missing.*pip install -r requirements\.txt"):
        all_of(PHOTOGRAPHS)


def test_a_package_without_the_file_is_as_good_as_missing():
    with pytest.raises(FileNotFoundError, match=r"skimage/data/none\.png is missing.*requirements\.txt"):
        packaged.installed("skimage/data/none.png")


def test_a_checkpoints_own_samples(tmp_path):
    assert own_samples(DEMO) == DEMO / "samples"
    assert own_samples(str(DEMO)) == DEMO / "samples"
    assert own_samples("meta-llama/Llama-3.2-11B-Vision-Instruct") is None
    (tmp_path / "samples").mkdir()
    assert own_samples(tmp_path) is None  # no captions


def test_calibration_data_know_nothing_of_the_demo():
    assert "demo_model" not in (ROOT / "ov_mllama/export/calibration.py").read_text(encoding="utf-8")


def test_what_a_model_is_asked_suits_it(pair, demo_dir, tmp_path):
    asked = questions_about(DEMO)
    assert [sample["answer"] for sample in asked] == [sample["answer"] for sample in demo_samples()]
    (golden,) = questions_about(demo_dir)
    assert golden["answer"] == json.loads((DEMO / "golden.json").read_text(encoding="utf-8"))["answer"]
    assert golden["image"].size == (224, 112)
    names = [sample["name"] for sample in questions_about(pair.model_dir)]
    assert names == [sample["name"] for sample in questions_about("meta-llama/Llama-3.2-11B-Vision-Instruct")]
    assert names[:2] == ["astronaut", "patch"]
    folder = tmp_path / "pictures/samples"  # of drawings with captions, nobody knows what to ask about them
    folder.mkdir(parents=True)
    golden["image"].save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "Drawings."}')
    assert own_samples(folder.parent) == folder
    assert [sample["name"] for sample in questions_about(folder.parent)] == names


def test_a_network_that_fails_otherwise_is_no_network_either(monkeypatch, caplog):
    def fails(name):
        raise httpx.RemoteProtocolError("Server disconnected")

    monkeypatch.setattr(calibration, "get_dataset_split_names", fails)
    assert next(load_samples(None, 1))["question"]
    assert f"{HUB_SET} is out of reach" in caplog.text
