"""Unexpected errors: their text stays in the log, and the thread that answers goes on."""

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from chat_page import SELF, WHO, wait_until
from openai_client import (
    ASKED,
    BEARER,
    HTTP,
    complete,
    is_busy,
    is_openai_error,
    post,
    raises,
    small_server,
    text,
    user,
)
from ov_mllama.runtime.errors import OutOfMemoryError
from ov_mllama.serving.scheduler import Scheduler

SECRET = "sesame of the inside"


INSIDE = [
    "ov_mllama.serving.messages.escape_special_tokens",
    "ov_mllama.serving.scheduler.prompt_text",
    "ov_mllama.serving.scheduler.prompt_inputs",
    "ov_mllama.serving.scheduler.Prefill",
]
BEHIND_FIRST_TOKEN = ("ov_mllama.runtime.batch.Batch.join", "ov_mllama.runtime.batch.Batch.decode")


@pytest.mark.parametrize("where", INSIDE)
@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), KeyError(SECRET), OSError(SECRET), UnicodeDecodeError("utf-8", b"", 0, 1, SECRET)]
)
def test_text_of_an_unexpected_error_stays_here(client, server, where, error, monkeypatch, caplog):
    monkeypatch.setattr(where, raises(error))
    for stream in (False, True):
        answer = post(server, {**ASKED, "stream": stream})
        assert answer.status_code == 500
        assert SECRET not in answer.text
        assert re.search("error ([0-9a-f]{8}) ", answer.json()["error"]["message"])[1] in caplog.text
    monkeypatch.undo()
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_text_of_an_error_amid_a_stream_stays_here(client, server, monkeypatch):
    from ov_mllama.serving.scheduler import PendingRequest

    async def broken(self):
        yield "Hello"
        raise KeyError(SECRET)

    monkeypatch.setattr(PendingRequest, "chunks", broken)
    answer = post(server, {**ASKED, "stream": True})
    assert answer.status_code == 200
    assert SECRET not in answer.text
    last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"


def test_connection_survives_an_unexpected_error(client, server, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.messages.escape_special_tokens", raises(RuntimeError(SECRET)))
    with httpx.Client(headers=BEARER) as browser:
        kept = []
        for _ in range(3):
            answer = browser.post(f"{server}/v1/chat/completions", json=ASKED)
            kept.append(answer.extensions["network_stream"].get_extra_info("client_addr"))
            assert answer.status_code == 500
    assert len(set(kept)) == 1


def test_too_little_memory_says_when_to_come_again(client, server, slow_demo, monkeypatch):
    monkeypatch.setattr(slow_demo, "begin", raises(OutOfMemoryError("2 GB too little: close other programs.")))
    answer = post(server, ASKED)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "30"
    assert "2 GB too little" in answer.json()["error"]["message"]


PLACES = [
    *(
        "ov_mllama.serving.scheduler.Scheduler._admit",
        "ov_mllama.serving.scheduler.Scheduler._inputs",
        "ov_mllama.serving.sequences.Sequence.append_token",
    ),
    *(
        *BEHIND_FIRST_TOKEN,
        "ov_mllama.serving.engine.Engine.step",
        "ov_mllama.serving.scheduler.api_error_for",
        "ov_mllama.serving.detokenizer.Detokenizer.put",
    ),
    *("ov_mllama.serving.sequences.Sequence.sample", "ov_mllama.serving.scheduler.prompt_inputs"),
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "error",
    [RuntimeError(SECRET), MemoryError(), SystemExit(1), KeyboardInterrupt(), RecursionError(), StopIteration()],
)
def test_no_error_ends_the_answering_thread(client, server, slow_demo, where, error, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.scheduler.ERROR_PAUSE_S", 0.02)
    with monkeypatch.context() as patched:
        if where.endswith("api_error_for"):
            patched.setattr(slow_demo, "begin", raises(RuntimeError()))
        patched.setattr(where, raises(error))
        if where.endswith("_admit"):
            post(server, ASKED)  # whose thread has been within it before
        for stream in (False, True):
            answer = post(server, {**ASKED, "stream": stream})
            if stream and where in BEHIND_FIRST_TOKEN:
                assert '{"error":' in answer.text.strip().splitlines()[-1]
                continue
            assert answer.status_code in (500, 503)
            assert is_openai_error(answer)
    assert HTTP.get(f"{server}/health").is_success
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_error_between_batches_is_of_the_first_that_waits_only(client, scheduler, slow_demo, monkeypatch):
    failing, admissible = [], Scheduler._admissible
    monkeypatch.setattr(Scheduler, "_admissible", lambda self: 1 / 0 if failing and failing.pop() else admissible(self))
    slow_demo.step_s = 60
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(complete, client, user(text(WHO)))
        wait_until(lambda: is_busy(slow_demo))
        asked = [pool.submit(complete, client, user(text(WHO))) for _ in range(3)]
        wait_until(lambda: len(scheduler._waiting) == 3)
        failing.append(1)
        slow_demo.step_s = 0
        errors = [each.exception() for each in [first, *asked]]
    assert not failing
    assert sum(error is None for error in errors) == 3


def test_error_of_all_kinds_in_a_batch_ends_its_requests(client, slow_demo, monkeypatch):
    """None of them waits for ever."""
    monkeypatch.setattr(slow_demo, "begin", raises(SystemExit(3)))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, client, user(text(WHO)), timeout=20) for _ in range(4)]
        assert all(isinstance(each.exception(), openai.InternalServerError) for each in asked)


def test_health_is_503_once_nothing_is_answered_any_more(slow_demo, processor, monkeypatch):
    slow_demo.as_new()
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with small_server(slow_demo, processor) as (url, batches):
        assert HTTP.get(f"{url}/health").json() == {"status": "ok"}
        monkeypatch.setattr(Scheduler, "_run_once", raises(SystemExit("gone")))
        post(url, ASKED)  # by the thread that is still within `_run_once`
        answer = post(url, ASKED)
        assert answer.status_code == 503
        assert is_openai_error(answer)
        wait_until(lambda: not batches.alive)
        answer = HTTP.get(f"{url}/health")
        assert answer.status_code == 503
        assert answer.json() == {"status": "failed"}


# ---- Chat templates that refuse, end tokens of any form -------------------------------------------------------------


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system, please.') }}{% endif %}"


FAILS = "{{ 1 + messages[0].content }}"  # as templates that expect something else do


@pytest.mark.parametrize("template", [REFUSES, FAILS, None])
def test_a_template_that_refuses_is_a_400_with_its_sentence(slow_demo, processor, template):
    strict = copy.copy(processor)
    strict.chat_template = template and template + processor.chat_template
    messages = [{"role": "system", "content": "Be brief."}, *user(text(WHO))]
    with small_server(slow_demo, strict) as (url, _):
        answer = post(url, {**ASKED, "messages": messages})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "messages")
        said = {
            REFUSES: "refuses the conversation: No system, please.",
            FAILS: "refuses the conversation: unsupported operand",
        }
        assert said.get(template, "holds no chat template: run convert") in error["message"]
        if template == REFUSES:
            assert post(url, ASKED).json()["choices"][0]["message"]["content"] == SELF


@pytest.mark.parametrize("ends", [None, [], 510, [505, 510]])
def test_end_tokens_of_any_form_are_served(slow_demo, processor, monkeypatch, ends):
    monkeypatch.setattr(slow_demo.generation_config, "eos_token_id", ends)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    with small_server(slow_demo, processor) as (url, _):
        choice = post(url, {**ASKED, "max_tokens": 60}).json()["choices"][0]
        assert choice["finish_reason"] == ("stop" if ends else "length")
        assert choice["message"]["content"].startswith(SELF[:9])
        assert post(url, {**ASKED, "response_format": schema, "max_tokens": 9}).status_code == 200
