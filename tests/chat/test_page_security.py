"""The chat page and strangers: forged requests, uploads, owners, and text that makes a browser fetch something."""

import http.server
import io
import json
import re
import secrets
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import httpx
import pytest
from gradio.utils import get_upload_folder
from PIL import Image, ImageChops
from playwright.sync_api import expect
from transformers import AutoProcessor

from chat_page import SELF, WHO, Slow, Tab, wait_until
from conftest import DEMO, demo_samples
from data_preprocessing import questions_about
from gradio_helper import ChatPage, make_demo
from ov_mllama.chat.page_input import MAX_QUESTION
from ov_mllama_helper import convert_mllama

pytestmark = pytest.mark.alone

SAMPLE = demo_samples()[0]
WISHES = ["", 8, 0, 0.9]
SECRET = Image.new("RGB", (23, 17), "purple")
META = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Slow(convert_mllama(DEMO, tmp_path_factory.mktemp("security") / "ov"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("conversations")


@pytest.fixture(scope="module")
def make(model, folder):
    processor = AutoProcessor.from_pretrained(DEMO)
    return lambda: make_demo(model, processor, questions_about(DEMO)[:2], folder)


@pytest.fixture(scope="module")
def processor_of_demo():
    return AutoProcessor.from_pretrained(DEMO)


@contextmanager
def launched(demo, **options):
    _, url, _ = demo.launch(prevent_thread_lock=True, **options)
    try:
        yield url
    finally:
        demo.close()


@pytest.fixture(scope="module")
def demo(make):
    return make()


@pytest.fixture(scope="module")
def url(demo):
    with launched(demo) as url:
        yield url


@pytest.fixture
def secret(tmp_path):
    """A picture of the user's that nobody has uploaded."""
    SECRET.save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


def stored(folder: Path) -> list[Path]:
    """Pictures of conversations."""
    return [path for path in (folder / "pictures").rglob("*") if path.is_file()]


def pixels_of(paths) -> list[bytes]:
    return [Image.open(path).convert("RGB").tobytes() for path in paths]


class Client:
    """A program that sends what a page of the chat would, or anything else.

    Args:
        demo: the chat, for the numbers of its events.
        session: the page's session.
        login: name and password.
    """

    def __init__(self, demo, url: str, session: str = "", login: tuple | None = None):
        self.demo, self.session = demo, session or secrets.token_hex(8)
        self.http = httpx.Client(base_url=url, timeout=30, follow_redirects=True)
        if login:
            self.http.post("login", data={"username": login[0], "password": login[1]}).raise_for_status()
        self.http.get("").raise_for_status()  # its cookie

    def call(self, name: str, *data, event=None, session="") -> list | None:
        """The outputs of one of the page's functions; None where it failed."""
        number = next(key for key, fn in self.demo.fns.items() if getattr(fn.fn, "__name__", "") == name)
        body = {"data": data, "fn_index": number, "session_hash": session or self.session, "event_data": event}
        response = self.http.post("gradio_api/run/predict", json=body)
        return response.json()["data"] if response.is_success else None

    def open(self, former: str = "", chat: str = "") -> "Client":
        number = next(key for key, fn in self.demo.fns.items() if getattr(fn.fn, "__name__", "") == "open")
        body = {"data": [former], "fn_index": number, "session_hash": self.session}
        self.http.post("gradio_api/run/predict", json=body, params={"chat": chat} if chat else {})
        return self

    def upload(self, name: str, content: bytes) -> str:
        return self.http.post("gradio_api/upload", files={"files": (name, content)}).json()[0]

    def file(self, path) -> httpx.Response:
        return self.http.get(f"gradio_api/file={path}")

    def shown(self, session="") -> str:
        """All that the page shows, as text."""
        return json.dumps(self.call("refresh", "", session=session))

    def titles(self) -> list:
        return self.call("refresh", "")[4].get("choices", [])

    def ask(self, text: str, *files) -> "Client":
        """Asks, and waits until the answer, "Yes.", is there."""
        self.call("ask", {"text": text, "files": [{"path": file, "meta": META} for file in files]}, *WISHES)
        wait_until(lambda: "Yes." in (shown := self.shown()) and text in shown)
        return self

    def pictures(self) -> list[str]:
        """Paths of the pictures that are shown."""
        return re.findall(r'"path": "([^"]+)"', json.dumps(self.call("refresh", "")[2]))


def png(image=SAMPLE["image"]) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---- Paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, "0", -1, 10**9, [0], None, True, 0.5, {"path": "x"}, [[0]], ""], ids=repr)
def test_example_event_never_names_a_file(demo, url, folder, secret, says, index):
    says.text = "Yes."
    client, before = Client(demo, url).open(), stored(folder)
    for files in ([str(secret)], [{"path": str(secret)}], [{"path": str(secret), "meta": META}]):
        client.call("example", *WISHES, event={"index": index, "value": {"text": "hi", "files": files}})
    new = [path for path in stored(folder) if path not in before]
    assert SECRET.tobytes() not in pixels_of(new)
    if type(index) is int and index == 0:  # the question's own picture, whatever the event says
        assert pixels_of(new) == [SAMPLE["image"].convert("RGB").tobytes()]
        assert '"hi"' not in client.shown()
    else:
        assert not new


def forged(kind: str, secret: Path, client: Client) -> object:
    """A file of a text box that is no upload."""
    uploads = Path(get_upload_folder())
    if "link" in kind:
        link = uploads / f"{secrets.token_hex(4)}.png"
        link.symlink_to(secret.parent if "folder" in kind else secret)
        name = str(link / secret.name if "folder" in kind else link)
    elif "another" in kind:
        victim = Client(client.demo, str(client.http.base_url)).open()
        victim.ask("Mine?", victim.upload("secret.png", png(SECRET)))
        (name,) = victim.pictures()
    else:
        name = {
            "string": str(secret),
            "dots": f"{uploads}{'/..' * 20}{secret}",
            "null": f"{secret}\0.png",
            "file url": f"file://{secret}",
            "folder": str(secret.parent),
            "relative": "secret.png",
            "empty": "",
        }.get(kind.removeprefix("no meta ").removeprefix("meta "), str(secret))
    if kind.startswith("string") or kind in ("null", "dots", "link", "another's"):
        return name
    entry = {"path": name, "orig_name": "a.png", "mime_type": "image/png", "url": f"file://{secret}", "size": 1}
    return {**entry, **({} if kind.startswith("no meta") else {"meta": META})}


FORGED = ["string", "dots", "null", "link", "another's", "meta path", "no meta path", "meta dots", "meta link"]
FORGED += ["meta folder link", "meta another's", "meta file url", "meta folder", "meta relative", "meta empty"]


@pytest.mark.parametrize("endpoint", ["ask", "on_typing", "api_chat"])
@pytest.mark.parametrize("kind", FORGED)
def test_question_takes_uploads_only(demo, url, folder, model, secret, says, kind, endpoint):
    model.as_new()
    says.text = "Yes."
    client = Client(demo, url).open()
    file = forged(kind, secret, client)
    before = stored(folder)
    looks = len(model.looks)
    wishes = [] if endpoint == "on_typing" else WISHES
    outputs = client.call(endpoint, {"text": "hi", "files": [file]}, *wishes)
    assert not outputs
    assert stored(folder) == before
    assert len(model.looks) == looks
    assert not client.pictures()


@pytest.mark.parametrize("index", ["0", -1, 7, [], [9], {}, None, [["x"]], True], ids=repr)
def test_edit_event_of_no_question_changes_nothing(demo, url, says, index):
    says.text = "Yes."
    client = Client(demo, url).open()
    client.call("ask", {"text": "First", "files": []}, *WISHES)
    wait_until(lambda: "Yes." in client.shown())
    client.call("edit", *WISHES, event={"index": index, "value": "Other", "previous_value": "First"})
    client.call("edit", *WISHES, event={"index": 0, "value": {"path": "/etc/hostname"}, "previous_value": ""})
    shown = client.shown()
    assert "First" in shown
    assert "Other" not in shown
    assert "hostname" not in shown


def test_question_taken_back_is_asked_again_with_its_picture(demo, url, says, folder):
    says.text = "Yes."
    client = Client(demo, url).open()
    client.call("ask", {"text": "What?", "files": [{"path": client.upload("a.png", png()), "meta": META}]}, *WISHES)
    wait_until(lambda: "Yes." in client.shown())
    (picture,) = client.pictures()
    ((box),) = client.call("undo")
    assert box["text"] == "What?"
    client.call("ask", {"text": "Again?", "files": box["files"]}, *WISHES)
    wait_until(lambda: "Again?" in client.shown())
    assert client.pictures() == [picture]


@pytest.mark.parametrize(
    "wishes",
    [["x" * 10**6, 8, 0, 0.9], ["", "many", 0, 0.9], ["", 10**9, 0, 0.9], ["", 8, -1, 0.9], ["", 8, 0, 7], [None] * 4],
)
def test_settings_out_of_bounds_are_refused(demo, url, says, wishes):
    says.text = "Yes."
    client = Client(demo, url).open()
    assert client.call("ask", {"text": "hi", "files": []}, *wishes) is None
    assert '"hi"' not in client.shown()


def test_texts_without_end_are_refused(demo, url, says):
    client = Client(demo, url).open()
    assert client.call("ask", {"text": "word " * 200_000, "files": []}, *WISHES) is None
    assert client.call("api_chat", {"text": "word " * 200_000, "files": []}, *WISHES) is None
    says.text = "Yes."
    client.call("ask", {"text": "hi", "files": []}, *WISHES)
    wait_until(lambda: "Yes." in client.shown())
    assert client.call("rename", "n" * 10_000) is None
    assert "nnnnn" not in client.shown()


# ---- Files that are served ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["evil.html", "evil.svg", "evil.xml", "evil.xhtml", "evil.png", "evil.HTM", "evil", "evil.pdf", "evil.js"]
)
def test_upload_is_served_as_an_image_or_a_download(demo, url, name):
    client = Client(demo, url)
    response = client.file(
        client.upload(name, b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    )
    kind = response.headers.get("content-type", "")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert kind == "image/png" or response.headers["content-disposition"].startswith("attachment")
    assert not re.search("html|svg|xml|javascript|pdf", kind)


def test_stored_picture_is_a_png_without_metadata_for_its_owner_alone(demo, url, folder, says, tmp_path):
    says.text = "Yes."
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Camera of somebody", 6
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.0)
    file = io.BytesIO()
    Image.effect_noise((60, 40), 50).convert("RGB").save(file, "JPEG", exif=exif, comment=b"a comment")
    owner, other = Client(demo, url).open(), Client(demo, url).open()
    before = stored(folder)
    upload = owner.upload("../my photo<b>.jpg", file.getvalue())
    owner.call("ask", {"text": "What?", "files": [{"path": upload, "meta": META}]}, *WISHES)
    wait_until(lambda: "Yes." in owner.shown())
    (picture,) = owner.pictures()
    assert [str(path) for path in stored(folder) if path not in before] == [picture]
    response = owner.file(picture)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.headers["x-content-type-options"] == "nosniff"
    for trace in (b"Camera", b"Exif", b"eXIf", b"comment"):
        assert trace not in response.content
    shown = Image.open(io.BytesIO(response.content))
    assert (shown.format, shown.size) == ("PNG", (40, 60))  # the right way up
    anybody = httpx.Client(base_url=url)
    for who in (other.http, anybody, httpx.Client(base_url=url, cookies={"ov_mllama": "user:alice"})):
        for address in (f"gradio_api/file={picture}", f"gradio_api/file/{picture}"):
            assert who.get(address).status_code == 404, who
    for path in (folder / "chat.sqlite3", Path(picture).parent, f"{folder}/examples/../chat.sqlite3", "/etc/hostname"):
        assert owner.file(path).status_code == 404
    for address in ("http://127.0.0.1:1/", "https://example.org/a.png", ""):
        assert owner.file(address).status_code in (403, 404)


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


def test_token_is_in_a_cookie_that_no_script_reads(demo, url):
    response = httpx.get(url)
    cookies = response.headers.get_list("set-cookie")
    assert [cookie.split("=")[0] for cookie in cookies] == ["ov_mllama", "ov_mllama_framed"]
    assert all("HttpOnly" in cookie for cookie in cookies)
    tokens = {re.search("=([0-9a-f]{64});", cookie)[1] for cookie in cookies}
    assert len(tokens) == 1
    for name in ("ov_mllama", "ov_mllama_framed"):  # a notebook's frame at another site has the second one alone
        again = httpx.get(url, cookies={name: tokens.copy().pop()})
        assert tokens == {re.search("=([0-9a-f]{64});", cookie)[1] for cookie in again.headers.get_list("set-cookie")}
    client = Client(demo, url).open()
    assert not any(token in client.shown() for token in client.http.cookies.values())


# ---- Owners ---------------------------------------------------------------------------------------------------------


def assert_nothing_of(victim: Client, stranger: Client, question: str) -> None:
    """A stranger who knows session, conversation and picture of a page gets and changes nothing."""
    (key, *_), pictures = [victim.call("refresh", "")[5]], victim.pictures()
    before = victim.call("refresh", "")[2:]
    for session in (victim.session, stranger.session):
        stranger.call("poll", "opened", key, "", session=session)
        for name, data in (
            ("reopen", [key]),
            ("stop", []),
            ("undo", []),
            ("retry", WISHES),
            ("rename", ["stolen"]),
            ("ask", [{"text": "stolen", "files": []}, *WISHES]),
            ("export", []),
            ("choose", ["opened", "stolen", 8, 0, 0.9]),
            ("delete", ["yes"]),
        ):
            got = stranger.call(name, *data, session=session)
            assert question not in json.dumps(got), name
            for file in re.findall(r'"path": "([^"]+\.zip)"', json.dumps(got)):
                content = zipfile.ZipFile(io.BytesIO(stranger.file(file).content)).read("chat.md").decode()
                assert question not in content
        assert question not in stranger.shown(session)
        assert question not in stranger.http.get("gradio_api/deep_link", params={"session_hash": session}).text
        assert not stranger.http.get("gradio_api/deep_link", params={"session_hash": session}).is_success
    for picture in pictures:
        assert stranger.file(picture).status_code == 404
    wait_until(lambda: victim.call("refresh", "")[2:5] == before[:3])


def asked(client: Client, question: str) -> Client:
    """A client whose conversation has one question with a picture."""
    upload = client.upload("a.png", png())
    client.ask(question, upload)
    wait_until(client.titles)
    return client


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
        stranger = httpx.Client(base_url=url)
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
        body = {"data": [{"text": "Mine", "files": []}, *WISHES], "fn_index": number, "session_hash": alice.session}
        alice.http.post("gradio_api/queue/join", json=body).raise_for_status()
        address = {"url": "gradio_api/queue/data", "params": {"session_hash": alice.session}}
        assert bob.http.get(**address).status_code == 404
        says.over = True
        with alice.http.stream("GET", **address) as sent:
            assert "Only for Alice" in "".join(sent.iter_text())


def joined(client: Client, session: str | None, question: str = "Mine") -> httpx.Response:
    """A program's question, through Gradio's queue."""
    number = next(key for key, fn in client.demo.fns.items() if getattr(fn.fn, "__name__", "") == "api_chat")
    body = {"data": [{"text": question, "files": []}, *WISHES], "fn_index": number, "session_hash": session}
    return client.http.post("gradio_api/queue/join", json=body)


def sent(client: Client, path: str) -> str:
    """What the queue sends, until it has no more, or for some seconds."""
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
    data = {"data": [{"text": "Who?", "files": []}, *WISHES]}
    event = httpx.post(f"{url}gradio_api/call/chat", json=data).json()["event_id"]
    assert "Yes." in httpx.get(f"{url}gradio_api/call/chat/{event}", timeout=20).text


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


@pytest.mark.parametrize("path", UNUSED)
def test_routes_that_the_page_does_not_use_are_closed(demo, url, path):
    client = Client(demo, url)
    assert client.http.get(path, timeout=3).status_code in (404, 405)
    assert client.http.post(path, json={"session_hash": "s", "component_id": 1, "fn_name": "x"}).status_code in (
        404,
        405,
    )


def test_mounted_page_tells_no_text_of_unexpected_errors(model, processor_of_demo):
    from fastapi import FastAPI

    from openai_client import served
    from ov_mllama.serving.app import mount_chat

    app = mount_chat(FastAPI(), model, processor_of_demo, DEMO, None)
    with served(app) as url:
        body = {"data": [], "fn_index": 0, "session_hash": "s"}
        answer = httpx.post(f"{url}/chat/gradio_api/run/predict", json=body)
        assert (answer.status_code, answer.json()) == (500, {"error": None})


def test_name_given_with_a_shared_key_owns_nothing(model, folder, says, monkeypatch):
    from fastapi import FastAPI

    from openai_client import served
    from ov_mllama.serving.app import mount_chat

    pages = []
    real = make_demo
    monkeypatch.setattr(
        "ov_mllama.chat.layout.make_demo",
        lambda *given, **more: pages.append(real(*given, folder=folder, **more)) or pages[0],
    )
    says.text = "Yes."
    app = mount_chat(FastAPI(), model, AutoProcessor.from_pretrained(DEMO), DEMO, "the key")
    with served(app) as url:
        first = asked(Client(pages[0], f"{url}/chat/", login=("alice", "the key")).open(), "Asked with the key")
        assert first.file(first.pictures()[0]).headers["content-type"] == "image/png"
        assert_nothing_of(first, Client(pages[0], f"{url}/chat/", login=("alice", "the key")).open(), "with the key")
        assert httpx.get(f"{url}/chat/gradio_api/file={first.pictures()[0]}").status_code == 404
        with pytest.raises(httpx.HTTPStatusError):
            Client(pages[0], f"{url}/chat/", login=("alice", "no key"))


def test_token_of_an_earlier_version_brings_its_chats_once(demo, url, says, folder):
    import sqlite3
    from contextlib import closing

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


# ---- In a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere():
    """Another server: its address, and the paths that it was asked for."""
    asked_for = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked_for.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked_for
    server.shutdown()


def lures(address: str) -> str:
    """Text that would have a browser fetch something from an address."""
    return "\n\n".join(
        line.replace("@", address)
        for line in (
            "![a](@/1?q=secret)",
            "![b][r] ![r]\n\n[r]: @/2",
            "<img src=@/3>",
            "<video poster='@/4' src=@/5></video><audio src=@/6></audio>",
            "<div style=\"background:url('@/7')\">x</div>",
            "<link rel=stylesheet href=@/8><style>@import '@/9'</style>",
            "<svg><image href='@/10'/></svg><input type=image src=@/11>",
            "<object data=@/12></object><embed src=@/13><iframe src=@/14></iframe>",
            "`code` \\`<img src=@/15>\\` ``<img src=@/16>`",
            "$<img src=@/17>$ $$<img src=@/18>$$ \\(![x](@/19)\\) $\\includegraphics{@/20}$",
            "```mermaid\nflowchart TD\n  A@{ img: '@/21', label: 'x' }\n```",
            "<picture><source srcset=@/22><img src=@/23 srcset='@/24 2x'></picture>",
            "[![c](@/25)](@/26) <table background=@/27><tr><td background=@/28>",
            "<details open><summary><img src=@/29></summary></details> <meta http-equiv=refresh content='0;url=@/30'>",
            "<!-- ![x](@/31) --> ![multi\nline](@/32) ![](<@/33>)",
        )
    )


def test_no_text_makes_the_browser_fetch_anything(page, says, elsewhere, monkeypatch):
    address, asked_for = elsewhere
    says.text = f"{lures(address)}\n\nThe end"
    page.ask(lures(address))
    page.expect_answers("The end", "1 s")
    name = page.tab.get_by_label("Name of this chat")
    name.fill(f"![t]({address}/title) <img src={address}/title>")
    name.press("Tab")
    expect(page.history.first).to_contain_text("title")

    async def fails(*_, **__):
        raise ValueError(lures(address))
        yield

    monkeypatch.setattr("ov_mllama.chat.answers.stream_words", fails)
    page.ask("And a note?")
    expect(page.bot.last).to_contain_text("No answer: ")
    page.tab.reload()
    expect(page.bot.last).to_contain_text("No answer: ")
    page.tab.wait_for_timeout(1000)
    assert asked_for == []
    assert not [request for request in page.requests if request.startswith(address)], "only the policy stopped it"
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="Export").click()
    with zipfile.ZipFile(download.value.path()) as exported:
        text = exported.read("chat.md").decode()
    assert not re.search(r"(?<!\\)!\[[^\]]*\]\(<?http|(?<!\\)!\[[^\]]*\]\[|(?<!\\)<[a-z!]+(?<!<sub)[ >]", text)
    assert text.startswith("# \\!\\[t\\]")


def test_policy_stops_what_the_text_rules_miss(page, says, elsewhere, monkeypatch):
    address, asked_for = elsewhere
    monkeypatch.setattr("ov_mllama.chat.render.block_loading", lambda text: text)
    says.text = f"{lures(address)}\n\n{secrets.token_hex(4)} The end"
    page.ask("What?")
    page.expect_answers("The end", "1 s")
    page.tab.wait_for_timeout(1000)
    assert asked_for == []


def test_links_open_only_when_clicked_and_know_nothing_of_the_page(page, says, elsewhere):
    address, asked_for = elsewhere
    says.text = f"[a]({address}/a) and {address}/b"
    page.ask("Links?")
    page.expect_answers("and", "1 s")
    links = page.bot.first.locator("a")
    expect(links).to_have_count(2)
    for i in range(2):
        assert links.nth(i).get_attribute("target") == "_blank"
        assert {"noopener", "noreferrer"} <= set(links.nth(i).get_attribute("rel").split())
    assert asked_for == []
    with page.context.expect_page():
        links.first.click()
    wait_until(lambda: "/a" in asked_for)


TYPED = "1. a *b* <i>c</i>\n# d\n\n    e `f` $x^2$ \\(y\\) [g](h) ![i](j) & &amp; a_b_c https://k.org m@n.de %%%"


def test_question_is_shown_as_typed_and_edited_and_copied_so(page, says):
    says.text = "As <b>asked</b> ![x](y)"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.ask(TYPED)
    page.expect_answers("asked", "1 s")
    assert page.user.locator("p").inner_text() == TYPED
    expect(page.user.locator("a, em, i, code, li, h1, img, .katex")).to_have_count(0)
    page.press("Edit")
    expect(page.tab.locator(".edit-textarea")).to_have_value(TYPED)
    page.tab.locator(".edit-textarea").fill(f"{TYPED} *again*")
    page.tab.get_by_label("Submit").first.click()
    expect(page.user.locator("p")).to_contain_text("*again*")
    page.expect_answers("asked", "1 s")
    copy = page.tab.locator("[aria-label='Copy message']:visible")
    copy.first.click()
    page.tab.wait_for_timeout(200)
    assert page.tab.evaluate("navigator.clipboard.readText()") == f"{TYPED} *again*"
    copy.last.click()
    page.tab.wait_for_timeout(200)
    assert page.tab.evaluate("navigator.clipboard.readText()") == says.text


def test_code_and_formulas_with_markup_look_as_before(page, says):
    says.text = "`<b>a</b>` and `![x](y)` and $a<b$\n\n```html\n<img src=x>\n```\n"
    page.ask("Code?")
    page.expect_answers("and", "1 s")
    visible = [text.replace("\u2060", "") for text in page.bot.first.locator("code").all_inner_texts()]
    assert [text.strip() for text in visible] == ["<b>a</b>", "![x](y)", "<img src=x>"]
    expect(page.bot.first.locator(".katex annotation")).to_have_text(["a<b"])
    expect(page.bot.first.locator(".katex-error")).to_have_count(0)
    assert page.console == []


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


def test_save_that_fails_is_said_and_tried_again(page, url, says, demo, monkeypatch):
    import sqlite3

    from ov_mllama.chat.store import Conversations

    says.text = "Yes."
    foot, real = page.tab.locator(".block.foot"), Conversations.write

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Conversations, "write", full, raising=False)
    page.ask("Is it kept?")
    page.expect_answers("Yes.", "1 s")
    expect(foot).to_contain_text("This chat could not be saved (database or disk is full)")
    monkeypatch.setattr(Conversations, "write", real)
    expect(foot).not_to_contain_text("could not be saved", timeout=10_000)
    expect(page.history).to_have_text(["Is it kept?"])
    second = Tab(page.context, url)
    expect(second.history).to_have_text(["Is it kept?"])


def test_refusal_is_shown_below_the_box(page, says, demo, tmp_path):
    """Gradio's page shows no error of an event without queue: a question seemed to do nothing."""
    says.text = "Yes."
    foot = page.tab.locator(".block.foot")
    (tmp_path / "gone <b>.png").write_bytes(png())
    page.attach(tmp_path / "gone <b>.png")
    for upload in Path(get_upload_folder()).rglob("gone*"):  # as Gradio does after an hour
        upload.unlink()
    page.box.fill("What is it?")
    page.send.click()
    expect(foot).to_contain_text("has waited too long")
    expect(foot.locator("b")).to_have_count(0)
    expect(page.box).to_have_value("What is it?")
    page.tab.locator(".thumbnail-item button").first.click()
    page.send.click()
    page.expect_answers("Yes.", "1 s")
    expect(foot).not_to_contain_text("has waited too long")
    page.box.fill("x" * (MAX_QUESTION + 1))
    page.send.click()
    expect(foot).to_contain_text(f"use at most {MAX_QUESTION}")
    page.box.fill("Short")
    page.send.click()
    page.expect_answers("Yes.", "1 s", "Yes.", "1 s")
    expect(foot).not_to_contain_text("use at most")


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "too little memory"), (OSError(5, "Input/output error"), "Input/output error")]
)
def test_picture_that_the_machine_cannot_open_is_said(page, says, tmp_path, monkeypatch, error, said):
    says.text = "Yes."
    (tmp_path / "picture.png").write_bytes(png())
    page.attach(tmp_path / "picture.png")
    page.box.fill("What is it?")

    def fails(source):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("ov_mllama.chat.pages.open_picture", fails)
        page.send.click()
        expect(page.tab.locator(".block.foot")).to_contain_text(said)
    expect(page.box).to_have_value("What is it?")
    page.send.click()
    page.expect_answers("Yes.", "1 s")


def test_example_is_answered_as_before(page, model):
    model.as_new()
    page.tab.get_by_role("button", name=WHO).click()
    page.expect_answers(SELF, "tokens per second")
    page.new_chat()
    page.tab.get_by_role("button", name=SAMPLE["question"]).click()
    page.expect_answers(SAMPLE["answer"], "1 picture")
    picture = page.tab.locator(".message.component img")
    wait_until(lambda: picture.evaluate("picture => picture.complete && picture.naturalWidth > 0"))
    content = page.tab.request.get(picture.get_attribute("src")).body()
    assert ImageChops.difference(Image.open(io.BytesIO(content)), SAMPLE["image"].convert("RGB")).getbbox() is None


@pytest.mark.parametrize(
    ("options", "warned"),
    [({}, False), ({"server_name": "0.0.0.0"}, True), ({"server_name": "0.0.0.0", "auth": ("a", "b")}, False)],  # noqa: S104
)
def test_page_that_others_reach_without_a_login_is_warned_of(options, warned, monkeypatch, recwarn):
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **given: given)
    monkeypatch.setattr(ChatPage, "app_kwargs", lambda self: {})
    ChatPage().launch(**options)
    assert any("auth=" in str(each.message) for each in recwarn) == warned
