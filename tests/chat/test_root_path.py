"""The chat below a path of a reverse proxy, alone and with the server; hosts, ports and paths from the environment."""

import re

import httpx
import pytest

from chat_client import Client, launched, png
from chat_page import SELF, WHO, Tab, expect, path_of
from conftest import DEMO, demo_samples
from openai_client import served
from ov_mllama.__main__ import argument_parser
from ov_mllama.cli import root_path
from ov_mllama.runtime.errors import InputError
from ov_mllama.serving.app import create_app, mount_chat, parse_arguments
from ov_mllama.serving.paths import ProxiedPath
from ov_mllama.serving.scheduler import Scheduler
from reverse_proxy import proxied

PATH, SAMPLE = "/proxy/7860", demo_samples()[0]


def root_of(page: str) -> str:
    """The address that a page's scripts use."""
    return re.search(r'"root":"([^"]*)"', page)[1]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("", ""),
        ("/", ""),
        ("/proxy/7860", PATH),
        ("proxy/7860/", PATH),
        ("https://x.example:8/a/", "https://x.example:8/a"),
    ],
)
def test_root_path_has_one_leading_slash_and_no_trailing_one(given, path):
    assert root_path(given) == path


@pytest.mark.parametrize("given", ["/a b", "/a;Path=/", "/a\r\nX: y", "ftp://a/b", "/a?b", "/é"])
def test_root_path_of_other_characters_is_an_error(given):
    with pytest.raises(InputError, match="no path of a proxy"):
        root_path(given)


def test_root_path_is_an_option_of_chat_and_serve():
    assert argument_parser().parse_args(["chat", "--root-path", "a/"]).root_path == "/a"
    assert argument_parser().parse_args(["chat"]).root_path is None  # the environment's
    assert parse_arguments(["--root-path", "/a", "--chat"]).root_path == "/a"
    with pytest.raises(SystemExit):
        argument_parser().parse_args(["chat", "--root-path", "a b"])


@pytest.fixture
def one(make):
    """A page of its own."""
    return make()


def test_environment_names_host_port_and_path_unless_the_call_does(one, monkeypatch):
    options = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda self, **given: options.update(given))
    monkeypatch.setenv("GRADIO_SERVER_NAME", "::1")
    monkeypatch.setenv("GRADIO_ROOT_PATH", "proxy/7860/")
    one.launch()
    assert (options["server_name"], options["root_path"]) == ("[::1]", PATH)
    assert options.get("server_port") is None  # Gradio reads GRADIO_SERVER_PORT
    one.launch(server_name="127.0.0.1", server_port=81, root_path="/b")
    assert (options["server_name"], options["server_port"], options["root_path"]) == ("127.0.0.1", 81, "/b")
    one.launch(root_path="")
    assert options["root_path"] == ""


@pytest.mark.parametrize("strips", [True, False])
def test_chat_below_a_path_is_used_as_without(one, browser, slow_demo, strips):
    slow_demo.as_new()
    with launched(one, root_path=PATH) as url, proxied(PATH, url, strips) as outside:
        client = Client(one, outside).open()
        upload = client.upload("a.png", png())
        assert client.file(upload).is_success
        secure = httpx.get(outside, headers={"X-Forwarded-Proto": "https", "X-Forwarded-Host": "chat.example"})
        assert root_of(secure.text) == f"https://chat.example{PATH}"
        assert "Path=/;" in secure.headers["set-cookie"]
        assert "SameSite=Lax; Secure" in secure.headers["set-cookie"]
        if strips:
            use(browser, outside)


def use(browser, outside: str) -> None:
    """Uses all of a page that has an address: pictures, an export, reload and Back, with no request to another path."""
    page, failed = Tab(browser, outside), []
    page.tab.on("response", lambda response: response.status >= 400 and failed.append(response.url))
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.tab.wait_for_function("document.querySelector('.message.component img').naturalWidth > 0")
    page.new_chat()
    page.ask(WHO)
    page.expect_answers(SELF, "tokens per second")
    assert page.tab.url.startswith(f"{outside}?chat=")
    page.tab.reload()
    page.expect_answers(SELF, "tokens per second")
    page.history.last.click()
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.tab.go_back()
    page.expect_answers(SELF, "tokens per second")
    expect(page.history).to_have_count(2)
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="Export").click()
    assert download.value.url.startswith(outside)
    elsewhere = [url for url in page.requests if not url.startswith((outside, "data:", "blob:"))]
    assert (elsewhere, failed, page.errors) == ([], [], [])
    page.close()


@pytest.mark.parametrize("strips", [True, False])
def test_server_with_chat_below_a_path(slow_demo, processor, monkeypatch, strips):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/another")  # is for a chat alone
    app = mount_chat(create_app(Scheduler(slow_demo, processor), "demo"), slow_demo, processor, DEMO, None)
    with (
        served(ProxiedPath(app, "/llama")) as url,
        proxied("/llama", url, strips) as outside,
        httpx.Client(base_url=outside, follow_redirects=True) as client,
    ):
        assert client.get("health").json() == {"status": "ok"}
        assert client.get("v1/models").json()["data"][0]["id"] == "demo"
        assert client.get("chat").url == f"{outside}chat/"
        page = client.get("chat/")
        assert root_of(page.text) == f"{outside}chat"
        upload = client.post("chat/gradio_api/upload", files={"files": ("a.png", png())}).json()[0]
        assert client.get(f"chat/gradio_api/file={upload}").is_success
        opened = {"data": [""], "fn_index": 0, "session_hash": "a"}
        assert client.post("chat/gradio_api/run/predict", json=opened).status_code != 404
