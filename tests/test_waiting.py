"""The chat on a model as slow as the 11B: pictures encoded while people type, signs of life, Stop, answers cut."""

import asyncio
import logging
import threading
import time
from pathlib import Path

import gradio as gr
import pytest
from playwright.sync_api import expect
from test_chat import Page, assistant, browser, user  # noqa: F401
from transformers import AutoProcessor

from conftest import DEMO, demo_samples
from gradio_helper import LAUNCH, Chat, make_demo, remark, said_to_be_stopped
from ov_mllama.ahead import GRACE_S, PicturesAhead
from ov_mllama.conversation import is_cut
from ov_mllama.inference import check_stop
from ov_mllama.progress import PictureClock, Progress
from ov_mllama_helper import OVMLlamaForConditionalGeneration, convert_mllama

SAMPLES = demo_samples()
TYPED, OTHER, THIRD = SAMPLES[0], SAMPLES[2], SAMPLES[1]
STOP_S = 1.5  # a person who stops an answer sees it stopped within so long


class Slow(OVMLlamaForConditionalGeneration):
    """The demo model, as slow as the 11B.

    Attributes:
        picture_s, step_s: seconds that each picture and each step of the language model take.
        looks: moments at which a picture was begun.
        given_up: how many were.
    """

    def __init__(self, *args, **options):
        self.picture_s = self.step_s = 0.0
        super().__init__(*args, **options)
        self.as_new()
        self._look, self.image_encoder._infer = self.image_encoder._infer, self.look
        self._step, self.language_model.infer = self.language_model.infer, self.step

    def as_new(self, picture_s=4.0, step_s=0.0):
        self.forget()
        self.image_encoder._clock = PictureClock()
        self.picture_s, self.step_s, self.looks, self.given_up = picture_s, step_s, [], 0

    def look(self, inputs, stop):
        self.looks.append(time.perf_counter())
        try:
            while time.perf_counter() - self.looks[-1] < self.picture_s:
                check_stop(stop)
                time.sleep(0.05)
        except RuntimeError:
            self.given_up += 1
            raise
        return self._look(inputs, stop)

    def step(self, request, inputs):
        time.sleep(self.step_s)
        return self._step(request, inputs)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return Slow(convert_mllama(DEMO, tmp_path_factory.mktemp("slow") / "ov"))


@pytest.fixture
def model(loaded):
    loaded.as_new()
    yield loaded
    wait_until(lambda: not threads())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(DEMO)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pictures ahead"]


def wait_until(condition, seconds=8.0) -> float:
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds
        time.sleep(0.02)
    return time.perf_counter() - started


def path_of(sample) -> Path:
    return DEMO / "samples" / sample["file_name"]


def question(sample) -> dict:
    return {"text": sample["question"], "files": [str(path_of(sample))]}


async def all_of(chat, message, **settings) -> list:
    return [piece async for piece in chat.respond(message, [], **settings)]


def titles(pieces) -> list[str]:
    """What was shown while there were no words."""
    return [piece["metadata"]["title"] for piece in pieces if isinstance(piece, dict)]


# ---- Pictures ahead -------------------------------------------------------------------------------------------------


def test_what_was_encoded_ahead_is_what_the_question_asks_about(model, processor):
    model.picture_s = 0
    chat = Chat(model, processor)
    chat.ahead.want("page", [path_of(TYPED), path_of(OTHER)])
    wait_until(lambda: not threads())
    assert len(model.looks) == 2
    shown = asyncio.run(all_of(chat, question(TYPED)))[-1]
    assert shown[0] == TYPED["answer"]
    assert len(model.looks) == 2
    assert model.stats.images_kept == 1


def test_a_picture_is_given_up_only_when_no_page_wants_it(model, processor):
    ahead, picture = PicturesAhead(model, processor), path_of(TYPED)
    model.picture_s = 60
    for page in ("one", "two"):
        ahead.want(page, [picture])
    wait_until(lambda: model.looks)
    ahead.want("one", [])
    time.sleep(GRACE_S + 0.3)
    assert threads()
    assert not model.given_up
    ahead.want("two", [])
    assert GRACE_S - 0.5 < wait_until(lambda: model.given_up) < GRACE_S + 1


def test_a_picture_taken_away_is_given_up_and_the_next_begun(model, processor):
    model.picture_s = 60
    ahead = PicturesAhead(model, processor)
    ahead.want("page", [path_of(TYPED), path_of(OTHER)])
    wait_until(lambda: model.looks)
    ahead.want("page", [path_of(OTHER)])
    assert GRACE_S - 0.5 < wait_until(lambda: model.given_up) < GRACE_S + 1
    wait_until(lambda: len(model.looks) == 2)
    ahead.want("page", [path_of(OTHER), path_of(TYPED)])  # it may come back
    model.picture_s = 0
    wait_until(lambda: len(model.looks) == 3)
    wait_until(lambda: not threads())
    assert model.given_up == 1


def test_a_question_in_line_keeps_its_pictures_wanted(model, processor):
    """Its page's box is empty, and another conversation is answered for longer than the grace."""
    chat, first = Chat(model, processor), {"text": "What can you do?", "files": []}
    model.step_s = 0.3
    chat.ahead.want("page", [path_of(TYPED)])

    async def both():
        one = asyncio.create_task(all_of(chat, first))
        await asyncio.sleep(0.2)
        chat.ahead.want("page", [])
        await asyncio.sleep(0.2)
        two = asyncio.create_task(all_of(chat, question(TYPED)))
        return await one, await two

    one, two = asyncio.run(both())
    assert one[-1][0] == "I describe shapes, count them and read digits."
    assert two[-1][0] == TYPED["answer"]
    assert (len(model.looks), model.given_up) == (1, 0)
    assert titles(two)[0].startswith("Waiting for another conversation’s answer")


def test_errors_are_left_to_the_question(model, processor, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    chat = Chat(model, processor)
    with caplog.at_level(logging.INFO):
        chat.ahead.want("page", [broken])
        wait_until(lambda: not threads())
    assert not caplog.records
    assert (
        "not a picture" in asyncio.run(all_of(chat, {"text": "?", "files": [str(broken)]}))[-1][0]["metadata"]["title"]
    )


# ---- Signs of life --------------------------------------------------------------------------------------------------


def test_a_question_says_what_it_waits_for(model, processor):
    model.as_new(picture_s=2.2, step_s=0.7)
    files = [str(path_of(sample)) for sample in (TYPED, OTHER)]
    pieces = asyncio.run(all_of(Chat(model, processor), {"text": "Which?", "files": files}, max_new_tokens=2))
    said = titles(pieces)
    stages = list(dict.fromkeys(title.split(" ...")[0] for title in said))
    assert stages[:2] == ["Looking at picture 1 of 2", "Looking at picture 2 of 2"]
    assert stages[2].startswith("Reading ")
    assert stages[2].split()[1:] == [str(model.stats.prompt_tokens), "tokens"]
    first, second = ([title for title in said if f"picture {n}" in title] for n in (1, 2))
    assert 3 <= len(first) <= 5
    assert 3 <= len(second) <= 5
    assert second[0].endswith(("about 2 s left", "about 1 s left"))


def test_seconds_left_of_a_picture(monkeypatch):
    now, clock = [100.0], PictureClock()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert clock.left_s(b"a", 2) is None
    with clock.timing(b"a", 2):
        now[0] += 10
    assert clock.left_s(b"b", 2) == 10
    assert clock.left_s(b"b", 4) == 20

    def fails():
        with clock.timing(b"b", 4):
            now[0] += 3
            assert clock.left_s(b"b", 4) == 17
            assert clock.left_s(b"c", 2) == 27  # after the one under way
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert clock.left_s(b"b", 4) == 20, "one that failed was counted"
    progress = Progress()
    progress.enter("Looking", lambda: 8.7)
    assert str(progress) == "Looking ... about 9 s left"
    progress.enter("Looking", lambda: 0.2)
    assert str(progress) == "Looking ... any moment now"
    progress.enter("Reading")
    now[0] += 4
    assert str(progress) == "Reading ... 4 s"


# ---- Stopped, cut ---------------------------------------------------------------------------------------------------


def test_what_was_stopped_says_so_once():
    asked, waits, words = user("Long?"), remark("Looking ... 3 s", status="pending"), assistant("It is")
    for shown, kept in (([asked], [asked]), ([asked, waits], [asked]), ([asked, words], [asked, words])):
        marked, state = said_to_be_stopped(shown)
        assert marked == state == [*kept, remark("Stopped.")]
        assert said_to_be_stopped(marked) == (gr.skip(), gr.skip())
    for whole in ([], [asked, words, remark("2 s")], [asked, remark("No answer: too long")]):
        assert said_to_be_stopped(whole) == (gr.skip(), gr.skip())


def test_only_an_answer_that_its_limit_ended_is_cut(model, processor):
    model.picture_s = 0
    chat = Chat(model, processor)

    def remarks(limit):
        return [
            each["metadata"]["title"]
            for each in asyncio.run(all_of(chat, question(TYPED), max_new_tokens=limit))[-1][1:]
        ]

    remarks(100)
    tokens = model.stats.new_tokens  # with the one that ends it
    assert [len(remarks(limit)) for limit in (tokens - 1, tokens, tokens + 1)] == [2, 1, 1]
    assert remarks(3)[0] == "Cut at 3 tokens: write “go on” to continue."


def test_which_tokens_end_an_answer():
    import torch

    output = torch.tensor([[1, 2, 3, 7, 8]])
    assert is_cut(output, 3, 2, 9)
    assert is_cut(output, 3, 2, None)
    assert not is_cut(output, 3, 2, [9, 8])
    assert not is_cut(output, 3, 3, 9)


# ---- Page -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(loaded, processor):
    demo = make_demo(loaded, processor)
    _, address, _ = demo.launch(**LAUNCH, prevent_thread_lock=True)
    yield address
    demo.close()


@pytest.fixture
def page(browser, url, model):  # noqa: F811
    page = Page(browser, url)
    yield page
    page.tab.context.close()


def upload(page, *samples) -> None:
    page.tab.locator("input[type=file]").first.set_input_files([str(path_of(sample)) for sample in samples])
    expect(page.tab.locator(".thumbnail-item")).to_have_count(len(samples), timeout=20_000)


def bubbles(page):
    return page.tab.locator("[data-testid=bot]")


def test_the_page_encodes_a_picture_while_the_question_is_typed(page, model):
    model.picture_s = 5
    upload(page, TYPED)
    wait_until(lambda: model.looks)
    page.box.fill(TYPED["question"])
    page.tab.wait_for_timeout(1500)
    page.tab.locator("button.submit-button").click()
    expect(bubbles(page)).to_contain_text(["Looking at picture 1 of 1"])
    expect(bubbles(page)).to_contain_text([TYPED["answer"], "1 picture"], timeout=20_000)
    assert time.perf_counter() - model.looks[0] < model.picture_s + 2
    assert (len(model.looks), model.given_up) == (1, 0)
    assert model.stats.image_s[0] < model.picture_s - 1
    assert model.stats.images_kept == 1


def test_the_page_gives_up_what_is_taken_out_of_the_box_or_closed(page, browser, url, model):  # noqa: F811
    model.picture_s = 60
    upload(page, THIRD)
    wait_until(lambda: model.looks)
    page.tab.locator(".delete-button").first.click()
    expect(page.tab.locator(".thumbnail-item")).to_have_count(0)
    wait_until(lambda: model.given_up, GRACE_S + 2)
    closed = Page(browser, url)
    upload(closed, OTHER)
    wait_until(lambda: len(model.looks) == 2)
    closed.tab.context.close()
    wait_until(lambda: model.given_up == 2, GRACE_S + 4)
    wait_until(lambda: not threads())


def press_stop(page) -> float:
    """Seconds until the page says that the answer was stopped, and takes the next question."""
    started = time.perf_counter()
    page.tab.locator("button.stop-button").click(force=True)
    expect(bubbles(page).last).to_have_text("Stopped.", timeout=10_000)
    expect(page.tab.locator("button.submit-button")).to_have_count(1)
    return time.perf_counter() - started


def test_stop_while_a_picture_is_looked_at(page, model):
    model.picture_s = 60
    page.ask(TYPED["question"], str(path_of(TYPED)))
    expect(bubbles(page)).to_contain_text(["Looking at picture 1 of 1"])
    assert press_stop(page) < STOP_S
    expect(bubbles(page)).to_have_count(1)
    model.picture_s = 0
    page.expect_ready()
    page.ask("What can you do?")
    expect(bubbles(page)).to_contain_text(["Stopped.", "I describe shapes", "tokens asked"], timeout=20_000)


def test_stop_while_the_prompt_is_read(page, model):
    model.as_new(picture_s=0, step_s=4)
    page.ask("What can you do?")
    expect(bubbles(page)).to_contain_text(["Reading"])
    assert press_stop(page) < STOP_S
    expect(bubbles(page)).to_have_count(1)


def test_stop_between_words_keeps_them(page, model):
    model.as_new(picture_s=0, step_s=0.3)
    page.ask("What can you do?")
    expect(bubbles(page)).to_contain_text(["I describe shapes"], timeout=20_000)
    assert press_stop(page) < STOP_S
    expect(bubbles(page)).to_have_count(2)
    expect(bubbles(page).first).to_contain_text("I describe shapes")
    steps = len(model.llm_infer_time)
    time.sleep(0.7)
    assert len(model.llm_infer_time) == steps
    page.tab.get_by_role("button", name="New chat").click()
    expect(bubbles(page)).to_have_count(0)
    page.tab.locator("table tr, .table td").last.click()  # in the sidebar
    expect(bubbles(page)).to_contain_text(["I describe shapes", "Stopped."])


def test_stop_in_line_lets_the_others_go_on(page, browser, url, model):  # noqa: F811
    second, third = Page(browser, url), Page(browser, url)
    model.as_new(picture_s=0, step_s=1.0)  # the first answer lasts until the others are through with their line
    page.ask("What can you do?")
    expect(bubbles(page)).to_contain_text(["I"], timeout=20_000)
    for tab in (second, third):
        tab.ask("What can you do?")
        expect(bubbles(tab)).to_contain_text(["Waiting for"])
    expect(bubbles(third)).to_contain_text(["Waiting for 2 other conversations’ answers"])
    assert press_stop(second) < STOP_S
    expect(bubbles(third)).to_contain_text(["Waiting for another conversation’s answer"])
    second.tab.context.close()
    third.tab.context.close()
    model.step_s = 0
    expect(bubbles(page)).to_contain_text(
        ["I describe shapes, count them and read digits.", "tokens asked"], timeout=20_000
    )
    page.expect_ready()
    page.ask("What can you do?")
    expect(bubbles(page)).to_have_count(4, timeout=20_000)


def test_the_page_says_that_an_answer_was_cut(page, model):
    model.picture_s = 0
    page.tab.get_by_text("Settings").click()
    page.allow(4)
    page.ask("What can you do?")
    expect(bubbles(page)).to_contain_text(["I", "Cut at 4 tokens: write “go on” to continue.", "4 answered"])
