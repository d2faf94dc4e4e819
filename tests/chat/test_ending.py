"""Ctrl-C during an answer of a model as slow as the 11B: the real programs end, with nothing lost and nothing left."""

import contextlib
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from chat_page import WHO, Tab, expect, path_of, wait_until
from conftest import DEMO, ROOT, demo_samples
from ov_mllama.chat.store import STOPPED
from ov_mllama_helper import convert_mllama

pytestmark = pytest.mark.alone

SAMPLE = demo_samples()[0]
STEP_S = 1.0  # a dozen steps are an answer
PROGRAM = """
import os, time, types
import numpy as np, openvino as ov, openvino.opset13 as ops
data = os.environ["XDG_DATA_HOME"]
import chat_page, ov_mllama.runtime.model  # and with it another home
os.environ["XDG_DATA_HOME"] = data

def compute(seconds):
    until, request = time.perf_counter() + seconds, square.create_infer_request()
    while time.perf_counter() < until:
        request.infer([np.ones((1000, 1000), np.float32)])

def slow(*arguments, **options):
    model = chat_page.Slow(*arguments, **options)
    model.as_new(step_s={step_s})
    return model

matrix = ops.parameter([1000, 1000])
square = ov.compile_model(ov.Model([ops.matmul(matrix, matrix, False, False)], [matrix]), "CPU")
# within OpenVINO, as the 11B would be, and not within Python
chat_page.time = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=compute)
ov_mllama.runtime.model.OVMLlamaForConditionalGeneration = slow
from ov_mllama.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return convert_mllama(DEMO, tmp_path_factory.mktemp("ending") / "ov")


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def heed_interrupts() -> None:
    """What tests run as a job in the background, which ignores Ctrl-C, would hand down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path, port):
    """`start(url, *arguments)`: a program that begins each step with a busy second, once it answers."""
    programs = []

    def start(url: str, *arguments, step_s=STEP_S) -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM.format(step_s=step_s), *arguments, "--port", str(port)]
        program = subprocess.Popen(  # noqa: S603
            command,
            cwd=ROOT,
            env={
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                "PATH": "",
                "CI": "true",
                "HOME": str(tmp_path),
                "XDG_DATA_HOME": str(tmp_path / "data"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_interrupts,  # noqa: PLW1509
        )
        programs.append(program)

        def answers() -> bool:
            assert program.poll() is None, program.stdout.read()
            try:
                return httpx.get(url).is_success
            except httpx.TransportError:
                return False

        wait_until(answers, 90)
        return program

    yield start
    for program in programs:
        program.kill()
        program.communicate()


def interrupt(program: subprocess.Popen) -> str:
    """Ctrl-C; returns what the program wrote."""
    began = time.perf_counter()
    program.send_signal(signal.SIGINT)
    said, _ = program.communicate(timeout=60)
    assert program.returncode == 0, said
    assert time.perf_counter() - began < 10
    for trouble in ("Traceback", "Error", "terminate"):
        assert trouble not in said
    return said


def test_the_chat_ends_within_an_answer_and_keeps_what_was_said(browser, start, model_dir, port, tmp_path):
    url = f"http://127.0.0.1:{port}/"
    program = start(f"{url}config", "chat", "--model-dir", str(model_dir))
    page = Tab(browser, url)
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    expect(page.bot.last).to_contain_text("One cross", timeout=20_000)
    uploads = tmp_path / "data" / "ov_mllama" / "uploads"
    assert list(uploads.rglob("*.png"))
    interrupt(program)
    page.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "ov_mllama" / "chat.sqlite3")) as kept:
        [(turns,)] = kept.execute("SELECT turns FROM conversations")
    [turn] = json.loads(turns)
    assert turn["state"] == STOPPED
    assert turn["answer"]
    assert SAMPLE["answer"].startswith(turn["answer"].strip())
    assert not list(uploads.rglob("*.png"))


def test_the_chat_ends_at_once_after_its_start(start, model_dir, port):
    """Weights are being repacked then."""
    url = f"http://127.0.0.1:{port}/config"
    program = start(url, "chat", "--model-dir", str(model_dir), step_s=20)
    assert any("Ctrl-C ends it" in line for line in program.stdout)
    time.sleep(0.5)
    interrupt(program)


def test_the_server_ends_within_an_answer_though_a_page_is_open(browser, start, model_dir, port):
    url = f"http://127.0.0.1:{port}"
    program = start(f"{url}/health", "serve", "--model-dir", str(model_dir), "--name", "demo", "--chat")
    page = Tab(browser, f"{url}/chat")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    began, failed = threading.Event(), []

    def ask():
        try:
            for chunk in client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": WHO}], stream=True
            ):
                if chunk.choices[0].delta.content:
                    began.set()
        except (openai.APIError, httpx.RemoteProtocolError) as cut:
            failed.append(cut)

    asking = threading.Thread(target=ask)
    asking.start()
    assert began.wait(60)
    page.ask(WHO)
    interrupt(program)
    page.close()
    asking.join()
    assert failed
