"""Grammars of answers: JSON schemas, regular expressions, choices and Lark grammars, as requests describe them."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from ov_mllama.chat.schemas import MAX_SCHEMA_CHARS, parse_schema
from ov_mllama.runtime.errors import InputError
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest

# structured_outputs' names of grammars
GRAMMARS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class Grammar:
    """Grammar that an answer must match.

    Attributes:
        kind: language of the source; "lark" may be llama.cpp's GBNF too.
        source: a JSON schema as an object, the others as text.
        param: path of the request's field, for errors.
    """

    kind: Literal["json", "regex", "lark"]
    source: Any
    param: str


def json_grammar(schema: dict | str, param: str) -> Grammar:
    """Return the grammar of a JSON schema of bounded length; a string is parsed, as vLLM does.

    Raises:
        ApiError: if it is no JSON object or too long.
    """
    try:
        return Grammar("json", parse_schema(schema), param)
    except InputError as error:
        raise ApiError(400, str(error), "invalid_json_schema", param) from error


def choice_grammar(choices: Any, param: str) -> Grammar:
    """Return the grammar of answers that are one of several texts.

    Raises:
        ApiError: if there are none, or others than texts.
    """
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise ApiError(400, "A choice is a list of texts that are not empty.", "invalid_value", param)
    return bounded(Grammar("lark", f"start: {' | '.join(map(json.dumps, choices))}", param))


def bounded(grammar: Grammar) -> Grammar:
    """Return a grammar that is a text.

    Raises:
        ApiError: if it is none, empty or too long.
    """
    if not isinstance(grammar.source, str) or not 0 < len(grammar.source) <= MAX_SCHEMA_CHARS:
        message = f"A regular expression, grammar or choice has 1 to {MAX_SCHEMA_CHARS} characters."
        raise ApiError(400, message, "invalid_value", grammar.param)
    return grammar


def grammar_of(request: ChatCompletionRequest) -> Grammar | None:
    """Return what a request's answer must match; None for free text.

    Raises:
        ApiError: if it is missing, given twice, invalid, not supported or too long.
    """
    form, vllm = request.response_format, vllm_grammar(request)
    if vllm:
        if form is not None and form.type != "text":
            raise ApiError(400, f"Give response_format or {vllm.param}, not both.", "invalid_value", vllm.param)
        return vllm
    if form is None:
        return None
    schema = form.schema_
    if form.json_schema:
        schema = {} if form.json_schema.schema_ is None else form.json_schema.schema_
    if form.type == "text":
        if schema:
            message = "A schema needs a response_format of type json_schema or json_object."
            raise ApiError(400, message, "invalid_value", "response_format.type")
        return None
    if schema is None and form.type == "json_schema":
        message, param = "response_format lacks its json_schema.", "response_format.json_schema"
        raise ApiError(400, message, "invalid_value", param)
    return json_grammar({"type": "object"} if schema is None else schema, "response_format.json_schema")


def vllm_grammar(request: ChatCompletionRequest) -> Grammar | None:
    """Return the grammar of `structured_outputs`, or of the fields `guided_...` that earlier versions of vLLM have."""
    given = [(name, getattr(request, f"guided_{name}"), f"guided_{name}") for name in GRAMMARS[:4]]
    for name, value in (request.structured_outputs or {}).items():
        if name in GRAMMARS:
            given.append((name, None if value is False else value, "structured_outputs"))
        elif value not in (None, False) and name != "disable_any_whitespace":  # there is none anyway
            message = f"structured_outputs.{name} is not supported: leave it out."
            raise ApiError(400, message, "unsupported_parameter", "structured_outputs")
    given = [each for each in given if each[1] is not None]
    if len(given) > 1:
        message = f"An answer matches one grammar, not {' and '.join(name for name, *_ in given)}: give one."
        raise ApiError(400, message, "invalid_value", given[0][2])
    if not given:
        return None
    [(name, value, param)] = given
    if name.startswith("json"):
        return json_grammar({"type": "object"} if name == "json_object" else value, param)
    if name == "choice":
        return choice_grammar(value, param)
    return bounded(Grammar("regex" if name == "regex" else "lark", value, param))
