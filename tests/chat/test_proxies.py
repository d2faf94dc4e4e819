"""Programs start and answer with proxies in the environment, and ask them nothing about this machine."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time

import httpx
import pytest

from chat_page import path_of, wait_until
from conftest import ROOT, demo_samples
from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from programs import free_port

NAMES = ("http_proxy", "https_proxy", "all_proxy")
LAUNCH = """
import sys
from transformers import AutoProcessor
from ov_mllama.chat.proxies import bypass_proxy_for_loopback
bypass_proxy_for_loopback()  # as the notebook's first cell does
import gradio as gr
from gradio_helper import make_demo
from ov_mllama_helper import OVMLlamaForConditionalGeneration
gr.close_all(verbose=False)
model = OVMLlamaForConditionalGeneration(sys.argv[1])
demo = make_demo(model, AutoProcessor.from_pretrained(sys.argv[1]))
demo.launch(server_port=int(sys.argv[3]))  # keeps running
"""
PROGRAMS = {
    "chat": ("-m", "ov_mllama", "chat", "--model-dir"),
    "server": ("-m", "ov_mllama", "serve", "--chat", "--model-dir"),
    "notebook's last cell": ("-c", LAUNCH),
}


@pytest.fixture
def proxy():
    """The address of a proxy that can reach nothing, and what it was asked for."""
    asked = []

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.requestline)
            self.send_error(503)

        do_POST = do_HEAD = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *given):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


def environment(address: str, home) -> dict[str, str]:
    """That of a company's machine: proxies in both spellings, and no `no_proxy`."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    proxies = {spelling: address for name in NAMES for spelling in (name, name.upper())}
    return {**kept, **proxies, "CI": "true", "XDG_DATA_HOME": str(home)}


@pytest.mark.parametrize(
    ("program", "scheme", "forked"),
    [
        ("chat", "http", True),
        ("server", "http", True),
        ("notebook's last cell", "http", False),
        ("chat", "socks5", True),
        ("chat", "socks", False),  # which packages that are imported too early do not take
        ("server", "socks", False),
    ],
)
def test_pages_start_and_answer_behind_a_proxy(program, scheme, forked, proxy, start, demo_dir, tmp_path):
    address, asked = proxy
    port, variables, output = free_port(), environment(f"{scheme}://{address}", tmp_path), tmp_path / "output.txt"
    arguments = [*PROGRAMS[program], str(demo_dir), "--port", str(port)]
    if forked:
        main = "from ov_mllama.__main__ import main; main()"
        running = start(main, *arguments[2:], **dict.fromkeys(("no_proxy", "NO_PROXY")), **variables)
        output = running.output
    else:
        with output.open("w") as file:
            command = [sys.executable, *arguments]
            running = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)  # noqa: S603
    paths = ("health", "chat/") if program == "server" else ("config",)
    pages = [f"http://127.0.0.1:{port}/{path}" for path in paths]
    try:
        with httpx.Client(trust_env=False) as client:
            for page in pages:
                while not succeeds(client, page):
                    assert running.poll() is None, output.read_text()
                    time.sleep(0.1)
        # Gradio asks itself after it answers others
        if program == "notebook's last cell":
            time.sleep(1)
        else:
            wait_until(lambda: "Ctrl-C ends it" in output.read_text())
        assert running.poll() is None, output.read_text()
    finally:
        running.kill()
        running.wait()
    assert not asked


def succeeds(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def test_captions_are_made_behind_a_proxy(proxy, demo_dir, tmp_path):
    address, asked = proxy
    pictures, out = tmp_path / "pictures", tmp_path / "captions"
    pictures.mkdir()
    shutil.copy(path_of(demo_samples()[0]), pictures)
    command = [
        sys.executable,
        "-m",
        "ov_mllama",
        "caption",
        pictures,
        "--model-dir",
        demo_dir,
        "--out",
        out,
    ]
    run = subprocess.run(  # noqa: S603
        command, cwd=ROOT, env=environment(f"http://{address}", tmp_path), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(out.glob("*.parquet"))
    # Ray looks whether it runs in a cloud, at addresses that every provider has
    assert not [line for line in asked if "169.254.169.254" not in line and "metadata.google.internal" not in line]


@pytest.fixture
def clean(monkeypatch):
    """An environment without proxies, put back as it was."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("lower", "upper"), [("", ""), ("intern.example, 10.0.0.1", ""), ("", "intern.example")])
def test_no_proxy_of_the_user_stays(clean, lower, upper):
    for name, value in (("no_proxy", lower), ("NO_PROXY", upper)):
        if value:
            clean.setenv(name, value)
    for _ in range(2):  # again it changes nothing
        bypass_proxy_for_loopback("192.168.1.5")
    names = os.environ["no_proxy"].split(",")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
    assert {"localhost", "127.0.0.1", "::1", "192.168.1.5"} <= set(names)
    assert len(names) == len(set(names))
    assert ("intern.example" in names) == bool(lower or upper)


def test_socks_proxies_of_desktops_are_read(clean):
    clean.setenv("all_proxy", "socks://127.0.0.1:1080/")
    clean.setenv("ALL_PROXY", "SOCKS://user:word@127.0.0.1:1080/")
    bypass_proxy_for_loopback()
    variables = dict(os.environ)
    assert variables["all_proxy"] == "socks5://127.0.0.1:1080/"
    assert variables["ALL_PROXY"] == "socks5://user:word@127.0.0.1:1080/"
    httpx.Client().close()  # reads them, and needs socksio for them
