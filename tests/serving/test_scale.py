"""Captions for a folder on Ray Data, and the server's replicas on Ray Serve: a killed one loses no request."""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pandas as pd
import psutil
import pytest

from chat_page import SELF, WHO, path_of, wait_until
from conftest import demo_samples
from openai_client import openai_client
from programs import environment_behind, free_port, refusing_proxy

SAMPLES = demo_samples()


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
def captioned(proxy, demo_dir, tmp_path_factory):
    """Captions of a few images in a CSV file, made on Ray, which runs on in this process."""
    import ray

    from ov_mllama.serving.caption import main

    folder = tmp_path_factory.mktemp("captioned")
    pictures, out = folder / "pictures", folder / "captions.csv"
    pictures.mkdir()
    for index in (2, 3, 8):
        shutil.copy(path_of(SAMPLES[index]), pictures)
    shutil.copy(path_of(SAMPLES[2]), pictures / os.fsdecode(b"p\xeacture.png"))
    (pictures / "broken.png").write_bytes(b"\x89PNG broken")
    arguments = [str(pictures), "--out", str(out), "--model-dir", str(demo_dir), "--batch", "2"]
    main([*arguments, "--address", "local"])
    main(arguments)  # nothing is left to do without Ray
    yield out
    ray.shutdown()


def test_captions_on_ray_are_in_the_same_table(captioned):
    table = pd.read_csv(captioned)
    answers = {path.rpartition("/")[2]: answer for path, answer in zip(table["path"], table["answer"], strict=True)}
    assert len(table) == 5
    assert answers[path_of(SAMPLES[2]).name] == answers["p\ufffdcture.png"] == SAMPLES[2]["answer"]
    assert answers[path_of(SAMPLES[8]).name] == SAMPLES[8]["answer"]
    assert table["error"].dropna().str.contains("not an image").tolist() == [True]


def test_more_threads_than_cores_are_refused(captioned):
    from ov_mllama.serving.caption_ray import threads_per_worker

    with pytest.raises(ValueError, match="64 cores"):
        threads_per_worker(1, 64)
    assert threads_per_worker(1, None) is None
    assert threads_per_worker(2, None) >= 1


# ---- Replicas -------------------------------------------------------------------------------------------------------


def replicas() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(each.cmdline())]


@pytest.mark.torture
def test_a_killed_replica_loses_no_request(captioned, demo_dir, request):
    """With --torture two replicas, one of which is killed; else one that answers."""
    from ray import serve

    from ov_mllama.serving.replicas import Arguments, app

    port, count = free_port(), 2 if request.config.getoption("--torture") else 1
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    client = openai_client(f"http://127.0.0.1:{port}", timeout=60)

    def ask(_=None) -> str:
        question = [{"role": "user", "content": WHO}]
        try:
            return client.chat.completions.create(model=demo_dir.name, messages=question).choices[0].message.content
        except openai.APIError as error:
            return type(error).__name__

    serve.run(app(Arguments(model_dir=str(demo_dir), replicas=count, threads=1)), name="chat", route_prefix="/")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [SELF] * 16
        assert len(replicas()) == count
        if count == 1:
            return
        asked = [pool.submit(ask) for _ in range(200)]
        wait_until(lambda: sum(each.done() for each in asked) >= 20, 60)
        os.kill(replicas()[0].pid, signal.SIGKILL)
        answers = [each.result(timeout=90) for each in asked]
    refused = [answer for answer in answers if answer != SELF]
    assert len(refused) <= 16, refused
    assert set(refused) <= {"InternalServerError", "APIConnectionError", "APIStatusError"}
    wait_until(lambda: len(replicas()) == 2, 90)
    assert [ask() for _ in range(10)] == [SELF] * 10
