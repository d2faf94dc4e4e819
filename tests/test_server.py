"""The OpenAI-compatible server, asked with OpenAI's own client; greedy answers beside the model's own, in f32."""

import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import openai
import pytest
import uvicorn

from chat_page import SELF, WHO, Slow, path_of, wait_until
from conftest import DEMO, F32, demo_samples
from ov_mllama.conversation import prompt_tensors, prompt_text
from ov_mllama_helper import convert_mllama
from serving.app import bound, create_app, mount_chat
from serving.batches import Batches

pytestmark = pytest.mark.alone

SAMPLES = demo_samples()
KEY = "secret"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Slow(convert_mllama(DEMO, tmp_path_factory.mktemp("server") / "ov"), ov_config=F32)


class Server:
    """An app on a free port."""

    def __init__(self, app, **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="warning", **options))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def batches(model, processor):
    batches = Batches(model, processor, size=4, line=6)
    yield batches
    batches.close()


@pytest.fixture(scope="module")
def url(batches):
    server = Server(create_app(batches, "demo", KEY, max_bytes=2_000_000))
    yield server.url
    server.close()


@pytest.fixture
def client(url, model):
    model.as_new()
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def picture(sample, **more) -> dict:
    encoded = base64.b64encode(path_of(sample).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}", **more}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts]}]


def about(sample) -> list[dict]:
    return user(picture(sample), text(sample["question"]))


def complete(client, messages, **options):
    return client.chat.completions.create(model="demo", messages=messages, **options)


def alone(model, processor, question: str, *samples) -> str:
    """The model's own answer."""
    content = [*({"type": "image"} for _ in samples), text(question)]
    inputs, _ = prompt_tensors(
        model, processor, [{"role": "user", "content": content}], [path_of(sample) for sample in samples], 100
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=100)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_a_text(client):
    completion = complete(client, [{"role": "user", "content": WHO}])
    assert completion.choices[0].message.content == SELF
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.object == "chat.completion"
    assert completion.model == "demo"


def test_a_picture_and_what_it_took(client, model, processor):
    completion = complete(client, about(SAMPLES[0]))
    assert completion.choices[0].message.content == SAMPLES[0]["answer"]
    assert completion.usage.prompt_tokens == model.stats.prompt_tokens
    assert completion.usage.completion_tokens == model.stats.new_tokens
    assert completion.usage.total_tokens == model.stats.prompt_tokens + model.stats.new_tokens


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


def test_two_pictures(client, model, processor):
    messages = user(picture(SAMPLES[0]), picture(SAMPLES[2]), text("Which?"))
    assert complete(client, messages).choices[0].message.content == alone(
        model, processor, "Which?", SAMPLES[0], SAMPLES[2]
    )


def test_a_conversation_with_a_system_prompt(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        *about(SAMPLES[2]),
        {"role": "assistant", "content": SAMPLES[2]["answer"]},
        *user(text("How many shapes are there?")),
    ]
    assert complete(client, messages).choices[0].message.content == "There are two shapes."


def test_a_stream_is_the_whole_answer_piece_by_piece(client, model):
    model.step_s = 0.05
    began, pieces, times = time.perf_counter(), [], []
    for chunk in complete(client, about(SAMPLES[0]), stream=True, stream_options={"include_usage": True}):
        pieces.append(chunk)
        times.append(time.perf_counter() - began)
    *words, last, usage = pieces
    assert words[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in words) == SAMPLES[0]["answer"]
    assert len(words) > 5
    assert times[3] < times[-1] / 2
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == model.stats.new_tokens
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


def test_low_detail_is_one_tile(client, model):
    sample = max(SAMPLES, key=lambda sample: path_of(sample).stat().st_size)
    seen = []
    for detail in ("high", "low", "auto"):
        complete(client, user(picture(sample, detail=detail), text("What?")))
        seen.append(model.image_encoder.kept.nbytes)
        model.forget()
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


def refusal(client, messages=None, **options) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as refused:
        complete(client, messages or user(text("?")), **options)
    assert set(refused.value.response.json()["error"]) == {"message", "type", "param", "code"}
    return refused.value


def test_a_wrong_key(url):
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    assert isinstance(refusal(stranger), openai.AuthenticationError)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_models_and_health(client, url):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.models.retrieve("gpt")
    assert httpx.get(f"{url}/v1/chat/completions").json()["error"]["message"].endswith("Method Not Allowed.")
    assert httpx.get(f"{url}/v1/else").json()["error"]["message"] == "GET /v1/else: Not Found."
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.chat.completions.create(model="gpt", messages=user(text("?")))


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([{"role": "tool", "content": "x"}], {}, "messages[0].role"),
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
        (user(text("?")), {"n": 2}, "n"),
        (user(text("?")), {"stop": ["a"] * 5}, "stop"),
        (user(text("?")), {"temperature": 3}, "temperature"),
        (user(text("?")), {"max_tokens": 0}, "max_tokens"),
        (user(text("?")), {"max_tokens": 10**6}, "messages"),
        (user(text("?")), {"logprobs": True}, "logprobs"),
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
    monkeypatch.setattr("serving.questions.MAX_PIXELS", 60_000)
    assert complete(client, about(SAMPLES[0])).choices[0].message.content == SAMPLES[0]["answer"]
    error = refusal(client, user(picture(SAMPLES[0]), picture(SAMPLES[0]), text("?")))
    assert error.param == "messages[0].content[1].image_url"


def test_no_json_and_too_much_of_it(url):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=headers).status_code == 400
    answer = httpx.post(f"{url}/v1/chat/completions", content=b" " * 3_000_000, headers=headers)
    assert answer.status_code == 413
    assert "at most 2 MB" in answer.json()["error"]["message"]


def test_a_key_is_also_the_password_of_the_chat(model, processor, batches):
    app = mount_chat(create_app(batches, "demo", KEY), model, processor, DEMO, KEY)
    server = Server(app, lifespan="off")  # other tests go on with these batches
    with httpx.Client(base_url=server.url) as browser:
        assert browser.get("/chat/config").status_code == 401
        assert browser.post("/chat/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert browser.post("/chat/login", data={"username": "me", "password": KEY}).is_success
        assert browser.get("/chat/config").is_success
    server.close()


# ---- Several at once ------------------------------------------------------------------------------------------------


def test_questions_that_wait_share_steps_and_get_their_own_answers(client, model, processor):
    questions = [(sample["question"], sample) for sample in SAMPLES[:4]] + [(WHO,), ("What is it?",)]
    expected = [alone(model, processor, *asked) for asked in questions]
    model.as_new(step_s=0.05)
    steps = len_of_answers = 0
    step, counted = model.language_model.infer, []
    model.language_model.infer = lambda *given: counted.append(1) or step(*given)

    def ask(asked):
        question, *samples = asked
        return complete(client, user(*map(picture, samples), text(question))).choices[0]

    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(ask, questions))
    model.language_model.infer = step
    assert [answer.message.content for answer in answers] == expected
    len_of_answers = sum(len(processor.tokenizer(answer)["input_ids"]) for answer in expected)
    steps = len(counted)
    assert steps < 0.7 * len_of_answers


def test_each_picture_of_a_batch_is_looked_at_once(client, model, processor):
    asked = [(SAMPLES[1]["question"], SAMPLES[1]), ("Which?", SAMPLES[2], SAMPLES[4]), ("What?", SAMPLES[2])]
    expected = [alone(model, processor, *each) for each in asked]
    model.as_new(picture_s=0.3)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(complete, client, about(SAMPLES[0]))
        wait_until(lambda: model.looks)
        answers = [
            pool.submit(complete, client, user(*map(picture, samples), text(words))) for words, *samples in asked
        ]
        assert [answer.result().choices[0].message.content for answer in answers] == expected
        first.result()
    assert len(model.looks) == 4


def test_others_may_use_the_processor_while_a_batch_is_padded(client, model, processor):
    """Padding is a switch of the tokenizer that all its threads share: the chat page's, and those that count tokens."""
    done = threading.Event()

    def others():
        while not done.wait(0.001):
            processor.tokenizer("another conversation")

    other = threading.Thread(target=others)
    other.start()
    questions = [WHO, "Who are you?", "Hello!", "How are you, and what have you been doing all these days?"]
    try:
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(complete, client, user(text(questions[i % 4]))) for i in range(80)]
            errors = [each.exception() for each in asked]
    finally:
        done.set()
    assert not any(errors), errors
    assert asked[0].result().choices[0].message.content == SELF


@pytest.mark.parametrize("stream", [False, True])
def test_a_short_answer_does_not_wait_for_a_long_one(client, model, stream):
    model.as_new(step_s=0.2)
    ended = {}

    def ask(limit):
        answer = complete(client, user(text(WHO)), max_tokens=limit, stream=stream)
        if stream:
            assert list(answer)[-1].choices[0].finish_reason
        ended[limit] = time.perf_counter()

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(complete, client, user(text(WHO)), max_tokens=2)
        wait_until(lambda: model.turn.acquire(blocking=False) is False or model.turn.release())
        list(pool.map(ask, (2, 100)))
        first.result()
    assert ended[100] - ended[2] > 4 * model.step_s


def test_pictures_of_those_who_left_are_not_looked_at(client, model):
    """They wait in one batch with a picture that is looked at, and leave meanwhile."""
    model.as_new(picture_s=2.5)

    def leave(sample):
        with pytest.raises(openai.APITimeoutError):
            complete(client, about(sample), timeout=3.5)

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(complete, client, about(SAMPLES[0]))
        wait_until(lambda: model.looks)
        stays = pool.submit(complete, client, about(SAMPLES[4]))
        time.sleep(0.3)
        left = [pool.submit(leave, sample) for sample in SAMPLES[1:4]]
        assert first.result().choices[0].message.content == SAMPLES[0]["answer"]
        assert stays.result().choices[0].message.content == SAMPLES[4]["answer"]
        for each in left:
            each.result()
    assert len(model.looks) == 2


def test_what_goes_wrong_with_one_question_is_not_said_to_others(client, model, processor, monkeypatch):
    generate, sizes = model.generate, []

    def poisoned(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if any("poison" in words for words in processor.batch_decode(inputs["input_ids"])):
            raise FloatingPointError("not finite")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", poisoned)
    model.step_s = 0.05
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, client, user(text(words))) for words in (WHO, WHO, "poison", WHO)]
        errors = [each.exception() for each in asked]
    assert max(sizes) > 1
    assert isinstance(errors[2], openai.BadRequestError)
    assert [asked[i].result().choices[0].message.content for i in (0, 1, 3)] == [SELF] * 3


def test_next_to_no_temperature_is_none(client):
    assert complete(client, user(text(WHO)), temperature=1e-45).choices[0].message.content == SELF


def test_others_are_served_while_a_long_text_is_read(client, url, monkeypatch):
    reading = threading.Event()

    def slowly(*arguments):
        reading.set()
        time.sleep(2)
        return prompt_text(*arguments)

    monkeypatch.setattr("serving.batches.prompt_text", slowly)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, client, user(text(WHO)))
        assert reading.wait(2)
        assert httpx.get(f"{url}/health", timeout=1).is_success
        assert asked.result().choices[0].message.content == SELF


def test_a_stream_that_takes_long_to_begin_is_not_silent(client, model, url, monkeypatch):
    monkeypatch.setattr("serving.app.SAY_EVERY_S", 0.2)
    model.as_new(picture_s=1)
    body = {"model": "demo", "messages": about(SAMPLES[0]), "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=0.8) as answer:
        lines = list(answer.iter_lines())
    assert lines.count(": waiting") > 2
    model.as_new(picture_s=1)
    chunks = complete(client, about(SAMPLES[0]), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAMPLES[0]["answer"]

    def fails(**inputs):
        time.sleep(0.5)
        raise ValueError("out of order")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(openai.APIError, match="out of order"):
        list(complete(client, user(text(WHO)), stream=True))


def test_who_leaves_a_stream_that_has_not_begun_frees_the_model(client, model, monkeypatch):
    monkeypatch.setattr("serving.app.SAY_EVERY_S", 0.2)
    model.as_new(picture_s=5)
    with complete(client, about(SAMPLES[0]), stream=True):
        wait_until(lambda: model.looks)
    wait_until(lambda: model.given_up, 2)


def test_a_full_line_says_when_to_come_again(client, model):
    model.step_s = 0.1
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(complete, client, user(text(WHO))) for _ in range(16)]
        errors = [each.exception() for each in asked]
    refused = [error for error in errors if error]
    assert refused
    assert all(isinstance(error, openai.RateLimitError) for error in refused)
    assert all(1 <= int(error.response.headers["retry-after"]) <= 60 for error in refused)
    assert all(f"in {error.response.headers['retry-after']} s" in error.body["message"] for error in refused)
    assert len(refused) <= 16 - 6


def steps_of(model) -> int:
    return len(model.llm_infer_time)


def test_a_client_that_goes_away_frees_the_model(client, model):
    model.step_s = 0.1
    with complete(client, user(text(WHO)), stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    time.sleep(0.5)
    steps = steps_of(model)
    time.sleep(0.5)
    assert steps_of(model) == steps < 15
    with pytest.raises(openai.APITimeoutError):
        complete(client, user(text(WHO)), timeout=0.4)
    time.sleep(1)
    steps = steps_of(model)
    time.sleep(0.5)
    assert steps_of(model) == steps < 15
    model.step_s = 0
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_first_word_frees_the_model_and_the_line(client, model, stream):
    model.as_new(picture_s=4)

    def leave(messages):
        with pytest.raises(openai.APITimeoutError):
            complete(client, messages, stream=stream, timeout=0.6)

    with ThreadPoolExecutor(7) as pool:
        looking = pool.submit(leave, about(SAMPLES[0]))
        wait_until(lambda: model.looks)
        waiting = [pool.submit(leave, user(text(WHO))) for _ in range(6)]  # as many as there is room for
        for left in [looking, *waiting]:
            left.result()
    wait_until(lambda: model.given_up, 2)
    wait_until(lambda: not refused_for_now(client), 2)  # the last six may not be known to have left yet
    assert complete(client, user(text(WHO)), timeout=3).choices[0].message.content == SELF


def test_who_leaves_the_line_leaves_room(client, model):
    model.as_new(picture_s=4)
    with ThreadPoolExecutor(7) as pool:
        looking = pool.submit(complete, client, about(SAMPLES[0]))
        wait_until(lambda: model.looks)
        waiting = [pool.submit(complete, client, user(text(WHO)), timeout=0.6) for _ in range(6)]
        assert all(isinstance(left.exception(), openai.APITimeoutError) for left in waiting)
        wait_until(lambda: not refused_for_now(client), 2)
        assert looking.result().choices[0].message.content == SAMPLES[0]["answer"]


def refused_for_now(client) -> bool:
    """Whether there is no room for another."""
    try:
        complete(client, user(text(WHO)), timeout=0.5)
    except openai.RateLimitError:
        return True
    except openai.APITimeoutError:
        pass
    return False


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(url):
    port = int(url.rpartition(":")[2])
    with pytest.raises(OSError, match=f"{port} cannot be had .* --port"):
        bound("127.0.0.1", port)
    with bound("127.0.0.1", 0) as mine, pytest.raises(OSError, match="cannot be had"):
        bound("127.0.0.1", mine.getsockname()[1])  # by a second server, while the first one loads
    with pytest.raises(OSError, match="--port"):
        bound("127.0.0.1", 99999)


def test_what_goes_wrong_in_the_model_is_an_error_and_the_next_is_answered(client, model, monkeypatch):
    def fails(**inputs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(model, "generate", fails)
    assert isinstance(refusal(client), openai.InternalServerError)
    with pytest.raises(openai.InternalServerError):
        list(complete(client, user(text(WHO)), stream=True))
    monkeypatch.undo()
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_what_does_not_fit_into_memory_together_is_answered_one_by_one(client, model, monkeypatch):
    generate, sizes = model.generate, []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise MemoryError("2 GB too little")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", small)
    model.step_s = 0.05
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(client, user(text(WHO))).choices[0].message.content, range(4)))
    assert answers == [SELF] * 4
    assert max(sizes) > 1
