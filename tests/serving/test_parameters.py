"""Parameters of OpenAI's API and vLLM's that change the answer: penalties, biases, log probabilities, choices."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from chat_page import SELF, WHO, wait_until
from conftest import demo_samples
from openai_client import ASKED, about, complete, is_busy, post, refusal, text, user
from ov_mllama.serving.parsing import GenerationRequest
from ov_mllama.serving.protocol import ChatCompletionRequest
from ov_mllama.serving.sampling import adjust_logits

SAMPLES = demo_samples()
SAY = user(text(WHO))


def adjusted(prompt: list[int], answer: list[int], **options) -> list[float]:
    logits = torch.tensor([1.0, -1.0, 2.0, 0.0])
    result = adjust_logits(logits, GenerationRequest([], **options), prompt, answer)
    assert logits.tolist() == [1, -1, 2, 0]
    return result.tolist()


def test_penalties_and_biases_change_logits_as_defined():
    assert adjusted([0, 1], [2, 2]) == [1, -1, 2, 0]
    assert adjusted([0, 1], [2, 2], repetition_penalty=2.0) == [0.5, -2, 1, 0]
    assert adjusted([0, 1], [2, 2], repetition_penalty=2.0, penalty_window=3) == [1, -2, 1, 0]
    assert adjusted([0, 1], [2, 2], presence_penalty=0.5) == [1, -1, 1.5, 0]
    assert adjusted([0, 1], [2, 2], frequency_penalty=0.5) == [1, -1, 1, 0]
    assert adjusted([0, 1], [3, 2, 2], frequency_penalty=0.5, penalty_window=1) == [1, -1, 1.5, 0]
    assert adjusted([], [], presence_penalty=1, frequency_penalty=1, repetition_penalty=2.0) == [1, -1, 2, 0]
    assert adjusted([], [], logit_bias={3: 5.0, 0: -100.0}) == [-99, -1, 2, 5]


@pytest.mark.parametrize(
    "options",
    [
        {"extra_body": {"repetition_penalty": 5}},
        {"extra_body": {"repeat_penalty": 5}},
    ],
)
def test_penalty_changes_the_answer(client, options):
    assert complete(client, SAY, **options).choices[0].message.content != SELF


def test_repetition_penalty_of_a_prompt_with_an_image(client):
    assert (
        complete(client, about(SAMPLES[0]), extra_body={"repetition_penalty": 1.0001}).choices[0].message.content
        == (SAMPLES[0]["answer"])
    )


def test_repetition_penalty_of_generation_config_is_the_default(client, slow_demo, monkeypatch):
    monkeypatch.setattr(slow_demo.generation_config, "repetition_penalty", 5.0)
    assert complete(client, SAY).choices[0].message.content != SELF
    assert complete(client, SAY, extra_body={"repetition_penalty": 1}).choices[0].message.content == SELF


def test_penalties_reach_the_sequence():
    request = ChatCompletionRequest(messages=SAY, presence_penalty=1.5, frequency_penalty=-1, repeat_last_n=7)
    assert request.penalties == {
        "presence_penalty": 1.5,
        "frequency_penalty": -1,
        "repetition_penalty": None,
        "penalty_window": 7,
    }


def test_neutral_penalties_change_nothing(client):
    for extra in ({"repetition_penalty": 1}, {"repetition_penalty": 5, "repeat_last_n": 0}):
        completion = complete(client, SAY, presence_penalty=0, frequency_penalty=0, logit_bias={}, extra_body=extra)
        assert completion.choices[0].message.content == SELF


def test_logit_bias_forbids_and_forces_a_token(client, processor):
    first, second = processor.tokenizer(SELF, add_special_tokens=False)["input_ids"][:2]
    forbidden = complete(client, SAY, logit_bias={str(first): -100}, max_tokens=5)
    assert not forbidden.choices[0].message.content.startswith(SELF[:2])
    forced = complete(client, SAY, logit_bias={str(second): 100}, max_tokens=3)
    assert forced.choices[0].message.content == processor.tokenizer.decode([second] * 3)


def test_stop_token_ends_the_answer(client, processor):
    tokens = processor.tokenizer(SELF, add_special_tokens=False)["input_ids"]
    completion = complete(client, SAY, extra_body={"stop_token_ids": [tokens[3]]})
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == 4
    assert SELF.startswith(completion.choices[0].message.content)


# ---- Log probabilities ----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_answers_tokens(client, processor):
    completion = complete(client, SAY, logprobs=True, top_logprobs=3)
    content = completion.choices[0].logprobs.content
    assert "".join(each.token for each in content) == SELF
    assert len(content) == completion.usage.completion_tokens - 1  # without the end token
    for each in content:
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (t.logprob for t in each.top_logprobs), reverse=True
        )
        assert (each.top_logprobs[0].token, each.top_logprobs[0].logprob) == (each.token, each.logprob)
        assert sum(math.exp(top.logprob) for top in each.top_logprobs) <= 1 + 1e-5
        assert bytes(each.bytes).decode() == each.token
    assert complete(client, SAY).choices[0].logprobs is None
    assert complete(client, SAY, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_log_probabilities_do_not_depend_on_sampling(client, processor):
    plain = complete(client, SAY, logprobs=True, max_tokens=1).choices[0].logprobs.content[0]
    [first] = processor.tokenizer(plain.token, add_special_tokens=False)["input_ids"]
    options = dict(logprobs=True, top_logprobs=1, max_tokens=1, temperature=2, logit_bias={str(first): -100})
    other = complete(client, SAY, **options).choices[0].logprobs.content[0]
    assert other.token != plain.token
    assert other.top_logprobs[0].token == plain.token
    assert other.top_logprobs[0].logprob == pytest.approx(plain.logprob, abs=1e-5)


def test_streamed_log_probabilities_are_complete(client):
    expected = complete(client, SAY, logprobs=True).choices[0].logprobs.content
    got = []
    for chunk in complete(client, SAY, logprobs=True, stream=True):
        if chunk.choices[0].logprobs:
            got += chunk.choices[0].logprobs.content
    assert [each.token for each in got] == [each.token for each in expected]


# ---- Choices --------------------------------------------------------------------------------------------------------


def test_choices_of_one_request_are_different_and_repeatable(client):
    options = dict(n=3, temperature=2.0, max_tokens=12, seed=5)
    asked = user(text("Which?"))
    completion = complete(client, asked, **options)
    texts = [choice.message.content for choice in completion.choices]
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert completion.usage.completion_tokens > 12
    assert completion.usage.prompt_tokens == complete(client, asked, max_tokens=1).usage.prompt_tokens
    streamed = [""] * 3
    for chunk in complete(client, asked, stream=True, stream_options={"include_usage": True}, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert chunk.usage == completion.usage


def test_choices_about_an_image_encode_it_once(client, slow_demo):
    completion = complete(client, about(SAMPLES[0]), n=2)
    assert [choice.message.content for choice in completion.choices] == [SAMPLES[0]["answer"]] * 2
    assert len(slow_demo.looks) == 1


def test_choices_beyond_the_queue_are_refused_and_leave_it_empty(client, scheduler, slow_demo):
    slow_demo.step_s = 60
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(complete, client, SAY)
        wait_until(lambda: is_busy(slow_demo))
        assert isinstance(refusal(client, SAY, n=8), openai.RateLimitError)
        slow_demo.step_s = 0
        assert first.result().choices[0].message.content == SELF
    wait_until(lambda: not scheduler._reservations)


# ---- Schemas and prefilled answers ----------------------------------------------------------------------------------


def test_schema_of_vllms_present_name_is_followed(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    schema["additionalProperties"] = False
    for options in ({"json": schema}, {"json": json.dumps(schema), "regex": None}):
        completion = complete(client, about(SAMPLES[0]), extra_body={"structured_outputs": options})
        assert set(json.loads(completion.choices[0].message.content)) == {"n"}


@pytest.mark.parametrize("options", [{"regex": ""}, {"choice": [5]}, {"json": {}, "json_object": True}, {"x": 1}])
def test_other_structured_outputs_are_refused(client, options):
    error = refusal(client, extra_body={"structured_outputs": options})
    assert (error.status_code, error.param) == (400, "structured_outputs")


@pytest.mark.parametrize("extra", [{}, {"add_generation_prompt": False}])
def test_prefilled_answer_is_continued(client, extra):
    messages = [*SAY, {"role": "assistant", "content": SELF[:10]}]
    completion = complete(client, messages, extra_body={"continue_final_message": True, **extra})
    assert completion.choices[0].message.content == SELF[10:]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"logit_bias": {"1000000000": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"repetition_penalty": 2, "repeat_penalty": 2}, "repeat_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"n": 9}, "n"),
        ({"stop_token_ids": list(range(2000))}, "stop_token_ids"),
    ],
)
def test_parameter_out_of_range_is_refused_by_name(server, options, param):
    answer = post(server, {**ASKED, **options})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
