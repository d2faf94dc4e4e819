"""Captions for a folder on Ray Data, and the server's replicas on Ray Serve: what is killed is done again, once."""

import contextlib
import errno
import functools
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chat_page import SELF, WHO, path_of, wait_until
from conftest import demo_samples
from openai_client import openai_client
from ov_mllama_compression import compress
from programs import environment_behind, free_port, refusing_proxy

SAMPLES = demo_samples()
QUESTION = "Describe this image."


@pytest.fixture(scope="module")
def count(times):
    """Number of different pictures in the folder, the broken one among them."""
    return len(SAMPLES) + 2 + times(4, 80)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, count):
    """The samples, one of them twice, one whose name is no text, noise, and what is none."""
    folder = tmp_path_factory.mktemp("scale") / "pictures"
    (folder / "more").mkdir(parents=True)
    for sample in SAMPLES:
        shutil.copy(path_of(sample), folder)
    shutil.copy(path_of(SAMPLES[0]), folder / "more" / "again.png")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "notes.txt").write_text("no picture")
    Image.effect_noise((112, 112), 5).save(folder / os.fsdecode(b"p\xeacture.png"))
    for i in range(count - len(SAMPLES) - 2):
        Image.effect_noise((112, 112), i + 6).save(folder / f"noise-{i}.png")
    return folder


@pytest.fixture(scope="module")
def proxy(nursery, tmp_path_factory):
    """Requests to a proxy that can reach nothing, in the environment of these tests and of what they start."""
    with refusing_proxy() as (address, asked), pytest.MonkeyPatch.context() as environment:
        for name in ("no_proxy", "NO_PROXY"):
            environment.setenv(name, "")  # so that what is set meanwhile ends with the tests
            environment.delenv(name)
        for name, value in environment_behind(f"http://{address}", tmp_path_factory.mktemp("home")).items():
            environment.setenv(name, value)
        # each of Ray's dozen processes imports jsonschema, and that a package of JupyterLab's, which takes 1.3 s
        without = tmp_path_factory.mktemp("without")
        (without / "rfc3987_syntax.py").write_text("raise ImportError")
        # and looks for garbage among what it imports, which takes a second
        (without / "sitecustomize.py").write_text("import gc; gc.set_threshold(50_000)")
        environment.setenv("PYTHONPATH", str(without))
        yield asked
    # Ray looks whether it runs in a cloud, at addresses that every provider has
    assert not [line for line in asked if "169.254.169.254" not in line and "metadata.google.internal" not in line]


@pytest.fixture(scope="module")
def killed(proxy, nursery, demo_dir, pictures, tmp_path_factory, times):
    """Captions of the pictures, made by runs that were killed and one that was not, and the rows after each kill. Ray
    runs on in this process."""
    import ray

    from ov_mllama.serving.caption import main

    folder, rows = tmp_path_factory.mktemp("captioned"), []
    out = folder / "captions.parquet"
    arguments = [str(pictures), "--question", QUESTION, "--out", str(out), "--model-dir", str(demo_dir)]

    def run():
        code = "from ov_mllama.__main__ import main; main()"
        environment = {"no_proxy": None, "NO_PROXY": None, **os.environ}
        return nursery.start(folder, code, "caption", *arguments, "--batch", "1", **environment)

    for _ in range(times(1, 10)):
        files = len(list(out.glob("*.parquet"))) + random.randint(1, 3)  # noqa: S311
        program = run()
        process = psutil.Process(program.pid)
        while len(list(out.glob("*.parquet"))) < files:
            assert program.poll() is None, program.said()
            time.sleep(0.02)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):  # one dies of another's death
                each.send_signal(signal.SIGKILL)
        program.wait()
        rows.append(len(pd.read_parquet(out)))
    (out / ".env").write_text("mine")
    (out / f".{'0' * 32}.123").write_text("half a file")
    if times(False, True):
        assert run().wait(600) == 0
    main(arguments)
    yield out, rows
    ray.shutdown()


@pytest.fixture(scope="module")
def captioned(killed):
    """Captions of the pictures, made once."""
    return killed[0]


@pytest.fixture
def here(monkeypatch):
    """Captions in this process: to start another one takes Ray longer than the captions."""

    def map_batches(data, worker, fn_constructor_args, **options):
        captioner = worker(*fn_constructor_args)
        return SimpleNamespace(iter_batches=lambda **options: map(captioner, data.iter_batches(batch_size=4)))

    monkeypatch.setattr("ray.data.Dataset.map_batches", map_batches)


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """Models that captions are made with in this process, loaded once each."""
    from ov_mllama.serving import caption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption, "load", functools.cache(caption.load))
        yield


@pytest.fixture
def out(captioned, tmp_path):
    """A copy of those captions."""
    return shutil.copytree(captioned, tmp_path / "captions.parquet")


# ---- A folder of pictures -------------------------------------------------------------------------------------------


@pytest.mark.torture
def test_killed_at_random_moments_behind_a_proxy_it_asks_each_picture_once(killed, demo_dir, pictures, count):
    from ov_mllama.serving.caption import caption

    out, rows = killed
    assert rows[0] > 0
    assert rows[-1] < count, "it was over before it was killed"
    table = pd.read_parquet(out)
    assert len(table) == table["id"].nunique() == count
    assert {path.name for path in out.glob(".*")} <= {".env", ".lock"}
    assert (out / ".env").read_text() == "mine"
    assert caption(pictures, QUESTION, out, demo_dir) == 0


def test_every_picture_once_and_what_is_none_says_why(out, demo_dir, pictures, count, here):
    from ov_mllama.serving.caption import caption

    table = pd.read_parquet(out)
    broken = table[table["error"].notna()]
    assert broken["path"].tolist() == [str(pictures / "broken.png")]
    assert "not an image" in broken["error"].item()
    [noise] = table[table["path"].str.contains("\ufffd")].to_dict("records")
    assert noise["answer"]
    answers = {path.rpartition("/")[2]: answer for path, answer in zip(table["path"], table["answer"], strict=True)}
    assert answers[path_of(SAMPLES[2]).name] == SAMPLES[2]["answer"]
    assert answers[path_of(SAMPLES[8]).name] == SAMPLES[8]["answer"]

    assert caption(pictures, "How many shapes are there?", out, demo_dir) == count
    assert caption(pictures, QUESTION, out, demo_dir) == 0
    table = pd.read_parquet(out)
    assert table.groupby("question")["id"].nunique().tolist() == [count] * 2
    assert len(table) == 2 * count


def test_a_folder_with_something_else_and_more_threads_than_cores(captioned, demo_dir, pictures, tmp_path):
    from ov_mllama.serving.caption import caption

    (tmp_path / "other.parquet").write_text("something else")
    with pytest.raises(ValueError, match=r"other.parquet is not a file of captions"):
        caption(pictures, QUESTION, tmp_path, demo_dir)
    with pytest.raises(ValueError, match="64 cores"):
        caption(pictures, QUESTION, tmp_path / "out", demo_dir, threads=64)


@pytest.mark.parametrize("ends", [None, 510, [505, 510]])
def test_captions_end_at_end_tokens_of_any_form(demo_dir, tmp_path, ends, monkeypatch):
    from ov_mllama.serving.caption import Captioner

    captioner = Captioner(str(demo_dir), QUESTION, str(tmp_path), 40, None)
    monkeypatch.setattr(captioner.model.generation_config, "eos_token_id", ends)
    captioner({"id": ["0"], "path": [os.fsencode(path_of(SAMPLES[0]))]})
    assert pd.read_parquet(tmp_path)["finish"].tolist() == ["stop" if ends else "length"]


def test_a_template_that_refuses_ends_the_captions_with_its_sentence(demo_dir, tmp_path, monkeypatch):
    from ov_mllama.serving.caption import Captioner

    captioner = Captioner(str(demo_dir), QUESTION, str(tmp_path), 40, None)
    monkeypatch.setattr(captioner.processor, "chat_template", "{{ raise_exception('Never.') }}")
    batch = {"id": ["0", "1"], "path": [os.fsencode(path_of(sample)) for sample in SAMPLES[:2]]}
    assert captioner(batch)["fatal"] == ["The model's chat template refuses the conversation: Never."] * 2
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_into_memory_together_is_asked_one_by_one(demo_dir, tmp_path, monkeypatch):
    from ov_mllama.serving.caption import Captioner, finished_ids

    captioner = Captioner(str(demo_dir), QUESTION, str(tmp_path), 128, None)
    paths = [str(path_of(sample)) for sample in SAMPLES[:3]]
    generate, sizes = captioner.model.generate, []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) in (1, 4):  # all together, and the last one
            raise MemoryError("2 GB too little")
        return generate(**inputs)

    monkeypatch.setattr(captioner.model, "generate", small)
    batch = {"id": ["0", "1", "2"], "path": list(map(os.fsencode, paths))}
    assert captioner(batch)["skipped"] == ["", "", "2 GB too little"]
    assert sizes == [3, 1, 1, 1]
    assert finished_ids(tmp_path, QUESTION) == {"0", "1"}
    monkeypatch.undo()
    assert captioner({"id": ["2"], "path": batch["path"][2:]})["skipped"] == [""]
    table = pd.read_parquet(tmp_path).sort_values("id")
    assert table["answer"].tolist()[2] == SAMPLES[2]["answer"]
    assert table["error"].isna().all()


def test_what_cannot_be_read_now_is_asked_another_time(demo_dir, tmp_path):
    from ov_mllama.serving.caption import Captioner, finished_ids

    captioner = Captioner(str(demo_dir), QUESTION, str(tmp_path), 128, None)
    batch = {"id": ["0", "1"], "path": [os.fsencode(path_of(SAMPLES[0])), b"/gone/p\xeacture.png"]}
    assert captioner(batch)["skipped"] == ["", "/gone/p\ufffdcture.png cannot be read (No such file or directory)."]
    assert finished_ids(tmp_path, QUESTION) == {"0"}


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
def test_picture_that_the_machine_cannot_open_is_left_for_another_run(demo_dir, tmp_path, monkeypatch, error, said):
    from ov_mllama.serving.caption import Captioner, finished_ids

    def failing(*arguments, **options):
        raise error

    captioner, path = Captioner(str(demo_dir), QUESTION, str(tmp_path), 128, None), path_of(SAMPLES[0])
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
        [left] = captioner({"id": ["0"], "path": [os.fsencode(path)]})["skipped"]
    assert left == f"{path} cannot be read ({said})."
    assert finished_ids(tmp_path, QUESTION) == set()
    assert captioner({"id": ["0"], "path": [os.fsencode(path)]})["skipped"] == [""]
    assert pd.read_parquet(tmp_path)["error"].isna().all()


# ---- Which model answered -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smaller(demo_dir, tmp_path_factory):
    """The same model with its language model in 8 bit, in a folder of another name."""
    folder = shutil.copytree(demo_dir, tmp_path_factory.mktemp("smaller") / "smaller")
    compress(folder, algo="int8_asym")
    return folder


def test_another_model_is_asked_anew_beside_the_first(out, demo_dir, smaller, pictures, count, tmp_path, here):
    from ov_mllama.serving.caption import caption

    assert caption(pictures, QUESTION, out, smaller) == count
    assert caption(pictures, QUESTION, out, demo_dir) == caption(pictures, QUESTION, out, smaller) == 0
    table = pd.read_parquet(out)
    assert table.groupby("model")["id"].nunique().to_dict() == {demo_dir.name: count, "smaller": count}
    assert len(table) == 2 * count
    for name, column in (("format=int8_asym", "language_model"), ("format=16 bit", "vision_encoder")):
        assert table[table["model"] == "smaller"][column].str.contains(name).all()
    assert table["language_model"].nunique() == 2
    assert table["vision_encoder"].nunique() == 1
    moved = shutil.copytree(demo_dir, tmp_path / "moved")  # the same IRs under another name are the same model
    assert caption(pictures, QUESTION, out, moved) == 0


def test_folder_of_an_earlier_version_is_read_and_asked_anew(out, demo_dir, pictures, count, here):
    from ov_mllama.serving.caption import caption

    earlier = ["id", "path", "question", "answer", "finish", "error"]
    for number, part in enumerate(sorted(out.glob("*.parquet"))):
        table = pq.read_table(part).select(earlier)
        pq.write_table(table, out / f"{'0f'[number % 2]}{part.name}")  # before and behind the new files
        part.unlink()
    assert pd.read_parquet(out).columns.tolist() == earlier
    assert caption(pictures, QUESTION, out, demo_dir) == count
    table = pd.read_parquet(out)
    assert len(table) == 2 * count
    assert table["model"].isna().sum() == table["max_new_tokens"].isna().sum() == count
    assert set(table["model"].dropna()) == {demo_dir.name}
    assert caption(pictures, QUESTION, out, demo_dir) == 0


def test_answers_cut_by_a_lower_limit_are_asked_again_with_a_higher_one(demo_dir, tmp_path):
    from ov_mllama.serving.caption import Captioner, finished_ids, identity

    batch = {"id": ["0", "2"], "path": [os.fsencode(path_of(SAMPLES[i])) for i in (0, 2)]}
    asked = identity(demo_dir)

    def done(limit: int) -> set[str]:
        return finished_ids(tmp_path, QUESTION, asked | {"max_new_tokens": limit})

    Captioner(str(demo_dir), QUESTION, str(tmp_path), 2, None)(batch)
    assert pd.read_parquet(tmp_path)["finish"].tolist() == ["length"] * 2
    assert done(2) == done(1) == {"0", "2"}
    assert done(3) == done(128) == set()
    Captioner(str(demo_dir), QUESTION, str(tmp_path), 128, None)(batch)
    table = pd.read_parquet(tmp_path).sort_values("max_new_tokens")
    assert table["max_new_tokens"].tolist() == [2, 2, 128, 128]
    assert table["finish"].tolist() == ["length"] * 2 + ["stop"] * 2
    assert done(128) == done(2) == done(1000) == {"0", "2"}
    assert finished_ids(tmp_path, QUESTION, asked | {"language_model": "another", "max_new_tokens": 1}) == set()
    assert table.groupby(["id", "question", "model"]).last()["answer"].tolist()[1] == SAMPLES[2]["answer"]


def test_parquet_files_of_something_else_are_refused_and_stay(tmp_path):
    from ov_mllama.serving.caption import finished_ids

    pd.DataFrame({"id": ["0"], "price": [1.0]}).to_parquet(tmp_path / "prices.parquet")
    before = (tmp_path / "prices.parquet").read_bytes()
    with pytest.raises(ValueError, match="prices.parquet is not a file of captions"):
        finished_ids(tmp_path, QUESTION)
    assert (tmp_path / "prices.parquet").read_bytes() == before


def test_where_no_more_can_be_written_it_ends(demo_dir, tmp_path, monkeypatch):
    from ov_mllama.serving import caption

    captioner = caption.Captioner(str(demo_dir), QUESTION, str(tmp_path), 128, None)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caption.pq, "write_table", full)
    [end] = captioner({"id": ["0"], "path": [os.fsencode(path_of(SAMPLES[0]))]})["fatal"]
    assert "cannot be written to" in end
    assert "No space" in end


def test_workers_share_a_machine_without_taking_the_same_cores(demo_dir):
    """Bound to cores, two workers of one thread each both took the first: half of the pictures a minute."""
    from ov_mllama.serving import load

    model, _ = load(demo_dir, threads=1)
    for compiled in (model.language_model.compiled, model.image_encoder._compile().get_compiled_model()):
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("ENABLE_CPU_PINNING") is False


def test_a_folder_without_pictures(tmp_path):
    from ov_mllama.serving.caption import caption

    with pytest.raises(FileNotFoundError, match="holds no images"):
        caption(tmp_path, QUESTION, tmp_path / "out", tmp_path)


# ---- Replicas -------------------------------------------------------------------------------------------------------


def replicas() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(each.cmdline())]


def test_a_killed_replica_loses_no_request(captioned, demo_dir, times):
    from ray import serve

    from ov_mllama.serving.replicas import Arguments, app

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    client = openai_client(f"http://127.0.0.1:{port}", timeout=60)

    def ask(_=None) -> str:
        question = [{"role": "user", "content": WHO}]
        try:
            return client.chat.completions.create(model=demo_dir.name, messages=question).choices[0].message.content
        except openai.APIError as error:
            return type(error).__name__

    serve.run(app(Arguments(model_dir=str(demo_dir), replicas=2, threads=1)), name="chat", route_prefix="/")
    assert ask() == SELF
    assert len(replicas()) == 2
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(times(80, 200))]
        wait_until(lambda: sum(each.done() for each in asked) >= 20, 60)
        os.kill(replicas()[0].pid, signal.SIGKILL)
        answers = [each.result(timeout=90) for each in asked]
    refused = [answer for answer in answers if answer != SELF]
    assert len(refused) <= 16, refused
    assert set(refused) <= {"InternalServerError", "APIConnectionError", "APIStatusError"}
    wait_until(lambda: len(replicas()) == 2, 90)
    assert [ask() for _ in range(10)] == [SELF] * 10
