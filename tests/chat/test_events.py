"""Events of a page that no page sends, origins that may send none, and routes that are closed."""

import re

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI

from chat_client import (
    SETTINGS,
    Client,
    png,
)
from chat_page import wait_until
from conftest import DEMO
from gradio_helper import ChatPage
from openai_client import served
from ov_mllama.serving.app import mount_chat


@pytest.mark.parametrize("index", ["0", -1, 7, [], [9], {}, None, [["x"]], True], ids=repr)
def test_edit_event_of_no_question_changes_nothing(demo, url, says, index):
    says.text = "Yes."
    client = Client(demo, url).open()
    client.call("ask", {"text": "First", "files": []}, *SETTINGS)
    wait_until(lambda: "Yes." in client.shown())
    client.call("edit", *SETTINGS, event={"index": index, "value": "Other", "previous_value": "First"})
    client.call("edit", *SETTINGS, event={"index": 0, "value": {"path": "/etc/hostname"}, "previous_value": ""})
    shown = client.shown()
    assert "First" in shown
    assert "Other" not in shown
    assert "hostname" not in shown


@pytest.mark.parametrize(
    "wishes",
    [
        ["x" * 10**6, 8, 0, 0.9, "high", *SETTINGS[5:]],
        ["", "many", 0, 0.9, "high", *SETTINGS[5:]],
        ["", 10**9, 0, 0.9, "high", *SETTINGS[5:]],
        ["", 8, -1, 0.9, "high", *SETTINGS[5:]],
        ["", 8, 0, 7, "high", *SETTINGS[5:]],
        ["", 8, 0, 0.9, "highest", *SETTINGS[5:]],
        ["", 8, 0, 0.9, "high", 0, None, None, ""],
        ["", 8, 0, 0.9, "high", None, None, None, "{"],
        [None] * 9,
    ],
)
def test_settings_out_of_bounds_are_refused(demo, url, says, wishes):
    says.text = "Yes."
    client = Client(demo, url).open()
    assert client.call("ask", {"text": "hi", "files": []}, *wishes) is None
    assert '"hi"' not in client.shown()


def test_texts_without_end_are_refused(demo, url, says):
    client = Client(demo, url).open()
    assert client.call("ask", {"text": "word " * 200_000, "files": []}, *SETTINGS[:5]) is None
    assert client.call("api_chat", {"text": "word " * 200_000, "files": []}, *SETTINGS[:5]) is None
    says.text = "Yes."
    client.call("ask", {"text": "hi", "files": []}, *SETTINGS)
    wait_until(lambda: "Yes." in client.shown())
    assert client.call("rename", "n" * 10_000, "") is None
    assert "nnnnn" not in client.shown()


ORIGINS = [
    "http://localhost:1",
    "http://127.0.0.1:9999",
    "https://evil.example",
    "null",
    "http://[::1]:7860",
    "file://",
]


STATES = [
    ("gradio_api/upload", {"files": {"files": ("a.png", b"x")}}),
    ("gradio_api/run/predict", {"json": {"data": [], "fn_index": 0, "session_hash": "s"}}),
    ("gradio_api/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "s"}}),
    ("gradio_api/cancel", {"json": {"fn_index": 0, "session_hash": "s", "event_id": "e"}}),
    ("gradio_api/call/chat", {"json": {"data": []}}),
    ("login", {"data": {"username": "a", "password": "b"}}),
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_page_of_another_origin_asks_nothing_in_its_readers_name(demo, url, origin):
    """Cookies know no ports: another user's page on this machine is the same site, and its requests have them."""
    client = Client(demo, url)
    client.http.follow_redirects = False
    for path, body in STATES:
        for headers in ({"Origin": origin}, {"Origin": origin, "Sec-Fetch-Site": "same-site"}):
            assert client.http.post(path, headers=headers, **body).status_code == 403, path
        assert client.http.post(path, headers={"Sec-Fetch-Site": "cross-site"}, **body).status_code == 403
    for path in ("config", "gradio_api/token", "gradio_api/queue/data?session_hash=s"):
        answer = client.http.get(path, headers={"Origin": origin})
        assert (answer.status_code, answer.text) == (403, "Cross-origin requests are rejected.")


def test_page_itself_and_programs_may_ask(demo, url):
    client, own = Client(demo, url), url.rstrip("/")
    behind_proxy = {"Origin": "https://hub.example", "Sec-Fetch-Site": "same-origin"}  # which tells another Host
    forwarded = {"Origin": "http://hub.example", "X-Forwarded-Host": "hub.example"}
    for headers in ({}, {"Origin": own}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}, behind_proxy, forwarded):
        assert client.http.post("gradio_api/upload", files={"files": ("a.png", b"x")}, headers=headers).is_success
    for site in ("cross-site", "none"):  # a link to the page, and its address typed
        assert client.http.get("", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}).is_success


UNUSED = [
    *("gradio_api/deep_link", "gradio_api/proxy=https://a.hf.space/x", "gradio_api/component_server"),
    *("gradio_api/process_recording", "gradio_api/stream/a/0/0/playlist.m3u8", "gradio_api/stream/a/0/0/playlist-file"),
    *("gradio_api/stream/e", "gradio_api/stream/e/close", "gradio_api/dev/reload", "gradio_api/vibe-edit"),
    *("gradio_api/vibe-code/", "gradio_api/vibe-starter-queries", "gradio_api/undo-vibe-edit/", "gradio_api/vibe-code"),
    *("gradio_api/custom_component/x/client/component/x.js", "monitoring", "monitoring/summary", "monitoring/key"),
    *("gradio_api/run-history/buckets", "gradio_api/runs", "gradio_api/profiling/traces"),
]


@pytest.fixture(scope="module")
def client(demo, url):
    return Client(demo, url)


@pytest.mark.parametrize("path", UNUSED)
def test_routes_that_the_page_does_not_use_are_closed(client, path):
    assert client.http.get(path, timeout=3).status_code in (404, 405)
    assert client.http.post(path, json={"session_hash": "s", "component_id": 1, "fn_name": "x"}).status_code in (
        404,
        405,
    )


def test_every_response_has_the_policy(demo, url):
    client = Client(demo, url)
    upload = client.upload("a.png", png())
    for address in ("", "config", "theme.css", f"gradio_api/file={upload}", "gradio_api/file=/etc/hostname", "nowhere"):
        headers = client.http.get(address).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["img-src"] == "'self' data: blob:"
        assert policy["connect-src"] == policy["default-src"] == "'self'"
        assert not re.search(r"https?://(?!127\.0\.0\.1:|localhost:)|[\s]\*", headers["content-security-policy"])
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"


def test_mounted_page_tells_no_text_of_unexpected_errors(slow_demo, processor):

    app = mount_chat(FastAPI(), slow_demo, processor, DEMO, None)
    with served(app) as url:
        body = {"data": [], "fn_index": 0, "session_hash": "s"}
        answer = httpx.post(f"{url}/chat/gradio_api/run/predict", json=body)
        assert (answer.status_code, answer.json()) == (500, {"error": None})


@pytest.mark.parametrize(
    ("options", "warned"),
    [({}, False), ({"server_name": "0.0.0.0"}, True), ({"server_name": "0.0.0.0", "auth": ("a", "b")}, False)],  # noqa: S104
)
def test_page_that_others_reach_without_a_login_is_warned_of(options, warned, monkeypatch, recwarn):
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **given: given)
    monkeypatch.setattr(ChatPage, "app_kwargs", lambda self: {})
    ChatPage().launch(**options)
    assert any("auth=" in str(each.message) for each in recwarn) == warned
