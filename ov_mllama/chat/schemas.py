"""JSON schemas of answers, as a user or a request gives them."""

import contextlib
import json
import re
from typing import Any

from ov_mllama.runtime.errors import InputError

MAX_SCHEMA_CHARS = 100_000
FIELD_TYPES: dict[str, dict] = {
    "text": {"type": "string"},
    "number": {"type": "number"},
    "integer": {"type": "integer"},
    "yes/no": {"type": "boolean"},
    "list": {"type": "array", "items": {"type": "string"}},
}


def parse_schema(schema: dict | str) -> dict:
    """Return a JSON schema of bounded length, `closed`; a text is parsed.

    Raises:
        InputError: if it is no JSON object or too long.
    """
    try:
        if isinstance(schema, str):
            schema = json.loads(schema[: MAX_SCHEMA_CHARS + 1])
        length = len(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise InputError("The schema is not valid JSON.") from error
    if not isinstance(schema, dict) or length > MAX_SCHEMA_CHARS:
        raise InputError(f"A schema is a JSON object of at most {MAX_SCHEMA_CHARS} characters.")
    return closed(schema)


def schema_of(text: str) -> dict | None:
    """Return the schema of a user's text: a JSON schema, or names of fields with their types, such as "title, year:
    integer"; None for an empty text.

    Raises:
        InputError: if it is neither.
    """
    if not text.strip():
        return None
    if text.lstrip().startswith(("{", "[")):
        return parse_schema(text)
    properties = {}
    for field in filter(str.strip, re.split("[,\n]", text)):
        name, _, kind = (part.strip() for part in field.partition(":"))
        if not name or (kind or "text") not in FIELD_TYPES:
            known = ", ".join(FIELD_TYPES)
            raise InputError(f"{field.strip()[:60]!r} is no field: write NAME or NAME: TYPE, with one of {known}.")
        properties[name] = FIELD_TYPES[kind or "text"]
    return parse_schema({"type": "object", "properties": properties, "required": [*properties]})


def closed(schema: Any) -> Any:
    """Return a JSON schema whose objects have only the properties that it names, unless it says otherwise. Ollama reads
    schemas so, and pydantic's rely on it; by the standard other properties are allowed, which some models add without
    end. What matches the result matches the schema."""
    if not isinstance(schema, dict) or "allOf" in schema:  # whose parts would exclude each other's properties
        return schema
    result: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("properties", "$defs", "definitions") and isinstance(value, dict):
            result[keyword] = {name: closed(each) for name, each in value.items()}
        elif keyword in ("anyOf", "oneOf", "prefixItems") and isinstance(value, list):
            result[keyword] = [closed(each) for each in value]
        else:
            result[keyword] = closed(value) if keyword == "items" else value
    named, required = result.get("properties"), result.get("required", [])
    if not isinstance(named, dict) or not isinstance(required, list) or any(each not in [*named] for each in required):
        return result
    return {"additionalProperties": False, **result}


def as_code_block(text: str) -> str:
    """Return an answer in JSON as a Markdown code block, indented if it is complete."""
    with contextlib.suppress(ValueError, RecursionError):  # cut at the token limit
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False, allow_nan=False)
    return f"```json\n{text}\n```"
