"""Heat maps of answers: what is recorded, who may see it, and the panel on the page."""

import asyncio
import base64
import io
import re
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from chat_page import SELF, WHO, expect, path_of
from conftest import demo_samples
from ov_mllama.chat.answers import Chat, GenerationSettings
from ov_mllama.chat.heat_maps import HeatMaps, overlaid, place_of_peak
from ov_mllama.chat.owners import COOKIE
from ov_mllama.chat.pages import Pages
from ov_mllama.chat.recorded_queries import RecordedQueries, key_of
from ov_mllama.chat.render import LOOK_CLOSER, WHERE_IT_LOOKED, to_gradio
from ov_mllama.chat.store import Conversations
from ov_mllama.chat.turns import ANSWERED, STOPPED, WAITING, Turn
from ov_mllama.runtime.attention_maps import AnswerQueries
from ov_mllama.runtime.inference import Progress
from ov_mllama.runtime.language import OVLanguageModel

SAMPLE = demo_samples()[5]  # the colour of a shape
OPTION = SimpleNamespace(value=WHERE_IT_LOOKED)


def queries_of(count: int, size: int = 8) -> AnswerQueries:
    queries = AnswerQueries(4)
    queries.record(4 + count - 1, np.ones((1, count, size), np.float32))
    return queries


def request(token: str) -> SimpleNamespace:
    return SimpleNamespace(session_hash="tab", username=None, query_params={}, cookies={COOKIE: token * 64})


@pytest.fixture
def maps(model, processor, tmp_path):
    """The panel's handlers, with a page whose conversation has an answer about a picture."""
    handlers = HeatMaps(Pages(Chat(model, processor, Conversations(tmp_path))))
    page, chat = asyncio.run(handlers.pages.connect("", request("a"))), handlers.chat
    picture = chat.conversations.store_file(page.conversation, path_of(SAMPLE))
    page.conversation.turns = [Turn(SAMPLE["question"], [picture])]
    asyncio.run(chat.answer(page.conversation.turns, Progress(), GenerationSettings()))
    assert page.conversation.turns[0].answer == SAMPLE["answer"]
    return handlers


def words_of(maps) -> list[str]:
    panel, radio, view = asyncio.run(maps.choose_option(OPTION, request("a")))
    assert panel.visible is True
    assert view == ""
    return [word for word, _ in radio.choices]


def shown(maps, index: int) -> str:
    """The map of a word of the last answer."""
    key = key_of(maps.pages.page(request("a")).conversation.turns)
    return asyncio.run(maps.show(f"{key} {index}", request("a")))


def test_word_of_an_answer_has_a_heat_map_of_its_picture(maps):
    words = words_of(maps)
    assert words == SAMPLE["answer"].rstrip(".").split()
    map_of_last = shown(maps, len(words) - 1)
    found = re.fullmatch(
        r'<figure><img src="data:image/jpeg;base64,([^"]+)" alt="Heat map\. .*?"><figcaption>.*', map_of_last
    )
    image = Image.open(io.BytesIO(base64.b64decode(found[1])))
    assert image.size == SAMPLE["image"].size
    assert f"For “{words[-1]}” it looked most at the" in map_of_last


def test_follow_up_looks_at_the_picture_of_the_question_before(maps):
    turns = maps.pages.page(request("a")).conversation.turns
    turns.append(Turn("How many shapes are there?"))
    asyncio.run(maps.chat.answer(turns, Progress(), GenerationSettings()))
    assert words_of(maps) == re.findall(r"\w+", turns[-1].answer)
    assert shown(maps, 0).count("<figure>") == 1


@pytest.mark.parametrize("choice", ["{} -1", "{} 99", "{} 0 ", None, "0", 0, True, ["{} 0"], "f" * 64 + " 0"])
def test_other_choices_are_refused(maps, choice):
    key = key_of(maps.pages.page(request("a")).conversation.turns)
    with pytest.raises(gr.Error, match="no such word"):
        asyncio.run(maps.show(choice.format(key) if isinstance(choice, str) else choice, request("a")))


def test_only_the_owner_gets_a_map(maps):
    with pytest.raises(gr.Error, match="just connecting"):
        asyncio.run(maps.show("0" * 64 + " 0", request("b")))
    asyncio.run(maps.pages.connect(maps.pages.page(request("a")).conversation.id, request("b")))
    for event in (maps.choose_option(OPTION, request("b")), maps.show("0" * 64 + " 0", request("b"))):
        with pytest.raises(gr.Error, match="no answer yet"):  # the page of another has an empty conversation
            asyncio.run(event)


def test_what_is_not_recorded_is_said(maps, monkeypatch):
    turn = maps.pages.page(request("a")).conversation.turns[0]
    turn.answer += " Or green."  # as another variant
    with pytest.raises(gr.Error, match="until a restart: press Retry"):
        words_of(maps)
    monkeypatch.setattr(OVLanguageModel, "gives_queries", False)
    with pytest.raises(gr.Error, match="earlier version made it: delete it"):
        words_of(maps)
    asyncio.run(maps.chat.answer([turn], Progress(), GenerationSettings()))  # answers all the same
    assert turn.state == ANSWERED


def test_picture_that_is_gone_is_an_error_for_the_user(maps):
    maps.pages.page(request("a")).conversation.turns[0].pictures[0].unlink()
    with pytest.raises(gr.Error, match=r"png"):
        shown(maps, 0)


def test_text_alone_records_nothing(model, processor, tmp_path):
    chat, turns = Chat(model, processor, Conversations(tmp_path)), [Turn(WHO)]
    asyncio.run(chat.answer(turns, Progress(), GenerationSettings()))
    assert turns[0].answer == SELF
    assert chat.recorded.get(turns) is None


def test_option_is_offered_below_answers_that_see_a_picture():
    def options(*turns):
        return [option["value"] for option in to_gradio(turns)[-1].get("options", ())]

    seen = Turn("?", ["a"], "Yes.", "1 s", ANSWERED)
    assert options(seen) == options(seen, Turn("And?", [], "No.", "1 s", ANSWERED)) == [WHERE_IT_LOOKED]
    assert options(Turn("?", ["a"], "Yes.", state=ANSWERED, detail="low")) == [LOOK_CLOSER, WHERE_IT_LOOKED]
    assert options(Turn("?", [], "Yes.", state=ANSWERED)) == []
    for state in (STOPPED, WAITING):
        assert WHERE_IT_LOOKED not in options(Turn("?", ["a"], "Yes", state=state))


def test_least_recently_used_answers_are_forgotten():
    recorded = RecordedQueries(max_bytes=3 * queries_of(4).nbytes)
    turns = [[Turn("?", ["a"], f"Answer {number}.")] for number in range(4)]
    for each in turns[:3]:
        recorded.put(each, queries_of(4))
    assert recorded.get(turns[0])
    recorded.put(turns[3], queries_of(4))
    assert [recorded.get(each) is not None for each in turns] == [True, False, True, True]
    recorded.put(turns[1], queries_of(100))  # more than all may take
    assert recorded.get(turns[1]) is None
    assert len({key_of(each) for each in turns}) == 4
    assert key_of(turns[0]) == key_of([Turn("?", ["a"], "Answer 0.", note="other")])


def test_colours_and_words_for_a_map():
    heat = np.zeros((90, 60), np.float32)
    heat[5, 55] = 1
    assert place_of_peak(heat) == "top right"
    heat[45, 30] = 2
    assert place_of_peak(heat) == "centre"
    colours = np.asarray(overlaid(Image.new("RGB", (60, 90), "white"), heat, 2)).astype(int)
    assert colours[45, 30].sum() > colours[80, 5].sum() + 200
    assert overlaid(Image.new("RGB", (2000, 1000)), heat, 2).size == (640, 320)
    assert overlaid(Image.new("RGB", (20, 10)), np.zeros((9, 9), np.float32), 0).size == (20, 10)  # no peak
    less = np.asarray(overlaid(Image.new("RGB", (60, 90), "white"), heat / 2, 2)).astype(int)  # than at another image
    assert less[45, 30].sum() < colours[45, 30].sum() - 200


def test_panel_on_the_page(page, model):
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    option = page.tab.get_by_role("button", name=WHERE_IT_LOOKED)
    option.click()
    panel, word = page.tab.locator(".looked"), SAMPLE["answer"].rstrip(".").split()[-1]
    expect(panel.get_by_role("radio")).to_have_count(len(SAMPLE["answer"].split()))
    expect(page.user).to_have_count(2)  # nothing was asked
    panel.get_by_text(word, exact=True).click()
    picture = panel.locator(".heat img")
    expect(picture).to_have_attribute("alt", re.compile(f"Heat map. For “{word}” it looked most at the"))
    assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
    page.tab.keyboard.press("ArrowLeft")
    expect(picture).not_to_have_attribute("alt", re.compile(word))
    panel.get_by_role("button", name="Close").focus()
    page.tab.keyboard.press("Enter")
    expect(panel).to_be_hidden()
    expect(option).to_be_focused()
    page.tab.keyboard.press("Enter")
    expect(panel).to_be_visible()
    page.ask(WHO)
    expect(panel).to_be_hidden()
    page.expect_ready()
