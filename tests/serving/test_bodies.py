"""Bodies of requests: too long, too deep, no JSON, and parameters that would change the answer."""

import json

import openai
import pytest

from chat_page import SELF, WHO
from openai_client import ASKED, complete, is_openai_error, post, raises, refusal, text, user
from ov_mllama.serving.protocol import MAX_STOP_CHARS, NEUTRAL


@pytest.mark.parametrize("stop", ["x" * 400_000, ["x" * (MAX_STOP_CHARS + 1)], ["a", "b" * 100_000], ["a"] * 17])
def test_long_stop_is_refused(client, stop):
    error = refusal(client, stop=stop)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == "stop"
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_stop_of_the_longest_length_is_taken(client):
    completion = complete(client, user(text(WHO)), stop=["x" * MAX_STOP_CHARS, SELF[10:], "y", "z"])
    assert completion.choices[0].message.content == SELF[:10]


LONG = {
    "text": user(text("word " * 20_000)),
    "texts": user(*[text("word " * 100)] * 200),
    "blanks": user(text(" " * 100_000)),
    "parts": user(*[text("")] * 5000),
    "messages": user(text("")) * 5000,
    "system": [{"role": "system", "content": "word " * 20_000}],
    "refusal": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no " * 50_000}]}, *user(text("?"))],
}


@pytest.mark.parametrize("kind", LONG)
def test_long_text_is_refused_before_it_is_tokenised(client, kind, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.scheduler.prompt_text", raises(AssertionError))
    monkeypatch.setattr("ov_mllama.serving.messages.escape_special_tokens", raises(AssertionError))
    error = refusal(client, LONG[kind])
    assert isinstance(error, openai.BadRequestError)
    assert error.param == "messages"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":' + b"[" * 60_000,
        b'{"model":"demo","messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model":"demo","messages":[' + b"{}," * 300_000 + b"{}]}",
        b'{"model":"demo","messages":[{"role":"user","content":"?"}],"x":[' + b"0," * 500_000 + b"0]}",
        json.dumps({**ASKED, "max_tokens": 10**30}).encode(),
        json.dumps({**ASKED, "max_completion_tokens": 2**31}).encode(),
        json.dumps({**ASKED, "seed": 10**30}).encode(),
        json.dumps({**ASKED, "seed": -(10**30)}).encode(),
        json.dumps({**ASKED, "n": 10**30}).encode(),
        b'{"model":"demo","max_tokens":' + b"9" * 100_000 + b',"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","temperature":1e999,"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","temperature":NaN,"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","top_p":-Infinity,"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","messages":[{"role":"' + b"x" * 100_000 + b'","content":"?"}]}',
        b"\xff\xfe{}",
        b"null",
        b"",
    ],
    ids=range(18),
)
def test_hostile_body_is_refused_briefly(client, server, body):
    answer = post(server, body)
    assert answer.status_code == 400
    assert is_openai_error(answer)
    assert len(answer.content) < 2000
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


CHANGES = {
    "guided_whitespace_pattern": " *",
    "best_of": 2,
    "ignore_eos": True,
    "min_tokens": 5,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "modalities": ["text", "audio"],
}
NOTHING = {
    "repetition_penalty": 1,
    "top_k": -1,
    "min_p": 0.0,
    "stop_token_ids": [],
    "guided_regex": None,
    "best_of": 1,
    "logit_bias": {},
    "ignore_eos": False,
    "min_tokens": 0,
    "frequency_penalty": 0,
    "tools": [],
    "tool_choice": "auto",
    "logprobs": False,
    "modalities": ["text"],
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "unheard_of": [1],
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameter_that_would_change_the_answer_is_refused_by_name(client, server, name):
    assert name in NEUTRAL
    answer = post(server, {**ASKED, name: CHANGES[name]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


def test_parameters_that_change_nothing_are_taken(client, server):
    assert post(server, {**ASKED, **NOTHING}).json()["choices"][0]["message"]["content"] == SELF
    assert post(server, {**ASKED, **dict.fromkeys(NEUTRAL)}).is_success
    for name, values in NEUTRAL.items():
        for value in values:
            assert post(server, {**ASKED, "max_tokens": 1, name: value}).is_success, (name, value)
