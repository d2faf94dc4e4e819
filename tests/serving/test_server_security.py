"""The server among strangers: whom it answers, what it fetches, what it holds, and what ends it (nothing)."""

import asyncio
import base64
import contextlib
import io
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from transformers import AutoProcessor

from chat_page import SELF, WHO, path_of, wait_until
from conftest import DEMO, ROOT, demo_samples
from openai_client import KEY, about, alone, complete, picture, refusal, served, text, user
from ov_mllama.runtime.errors import OutOfMemoryError
from ov_mllama.runtime.images import open_picture
from ov_mllama.runtime.prompts import padded, prompt_inputs, prompts_about
from ov_mllama.serving import addresses, guards
from ov_mllama.serving.app import create_app, mount_chat
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.loading import Gate
from ov_mllama.serving.protocol import MAX_STOP_CHARS, NEUTRAL
from ov_mllama.serving.scheduler import Scheduler
from ov_mllama.serving.sequences import Detokenizer
from ov_mllama_helper import convert_mllama

pytestmark = pytest.mark.alone

SAMPLES = demo_samples()
SECRET = "sesame of the inside"
ASKED = {"model": "demo", "messages": user(text(WHO))}
BEARER = {"Authorization": f"Bearer {KEY}"}


def post(url: str, body, **options) -> httpx.Response:
    """A request without OpenAI's client."""
    headers = {**BEARER, "Content-Type": "application/json", **options.pop("headers", {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=60, **options)


def is_openai_error(answer: httpx.Response) -> bool:
    return set(answer.json()["error"]) == {"message", "type", "param", "code"}


# ---- Hosts ----------------------------------------------------------------------------------------------------------

FOREIGN = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "notlocalhost", "localhost@evil.example", "127.1"),
    *("127.0.0.1.evil.example", "2130706433", "::1", "[::1", "[localhost]", "localhost:x", "localhost:80:80", "", "*"),
]
OWN = ["localhost", "LocalHost:9", "localhost.", "127.0.0.1", "127.3.2.1:80", "[::1]", "[::1]:80", "192.168.1.5:8000"]


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_host_is_refused(server, host):
    for path in ("/v1/models", "/health", "/nothing"):
        answer = httpx.get(f"{server}{path}", headers={**BEARER, "Host": host})
        assert answer.status_code in (400, 403)
        if host:  # uvicorn itself may answer a request without one
            assert is_openai_error(answer)
    assert post(server, ASKED, headers={"Host": host}).status_code in (400, 403)


@pytest.mark.parametrize("host", OWN)
def test_own_host_is_served(server, host):
    assert httpx.get(f"{server}/v1/models", headers={**BEARER, "Host": host}).is_success


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
            answer = httpx.get(f"{url}{path}", headers={"Host": "evil.example"})
            assert answer.status_code == 403
            answer = httpx.get(f"{url}{path}")
            assert answer.is_success
            assert answer.headers["x-content-type-options"] == "nosniff"


def test_errors_carry_the_security_headers(server, slow_demo, monkeypatch):
    monkeypatch.setattr(slow_demo, "generate", raises(RuntimeError(SECRET)))
    answers = [
        httpx.get(f"{server}/health"),
        httpx.get(f"{server}/nothing"),
        httpx.get(f"{server}/v1/models"),
        httpx.get(f"{server}/v1/models", headers={"Host": "evil.example"}),
        post(server, b"{"),
        post(server, ASKED),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 401, 403, 400, 500]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "referrer-policy" in answer.headers


# ---- Keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER {KEY}", f"Bearer   {KEY}", f"bEaReR {KEY}"]
)
def test_bearer_is_taken_in_any_case(server, given):
    assert httpx.get(f"{server}/v1/models", headers={"Authorization": given}).is_success


@pytest.mark.parametrize(
    "given",
    [None, KEY, "", "Bearer", f"Basic {KEY}", f"Bearer{KEY}", f"Bearer Bearer {KEY}", f"Token {KEY}"],
)
def test_key_without_its_scheme_is_refused(server, given):
    answer = httpx.get(f"{server}/v1/models", headers={} if given is None else {"Authorization": given})
    assert answer.status_code == 401
    assert is_openai_error(answer)


def test_empty_key_matches_nothing():
    assert not guards.same("", "")
    for header in ("", "Bearer", "Bearer "):
        with pytest.raises(guards.ApiError):
            guards.check_key(header, "")
    guards.check_key("", None)


def test_key_beyond_ascii():
    guards.check_key(f"Bearer {'schlüssel'.encode().decode('latin-1')}", "schlüssel")


def test_key_is_read_from_option_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("OV_MLLAMA_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("from file\n", encoding="utf-8")
    assert guards.key_from(None, None) is None
    monkeypatch.setenv("OV_MLLAMA_KEY", "from environment")
    assert guards.key_from(None, None) == "from environment"
    assert guards.key_from(None, file) == "from file"
    assert guards.key_from("from option", None) == "from option"
    monkeypatch.setenv("OV_MLLAMA_KEY", " ")
    for key, path in ((None, None), ("", None), (None, tmp_path / "empty"), (None, tmp_path / "lines")):
        (tmp_path / "empty").write_text("\n", encoding="utf-8")
        (tmp_path / "lines").write_text("a\nb\n", encoding="utf-8")
        with pytest.raises(ValueError, match="no key"):
            guards.key_from(key, path)
    with pytest.raises(OSError, match="gone"):
        guards.key_from(None, tmp_path / "gone")


@pytest.mark.parametrize(
    ("host", "key", "listed", "said"),
    [
        ("127.0.0.1", None, False, []),
        ("localhost", None, False, []),
        ("::1", None, False, []),
        ("0.0.0.0", None, False, ["0.0.0.0"]),  # noqa: S104
        ("::", None, False, ["::"]),
        ("", None, False, ["may ask"]),
        ("192.168.1.5", None, False, ["192.168.1.5"]),
        ("0.0.0.0", "k", False, []),  # noqa: S104
        ("127.0.0.1", "k", True, ["--key"]),
    ],
)
def test_open_doors_are_warned_of(host, key, listed, said):
    warned = guards.warnings_for(host, key, listed)
    assert len(warned) == len(said)
    assert all(words in sentence for words, sentence in zip(said, warned, strict=True))


# ---- Addresses ------------------------------------------------------------------------------------------------------

PRIVATE = [
    *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),  # noqa: S104
    *("255.255.255.255", "198.18.0.1", "192.0.2.1", "240.0.0.1", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "ff02::1", "fec0::1", "2001:db8::1", "2001:0:1:2:3:4:80ff:fffe"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_address_is_not_public(address):
    assert not addresses.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_address_is_public(address):
    assert addresses.is_public(address)


@pytest.fixture
def web():
    """A web server with a picture on 127.0.0.1, whose other paths lead there: (its port, what it was asked)."""
    asked = []

    class Pages(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append((self.headers["Host"], self.path))
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(path_of(SAMPLES[0]).read_bytes())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()


@pytest.fixture
def fetching(slow_demo, processor):
    """OpenAI's client of a server that fetches pictures from addresses."""
    slow_demo.as_new()
    with served(create_app(Scheduler(slow_demo, processor), "demo", KEY, addresses=True)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def at(url: str) -> list[dict]:
    return user({"type": "image_url", "image_url": {"url": url}}, text(SAMPLES[0]["question"]))


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "[::1]", "0"],
)
def test_address_of_this_machine_is_not_fetched(fetching, web, host):
    port, asked = web
    assert refusal(fetching, at(f"http://{host}:{port}/x.png")).code == "invalid_image"
    assert not asked


@pytest.fixture
def public(monkeypatch):
    """Names of the internet: those of the dictionary that it gives, at addresses of this machine that count as public
    until a test says otherwise."""
    names = {}
    looked_up = []

    async def resolve(host):
        looked_up.append(host)
        found = names.get(host, [host])
        return found.pop(0) if found and isinstance(found[0], list) else found

    monkeypatch.setattr(addresses, "resolve", resolve)
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    names["looked up"] = looked_up
    return names


def test_address_of_the_internet_is_fetched(fetching, web, public):
    port, asked = web
    public["pictures.example"] = ["127.0.0.1"]
    completion = complete(fetching, at(f"http://pictures.example:{port}/x.png"))
    assert completion.choices[0].message.content == SAMPLES[0]["answer"]
    assert asked == [(f"pictures.example:{port}", "/x.png")]


def test_redirect_stays_with_the_name(fetching, web, public):
    port, asked = web
    public["pictures.example"] = ["127.0.0.1"]
    complete(fetching, at(f"http://pictures.example:{port}/to//x.png"))
    assert asked[-1] == (f"pictures.example:{port}", "/x.png")


@pytest.mark.parametrize("host", ["127.0.0.2", "metadata.internal", "10.0.0.1", "[::1]"])
@pytest.mark.parametrize("hops", [1, 2])
def test_redirect_into_a_private_network_is_not_followed(fetching, web, public, host, hops):
    port, asked = web
    public.update({"pictures.example": ["127.0.0.1"], "metadata.internal": ["169.254.169.254"]})
    url = f"http://{host}:{port}/x.png"
    for _ in range(hops):
        url = f"http://pictures.example:{port}/to/{url}"
    assert refusal(fetching, at(url)).code == "invalid_image"
    assert len(asked) == hops


def test_name_is_connected_to_where_it_was_checked(fetching, web, public):
    """Its second address, were it looked up again, would be private."""
    port, asked = web
    public["rebinds.example"] = [["127.0.0.1"], ["10.0.0.1"]]
    complete(fetching, at(f"http://rebinds.example:{port}/x.png"))
    assert public["looked up"] == ["rebinds.example"]


def test_name_with_a_private_address_among_others_is_not_fetched(fetching, web, public):
    public["mixed.example"] = ["127.0.0.1", "10.0.0.1"]
    refusal(fetching, at(f"http://mixed.example:{web[0]}/x.png"))
    assert not web[1]


def test_names_that_are_not_there_look_like_private_ones(fetching):
    said = [refusal(fetching, at(f"http://{host}/x")).body["message"] for host in ("localhost", "nowhere.invalid")]
    assert said[0].replace("localhost", "H") == said[1].replace("nowhere.invalid", "H")


def test_proxies_of_the_environment_are_not_asked(fetching, web, public, monkeypatch):
    """They would look the name up themselves."""
    port, asked = web
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    public["private.example"] = ["10.0.0.1"]
    with httpx.Client(trust_env=False) as direct:
        client = openai.OpenAI(base_url=fetching.base_url, api_key=KEY, max_retries=0, http_client=direct)
        refusal(client, at("http://private.example/x.png"))
    assert not asked


def test_too_many_addresses_are_not_fetched(fetching, web, public):
    parts = [{"type": "image_url", "image_url": f"http://127.0.0.1:{web[0]}/{i}.png"} for i in range(20)]
    assert refusal(fetching, user(*parts, text("?"))).code == "too_large"
    assert not web[1]


def test_certificate_is_checked_for_the_name(fetching, web, public, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make one")
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=a.example -addext subjectAltName=DNS:a.example"
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    subprocess.run([*made.split(), *files], check=True, capture_output=True)  # noqa: S603
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    names = []
    context.sni_callback = lambda connection, name, _: names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    public["a.example"] = ["127.0.0.1"]
    error = refusal(fetching, at(f"https://a.example:{server.server_port}/x.png"))
    server.shutdown()
    assert names == ["a.example"]
    assert "certificate" in error.body["message"]


def test_library_reaches_the_users_own_network(web):
    assert open_picture(f"http://127.0.0.1:{web[0]}/x.png").size == SAMPLES[0]["image"].size


# ---- Unexpected errors ----------------------------------------------------------------------------------------------


def raises(error: BaseException):
    """A function that fails."""

    def fail(*_, **__):
        raise error

    return fail


INSIDE = [
    "ov_mllama.serving.protocol.escape_special_tokens",
    "ov_mllama.serving.scheduler.prompt_text",
    "ov_mllama.serving.scheduler.prompt_inputs",
    "ov_mllama.serving.scheduler.padded",
]


@pytest.mark.parametrize("where", INSIDE)
@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), KeyError(SECRET), OSError(SECRET), UnicodeDecodeError("utf-8", b"", 0, 1, SECRET)]
)
def test_text_of_an_unexpected_error_stays_here(client, server, where, error, monkeypatch, caplog):
    monkeypatch.setattr(where, raises(error))
    for stream in (False, True):
        answer = post(server, {**ASKED, "stream": stream})
        assert answer.status_code == 500
        assert SECRET not in answer.text
        assert re.search("error ([0-9a-f]{8}) ", answer.json()["error"]["message"])[1] in caplog.text
    monkeypatch.undo()
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_text_of_an_error_amid_a_stream_stays_here(client, server, monkeypatch):
    from ov_mllama.serving.scheduler import PendingRequest

    async def broken(self):
        yield "Hello"
        raise KeyError(SECRET)

    monkeypatch.setattr(PendingRequest, "pieces", broken)
    answer = post(server, {**ASKED, "stream": True})
    assert answer.status_code == 200
    assert SECRET not in answer.text
    last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"


def test_connection_survives_an_unexpected_error(client, server, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.protocol.escape_special_tokens", raises(RuntimeError(SECRET)))
    with httpx.Client(headers=BEARER) as browser:
        kept = []
        for _ in range(3):
            answer = browser.post(f"{server}/v1/chat/completions", json=ASKED)
            kept.append(answer.extensions["network_stream"].get_extra_info("client_addr"))
            assert answer.status_code == 500
    assert len(set(kept)) == 1


# ---- Bounds ---------------------------------------------------------------------------------------------------------


class Counting:
    """The demo's tokenizer, and how many tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, []

    def decode(self, tokens, **options):
        self.decoded.append(len(tokens))
        return self.tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("stop", ["x" * 400_000, ["x" * (MAX_STOP_CHARS + 1)], ["a", "b" * 100_000], ["a"] * 5, [""]])
def test_long_stop_is_refused(client, stop):
    error = refusal(client, stop=stop)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == "stop"
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_stop_of_the_longest_length_is_taken(client):
    completion = complete(client, user(text(WHO)), stop=["x" * MAX_STOP_CHARS, SELF[10:], "y", "z"])
    assert completion.choices[0].message.content == SELF[:10]


def test_each_token_costs_the_same_at_any_length(processor):
    """The stops are the worst there are: all but their last letter comes again and again."""
    tokenizer = Counting(processor.tokenizer)
    words = Detokenizer(tokenizer, ["a" * (MAX_STOP_CHARS - 1) + letter for letter in "bcde"])
    [letter] = processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    said = "".join(words.put(letter) for _ in range(1000))
    assert len(words._held) < MAX_STOP_CHARS
    assert said + words.end() == "a" * 1000
    assert max(tokenizer.decoded) < 20


@pytest.mark.parametrize("said", ["é", "漢字", "🙂", "naïve 漢 🙂🙂 café", "a\ufffdb", "end�", "👩‍👩‍👧"])
@pytest.mark.parametrize("stop", [(), ("never",), ("é!",)])
def test_characters_of_several_tokens_come_whole(processor, said, stop):
    tokens = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    words = Detokenizer(processor.tokenizer, stop)
    pieces = [words.put(token) for token in tokens]
    assert "".join([*pieces, words.end()]) == said
    assert "\ufffd" in said or not any("\ufffd" in piece for piece in pieces)


def test_halves_of_characters_come_at_the_end_or_among_garbage(processor):
    first = processor.tokenizer("漢", add_special_tokens=False)["input_ids"][0]
    words = Detokenizer(processor.tokenizer)
    assert not words.put(first)
    assert words.end() == "\ufffd"
    counting = Counting(processor.tokenizer)
    words = Detokenizer(counting)
    assert set("".join([words.put(first) for _ in range(500)] + [words.end()])) == {"\ufffd"}
    assert max(counting.decoded) < 20


@pytest.mark.parametrize("cut", range(1, 7))
def test_stop_is_found_across_tokens(processor, cut):
    said = "One 漢🙂 and two"
    tokens = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    words = Detokenizer(processor.tokenizer, [said[cut:9]])
    assert "".join([words.put(token) for token in tokens] + [words.end()]) == said[:cut]
    assert words.stopped


def test_stream_of_characters_of_several_tokens(client, slow_demo, processor, monkeypatch):
    """The demo speaks ASCII: another's words are put into its mouth."""
    said = "Né à 漢字 🙂, naïve"
    tokens = [
        *processor.tokenizer(said, add_special_tokens=False)["input_ids"],
        slow_demo.generation_config.eos_token_id,
    ]
    tokens = np.hstack(tokens).tolist()
    monkeypatch.setattr(
        "ov_mllama.serving.sequences.Sequence.choose", lambda row, scores: tokens[len(row.words.tokens)]
    )
    chunks = [chunk.choices[0].delta.content or "" for chunk in complete(client, user(text("?")), stream=True)]
    assert "".join(chunks) == said
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert len(chunks) > 8
    assert complete(client, user(text("?"))).choices[0].message.content == said


LONG = {
    "text": user(text("word " * 20_000)),
    "texts": user(*[text("word " * 100)] * 200),
    "blanks": user(text(" " * 100_000)),
    "parts": user(*[text("")] * 5000),
    "messages": user(text("")) * 5000,
    "system": [{"role": "system", "content": "word " * 20_000}],
    "refusal": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no " * 50_000}]}, *user(text("?"))],
}


@pytest.mark.parametrize("kind", LONG)
def test_long_text_is_refused_before_it_is_tokenised(client, kind, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.scheduler.prompt_text", raises(AssertionError))
    monkeypatch.setattr("ov_mllama.serving.protocol.escape_special_tokens", raises(AssertionError))
    error = refusal(client, LONG[kind])
    assert isinstance(error, openai.BadRequestError)
    assert error.param == "messages"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":' + b"[" * 60_000,
        b'{"model":"demo","messages":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model":"demo","messages":[' + b"{}," * 300_000 + b"{}]}",
        b'{"model":"demo","messages":[{"role":"user","content":"?"}],"x":[' + b"0," * 500_000 + b"0]}",
        json.dumps({**ASKED, "max_tokens": 10**30}).encode(),
        json.dumps({**ASKED, "max_completion_tokens": 2**31}).encode(),
        json.dumps({**ASKED, "seed": 10**30}).encode(),
        json.dumps({**ASKED, "seed": -(10**30)}).encode(),
        json.dumps({**ASKED, "n": 10**30}).encode(),
        b'{"model":"demo","max_tokens":' + b"9" * 100_000 + b',"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","temperature":1e999,"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","temperature":NaN,"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","top_p":-Infinity,"messages":[{"role":"user","content":"?"}]}',
        b'{"model":"demo","messages":[{"role":"' + b"x" * 100_000 + b'","content":"?"}]}',
        b"\xff\xfe{}",
        b"null",
        b"",
    ],
    ids=range(18),
)
def test_hostile_body_is_refused_briefly(client, server, body):
    answer = post(server, body)
    assert answer.status_code == 400
    assert is_openai_error(answer)
    assert len(answer.content) < 2000
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


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
        "ov_mllama.serving.sequences.LLMatcher",
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

    monkeypatch.setattr("ov_mllama.serving.sequences.GrammarCompiler.matcher", slowly)
    with ThreadPoolExecutor(4) as pool:
        slow = [
            pool.submit(complete, client, user(text(WHO)), response_format={"type": "json_object"}) for _ in range(4)
        ]
        wait_until(lambda: most)
        assert complete(client, user(text(WHO))).choices[0].message.content == SELF
        compiling.set()
        assert all(each.result() for each in slow)
    assert max(most) == 1


# ---- The queue ------------------------------------------------------------------------------------------------------


def photograph(width: int, height: int, seed: int = 0, form: str = "JPEG", **options) -> bytes:
    """A picture that compresses as badly as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))
    noise = rng.integers(-12, 13, (height, width, 1), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(file, form, **options)
    return file.getvalue()


def encoded(data: bytes) -> dict:
    return {"type": "image_url", "image_url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}


def test_waiting_images_are_held_encoded(client, server, slow_demo, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "ov_mllama.serving.images.open_picture", lambda data: opened.append(len(data)) or open_picture(data)
    )
    slow_demo.step_s = 0.1
    data = photograph(1200, 800)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(complete, client, user(text(WHO)))
        wait_until(lambda: is_busy(slow_demo))
        others = [pool.submit(complete, client, user(encoded(data), text("?"))) for _ in range(4)]
        time.sleep(0.3)
        early = list(opened)
        first.result()
        assert all(each.result() for each in others)
    assert not early
    assert opened == [len(data)] * 4


def is_busy(model) -> bool:
    """Whether it answers."""
    if model.turn.acquire(blocking=False):
        model.turn.release()
        return False
    return True


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"no picture", "invalid_image"),
        (b"\xff\xd8\xff\xe0", "invalid_image"),
        (photograph(64, 64, form="PNG")[:20], "invalid_image"),
        (b"BM" + b"\0" * 60, "invalid_image"),
        (b"P6 20000 20000 255\n", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "invalid_image"),
    ],
)
def test_unreadable_header_is_refused_at_once(client, slow_demo, data, code, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.scheduler.prompt_text", raises(AssertionError))
    error = refusal(client, user(encoded(data), text("?")))
    assert isinstance(error, openai.BadRequestError)
    assert error.code == code
    assert error.param == "messages[0].content[0].image_url"


def test_image_broken_behind_its_header_fails_alone(client, slow_demo, processor):
    whole = photograph(300, 200)
    slow_demo.as_new(step_s=0.05)
    asked = [about(SAMPLES[0]), user(encoded(whole[: len(whole) // 2]), text("?")), about(SAMPLES[2])]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(complete, client, user(text(WHO)))
        wait_until(lambda: is_busy(slow_demo))
        one, broken, other = [pool.submit(complete, client, messages) for messages in asked]
        first.result()
        assert isinstance(broken.exception(), openai.BadRequestError)
        assert broken.exception().param == "messages[0].content[0].image_url"
        assert one.result().choices[0].message.content == SAMPLES[0]["answer"]
        assert other.result().choices[0].message.content == SAMPLES[2]["answer"]
    assert isinstance(refusal(client, asked[1]), openai.BadRequestError)  # and alone


def test_too_many_images_are_refused(client):
    tiny = encoded(photograph(16, 16))
    assert complete(client, user(*[tiny] * 16, text("?")), max_tokens=1)
    assert refusal(client, user(*[tiny] * 17, text("?"))).code == "too_large"


@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (60, 40)), (3, (60, 40)), (6, (40, 60)), (8, (40, 60)), (9, (60, 40))]
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_size_is_that_of_the_image_upright(form, orientation, size):
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, form, exif=exif)
    image = ImageFile.from_bytes(file.getvalue())
    assert (image.width, image.height) == image.decode(560).size
    if form in ("JPEG", "PNG", "WEBP"):
        assert (image.width, image.height) == size


@contextlib.contextmanager
def small_server(model, processor, **options):
    """A server of its own: its address, and its batches."""
    batches = Scheduler(model, processor, **options)
    with served(create_app(batches, "demo", KEY)) as url:
        yield url, batches


def test_full_queue_of_bytes_is_told_429(slow_demo, processor):
    slow_demo.as_new(step_s=0.2)
    data = photograph(800, 600)
    messages = {"model": "demo", "messages": user(encoded(data), text("?")), "max_tokens": 3}
    with small_server(slow_demo, processor, queue_bytes=4 * len(data)) as (url, batches), ThreadPoolExecutor(9) as pool:
        batches._took_s = 7.4
        answers = [each.result() for each in [pool.submit(post, url, messages) for _ in range(8)]]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert sum(answer.is_success for answer in answers) == 8 - len(refused) >= 2
        for answer in refused:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(answer.headers["Retry-After"]) >= 1
        assert not batches._places
        assert post(url, messages).is_success
        larger = {**messages, "messages": user(*[encoded(data)] * 5)}
        assert post(url, larger).status_code == 413


def test_bodies_under_way_count(slow_demo, processor):
    slow_demo.as_new()
    with small_server(slow_demo, processor, queue_bytes=1_000_000, line=3) as (url, batches):
        port = int(url.rpartition(":")[2])
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 900000\r\n\r\n"
        with contextlib.ExitStack() as stack:
            uploads = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3)]
            for upload in uploads[:2]:
                upload.sendall(head.encode() + b" " * 450_000)
            wait_until(lambda: sum(place.nbytes for place in batches._places) == 900_000)
            answer = post(url, {**ASKED, "user": "x" * 200_000})
            assert answer.status_code == 429
            assert "1 MB" in answer.json()["error"]["message"]
            assert post(url, ASKED).is_success
            uploads[2].sendall(head.encode())
            wait_until(lambda: len(batches._places) == 3)
            answer = post(url, ASKED)
            assert answer.status_code == 429
            assert "3 requests" in answer.json()["error"]["message"]
        wait_until(lambda: not batches._places)  # who leaves amid an upload leaves room
        assert post(url, ASKED).is_success


def test_upload_that_stalls_ends(slow_demo, processor, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.reading.BODY_S", 0.3)
    slow_demo.as_new()
    with small_server(slow_demo, processor) as (url, batches):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as upload:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            upload.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
            assert upload.recv(20).startswith(b"HTTP/1.1 408")
        wait_until(lambda: not batches._places)


def test_retry_after_is_the_time_of_a_batch(client, server, slow_demo, processor):
    slow_demo.as_new()
    with small_server(slow_demo, processor, line=1) as (_, batches):
        for took_s, said in ((7.4, "7"), (0.01, "1"), (900, "60")):
            batches._took_s = took_s
            place = batches.enter()
            with pytest.raises(guards.ApiError) as full:
                batches.enter()
            batches.leave(place)
            assert full.value.status == 429
            assert full.value.headers == {"Retry-After": said}
            assert f"in {said} s" in str(full.value)


def test_too_little_memory_says_when_to_come_again(client, server, slow_demo, monkeypatch):
    monkeypatch.setattr(slow_demo, "generate", raises(OutOfMemoryError("2 GB too little: close other programs.")))
    answer = post(server, ASKED)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "30"
    assert "2 GB too little" in answer.json()["error"]["message"]


def test_stream_is_not_cached(client, server):
    answer = post(server, {**ASKED, "stream": True})
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Content-Type"].startswith("text/event-stream")


def test_freed_memory_is_given_back_after_each_batch(client, monkeypatch):
    given = []
    monkeypatch.setattr("ov_mllama.serving.scheduler.trim_memory", lambda: given.append(1))
    for count in (1, 2):
        complete(client, user(text(WHO)))
        wait_until(lambda count=count: len(given) == count)


def anonymous(pid: int) -> float:
    """GB of a process's memory that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / 1e9


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return convert_mllama(DEMO, tmp_path_factory.mktemp("server") / "ov")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_32_waiting_photographs_of_12_megapixels_fit_into_memory(model_dir, tmp_path, record_property):
    """While one question is answered slowly 32 of them wait; then they are answered."""
    file = tmp_path / "program.py"
    file.write_text(SLOW_SERVER.format(model=str(model_dir)), encoding="utf-8")
    port = free_port()
    with program(file, port) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_up(server, url), 120)
        photographs = [photograph(4000, 3000, seed, quality=88) for seed in range(4)]
        assert all(3e6 < len(data) < 7e6 for data in photographs), [len(data) for data in photographs]
        bodies = [
            {
                "model": "demo",
                "messages": user(encoded(photographs[i % 4] + bytes(i)), text("What is it?")),
                "max_tokens": 2,
            }
            for i in range(32)
        ]
        before, used, over = anonymous(server.pid), [], threading.Event()

        def watch():
            while not over.wait(0.05):
                used.append(anonymous(server.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        with ThreadPoolExecutor(33) as pool:
            slow = pool.submit(httpx.post, f"{url}/v1/chat/completions", json={**ASKED, "max_tokens": 30}, timeout=300)
            time.sleep(1)
            answers = list(
                pool.map(lambda body: httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300), bodies)
            )
            assert slow.result().is_success
        over.set()
        watching.join()
        record_property("peak_gb", max(used))
        print(f"\nbefore {before:.2f} GB, at the peak {max(used):.2f} GB")  # shown with -s
        assert [answer.status_code for answer in answers] == [200] * 32
        assert max(used) < 1.5


SLOW_SERVER = """
import sys, time
sys.path[:0] = {path}
from ov_mllama.serving import app, load
def slowed(*given, **options):
    model, processor = load(*given, **options)
    step = model.language_model.infer
    model.language_model.infer = lambda *g: (time.sleep(1), step(*g))[1]
    return model, processor
app.load = slowed
app.main(["--model-dir", "{model}", "--name", "demo", *sys.argv[1:]])
""".replace("{path}", repr([str(ROOT), str(ROOT / "tests")]))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def program(file, port: int, *arguments):
    """A program that listens on a port."""
    command = [sys.executable, str(file), "--port", str(port), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.kill()


def is_up(process, url: str) -> bool:
    assert process.poll() is None, process.stdout.read()
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").is_success
    return False


# ---- The thread that answers ----------------------------------------------------------------------------------------

PLACES = [
    *(
        "ov_mllama.serving.scheduler.Scheduler._next",
        "ov_mllama.serving.scheduler.Scheduler._inputs",
        "ov_mllama.serving.sequences.Sequence.take",
    ),
    *(
        "ov_mllama.serving.scheduler.padded",
        "ov_mllama.serving.scheduler.Sampler",
        "ov_mllama.serving.scheduler.refusal_of",
        "ov_mllama.serving.sequences.Detokenizer.put",
    ),
    *("ov_mllama.serving.sequences.Sequence.choose", "ov_mllama.serving.scheduler.prompt_inputs"),
]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "error",
    [RuntimeError(SECRET), MemoryError(), SystemExit(1), KeyboardInterrupt(), RecursionError(), StopIteration()],
)
def test_no_error_ends_the_answering_thread(client, server, slow_demo, where, error, monkeypatch):
    with monkeypatch.context() as patched:
        if where.endswith("refusal_of"):
            patched.setattr(slow_demo, "generate", raises(RuntimeError()))
        patched.setattr(where, raises(error))
        if where.endswith("_next"):
            post(server, ASKED)  # whose thread has been within it before
        for stream in (False, True):
            answer = post(server, {**ASKED, "stream": stream})
            assert answer.status_code in (500, 503)
            assert is_openai_error(answer)
    assert httpx.get(f"{server}/health").is_success
    assert complete(client, user(text(WHO))).choices[0].message.content == SELF


def test_error_between_batches_is_of_the_first_that_waits_only(client, slow_demo, monkeypatch):
    failing = [1]
    most = Scheduler._most_tiles
    monkeypatch.setattr(Scheduler, "_most_tiles", lambda self: 1 / 0 if failing and failing.pop() else most(self))
    slow_demo.step_s = 0.1
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(complete, client, user(text(WHO))) for _ in range(3)]
        errors = [each.exception() for each in asked]
    assert sum(error is None for error in errors) >= 2


def test_error_of_all_kinds_in_a_batch_ends_its_requests(client, slow_demo, monkeypatch):
    """None of them waits for ever."""
    monkeypatch.setattr(slow_demo, "generate", raises(SystemExit(3)))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, client, user(text(WHO)), timeout=20) for _ in range(4)]
        assert all(isinstance(each.exception(), openai.InternalServerError) for each in asked)


def test_health_is_503_once_nothing_is_answered_any_more(slow_demo, processor, monkeypatch):
    slow_demo.as_new()
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with small_server(slow_demo, processor) as (url, batches):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        monkeypatch.setattr(Scheduler, "_work_once", raises(SystemExit("gone")))
        post(url, ASKED)  # by the thread that is still within `_work_once`
        answer = post(url, ASKED)
        assert answer.status_code == 503
        assert is_openai_error(answer)
        wait_until(lambda: not batches.alive)
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 503
        assert answer.json() == {"status": "failed"}


# ---- While the model is loaded --------------------------------------------------------------------------------------


def test_gate_is_503_until_it_is_opened(slow_demo, processor):
    slow_demo.as_new()
    gate = Gate()
    with served(gate) as url:
        answer = httpx.get(f"{url}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        assert int(answer.headers["Retry-After"]) > 0
        for answer in (post(url, ASKED), httpx.get(f"{url}/v1/models"), httpx.get(f"{url}/chat/")):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
            assert is_openai_error(answer)
            assert answer.headers["x-content-type-options"] == "nosniff"
        batches = Scheduler(slow_demo, processor)
        gate.open(create_app(batches, "demo", KEY))
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert post(url, ASKED).json()["choices"][0]["message"]["content"] == SELF
    assert not batches.alive  # closed with the server


def test_gate_tells_what_keeps_an_app_from_starting():
    @contextlib.asynccontextmanager
    async def lifespan(app):
        raise OSError("no disk")
        yield

    from fastapi import FastAPI

    gate = Gate()
    with served(gate) as url:
        with pytest.raises(OSError, match="no disk"):
            gate.open(FastAPI(lifespan=lifespan))
        assert httpx.get(f"{url}/health").status_code == 503


LOADING = """
import sys, time
sys.path.insert(0, {root!r})
from serving import app
from ov_mllama.cli import exit_on_user_error
from ov_mllama.runtime.errors import InputError, OutOfMemoryError
def load(*given, **options):
    time.sleep(4)
    {then}
app.load = load
app.prepare = lambda *given, **options: given[1]
app.files_to_load = lambda *given: (None, None)
app.print_load_estimate = lambda *given: None
with exit_on_user_error():
    app.main()
"""


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [
        ("raise InputError('The weights are of another model.')", 1, "❌ The weights are of another model."),
        ("raise OutOfMemoryError('2 GB too little.')", 1, "❌ 2 GB too little."),
        ("raise RuntimeError('strange')", 1, "RuntimeError: strange"),
        ("raise SystemExit(7)", 7, ""),
    ],
)
def test_loading_that_fails_ends_the_program_with_its_sentence(tmp_path, then, code, said):
    file, port = tmp_path / "program.py", free_port()
    file.write_text(LOADING.format(root=str(ROOT), then=then), encoding="utf-8")
    answers = []
    with program(file, port) as process:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                answers.append(httpx.get(f"http://127.0.0.1:{port}/health", timeout=2))
            time.sleep(0.1)
        written = process.stdout.read()
        assert process.returncode == code, written
    assert said in written
    assert answers
    assert all((answer.status_code, answer.json()) == (503, {"status": "loading"}) for answer in answers)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_loading_can_be_interrupted(tmp_path, name):
    import signal

    file, port = tmp_path / "program.py", free_port()
    file.write_text(LOADING.format(root=str(ROOT), then="time.sleep(100)"), encoding="utf-8")
    with program(file, port) as process:
        wait_until(lambda: answers_at(f"http://127.0.0.1:{port}/health"), 180)
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == 130
        assert "Traceback" not in process.stdout.read()


def answers_at(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return bool(httpx.get(url))
    return False


def test_empty_key_ends_the_program_with_a_sentence(tmp_path):
    (tmp_path / "key").write_text("", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ov_mllama",
        "serve",
        "--key-file",
        str(tmp_path / "key"),
        "--port",
        str(free_port()),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    assert ended.returncode == 1
    assert "holds no key" in ended.stderr


# ---- Padding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def right():
    """The demo's processor with a tokenizer that was saved after training."""
    processor = AutoProcessor.from_pretrained(DEMO)
    processor.tokenizer.padding_side = "right"
    return processor


ASK_BOTH = [
    "Who are you?",
    "Please tell me in a few words, or in more of them if it must be, what it is that you can do for people?",
]


@pytest.mark.parametrize("samples", [(), (SAMPLES[0],)])
def test_batch_of_a_tokenizer_that_pads_right_is_answered_as_alone(slow_demo, processor, right, samples):
    expected = [alone(slow_demo, processor, words, *samples) for words in ASK_BOTH]
    slow_demo.as_new(step_s=0.05)
    sizes, generate = [], slow_demo.generate

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    slow_demo.generate = counted
    try:
        with small_server(slow_demo, right) as (url, _), ThreadPoolExecutor(3) as pool:
            first = pool.submit(post, url, ASKED)
            wait_until(lambda: is_busy(slow_demo))
            bodies = [{"model": "demo", "messages": user(*map(picture, samples), text(words))} for words in ASK_BOTH]
            answers = [each.result().json() for each in [pool.submit(post, url, body) for body in bodies]]
            assert first.result().is_success
    finally:
        del slow_demo.generate
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
    assert 2 in sizes
    assert right.tokenizer.padding_side == "right"
    assert right.tokenizer.backend_tokenizer.padding is None


def test_prompts_about_are_padded_left_whatever_the_tokenizer_says(processor, right):
    samples = [{"image": SAMPLES[i]["image"].convert("RGB"), "question": words} for i, words in enumerate(ASK_BOTH)]
    expected = prompts_about(processor, samples)
    inputs = prompts_about(right, samples)
    assert all(np.array_equal(inputs[name], expected[name]) for name in expected)
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].all()
    assert right.tokenizer.padding_side == "right"
    theirs = processor(
        text=[
            processor.apply_chat_template(user({"type": "image"}, text(words)), add_generation_prompt=True)
            for words in ASK_BOTH
        ],
        images=[[sample["image"]] for sample in samples],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert set(theirs) == set(inputs)
    assert all(np.array_equal(inputs[name], theirs[name]) for name in theirs)  # but on the left, it is the processor's


def test_prompts_are_padded_without_a_padding_token(right):
    prompts = [prompt_inputs(right, words, []) for words in ASK_BOTH]
    assert padded(prompts, None)["attention_mask"].sum(1).tolist() == [p["input_ids"].shape[1] for p in prompts]


# ---- Parameters that would change the answer ------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("options", "param"),
    [
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


CHANGES = {
    "repetition_penalty": 1.1,
    "top_k": 5,
    "min_p": 0.1,
    "stop_token_ids": [1],
    "guided_regex": "a+",
    "guided_choice": ["a", "b"],
    "guided_grammar": "root ::= 'a'",
    "best_of": 2,
    "logit_bias": {"1": 5},
    "structured_outputs": {"regex": "a"},
    "ignore_eos": True,
    "min_tokens": 5,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "logprobs": True,
    "top_logprobs": 3,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "continue_final_message": True,
    "modalities": ["text", "audio"],
}
NOTHING = {
    "repetition_penalty": 1,
    "top_k": -1,
    "min_p": 0.0,
    "stop_token_ids": [],
    "guided_regex": None,
    "best_of": 1,
    "logit_bias": {},
    "ignore_eos": False,
    "min_tokens": 0,
    "frequency_penalty": 0,
    "tools": [],
    "tool_choice": "auto",
    "logprobs": False,
    "modalities": ["text"],
    "user": "me",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "unheard_of": [1],
}


@pytest.mark.parametrize("name", CHANGES)
def test_parameter_that_would_change_the_answer_is_refused_by_name(client, server, name):
    assert name in NEUTRAL
    answer = post(server, {**ASKED, name: CHANGES[name]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


def test_parameters_that_change_nothing_are_taken(client, server):
    assert post(server, {**ASKED, **NOTHING}).json()["choices"][0]["message"]["content"] == SELF
    assert post(server, {**ASKED, **dict.fromkeys(NEUTRAL)}).is_success
    for name, values in NEUTRAL.items():
        for value in values:
            assert post(server, {**ASKED, "max_tokens": 1, name: value}).is_success, (name, value)


# ---- Batches of images ----------------------------------------------------------------------------------------------


def ask_together(model, processor, pictures: list[bytes], **options) -> list[int]:
    """Asks about each picture while the model is busy; how many questions each batch after that one had."""
    sizes, generate = [], model.generate

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    model.as_new(step_s=1)
    model.generate = counted
    try:
        with small_server(model, processor, **options) as (url, batches), ThreadPoolExecutor(len(pictures) + 1) as pool:
            first = pool.submit(post, url, ASKED)
            wait_until(lambda: is_busy(model))
            bodies = [
                {"model": "demo", "max_tokens": 1, "messages": user(encoded(data), text("?"))} for data in pictures
            ]
            asked = [pool.submit(post, url, body) for body in bodies]
            wait_until(lambda: len(batches._waiting) == len(pictures))
            model.step_s = 0
            assert all(each.result().is_success for each in [first, *asked])
    finally:
        del model.generate
    return sizes[1:]


def pictures_of(tiles_wide: int, tiles_high: int, count: int) -> list[bytes]:
    """For the demo's tiles of 112 pixels."""
    return [photograph(112 * tiles_wide, 112 * tiles_high, seed) for seed in range(count)]


@pytest.mark.parametrize(("wide", "high", "each"), [(1, 1, 2), (2, 1, 3), (1, 2, 3), (3, 1, 4), (2, 2, 4)])
def test_tiles_of_a_batch_are_limited_as_they_are_encoded(slow_demo, processor, wide, high, each):
    """An empty tile among them: 16 in all."""
    assert max(ask_together(slow_demo, processor, pictures_of(wide, high, 8))) == 16 // each


def test_detail_low_is_one_tile_of_a_batch(slow_demo):
    image = ImageFile.from_bytes(pictures_of(2, 2, 1)[0], "low")
    assert image.real_tiles(112, 4) == 1


def test_same_image_counts_once(slow_demo, processor):
    assert ask_together(slow_demo, processor, pictures_of(2, 2, 1) * 8) == [8]


@pytest.mark.parametrize("room", [16, 9])
def test_eight_images_of_two_tiles_are_encoded_once_each(slow_demo, processor, monkeypatch, room):
    """Whatever the image cache holds, it holds a batch's."""
    encoder = slow_demo.image_encoder
    tile = encoder.shapes.cross_kv_bytes(encoder.shapes.patches_per_tile)
    monkeypatch.setattr(encoder.cache, "max_bytes", room * tile)
    sizes = ask_together(slow_demo, processor, pictures_of(2, 1, 8))
    assert len(slow_demo.looks) == 8
    assert max(sizes) == room // 3
