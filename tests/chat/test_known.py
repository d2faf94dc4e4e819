"""Pictures that the model has encoded before: known on the page, after a restart too, until their chat is deleted."""

import asyncio

import pytest

from chat_page import Slow, ahead_threads, expect, path_of, wait_until
from conftest import F32, demo_samples
from ov_mllama.chat.answers import Chat, GenerationSettings, Prefetcher
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, Turn
from ov_mllama.runtime import image_store
from ov_mllama.runtime.image_store import ImageStore
from ov_mllama.runtime.inference import Progress

SAMPLES = demo_samples()
ONE, OTHER = SAMPLES[0], SAMPLES[2]
HELD = 60  # seconds that a picture takes unless the test frees it before: for ever, here


@pytest.fixture(autouse=True)
def _ample_disk(monkeypatch):
    monkeypatch.setattr(image_store, "free_disk", lambda folder: 1e12)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "encoded")


@pytest.fixture
def model(slow_demo, store, monkeypatch):
    """The model behind the page, with a store of its own."""
    slow_demo.as_new()
    monkeypatch.setattr(slow_demo.image_encoder, "store", None)  # as before, after the test
    slow_demo.image_encoder.use_store(store)
    yield slow_demo
    slow_demo.picture_s = 0
    wait_until(lambda: not ahead_threads())


def ask(chat: Chat, conversation: Conversation, turn: Turn) -> None:
    conversation.turns.append(turn)
    asyncio.run(chat.answer(conversation.turns, Progress(), GenerationSettings()))
    chat.save(conversation)
    chat.flush()


def test_follow_up_after_a_restart_encodes_nothing(demo_dir, processor, store, tmp_path):
    talk = Conversation("browser:one")
    first = Slow(demo_dir, ov_config=F32, warm_up=False, check_golden=False, image_store=store)
    before = Conversations(tmp_path)
    picture = before.store_file(talk, path_of(ONE))
    ask(Chat(first, processor, before), talk, Turn(ONE["question"], [picture]))
    assert len(first.looks) == 1

    second = Slow(demo_dir, ov_config=F32, warm_up=False, check_golden=False, image_store=ImageStore(store.folder))
    second.picture_s = HELD
    after = Conversations(tmp_path)
    stored = after.get(talk.id, talk.owner)
    assert stored is not talk
    ask(Chat(second, processor, after), stored, Turn(ONE["question"]))
    assert [turn.state for turn in stored.turns] == [ANSWERED] * 2
    assert not second.looks
    assert "1 cached" in stored.turns[-1].note


def test_states_of_pictures_ahead(model, processor, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    pictures, ahead = [path_of(ONE), path_of(OTHER), broken], Prefetcher(model, processor)
    model.picture_s = HELD
    ahead.prefetch("page", pictures)
    wait_until(lambda: model.looks)
    assert [state.split(" ...")[0] for state in ahead.states("page")] == ["encoding", "waiting", "waiting"]
    assert ahead.states("another page") == []
    model.picture_s = 0
    wait_until(lambda: not ahead_threads())
    assert ahead.states("page") == ["known", "known", "not encoded"]
    ahead.prefetch("page", [])
    assert ahead.states("page") == []


def test_page_shows_what_is_known_and_forgets_what_is_deleted(page, model, store):
    foot = page.tab.locator(".block.foot")
    model.picture_s = HELD
    page.attach(path_of(ONE))
    expect(foot).to_contain_text("Picture: encoding ...")
    model.picture_s = 0
    expect(foot).to_contain_text("Picture: known")
    page.box.fill(ONE["question"])
    page.send.click()
    page.expect_answers(ONE["answer"], "1 picture")
    expect(foot).not_to_contain_text("Picture")
    assert len([*store.folder.iterdir()]) == 1

    model.forget()  # as a restart does
    model.picture_s = HELD
    page.attach(path_of(ONE))
    expect(foot).to_contain_text("Picture: known")
    assert len(model.looks) == 1
    page.tab.locator(".delete-button").first.click()
    expect(foot).not_to_contain_text("Picture")

    page.tab.once("dialog", lambda dialog: dialog.accept())
    page.tab.get_by_role("button", name="Delete").click()
    expect(page.bot).to_have_count(0)
    assert [*store.folder.iterdir()] == []
