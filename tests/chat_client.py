"""Programs that send to the chat what one of its pages would, or anything else."""

import io
import json
import re
import secrets
import ssl
import zipfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image

from chat_page import wait_until
from conftest import demo_samples

SAMPLE = demo_samples()[0]
SETTINGS = ["", 8, 0, 0.9, "high", None, None, None, ""]
SECRET = Image.new("RGB", (23, 17), "purple")
META = {"_type": "gradio.FileData"}
VERIFY = ssl.create_default_context()  # one for all: each new one reads its certificates for 30 ms


@contextmanager
def launched(demo, **options):
    _, url, _ = demo.launch(prevent_thread_lock=True, **options)
    try:
        yield url
    finally:
        demo.close()


def stored(folder: Path) -> list[Path]:
    """Pictures of conversations."""
    return [path for path in (folder / "pictures").rglob("*") if path.is_file()]


def pixels_of(paths: Iterable[Path]) -> list[bytes]:
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
        self.http = httpx.Client(base_url=url, timeout=30, follow_redirects=True, verify=VERIFY)
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
        """Titles and ids of the chats in its list, in all groups."""
        groups = [part for part in self.call("refresh", "")[9:] if isinstance(part, dict)]
        return [row for group in groups if group.get("label") for row in group.get("choices", [])]

    def ask(self, text: str, *files) -> "Client":
        """Asks, and waits until the answer, "Yes.", is there."""
        self.call("ask", {"text": text, "files": [{"path": file, "meta": META} for file in files]}, *SETTINGS)
        wait_until(lambda: "Yes." in (shown := self.shown()) and text in shown)
        return self

    def pictures(self) -> list[str]:
        """Paths of the pictures that are shown."""
        return re.findall(r'"path": "([^"]+)"', json.dumps(self.call("refresh", "")[2]))


def png(image=SAMPLE["image"]) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def assert_nothing_of(victim: Client, stranger: Client, question: str) -> None:
    """A stranger who knows session, conversation and picture of a page gets and changes nothing."""
    (key, *_), pictures = [victim.call("refresh", "")[5]], victim.pictures()
    before = victim.call("refresh", "")[2:]
    for session in (victim.session, stranger.session):
        stranger.call("poll", "opened", key, "", session=session)
        for name, data in (
            ("reopen", [key]),
            ("pin", []),
            ("delete_selected", [[key], "yes"]),
            ("search", [question.split()[0]]),
            ("stop", []),
            ("undo", [{"text": "", "files": []}]),
            ("retry", SETTINGS),
            ("rename", ["stolen", key]),
            ("ask", [{"text": "stolen", "files": []}, *SETTINGS]),
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
