"""JSON schemas: hostile ones, those that are followed, and those that cannot be."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from chat_page import SELF, WHO, wait_until
from conftest import demo_samples
from openai_client import ASKED, about, complete, is_openai_error, post, refusal, text, user

SAMPLES = demo_samples()


def deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


SCHEMAS = {
    "itself": {"$ref": "#"},
    "itself twice": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "itself for ever": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "deep": deep(60),
    "deeper": deep(150),
    "enum": {"enum": [f"value {i}" for i in range(4000)]},
    "huge enum": {"enum": [f"value {i}" for i in range(20_000)]},
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
    "long": {"type": "string", "minLength": 10**9},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 10**8},
    "repeated": {"type": "string", "pattern": "^((((a{1,30}){1,30}){1,30}){1,30}){1,30}$"},
    "all of": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}": {"type": "string"}}}, {"properties": {f"q{i}": {"type": "integer"}}}]}
            for i in range(16)
        ]
    },
    "doubling": {
        "$defs": {
            **{f"a{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)},
            "a60": {"type": "string"},
        },
        "$ref": "#/$defs/a0",
    },
    "remote": {"$ref": "http://127.0.0.1:9/x.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "numbers": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "no schema": {"type": 5},
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_hostile_schema_is_refused_or_followed(client, server, kind):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[kind]}}
    answer = post(server, {**ASKED, "response_format": form, "max_tokens": 8})
    if answer.is_success:
        [choice] = answer.json()["choices"]
        if choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])
    else:
        assert answer.status_code == 400
        assert is_openai_error(answer)
        assert len(answer.content) < 1000
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_schema_that_becomes_too_complex_is_an_error_of_its_own_answer_only(client, slow_demo, monkeypatch):
    """It would end with "stop" after half an answer."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep(3)}}
    from llguidance import LLMatcher

    class Fails:
        def __init__(self, matcher):
            self.matcher, self.masks = matcher, 0

        def compute_bitmask(self):
            self.masks += 1
            return self.matcher.compute_bitmask()

        def is_error(self):
            return self.masks > 2

        def get_error(self):
            return "too many items"

        def __getattr__(self, name):
            return getattr(self.matcher, name)

    monkeypatch.setattr(
        "ov_mllama.chat.schema_matcher.LLMatcher",
        FailsLater := type(
            "FailsLater",
            (),
            {
                "__new__": lambda cls, *given, **options: Fails(LLMatcher(*given, **options)),
                "grammar_from_json_schema": staticmethod(LLMatcher.grammar_from_json_schema),
            },
        ),
    )
    assert FailsLater
    slow_demo.step_s = 0.05
    with ThreadPoolExecutor(3) as pool:
        other = pool.submit(complete, client, user(text(WHO)))
        wrong = pool.submit(complete, client, user(text("?")), response_format=form)
        third = pool.submit(complete, client, user(text(WHO)))
        assert "too many items" in str(wrong.exception())
        assert isinstance(wrong.exception(), openai.BadRequestError)
        assert [each.result().choices[0].message.content for each in (other, third)] == [SELF, SELF]


def test_schemas_are_compiled_one_at_a_time_beside_others(client, slow_demo, monkeypatch):
    compiling, running, most = threading.Event(), [], []

    def slowly(self, schema):
        running.append(1)
        most.append(len(running))
        compiling.wait(10)
        running.pop()

    monkeypatch.setattr("ov_mllama.serving.sampling.GrammarCompiler.compile", slowly)
    with ThreadPoolExecutor(4) as pool:
        slow = [
            pool.submit(complete, client, user(text(WHO)), response_format={"type": "json_object"}) for _ in range(4)
        ]
        wait_until(lambda: most)
        assert complete(client, user(text(WHO))).choices[0].message.content == SELF
        compiling.set()
        assert all(each.result() for each in slow)
    assert max(most) == 1


ONE_SHAPE = {
    "type": "object",
    "properties": {"shapes": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["shapes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_object", "schema": ONE_SHAPE}},
        {"response_format": {"type": "json_schema", "schema": ONE_SHAPE}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ONE_SHAPE}}},
        {"guided_json": ONE_SHAPE},
        {"guided_json": json.dumps(ONE_SHAPE)},
        {"guided_json": ONE_SHAPE, "response_format": {"type": "text"}},
    ],
)
def test_schema_is_followed_wherever_it_stands(client, options):
    completion = complete(client, about(SAMPLES[0]), extra_body=options)
    fields = json.loads(completion.choices[0].message.content)
    assert set(fields) == {"shapes"}
    assert 0 <= fields["shapes"] <= 9


GRAMMARS = [
    ("regex", "[ab]{3}-x", r"[ab]{3}-x"),
    ("choice", ["red", 'a "b"', "1/2 ::= x"], r"red|a \"b\"|1/2 ::= x"),
    ("grammar", 'start: "n" DIGIT\nDIGIT: /[0-4]/', "n[0-4]"),
    ("grammar", 'root ::= "n" digit\ndigit ::= [0-4]', "n[0-4]"),  # llama.cpp's
]


@pytest.mark.parametrize(("kind", "grammar", "pattern"), GRAMMARS)
def test_grammar_is_followed_under_both_names(client, kind, grammar, pattern):
    for options in (
        {f"guided_{kind}": grammar},
        {"structured_outputs": {kind: grammar, "disable_any_whitespace": True}},
    ):
        [choice] = complete(client, user(text(WHO)), extra_body=options).choices
        assert re.fullmatch(pattern, choice.message.content)
        assert choice.finish_reason == "stop"


def test_object_has_only_the_properties_that_its_schema_names(client):
    """As instructor sends a pydantic model."""
    schema = {name: value for name, value in ONE_SHAPE.items() if name != "additionalProperties"}
    form = {"type": "json_schema", "json_schema": {"name": "P", "schema": schema}}
    completion = complete(client, about(SAMPLES[0]), response_format=form, max_tokens=60)
    assert set(json.loads(completion.choices[0].message.content)) == {"shapes"}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_grammar": "start: x"}, "guided_grammar"),
        ({"guided_grammar": "root ::= " + "(" * 3000}, "guided_grammar"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"guided_json": ONE_SHAPE, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": "[" * 30_000}, "guided_json"),
        ({"guided_json": {"enum": ["x" * 200_000]}}, "guided_json"),
        ({"response_format": {"type": "text", "schema": ONE_SHAPE}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ],
)
def test_schema_that_cannot_be_taken_is_refused(client, options, param):
    error = refusal(client, extra_body=options)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == param
