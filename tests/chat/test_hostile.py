"""A hostile client against the server with its chat: seeded random requests of many kinds, bounded in count and time,
on this machine only. After each batch the server is as before for everybody else."""

import base64
import contextlib
import gc
import io
import json
import random
import re
import secrets
import socket
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from gradio.utils import get_upload_folder
from PIL import Image
from platformdirs import user_data_path

from chat_page import SELF, WHO, Says, path_of
from conftest import DEMO, ROOT, demo_samples
from openai_client import KEY, served
from ov_mllama.serving.app import create_app, mount_chat
from ov_mllama.serving.scheduler import Scheduler

pytestmark = [pytest.mark.torture, pytest.mark.alone]  # it measures memory

GROWTH = 300_000_000  # bytes of memory that strangers may cost on the demo
SAMPLE = path_of(demo_samples()[0]).read_bytes()
BEARER = {"Authorization": f"Bearer {KEY}"}
JSON = "application/json"
# what uvicorn itself answers to bytes that are no request; they never reach the application
NO_REQUEST = b"Invalid HTTP request received."
EXCEPTION = re.compile(rb"\b[A-Z][A-Za-z]*(?:Error|Exception|Warning)\b")


# ---- The server and what strangers must not get --------------------------------------------------------------------


@dataclass
class Target:
    """The server under attack.

    Attributes:
        port: on this machine.
        functions: numbers of the chat's events.
        canaries: bytes that no stranger's response may hold.
        paths: files that no stranger may get.
        victim: session, conversation and picture of somebody else's page.
        cookies: of a stranger who has the key, and so may log in.
    """

    port: int
    functions: dict[int, str]
    canaries: list[bytes]
    paths: list[str]
    victim: dict[str, str]
    cookies: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def number(self, name: str) -> int:
        return next(number for number, known in self.functions.items() if known == name)


def logged_in(url: str) -> httpx.Client:
    client = httpx.Client(base_url=f"{url}/chat", timeout=60, follow_redirects=True)
    client.post("login", data={"username": "somebody", "password": KEY}).raise_for_status()
    client.get("").raise_for_status()
    return client


def call(client: httpx.Client, target: Target, name: str, *data, session: str):
    body = {"data": data, "fn_index": target.number(name), "session_hash": session}
    response = client.post("gradio_api/run/predict", json=body)
    response.raise_for_status()
    return response.json()["data"]


def victim(target: Target, question: str) -> dict[str, str]:
    """The page of somebody who has asked about a picture: its session, conversation and picture."""
    client, session = logged_in(target.url), secrets.token_hex(8)
    call(client, target, "open", "", session=session)
    upload = client.post("gradio_api/upload", files={"files": ("a.png", SAMPLE)}).json()[0]
    message = {"text": question, "files": [{"path": upload, "meta": {"_type": "gradio.FileData"}}]}
    call(client, target, "ask", message, "", 8, 0, 0.9, "high", None, None, None, "", session=session)
    deadline = time.monotonic() + 60
    while "Yes." not in (shown := json.dumps(call(client, target, "refresh", "", session=session))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert question in shown
    picture = re.search(r'"path": "([^"]+/pictures/[^"]+)"', shown)[1]
    return {"session": session, "chat": re.search(r"pictures/([0-9a-f]{32})/", picture)[1], "picture": picture}


@pytest.fixture(scope="module")
def target(slow_demo, processor, tmp_path_factory):
    """The server with its chat and a key; two canaries, a file and another person's conversation."""
    words = [secrets.token_hex(12) for _ in range(2)]
    canary = tmp_path_factory.mktemp("private") / "canary.txt"
    canary.write_text(words[0])
    # files beside the folders that are served, too
    beside = [
        canary,
        user_data_path("ov_mllama", appauthor=False) / "canary.txt",
        Path(f"{get_upload_folder()}-not") / "canary.txt",
    ]
    for path in beside:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words[0])
    app = create_app(Scheduler(slow_demo, processor, max_batch=4, max_queue=16), "demo", KEY, max_bytes=2_000_000)
    app = mount_chat(app, slow_demo, processor, DEMO, KEY)
    demo = next(route.app.get_blocks() for route in app.routes if getattr(route, "path", "") == "/chat")
    functions = {number: getattr(fn.fn, "__name__", "none") for number, fn in demo.fns.items()}
    says = Says()
    says.text = "Yes."
    with served(app) as url, pytest.MonkeyPatch.context() as patch:
        target = Target(int(url.rpartition(":")[2]), functions, [word.encode() for word in words], [], {})
        patch.setattr("ov_mllama.chat.answers.stream_words", says.words)
        target.victim = victim(target, f"What is {words[1]}?")
        target.canaries.append(Path(target.victim["picture"]).read_bytes()[-200:])
        target.paths = [
            *map(str, beside),
            target.victim["picture"],
            f"{beside[1].parent}/chat.sqlite3",
            "/etc/hostname",
        ]
        stranger = logged_in(url)
        target.cookies = "; ".join(f"{name}={value}" for name, value in stranger.cookies.items())
        yield target


# ---- Requests -------------------------------------------------------------------------------------------------------


class Forger:
    """Requests of a seeded random stranger, as bytes; each method is a kind."""

    def __init__(self, seed: int, target: Target):
        self.random, self.target = random.Random(seed), target  # noqa: S311

    def request(self, method: str, path: str, body: bytes = b"", headers: dict | None = None, known=True) -> bytes:
        """The bytes of a request of a stranger, who half of the time has the key and is logged in."""
        given = {"Host": f"127.0.0.1:{self.target.port}", "Connection": "close"}
        if known and self.random.random() < 0.7:
            given |= {**BEARER, "Cookie": self.target.cookies}
        if body or method == "POST":
            given["Content-Length"] = str(len(body))
        given |= headers or {}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body

    def ask(self, body, **headers) -> bytes:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", "/v1/chat/completions", content, {"Content-Type": JSON, **BEARER, **headers})

    def pick(self, *values):
        return self.random.choice(values)

    def path(self) -> str:
        return self.pick(*self.target.paths)

    # -- HTTP itself

    def raw(self) -> bytes:
        host = f"Host: 127.0.0.1:{self.target.port}\r\n"
        good = self.ask({"model": "demo", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2})
        head, _, body = good.partition(b"\r\n\r\n")
        start, auth = f"POST /v1/chat/completions HTTP/1.1\r\n{host}", f"Authorization: Bearer {KEY}\r\n"
        chunked = (
            f"{start}{auth}Content-Type: {JSON}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode()
        )
        return self.pick(
            good[: self.random.randrange(len(good))],  # cut anywhere
            re.sub(
                rb"Content-Length: \d+",
                b"Content-Length: "
                + self.pick(b"-1", b"1e3", b"99999999999999999999", b"0", b"4", b"0x10", b" 5 5", b"+7", b"\xff"),
                head,
            )
            + b"\r\n\r\n"
            + body,
            head + b"\r\nContent-Length: 3\r\n\r\n" + body,  # twice
            head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + body,  # both
            chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
            chunked
            + self.pick(b"zz\r\n", b"-1\r\n{}\r\n", b"ffffffffffffffff\r\n{}", b"5;" + b"x" * 9000 + b"\r\nabc"),
            chunked + b"1\r\n{\r\n" * 2000 + b"0\r\n\r\n",
            f"GET /health HTTP/1.1\r\n{host}X: {'y' * self.pick(70_000, 200_000)}\r\n\r\n".encode(),
            f"GET /health HTTP/1.1\r\n{host}{'A: b' + chr(13) + chr(10)}".encode() * 3000,
            f"GET /{'a' * self.pick(60_000, 200_000)} HTTP/1.1\r\n{host}\r\n".encode(),
            f"{self.pick('GET', 'BREW', 'TRACE', 'CONNECT', 'PUT', 'DELETE', 'OPTIONS', 'HEAD')} /health HTTP/1.1\r\n"
            f"{host}Connection: close\r\n\r\n".encode(),
            b"GET /health HTTP/1.1\r\nHost: a\nb\r\n\r\n",
            b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self.random.randbytes(200),  # TLS
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x00" * 5000,
            self.random.randbytes(3000),
            f"GET /chat/gradio_api/queue/data HTTP/1.1\r\n{host}Upgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode(),
        )

    def headers(self) -> bytes:
        forged = {
            "Host": self.pick("evil.example", "localhost", "[::1]", "127.0.0.1@evil.example", "", "a" * 5000, "*"),
            "Authorization": self.pick(
                "Bearer", f"Basic {KEY}", "Bearer " + "k" * 5000, "bearer \u00e9", f"{KEY}", "\x01"
            ),
            "Content-Type": self.pick(
                "text/plain", "application/json; charset=utf-7", "multipart/form-data", "", "a/b/c"
            ),
            "Origin": self.pick("null", "http://evil.example", "http://localhost:1", "file://", "\u00e9"),
            "Cookie": self.pick(
                "ov_mllama=" + "0" * 64,
                "ov_mllama=user:somebody",
                "ov_mllama=../../x; ov_mllama_framed=[]",
                f"{self.target.cookies}; ov_mllama={'a' * 64}",
                "=" * 1000,
                "\xff=\xfe",
            ),
            "X-Forwarded-Host": self.pick("evil.example", "a/../b", "\u00e9", '"><script>'),
            "X-Forwarded-Proto": self.pick("https", "javascript", "https,http"),
            "X-Forwarded-For": "127.0.0.1",
            "Referer": "http://evil.example/" + "x" * 2000,
            "Accept-Encoding": self.pick("gzip, br;q=x", "identity;q=0", "br"),
            "Range": self.pick("bytes=0-", "bytes=-1", "bytes=9-1", "bytes=" + "0-1," * 500, "x"),
            "If-None-Match": "*",
        }
        names = self.random.sample(sorted(forged), self.random.randrange(1, 5))
        chosen = {name: forged[name] for name in names}
        if self.random.random() < 0.5:
            body = {"model": "demo", "messages": [{"role": "user", "content": "?"}], "max_tokens": 2}
            return self.ask(body, **chosen)
        path = self.pick("/health", "/v1/models", "/v1/models/demo", "/chat/", "/chat/config", "/docs", "/openapi.json")
        return self.request(self.pick("GET", "HEAD", "OPTIONS"), path, headers=chosen)

    # -- Questions

    def value(self, depth=0):
        """Any JSON, and what some programs take for it."""
        simple = [
            None,
            True,
            -1,
            0,
            1,
            2**31,
            2**63,
            10**400,
            1e308,
            float("nan"),
            float("inf"),
            "",
            "x" * 3000,
            "\ud800",
            "\x00",
            "<|image|>",
            "<|eot_id|>" * 50,
            "../../etc/passwd",
            "{{ 7*7 }}",
            "%s%n",
            [],
            {},
            "\u202e" * 40,
        ]
        if depth < 2 and self.random.random() < 0.3:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        if depth < 2 and self.random.random() < 0.3:
            return {self.pick("type", "text", "url", "role", "\ud800", "$ref"): self.value(depth + 1)}
        return self.pick(*simple)

    def body(self) -> bytes:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 2}
        nested = self.random.randrange(10, 20_000)
        whole = self.pick(
            b"[" * nested,
            b'{"a":' * nested + b"1" + b"}" * nested,
            b"\xff\xfe" + self.random.randbytes(50),
            b"",
            b"null",
            b'{"model":"demo","messages":' + b"[" * nested + b"]" * nested + b"}",
            b"{}" * 1000,
            b'{"model":"demo","messages":[' + b"{}," * nested + b"{}]}",
            b'{"model":"demo","max_tokens":' + b"9" * nested + b',"messages":[{"role":"user","content":"?"}]}',
        )
        if self.random.random() < 0.2:
            return self.ask(whole)
        if self.random.random() < 0.3:
            body["stop"] = self.pick("x" * 400_000, "x" * 201, ["y" * 201], ["z"] * 1000, [""], ["\ud800"], [1])
            return self.ask(body)
        field = self.pick(
            "model",
            "messages",
            "max_tokens",
            "temperature",
            "top_p",
            "seed",
            "stop",
            "n",
            "stream",
            "stream_options",
            "response_format",
            "guided_json",
            "tools",
            "logit_bias",
            "chat_template",
            "user",
            "\ud800",
        )
        body[field] = self.pick(self.value(), self.schema()) if "format" in field or "guided" in field else self.value()
        if self.random.random() < 0.2:
            body["messages"] = [{"role": self.pick("user", "system", "tool", "assistant"), "content": self.value()}] * 3
        if self.random.random() < 0.1:
            body["messages"] = [{"role": "user", "content": "long " * 300_000}]
        return self.ask(body)

    def schema(self) -> dict:
        pattern = self.pick("(a+)+$", "a{1,100000}", "(", "(?=x)y", "[\\s\\S]{0,99999}")
        schema = self.pick(
            {"$ref": "#"},
            {"$ref": "file:///etc/passwd"},
            {"$ref": f"{self.target.url}/health"},
            {"pattern": pattern},
            {"type": "string", "pattern": pattern},
            {"enum": ["x" * 100] * 2000},
            {"minItems": 10**9, "type": "array"},
            {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}},
            {"type": self.value()},
            {"anyOf": [{"$ref": "#"}] * 50},
            {"maxLength": 10**30, "type": "string"},
        )
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    def image(self) -> bytes:
        def made(size, form, **options) -> bytes:
            file = io.BytesIO()
            Image.new(options.pop("mode", "L"), size).save(file, form, **options)
            return file.getvalue()

        data = self.pick(
            SAMPLE[: self.random.randrange(len(SAMPLE))],
            bytes(b ^ (self.random.random() < 0.01) * 255 for b in SAMPLE),
            made((12_000, 12_000), "PNG", mode="1"),
            made((1, 60_000), "PNG"),
            made((1, 1), "GIF"),
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
            b"GIF89a",
            b"BM" + b"\xff" * 60,
            b"II*\x00" + b"\xff" * 60,
            b"P5 99999 99999 255\n",
            b"<html>",
            b"\x00" * 1000,
        )
        encoded = base64.b64encode(data).decode()
        path = self.path()
        url = self.pick(
            f"data:image/png;base64,{encoded}",
            f"data:image/svg+xml;base64,{encoded}",
            f"data:;base64,{encoded}",
            f"data:image/png;base64,{urllib.parse.quote(encoded)}",
            f"data:image/png,{encoded}",
            "data:",
            "data:image/png;base64,",
            "data:image/png;base64,\u00e9",
            "data:image/png" + ";a=b" * 5000 + ";base64,AAAA",
            path,
            f"file://{path}",
            f"{self.target.url}/health",
            "http://169.254.169.254/",
            "ftp://127.0.0.1/",
            "gopher://x",
            encoded,
            None,
            7,
            [],
            {},
        )
        image = self.pick({"url": url}, {"url": url, "detail": self.value()}, url)
        content = [{"type": "image_url", "image_url": image}] * self.pick(1, 1, 20) + [{"type": "text", "text": "?"}]
        return self.ask({"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 2})

    # -- The chat

    def file(self) -> bytes:
        path = self.path()
        dots = self.pick("../" * 9, "..%2f" * 9, "%2e%2e/" * 9, "..\\" * 5, "%252e%252e%252f" * 5, "/./", "//", "")
        name = self.pick(
            path,
            path.lstrip("/"),
            urllib.parse.quote(path, ""),
            f"{get_upload_folder()}/{dots}{path}",
            f"{dots}{path}",
            f"{path}%00.png",
            f"{path}%0a",
            f"/proc/self/root{path}",
            f"/proc/self/cwd/{dots}{path}",
            f"file://{path}",
            f"{path}/",
            f"/dev/fd/{dots}",
            f"{ROOT}/demo_model/../{dots}{path}",
            f"{self.target.url}/chat/",
            "http://127.0.0.1:1/",
            "~/x",
            "",
        )
        way = self.pick(
            "/chat/gradio_api/file=",
            "/chat/gradio_api/file/",
            "/chat/file=",
            "/chat/static/",
            "/chat/assets/",
            "/chat/svelte/",
            "/chat/gradio_api/proxy=",
            "/chat//gradio_api/file=",
            "/chat/gradio_api/file%3d",
            "/gradio_api/file=",
            "/chat/gradio_api/custom_component/x/client/component/",
            "/chat/gradio_api/deep_link?session_hash=",
            "/",
            f"/chat/gradio_api/stream/{self.target.victim['session']}/0/0/",
            "/v1/models/",
        )
        if self.random.random() < 0.4:  # the straight way
            way, name = self.pick("/chat/gradio_api/file=", "/chat/gradio_api/file/"), self.pick(path, name)
        path = (way + name).replace(" ", "%20").replace("\r", "").replace("\n", "")
        headers = self.pick({}, {"Range": "bytes=0-5"}, {"X-Original-URL": path})
        return self.request(self.pick("GET", "GET", "HEAD", "POST"), path, headers=headers)

    def upload(self) -> bytes:
        name = self.pick(
            "evil.html",
            "a.svg",
            "a.xml",
            "a.js",
            "../../../x.html",
            self.path(),
            "a" * 3000 + ".html",
            "a\x01b.png",
            ".htaccess",
            "CON",
            "a.png/../../b",
            "\u202egnp.exe",
            '"; filename="b',
            "",
            ".",
            "..",
            "a%2f..%2fb",
            "a\\..\\b",
        )
        content = self.pick(b"<script>alert(1)</script>", b"<svg onload=alert(1)>", SAMPLE, b"", b"x" * 50_000)
        bound = self.pick("b", "b" * 60)
        parts = (
            self.pick(1, 1, 40)
            * (
                f'--{bound}\r\nContent-Disposition: form-data; name="{self.pick("files", "x")}"; filename="{name}"\r\n'
                f"Content-Type: text/html\r\n\r\n"
            ).encode("utf-8", "replace")
            + content
        )
        body = parts + self.pick(f"\r\n--{bound}--\r\n".encode(), b"", b"\r\n--")
        way = self.pick("upload", "upload?upload_id=x", "process_recording", "component_server")
        return self.request(
            "POST", f"/chat/gradio_api/{way}", body, {"Content-Type": f"multipart/form-data; boundary={bound}"}
        )

    def event(self) -> bytes:
        """A forged event of one of the page's functions."""
        victim, path = self.target.victim, self.path()
        number = self.pick(*self.target.functions, -1, 10**9)
        named = self.target.functions.get(number)
        file = self.pick(path, {"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}, {"url": path})
        message = self.pick({"text": "hi", "files": [file]}, {"text": self.value(), "files": self.value()}, file, None)
        data: list = {
            "ask": [message, "", 8, 0, 0.9, "high", None, None, None, ""],
            "api_chat": [message, "", 8, 0, 0.9, "low"],
            "on_typing": [message, "high"],
            "poll": ["opened", victim["chat"], ""],
            "reopen": [victim["chat"]],
            "open": [self.value()],
            "delete": ["yes"],
            "delete_selected": [[victim["chat"], self.value()], "yes"],
            "search": [self.pick(self.value(), "x" * 1_000_000, '"')],
            "import_chat": [file],
            "flip": [self.pick("0 1", "0 -1", "999999 1")],
            "refresh": [""],
            "choose": ["opened", "", 8, 0, 0.9, "high", None, None, None, ""],
        }.get(named, [])
        if self.random.random() < 0.3:
            data = [self.value() for _ in range(self.random.randrange(7))]
        body = {
            "data": data,
            "fn_index": number,
            "session_hash": self.pick(victim["session"], secrets.token_hex(8), self.value()),
            "event_data": self.pick(None, {"index": 0, "value": {"text": "hi", "files": [file]}}, self.value()),
            "trigger_id": self.value(),
            "event_id": self.value(),
            "simple_format": True,
            "batched": self.pick(False, True),
        }
        body = {name: body[name] for name in (*list(body)[:4], *self.random.sample(list(body)[4:], 1))}
        way = self.pick(
            "run/predict", "run/predict", "api/predict", "queue/join", "run/chat", "call/chat", "call/v2/chat"
        )
        query = self.pick("", f"?chat={victim['chat']}", "?__theme=x&chat=%00")
        return self.request("POST", f"/chat/gradio_api/{way}{query}", json.dumps(body).encode(), {"Content-Type": JSON})

    def route(self) -> bytes:
        """Another of Gradio's routes, about somebody else's session."""
        victim = self.target.victim
        session, number = victim["session"], self.pick(*self.target.functions)
        if self.random.random() < 0.3:
            body = {
                "session_hash": session,
                "fn_index": number,
                "event_id": "x",
                "component_id": number,
                "fn_name": "preprocess",
                "data": self.path(),
                "prompt": "x",
                "code": "import os",
            }
            way = self.pick(
                "cancel",
                "reset",
                "component_server",
                "stream/x",
                "stream/x/close",
                "vibe-edit",
                "vibe-code",
                "run-history/connect",
                "process_recording",
                "undo-vibe-edit",
            )
            return self.request("POST", f"/chat/gradio_api/{way}", json.dumps(body).encode(), {"Content-Type": JSON})
        way = self.pick(
            f"gradio_api/queue/data?session_hash={session}",
            f"gradio_api/call/chat/{session}",
            f"gradio_api/heartbeat/{session}",
            f"gradio_api/deep_link?session_hash={session}",
            f"?deep_link=../../{self.path()}",
            f"?chat={victim['chat']}",
            "gradio_api/info",
            "gradio_api/openapi.json",
            "config",
            "gradio_api/startup-events",
            "gradio_api/queue/status",
            "gradio_api/upload_progress?upload_id=x",
            "gradio_api/token",
            "gradio_api/app_id",
            "gradio_api/dev/reload",
            "theme.css",
            "monitoring",
            "monitoring/summary",
            "monitoring/x",
            "manifest.json",
            "pwa_icon/9999999",
            "robots.txt",
            "gradio_api/runs",
            "gradio_api/vibe-code",
            "gradio_api/login_check",
            "logout",
            f"gradio_api/stream/{session}/0/1/playlist.m3u8",
            f"gradio_api/stream/{session}/0/1/playlist-file",
            "gradio_api/profiling/traces",
            "gradio_api/run-history/buckets",
        )
        return self.request("GET", f"/chat/{way}", known=way != "logout")


KINDS = ("raw", "headers", "body", "image", "file", "upload", "event", "route")


# ---- Answers --------------------------------------------------------------------------------------------------------


def sent(port: int, kind: str, request: bytes) -> bytes:
    """Bytes that a server sends until it closes the connection, or for some seconds. Some requests arrive slowly."""
    endless = kind == "raw" or any(way in request for way in (b"/heartbeat/", b"/queue/data", b"/call/"))
    wait_s, slow = 1 if endless else 30, len(request) % 16 == 0
    received, deadline = b"", time.monotonic() + wait_s
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=wait_s) as client:
        with contextlib.suppress(OSError):  # it may have answered, and closed, before it has read all
            for start in range(0, 200, 20) if slow else ():
                client.sendall(request[start : start + 20])
                time.sleep(0.02)
            client.sendall(request[200 if slow else 0 :])
            if kind == "raw":  # whose client has gone then
                client.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0 and len(received) < 3_000_000:
            client.settimeout(left)
            piece = client.recv(1 << 16)
            if not piece:
                break
            received += piece
    return received


def wrong_with(target: Target, request: bytes, response: bytes) -> list[str]:
    """Promises that a response breaks; none if there is no response."""
    head, _, body = response.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return ["no HTTP"] if head else []
    status, wrong = int(head[9:12]), []
    wrong += ["shows a canary"] * any(word in response for word in target.canaries)
    if body != NO_REQUEST and b"Upgrade: websocket" not in request:
        policies = (b"x-content-type-options: nosniff", b"content-security-policy: ")
        wrong += [f"lacks {policy.decode()}" for policy in policies if policy not in head.lower()]
    if status < 400:
        asked_chat, host = request.split(b" ", 2)[1].startswith(b"/chat"), b"\r\nHost: evil.example\r\n"
        wrong += ["to a foreign host"] * (host in request)
        wrong += ["to a foreign origin"] * (asked_chat and b"\r\nOrigin: " in request)
        wrong += ["to an endless stop"] * bool(re.search(rb'"stop": \[?"[xy]{201}', request))
    if status >= 400:
        inner = [b"Traceback", sys.prefix.encode(), str(ROOT).encode(), *EXCEPTION.findall(body)]
        wrong += [f"tells {text.decode()}" for text in inner if text in body and text not in request]
    if status >= 500:
        with contextlib.suppress(ValueError):
            said = json.loads(body)
            error = said.get("error") if isinstance(said, dict) else said
            plain = error is None or isinstance(error, dict) or said.get("title") == "Error"
            wrong += [] if plain else [f"tells {error}"]
    return [f"{status} {each}" for each in wrong]


def assert_as_before(target: Target, began: int) -> None:
    """Everybody else is served as before."""
    assert httpx.get(f"{target.url}/health", timeout=120).json() == {"status": "ok"}
    body = {"model": "demo", "messages": [{"role": "user", "content": WHO}]}
    answer = httpx.post(f"{target.url}/v1/chat/completions", json=body, headers=BEARER, timeout=300)
    assert answer.json()["choices"][0]["message"]["content"] == SELF
    gc.collect()
    assert psutil.Process().memory_info().rss - began < GROWTH


# ---- Tests ----------------------------------------------------------------------------------------------------------


def test_hostile_client_gets_and_breaks_nothing(target, times, tally):
    assert_as_before(target, psutil.Process().memory_info().rss)
    began, tried, wrong = psutil.Process().memory_info().rss, 0, []
    for seed in range(times(2, 40)):
        forger = Forger(seed, target)
        requests = [(kind, getattr(forger, kind)()) for kind in KINDS for _ in range(10)]
        with ThreadPoolExecutor(8) as threads:
            responses = [*threads.map(lambda case: sent(target.port, *case), requests)]
        assert sum(map(bool, responses)) > len(requests) * 0.7
        wrong += [
            (seed, kind, promise, request[:300], response[:300])
            for (kind, request), response in zip(requests, responses, strict=True)
            for promise in wrong_with(target, request, response)
        ]
        tried += len(requests)
        assert_as_before(target, began)
    tally("hostile requests", tried, wrong)
