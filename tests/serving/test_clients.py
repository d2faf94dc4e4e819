"""Several clients of the server at once: they share steps, each is answered as if alone, and who leaves is in nobody's
way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from chat_page import SELF, WHO, wait_until
from conftest import demo_samples
from openai_client import BEARER, HTTP, about, alone, complete, is_busy, picture, text, user
from ov_mllama.runtime.batch import Batch
from ov_mllama.runtime.errors import InputError, NumericalError
from ov_mllama.runtime.prompts import prompt_text

SAMPLES = demo_samples()


def test_questions_that_wait_share_steps_and_get_their_own_answers(client, scheduler, slow_demo, processor):
    questions = [(sample["question"], sample) for sample in SAMPLES[:4]] + [(WHO,), ("What is it?",)]
    expected = [alone(slow_demo, processor, *asked) for asked in questions]
    slow_demo.as_new(step_s=60)
    step, counted = slow_demo.language_model.infer, []
    slow_demo.language_model.infer = lambda *given: counted.append(1) or step(*given)

    def ask(asked):
        question, *samples = asked
        return complete(client, user(*map(picture, samples), text(question))).choices[0]

    with ThreadPoolExecutor(len(questions)) as pool:
        first = pool.submit(ask, questions[0])
        wait_until(lambda: is_busy(slow_demo))
        others = [pool.submit(ask, question) for question in questions[1:]]
        wait_until(lambda: len(scheduler._waiting) == len(others))
        slow_demo.step_s = 0
        answers = [each.result() for each in [first, *others]]
    slow_demo.language_model.infer = step
    assert [answer.message.content for answer in answers] == expected
    len_of_answers = sum(len(processor.tokenizer(answer)["input_ids"]) for answer in expected)
    assert len(counted) < 0.7 * len_of_answers


def test_each_picture_of_a_batch_is_looked_at_once(client, scheduler, slow_demo, processor):
    asked = [(SAMPLES[1]["question"], SAMPLES[1]), ("Which?", SAMPLES[2], SAMPLES[4]), ("What?", SAMPLES[2])]
    expected = [alone(slow_demo, processor, *each) for each in asked]
    slow_demo.as_new(picture_s=60)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(complete, client, about(SAMPLES[0]))
        wait_until(lambda: slow_demo.looks)
        answers = [
            pool.submit(complete, client, user(*map(picture, samples), text(words))) for words, *samples in asked
        ]
        wait_until(lambda: len(scheduler._waiting) == len(answers))
        slow_demo.picture_s = 0
        assert [answer.result().choices[0].message.content for answer in answers] == expected
        first.result()
    assert len(slow_demo.looks) == 4


def test_others_may_use_the_processor_while_a_batch_is_padded(client, slow_demo, processor):
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
def test_a_short_answer_does_not_wait_for_a_long_one(client, scheduler, slow_demo, stream, monkeypatch):
    slow_demo.as_new(step_s=60)
    step, counted, short_ended = slow_demo.language_model.infer, [], threading.Event()

    def held(*given):
        counted.append(1)
        if len(counted) > 6:  # both answers have begun: the first one has 2 tokens, as the short one
            assert short_ended.wait(60)
        return step(*given)

    def ask(limit):
        answer = complete(client, user(text(WHO)), max_tokens=limit, stream=stream)
        if stream:
            assert list(answer)[-1].choices[0].finish_reason

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(complete, client, user(text(WHO)), max_tokens=2)
        wait_until(lambda: is_busy(slow_demo))
        short, long = (pool.submit(ask, limit) for limit in (2, 100))
        wait_until(lambda: len(scheduler._waiting) == 2)
        monkeypatch.setattr(slow_demo.language_model, "infer", held)
        slow_demo.step_s = 0
        first.result()
        short.result(60)
        assert not long.done()
        short_ended.set()
        long.result()
    assert len(counted) > 10


def test_others_are_served_while_a_long_text_is_read(client, server, monkeypatch):
    reading, served_meanwhile = threading.Event(), threading.Event()

    def slowly(*arguments):
        reading.set()
        assert served_meanwhile.wait(60)
        return prompt_text(*arguments)

    monkeypatch.setattr("ov_mllama.serving.scheduler.prompt_text", slowly)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(complete, client, user(text(WHO)))
        assert reading.wait(60)
        assert HTTP.get(f"{server}/health").is_success
        served_meanwhile.set()
        assert asked.result().choices[0].message.content == SELF


def test_a_stream_that_takes_long_to_begin_is_not_silent(client, slow_demo, server, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.streaming.KEEPALIVE_S", 0.05)
    slow_demo.as_new(picture_s=60)
    body = {"model": "demo", "messages": about(SAMPLES[0]), "stream": True}
    with HTTP.stream("POST", f"{server}/v1/chat/completions", json=body, headers=BEARER) as answer:
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if lines.count(": waiting") > 2:
                slow_demo.picture_s = 0
    assert lines.count(": waiting") > 2
    assert "data: [DONE]" in lines
    slow_demo.as_new(picture_s=0.3)
    chunks = complete(client, about(SAMPLES[0]), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAMPLES[0]["answer"]

    def fails(*given):
        time.sleep(0.3)
        raise InputError("out of order")

    monkeypatch.setattr(slow_demo, "begin", fails)
    with pytest.raises(openai.APIError, match="out of order"):
        list(complete(client, user(text(WHO)), stream=True))


# ---- What goes wrong ------------------------------------------------------------------------------------------------


def test_what_goes_wrong_with_one_question_is_not_said_to_others(client, scheduler, slow_demo, processor, monkeypatch):
    join, sizes = Batch.join, []

    def poisoned(self, prefill):
        sizes.append(len(scheduler._engine.running))
        if "poison" in processor.decode(prefill.prompt.input_ids[0]):
            raise NumericalError("not finite")
        return join(self, prefill)

    monkeypatch.setattr(Batch, "join", poisoned)
    slow_demo.step_s = 60
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(complete, client, user(text(WHO)))
        wait_until(lambda: is_busy(slow_demo))
        asked = [pool.submit(complete, client, user(text(words))) for words in (WHO, WHO, "poison", WHO)]
        wait_until(lambda: len(scheduler._waiting) == len(asked))
        slow_demo.step_s = 0
        errors = [each.exception() for each in asked]
        assert first.result()
    assert max(sizes) > 1
    assert isinstance(errors[2], openai.BadRequestError)
    assert [asked[i].result().choices[0].message.content for i in (0, 1, 3)] == [SELF] * 3


def test_what_does_not_fit_into_memory_together_is_answered_one_by_one(client, scheduler, slow_demo, monkeypatch):
    decode, sizes = Batch.decode, []

    def small(self, tokens):
        sizes.append(len(tokens))
        if sizes[-1] > 1:
            raise MemoryError("2 GB too little")
        return decode(self, tokens)

    monkeypatch.setattr(Batch, "decode", small)
    slow_demo.step_s = 60
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(complete, client, user(text(WHO)))]
        wait_until(lambda: is_busy(slow_demo))
        asked += [pool.submit(complete, client, user(text(WHO))) for _ in range(4)]
        wait_until(lambda: len(scheduler._waiting) == 4)
        slow_demo.step_s = 0
    assert [each.result().choices[0].message.content for each in asked] == [SELF] * 5
    assert max(sizes) > 1


def test_a_full_line_says_when_to_come_again(client, scheduler, slow_demo):
    slow_demo.step_s = 60
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(complete, client, user(text(WHO))) for _ in range(16)]
        wait_until(lambda: sum(each.done() for each in asked) + len(scheduler._reservations) == 16)
        slow_demo.step_s = 0
        errors = [each.exception() for each in asked]
    refused = [error for error in errors if error]
    assert refused
    assert all(isinstance(error, openai.RateLimitError) for error in refused)
    assert all(1 <= int(error.response.headers["retry-after"]) <= 60 for error in refused)
    assert all(f"in {error.response.headers['retry-after']} s" in error.body["message"] for error in refused)
    assert len(refused) <= 16 - 6


# ---- Who leaves -----------------------------------------------------------------------------------------------------


def steps_of(model) -> int:
    return len(model.llm_infer_time)


def test_a_client_that_goes_away_frees_the_model(client, slow_demo):
    slow_demo.step_s = 0.4
    with complete(client, user(text(WHO)), stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    wait_until(lambda: not is_busy(slow_demo))
    assert steps_of(slow_demo) < 15
    with pytest.raises(openai.APITimeoutError):
        complete(client, user(text(WHO)), timeout=0.5)
    wait_until(lambda: not is_busy(slow_demo))
    assert steps_of(slow_demo) < 15
    slow_demo.step_s = 0
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_who_leaves_a_stream_that_has_not_begun_frees_the_model(client, slow_demo, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.streaming.KEEPALIVE_S", 0.05)
    slow_demo.as_new(picture_s=60)
    with complete(client, about(SAMPLES[0]), stream=True):
        wait_until(lambda: slow_demo.looks)
    wait_until(lambda: slow_demo.given_up)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_first_word_frees_the_model_and_the_line(client, scheduler, slow_demo, stream):
    slow_demo.as_new(picture_s=60)

    def leave(messages):
        with pytest.raises(openai.APITimeoutError):
            complete(client, messages, stream=stream, timeout=0.6)

    with ThreadPoolExecutor(7) as pool:
        looking = pool.submit(leave, about(SAMPLES[0]))
        wait_until(lambda: slow_demo.looks)
        waiting = [pool.submit(leave, about(SAMPLES[1])) for _ in range(6)]  # as many as there is room for
        for left in [looking, *waiting]:
            left.result()
    wait_until(lambda: slow_demo.given_up)
    slow_demo.picture_s = 0
    wait_until(lambda: not scheduler._reservations)  # the last six may not be known to have left yet
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_who_leaves_the_line_leaves_room(client, scheduler, slow_demo):
    slow_demo.as_new(picture_s=60)
    with ThreadPoolExecutor(8) as pool:
        looking = pool.submit(complete, client, about(SAMPLES[0]))
        wait_until(lambda: slow_demo.looks)
        waiting = [pool.submit(complete, client, about(SAMPLES[1]), timeout=0.6) for _ in range(6)]
        assert all(isinstance(left.exception(), openai.APITimeoutError) for left in waiting)
        wait_until(lambda: all(asked.sequence.cancelled.is_set() for asked in list(scheduler._waiting)))
        another = pool.submit(complete, client, about(SAMPLES[4]))
        wait_until(lambda: len(scheduler._waiting) == 1)
        slow_demo.picture_s = 0
        assert looking.result().choices[0].message.content == SAMPLES[0]["answer"]
        assert another.result().choices[0].message.content == SAMPLES[4]["answer"]


def test_pictures_of_those_who_left_are_not_looked_at(client, scheduler, slow_demo):
    """They wait in one batch with a picture that is looked at, and leave meanwhile."""
    slow_demo.as_new(picture_s=60)

    def leave(sample):
        with pytest.raises(openai.APITimeoutError):
            complete(client, about(sample), timeout=2)

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(complete, client, about(SAMPLES[0]))
        wait_until(lambda: slow_demo.looks)
        stays = pool.submit(complete, client, about(SAMPLES[4]))
        wait_until(lambda: len(scheduler._waiting) == 1)
        left = [pool.submit(leave, sample) for sample in SAMPLES[1:4]]
        wait_until(lambda: len(scheduler._waiting) == 4)
        batch = list(scheduler._waiting)
        slow_demo.looks[0] = 0  # its time is over
        wait_until(lambda: len(slow_demo.looks) == 2)
        for each in left:
            each.result()
        wait_until(lambda: sum(asked.sequence.cancelled.is_set() for asked in batch) == len(left))
        slow_demo.picture_s = 0
        assert first.result().choices[0].message.content == SAMPLES[0]["answer"]
        assert stays.result().choices[0].message.content == SAMPLES[4]["answer"]
    assert len(slow_demo.looks) == 2
