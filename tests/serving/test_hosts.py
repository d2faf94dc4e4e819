"""Hosts and headers: by which names the server may be reached, and what every response carries."""

import asyncio
import socket

import httpx
import pytest

from conftest import DEMO
from openai_client import (
    ASKED,
    BEARER,
    HTTP,
    is_openai_error,
    post,
    raises,
    served,
)
from ov_mllama.serving import guards
from ov_mllama.serving.app import create_app, mount_chat
from ov_mllama.serving.scheduler import Scheduler

SECRET = "sesame of the inside"


FOREIGN = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "notlocalhost", "localhost@evil.example", "127.1"),
    *("127.0.0.1.evil.example", "2130706433", "::1", "[::1", "[localhost]", "localhost:x", "localhost:80:80", "", "*"),
]
OWN = ["localhost", "LocalHost:9", "localhost.", "127.0.0.1", "127.3.2.1:80", "[::1]", "[::1]:80", "192.168.1.5:8000"]


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_host_is_refused(server, host):
    for path in ("/v1/models", "/health", "/nothing"):
        answer = HTTP.get(f"{server}{path}", headers={**BEARER, "Host": host})
        assert answer.status_code in (400, 403)
        if host:  # uvicorn itself may answer a request without one
            assert is_openai_error(answer)
    assert post(server, ASKED, headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", OWN)
def test_own_host_is_served(server, host):
    assert HTTP.get(f"{server}/v1/models", headers={**BEARER, "Host": host}).is_success


def test_two_hosts_are_refused(server):
    for hosts in ("Host: localhost\r\nHost: evil.example", "Host: evil.example\r\nHost: localhost", "X: none"):
        with socket.create_connection(("127.0.0.1", int(server.rpartition(":")[2]))) as client:
            client.sendall(f"GET /health HTTP/1.1\r\n{hosts}\r\n\r\n".encode())
            assert client.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("trusted", "host", "allowed"),
    [
        (["llm.example"], "llm.example", True),
        (["LLM.example."], "llm.EXAMPLE.:443", True),
        (["llm.example"], "evil.example", False),
        (["llm.example"], "a.llm.example", False),
        (["0.0.0.0"], "evil.example", False),  # noqa: S104
        (["::"], "evil.example", False),
        (["a.example", "b.example"], "b.example", True),
        (["*"], "evil.example", True),
    ],
)
def test_trusted_hosts_are_served(trusted, host, allowed):
    async def app(scope, receive, send):
        await guards.JSONResponse({})(scope, receive, send)

    async def ask():
        transport = httpx.ASGITransport(guards.TrustedHosts(app, trusted))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/", headers={"Host": host})

    assert asyncio.run(ask()).is_success == allowed


def test_mounted_chat_refuses_foreign_hosts_and_carries_the_security_headers(slow_demo, processor):
    app = mount_chat(create_app(Scheduler(slow_demo, processor), "demo"), slow_demo, processor, DEMO, None)
    with served(app) as url:
        for path in ("/chat/", "/chat/config"):
            answer = HTTP.get(f"{url}{path}", headers={"Host": "evil.example"})
            assert answer.status_code == 403
            answer = HTTP.get(f"{url}{path}")
            assert answer.is_success
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_errors_carry_the_security_headers(server, slow_demo, monkeypatch):
    monkeypatch.setattr(slow_demo, "begin", raises(RuntimeError(SECRET)))
    answers = [
        HTTP.get(f"{server}/health"),
        HTTP.get(f"{server}/nothing"),
        HTTP.get(f"{server}/v1/models"),
        HTTP.get(f"{server}/v1/models", headers={"Host": "evil.example"}),
        post(server, b"{"),
        post(server, ASKED),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 401, 403, 400, 500]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "referrer-policy" in answer.headers


def test_stream_is_not_cached(client, server):
    answer = post(server, {**ASKED, "stream": True})
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Content-Type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    ("host", "key", "listed", "said"),
    [
        ("127.0.0.1", None, False, []),
        ("localhost", None, False, []),
        ("::1", None, False, []),
        ("0.0.0.0", None, False, ["0.0.0.0"]),  # noqa: S104
        ("::", None, False, ["::"]),
        ("", None, False, ["can send requests"]),
        ("192.168.1.5", None, False, ["192.168.1.5"]),
        ("0.0.0.0", "k", False, []),  # noqa: S104
        ("127.0.0.1", "k", True, ["--key"]),
    ],
)
def test_open_doors_are_warned_of(host, key, listed, said):
    warned = guards.warnings_for(host, key, listed)
    assert len(warned) == len(said)
    assert all(words in sentence for words, sentence in zip(said, warned, strict=True))
