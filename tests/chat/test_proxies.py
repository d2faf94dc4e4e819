"""Programs start and answer with proxies in the environment, and ask them nothing about this machine.

Captions behind a proxy are in `test_scale.py`.
"""

import os
import subprocess
import sys
import time

import httpx
import pytest

from chat_page import wait_until
from conftest import ROOT
from ov_mllama.chat.proxies import bypass_proxy_for_loopback
from programs import environment_behind, free_port, refusing_proxy

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
demo.launch(server_port=int(sys.argv[3]), prevent_thread_lock=True)
print("Ctrl-C ends it", flush=True)
demo.block_thread()
"""
PROGRAMS = {
    "chat": ("-m", "ov_mllama", "chat", "--model-dir"),
    "server": ("-m", "ov_mllama", "serve", "--chat", "--model-dir"),
    "notebook's last cell": ("-c", LAUNCH),
}


@pytest.fixture
def proxy():
    """The address of a proxy that can reach nothing, and what it was asked for."""
    with refusing_proxy() as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("program", "scheme", "forked"),
    [
        ("chat", "http", True),
        ("server", "http", True),
        ("notebook's last cell", "http", True),
        ("chat", "socks5", True),
        ("server", "socks", False),  # which packages that are imported too early do not take
        ("chat", "socks", False),  # begins with the same imports, and its page is the server's: with --torture
    ],
)
def test_pages_start_and_answer_behind_a_proxy(program, scheme, forked, proxy, start, demo_dir, tmp_path, times):
    if (program, scheme) == ("chat", "socks") and times(True, False):
        pytest.skip("with --torture")
    address, asked = proxy
    port, variables, output = (
        free_port(),
        environment_behind(f"{scheme}://{address}", tmp_path),
        tmp_path / "output.txt",
    )
    arguments = [*PROGRAMS[program], str(demo_dir), "--port", str(port)]
    if forked:
        code = LAUNCH if arguments[0] == "-c" else "from ov_mllama.__main__ import main; main()"
        running = start(code, *arguments[2:], **dict.fromkeys(("no_proxy", "NO_PROXY")), **variables)
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
        wait_until(lambda: "Ctrl-C ends it" in output.read_text())  # Gradio asks itself after it answers others
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
