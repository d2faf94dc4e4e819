"""Addresses of images: what is fetched, and from where."""

import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest

from chat_page import path_of
from conftest import demo_samples
from openai_client import (
    KEY,
    complete,
    openai_client,
    refusal,
    served,
    text,
    user,
)
from ov_mllama.runtime.images import load_image
from ov_mllama.serving import image_urls
from ov_mllama.serving.app import create_app
from ov_mllama.serving.scheduler import Scheduler

SAMPLES = demo_samples()


PRIVATE = [
    *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),  # noqa: S104
    *("255.255.255.255", "198.18.0.1", "192.0.2.1", "240.0.0.1", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "ff02::1", "fec0::1", "2001:db8::1", "2001:0:1:2:3:4:80ff:fffe"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_address_is_not_public(address):
    assert not image_urls.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_address_is_public(address):
    assert image_urls.is_public(address)


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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port, asked
    server.shutdown()


@pytest.fixture(scope="module")
def fetching_server(slow_demo, processor):
    """A server that fetches pictures from addresses."""
    with served(create_app(Scheduler(slow_demo, processor), "demo", KEY, allow_image_urls=True)) as url:
        yield url


@pytest.fixture
def fetching(fetching_server, slow_demo):
    """OpenAI's client of that server."""
    slow_demo.as_new()
    return openai_client(fetching_server)


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

    monkeypatch.setattr(image_urls, "resolve", resolve)
    monkeypatch.setattr(image_urls, "is_public", lambda address: address == "127.0.0.1")
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
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    public["a.example"] = ["127.0.0.1"]
    error = refusal(fetching, at(f"https://a.example:{server.server_port}/x.png"))
    server.shutdown()
    assert names == ["a.example"]
    assert "certificate" in error.body["message"]


def test_library_reaches_the_users_own_network(web):
    assert load_image(f"http://127.0.0.1:{web[0]}/x.png").size == SAMPLES[0]["image"].size
