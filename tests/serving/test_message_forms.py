"""Messages and limits as programs write them."""

import base64

import openai
import pytest

from chat_page import SELF, WHO, path_of
from conftest import demo_samples
from openai_client import ASKED, complete, picture, post, refusal, served, text, user
from ov_mllama.serving.app import create_app, parse_arguments
from ov_mllama.serving.image_urls import image_urls
from ov_mllama.serving.messages import convert_message
from ov_mllama.serving.protocol import MAX_STOP_CHARS, ApiError
from ov_mllama.serving.scheduler import Scheduler

SAMPLES = demo_samples()
DATA = path_of(SAMPLES[0]).read_bytes()
B64 = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{B64}"
FORMS = {
    "input_image": {"type": "input_image", "image_url": URI, "detail": "auto"},
    "image_url as a string": {"type": "image_url", "image_url": URI},
    "Anthropic's": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64}},
    "image with a URI": {"type": "image", "image": URI},
    "image with base64": {"type": "image", "image": B64},
    "image with a url": {"type": "image", "url": URI},
    "MCP's": {"type": "image", "data": B64, "mimeType": "image/png"},
    "LangChain's": {"type": "image", "source_type": "base64", "data": B64, "mime_type": "image/png"},
    "LangChain's of now": {"type": "image", "base64": B64, "mime_type": "image/png"},
    "without a type": {"image_url": {"url": URI}},
    "field that is null": {"type": "image", "image": URI, "url": None, "detail": None},
}
URLS = {
    "base64 alone": B64,
    "urlsafe": base64.urlsafe_b64encode(DATA).decode(),
    "urlsafe, without padding": base64.urlsafe_b64encode(DATA).decode().rstrip("="),
    "no type": f"data:;base64,{B64}",
    "half a type": f"data:image;base64,{B64}",
    "doubled": f"data:image/jpeg;base64,{URI}",
    "blanks": f"\n {URI} \n",
    "blank within": f"data:image/png;base64, {B64}",
    "printed by Python": f"b'{B64}'",
    "printed by Python in a URI": f"b'{URI}'",
}


@pytest.mark.parametrize("form", FORMS)
def test_image_is_read_in_every_form(form):
    images = []
    message = convert_message({"role": "user", "content": ["What?", {**FORMS[form]}]}, "messages[0]", images)
    assert message == {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}
    assert [image.data for image in images] == [DATA]


@pytest.mark.parametrize("form", URLS)
def test_image_is_read_from_every_spelling_of_base64(form):
    images = []
    part = {"type": "image_url", "image_url": {"url": URLS[form]}}
    convert_message({"role": "user", "content": [part]}, "messages[0]", images)
    assert [image.data for image in images] == [DATA]


@pytest.mark.parametrize("form", ["input_image", "Anthropic's"])
def test_other_forms_are_answered_as_openais(client, form):
    parts = {"type": "input_text", "text": SAMPLES[0]["question"]}, FORMS[form]
    completion = complete(client, user(parts[1], parts[0]))
    assert completion.choices[0].message.content == SAMPLES[0]["answer"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("original", "high"), ("AUTO", "high"), ("High", "high"), ("LOW", "low"), ("", "high"), (None, "high")],
)
def test_detail_is_taken_in_any_case(given, expected):
    for part in (picture(SAMPLES[0], detail=given), {"type": "input_image", "image_url": URI, "detail": given}):
        images = []
        convert_message({"role": "user", "content": [part]}, "messages[0]", images)
        assert images[0].detail == expected


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": [{"type": "image", "image": URI, "url": URI}]}, "content[0]"),
        ({"content": [{"type": "image"}]}, "content[0]"),
        ({"content": [{"type": "input_image", "file_id": "file-1"}]}, "content[0]"),
        ({"content": [{"type": "image", "source": {"type": "file"}}]}, "content[0].source"),
        ({"content": [{"type": "image", "source": {"data": "photo.png"}}]}, "content[0].source"),
        ({"content": [{"type": "image_url", "image_url": "file:///home/somebody/pictures/of/the/year/photo"}]}, None),
        ({"content": [picture(SAMPLES[0], detail="medium")]}, "content[0].image_url"),
        ({"content": [{"type": "document", "source": {"data": B64}}]}, "content[0]"),
        ({"content": [{"type": "text", "text": 5}]}, "content[0]"),
        ({"content": "?", "images": [B64]}, "images"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 5, "arguments": "{}"}}]}, "tool_calls[0]"),
        ({"role": "tool", "content": [{"type": "image_url", "image_url": URI}]}, "content[0]"),
        ({"role": "function", "content": "?"}, "role"),
        ({"role": ["tool"], "content": "?"}, "role"),
    ],
)
def test_ambiguous_or_unsupported_message_is_refused_by_its_field(message, param):
    with pytest.raises(ApiError) as refused:
        convert_message({"role": "user", **message}, "messages[3]", [])
    assert refused.value.status == 400
    assert param is None or refused.value.body["error"]["param"] == f"messages[3].{param}"


def test_urls_of_every_form_are_fetched():
    url = "HTTPS://example.org/a.png"
    parts = [
        {"type": "input_image", "image_url": f" {url}"},
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "http://else"},
        {"type": "image", "image": B64},
    ]
    found = list(image_urls([{"role": "user", "content": parts}]))
    assert [image["url"] for image, _ in found] == [url] * 3
    assert [param for _, param in found] == [
        "messages[0].content[0].image_url",
        "messages[0].content[1].source",
        "messages[0].content[2].image_url",
    ]
    again = list(image_urls([{"role": "user", "content": parts}]))
    assert again == found


def test_missing_text_is_empty(client):
    parts = [{"type": "text", "text": None}, text(WHO), {"type": "text", "text": ""}]
    assert complete(client, user(*parts)).choices[0].message.content == SELF


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_completion_tokens": -1, "max_tokens": None},
        {"max_tokens": 131_072},
        {"max_tokens": 10**6},
        {"stop": ""},
        {"stop": ["", ""]},
        {"stop": ["#"] * 16},
        {"stream_options": {"include_usage": None}},
        {"n": 0},
        {"temperature": 2, "top_p": 0},
        {"temperature": None, "top_p": None, "seed": None, "stop": None, "response_format": None, "stream": None},
    ],
)
def test_value_that_means_none_is_taken(client, server, options):
    answer = post(server, {**ASKED, **options})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (SELF, "stop")


def test_top_p_of_zero_is_greedy(client):
    asked = user(text("Which?"))
    greedy = complete(client, asked, max_tokens=12).choices[0].message.content
    for seed in range(3):
        sampled = complete(client, asked, max_tokens=12, temperature=2, top_p=0, seed=seed)
        assert sampled.choices[0].message.content == greedy


def test_negative_seed_is_none(client, server):
    asked = {**ASKED, "messages": user(text("Which?")), "temperature": 2, "max_tokens": 20, "seed": -1}
    answers = {post(server, asked).json()["choices"][0]["message"]["content"] for _ in range(6)}
    assert len(answers) > 1


@pytest.mark.parametrize("options", [{"max_tokens": -2}, {"top_p": -0.1}, {"stop": "a" * (MAX_STOP_CHARS + 1)}])
def test_value_without_meaning_is_refused(client, options):
    assert isinstance(refusal(client, **options), openai.BadRequestError)


def test_answer_without_a_limit_ends_where_the_context_does(client, slow_demo, scheduler, monkeypatch):
    monkeypatch.setattr(scheduler._engine, "_eos_token_ids", [])
    monkeypatch.setattr(slow_demo.generation_config, "eos_token_id", None)
    context = slow_demo.config.text_config.max_position_embeddings
    question = user(text("word " * 1010))
    for options in ({}, {"max_tokens": context}):
        completion = complete(client, question, **options)
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage.total_tokens == context
    assert completion.usage.completion_tokens > 9


def test_option_sets_another_limit_of_answers_without_one(slow_demo, processor):
    assert parse_arguments(["--max-tokens", "7"]).max_tokens == 7
    with served(create_app(Scheduler(slow_demo, processor), "demo", "secret", max_tokens=7)) as url:
        for options, expected in (({}, 7), ({"max_tokens": 0}, 7), ({"max_tokens": 9}, 9)):
            assert post(url, {**ASKED, **options}).json()["usage"]["completion_tokens"] == expected


def test_system_message_is_a_text_as_metas_template_writes_it():
    """A list of parts would be written as Python prints it."""
    for content in ("Be brief.", [{"type": "text", "text": "Be "}, "brief."]):
        for role in ("system", "developer"):
            converted = convert_message({"role": role, "content": content}, "messages[0]", [])
            assert converted == {"role": "system", "content": "Be brief."}
