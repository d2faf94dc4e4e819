"""Ollama's API, requested with Ollama's own client; greedy answers beside those of OpenAI's API, in f32."""

import asyncio
import base64
import json
import threading
from datetime import datetime
from typing import Annotated, Literal

import httpx
import ollama
import pytest
from annotated_types import Len
from pydantic import BaseModel

from chat_page import SELF, WHO, path_of, wait_until
from conftest import demo_samples
from openai_client import BEARER, HTTP, about, complete, is_busy, raises, served, user
from openai_client import text as text_part
from ov_mllama.chat.schemas import closed
from ov_mllama.runtime.errors import OutOfMemoryError
from ov_mllama.serving.app import create_app, parse_arguments
from ov_mllama.serving.loading import Gate
from ov_mllama.serving.ollama_protocol import Options
from ov_mllama.serving.protocol import NEUTRAL
from ov_mllama.serving.scheduler import Scheduler
from ov_mllama.serving.sequences import Sequence

SAMPLES = demo_samples()
IMAGE = path_of(SAMPLES[0])
BASE64 = base64.b64encode(IMAGE.read_bytes()).decode()
QUESTION, ANSWER = SAMPLES[0]["question"], SAMPLES[0]["answer"]
GREEDY = {"temperature": 0}
SAY = [{"role": "user", "content": WHO}]
TIMES = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def shared_ollama(server):
    return ollama.Client(server, headers=BEARER)


@pytest.fixture
def llama(shared_ollama, slow_demo):
    """Ollama's client of `server`, whose model is as new."""
    slow_demo.as_new()
    return shared_ollama


def post(url: str, path: str, body, **headers) -> httpx.Response:
    """A request as programs without a client send it."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(f"{url}{path}", content=content, headers={**BEARER, "Content-Type": "application/json", **headers})


def is_ollama_error(answer: httpx.Response) -> bool:
    return set(answer.json()) == {"error"} and isinstance(answer.json()["error"], str)


def rejection(answer: httpx.Response, status: int = 400) -> str:
    """The sentence."""
    assert answer.status_code == status, answer.text
    assert is_ollama_error(answer)
    return answer.json()["error"]


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_chat_and_generate_answer_as_openai_api_does(llama, client):
    expected = complete(client, user(text_part(WHO))).choices[0].message.content
    chat = llama.chat("demo", SAY, options=GREEDY)
    assert chat.message.content == llama.generate("demo", WHO, options=GREEDY).response == expected == SELF
    assert (chat.message.role, chat.model, chat.done, chat.done_reason) == ("assistant", "demo", True, "stop")
    assert datetime.fromisoformat(chat.created_at).utcoffset().total_seconds() == 0
    assert chat.created_at.endswith("Z")


@pytest.mark.parametrize(
    "image", [IMAGE.read_bytes(), str(IMAGE), IMAGE, BASE64], ids=["bytes", "str", "path", "base64"]
)
def test_images_as_the_client_takes_them(llama, client, image):
    assert complete(client, about(SAMPLES[0])).choices[0].message.content == ANSWER
    message = {"role": "user", "content": QUESTION, "images": [image]}
    assert llama.chat("demo", [message], options=GREEDY).message.content == ANSWER
    assert llama.generate("demo", QUESTION, images=[image], options=GREEDY).response == ANSWER


@pytest.mark.parametrize("image", [f"data:image/png;base64,{BASE64}", base64.encodebytes(IMAGE.read_bytes()).decode()])
def test_images_as_programs_write_them(llama, server, image):
    body = {"model": "demo", "prompt": QUESTION, "images": [image], "stream": False, "options": GREEDY}
    assert post(server, "/api/generate", body).json()["response"] == ANSWER


def test_conversation_with_a_system_prompt_and_two_images(llama, client):
    turns = [
        ("user", SAMPLES[2]["question"]),
        ("assistant", SAMPLES[2]["answer"]),
        ("user", "How many shapes are there?"),
    ]
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": role, "content": content} for role, content in turns]
    messages[1]["images"] = [path_of(SAMPLES[2])]
    assert llama.chat("demo", messages, options=GREEDY).message.content == "There are two shapes."
    system = [{"role": "system", "content": "Be brief."}, *about(SAMPLES[2])]
    expected = complete(client, system).choices[0].message.content
    generated = llama.generate(
        "demo", SAMPLES[2]["question"], system="Be brief.", images=[path_of(SAMPLES[2])], options=GREEDY
    )
    assert generated.response == expected


def test_stream_is_the_answer_in_parts_and_ends_with_counts(llama):
    whole = llama.chat("demo", SAY, options=GREEDY)
    *parts, last = llama.chat("demo", SAY, options=GREEDY, stream=True)
    assert len(parts) > 5
    assert "".join(part.message.content for part in parts) == SELF
    assert all(part.done is False and part.eval_count is None for part in parts)
    assert (last.message.content, last.done, last.done_reason) == ("", True, "stop")
    assert (last.prompt_eval_count, last.eval_count) == (whole.prompt_eval_count, whole.eval_count)
    *parts, last = llama.generate("demo", WHO, options=GREEDY, stream=True)
    assert "".join(part.response for part in parts) == SELF
    assert last.done


def test_async_client_gets_the_same(llama, server):
    async def ask() -> list[str]:
        async with ollama.AsyncClient(server, headers=BEARER) as client:
            chat = await client.chat("demo", SAY, options=GREEDY)
            stream = await client.chat("demo", SAY, options=GREEDY, stream=True)
            generated = await client.generate("demo", WHO, options=GREEDY)
            streamed = await client.generate("demo", WHO, options=GREEDY, stream=True)
            return [
                chat.message.content,
                "".join([part.message.content async for part in stream]),
                generated.response,
                "".join([part.response async for part in streamed]),
            ]

    assert asyncio.run(ask()) == [SELF] * 4


def test_counts_and_times_are_measured(llama, client, slow_demo, processor):
    usage = complete(client, about(SAMPLES[0])).usage
    slow_demo.as_new(picture_s=0.2, step_s=0.02)
    answer = llama.generate("demo", QUESTION, images=[IMAGE], options=GREEDY)
    assert (answer.prompt_eval_count, answer.eval_count) == (usage.prompt_tokens, usage.completion_tokens)
    assert all(getattr(answer, name) > 0 for name in TIMES)
    assert answer.prompt_eval_duration > 0.2e9
    assert answer.eval_duration >= 0.02e9 * (answer.eval_count - 1)
    assert sum(getattr(answer, name) for name in TIMES[1:]) <= answer.total_duration


def test_requests_without_options_are_streams_with_the_model_s_defaults(llama, server, monkeypatch):
    seen, submit = [], Scheduler.submit
    monkeypatch.setattr(
        Scheduler, "submit", lambda self, request, *more: seen.append(request) or submit(self, request, *more)
    )
    answer = post(server, "/api/generate", {"model": "demo", "prompt": "Hello"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert all(json.loads(line)["model"] == "demo" for line in answer.text.splitlines())
    (request,) = seen
    assert (request.temperature, request.top_p, request.top_k, request.min_p, request.seed) == (0.6, 0.9, 40, 0, None)


# ---- Format and options ---------------------------------------------------------------------------------------------


class Shape(BaseModel):
    colour: Literal["red", "blue"]
    found: bool


class Fields(BaseModel):
    shapes: Annotated[list[Shape], Len(2, 2)]


def test_answer_follows_a_format(llama):
    """Its schema allows other properties by the standard: Ollama excludes them, this model adds them endlessly."""
    schema = Fields.model_json_schema()
    assert "additionalProperties" not in str(schema)
    message = {"role": "user", "content": QUESTION, "images": [IMAGE]}
    answer = llama.chat("demo", [message], format=schema, options=GREEDY).message.content
    assert set(json.loads(answer)) == {"shapes"}
    Fields.model_validate_json(answer)
    Fields.model_validate_json(llama.generate("demo", QUESTION, images=[IMAGE], format=schema).response)
    limited = llama.generate("demo", "Write JSON.", format="json", options={**GREEDY, "num_predict": 20})
    assert limited.response.startswith("{")
    assert llama.generate("demo", WHO, format="", options=GREEDY).response == SELF


def test_format_is_closed_where_it_leaves_properties_open():
    named = {"properties": {"properties": {"type": "string"}}}
    closed_one = {"additionalProperties": False, **named}
    assert closed(named) == closed_one
    for keyword in ("$defs", "definitions"):
        assert closed({keyword: {"A": named}}) == {keyword: {"A": closed_one}}
    for keyword in ("anyOf", "oneOf", "prefixItems"):
        assert closed({keyword: [named, True]}) == {keyword: [closed_one, True]}
    assert closed({"items": named}) == {"items": closed_one}
    for left in ({**named, "additionalProperties": True}, {"allOf": [named]}, {"type": "object"}, {"enum": [named]}):
        assert closed(left) == left


def test_options_apply(llama):
    def ask(**options):
        return llama.generate("demo", WHO, options={**GREEDY, **options})

    short = ask(num_predict=3)
    assert (short.eval_count, short.done_reason) == (3, "length")
    assert SELF.startswith(short.response)
    assert ask(stop="count").response == ask(stop=["count", ""]).response == SELF[: SELF.index("count")]
    for option in ({"top_k": 1, "top_p": 1.0}, {"top_p": 0}, {"top_p": 1e-6}, {"min_p": 1.0, "top_k": 0, "top_p": 1.0}):
        assert ask(temperature=2.0, **option).response == SELF
    hot = {"temperature": 2.0, "num_predict": 20, "top_k": -1, "top_p": 1.0}
    greedy = llama.generate("demo", "Which?", options={**hot, "temperature": 0}).response
    for option in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 0}):
        assert {llama.generate("demo", "Which?", options={**hot, **option}).response for _ in range(3)} == {greedy}
    assert len({llama.generate("demo", "Which?", options={**hot, "seed": 7}).response for _ in range(3)}) == 1
    assert len({llama.generate("demo", "Which?", options={**hot, "seed": -1}).response for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 4096),
        ({"num_predict": -1, "num_ctx": 30}, 30),
        ({"num_predict": -2, "num_ctx": 30}, None),
        ({"num_predict": 9**9}, None),
    ],
)
def test_token_limit_fits_the_context(llama, slow_demo, monkeypatch, options, limit):
    seen, start = [], Sequence.start
    monkeypatch.setattr(Sequence, "start", lambda self, *given: seen.append(self) or start(self, *given))
    answer = llama.generate("demo", WHO, options={**GREEDY, **options})
    assert answer.response == SELF
    left = slow_demo.config.text_config.max_position_embeddings - answer.prompt_eval_count
    assert seen[0].max_new_tokens == min(limit or left, left)


def test_options_of_the_machine_and_neutral_ones_are_ignored(llama, server):
    machine = ["numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "vocab_only", "use_mmap", "use_mlock"]
    machine += ["num_thread", "num_keep", "logits_all", "embedding_only", "mirostat_tau", "mirostat_eta"]
    options = dict.fromkeys([*machine, "penalize_newline", "repeat_last_n"], 1)
    neutral = {"repeat_penalty": 1.0, "tfs_z": 1, "typical_p": 1.0, "mirostat": 0, "presence_penalty": 0.0}
    body = {"model": "demo", "prompt": WHO, "stream": False, "options": {**GREEDY, **options, **neutral}}
    more = {"keep_alive": "5m", "think": False, "context": [], "template": "", "raw": False, "suffix": "", "tools": []}
    assert post(server, "/api/generate", {**body, **more}).json()["response"] == SELF


def test_penalties_are_those_of_openais_api(llama):
    options = {"repeat_penalty": 5.0}
    assert llama.generate("demo", WHO, options={**GREEDY, **options}).response != SELF
    assert llama.generate("demo", WHO, options={**GREEDY, **options, "repeat_last_n": 0}).response == SELF
    given = {"repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    parameters = Options(**given).parameters()
    assert {**parameters, **given, "repeat_last_n": 64} == parameters
    assert Options(repeat_last_n=-1, num_ctx=99).parameters()["repeat_last_n"] == 99


@pytest.mark.parametrize("option", ["mirostat", "typical_p", "tfs_z"])
def test_option_that_would_change_the_answer_is_rejected_by_name(llama, option):
    assert option in NEUTRAL
    with pytest.raises(ollama.ResponseError, match=f"^{option} is not supported") as caught:
        llama.generate("demo", WHO, options={option: 1.5 if option != "mirostat" else 2})
    assert caught.value.status_code == 400


@pytest.mark.parametrize("name", ["context", "logprobs", "raw", "suffix", "template", "think", "tools", "width"])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_field_that_would_change_the_answer_is_rejected_by_name(llama, server, path, name):
    body = {"model": "demo", "prompt": "?", "messages": SAY, name: [1] if name in ("context", "tools") else 1}
    message = rejection(post(server, path, body))
    if (name, path) == ("tools", "/api/chat"):
        assert "tool" in message
    else:
        assert message.startswith(f"{name} is not supported: ")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "The body: "),
        ({}, "model: Field required"),
        ({"options": {"temperature": "hot"}}, "options.temperature: "),
        ({"options": {"num_predict": -3}}, "options.num_predict: "),
        ({"options": {"stop": [5]}}, "options.stop"),
        ({"format": "xml"}, 'format is "json" or a JSON schema'),
        ({"format": {"type": "nothing"}}, "The schema cannot be matched"),
        ({"prompt": "word " * 20_000}, "more than"),
        ({"prompt": "word " * 4500}, "exceed the model's context"),
        ({"prompt": "?", "images": ["!"]}, "not valid base64"),
        ({"prompt": "?", "images": ["AAAA"]}, "image"),
        ({"prompt": "?", "images": ["http://127.0.0.1:1/x.png"]}, "does not fetch"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "does not support tools"),
        ({"messages": SAY, "tools": [{"type": "function", "function": {"name": "f"}}]}, "does not support tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "A call has a function"),
        ({"messages": [{"role": "assistant", "images": [BASE64]}]}, "in a user's message"),
        ({"messages": [{"role": "king", "content": "?"}]}, "A role is"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ],
)
def test_invalid_request_is_rejected_with_a_sentence(llama, server, scheduler, body, said):
    path = "/api/chat" if isinstance(body, dict) and "messages" in body else "/api/generate"
    if isinstance(body, dict) and body:
        body = {"model": "demo", "prompt": "?", **body}
    assert said in rejection(post(server, path, body))
    assert not scheduler._reservations


# ---- Names, and requests about the model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["demo", "demo:latest", "llama3.2-vision", "llama3.2-vision:11b", "llama3.2-vision:latest"]
)
def test_names_of_the_model(llama, name):
    assert llama.generate(name, WHO, options=GREEDY).model == name
    assert llama.show(name).modelinfo["general.architecture"] == "mllama"
    assert llama.pull(name).status == "success"
    assert [line.status for line in llama.pull(name, stream=True)] == ["success"]


@pytest.mark.parametrize("name", ["llava", "demo:7b", "llama3.2-vision-x", "llama3.2"])
def test_other_names_are_not_found(llama, scheduler, name):
    for ask in (llama.generate, llama.chat, llama.show, llama.pull):
        with pytest.raises(ollama.ResponseError, match=f"model '{name}' not found") as caught:
            ask(name)
        assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        list(llama.chat(name, SAY, stream=True))
    assert not scheduler._reservations


def test_a_request_without_a_name_gets_one_sentence(server):
    for path in ("/api/pull", "/api/show"):
        assert rejection(post(server, path, {})) == "model is required: give a name that GET /api/tags lists."


def test_a_message_without_content_is_an_empty_one(llama, server):
    answers = [
        post(server, "/api/chat", {"model": "demo", "messages": [message], "stream": False, "options": GREEDY}).json()
        for message in ({"role": "user", "content": ""}, {"role": "user", "content": None}, {"role": "user"})
    ]
    assert answers[0]["message"] == answers[1]["message"] == answers[2]["message"]


def test_empty_requests_are_acknowledged(llama, scheduler, server):
    assert llama.generate("demo").done_reason == llama.chat("demo").done_reason == "load"
    for zero in (0, 0.0, "0", "0s"):
        assert llama.generate("demo", "", keep_alive=zero).done_reason == "unload"
    assert llama.chat("demo", [], keep_alive=0).message.role == "assistant"
    assert llama.generate("demo", "", keep_alive=-1).done_reason == "load"
    assert not scheduler._reservations
    assert post(server, "/api/generate", {"model": "demo"}).json()["done"] is True  # no stream


def test_lists_and_details(llama, slow_demo, processor):
    listed = llama.list().models
    assert [model.model for model in listed] == ["demo:latest", "llama3.2-vision:latest"]
    assert listed[0].digest == listed[1].digest
    assert listed[0].size == slow_demo.disk_bytes > 1e6
    assert (listed[0].details.family, listed[0].details.quantization_level) == ("mllama", "16 bit, pictures 16 bit")
    (running,) = llama.ps().models
    assert (running.name, running.size_vram, running.context_length) == ("demo:latest", 0, 4096)
    assert running.expires_at.year > 2200
    shown = llama.show("demo")
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo["mllama.context_length"] == 4096
    assert shown.template == processor.chat_template
    assert shown.parameters.split() == ["temperature", "0.6", "top_p", "0.9"]


def test_probes(server, slow_demo, processor):
    assert HTTP.get(f"{server}/api/version", headers=BEARER).json() == {"version": "0.24.0"}
    for path in ("/api/version", "/api/tags"):
        answer = HTTP.head(f"{server}{path}", headers=BEARER)
        assert (answer.status_code, answer.content) == (200, b"")
    assert HTTP.get(f"{server}/").status_code == 404
    with served(create_app(Scheduler(slow_demo, processor), "demo", ollama=True)) as url:
        assert HTTP.get(url).text == "Ollama is running"
        assert HTTP.head(url).is_success


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", f"/api/{name}") for name in ("push", "create", "copy", "embed", "embeddings", "blobs/sha256:0")),
        ("DELETE", "/api/delete"),
    ],
)
def test_what_manages_models_is_rejected_with_a_sentence(llama, server, method, path):
    answer = HTTP.request(method, f"{server}{path}", headers=BEARER, json={"model": "demo"})
    assert ": " in rejection(answer, 501)
    with pytest.raises(ollama.ResponseError, match="embeddings"):
        llama.embed("demo", "text")


# ---- Access and errors ----------------------------------------------------------------------------------------------


def test_errors_have_ollama_s_format(llama, server, slow_demo, monkeypatch):
    stranger = {"Authorization": "Bearer wrong"}
    for path in ("/api/tags", "/api/version", "/api/ps"):
        assert "key" in rejection(HTTP.get(f"{server}{path}", headers=stranger), 401)
    body = {"model": "demo", "prompt": WHO}
    for path in ("/api/generate", "/api/chat", "/api/show", "/api/pull", "/api/push"):
        assert "key" in rejection(post(server, path, body, **stranger), 401)
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):  # curl -d sends the first
        sentence = rejection(post(server, "/api/generate", body, **{"Content-Type": kind}), 415)
        assert "'Content-Type: application/json' (curl: -H)" in sentence
    assert "not trusted" in rejection(HTTP.get(f"{server}/api/tags", headers={**BEARER, "Host": "evil.example"}), 403)
    assert rejection(HTTP.get(f"{server}/api/nothing"), 404).startswith("GET /api/nothing: Not Found")
    assert "Not Allowed" in rejection(HTTP.get(f"{server}/api/chat"), 405)
    assert "2 MB" in rejection(post(server, "/api/generate", b" " * 3_000_000), 413)
    assert "1 MB" in rejection(post(server, "/api/show", b" " * 1_500_000), 413)
    monkeypatch.setattr(slow_demo, "begin", raises(OutOfMemoryError("2 GB too little: close other programs.")))
    assert "2 GB too little" in rejection(post(server, "/api/generate", body), 503)
    monkeypatch.setattr(slow_demo, "begin", raises(RuntimeError("sesame")))
    assert "sesame" not in rejection(post(server, "/api/generate", body), 500)


def test_error_amid_a_stream_is_a_line(llama, server, monkeypatch):
    async def broken(self):
        yield "Hello"
        raise KeyError("sesame")

    monkeypatch.setattr("ov_mllama.serving.sequences.PendingRequest.chunks", broken)
    answer = post(server, "/api/generate", {"model": "demo", "prompt": WHO})
    assert answer.status_code == 200
    first, last = map(json.loads, answer.text.splitlines())
    assert first["response"] == "Hello"
    assert set(last) == {"error"}
    assert "sesame" not in answer.text
    with pytest.raises(ollama.ResponseError, match="in its log"):
        list(llama.chat("demo", SAY, stream=True))


def test_loading_has_ollama_s_format():
    with served(Gate()) as url:
        assert "being loaded" in rejection(HTTP.get(f"{url}/api/tags"), 503)


# ---- Clients that leave ---------------------------------------------------------------------------------------------


def test_client_that_leaves_frees_the_scheduler(llama, scheduler, slow_demo):
    slow_demo.step_s = 0.3
    for ask in (lambda: llama.chat("demo", SAY, stream=True), lambda: llama.generate("demo", WHO, stream=True)):
        stream = ask()
        next(stream)
        stream.close()
        wait_until(lambda: not (is_busy(slow_demo) or scheduler._reservations))
        assert len(slow_demo.llm_infer_time) < 15
    with pytest.raises(httpx.ReadTimeout):
        ollama.Client(str(llama._client.base_url), headers=BEARER, timeout=0.5).chat("demo", SAY)
    wait_until(lambda: not (is_busy(slow_demo) or scheduler._reservations))
    slow_demo.step_s = 0
    assert llama.chat("demo", SAY, options=GREEDY).message.content == SELF


def test_stream_is_kept_alive_with_empty_parts(llama, slow_demo, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.streaming.KEEPALIVE_S", 0.05)
    slow_demo.as_new(picture_s=60)
    answer, seen = [], threading.Event()

    def read():
        for part in llama.generate("demo", QUESTION, images=[IMAGE], options=GREEDY, stream=True):
            answer.append(part.response)
            if len(answer) == 3:
                seen.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert seen.wait(60)
    slow_demo.picture_s = 0
    reading.join()
    assert answer[:3] == [""] * 3
    assert "".join(answer) == ANSWER


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "port"), [([], 8000), (["--ollama"], 11434), (["--ollama", "--port", "9"], 9), (["--port", "0"], 0)]
)
def test_port_of_the_command(arguments, port):
    assert parse_arguments(arguments).port == port
