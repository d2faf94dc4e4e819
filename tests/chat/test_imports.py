"""Import of exported chats: what was exported comes back, and of a hostile .zip nothing is left behind."""

import io
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gradio.utils import get_upload_folder
from PIL import Image, ImageChops

from chat_client import Client, asked
from chat_page import expect, path_of
from conftest import demo_samples
from ov_mllama.chat import imports
from ov_mllama.chat.imports import FORMAT, VERSION, import_chat
from ov_mllama.chat.render import write_export
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, STOPPED, Turn
from ov_mllama.runtime.errors import InputError

ME, IMPORTER = "user:me", "user:importer"
SAMPLE = demo_samples()[0]


@pytest.fixture
def store(tmp_path):
    return Conversations(tmp_path / "data")


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 9, 3), dtype=np.uint8))


def png() -> bytes:
    file = io.BytesIO()
    noise(0).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def exported(store):
    """A chat and its export."""
    chat = Conversation(ME, title="Zahlen & Bilder", temporary=False)
    chat.turns = [
        Turn(" What?\n<b> \ud800", [store.store_image(chat, noise(i), f"cat {i}") for i in (0, 1)], "A **cat** 猫"),
        Turn("And now?", [], "It", "limit", CUT, 1234.5, ["a.gif has several frames"], "low"),
    ]
    chat.turns[0].state, chat.turns[0].asked = ANSWERED, 1000.0
    store.save(chat)
    return chat, Path(write_export(chat))


def test_what_was_exported_comes_back_as_a_chat_of_the_importer(store, exported):
    chat, file = exported
    imported = import_chat(file, store, IMPORTER)
    again = Conversations(store.folder).get(imported.id, IMPORTER)
    assert (again.title, imported.id != chat.id) == (chat.title, True)
    for old, new in zip(chat.turns, again.turns, strict=True):
        for name in ("question", "answer", "note", "state", "asked", "remarks", "detail"):
            assert getattr(old, name) == getattr(new, name)
        for one, other in zip(old.pictures, new.pictures, strict=True):
            assert other.parent.name == imported.id
            assert ImageChops.difference(Image.open(one), Image.open(other)).getbbox() is None
    assert store.get(imported.id, ME) is None
    assert [each.title for each in store.find(IMPORTER)] == [chat.title]
    store.delete(chat)
    assert all(picture.is_file() for picture in again.turns[0].pictures)


def written(folder: Path, chat=None, **members) -> Path:
    """A .zip of these files; `chat` is put into chat.json."""
    path = folder / "chat.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if chat is not None:
            archive.writestr("chat.json", chat if isinstance(chat, (str, bytes)) else json.dumps(chat))
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def export_of(*turns: dict, **fields) -> dict:
    return {"format": FORMAT, "version": VERSION, "title": "T", "turns": list(turns), **fields}


def refused(store, file: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_chat(file, store, IMPORTER)
    assert store.find(IMPORTER) == []
    assert [*store.folder.rglob("*.png")] == []


TURN = {"question": "What?", "answer": "A cat."}


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (None, "has no chat.json"),
        ("{", "is broken"),
        (b"\xff\xfe\x00", "is broken"),
        ("[" * 100_000, "is broken"),
        ([], "of another program"),
        ({"title": "ChatGPT", "mapping": {}}, "of another program"),
        (export_of(TURN, version=2), "version 2; this program knows 1: update"),
        (export_of(TURN, version="1" * 900), "version 1{20}; "),
        (export_of(), "no turns"),
        (export_of(*[TURN] * 10_001), "more than 10000"),
        (export_of(TURN, turns={"0": TURN}), "no turns"),
        (export_of(TURN, title="x" * 101), "field title"),
        (export_of(TURN, title=7), "field title"),
        (export_of("turn"), "turn of the export"),
        (export_of({**TURN, "question": None}), "field question"),
        (export_of({**TURN, "question": "x" * 500_001}), "field question"),
        (export_of({**TURN, "asked": float("nan")}), "field asked"),
        (export_of({**TURN, "asked": True}), "field asked"),
        (export_of({**TURN, "asked": 10**400}), "field asked"),
        (export_of({**TURN, "state": "thinking"}), "field state"),
        (export_of({**TURN, "state": ["answered"]}), "field state"),
        (export_of({**TURN, "detail": {}}), "field detail"),
        (export_of({**TURN, "remarks": [1]}), "field remarks"),
        (export_of({**TURN, "pictures": "pictures/a.png"}), "field pictures"),
        (export_of({**TURN, "pictures": ["a.png"] * 101}), "field pictures"),
        (export_of({**TURN, "pictures": ["pictures/missing.png"]}), "has no pictures/missing.png"),
        (export_of({**TURN, "pictures": ["/etc/hostname"]}), "has no /etc/hostname"),
        (export_of({**TURN, "pictures": ["../../data/chat.sqlite3"]}), "has no ../../data/chat.sqlite3"),
        (export_of({**TURN, "pictures": ["chat.json"]}), "chat.json in the .zip cannot be used"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_what_no_export_has_is_refused(store, tmp_path, chat, message):
    refused(store, written(tmp_path, chat), message)


def test_values_that_could_mislead_are_bounded(store, tmp_path):
    later = {**TURN, "state": "waiting", "asked": 1e300, "colour": "blue", "note": "<b>"}
    imported = import_chat(written(tmp_path, export_of({"question": "?", "asked": -5}, later)), store, IMPORTER)
    first, second = imported.turns
    assert (first.asked, second.asked < 1e11, second.state) == (0.0, True, STOPPED)


@pytest.mark.parametrize(
    "name", ["../../../evil.png", "/evil.png", "C:\\evil.png", "..", "a/../../evil.png", "~/x", "."]
)
def test_names_in_a_zip_are_no_paths(store, tmp_path, name):
    file = written(tmp_path, export_of({**TURN, "pictures": [name]}), **{name: png()})
    imported = import_chat(file, store, IMPORTER)
    [picture] = imported.turns[0].pictures
    assert picture.parent == store.pictures / imported.id
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".zip", ".png", ".sqlite3"}
    assert len([*tmp_path.rglob("*.png")]) == 1


def test_zip_bombs_are_read_up_to_a_limit(store, tmp_path, monkeypatch):
    monkeypatch.setattr(imports, "MAX_JSON_BYTES", 2_000_000)
    monkeypatch.setattr(imports, "MAX_PICTURE_BYTES", 2_000_000)
    refused(store, written(tmp_path, " " * 2_000_001), "more than 2 MB")
    bomb = written(tmp_path, export_of({**TURN, "pictures": ["a.png"]}), **{"a.png": png() + bytes(3_000_000)})
    refused(store, bomb, "a.png in the .zip has more than 2 MB")
    content = bytearray(bomb.read_bytes())  # it claims to be small
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.rindex(signature) + at
        content[start : start + 4] = (100).to_bytes(4, "little")
    bomb.write_bytes(content)
    refused(store, bomb, "broken")
    monkeypatch.setattr(imports, "MAX_PICTURES_BYTES", len(png()) + 10)
    two = {"a.png": png(), "b.png": png()}
    refused(store, written(tmp_path, export_of({**TURN, "pictures": [*two]}), **two), "more than 0 MB")


def test_pictures_that_are_none_leave_nothing_behind(store, tmp_path):
    for content in (b"no picture", b"<svg/>", png()[:50], b""):
        members = {"good.png": png(), "bad.png": content}
        file = written(tmp_path, export_of({**TURN, "pictures": [*members]}), **members)
        refused(store, file, "bad.png in the .zip cannot be used")


def test_broken_files_raise_only_errors_for_users(store, exported, tmp_path, times, tally):
    content, wrong, random_ = exported[1].read_bytes(), [], random.Random(1)  # noqa: S311
    broken = tmp_path / "broken.zip"
    count = times(150, 5000)
    for i in range(count):
        changed = bytearray(content[: random_.randrange(len(content))] if i % 5 == 0 else content)
        for _ in range(random_.randrange(1, 20) if changed else 0):
            at = random_.randrange(len(changed) // 2 * (i % 2), len(changed))
            changed[at] = random_.randrange(256)
        broken.write_bytes(changed)
        try:
            import_chat(broken, store, IMPORTER)
        except InputError:
            pass
        except Exception as error:
            wrong.append((i, repr(error)))
    stored = {chat.id for chat in store.find(IMPORTER)} | {exported[0].id}
    assert {folder.name for folder in store.pictures.iterdir()} <= stored
    tally("broken exports", count, wrong)


# ---- A program, and a browser ---------------------------------------------------------------------------------------


def test_program_imports_uploads_only(demo, url, says):
    says.text = "Yes."
    client, other = asked(Client(demo, url).open(), "Seen a bird?"), Client(demo, url).open()
    export = client.call("export")[0]
    path = (export.get("value") or export)["path"]
    other.call("import_chat", {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert [title for title, _ in other.titles()] == ["Seen a bird?"]
    assert other.titles() != client.titles()
    database = str(demo.chat.conversations.folder / "chat.sqlite3")
    for file in (database, "/etc/hostname", "", None, 7, ["x"], {"path": database}, {}):
        other.call("import_chat", file)
        assert len(other.titles()) == 1
    text = other.upload("a.zip", b"PK no zip")
    assert Path(text).is_relative_to(get_upload_folder())
    other.call("import_chat", {"path": text, "meta": {"_type": "gradio.FileData"}})
    assert "no .zip that can be read" in other.shown()


@pytest.mark.returning
def test_exported_chat_is_imported_on_the_page(page, tmp_path):
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    before = page.history.count()
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="Export").click()
    file = tmp_path / "chat.zip"
    download.value.save_as(file)
    page.new_chat()
    page.tab.locator(".tools input[type=file]").set_input_files(str(file))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    expect(page.history).to_have_count(before + 1)
    expect(page.tab.locator("[role=log] [data-testid=user] img")).to_have_count(1)
