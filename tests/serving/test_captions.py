"""Captions for a folder without Ray: which images, which answers are made, tables and files of each form."""

import csv
import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.make_checkpoint import make_config
from chat_page import path_of
from conftest import demo_samples
from ov_mllama.cli import IMAGE_STORE_MB
from ov_mllama.runtime.errors import InputError, NumericalError, TemplateError
from ov_mllama.runtime.prompts import load_processor
from ov_mllama.serving import caption, caption_answers, caption_outputs
from ov_mllama.serving.caption_answers import Captioner, Prepared, Settings, Task, answer_tasks, prompt_texts
from ov_mllama.serving.caption_arguments import store_megabytes
from ov_mllama.serving.caption_files import find_images, select
from ov_mllama.serving.caption_outputs import COLUMNS, output_for

SAMPLES = demo_samples()
QUESTION = "Describe this image."
FORMS = (".parquet", ".csv", ".jsonl", ".json")
SCHEMA = {"type": "object", "properties": {"count": {"enum": [1, 2, 3]}}, "required": ["count"]}


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """Models that captions are made with in this process, loaded once each."""
    loaded = functools.cache(lambda model_dir: original(model_dir, image_cache_bytes=2_000_000_000))
    original = caption_answers.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_answers, "load", lambda model_dir, **_: loaded(model_dir))
        yield


class Stub:
    """In place of a model: the answer is the image's name."""

    asked: list[Task] = []
    model = "one"

    def __init__(self, *arguments):
        pass

    def prepare(self, tasks, stop=None):
        return list(map(Prepared, tasks))

    def answer(self, batch):
        self.asked.extend(prepared.task for prepared in batch)
        return [{"answer": f"A “{Path(each.task.path).stem}”,\nor \\so", "finish": "stop"} for each in batch]


@pytest.fixture
def stub(monkeypatch):
    """Captions by `Stub`, and what it was asked."""
    monkeypatch.setattr(caption, "Captioner", Stub)
    monkeypatch.setattr(caption, "prompt_texts", lambda *_: {})
    monkeypatch.setattr(caption, "identity", lambda _: dict.fromkeys(("language_model", "vision_encoder"), Stub.model))
    for name in ("files_to_load", "print_load_estimate"):
        monkeypatch.setattr(caption, name, lambda *_: ())
    monkeypatch.setattr(caption, "store_megabytes", lambda *_: 0)
    monkeypatch.setattr(Stub, "asked", [])
    monkeypatch.setattr(Stub, "model", "one")
    return Stub


def run(pictures, out, *options: str, model_dir="here") -> None:
    caption.main([str(pictures), "--out", str(out), "--model-dir", str(model_dir), *options])


def read(out: Path) -> pd.DataFrame:
    """A table as docs/captions.md reads it."""
    readers = {".csv": pd.read_csv, ".jsonl": functools.partial(pd.read_json, lines=True), ".json": pd.read_json}
    return readers.get(out.suffix, pd.read_parquet)(out)


def draw(folder: Path, *names: str) -> Path:
    """Different images."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, len(name))).save(folder / name, "PNG")
    return folder


# ---- Which images ---------------------------------------------------------------------------------------------------


def found(folder: Path, **options) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_images(folder, **options)]


def test_hidden_files_thumbnails_and_resource_forks_are_left_out(tmp_path):
    draw(tmp_path, "a.png", "B.JPG", "sub/c.webp", "._a.png", ".hidden.png", ".thumbnails/a.png", "@eaDir/a.jpg/s.jpg")
    draw(tmp_path, "sub/__MACOSX/c.png", "#recycle/d.png", "$RECYCLE.BIN/e.png", ".@__thumb/f.png")
    (tmp_path / "Thumbs.db").write_text("no image")
    assert found(tmp_path) == ["B.JPG", "a.png", "sub/c.webp"]
    assert found(tmp_path, recursive=False) == ["B.JPG", "a.png"]


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path, caplog):
    draw(tmp_path, "in/a.png", "in/z/b.png", "elsewhere/c.png", "elsewhere/more/d.png")
    folder = tmp_path / "in"
    (folder / "up").symlink_to(folder)
    (folder / "to-z").symlink_to(folder / "z")
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "file.png").symlink_to(tmp_path / "elsewhere" / "c.png")
    (folder / "gone.png").symlink_to(tmp_path / "gone.png")
    assert found(folder) == ["a.png", "file.png", "other/c.png", "other/more/d.png", "z/b.png"]
    assert "1 links lead nowhere, or are no files, such as" in caplog.text


def test_patterns_limit_and_shuffle_select_images(tmp_path):
    draw(tmp_path, *(f"{i}.png" for i in range(9)), "a.JPG", "drafts/b.jpg")
    assert found(tmp_path, include=["*.jpg"]) == ["a.JPG", "drafts/b.jpg"]
    assert found(tmp_path, include=["*.jpg"], exclude=["Drafts/*"]) == ["a.JPG"]
    assert found(tmp_path, exclude=["[0-9].png", "a.*"]) == ["drafts/b.jpg"]
    for folder in ("drafts", "drafts/", "./Drafts", "dra*"):
        assert "drafts/b.jpg" not in found(tmp_path, exclude=[folder])
        assert found(tmp_path, include=[folder]) == ["drafts/b.jpg"]
    images = find_images(tmp_path)
    assert select(images, 3, False) == images[:3]
    shuffled = select(images, None, True)
    assert shuffled != images
    assert sorted(shuffled) == images
    assert select(images, 3, True) == shuffled[:3]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([""], "No folder of images is given: name one, with make as PICTURES="),
        (["gone"], "gone does not exist"),
        (["a.png"], "a.png is a file: give its folder"),
        (["empty"], "holds no images"),
        (["full", "--question-file", "nowhere.txt"], r"nowhere.txt cannot be read \(No such file"),
        (["full", "--exclude", "*"], "holds no images that --include and --exclude leave"),
        (["full", "--out", "captions.xlsx"], r"unknown ending: choose one of .parquet, .csv, .jsonl, .json\."),
        (["full", "--question-file", "questions", "--sidecar"], "there are 2 questions"),
        (["full", "--question-file", "a.png"], "is no UTF-8 text"),
        (["full", "--question-file", "nothing"], "holds no questions"),
        (["full", "--prefix", "x"], "add --sidecar"),
        (["twins", "--sidecar"], "a.jpg and a.png would share .*a.txt"),
        (["full", "--schema", "questions"], "no valid JSON"),
        (["full", "--schema", "list"], "give an object"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_made(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path, "a.png", "full/b.png", "twins/a.png", "twins/a.jpg")
    Path("empty").mkdir()
    Path("questions").write_text("What?\n\nHow many?\nWhat?\n")
    Path("nothing").write_text(" \n")
    Path("list").write_text("[]")
    monkeypatch.setattr(caption, "prepared", lambda options: pytest.fail("made a model"))
    with pytest.raises((ValueError, OSError), match=sentence):
        caption.main(arguments)


# ---- Which answers are made -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_table_of_each_form_is_completed_by_later_runs(stub, tmp_path, form):
    pictures, out = draw(tmp_path / "in", "a.png", "b.png", "c,'\".png"), tmp_path / "out" / f"captions{form}"
    shutil.copy(pictures / "a.png", pictures / "twin.png")
    run(pictures, out, "--limit", "2")
    run(pictures, out, "--batch", "1")
    run(pictures, out)
    assert sorted(Path(task.path).name for task in stub.asked) == ["a.png", "b.png", "c,'\".png"]
    table = read(out)
    assert table.columns.tolist() == COLUMNS
    assert sorted(table["path"]) == [str(path) for path in find_images(pictures)]
    assert table.groupby("id")["path"].count().tolist().count(2) == 1
    assert set(table["answer"]) == {f"A “{stem}”,\nor \\so" for stem in ("a", "b", "c,'\"")}

    stub.asked.clear()
    (pictures / "a.png").rename(pictures / "renamed.png")
    moved = pictures.rename(tmp_path / "moved")
    run(moved, out)
    assert not stub.asked
    table = read(out).set_index("path")["answer"]
    assert all(str(path) in table for path in find_images(moved))
    assert table[str(moved / "renamed.png")].startswith("A “a”")
    rows = len(table)

    another = ["--question", "What?"], ["--system", "Be brief."], []
    for options in (["--max-new-tokens", "9"], *another):
        stub.asked.clear()
        stub.model = "one" if options else "another"
        rows += 4 * (options in another)
        for _ in range(2):
            run(moved, out, *options)
            assert len(read(out)) == rows
        assert len(stub.asked) == 3 * (options in another)
    assert {path.name for path in out.parent.iterdir()} <= {out.name, f".{out.name}.lock"}


def test_progress_has_images_a_minute_and_the_time_left(stub, tmp_path, capsys):
    run(draw(tmp_path / "in", "a.png", "b.png"), tmp_path / "captions.csv")
    assert re.search(r"Captions: 100%.* 2/2 \[[\d:]+, [\d:]+ left, [\d.]+/min\]", capsys.readouterr().err)


@pytest.mark.parametrize("option", [("--temperature", "0.5"), ("--detail", "low"), ("--schema", "schema.json")])
def test_each_option_is_another_question(stub, tmp_path, option):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    option = option[0], option[1].replace("schema.json", str(tmp_path / "schema.json"))
    pictures, out = draw(tmp_path / "in", "a.png"), tmp_path / "captions.csv"
    for options in ((), option, option, ()):
        run(pictures, out, *options)
    assert len(stub.asked) == 2
    assert read(out)[option[0][2:]].nunique(dropna=False) == 2


@pytest.mark.parametrize("form", FORMS[1:3])
def test_row_that_was_cut_anywhere_is_made_again(stub, tmp_path, form):
    pictures, out = draw(tmp_path / "in", "a.png", "b.png"), tmp_path / f"captions{form}"
    run(pictures, out, "--batch", "1")
    whole = out.read_bytes()
    end = whole.index(str(pictures / "b.png").encode())
    start = whole.rindex(b"\n", 0, end) + 1
    for cut in {*range(start, len(whole), 9), *range(len(whole) - 9, len(whole))}:
        out.write_bytes(whole[:cut])
        rows = list(output_for(out).read())
        assert [Path(row["path"]).name for row in rows] == ["a.png"]
        assert out.read_bytes() == whole[:start]
    run(pictures, out)
    assert out.read_bytes() == whole
    for cut in range(0, start, 9):
        out.write_bytes(whole[:cut])
        assert not list(output_for(out).read())


def test_json_of_a_killed_run_is_completed_from_its_lines(stub, tmp_path, monkeypatch):
    pictures, out = draw(tmp_path / "in", "a.png", "b.png"), tmp_path / "captions.json"
    with monkeypatch.context() as patch:
        patch.setattr(caption_outputs.JsonFile, "close", lambda self: None)
        run(pictures, out)
    assert not out.exists()
    lines = (tmp_path / "captions.partial.jsonl").read_bytes()
    for _ in range(2):
        run(pictures, out)
        assert len(stub.asked) == len(read(out)) == 2
        (tmp_path / "captions.partial.jsonl").write_bytes(lines)  # killed before it was removed


@pytest.mark.parametrize("form", FORMS)
def test_file_of_something_else_is_refused_and_stays(stub, tmp_path, form):
    pictures, out = draw(tmp_path / "in", "a.png"), tmp_path / f"captions{form}"
    other = out / "prices.parquet" if form == ".parquet" else out
    other.parent.mkdir(exist_ok=True)
    table = pd.DataFrame({"id": ["0"], "price": [1.0]})
    {".parquet": table.to_parquet, ".csv": table.to_csv}.get(form, table.to_json)(other)
    for content in (other.read_bytes(), b"something else", b"{}", b"[1]", b"\xff\n"):
        other.write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of captions"):
            run(pictures, out)
        assert other.read_bytes() == content


def test_folder_that_an_earlier_version_named_csv_is_named(stub, tmp_path):
    pictures, out = draw(tmp_path / "in", "a.png"), tmp_path / "captions.csv"
    out.mkdir()
    with pytest.raises(ValueError, match=r"is a folder of an earlier version: rename it to \.parquet"):
        run(pictures, out)


@pytest.mark.parametrize("form", FORMS)
def test_full_disk_ends_the_run_and_loses_no_row(stub, tmp_path, monkeypatch, form):
    pictures, out = draw(tmp_path / "in", "a.png", "b.png"), tmp_path / f"captions{form}"
    run(pictures, out, "--limit", "1")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(caption_outputs.pq, "write_table", full)
        patch.setattr(caption_outputs.JsonLinesFile, "_append", full)
        with pytest.raises(OSError, match="cannot be written to: .*No space"):
            run(pictures, out)
    assert len(read(out)) == 1
    run(pictures, out)
    assert len(read(out)) == 2


@pytest.mark.parametrize("form", FORMS[1:])
def test_row_that_a_full_disk_cut_is_not_in_the_file(stub, tmp_path, form):
    resource = pytest.importorskip("resource")
    pictures, out = draw(tmp_path / "in", *(f"{i}.png" for i in range(9))), tmp_path / f"captions{form}"
    run(pictures, out, "--limit", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 300, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written to"):
            run(pictures, out, "--batch", "8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read(out)) == 1
    run(pictures, out)
    assert sorted(read(out)["path"]) == [str(path) for path in find_images(pictures)]


def test_sidecars_follow_the_images(stub, tmp_path):
    pictures, out = draw(tmp_path / "in", "a.png", "more/b.png", "c.png"), tmp_path / "captions.jsonl"
    (pictures / "c.txt").write_text("mine")
    options = ("--sidecar", "--prefix", "tok, ", "--suffix", " .")
    run(pictures, out, *options)
    assert (pictures / "a.txt").read_text() == "tok, A “a”, or \\so .\n"
    assert (pictures / "more" / "b.txt").read_text().startswith("tok, A “b”")
    assert (pictures / "c.txt").read_text() == "mine"
    (pictures / "a.txt").unlink()  # killed before it was written
    shutil.copy(pictures / "a.png", pictures / "twin.png")
    stub.model = "another"
    run(pictures, out, *options)
    assert [Path(task.path).name for task in stub.asked[2:]] == ["a.png"]
    stub.model = "one"
    (pictures / "a.txt").unlink()
    (pictures / "twin.txt").unlink()
    stub.asked.clear()
    run(pictures, out, "--sidecar")
    assert not stub.asked
    assert (pictures / "a.txt").read_text() == (pictures / "twin.txt").read_text() == "A “a”, or \\so\n"
    run(pictures, out, "--sidecar", "--overwrite")
    assert [Path(task.path).name for task in stub.asked] == ["c.png"]
    assert (pictures / "c.txt").read_text() == "A “c”, or \\so\n"
    assert not [*pictures.rglob(".*")]


# ---- Killed ---------------------------------------------------------------------------------------------------------

RUNS = """
import functools, sys
from ov_mllama.serving import caption, caption_answers
original = caption_answers.load
loaded = functools.cache(lambda model_dir: original(model_dir, image_cache_bytes=10**9))
caption_answers.load = lambda model_dir, **_: loaded(model_dir)
pictures, folder, model_dir = sys.argv[1:]
for form in (".parquet", ".csv", ".jsonl", ".json", "-beside.csv"):
    sidecar = ["--sidecar", "--overwrite"] * form.startswith("-")
    out = ["--out", f"{folder}/captions{form}", "--model-dir", model_dir]
    caption.main([pictures, *out, "--batch", "2", "--max-new-tokens", "24", *sidecar])
"""


def progress(folder: Path) -> int:
    """Rows that are written so far, or about so many."""
    lines = sum(path.read_bytes().count(b"\n") for path in folder.glob("captions*") if path.is_file())
    return lines + 2 * len([*folder.glob("captions.parquet/*.parquet")])


@pytest.mark.torture
def test_each_form_killed_at_random_moments_has_each_image_once(nursery, demo_dir, tmp_path, times, tally):
    pictures, folder, count = tmp_path / "in", tmp_path / "out", times(8, 100)
    pictures.mkdir()
    folder.mkdir()
    for i in range(count):
        image = SAMPLES[i % len(SAMPLES)]["image"].convert("RGB").resize((112, 112))
        image.putpixel((i, 0), (i, 0, 0))
        image.save(pictures / f"{i:03}.png")
    kills, total = times(3, 50), 5 * count
    environment = {"OMP_NUM_THREADS": "1"}
    for number in range(kills):
        program = nursery.start(tmp_path, RUNS, pictures, folder, demo_dir, **environment)
        until = (total * number + random.randrange(total)) // kills  # noqa: S311
        while progress(folder) <= until:
            assert program.poll() is None, program.said()
            time.sleep(0.01)
        time.sleep(random.random() / 50)  # noqa: S311 - also within a write
        program.send_signal(signal.SIGKILL)
        program.wait()
    program = nursery.start(tmp_path, RUNS, pictures, folder, demo_dir, **environment)
    assert program.wait(600) == 0, program.said()
    expected = [str(path) for path in find_images(pictures)]
    for form in (*FORMS, "-beside.csv"):
        table = read(folder / f"captions{form}")
        assert sorted(table["path"]) == expected, form
        assert table["answer"].notna().all()
    texts = table.set_index("path")["answer"]
    assert {str(path): path.with_suffix(".txt").read_text() for path in find_images(pictures)} == {
        path: f"{' '.join(answer.split())}\n" for path, answer in texts.items()
    }
    tally("captions runs killed", kills)


# ---- Answers of the demo model --------------------------------------------------------------------------------------


def captioner(demo_dir, **settings) -> Captioner:
    settings = Settings(**{"questions": (QUESTION,), **settings})
    return Captioner(demo_dir, prompt_texts(demo_dir, settings), settings)


def tasks_of(*paths, question=QUESTION) -> list[Task]:
    return [Task(str(number), os.fspath(path), question) for number, path in enumerate(paths)]


def results(captioner: Captioner, tasks: list[Task]) -> list[dict]:
    return [result for batch in answer_tasks(captioner, tasks, 4) for _, result in batch]


def test_each_image_is_answered_rightly_and_what_is_none_says_why(demo_dir, tmp_path, monkeypatch):
    pictures, out = tmp_path / "in", tmp_path / "captions.parquet"
    pictures.mkdir()
    for index in (2, 8, 3, 9):
        shutil.copy(path_of(SAMPLES[index]), pictures)
    Image.effect_noise((112, 112), 5).save(pictures / os.fsdecode(b"p\xeacture.png"))
    (pictures / "broken.png").write_bytes(b"\x89PNG broken")
    frames = [Image.new("RGB", (112, 112), colour) for colour in ("red", "blue")]
    frames[0].save(pictures / "moving.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "questions.txt").write_bytes(f"\ufeff{QUESTION}\r\n\r\n{SAMPLES[3]['question']}\r\n".encode())
    model, _ = caption_answers.load(demo_dir)
    model.forget()
    encoded = []
    original = model.image_encoder._infer
    monkeypatch.setattr(model.image_encoder, "_infer", lambda *given: encoded.append(1) or original(*given))
    for _ in range(2):
        run(pictures, out, "--question-file", str(tmp_path / "questions.txt"), model_dir=demo_dir)
    assert len(encoded) == 6
    table = read(out)
    assert len(table) == 14
    names = table["path"].str.rpartition("/")[2]
    answers = table.set_index([names, "question"])["answer"]
    for index in (2, 8):
        assert answers[path_of(SAMPLES[index]).name, QUESTION] == SAMPLES[index]["answer"]
    assert answers[path_of(SAMPLES[3]).name, SAMPLES[3]["question"]] == SAMPLES[3]["answer"]
    broken = table[names == "broken.png"]
    assert broken["answer"].isna().all()
    assert broken["error"].str.contains("not an image").all()
    assert table["error"].notna().sum() == 2
    assert table[names == "moving.gif"]["remark"].str.contains("several frames").all()
    assert answers["p\ufffdcture.png"].all()


def test_next_batch_is_encoded_while_one_is_answered(demo_dir, monkeypatch):
    """The first answer waits until the third image is encoded."""
    asked = captioner(demo_dir, max_new_tokens=4)
    asked.model.forget()
    encoded, generate = threading.Event(), asked.model.generate
    original, threads = asked.model.image_encoder._infer, []

    def infer(*given):
        threads.append(threading.current_thread())
        image = original(*given)
        if len(threads) == 3:
            encoded.set()
        return image

    def answer(**given):
        assert encoded.wait(60)
        return generate(**given)

    monkeypatch.setattr(asked.model.image_encoder, "_infer", infer)
    monkeypatch.setattr(asked.model, "generate", answer)
    tasks = tasks_of(*(path_of(SAMPLES[index]) for index in (0, 1, 2, 3)))
    assert [task for batch in answer_tasks(asked, tasks, 2) for task, _ in batch] == tasks
    assert len(threads) == 4
    assert threading.main_thread() not in threads


def test_error_does_not_wait_for_images_that_nobody_needs(demo_dir, monkeypatch):
    asked = captioner(demo_dir, max_new_tokens=4)
    stops = []

    def prepare(tasks, stop):
        stops.append(stop)
        if len(stops) > 1:
            assert stop.wait(60)
        return Captioner.prepare(asked, tasks)

    def fail(batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(asked, "prepare", prepare)
    monkeypatch.setattr(asked, "answer", fail)
    with pytest.raises(KeyboardInterrupt):
        results(asked, tasks_of(*[path_of(SAMPLES[0])] * 8))
    assert stops[0].is_set()


def test_answers_match_a_schema(demo_dir):
    schema = json.dumps({**SCHEMA, "additionalProperties": False})
    asked = captioner(demo_dir, schema=schema, max_new_tokens=40)
    got = results(asked, tasks_of(path_of(SAMPLES[0]), path_of(SAMPLES[1])))
    assert [list(json.loads(result["answer"])) for result in got] == [["count"]] * 2
    assert [result["finish"] for result in got] == ["stop"] * 2
    with pytest.raises(InputError, match="cannot be matched"):
        prompt_texts(demo_dir, Settings(schema='{"type": "nothing"}'))


def test_detail_system_prompt_and_temperature_reach_the_model(demo_dir, monkeypatch):
    settings = Settings(("<|image|>What?",), "Be <|eot_id|> brief.", "low", 5, 0.7)
    asked, given = captioner(demo_dir, **vars(settings)), {}

    def generate(**arguments):
        given.update(arguments)
        return arguments["input_ids"]

    monkeypatch.setattr(asked.model, "generate", generate)
    results(asked, tasks_of(path_of(SAMPLES[11]), question="<|image|>What?"))
    assert given["aspect_ratio_mask"].sum() == 1
    assert (given["do_sample"], given["temperature"], given["max_new_tokens"]) == (True, 0.7, 5)
    text = asked.processor.tokenizer.decode(given["input_ids"][0])
    assert "Be <\u200b|eot_id|> brief." in text.split("<|start_header_id|>user")[0]
    assert text.count("<|image|>") == 1


@pytest.mark.parametrize("ends", [None, 510, [505, 510]])
def test_captions_end_at_end_tokens_of_any_form(demo_dir, ends, monkeypatch):
    model, _ = caption_answers.load(demo_dir)
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    [result] = results(captioner(demo_dir, max_new_tokens=40), tasks_of(path_of(SAMPLES[0])))
    assert result["finish"] == ("stop" if ends else "length")


def test_a_template_that_refuses_ends_the_captions_with_its_sentence(demo_dir, tmp_path, monkeypatch):
    _, processor = caption_answers.load(demo_dir)
    monkeypatch.setattr(processor, "chat_template", "{{ raise_exception('Never.') }}")
    monkeypatch.setattr(caption_answers, "load_processor", lambda _: processor)
    with pytest.raises(TemplateError, match=r"The model's chat template refuses the conversation: Never\."):
        run(draw(tmp_path / "in", "a.png"), tmp_path / "out", model_dir=demo_dir)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_into_memory_together_is_asked_one_by_one(demo_dir, monkeypatch):
    asked = captioner(demo_dir)
    generate, sizes = asked.model.generate, []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) in (1, 4, 5):  # all together, and the last two
            raise MemoryError("2 GB too little") if len(sizes) < 5 else NumericalError("not finite")
        return generate(**inputs)

    monkeypatch.setattr(asked.model, "generate", small)
    got = results(asked, tasks_of(*(path_of(SAMPLES[index]) for index in (2, 8, 0, 3))))
    assert sizes == [4, 1, 1, 1, 1]
    assert [result.get("answer") for result in got] == [SAMPLES[2]["answer"], SAMPLES[8]["answer"], None, None]
    assert got[2]["skipped"] == "2 GB too little"
    assert got[3]["error"] == "not finite"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "too little memory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError("out of memory error when reading image file"), "too little memory"),
    ],
)
def test_what_cannot_be_read_now_is_asked_another_time(demo_dir, tmp_path, monkeypatch, error, said):
    def failing(*arguments, **options):
        raise error

    pictures, out = tmp_path / "in", tmp_path / "captions.jsonl"
    pictures.mkdir()
    shutil.copy(path_of(SAMPLES[0]), pictures)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
        with pytest.raises(OSError, match=rf"1 of 1 images were skipped: .* cannot be read \({said}\)\."):
            run(pictures, out, model_dir=demo_dir)
    assert not out.exists()
    gone = results(captioner(demo_dir), tasks_of(os.fsdecode(b"/gone/p\xeacture.png")))
    assert gone == [{"skipped": "/gone/p\ufffdcture.png cannot be read (No such file or directory)."}]
    run(pictures, out, "--max-new-tokens", "4", model_dir=demo_dir)
    assert read(out)["error"].isna().all()


# ---- Which model answered -------------------------------------------------------------------------------------------


def test_folder_of_an_earlier_version_is_read_and_asked_anew(stub, tmp_path):
    pictures, out = draw(tmp_path / "in", "a.png", "b.png", "c.png"), tmp_path / "captions.parquet"
    run(pictures, out, "--batch", "1")
    earlier = ["id", "path", "question", "answer", "finish", "error"]
    for number, part in enumerate(sorted(out.glob("*.parquet"))):
        table = pq.read_table(part).select(earlier)
        pq.write_table(table, out / f"{'0f'[number % 2]}{part.name}")  # before and behind the new files
        part.unlink()
    assert read(out).columns.tolist() == earlier
    stub.asked.clear()
    for _ in range(2):
        run(pictures, out)
    assert len(stub.asked) == 3
    table = read(out)
    assert len(table) == 6
    assert table["language_model"].isna().sum() == table["max_new_tokens"].isna().sum() == 3


def test_rows_of_version_3_2_are_those_of_the_defaults(stub, tmp_path):
    pictures, out = draw(tmp_path / "in", "a.png"), tmp_path / "captions.parquet"
    run(pictures, out)
    [part] = out.glob("*.parquet")
    pq.write_table(pq.read_table(part).select(COLUMNS[:10]), part)
    run(pictures, out)
    run(pictures, out, "--detail", "low")
    assert len(stub.asked) == 2


def test_answers_cut_by_a_lower_limit_are_asked_again_with_a_higher_one(stub, tmp_path, monkeypatch):
    finish = {"finish": "length"}
    original = stub.answer
    monkeypatch.setattr(stub, "answer", lambda self, batch: [each | finish for each in original(self, batch)])
    pictures, out = draw(tmp_path / "in", "a.png"), tmp_path / "captions.csv"
    for limit, asked in ((2, 1), (2, 1), (1, 1), (3, 2), (2, 2)):
        run(pictures, out, "--max-new-tokens", str(limit))
        assert len(stub.asked) == asked
    finish["finish"] = "stop"
    for limit in (128, 1000, 2):
        run(pictures, out, "--max-new-tokens", str(limit))
    assert len(stub.asked) == 3
    assert read(out)["max_new_tokens"].tolist() == [2, 3, 128]


def test_identity_is_of_the_irs_and_not_of_the_folders_name(demo_dir, tmp_path):
    moved = shutil.copytree(demo_dir, tmp_path / "moved")
    assert caption.identity(moved) == {**caption.identity(demo_dir), "model": "moved"}
    row = caption.identity(demo_dir) | Settings().columns() | {"finish": "stop"}
    assert caption.is_final(row, caption.identity(moved) | Settings().columns())
    assert "format=16 bit" in row["language_model"]


def test_workers_share_a_machine_without_taking_the_same_cores(demo_dir):
    """Bound to cores, two workers of one thread each both took the first: half of the pictures a minute."""
    from ov_mllama.serving import load

    model, _ = load(demo_dir, threads=1)
    for compiled in (model.language_model.compiled, model.image_encoder._compile().get_compiled_model()):
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("ENABLE_CPU_PINNING") is False


@pytest.mark.parametrize(("package", "options"), [("ray", ["--workers", "2"]), ("llguidance", ["--schema", "schema"])])
def test_missing_package_is_named_before_a_model_is_made(tmp_path, monkeypatch, package, options):
    monkeypatch.chdir(draw(tmp_path, "a.png"))
    Path("schema").write_text("{}")
    monkeypatch.setattr(caption, "prepared", lambda options: pytest.fail("made a model"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package):
        caption.main([".", *options])


def test_csv_is_read_by_pythons_own_module(stub, tmp_path):
    pictures, out = draw(tmp_path / "in", "a.png", "b.png"), tmp_path / "captions.csv"
    run(pictures, out)
    with out.open(encoding="utf-8", newline="") as file:
        assert [row["answer"] for row in csv.DictReader(file)] == read(out)["answer"].tolist()


@pytest.mark.parametrize("question", ["", "one\rtwo", "one\r\ntwo"])
def test_csv_with_any_question_is_completed(stub, tmp_path, question):
    pictures, out = draw(tmp_path / "in", "a.png", "b\r.png"), tmp_path / "captions.csv"
    for _ in range(2):
        run(pictures, out, "--question", question)
    assert len(stub.asked) == 2
    table = pd.read_csv(out, keep_default_na=False)
    assert [*table.question] == [question] * 2
    assert [*table.path] == [str(path) for path in find_images(pictures)]


FORMULAS = ("=1+1", "+1", "@SUM(1)", "-cmd|'/c calc'!A1", "'=1", "''", "- a list", "'quoted'", "\t=1")


@pytest.mark.parametrize("text", FORMULAS)
def test_csv_holds_no_formula_and_reads_as_it_was(tmp_path, text):
    """Text in an image may make the model write one, and a spreadsheet would compute it."""
    output = output_for(tmp_path / "captions.csv")
    row = dict.fromkeys(COLUMNS) | {"id": "1", "path": "a", "question": text, "answer": text, "finish": "stop"}
    output.write([row])
    with output.path.open(encoding="utf-8", newline="") as file:
        (cells,) = csv.DictReader(file)
    assert not re.match(r"[=+@\t\r]|-\S", cells["answer"])
    assert [*output.read()] == [row]


def test_second_question_reads_encoded_images_from_disk(demo_dir, tmp_path, monkeypatch):
    """With a budget that holds the whole folder; else each would be evicted before it is read."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("ov_mllama.runtime.image_store.free_disk", lambda folder: 1e12)
    model, _ = caption_answers.load(demo_dir)
    encoded, original = [], model.image_encoder._infer
    monkeypatch.setattr(model.image_encoder, "_infer", lambda *given: encoded.append(1) or original(*given))
    monkeypatch.setattr(model.image_encoder, "store", None)

    def load(model_dir, image_store, **_):
        model.forget()  # as a new process
        model.image_encoder.store = None
        if image_store:
            model.image_encoder.use_store(image_store)
        return model, load_processor(model_dir)

    monkeypatch.setattr(caption_answers, "load", load)
    pictures = tmp_path / "in"
    pictures.mkdir()
    for index in (0, 2):
        shutil.copy(path_of(SAMPLES[index]), pictures)
    for question, options, known in (("What?", (), 2), ("Which?", (), 2), ("Why?", ("--image-store-mb", "0"), 4)):
        run(pictures, tmp_path / "captions.csv", "--question", question, *options, model_dir=demo_dir)
        assert len(encoded) == known
    assert read(tmp_path / "captions.csv")["answer"].notna().sum() == 6


def test_folder_that_the_store_does_not_hold_leaves_it_alone(tmp_path):
    make_config(40, 32, 8).save_pretrained(tmp_path)  # the 11B's
    assert [store_megabytes(None, images, tmp_path) for images in (9, 10)] == [IMAGE_STORE_MB, 0]
    assert store_megabytes(7, 10, tmp_path) == 7


def test_text_beside_an_image_with_the_longest_name(stub, tmp_path):
    name = "n" * 251
    run(draw(tmp_path / "in", f"{name}.png"), tmp_path / "captions.csv", "--sidecar")
    assert (tmp_path / "in" / f"{name}.txt").exists()


def test_folder_of_images_is_no_output(stub, tmp_path):
    pictures = draw(tmp_path / "in", "a.png")
    with pytest.raises(InputError, match="the folder of the images: choose another"):
        run(pictures, pictures)
    assert len([*pictures.iterdir()]) == 1


def test_schema_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8-sig")
    assert json.loads(caption_answers.parse_schema_file(tmp_path / "schema.json")) == SCHEMA
