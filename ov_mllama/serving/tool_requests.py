"""Tools of a request, their choice, and the grammar of their calls."""

import json
from typing import Any

from ov_mllama.chat.schemas import closed
from ov_mllama.serving.grammars import Grammar, bounded, grammar_of
from ov_mllama.serving.protocol import ApiError, ChatCompletionRequest, brief

# as the chat template writes the calls of earlier turns
CALL_FORMAT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_PARAMETERS = {"type": "object", "properties": {}}


def tools_of(request: ChatCompletionRequest) -> tuple[list[dict[str, Any]], Grammar | None]:
    """Return the tools that the model may call, as for the chat template, and what the answer must match.

    Raises:
        ApiError: naming the field that is invalid or not supported.
    """
    choice, name = request.tool_choice or "auto", None
    if isinstance(choice, dict):
        name = (choice.get("function") or choice).get("name") if choice.get("type") == "function" else None
        if not isinstance(name, str):
            message = f"tool_choice is none, auto, required or a function, not {brief(choice)}."
            raise ApiError(400, message, "unsupported_parameter", "tool_choice")
    elif choice not in ("none", "auto", "required"):
        message = f"tool_choice is none, auto, required or a function, not {brief(choice)}."
        raise ApiError(400, message, "invalid_value", "tool_choice")
    tools = [checked(tool, f"tools[{i}]") for i, tool in enumerate(request.tools or [])]
    if choice == "none" or (choice == "auto" and not tools):
        return [], grammar_of(request)
    if choice == "auto":
        answer = grammar_of(request)
        if answer and answer.kind != "json":
            raise ApiError(400, f"Give tools or {answer.param}, not both.", "unsupported_parameter", answer.param)
        return tools, answer and call_grammar(tools, answer)
    chosen = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not chosen:
        message = f"tool_choice needs the tool {brief(name)} in tools." if name else "tool_choice needs tools."
        raise ApiError(400, message, "invalid_value", "tool_choice")
    return tools, call_grammar(chosen)


def checked(tool: dict[str, Any], param: str) -> dict[str, Any]:
    """Return a tool with the fields that the model is to see.

    Raises:
        ApiError: if it is none that the client runs.
    """
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        message = f"A tool is a function, not {brief(tool.get('type'))}: this server runs none itself."
        raise ApiError(400, message, "unsupported_parameter", param)
    parameters = function.get("parameters") or NO_PARAMETERS
    if not (isinstance(function.get("name"), str) and function["name"] and isinstance(parameters, dict)):
        message = "A function has a name, and parameters that are a JSON schema."
        raise ApiError(400, message, "invalid_value", f"{param}.function")
    shown = {name: function[name] for name in ("name", "description") if function.get(name)}
    return {"type": "function", "function": {**shown, "parameters": parameters}}


def call_grammar(tools: list[dict[str, Any]], answer: Grammar | None = None) -> Grammar:
    """Return the grammar of a call of one of several tools, or of an answer that matches a JSON schema instead."""
    rules, alternatives = [], []
    for i, tool in enumerate(tools):
        function = tool["function"]
        begin = json.dumps(f'{{"name": {json.dumps(function["name"])}, "parameters": ')
        schema = {**closed(function["parameters"]), "x-guidance": CALL_FORMAT}
        alternatives.append(f'{begin} parameters{i} "}}"')
        rules.append(f"parameters{i}: %json {json.dumps(schema)}")
    if answer:
        alternatives.append("answer")
        rules.append(f"answer: %json {json.dumps({**answer.source, 'x-guidance': {'whitespace_flexible': False}})}")
    return bounded(Grammar("lark", "\n".join([f"start: {' | '.join(alternatives)}", *rules]), "tools"))
