"""Tools: prompts as the chat template writes them, calls in answers, and what is refused."""

import copy
import json

import pytest

from chat_page import SELF, WHO
from conftest import demo_samples
from openai_client import BEARER, HTTP, about, complete, openai_client, post, refusal, small_server, text, user
from ov_mllama.serving.messages import convert_message
from ov_mllama.serving.tools import one_call_each, parse_calls

SAMPLES = demo_samples()
TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if loop.first and tools %}
        {%- if message.content == 'refuse' %}{{- raise_exception('This is refused.') }}{%- endif %}
        {{- tools | tojson }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}{{- raise_exception('One call at a time.') }}{%- endif %}
        {{- message.tool_calls[0].function | tojson }}
    {%- elif message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}{{- part.text }}{%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
CALL = '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}'
ARGUMENTS = {"city": "Rome", "days": 2}
ASK = user(text("How is the weather?"))


@pytest.fixture(scope="module")
def tool_processor(processor):
    """The demo's, with a chat template that has tools."""
    processor = copy.copy(processor)
    processor.chat_template = TEMPLATE
    return processor


@pytest.fixture(scope="module")
def tool_server(slow_demo, tool_processor):
    with small_server(slow_demo, tool_processor, max_batch=4) as (url, _):
        yield url


@pytest.fixture
def tool_client(tool_server):
    return openai_client(tool_server)


@pytest.fixture
def answers(monkeypatch, processor):
    """`answers(text)`: the text that the model writes from now on."""

    def write(answer: str) -> None:
        tokens = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
        monkeypatch.setattr(
            "ov_mllama.serving.sequences.Sequence.sample", lambda self, _: [*tokens, end][self.num_tokens]
        )

    return write


def tokens_of(processor, messages, **options) -> int:
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    return len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_call_is_returned_complete_and_streamed(tool_client, tool_processor, answers):
    answers(CALL)
    [choice] = complete(tool_client, ASK, tools=[WEATHER, CLOCK]).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", ARGUMENTS)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, end, usage = complete(tool_client, ASK, tools=[WEATHER, CLOCK], **options)
    [streamed] = [chunk.choices[0].delta.tool_calls for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert (streamed[0].index, streamed[0].function) == (0, streamed[0].function.__class__(**dict(call.function)))
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert end.choices[0].finish_reason == "tool_calls"
    messages = [{"role": "user", "content": "How is the weather?"}]
    assert usage.usage.prompt_tokens == tokens_of(tool_processor, messages, tools=[WEATHER, CLOCK])


@pytest.mark.parametrize(
    "answer",
    [
        CALL,
        CALL.replace("parameters", "arguments"),
        f'{{"type": "function", {CALL[1:]}',
        json.dumps({"name": "weather", "parameters": json.dumps(ARGUMENTS)}),
        f"\n{CALL}",
        f"[{CALL}]",
        "weather(city='Rome', days=2)",
        "weather.call(city='Rome', days=2)",
        "[weather(city='Rome', days=2)]",
    ],
)
def test_call_is_read_in_every_form_that_the_model_writes(answer):
    [call] = parse_calls(answer, {"weather"})
    assert (call.name, call.arguments) == ("weather", ARGUMENTS)
    assert len(parse_calls(f"{CALL}; {CALL}", {"weather"})) == 2


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It rains.",
        "{",
        "5",
        '{"name": "weather"}',
        '{"name": "other", "parameters": {}}',
        '{"name": "weather", "parameters": [1]}',
        f"{CALL} is a call",
        "weather(days)",
        "weather(city=open('x'))",
        "[" * 5000,
        "-" * 5000,
    ],
)
def test_other_answer_is_text(answer):
    assert parse_calls(answer, {"weather"}) == []


def test_several_calls_are_returned_unless_one_is_requested(tool_client, answers):
    answers(f"{CALL}; {CALL}")
    for options, count in (({}, 2), ({"parallel_tool_calls": True}, 2), ({"parallel_tool_calls": False}, 1)):
        assert len(complete(tool_client, ASK, tools=[WEATHER], **options).choices[0].message.tool_calls) == count


def test_text_is_streamed_as_without_tools(tool_client, answers):
    answers("It is fine, and warm.")
    chunks = [chunk.choices[0] for chunk in complete(tool_client, ASK, tools=[WEATHER], stream=True)]
    assert len([chunk for chunk in chunks if chunk.delta.content]) > 3
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "It is fine, and warm."
    assert chunks[-1].finish_reason == "stop"
    answers('{"city": "Rome"}')
    for stream in (False, True):
        answer = complete(tool_client, ASK, tools=[WEATHER], stream=stream)
        parts = [chunk.choices[0].delta.content or "" for chunk in answer] if stream else []
        assert "".join(parts) if stream else answer.choices[0].message.content == '{"city": "Rome"}'


def test_call_behind_the_python_tag_is_read(tool_client, answers):
    answers("<|python_tag|>weather.call(city='Rome', days=2)")
    for stream in (False, True):
        answer = complete(tool_client, ASK, tools=[WEATHER], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert choices[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "weather"}}, {"type": "function", "name": "weather"}],
)
def test_required_call_matches_its_parameters(tool_client, choice, stream):
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    answer = complete(tool_client, ASK, tools=tools, tool_choice=choice, stream=stream)
    if stream:
        [calls] = [chunk.choices[0].delta.tool_calls for chunk in answer if chunk.choices[0].delta.tool_calls]
    else:
        calls = answer.choices[0].message.tool_calls
    arguments = json.loads(calls[0].function.arguments)
    assert (calls[0].function.name, set(arguments)) == ("weather", {"city", "days"})
    assert arguments["city"] in ("Rome", "Oslo")
    assert 1 <= arguments["days"] <= 9


def test_answer_beside_tools_matches_its_schema(tool_client, answers):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "maximum": 9}}}
    assert int(complete(tool_client, ASK, tools=[WEATHER], response_format=form).choices[0].message.content) <= 9
    error = refusal(tool_client, tools=[WEATHER], extra_body={"guided_regex": "a"})
    assert (error.status_code, error.param) == (400, "guided_regex")


def test_history_of_tools_is_understood(tool_client, tool_processor):
    def call(name, arguments, **more):
        return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}

    question = {"role": "user", "content": "Weather?"}
    calls = [call("weather", json.dumps(ARGUMENTS), id="1"), call("clock", "", id="2")]
    messages = [
        question,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": [text("noon")]},
        {"role": "ipython", "tool_call_id": "1", "content": "sun"},
        {"role": "user", "content": "And?"},
    ]
    expected = [
        question,
        {"role": "assistant", "tool_calls": [call("weather", ARGUMENTS)]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "tool_calls": [call("clock", {})]},
        {"role": "tool", "content": "noon"},
        {"role": "user", "content": "And?"},
    ]
    turns = one_call_each([convert_message(message, "messages", []) for message in messages])
    assert [turn["role"] for turn in turns] == [message["role"] for message in expected]
    assert [turn["content"] for turn in turns if turn["role"] == "tool"] == ["sun", "noon"]
    for tools in (None, [WEATHER]):
        options = {"tools": tools} if tools else {}
        usage = complete(tool_client, messages, max_tokens=1, **options).usage
        assert usage.prompt_tokens == tokens_of(tool_processor, expected, tools=tools)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"tools": [WEATHER], "messages": about(SAMPLES[0])}, "tools", "Tool calling does NOT work with images"),
        ({"tools": [WEATHER], "messages": user(text("refuse"))}, "messages", "This is refused"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "required"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "web_search"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function", "name"),
        ({"tools": [WEATHER], "messages": user(text("word " * 1100))}, "prompt", "context"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tool_server, options, param, words):
    answer = post(tool_server, {"model": "demo", "messages": ASK, **options})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_model_whose_template_has_no_tools_refuses_them_unless_none_may_be_called(client):
    error = refusal(client, tools=[WEATHER])
    assert (error.status_code, error.param) == (400, "tools")
    assert "does not support tools" in str(error)
    error = refusal(client, [*ASK, {"role": "tool", "content": "sun"}])
    assert (error.status_code, error.param) == (400, "messages")
    answer = complete(client, about(SAMPLES[0]), tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == SAMPLES[0]["answer"]
    assert complete(client, user(text(WHO)), tools=[], tool_choice="auto").choices[0].message.content == SELF


@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_api_returns_calls(tool_server, answers, stream):
    answers(CALL)
    body = {"model": "demo", "messages": [{"role": "user", "content": "?"}], "tools": [WEATHER], "stream": stream}
    answer = HTTP.post(f"{tool_server}/api/chat", json=body, headers=BEARER)
    *_, last = lines = [json.loads(line) for line in answer.text.splitlines()]
    [message] = [line["message"] for line in lines if line["message"].get("tool_calls")]
    assert message["tool_calls"] == [{"function": {"name": "weather", "arguments": ARGUMENTS}}]
    assert (message["content"], last["done_reason"]) == ("", "stop")
    history = [message, {"role": "tool", "tool_name": "weather", "content": "sun"}]
    answers("It is fine.")
    body["messages"] += history
    answer = HTTP.post(f"{tool_server}/api/chat", json=body, headers=BEARER)
    assert "".join(json.loads(line)["message"]["content"] for line in answer.text.splitlines()) == "It is fine."
    shown = HTTP.post(f"{tool_server}/api/show", json={"model": "demo"}, headers=BEARER).json()
    assert "tools" in shown["capabilities"]


def test_responses_api_returns_calls(tool_client, answers):
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    answers(CALL)
    [item] = tool_client.responses.create(model="demo", input="?", tools=[tool]).output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "weather", ARGUMENTS)
    events = list(tool_client.responses.create(model="demo", input="?", tools=[tool], stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert json.loads(events[-1].response.output[0].arguments) == ARGUMENTS
    answers("It is fine.")
    again = [{"role": "user", "content": "?"}, {**item.model_dump(), "call_id": "2"}, item.model_dump()]
    outputs = [{"type": "function_call_output", "call_id": each["call_id"], "output": "sun"} for each in again[1:]]
    options = dict(model="demo", input=[*again, *outputs], tools=[tool])
    assert tool_client.responses.create(**options).output_text == "It is fine."
    *_, last = tool_client.responses.create(stream=True, **options)
    assert last.response.output[0].content[0].text == "It is fine."
