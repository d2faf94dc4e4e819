"""The server while its model is loaded, and programs that end before they serve."""

import contextlib
import signal

import httpx
import pytest

from chat_page import SELF, wait_until
from openai_client import ASKED, HTTP, KEY, is_openai_error, post, served
from ov_mllama.serving.app import create_app
from ov_mllama.serving.loading import Gate
from ov_mllama.serving.scheduler import Scheduler
from programs import free_port


def test_gate_is_503_until_it_is_opened(slow_demo, processor):
    slow_demo.as_new()
    gate = Gate()
    with served(gate) as url:
        answer = HTTP.get(f"{url}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        assert int(answer.headers["Retry-After"]) > 0
        for answer in (post(url, ASKED), HTTP.get(f"{url}/v1/models"), HTTP.get(f"{url}/chat/")):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert is_openai_error(answer)
            assert answer.headers["x-content-type-options"] == "nosniff"
        batches = Scheduler(slow_demo, processor)
        gate.open(create_app(batches, "demo", KEY))
        assert HTTP.get(f"{url}/health").json() == {"status": "ok"}
        assert post(url, ASKED).json()["choices"][0]["message"]["content"] == SELF
    assert not batches.alive  # closed with the server


def test_gate_tells_what_keeps_an_app_from_starting():
    @contextlib.asynccontextmanager
    async def lifespan(app):
        raise OSError("no disk")
        yield

    from fastapi import FastAPI

    gate = Gate()
    with served(gate) as url:
        with pytest.raises(OSError, match="no disk"):
            gate.open(FastAPI(lifespan=lifespan))
        assert HTTP.get(f"{url}/health").status_code == 503


LOADING = """
import pathlib, sys, time
from ov_mllama.serving import app
from ov_mllama.cli import exit_on_user_error
from ov_mllama.runtime.errors import InputError, OutOfMemoryError
def load(*given, **options):
    while not pathlib.Path({go!r}).exists():
        time.sleep(0.02)
    {then}
app.load = load
app.prepared = lambda options: options.model_dir or pathlib.Path("models/demo_model")
app.files_to_load = lambda *given: (None, None)
app.print_load_estimate = lambda *given: None
with exit_on_user_error():
    app.main(sys.argv[1:])
"""


def health(port: int) -> httpx.Response | None:
    """None while nothing listens there."""
    with contextlib.suppress(httpx.TransportError):
        return HTTP.get(f"http://127.0.0.1:{port}/health")
    return None


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        ("raise InputError('The weights are of another model.')", 1, "❌ The weights are of another model."),
        ("raise OutOfMemoryError('2 GB too little.')", 1, "❌ 2 GB too little."),
        ("raise RuntimeError('strange')", 1, "RuntimeError: strange"),
        ("raise SystemExit(7)", 7, ""),
    ],
)
def test_loading_that_fails_ends_the_program_with_its_sentence(start, tmp_path, then, code, said):
    port, go, answers = free_port(), tmp_path / "go", []
    program = start(LOADING.format(go=str(go), then=then), "--port", port)

    def ended() -> bool:
        if answer := health(port):
            answers.append(answer)
            go.touch()
        return program.poll() is not None

    wait_until(ended, 60)
    assert program.returncode == code, program.said()
    assert said in program.said()
    assert answers
    assert all((answer.status_code, answer.json()) == (503, {"status": "loading"}) for answer in answers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_can_be_interrupted(start, tmp_path, number):
    port = free_port()
    program = start(LOADING.format(go=str(tmp_path / "never"), then="pass"), "--port", port)
    wait_until(lambda: health(port), 60)
    program.send_signal(number)
    assert program.wait() == 130
    assert "Traceback" not in program.said()


def test_empty_key_ends_the_program_with_a_sentence(start, tmp_path):
    (tmp_path / "key").write_text("", encoding="utf-8")
    code = "from ov_mllama.__main__ import main; main()"
    program = start(code, "serve", "--key-file", tmp_path / "key", "--port", free_port())
    assert program.wait() == 1
    assert "holds no key" in program.said()
