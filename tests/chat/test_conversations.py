"""Conversations on disk: who reads them again, what is deleted for good, and what a killed program leaves."""

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image, ImageChops

from chat_page import wait_until
from ov_mllama.chat.answers import Chat, GenerationSettings
from ov_mllama.chat.migrations import MIGRATIONS
from ov_mllama.chat.owners import COOKIE
from ov_mllama.chat.pages import Pages
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, STOPPED, WAITING, Turn
from ov_mllama.runtime.images import load_image

ME, OTHER = "me", "somebody else"
PROGRAMS, SAVES = 2, 15


@pytest.fixture
def kept(tmp_path):
    return Conversations(tmp_path / "data")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "cat.png"
    noise(0).save(path)
    return path


def noise(seed: int) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def same(one: Path, other) -> bool:
    """Return whether two images have the same pixels."""
    return ImageChops.difference(Image.open(one), load_image(other)).getbbox() is None


def titles(kept, owner: str) -> list[tuple[str, str]]:
    """Titles and ids of an owner's conversations, the latest first."""
    return [(chat.title, chat.id) for chat in kept.find(owner)]


def talk(kept, *questions: str, owner=ME) -> Conversation:
    """A conversation that is kept."""
    conversation = Conversation(owner, turns=[Turn(question, [], "Yes.", "2 s", ANSWERED) for question in questions])
    kept.save(conversation)
    return conversation


TOKEN, OTHER_TOKEN = "a" * 64, "b" * 64


def asks(session="tab", token=TOKEN, username=None, **query_params) -> SimpleNamespace:
    """A request as Gradio gives it."""
    cookies = {COOKIE: token} if token else {}
    return SimpleNamespace(session_hash=session, username=username, query_params=query_params, cookies=cookies)


def pages_of(kept, **options) -> Pages:
    """Pages of a model that is never asked."""
    model = SimpleNamespace(stats=SimpleNamespace(tokens_per_s=0))
    return Pages(Chat(model, None, kept), **options)


def another_program(kept) -> Conversations:
    return Conversations(kept.folder)


# ---- Read again -----------------------------------------------------------------------------------------------------


def test_another_program_reads_what_was_saved(kept, picture):
    conversation = Conversation(ME)
    pictures = [kept.store_file(conversation, picture)]
    conversation.turns = [
        Turn(" What is\nit? ", pictures, "A cat: “mrk”, 猫 🐈", "2 s", ANSWERED),
        Turn("And now?", [], "It", "limit", CUT),
    ]
    kept.save(conversation)
    again = another_program(kept).get(conversation.id, ME)
    assert again is not conversation
    assert (again.turns, again.title, again.owner) == (conversation.turns, "What is it?", ME)
    assert same(again.turns[0].pictures[0], picture)


def test_the_conversation_asked_last_is_first(kept):
    first, second, third = (talk(kept, name) for name in ("first", "second", "third"))
    talk(kept, "not mine", owner=OTHER)
    for written_on in (first, second, first):  # or the list would change under a person's hand while two are answered
        kept.save(written_on)
    assert titles(kept, ME) == [("third", third.id), ("second", second.id), ("first", first.id)]
    first.turns.append(Turn("more"))
    kept.save(first)
    assert titles(another_program(kept), ME) == [("first", first.id), ("third", third.id), ("second", second.id)]


def test_every_caller_gets_the_same_object(kept):
    conversation = talk(kept, "?")
    assert kept.get(conversation.id, ME) is conversation
    other = another_program(kept)
    assert other.get(conversation.id, ME) is other.get(conversation.id, ME)


def test_somebody_elses_is_none(kept):
    conversation = talk(kept, "?")
    for program in (kept, another_program(kept)):
        assert program.get(conversation.id, OTHER) is None
        assert program.get(conversation.id, "") is None
        assert titles(program, OTHER) == []
        assert program.get(conversation.id, ME)
    assert kept.get("no such", ME) is None


def test_one_that_nobody_asked_anything_is_not_kept(kept):
    conversation = Conversation(ME)
    kept.save(conversation)
    assert titles(kept, ME) == []
    assert kept.get(conversation.id, ME) is None


def test_one_whose_only_question_was_taken_back_is_not_kept(kept):
    conversation = talk(kept, "My secret?")
    version = kept.version
    conversation.turns.pop()
    kept.save(conversation)
    assert kept.version > version
    assert (titles(kept, ME), conversation.name) == ([], "New chat")
    assert another_program(kept).get(conversation.id, ME) is None
    conversation.turns.append(Turn("Another?"))
    kept.save(conversation)
    assert titles(kept, ME) == [("Another?", conversation.id)]


def test_titles(kept):
    assert talk(kept, " a\n b ").title == "a b"
    assert talk(kept, "  ").title == "A picture"
    long = talk(kept, "word " * 100)
    assert long.title.startswith("word word")
    assert len(long.title) <= 60
    long.title = ""
    kept.save(long)
    assert long.title
    assert Conversation(ME).name == "New chat"


def test_an_answer_that_the_programs_end_cut_off_is_stopped(kept):
    conversation = Conversation(ME, turns=[Turn("First?", [], "Yes.", "2 s", ANSWERED), Turn("And?", [], "It is")])
    kept.save(conversation)
    first, cut = another_program(kept).get(conversation.id, ME).turns
    assert (first.state, first.note) == (ANSWERED, "2 s")
    assert (cut.state, cut.answer, cut.note) == (STOPPED, "It is", "The program ended before the answer did.")
    assert kept.get(conversation.id, ME).turns[-1].state == WAITING  # in the program that answers it


def test_settings_are_a_persons(kept):
    assert kept.settings(ME) is None
    kept.save_settings(ME, ["Be brief.", 7, 0.5, 0.9])
    kept.save_settings(OTHER, ["", 8, 0.0, 0.9])
    kept.save_settings(ME, ["Be brief.", 9, 0.5, 0.9])
    assert another_program(kept).settings(ME) == ["Be brief.", 9, 0.5, 0.9]
    assert kept.settings(OTHER) == ["", 8, 0.0, 0.9]


# ---- Pictures -------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_picture_is_kept_once_under_its_own_name(kept, picture, tmp_path):
    conversation, other = Conversation(ME), Conversation(ME)
    copy = kept.store_file(conversation, picture)
    assert copy.name.endswith("-cat.png")
    assert same(copy, picture)
    assert kept.store_file(conversation, picture) == copy
    assert kept.store_file(conversation, copy) == copy  # a question taken back brings the copy
    assert files(kept.pictures) == [copy]
    assert kept.store_file(other, picture) != copy
    namesake = tmp_path / "elsewhere" / picture.name
    namesake.parent.mkdir()
    noise(1).save(namesake)
    assert same(kept.store_file(conversation, namesake), namesake)
    assert same(copy, picture)


def test_an_interrupted_copy_is_not_taken_for_the_picture(kept, picture, monkeypatch):
    conversation = Conversation(ME)

    def half(image, target, *args, **options):
        Path(target).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        kept.store_file(conversation, picture)
    monkeypatch.undo()
    assert files(kept.pictures) == []
    assert same(kept.store_file(conversation, picture), picture)


@pytest.mark.parametrize(
    "name",
    [
        "кот 猫 🐈 (1).png",
        " .png",
        "a%20b#c?.png",
        "x" * 251 + ".png",
        "猫" * 83 + ".png",
        "part",
        "...",
        "a\n[b](c).png",
    ],
    ids=["unicode", "space", "address", "long", "long unicode", "part", "dots", "markdown"],
)
def test_odd_file_names(kept, tmp_path, name):
    odd = tmp_path / name
    noise(0).save(odd, "PNG")
    conversation = Conversation(ME)
    conversation.turns = [Turn("?", [kept.store_file(conversation, odd)])]
    kept.save(conversation)
    (again,) = another_program(kept).get(conversation.id, ME).turns[0].pictures
    assert same(again, odd)
    assert re.fullmatch(r"[0-9a-f]{16}-[\w -]+\.png", again.name)


def test_what_is_deleted_is_gone(kept, picture):
    conversation, other = talk(kept, "?"), talk(kept, "Another?")
    for each in (conversation, other):
        each.turns[0].pictures = [kept.store_file(each, picture)]
        kept.save(each)
    kept.delete(conversation)
    kept.save(conversation)  # by an answer that was under way
    for program in (kept, another_program(kept)):
        assert program.get(conversation.id, ME) is None
        assert titles(program, ME) == [("Another?", other.id)]
    assert files(kept.pictures) == other.turns[0].pictures


@pytest.mark.parametrize("picture_first", [False, True])
def test_what_is_kept_is_the_users_alone(kept, picture, picture_first):
    conversation = talk(kept, "?") if not picture_first else Conversation(ME)
    kept.store_file(conversation, picture)
    folders = [kept.folder, *(path for path in kept.folder.rglob("*") if path.is_dir())]
    assert len(folders) == 3
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_any_text_is_kept(kept):
    for text in ("\ud800 \udfff\ud800", "\0\1", "'; DROP TABLE conversations; --", "x" * 100_000):
        conversation = talk(kept, text)
        assert another_program(kept).get(conversation.id, ME).turns[0].question == text
    assert len(titles(kept, ME)) == 4


def test_pictures_of_no_conversation_go_after_a_day(kept, picture):
    asked, dropped, new = talk(kept, "Whose?"), Conversation(ME), Conversation(ME)
    pictures = [kept.store_file(conversation, picture) for conversation in (asked, dropped, new)]
    for conversation in (asked, dropped):
        os.utime(kept.pictures / conversation.id, (0, 0))
    kept.delete_orphans()
    assert [path.is_file() for path in pictures] == [True, False, True]


def test_uploads_of_a_killed_program_go_after_a_day(kept):
    old, broken_off, new = (kept.uploads / name for name in ("old", "broken-off.part", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "picture.png").touch()
    broken_off.touch()
    (kept.uploads / "deleted meanwhile").symlink_to("nowhere")
    for path in (old, broken_off):
        os.utime(path, (0, 0))
    kept.delete_orphans()
    assert [*kept.uploads.rglob("*.p*")] == [new / "picture.png"]


# ---- Several at once ------------------------------------------------------------------------------------------------


def write(folder: Path, number: int) -> None:
    """The work of each of several programs."""
    kept = Conversations(folder)
    for i in range(SAVES):
        conversation = talk(kept, f"{number}.{i}")
        conversation.turns.append(Turn("more"))
        kept.save(conversation)
        kept.save_settings(f"user {number}", [i])


def test_programs_that_write_at_once_lose_nothing(kept, start):
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.append({here!r}); from test_conversations import Path, write\n"
    code += "write(Path(sys.argv[1]), int(sys.argv[2]))"
    programs = [start(code, kept.folder, number) for number in range(PROGRAMS)]
    assert [program.wait() for program in programs] == [0] * PROGRAMS
    found = titles(kept, ME)
    assert sorted(title for title, _ in found) == sorted(f"{n}.{i}" for n in range(PROGRAMS) for i in range(SAVES))
    assert {len(kept.get(key, ME).turns) for _, key in found} == {2}
    assert [kept.settings(f"user {number}") for number in range(PROGRAMS)] == [[SAVES - 1]] * PROGRAMS


# ---- The file's format ----------------------------------------------------------------------------------------------


def write_file(folder: Path, version: int, **owners: list) -> None:
    """A chat.sqlite3 as a version of the program has left it; `owners` by conversation."""
    folder.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(folder / "chat.sqlite3")) as database, database:
        database.executescript(MIGRATIONS[0])
        for key, (owner, turns) in owners.items():
            row = [key, owner, "A title", 1.0, json.dumps(turns)]
            database.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?)", row)
            database.execute("INSERT INTO settings VALUES (?, ?)", [owner, json.dumps(["Brief.", 7, 0, 0.9])])
        database.execute(f"PRAGMA user_version = {version}")


def test_file_of_an_earlier_version_is_migrated(kept):
    turn = {"question": "What?", "answer": "A cat.", "state": ANSWERED}
    token = "0123456789abcdef" * 2
    write_file(
        kept.folder,
        0,
        a=("alice-token", [turn]),
        b=("user alice", [turn]),
        c=(token, [turn]),
        d=("user user x", [turn]),
    )
    for program in (kept, another_program(kept)):  # once
        for key, owner in (("a", "browser:alice-token"), ("b", "user:alice"), ("d", "user:user x")):
            assert [name for _, name in titles(program, owner)] == [key]
            assert program.get(key, owner).turns[0].answer == "A cat."
            assert program.settings(owner) == ["Brief.", 7, 0, 0.9]
        assert [name for _, name in titles(program, f"browser:{token}")] == ["c"]
        for nobody in ("user alice", "alice-token", "browser:user alice"):
            assert titles(program, nobody) == []


def test_programs_that_migrate_at_once_do_it_once(tmp_path):
    write_file(tmp_path / "data", 0, a=("user alice", []))
    programs = [Conversations(tmp_path / "data") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert {len(found) for found in pool.map(lambda program: titles(program, "user:alice"), programs)} == {1}


@pytest.mark.parametrize("version", [len(MIGRATIONS) + 1, 1000])
def test_file_of_a_newer_version_is_refused_and_left_alone(kept, version):
    write_file(kept.folder, version, a=("user:alice", []))
    before = (kept.folder / "chat.sqlite3").read_bytes()
    for use in (kept.delete_orphans, lambda: titles(kept, "user:alice"), lambda: talk(kept, "?")):
        with pytest.raises(ValueError, match=f"chat.sqlite3 has format {version}.*update the program"):
            use()
    assert (kept.folder / "chat.sqlite3").read_bytes() == before


def test_migration_that_fails_changes_nothing(kept, monkeypatch):
    write_file(kept.folder, 0, a=("user alice", []))
    monkeypatch.setattr("ov_mllama.chat.migrations.MIGRATIONS", (*MIGRATIONS, "SELECT no_such_column FROM settings"))
    with pytest.raises(sqlite3.OperationalError):
        kept.delete_orphans()
    monkeypatch.undo()
    assert len(titles(kept, "user:alice")) == 1


def test_fields_of_other_versions(kept):
    turns = [{"question": "What?", "colour": "blue", "pictures": []}, {"answer": "Yes.", "state": ANSWERED}, {}]
    write_file(kept.folder, len(MIGRATIONS), a=(ME, turns))
    first, second, third = kept.get("a", ME).turns
    assert (first.question, first.state) == ("What?", STOPPED)
    assert (second.question, second.answer, second.pictures, second.remarks) == ("", "Yes.", [], [])
    assert third.question == ""


def test_picture_of_an_earlier_version_is_stored_anew_without_exif(kept, tmp_path):
    old = kept.pictures / "a" / "0123456789abcdef" / "cat.jpg"
    old.parent.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010F] = "Camera of somebody"
    noise(0).save(old, exif=exif)
    turn = {"question": "What?", "pictures": ["0123456789abcdef/cat.jpg", "0123456789abcdef/gone.heic"]}
    turn["pictures"] = [f"a/{name}" for name in turn["pictures"]]
    with contextlib.closing(sqlite3.connect(kept.folder / "chat.sqlite3")) as database, database:
        database.executescript(MIGRATIONS[0])
        database.execute("INSERT INTO conversations VALUES ('a', ?, 'A title', 1, ?)", ["user me", json.dumps([turn])])
    picture, gone = kept.get("a", "user:me").turns[0].pictures
    assert (picture.parent.parent, picture.suffix) == (kept.pictures, ".png")
    assert same(picture, old)
    assert b"Camera" not in picture.read_bytes()
    assert not gone.exists()


# ---- Saves that fail, and state without end -------------------------------------------------------------------------


def test_save_that_fails_is_repeated_until_it_succeeds(kept, monkeypatch):
    monkeypatch.setattr("ov_mllama.chat.answers.SAVE_EVERY_S", 0.05)
    chat, conversation = Chat(None, None, kept), Conversation(ME, turns=[Turn("?", state=ANSWERED)])
    titles(kept, ME)
    file, tried, real = kept.folder / "chat.sqlite3", [], kept.write

    def write(*given):
        tried.append(given)
        real(*given)

    monkeypatch.setattr(kept, "write", write)
    with contextlib.closing(sqlite3.connect(file)) as other:
        monkeypatch.setattr("ov_mllama.chat.store.TIMEOUT_S", 0.01)
        other.execute("BEGIN EXCLUSIVE")
        chat.save(conversation)
        wait_until(lambda: len(tried) > 2)
        assert "could not be saved (database is locked)" in conversation.unsaved
        other.rollback()
    wait_until(lambda: not conversation.unsaved)
    assert another_program(kept).get(conversation.id, ME).turns == conversation.turns
    chat.flush()
    count = len(tried)
    chat.save(conversation)
    chat.flush()
    assert len(tried) == count + 1


def test_event_loop_does_not_wait_for_the_database(kept, monkeypatch):
    pages, request = pages_of(kept), asks()
    kept.delete_orphans()

    async def ticks_while(coroutine) -> int:
        task, ticks = asyncio.create_task(coroutine), 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with contextlib.suppress(gr.Error):
            task.result()
        return ticks

    async def locked():
        await pages.open("", request)
        kept.version += 1
        talk = pages.page(request).conversation
        talk.turns.append(Turn("?", state=ANSWERED))
        with contextlib.closing(sqlite3.connect(kept.folder / "chat.sqlite3")) as other:
            other.execute("BEGIN EXCLUSIVE")
            return [
                await ticks_while(pages.poll("opened", "", "", request)),
                await ticks_while(pages.open("", request)),
                await ticks_while(pages.reopen("no such", request)),
                await ticks_while(pages.choose("opened", request, *GenerationSettings())),
                await ticks_while(pages.delete("yes", request)),
            ]

    monkeypatch.setattr("ov_mllama.chat.store.TIMEOUT_S", 0.3)
    assert min(asyncio.run(locked())[:4]) > 3


def test_conversation_that_could_not_be_deleted_is_still_there(kept, monkeypatch):
    conversation = talk(kept, "?")
    monkeypatch.setattr("ov_mllama.chat.store.TIMEOUT_S", 0.01)
    with contextlib.closing(sqlite3.connect(kept.folder / "chat.sqlite3")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError):
            kept.delete(conversation)
    assert kept.get(conversation.id, ME) is conversation
    kept.delete(conversation)
    assert titles(kept, ME) == []


def test_state_of_sessions_that_strangers_name_is_bounded(kept, monkeypatch):
    monkeypatch.setattr("ov_mllama.chat.tabs.MAX_PAGES", 10)
    monkeypatch.setattr("ov_mllama.chat.tabs.MAX_PROGRAMS", 5)
    pages = pages_of(kept)

    async def answer(*_):
        pass

    monkeypatch.setattr(pages.chat, "answer", answer)

    async def flood():
        for i in range(50):
            request = asks(f"session {i}", f"{i:064x}")
            await pages.poll("opened", "", "", request)
            await pages.api_chat({"text": "?", "files": []}, request, *GenerationSettings())
        for _ in range(300):
            await pages.api_chat({"text": "?", "files": []}, request, *GenerationSettings())
        return request

    last = asyncio.run(flood())
    state = {name: len(value) for name, value in vars(pages).items() if isinstance(value, dict)}
    assert max(state.values()) <= 10, state
    assert max(len(turns) for turns in pages._programs.values()) <= 200  # noqa: SLF001
    assert pages.page(last)


def test_remark_on_a_picture_of_several_frames_is_kept(kept, tmp_path):
    file = tmp_path / "moving.gif"
    noise(0).save(file, save_all=True, append_images=[noise(1)])
    with pytest.warns(UserWarning, match="several frames"):
        _, remark = pages_of(kept)._store(Conversation(ME), file)  # noqa: SLF001
    assert remark == "moving.gif has several frames: the first one is used."


# ---- Answers that are given up --------------------------------------------------------------------------------------


class Waiter(Chat):
    """A chat whose answers take for ever."""

    async def answer(self, turns, progress, wishes, uploads=()):
        try:
            turns[-1].answer = "It is"
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            turns[-1].state = STOPPED
            raise


def in_a_chat(kept, steps) -> Conversation:
    """A conversation after `steps(chat, conversation)`, a coroutine."""
    conversation = Conversation(ME, turns=[Turn("?")])
    chat = Waiter(None, None, kept)

    async def run():
        await steps(chat, conversation)
        assert chat.answering(conversation) is None

    asyncio.run(run())
    return conversation


def assert_stopped(kept, conversation, answer: str) -> None:
    """Here and in what is kept."""
    for each in (conversation, another_program(kept).get(conversation.id, ME)):
        assert (each.turns[-1].state, each.turns[-1].answer, each.turns[-1].note) == (STOPPED, answer, "")


def test_stopped_before_its_first_step(kept):
    async def steps(chat, conversation):
        chat.begin(conversation, GenerationSettings())
        assert chat.answering(conversation)
        await chat.stop(conversation)

    assert_stopped(kept, in_a_chat(kept, steps), "")


def test_stopped_between_words(kept):
    async def steps(chat, conversation):
        chat.begin(conversation, GenerationSettings())
        await asyncio.sleep(0.05)
        assert another_program(kept).get(conversation.id, ME)  # kept from the first moment on
        await chat.stop(conversation)

    assert_stopped(kept, in_a_chat(kept, steps), "It is")


def test_stop_with_nothing_to_stop(kept):
    async def steps(chat, conversation):
        await chat.stop(conversation)

    assert in_a_chat(kept, steps).turns[-1].state == WAITING


def test_several_who_begin_anew_at_once_get_one_answer(kept):
    async def steps(chat, conversation):
        async def retry():
            await chat.stop(conversation)
            chat.begin(conversation, GenerationSettings())
            return chat.answering(conversation).task

        chat.begin(conversation, GenerationSettings())
        await asyncio.sleep(0.05)
        tasks = await asyncio.gather(*(retry() for _ in range(3)))
        await asyncio.sleep(0.05)
        (under_way,) = [task for task in tasks if not task.done()]
        assert chat.answering(conversation).task is under_way
        await chat.stop(conversation)

    assert_stopped(kept, in_a_chat(kept, steps), "It is")


def test_a_page_is_shown_and_keeps_settings_only_once_it_was_opened(kept):
    me = f"browser:{TOKEN}"
    conversation = talk(kept, "?", owner=me)
    pages, request = pages_of(kept), asks(chat=conversation.id)
    kept.save_settings(me, ["Be brief.", 7, 0, 0.9])

    async def load():
        assert await pages.poll("", "", "", request) == gr.skip()
        await pages.choose("", request, *GenerationSettings())
        opened, former, *settings = await pages.open("", request)
        assert (bool(opened), former, settings) == (True, "", ["Be brief.", 7, 0, 0.9, "high", None, None, None, ""])
        assert await pages.poll(opened, "", "", request)
        return await pages.refresh("", request)

    assert conversation.id in asyncio.run(load())
    assert pages.page(request).conversation is conversation


def test_what_is_no_longer_there_is_said(kept, tmp_path):
    pages, request = pages_of(kept), asks()

    async def ask():
        await pages.open("", request)
        assert await pages.undo(None, request) == gr.skip()
        await pages.retry(request, *GenerationSettings())
        await pages.ask({"text": "?", "files": [str(tmp_path / "gone.png")]}, request, *GenerationSettings())

    with pytest.raises(gr.Error, match="gone.png has waited too long"):
        asyncio.run(ask())
