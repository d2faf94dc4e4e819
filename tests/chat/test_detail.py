"""A quick or a full look at pictures: what is encoded, what the page offers, and what it remembers."""

import asyncio
import json
import sqlite3

import gradio as gr
import pytest

from chat_page import ahead_threads, expect, path_of, wait_until
from conftest import demo_samples
from ov_mllama.chat.answers import Chat, GenerationSettings, Prefetcher
from ov_mllama.chat.messages import details_of, to_messages
from ov_mllama.chat.page_input import checked_settings
from ov_mllama.chat.render import CONTINUE, LOOK_CLOSER, WHERE_IT_LOOKED, detail_choices, to_gradio
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, Turn
from ov_mllama.runtime.inference import Progress

SAMPLE = demo_samples()[0]  # of four tiles
QUICK, FULL = "Quick (1 tile", "Full (4 tiles"


@pytest.fixture
def tiles(model, monkeypatch):
    """A list that grows with the tiles of each picture that is encoded."""
    seen, infer = [], model.image_encoder._infer
    monkeypatch.setattr(
        model.image_encoder,
        "_infer",
        lambda inputs, stop: seen.append(int(inputs["real_tiles"])) or infer(inputs, stop),
    )
    yield seen
    wait_until(lambda: not ahead_threads())


def test_pictures_are_encoded_at_the_detail_of_their_turn(model, processor, tmp_path, tiles):
    chat, picture = Chat(model, processor, Conversations(tmp_path)), path_of(SAMPLE)
    first = Turn(SAMPLE["question"], [picture], detail="low")
    asyncio.run(chat.answer([first], Progress(), GenerationSettings()))
    assert (first.state, tiles) == (ANSWERED, [1])
    second = Turn(SAMPLE["question"], [picture])
    asyncio.run(chat.answer([first, second], Progress(), GenerationSettings()))
    assert (second.state, tiles) == (ANSWERED, [1, 4])


def test_details_are_in_the_order_of_the_pictures():
    turns = [
        Turn("?", ["a", "b"], "Yes.", detail="low"),
        Turn("?", ["not answered"]),
        Turn("?", ["c"], "No."),
        Turn("?", ["d"], detail="low"),
    ]
    assert to_messages(turns)[1] == ["a", "b", "c", "d"]
    assert details_of(turns) == ["low", "low", "high", "low"]


def test_what_is_prefetched_is_what_is_asked_about(model, processor, tiles):
    ahead = Prefetcher(model, processor)
    for detail in ("low", "high", "low"):
        ahead.prefetch("page", [path_of(SAMPLE)], detail)
        wait_until(lambda: not ahead_threads())
        assert ahead.states("page") == ["known"]
    assert tiles == [1, 4]


def test_deleted_pictures_are_forgotten_at_every_detail(model, processor, tmp_path, tiles):
    chat, picture = Chat(model, processor, Conversations(tmp_path)), path_of(SAMPLE)
    for detail in ("low", "high"):
        chat.prefetcher.prefetch(detail, [picture], detail)
    wait_until(lambda: not ahead_threads())
    assert model.image_encoder.cache.nbytes
    chat.remove_encoded([picture])
    assert model.image_encoder.cache.nbytes == 0


def test_details_are_offered_with_the_times_of_this_machine(model):
    assert detail_choices(model) == [(f"{QUICK})", "low"), (f"{FULL})", "high")]
    clock = model.image_encoder._clock
    clock._took[2] = 15.2  # a tile and an empty one
    assert detail_choices(model) == [(f"{QUICK}, about 15 s)", "low"), (f"{FULL}, about 30 s)", "high")]
    clock._took[4] = 64.0
    assert detail_choices(model)[1] == (f"{FULL}, about 64 s)", "high")


def options(turns) -> list[str]:
    return [option["value"] for option in to_gradio(turns)[-1].get("options", ())]


def test_closer_look_is_offered_below_a_quick_answer_only():
    quick, full = (Turn("?", ["a"], "Yes.", "1 s", ANSWERED, detail=detail) for detail in ("low", "high"))
    text = Turn("And?", [], "No.", "1 s", ANSWERED, detail="low")
    assert options([quick]) == options([quick, text]) == [LOOK_CLOSER, WHERE_IT_LOOKED]
    assert LOOK_CLOSER not in options([full]) + options([text]) + options([full, text])
    quick.state = CUT
    assert options([quick]) == [CONTINUE, LOOK_CLOSER, WHERE_IT_LOOKED]


def test_other_details_are_refused_and_older_rows_are_full(tmp_path):
    assert checked_settings(["", 8, 0, 0.9, "low"]).detail == "low"
    for detail in ("medium", None, ["low"], ""):
        with pytest.raises(gr.Error):
            checked_settings(["", 8, 0, 0.9, detail])
    store, talk = Conversations(tmp_path), Conversation("user:me", turns=[Turn("?", detail="low", state=ANSWERED)])
    store.save(talk)
    assert Conversations(tmp_path).get(talk.id, "user:me").turns[0].detail == "low"
    with sqlite3.connect(tmp_path / "chat.sqlite3") as database:
        [(turns,)] = database.execute("SELECT turns FROM conversations")
        older = [{name: value for name, value in turn.items() if name != "detail"} for turn in json.loads(turns)]
        database.execute("UPDATE conversations SET turns = ?", [json.dumps(older)])
    assert Conversations(tmp_path).get(talk.id, "user:me").turns[0].detail == "high"


def test_quick_look_on_the_page_and_then_a_closer_one(page, model, tiles):
    radio = page.tab.locator(".detail")
    radio.get_by_text("Quick").click()
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    expect(page.bot).to_have_count(2)
    page.expect_ready()
    assert tiles == [1]
    page.tab.reload()
    expect(page.tab.locator(".detail").get_by_label("Quick")).to_be_checked()
    page.expect_ready()
    page.tab.get_by_role("button", name=LOOK_CLOSER).click()
    expect(page.tab.get_by_role("button", name=LOOK_CLOSER)).to_have_count(0)
    page.expect_answers(SAMPLE["answer"], "1 picture")
    assert tiles == [1, 4]
    expect(page.user).to_have_count(2)
