"""Chats are found again: search, groups by day, pins, several deleted at once; temporary ones leave nothing."""

import asyncio
import contextlib
import datetime
import gc
import json
import re
import sqlite3
import time
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image

from chat_client import SETTINGS, Client, asked, png
from chat_page import SELF, WHO, expect, path_of, wait_until
from conftest import demo_samples
from ov_mllama.chat.answers import Chat
from ov_mllama.chat.decoding import GenerationSettings
from ov_mllama.chat.migrations import MIGRATIONS
from ov_mllama.chat.owners import COOKIE
from ov_mllama.chat.pages import Pages
from ov_mllama.chat.search import MAX_GROUPS, MAX_LISTED, ListedChat, day_group, find, grouped
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, Turn

TOKEN = "a" * 64
ME, OTHER = f"browser:{TOKEN}", "browser:other"
DAY_S = 24 * 60 * 60
REQUEST = SimpleNamespace(session_hash="tab", username=None, query_params={}, cookies={COOKIE: TOKEN})
LIST = slice(9, None)  # outputs of `refresh`


@pytest.fixture
def store(tmp_path):
    return Conversations(tmp_path / "data")


def talk(store, question: str, answer="Yes.", owner=ME, age_days=0.0) -> Conversation:
    """A stored conversation."""
    asked = time.time() - age_days * DAY_S
    conversation = Conversation(owner, turns=[Turn(question, [], answer, "2 s", ANSWERED, asked)])
    store.save(conversation)
    return conversation


def found(store, query: str, owner=ME) -> list[str]:
    return [chat.title for chat in store.find(owner, query)]


# ---- Search ---------------------------------------------------------------------------------------------------------


def test_search_covers_questions_answers_titles_and_prefixes(store):
    bird = talk(store, "Which bird is it?", "A Blue Tit (Cyanistes caeruleus)")
    bird.title = "Garden"
    store.save(bird)
    talk(store, "Größe der Straße?", "Café au lait, tiếng Việt")
    talk(store, "数える: いくつありますか", "三つあります")
    for query in ("bird", "BLUE tit", "caer", "garden", "garde blue", "tit (cyan", "bird?"):
        assert found(store, query) == ["Garden"], query
    for query in ("größe", "GRO", "cafe", "tieng viet", "straß"):
        assert found(store, query) == ["Größe der Straße?"], query
    for query in ("いくつ", "三つ", "数える:"):
        assert found(store, query) == ["数える: いくつありますか"], query
    for query in ("ird", "blue garage", "いくら"):
        assert found(store, query) == [], query
    assert len(found(store, "")) == len(found(store, "  ")) == 3


def test_index_follows_each_change(store):
    chat, pinned = talk(store, "First?", "alpha"), talk(store, "Second?", "beta")
    store.pin(pinned, True)
    chat.turns[0].answer = "gamma"
    for each in (chat, pinned):
        store.save(each)  # replaces its row
    assert (found(store, "alpha"), found(store, "gamma")) == ([], ["First?"])
    assert store.is_pinned(pinned.id)
    store.adopt(ME, OTHER)
    assert (found(store, "gamma"), found(store, "gamma", OTHER)) == ([], ["First?"])
    store.delete(chat, pinned)
    with sqlite3.connect(store.folder / "chat.sqlite3") as database:
        assert database.execute("SELECT count(*) FROM texts, listed").fetchone() == (0,)
        database.execute("CREATE VIRTUAL TABLE terms USING fts5vocab (texts, row)")
        assert database.execute("SELECT term FROM terms").fetchall() == []
    assert b"gamma" not in b"".join(row for row in index_blocks(store))


def index_blocks(store) -> list[bytes]:
    with contextlib.closing(sqlite3.connect(store.folder / "chat.sqlite3")) as database:
        return [block for (block,) in database.execute("SELECT block FROM texts_data")]


@pytest.mark.parametrize(
    "query",
    [
        *(
            '"',
            "'",
            "*",
            "a*",
            "AND",
            "a AND",
            "NOT b",
            "NEAR(a b)",
            "text:a",
            "{text}: a",
            "-a",
            "^a",
            "(",
            ")",
            "a\0b",
        ),
        *(
            "\ud800",
            "%",
            "_",
            "\\",
            "x" * 200,
            '" OR "',
            "a + b",
            'a"',
            '"b',
            'a"b',
            'a" OR "b',
            "?",
            "\u202e",
            " ".join("a" * 100),
            "; DROP TABLE texts",
        ),
    ],
)
def test_no_text_is_syntax_of_a_search(store, query):
    talk(store, "nothing like it")
    assert found(store, query) == []


def test_texts_that_are_no_unicode_are_indexed(store):
    talk(store, "\ud800 odd \0 text", "surrogate \udfff end")
    assert len(found(store, "odd end")) == 1


def test_search_never_finds_anothers(store):
    talk(store, "Mine: bird")
    talk(store, "Theirs: bird, 数える", owner=OTHER)
    for query in ("bird", "数", ""):
        assert "Theirs: bird, 数える" not in found(store, query)
    assert found(store, "bird", "") == []


def test_search_reads_the_index_and_no_more_rows_than_are_listed(store):
    for i in range(MAX_LISTED + 5):
        talk(store, f"Number {i}", "about a bird" if i % 2 else "about a fish")
    statements = []
    with store._database() as database:
        database.set_trace_callback(statements.append)
        assert len(find(database, ME, "bird", 7)) == 7
        statement = next(each for each in statements if each.startswith("SELECT title"))
        first, *others = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]
    assert re.fullmatch(r"SCAN texts VIRTUAL TABLE INDEX \d+:M\d*", first)
    assert not any("SCAN" in other for other in others)


def test_chats_of_earlier_versions_are_indexed_by_the_migration(store):
    store.folder.mkdir()
    with contextlib.closing(sqlite3.connect(store.folder / "chat.sqlite3")) as database, database:
        database.executescript(MIGRATIONS[0])
        for key, turns in (
            ("a", json.dumps([{"question": "Which bird?", "answer": "A wren"}, {"question": "And?"}, {}])),
            ("b", "[broken"),
        ):
            row = [key, f"user {key}", f"Title {key}", 1.0, turns]
            database.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?)", row)
    assert found(store, "wren bird", "user:a") == ["Title a"]
    assert found(store, "title", "user:b") == ["Title b"]


# ---- The list -------------------------------------------------------------------------------------------------------


def test_groups_by_day():
    today = datetime.date(2026, 3, 20)

    def heading(*day) -> str:
        return day_group(datetime.datetime(*day, 12).timestamp(), today)

    assert [heading(2026, 3, day) for day in (21, 20, 19, 18, 13, 12)] == [
        *("Today", "Today", "Yesterday", "Previous 7 days", "Previous 7 days", "Previous 30 days")
    ]
    assert [heading(2026, 2, 18), heading(2026, 2, 17), heading(2025, 12, 1)] == [
        *("Previous 30 days", "February", "December 2025")
    ]


def test_groups_are_bounded_and_pinned_chats_are_on_top():
    noon = datetime.datetime(2026, 12, 31, 12)
    chats = [ListedChat("Old", "p", 0.0, True)]
    chats += [
        ListedChat(f"{i}", f"{i}", (noon - datetime.timedelta(days=31 * i)).timestamp(), False) for i in range(30)
    ]
    rows = grouped(chats, noon.date())
    assert len(rows) == MAX_GROUPS
    assert (rows[0], rows[1][0], rows[-1][0]) == (("Pinned", [("Old", "p")]), "Today", "Older")
    assert [key for _, group in rows for _, key in group] == [chat.id for chat in chats]


class Tab:
    """A page of handlers alone, with a model that is never asked."""

    def __init__(self, store):
        model = SimpleNamespace(stats=SimpleNamespace(tokens_per_s=0))
        self.pages = Pages(Chat(model, None, store))
        self.call("poll", "opened", "", "")

    def call(self, name: str, *data):
        return asyncio.run(getattr(self.pages, name)(*data, REQUEST))

    @property
    def page(self):
        return self.pages.page(REQUEST)

    def listed(self) -> list[tuple[str, list[str]]]:
        """Headings and titles of the list."""
        parts = self.call("refresh", "")[LIST][:MAX_GROUPS]
        groups = [part for part in parts if isinstance(part, gr.Radio) and part.visible]
        return [(group.label, [title for title, _ in group.choices]) for group in groups]


def test_list_shows_the_latest_and_more_on_request(store):
    for i in range(MAX_LISTED + 5):
        talk(store, f"Number {i}", age_days=i / 1000)
    tab = Tab(store)
    sent = lambda: sum(len(titles) for _, titles in tab.listed())  # noqa: E731
    assert sent() == MAX_LISTED
    assert tab.page.more
    tab.call("show_more")
    assert sent() == MAX_LISTED + 5
    assert not tab.page.more
    tab.call("search", "number 10")
    assert tab.listed()[0][1][0] == "Number 10"
    assert sent() == 6  # 10 and 100 to 104
    for query in ("x" * 201, ["a"], None):
        with pytest.raises(gr.Error, match="search"):
            tab.call("search", query)


def test_pinned_chat_is_on_top_until_it_is_unpinned(store):
    old, _ = talk(store, "Old", age_days=40), talk(store, "New")
    tab = Tab(store)
    tab.call("reopen", old.id)
    tab.call("pin")
    assert tab.listed()[0] == ("Pinned", ["Old"])
    assert tab.call("refresh", "")[4] == "Unpin"
    assert Conversations(store.folder).is_pinned(old.id)
    tab.call("pin")
    assert tab.listed()[0] == ("Today", ["New"])
    assert tab.call("refresh", "")[4] == "Pin"


def test_several_are_deleted_if_their_owner_is_sure_and_anothers_stay(store, tmp_path):
    mine, stays, theirs = talk(store, "One"), talk(store, "Two"), talk(store, "Three", owner=OTHER)
    for each in (mine, theirs):
        each.turns[0].pictures = [store.store_image(each, Image.new("RGB", (9, 9)), "a")]
        store.save(each)
    tab = Tab(store)
    tab.call("reopen", mine.id)
    tab.call("select")
    keys = [mine.id, theirs.id, "no such", "\ud800", 7, None, ["x"], {}]
    tab.call("delete_selected", keys, "")
    assert len(found(store, "")) == 2
    tab.call("delete_selected", keys, "yes")
    assert (found(store, ""), found(store, "", OTHER)) == (["Two"], ["Three"])
    assert [folder.name for folder in store.pictures.iterdir()] == [theirs.id]
    assert tab.listed() == [("Today", ["Two"])]
    assert tab.page.conversation is not mine
    assert store.get(stays.id, ME)
    for keys in (None, "x", {"a": 1}, ["x"] * 10_001):
        with pytest.raises(gr.Error, match="at most"):
            tab.call("delete_selected", keys, "yes")


def test_deletion_of_several_that_fails_deletes_none(store, monkeypatch):
    chats = [talk(store, name) for name in ("One", "Two")]
    monkeypatch.setattr("ov_mllama.chat.store.TIMEOUT_S", 0.01)
    tab = Tab(store)
    with contextlib.closing(sqlite3.connect(store.folder / "chat.sqlite3")) as other:
        other.execute("BEGIN EXCLUSIVE")
        tab.page.groups = [("before", [])]
        tab.page.listed_as = None
        with pytest.raises(gr.Error, match="cannot be read or written"):
            tab.call("delete_selected", [chat.id for chat in chats], "yes")
        assert tab.listed() == [("before", [])]  # an old list rather than none
    assert not any(chat.deleted for chat in chats)
    assert sorted(found(store, "")) == ["One", "Two"]


# ---- Temporary chats ------------------------------------------------------------------------------------------------


def test_temporary_chat_is_stored_nowhere(store):
    tab = Tab(store)
    tab.call("begin_temporary")
    chat = tab.page.conversation
    chat.turns = [Turn("A secret?", [store.store_image(chat, Image.new("RGB", (9, 9)), "a")], "Yes.", "", ANSWERED)]
    assert store.owner(chat.id) == ME  # or its picture could not be shown
    tab.pages.chat.save(chat)
    tab.call("pin")
    tab.pages.chat.flush()
    shown = tab.call("refresh", "")
    assert (shown[5], "not stored" in shown[7], shown[6]) == ("temporary", True, "A secret?")
    assert (found(store, ""), tab.listed()) == ([], [])
    del chat, shown
    tab.call("begin_new")
    tab.call("refresh", "")
    gc.collect()
    assert [*store.pictures.iterdir()] == []
    assert b"secret" not in (store.folder / "chat.sqlite3").read_bytes()


@pytest.mark.parametrize("leave", ["on_close", "delete", "reopen", "program"])
def test_pictures_of_a_temporary_chat_go_with_it(store, leave):
    tab, removed = Tab(store), []
    tab.pages.chat.remove_encoded = removed.extend
    tab.call("begin_temporary")
    chat = tab.page.conversation
    picture = store.store_image(chat, Image.new("RGB", (9, 9)), "a")
    chat.turns = [Turn("A secret?", [picture], "Yes.", "", ANSWERED)]
    del chat
    if leave == "program":
        store.delete_temporary()
    else:
        tab.call(leave, *{"delete": ["yes"], "reopen": ["no such"]}.get(leave, []))
        assert removed == [picture]
    gc.collect()
    if leave == "delete":
        tab.call("refresh", "")
    assert not picture.exists()


def test_temporary_tab_stays_temporary_when_it_connects_again(store):
    tab = Tab(store)
    tab.call("begin_temporary")
    chat = tab.page.conversation
    chat.turns = [Turn("A secret?", [], "Yes.", "", ANSWERED)]
    key = tab.call("refresh", "")[5]
    tab.pages._pages.clear()  # as a restart of the server does
    assert tab.call("poll", "opened", key, "")
    assert tab.page.conversation.temporary
    assert tab.page.conversation is not chat
    assert "The connection was lost, and with it the temporary chat" in tab.call("refresh", "")[7]
    store._open[chat.id] = chat
    for again in (tab.pages.connect(chat.id, REQUEST), tab.pages.reopen(chat.id, REQUEST)):
        asyncio.run(again)
        assert tab.page.conversation is not chat  # nobody else may end it


def test_pictures_are_not_encoded_ahead_for_a_temporary_chat(store, monkeypatch):
    tab, ahead = Tab(store), []
    monkeypatch.setattr("ov_mllama.chat.pages.images_of", lambda message: [Path("a.png")])
    tab.pages.chat.prefetcher.prefetch = lambda key, images, detail="high": ahead.append(images)
    tab.call("on_typing", {}, "high")
    tab.call("begin_temporary")
    tab.call("on_typing", {}, "high")
    assert ahead == [[Path("a.png")], []]


def test_selection_stays_when_the_list_changes(store):
    one, _ = talk(store, "One?"), talk(store, "Two?")
    tab = Tab(store)
    tab.call("select")
    tab.call("tick", [one.id, 5])
    talk(store, "Three?")
    (boxes,) = [part for part in tab.call("refresh", "") if isinstance(part, gr.CheckboxGroup)]
    assert boxes.value == [one.id]
    assert len(boxes.choices) == 3


def test_late_rename_does_not_reach_another_chat(store):
    tab, one, two = Tab(store), talk(store, "One?"), talk(store, "Two?")
    tab.call("reopen", two.id)
    assert tab.call("rename", "Mine", one.id) == two.name == "Two?"
    assert tab.call("rename", "Mine", two.id) == "Mine"


def test_undo_leaves_a_draft_in_the_box_and_no_folder(store):
    tab, chat = Tab(store), talk(store, "One?")
    picture = store.store_image(chat, Image.new("RGB", (9, 9)), "a")
    chat.turns[0].pictures = [picture]
    tab.call("reopen", chat.id)
    box = tab.call("undo", {"text": "My draft", "files": []})
    assert (box["text"], len(box["files"])) == ("One?\nMy draft", 1)
    assert not picture.parent.exists()


def test_question_to_a_chat_that_is_deleted_meanwhile_leaves_nothing(store):
    tab, chat = Tab(store), talk(store, "One?")
    tab.call("reopen", chat.id)

    def slow(conversation, image):
        store.delete(conversation)
        return store.store_image(conversation, Image.new("RGB", (9, 9)), "a"), ""

    tab.pages._store = slow
    with pytest.raises(gr.Error, match="has ended meanwhile"):
        asyncio.run(tab.pages._ask("And?", [Path("a.png")], REQUEST, GenerationSettings()))
    assert not (store.pictures / chat.id).exists()


# ---- Strangers, and a browser ---------------------------------------------------------------------------------------


def test_stranger_finds_pins_and_deletes_nothing(demo, url, says):
    says.text = "Yes."
    victim, stranger = asked(Client(demo, url).open(), "Seen a bird?"), Client(demo, url).open()
    [[title, key]] = victim.titles()
    stranger.call("search", "bird")
    stranger.call("delete_selected", [key], "yes")
    stranger.call("delete_selected", [key], "yes", session=victim.session)
    stranger.call("pin", session=victim.session)
    assert stranger.titles() == []
    assert victim.titles() == [[title, key]]
    assert not demo.chat.conversations.is_pinned(key)
    assert victim.call("search", "x" * 1_000_000) is None
    victim.call("search", '"fish')
    assert victim.titles() == []
    victim.call("search", "bird")
    assert victim.titles() == [[title, key]]
    victim.call("begin_temporary")
    victim.ask("A secret?", victim.upload("a.png", png()))
    (picture,) = victim.pictures()
    assert victim.file(picture).is_success
    assert stranger.file(picture).status_code == 404
    victim.call("ask", {"text": "", "files": []}, *SETTINGS)
    victim.call("begin_new")
    wait_until(lambda: gc.collect() is not None and victim.file(picture).status_code == 404)


SAMPLE = demo_samples()[0]


def test_chats_are_found_pinned_and_deleted_on_the_page(page, demo):
    tab = page.tab
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.new_chat()
    page.ask(WHO)
    page.expect_answers(SELF, "tokens per second")
    search = tab.get_by_placeholder("Search chats")
    search.fill(SAMPLE["answer"].split()[-1][:4])
    expect(page.history).to_have_text([SAMPLE["question"]])
    search.fill("no such word")
    expect(tab.get_by_text("No chat has all these words.")).to_be_visible()
    search.fill("")
    expect(page.history).to_have_text([WHO, SAMPLE["question"]])

    page.history.last.click()
    page.expect_answers(SAMPLE["answer"], "1 picture")
    tab.get_by_role("button", name="Pin", exact=True).click()
    expect(tab.get_by_role("group", name="Pinned").get_by_role("radio", name=SAMPLE["question"])).to_be_checked()
    expect(tab.get_by_role("group", name="Today").get_by_role("radio")).to_have_count(1)
    expect(tab.get_by_role("button", name="Unpin")).to_be_visible()

    tab.get_by_role("button", name="Temporary chat").click()
    expect(tab.locator(".block.foot")).to_contain_text("Temporary chat: it is not stored")
    page.ask(WHO)
    page.expect_answers(SELF, "tokens per second")
    expect(page.history).to_have_text([SAMPLE["question"], WHO])
    assert tab.url.endswith("?chat=temporary")

    tab.get_by_role("button", name="Select").click()
    for question in (SAMPLE["question"], WHO):
        tab.get_by_role("checkbox", name=question).check()
    said = []
    tab.once("dialog", lambda dialog: (said.append(dialog.message), dialog.accept()))
    with tab.expect_event("dialog"):
        tab.get_by_role("button", name="Delete selected").click()
    expect(page.history).to_have_count(0)
    assert said == ["Delete 2 chats and their pictures for good?"]
    expect(page.user).to_have_text([WHO])  # of the temporary chat
