"""Paths as clients write them, and the hints at others."""

import httpx
import pytest

from chat_page import SELF, WHO
from openai_client import ASKED, BEARER, HTTP, complete, openai_client, served, text, user
from ov_mllama.serving.app import create_app
from ov_mllama.serving.paths import canonical_path
from ov_mllama.serving.scheduler import Scheduler


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("//v1//models/", "/v1/models"),
        ("/models", "/v1/models"),
        ("/models/meta-llama/Llama/", "/v1/models/meta-llama/Llama"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("//chat/completions/", "/v1/chat/completions"),
        ("/api/chat//", "/api/chat"),
        ("/v1/api/tags", "/api/tags"),
        ("/health/", "/health"),
        ("/chat/", "/chat/"),
        ("/chat/gradio_api/file=//tmp/x/", "/chat/gradio_api/file=//tmp/x/"),
        ("/chatter/completions", "/chatter/completions"),
        ("/", "/"),
        ("//", "//"),
        ("", ""),
    ],
)
def test_canonical_path_changes_paths_of_the_apis_only(given, expected):
    assert canonical_path(given) == expected


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models", "/models", "//models", "/v1/v1/models"])
def test_models_are_listed_at_every_spelling(server, path):
    answer = HTTP.get(f"{server}{path}", headers=BEARER)
    assert answer.status_code == 200, answer.text
    assert [model["id"] for model in answer.json()["data"]] == ["demo"]
    assert HTTP.get(f"{server}{path}").status_code == 401


@pytest.mark.parametrize("path", ["/v1//chat/completions", "/chat/completions", "/v1/chat/completions/"])
def test_chat_completions_are_answered_at_every_spelling(server, path):
    answer = HTTP.post(f"{server}{path}", json=ASKED, headers=BEARER)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == SELF


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/demo", "/health", "/api/version"])
def test_head_is_answered_where_get_is(server, path):
    answer = HTTP.head(f"{server}{path}", headers=BEARER)
    assert answer.status_code == 200
    assert answer.content == b""


@pytest.mark.parametrize(
    ("method", "path", "advice"),
    [
        ("POST", "/v1/messages", "use POST /v1/chat/completions"),
        ("POST", "/v1/embeddings", "no embeddings"),
        ("POST", "/v1/audio/speech", "use another server"),
        ("GET", "/v1/else", "POST /v1/chat/completions"),
        ("GET", "/v1/chat/completions", "use POST"),
    ],
)
def test_unknown_path_names_the_way_that_works(server, method, path, advice):
    answer = HTTP.request(method, f"{server}{path}", headers=BEARER)
    assert answer.status_code in (404, 405)
    message = answer.json()["error"]["message"]
    assert message.startswith(f"{method} {path}: ")
    assert advice in message


def test_any_model_answers_to_every_name(slow_demo, processor):
    with served(create_app(Scheduler(slow_demo, processor), "demo", any_model=True)) as url:
        client = openai_client(url)
        completion = client.chat.completions.create(model="gpt-4o", messages=user(text(WHO)))
        assert (completion.model, completion.choices[0].message.content) == ("gpt-4o", SELF)
        answer = HTTP.post(f"{url}/v1/chat/completions", json={"messages": user(text(WHO))})
        assert answer.json()["model"] == "demo"
        assert client.models.retrieve("gpt-4o").id == "gpt-4o"
        assert [model.id for model in client.models.list()] == ["demo"]
        body = {"model": "llava", "prompt": WHO, "stream": False, "options": {"temperature": 0}}
        assert httpx.post(f"{url}/api/generate", json=body, timeout=60).json()["response"] == SELF


def test_missing_model_is_refused_with_the_name_served(client, server):
    answer = HTTP.post(f"{server}/v1/chat/completions", json={"messages": user(text(WHO))}, headers=BEARER)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"
    assert "'demo'" in answer.json()["error"]["message"]
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF
