"""The OpenAI-compatible server, asked with OpenAI's own client; greedy answers beside the model's own, in f32."""

import base64
import json
import threading
from urllib.parse import quote

import httpx
import openai
import pytest

from chat_page import SELF, WHO, path_of
from conftest import DEMO, demo_samples
from openai_client import HTTP, KEY, about, alone, complete, picture, raises, refusal, served, text, user
from ov_mllama.serving.app import bind_socket, create_app, mount_chat
from ov_mllama.serving.scheduler import Scheduler

SAMPLES = demo_samples()


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_a_text(client):
    completion = complete(client, [{"role": "user", "content": WHO}])
    assert completion.choices[0].message.content == SELF
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.object == "chat.completion"
    assert completion.model == "demo"


def test_a_picture_and_what_it_took(client, slow_demo, processor):
    completion = complete(client, about(SAMPLES[0]))
    assert completion.choices[0].message.content == SAMPLES[0]["answer"]
    assert completion.usage.prompt_tokens == slow_demo.stats.prompt_tokens
    assert completion.usage.completion_tokens == slow_demo.stats.new_tokens
    assert completion.usage.total_tokens == slow_demo.stats.prompt_tokens + slow_demo.stats.new_tokens


@pytest.mark.parametrize(
    "begins",
    ["DATA:IMAGE/PNG;BASE64,", "data:image/png;charset=utf-8;base64,", "data:application/octet-stream;base64,"],
)
def test_pictures_as_programs_write_them(client, begins):
    encoded = base64.encodebytes(path_of(SAMPLES[0]).read_bytes()).decode()  # in lines
    for uri in (begins + encoded, begins + quote(encoded.strip().rstrip("="))):
        part = {"type": "image_url", "image_url": {"url": uri}}
        completion = complete(client, user(part, text(SAMPLES[0]["question"])))
        assert completion.choices[0].message.content == SAMPLES[0]["answer"]


def test_two_pictures(client, slow_demo, processor):
    messages = user(picture(SAMPLES[0]), picture(SAMPLES[2]), text("Which?"))
    assert complete(client, messages).choices[0].message.content == alone(
        slow_demo, processor, "Which?", SAMPLES[0], SAMPLES[2]
    )


def test_a_conversation_with_a_system_prompt(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        *about(SAMPLES[2]),
        {"role": "assistant", "content": SAMPLES[2]["answer"]},
        *user(text("How many shapes are there?")),
    ]
    assert complete(client, messages).choices[0].message.content == "There are two shapes."


def test_a_stream_is_the_whole_answer_piece_by_piece(client, slow_demo, monkeypatch):
    step, steps, pieces, seen = slow_demo.language_model.infer, [], [], threading.Event()

    def held(*given):
        steps.append(1)
        assert len(steps) < 8 or seen.wait(60)  # the first pieces come while the others are not there yet
        return step(*given)

    monkeypatch.setattr(slow_demo.language_model, "infer", held)
    for chunk in complete(client, about(SAMPLES[0]), stream=True, stream_options={"include_usage": True}):
        pieces.append(chunk)
        if len(pieces) == 4:
            seen.set()
    assert len(steps) > 8
    *words, last, usage = pieces
    assert words[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in words) == SAMPLES[0]["answer"]
    assert len(words) > 5
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == slow_demo.stats.new_tokens
    assert all(chunk.usage is None for chunk in [*words, last])


def test_a_stream_without_usage_ends_with_its_reason(client):
    *_, last = complete(client, user(text(WHO)), stream=True)
    assert last.choices[0].finish_reason == "stop"


def test_a_limit(client):
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        completion = complete(client, user(text(WHO)), **limit)
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage.completion_tokens == 3
        assert SELF.startswith(completion.choices[0].message.content)


@pytest.mark.parametrize("stop", ["count", [" them", "shapes"], "describe sh"])
def test_an_answer_ends_before_a_text_to_stop_at(client, stop):
    first = min(SELF.index(each) for each in ([stop] if isinstance(stop, str) else stop))
    completion = complete(client, user(text(WHO)), stop=stop)
    assert completion.choices[0].message.content == SELF[:first]
    assert completion.choices[0].finish_reason == "stop"
    chunks = complete(client, user(text(WHO)), stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SELF[:first]


def test_a_seed_repeats_chance_and_no_seed_does_not(client):
    def answers(count, **options):
        asked = dict(temperature=2.0, max_tokens=20, **options)
        return {complete(client, user(text("Which?")), **asked).choices[0].message.content for _ in range(count)}

    assert len(answers(3, seed=7)) == 1
    assert len(answers(10)) > 1
    assert complete(client, user(text(WHO)), temperature=2.0, top_p=1e-6).choices[0].message.content == SELF


@pytest.mark.parametrize("options", [{"top_k": 1}, {"min_p": 1.0}])
def test_sampling_parameters_of_other_servers_apply(client, options):
    completion = complete(client, user(text(WHO)), temperature=2.0, extra_body=options)
    assert completion.choices[0].message.content == SELF


def test_next_to_no_temperature_is_none(client):
    assert complete(client, user(text(WHO)), temperature=1e-45).choices[0].message.content == SELF


def test_low_detail_is_one_tile(client, slow_demo):
    sample = max(SAMPLES, key=lambda sample: path_of(sample).stat().st_size)
    seen = []
    for detail in ("high", "low", "auto"):
        complete(client, user(picture(sample, detail=detail), text("What?")))
        seen.append(slow_demo.image_encoder.cache.nbytes)
        slow_demo.forget()
    assert seen[1] < seen[0] == seen[2]


SCHEMA = {
    "type": "object",
    "properties": {"shapes": {"type": "integer", "minimum": 0, "maximum": 20}, "colour": {"enum": ["red", "blue"]}},
    "required": ["shapes", "colour"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_a_schema(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "fields", "schema": SCHEMA, "strict": True}}
    completion = complete(client, about(SAMPLES[0]), response_format=form, temperature=temperature, seed=1)
    assert completion.choices[0].finish_reason == "stop"
    fields = json.loads(completion.choices[0].message.content)
    assert set(fields) == {"shapes", "colour"}
    assert isinstance(fields["shapes"], int)
    assert fields["colour"] in ("red", "blue")


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_a_wrong_key(server):
    stranger = openai.OpenAI(base_url=f"{server}/v1", api_key="wrong", max_retries=0)
    assert isinstance(refusal(stranger), openai.AuthenticationError)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert HTTP.get(f"{server}/health").json() == {"status": "ok"}
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.models.retrieve("gpt")
    assert "Method Not Allowed" in HTTP.get(f"{server}/v1/chat/completions").json()["error"]["message"]
    assert HTTP.get(f"{server}/v1/else").json()["error"]["message"].startswith("GET /v1/else: Not Found")
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.chat.completions.create(model="gpt", messages=user(text("?")))


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([{"role": "tool", "content": "x"}], {}, "messages"),
        (user({"type": "input_audio"}), {}, "messages[0].content[0]"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}), {}, None),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), {}, None),
        (user({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}), {}, None),
        (user({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), {}, None),
        (user({"type": "image_url", "image_url": None}), {}, None),
        (user({"type": "image_url", "image_url": [1]}), {}, "messages[0].content[0].image_url"),
        ([{"role": "user", "content": 5}], {}, "messages[0].content"),
        (user(text("?")), {"seed": 2**64}, "seed"),
        ([{"role": "assistant", "content": [picture(SAMPLES[0])]}], {}, "messages[0].content[0]"),
        (user(text("?")), {"n": 9}, "n"),
        (user(text("?")), {"stop": ["a"] * 17}, "stop"),
        (user(text("?")), {"temperature": 3}, "temperature"),
        (user(text("?")), {"max_tokens": -2}, "max_tokens"),
        (user(text("?")), {"top_logprobs": 3}, "top_logprobs"),
        (user(text("word " * 5000)), {}, "messages"),
        (
            user(text("?")),
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
            "response_format.json_schema",
        ),
    ],
)
def test_what_is_not_understood_is_refused_and_says_where(client, messages, options, param):
    error = refusal(client, messages, **options)
    assert isinstance(error, openai.BadRequestError)
    assert param is None or error.param == param


def test_more_pixels_than_memory_is_for(client, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.messages.MAX_REQUEST_PIXELS", 60_000)
    assert complete(client, about(SAMPLES[0])).choices[0].message.content == SAMPLES[0]["answer"]
    error = refusal(client, user(picture(SAMPLES[0]), picture(SAMPLES[0]), text("?")))
    assert error.param == "messages[0].content[1].image_url"


def test_no_json_and_too_much_of_it(server):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert HTTP.post(f"{server}/v1/chat/completions", content=b"{", headers=headers).status_code == 400
    answer = HTTP.post(f"{server}/v1/chat/completions", content=b" " * 3_000_000, headers=headers)
    assert answer.status_code == 413
    assert "at most 2 MB" in answer.json()["error"]["message"]


def test_scripts_of_web_pages_may_ask_where_allowed(server, slow_demo, processor):
    """A page that is not may send its reader's browser only what is asked of no server first (a "simple request")."""
    body = json.dumps({"model": "demo", "messages": user(text(WHO))})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
        assert HTTP.post(f"{server}/v1/chat/completions", content=body, headers=headers).status_code == 415

    def may(url: str) -> str | None:
        asks = {
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        return HTTP.options(f"{url}/v1/chat/completions", headers=asks).headers.get("access-control-allow-origin")

    assert may(server) is None
    with served(
        create_app(Scheduler(slow_demo, processor), "demo", KEY, cors_origins=["http://localhost:3000"])
    ) as other:
        assert may(other) == "http://localhost:3000"


def test_a_key_is_also_the_password_of_the_chat(slow_demo, processor):
    app = mount_chat(create_app(Scheduler(slow_demo, processor), "demo", KEY), slow_demo, processor, DEMO, KEY)
    with served(app) as url, httpx.Client(base_url=url) as browser:
        assert browser.get("/chat/config").status_code == 401
        assert browser.post("/chat/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert browser.post("/chat/login", data={"username": "me", "password": KEY}).is_success
        assert browser.get("/chat/config").is_success


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(server):
    port = int(server.rpartition(":")[2])
    with pytest.raises(OSError, match=f"{port} is not available .* --port"):
        bind_socket("127.0.0.1", port)
    with bind_socket("127.0.0.1", 0) as mine, pytest.raises(OSError, match="is not available"):
        bind_socket("127.0.0.1", mine.getsockname()[1])  # by a second server, while the first one loads
    with pytest.raises(OSError, match="--port"):
        bind_socket("127.0.0.1", 99999)


def test_what_goes_wrong_in_the_model_is_an_error_and_the_next_is_answered(client, slow_demo, monkeypatch):
    monkeypatch.setattr(slow_demo, "begin", raises(RuntimeError("out of order")))
    assert isinstance(refusal(client), openai.InternalServerError)
    with pytest.raises(openai.InternalServerError):
        list(complete(client, user(text(WHO)), stream=True))
    monkeypatch.undo()
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_request_without_a_type_is_taken_unless_a_web_page_sends_it(client, server):
    """As litellm sends it to Ollama's API; pages can too, but browsers name them."""
    body, path = json.dumps({"model": "demo", "prompt": WHO, "max_tokens": 2}).encode(), f"{server}/v1/completions"
    bearer = {"Authorization": f"Bearer {KEY}"}
    assert HTTP.post(path, content=body, headers=bearer).is_success
    for header in ({"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert HTTP.post(path, content=body, headers={**bearer, **header}).status_code == 415
