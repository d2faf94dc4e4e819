"""Copied into an empty folder, the files that docs/architecture.md names are enough: nothing else of the repository is.

Inference with the folder `ov_mllama` alone, without NNCF and the like, is in `tests/test_house.py`.
"""

import json
import shutil

import pytest

from conftest import ROOT
from programs import run_alone

ALONE = """
import importlib.util, sys
from pathlib import Path

import ov_mllama
assert Path(ov_mllama.__file__).is_relative_to(Path.cwd()), ov_mllama.__file__
here = {path.stem for path in Path.cwd().iterdir()}
for name in ("demo_model", "conftest", "notebook_utils", "data_preprocessing", "ov_mllama_compression"):
    assert name in here or not importlib.util.find_spec(name), name
model_dir, pictures = sys.argv[1:]
"""

COMPRESS_ALONE = """
from ov_mllama.export.compress import compress_language_model
from ov_mllama.export.settings import Settings
made = compress_language_model(model_dir, Settings.of(group_size=32)).name, None
"""

CALIBRATE = """
from ov_mllama_compression import compress, optimize_vision_encoder
language = compress(model_dir, dataset_size=2, awq=True, group_size=32, source=pictures)
vision = optimize_vision_encoder(model_dir, "INT8 quantization", dataset_size=2, source="photographs")
made = language.name, vision.name
assert language.is_file() and vision.is_file()
"""

ANSWER = """
from transformers import AutoProcessor
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.export.samples import photographs

model = OVMLlamaForConditionalGeneration(
    model_dir, language_model_name=made[0], image_encoder_name=made[1], check_golden=False
)
processor = AutoProcessor.from_pretrained(model_dir)
inputs = processor(text="<|image|>What?", images=[photographs()[0]["image"]], return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=3, eos_token_id=None)
print("New tokens:", output.shape[1] - inputs["input_ids"].shape[1])
"""


@pytest.fixture
def pictures(pair, tmp_path):
    """A folder of two pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for name, size in (("one.png", (1, 1)), ("two.png", (2, 1))):
        pair.picture(*size).save(folder / name)
        lines.append(json.dumps({"file_name": name, "caption": "noise"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (("ov_mllama",), COMPRESS_ALONE),
        (("ov_mllama", "ov_mllama_compression.py", "data_preprocessing.py"), CALIBRATE),
    ],
    ids=["engine", "calibration"],
)
def test_copied_files_are_enough(files, code, copy, pictures, bare_nursery, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in files:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    code, home = ALONE + code + ANSWER, str(tmp_path / "home")
    printed = run_alone(bare_nursery, tmp_path, folder, folder, code, copy, pictures, HOME=home)
    assert printed.splitlines()[-1] == "New tokens: 3"
    assert {path.name for path in folder.iterdir()} == set(files)  # nothing is written beside them
