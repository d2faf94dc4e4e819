"""Owners: whose conversations, pictures and answers a page or a program gets."""

import http.server
import json
import re
import secrets
import sqlite3
import threading
from contextlib import closing

import httpx
import pytest
from fastapi import FastAPI

from chat_client import (
    SETTINGS,
    VERIFY,
    Client,
    asked,
    assert_nothing_of,
    launched,
)
from chat_page import wait_until
from conftest import DEMO
from gradio_helper import make_demo
from openai_client import served
from ov_mllama.serving.app import mount_chat


def test_token_is_in_a_cookie_that_no_script_reads(demo, url):
    response = httpx.get(url, verify=VERIFY)
    cookies = response.headers.get_list("set-cookie")
    assert [cookie.split("=")[0] for cookie in cookies] == ["ov_mllama", "ov_mllama_framed"]
    assert all("HttpOnly" in cookie for cookie in cookies)
    tokens = {re.search("=([0-9a-f]{64});", cookie)[1] for cookie in cookies}
    assert len(tokens) == 1
    for name in ("ov_mllama", "ov_mllama_framed"):  # a notebook's frame at another site has the second one alone
        again = httpx.get(url, verify=VERIFY, cookies={name: tokens.copy().pop()})
        assert tokens == {re.search("=([0-9a-f]{64});", cookie)[1] for cookie in again.headers.get_list("set-cookie")}
    client = Client(demo, url).open()
    assert not any(token in client.shown() for token in client.http.cookies.values())


def test_session_of_another_browser_gives_nothing(demo, url, says):
    says.text = "Yes."
    victim = asked(Client(demo, url).open(), "My own question")
    assert_nothing_of(victim, Client(demo, url).open(), "My own question")
    without = Client(demo, url)
    without.http.cookies.clear()
    assert without.call("refresh", "", session=victim.session) is None


@pytest.mark.parametrize("claim", ["user alice", "user:alice", "browser:user:alice", "alice", "x" * 64])
def test_owner_is_no_value_that_a_browser_sends(make, demo, url, says, claim):
    says.text = "Yes."
    users = make()
    with launched(users, auth=[("alice", "a")]) as other:
        alice = asked(Client(users, other, login=("alice", "a")).open(), "Asked by Alice")
        key = alice.call("refresh", "")[5]
        stranger = Client(demo, url).open(claim, chat=key)
        stranger.http.cookies.set("ov_mllama", claim)
        stranger.open(claim, chat=key)
        stranger.call("poll", claim, key, "")
        assert "Asked by Alice" not in stranger.shown()


def test_session_is_worth_nothing_without_its_user(make, says):
    says.text = "Yes."
    users = make()
    with launched(users, auth=[("alice", "a"), ("bob", "b")]) as url:
        alice = asked(Client(users, url, login=("alice", "a")).open(), "Asked by Alice")
        assert_nothing_of(alice, Client(users, url, login=("bob", "b")).open(), "Asked by Alice")
        stranger = httpx.Client(verify=VERIFY, base_url=url)
        for picture in alice.pictures():
            assert stranger.get(f"gradio_api/file={picture}").status_code == 404
        again = Client(users, url, login=("alice", "a")).open()  # from another browser
        assert "Asked by Alice" in json.dumps(again.titles())
        assert again.file(alice.pictures()[0]).is_success


def test_answers_of_another_users_program_are_not_sent(make, says):
    users = make()
    says.text, says.over = "Only for Alice", False
    with launched(users, auth=[("alice", "a"), ("bob", "b")]) as url:
        alice, bob = (Client(users, url, login=login) for login in (("alice", "a"), ("bob", "b")))
        number = next(key for key, fn in users.fns.items() if getattr(fn.fn, "__name__", "") == "api_chat")
        body = {"data": [{"text": "Mine", "files": []}, *SETTINGS], "fn_index": number, "session_hash": alice.session}
        alice.http.post("gradio_api/queue/join", json=body).raise_for_status()
        address = {"url": "gradio_api/queue/data", "params": {"session_hash": alice.session}}
        assert bob.http.get(**address).status_code == 404
        says.over = True
        with alice.http.stream("GET", **address) as sent:
            assert "Only for Alice" in "".join(sent.iter_text())


def joined(client: Client, session: str | None, question: str = "Mine") -> httpx.Response:
    """A program's question, through Gradio's queue."""
    number = next(key for key, fn in client.demo.fns.items() if getattr(fn.fn, "__name__", "") == "api_chat")
    body = {"data": [{"text": question, "files": []}, *SETTINGS], "fn_index": number, "session_hash": session}
    return client.http.post("gradio_api/queue/join", json=body)


def sent(client: Client, path: str) -> str:
    """Events that the queue sends, until it has no more, or for some seconds."""
    said = ""
    try:
        with client.http.stream("GET", path, timeout=3) as response:
            for line in response.iter_lines():
                said += line
    except httpx.HTTPError:
        pass
    return said


@pytest.mark.parametrize("path", ["queue/data?session_hash={}", "call/chat/{}", "call/v2/x/{}"])
@pytest.mark.parametrize("when", ["answering", "answered", "begun by the stranger"])
def test_queue_sends_nothing_to_another_browser(demo, url, says, path, when):
    owner, stranger = Client(demo, url), Client(demo, url)
    says.text, says.over, session = "Only for the owner", when == "answered", secrets.token_hex(8)
    if when == "begun by the stranger":
        joined(stranger, session)
    event = joined(owner, session)
    if when == "answered":
        wait_until(lambda: not demo._queue.event_ids_to_events)
    says.over = True
    got = [sent(stranger, f"gradio_api/{path.format(key)}") for key in (session, event.json().get("event_id", "none"))]
    if when == "begun by the stranger":
        assert not event.is_success  # whoever begins a session has it
    else:
        assert not any("Only for the owner" in each for each in got)
        assert "Only for the owner" in sent(owner, f"gradio_api/queue/data?session_hash={session}")


def test_program_without_cookies_is_answered_by_the_queue(demo, url, says):
    """As curl and gradio_client do, with and without a session's name."""
    says.text, says.over = "Yes.", True
    data = {"data": [{"text": "Who?", "files": []}, *SETTINGS]}
    event = httpx.post(f"{url}gradio_api/call/chat", json=data).json()["event_id"]
    assert "Yes." in httpx.get(f"{url}gradio_api/call/chat/{event}", timeout=20).text


def test_name_given_with_a_shared_key_owns_nothing(slow_demo, processor, folder, says, monkeypatch):

    pages = []
    real = make_demo
    monkeypatch.setattr(
        "ov_mllama.chat.layout.make_demo",
        lambda *given, **more: pages.append(real(*given, folder=folder, **more)) or pages[0],
    )
    says.text = "Yes."
    app = mount_chat(FastAPI(), slow_demo, processor, DEMO, "the key")
    with served(app) as url:
        first = asked(Client(pages[0], f"{url}/chat/", login=("alice", "the key")).open(), "Asked with the key")
        assert first.file(first.pictures()[0]).headers["content-type"] == "image/png"
        assert_nothing_of(first, Client(pages[0], f"{url}/chat/", login=("alice", "the key")).open(), "with the key")
        assert httpx.get(f"{url}/chat/gradio_api/file={first.pictures()[0]}").status_code == 404
        with pytest.raises(httpx.HTTPStatusError):
            Client(pages[0], f"{url}/chat/", login=("alice", "no key"))


def test_token_of_an_earlier_version_brings_its_chats_once(demo, url, says, folder):
    says.text = "Yes."
    former = secrets.token_hex(16)
    earlier = asked(Client(demo, url).open(), "Asked long ago")
    token = earlier.http.cookies["ov_mllama"]
    wait_until(lambda: not demo.chat._running)  # noqa: SLF001
    demo.chat.flush()
    with closing(sqlite3.connect(folder / "chat.sqlite3")) as database, database:  # as the migration leaves it
        for table in ("conversations", "settings"):
            database.execute(f"UPDATE {table} SET owner = ? WHERE owner = ?", [f"browser:{former}", f"browser:{token}"])  # noqa: S608
    assert "Asked long ago" not in json.dumps(Client(demo, url).open("g" * 32).titles())
    mine = Client(demo, url).open(former)
    assert "Asked long ago" in json.dumps(mine.titles())
    assert "Asked long ago" not in json.dumps(Client(demo, url).open(former).titles())


def test_page_in_a_notebooks_frame_has_an_owner(browser, demo, url):
    """Jupyter is at another port."""
    body = f"<iframe src='{url}' style='width:1000px;height:800px;border:0'></iframe>".encode()

    class Notebook(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notebook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()
    tab = context.new_page()
    pages = next(fn.fn.__self__ for fn in demo.fns.values() if getattr(fn.fn, "__name__", "") == "open")

    def sessions() -> set:
        """Those that the frame has opened with its cookie, as the server sees them."""
        tokens = {f"browser:{each['value']}" for each in context.cookies() if each.get("partitionKey")}
        return {session for owner, session in pages._pages if owner in tokens}  # noqa: SLF001

    try:
        tab.goto(f"http://127.0.0.1:{server.server_port}/")
        wait_until(sessions, 60)
        first, cookies = sessions(), context.cookies()
        tab.reload()
        wait_until(lambda: sessions() - first, 60)
        assert {each["value"] for each in context.cookies()} == {each["value"] for each in cookies}
    finally:
        server.shutdown()
        context.close()
