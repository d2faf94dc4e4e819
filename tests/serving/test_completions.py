"""POST /v1/completions, requested with OpenAI's client."""

import openai
import pytest

from chat_page import SELF, WHO, wait_until
from openai_client import BEARER, HTTP
from ov_mllama.runtime.prompts import apply_template


@pytest.fixture(scope="module")
def prompt(processor):
    """A question in the chat template."""
    return apply_template(processor, [{"role": "user", "content": [{"type": "text", "text": WHO}]}])


def test_text_is_continued_as_the_chat_answers(client, prompt):
    completion = client.completions.create(model="demo", prompt=prompt)
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason, completion.object) == (SELF, "stop", "text_completion")
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    short = client.completions.create(model="demo", prompt=prompt + SELF[:10], max_tokens=2, stop="count")
    assert SELF[10:].startswith(short.choices[0].text)
    assert short.choices[0].finish_reason == "length"


def test_stream_has_the_same_text(client, prompt):
    *chunks, usage = client.completions.create(
        model="demo", prompt=prompt, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == SELF
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert usage.usage.completion_tokens > 5


def test_several_prompts_have_their_own_choices(client, prompt):
    completion = client.completions.create(model="demo", prompt=[prompt, "Hello"], n=2, max_tokens=60)
    texts = [choice.text for choice in completion.choices]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert texts[:2] == [SELF, SELF]
    assert texts[2] == texts[3] != SELF
    alone = [client.completions.create(model="demo", prompt=each, max_tokens=1).usage for each in (prompt, "Hello")]
    assert completion.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": "word " * 1100}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": [1, 2]}, "prompt.str"),
        ({"prompt": "?", "logprobs": 21}, "logprobs"),
        ({"prompt": "?", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"prompt": "?", "suffix": "!"}, "suffix"),
        ({"prompt": "?", "echo": True}, "echo"),
        ({"prompt": "?", "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "?", "messages": [{"role": "user", "content": "?"}]}, "messages"),
        ({}, "prompt"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, options, param):
    answer = HTTP.post(f"{server}/v1/completions", json={"model": "demo", **options}, headers=BEARER)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_log_probabilities_are_those_of_the_chat(client, prompt):
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": WHO}], logprobs=True, top_logprobs=2, max_tokens=4
    )
    expected = chat.choices[0].logprobs.content
    options = dict(model="demo", prompt=prompt, logprobs=2, max_tokens=4)
    whole = client.completions.create(**options).choices[0].logprobs
    assert whole.tokens == [each.token for each in expected]
    assert whole.token_logprobs == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert [len(top) for top in whole.top_logprobs] == [2] * 4
    assert all(SELF[at:].startswith(token) for at, token in zip(whole.text_offset, whole.tokens, strict=True))
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **options)]
    for field in ("tokens", "text_offset"):
        assert sum((getattr(chunk, field) for chunk in chunks if chunk), []) == getattr(whole, field)


def test_token_of_an_image_is_text(client, scheduler):
    assert client.completions.create(model="demo", prompt="<|image|>What?", max_tokens=2).usage.completion_tokens == 2
    assert client.completions.create(model="demo", prompt="", max_tokens=2).usage.prompt_tokens == 1
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="?")
    wait_until(lambda: not scheduler._reservations)
