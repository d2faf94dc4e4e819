"""Ctrl-C during an answer of a model as slow as the 11B: the real programs end, with nothing lost and nothing left."""

import contextlib
import json
import signal
import sqlite3
import threading
import time

import httpx
import openai
import pytest

from chat_page import WHO, Tab, expect, path_of, wait_until
from conftest import demo_samples
from openai_client import HTTP, openai_client
from ov_mllama.chat.turns import STOPPED
from programs import free_port

SAMPLE = demo_samples()[0]
PROGRAM = """
import os, time, types
import numpy as np, openvino as ov, openvino.opset13 as ops
import chat_page, ov_mllama.__main__, ov_mllama.runtime.model

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count()))  # or a busy step leaves a worker's browser no time

def compute(seconds):
    until, request = time.perf_counter() + seconds, square.create_infer_request()
    while time.perf_counter() < until:
        request.infer([np.ones((1000, 1000), np.float32)])

def slow(*arguments, **options):
    model = chat_page.Slow(*arguments, **options)
    model.as_new(step_s={step_s})
    model.free_steps = {free_steps}
    return model

matrix = ops.parameter([1000, 1000])
square = ov.compile_model(ov.Model([ops.matmul(matrix, matrix, False, False)], [matrix]), "CPU")
# within OpenVINO, as the 11B would be, and not within Python
chat_page.time = types.SimpleNamespace(perf_counter=time.perf_counter, sleep=compute)
ov_mllama.runtime.model.OVMLlamaForConditionalGeneration = slow
ov_mllama.__main__.OVMLlamaForConditionalGeneration = slow
ov_mllama.__main__.main()
"""


@pytest.fixture
def begin(start, tmp_path):
    """`begin(url, step_s, free_steps, *arguments)`: a program whose steps are busy for so long, but for the first ones;
    once it answers."""

    def begin(url: str, step_s: float, free_steps: int, *arguments):
        data = str(tmp_path / "data")
        code = PROGRAM.format(step_s=step_s, free_steps=free_steps)
        program = start(code, *arguments, HOME=str(tmp_path), XDG_DATA_HOME=data, PATH="")

        def answers() -> bool:
            assert program.poll() is None, program.said()
            with contextlib.suppress(httpx.TransportError):
                return HTTP.get(url).is_success
            return False

        wait_until(answers, 90)
        return program

    return begin


def interrupt(program) -> str:
    """Ctrl-C; returns what the program wrote. It ends though the step under way has minutes to go."""
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 0, program.said()
    for trouble in ("Traceback", "Error", "terminate"):
        assert trouble not in program.said()
    return program.said()


def test_the_chat_ends_within_an_answer_and_keeps_what_was_said(browser, begin, demo_dir, tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    program = begin(f"{url}config", 600, 7, "chat", "--model-dir", demo_dir, "--port", port)
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


def test_the_chat_ends_at_once_after_its_start(begin, demo_dir):
    """Weights are being repacked then."""
    port = free_port()
    program = begin(f"http://127.0.0.1:{port}/config", 600, 0, "chat", "--model-dir", demo_dir, "--port", port)
    wait_until(lambda: "Ctrl-C ends it" in program.said())
    time.sleep(0.5)  # or it ends before they are
    interrupt(program)


def test_the_server_ends_within_an_answer_though_a_page_is_open(browser, begin, demo_dir):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = ("serve", "--model-dir", demo_dir, "--port", port, "--name", "demo", "--chat")
    program = begin(f"{url}/health", 1, 5, *serve)  # it waits for a step's end
    page = Tab(browser, f"{url}/chat")
    client = openai_client(url)
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
