"""POST /v1/responses, requested with OpenAI's client."""

import json

import openai
import pytest

from chat_page import SELF, WHO, path_of, wait_until
from conftest import demo_samples
from openai_client import BEARER, HTTP, complete, picture, raises, text, user
from ov_mllama.runtime.errors import NumericalError

SAMPLES = demo_samples()


def about(sample) -> list[dict]:
    url = picture(sample)["image_url"]["url"]
    parts = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": sample["question"]},
    ]
    return [{"role": "user", "content": parts}]


def test_text_and_image_are_answered_as_in_the_chat(client):
    response = client.responses.create(model="demo", input=WHO)
    assert (response.output_text, response.status, response.error) == (SELF, "completed", None)
    usage = complete(client, user(text(WHO))).usage
    assert (response.usage.input_tokens, response.usage.output_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert client.responses.create(model="demo", input=about(SAMPLES[0])).output_text == SAMPLES[0]["answer"]
    assert path_of(SAMPLES[0]).exists()


def test_conversation_and_instructions_are_the_chats(client):
    response = client.responses.create(model="demo", input=about(SAMPLES[2]), instructions="Be brief.")
    output = [item.model_dump() for item in response.output]
    question = {"role": "user", "content": [{"type": "input_text", "text": "How many shapes are there?"}]}
    followed = client.responses.create(
        model="demo", input=[*about(SAMPLES[2]), *output, question], instructions="Be brief."
    )
    assert followed.output_text == "There are two shapes."


def test_stream_has_all_events_in_order(client):
    events = list(client.responses.create(model="demo", input=WHO, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == SELF
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *["response.output_text.delta"] * len(deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert events[-1].response.output_text == SELF
    with client.responses.stream(model="demo", input=WHO) as stream:
        assert stream.get_final_response().output_text == SELF


def test_limit_makes_the_answer_incomplete(client):
    response = client.responses.create(model="demo", input=WHO, max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 3
    *_, last = client.responses.create(model="demo", input=WHO, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_schema_is_followed(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    form = {"type": "json_schema", "name": "x", "schema": {**schema, "additionalProperties": False}, "strict": True}
    response = client.responses.create(model="demo", input=about(SAMPLES[0]), text={"format": form})
    assert set(json.loads(response.output_text)) == {"n"}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, options, param):
    answer = HTTP.post(f"{server}/v1/responses", json={"model": "demo", "input": "?", **options}, headers=BEARER)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_neutral_parameters_are_taken(client, scheduler):
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "truncation": "auto",
        "background": False,
        "include": ["reasoning.encrypted_content"],
        "store": True,
    }
    assert client.responses.create(model="demo", input=WHO, **neutral).output_text == SELF
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt", input="?")
    wait_until(lambda: not scheduler._reservations)


def test_error_amid_a_stream_is_an_event(client, slow_demo, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.streaming.KEEPALIVE_S", 0)
    monkeypatch.setattr(slow_demo, "begin", raises(NumericalError("not finite")))
    *_, last = client.responses.create(model="demo", input=WHO, stream=True)
    assert (last.type, last.message) == ("error", "not finite")
