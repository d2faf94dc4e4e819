"""The chat on a model as slow as the 11B: pictures encoded while people type, signs of life, Stop, answers cut."""

import asyncio
import logging
import re
import time
from types import SimpleNamespace

import pytest

from chat_page import SELF, WHO, Tab, ahead_threads, expect, path_of, wait_until
from conftest import demo_samples
from openai_client import is_busy
from ov_mllama.chat.answers import GRACE_S, Chat, GenerationSettings, Prefetcher
from ov_mllama.chat.render import CONTINUE
from ov_mllama.chat.store import Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, FAILED, Turn
from ov_mllama.runtime.image_cache import EncodingTimes
from ov_mllama.runtime.inference import Progress
from ov_mllama.runtime.prompts import hit_token_limit

SAMPLES = demo_samples()
TYPED, OTHER, THIRD = SAMPLES[0], SAMPLES[2], SAMPLES[1]
HELD = 60  # seconds that a step or a picture takes unless the test frees it before: for ever, here


@pytest.fixture
def model(slow_demo):
    slow_demo.as_new(picture_s=HELD)
    yield slow_demo
    slow_demo.picture_s = slow_demo.step_s = 0
    wait_until(lambda: not ahead_threads() and not is_busy(slow_demo))


@pytest.fixture
def grace(monkeypatch):
    """A time that passes when a test says so; pictures that nobody wants are given up by it."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("ov_mllama.chat.answers.now", lambda: now.s)
    return now


@pytest.fixture
def chat(model, processor, tmp_path):
    return Chat(model, processor, Conversations(tmp_path))


def about(sample) -> Turn:
    return Turn(sample["question"], [path_of(sample)])


async def answer(chat, turn, said=None, **wishes) -> list[str]:
    """Answers a question whose pictures are in a text box, and tells what was said while there were no words.

    Args:
        said: a list that takes it as it is said.
    """
    progress, said = Progress(), [] if said is None else said
    task = asyncio.create_task(chat.answer([turn], progress, GenerationSettings(**wishes), turn.pictures))
    while not task.done():
        if not turn.answer:
            said.append(str(progress))
        await asyncio.sleep(0.02)
    return list(dict.fromkeys(said))


# ---- Pictures ahead -------------------------------------------------------------------------------------------------


def test_what_was_encoded_ahead_is_what_the_question_asks_about(model, chat):
    model.picture_s, turn = 0, about(TYPED)
    chat.prefetcher.prefetch("page", [path_of(TYPED), path_of(OTHER)])
    wait_until(lambda: not ahead_threads())
    assert len(model.looks) == 2
    asyncio.run(answer(chat, turn))
    assert turn.answer == TYPED["answer"]
    assert len(model.looks) == 2
    assert model.stats.images_cached == 1


def test_a_picture_is_given_up_only_when_no_page_wants_it(model, processor, grace):
    ahead, picture = Prefetcher(model, processor), path_of(TYPED)
    for page in ("one", "two"):
        ahead.prefetch(page, [picture])
    wait_until(lambda: model.looks)
    ahead.prefetch("one", [])
    grace.s += GRACE_S + 1
    time.sleep(0.3)  # several times as long as a picture's work goes on without a look at who wants it
    assert ahead_threads()
    assert not model.given_up
    ahead.prefetch("two", [])
    grace.s += GRACE_S - 0.1
    time.sleep(0.3)
    assert not model.given_up
    grace.s += 0.2
    wait_until(lambda: model.given_up)


def test_a_picture_taken_away_is_given_up_and_the_next_begun(model, processor, grace):
    ahead = Prefetcher(model, processor)
    ahead.prefetch("page", [path_of(TYPED), path_of(OTHER)])
    wait_until(lambda: model.looks)
    ahead.prefetch("page", [path_of(OTHER)])
    grace.s += GRACE_S - 0.1
    time.sleep(0.3)
    assert not model.given_up
    grace.s += 0.2
    wait_until(lambda: model.given_up)
    wait_until(lambda: len(model.looks) == 2)
    ahead.prefetch("page", [path_of(OTHER), path_of(TYPED)])  # it may come back
    model.picture_s = 0
    wait_until(lambda: len(model.looks) == 3)
    wait_until(lambda: not ahead_threads())
    assert model.given_up == 1


def test_a_question_in_line_keeps_its_pictures_wanted(model, chat, grace):
    """Its page's box is empty, and another conversation is answered for longer than the grace."""
    model.step_s, first, second = HELD, Turn(WHO), about(TYPED)
    chat.prefetcher.prefetch("page", [path_of(TYPED)])

    async def both():
        one = asyncio.create_task(answer(chat, first))
        while not is_busy(model):
            await asyncio.sleep(0.02)
        chat.prefetcher.prefetch("page", [])
        two = asyncio.create_task(answer(chat, second))
        await asyncio.sleep(0.1)
        grace.s += 2 * GRACE_S
        await asyncio.sleep(0.3)
        model.step_s = model.picture_s = 0
        await one
        return await two

    said = asyncio.run(both())
    assert (first.answer, second.answer) == (SELF, TYPED["answer"])
    assert (len(model.looks), model.given_up) == (1, 0)
    assert said[1].startswith("Waiting for another conversation’s answer")


def test_errors_are_left_to_the_question(chat, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG broken")
    with caplog.at_level(logging.INFO):
        chat.prefetcher.prefetch("page", [broken])
        wait_until(lambda: not ahead_threads())
    assert not caplog.records
    turn = Turn("?", [broken])
    asyncio.run(answer(chat, turn))
    assert turn.state == FAILED
    assert "not an image" in turn.note


# ---- Signs of life --------------------------------------------------------------------------------------------------


def test_a_question_says_what_it_waits_for(model, chat):
    model.as_new(picture_s=2, step_s=HELD)
    turn, told = Turn("Which?", [path_of(sample) for sample in (TYPED, OTHER)]), []

    async def asked():
        answering = asyncio.create_task(answer(chat, turn, told, max_new_tokens=2))
        while len(model.looks) < 2:
            await asyncio.sleep(0.02)
        model.picture_s = HELD
        for stage in (r"image 2 of 2 .* any moment now", "Reading"):
            while not re.search(stage, told[-1]):
                await asyncio.sleep(0.02)
            model.picture_s = 0
        model.step_s = 0
        return await answering

    said = asyncio.run(asked())
    stages = list(dict.fromkeys(sentence.split(" ...")[0] for sentence in said))
    looking = [stage for stage in stages if stage.startswith(("Encoding", "Reading"))]
    assert looking == [
        "Encoding image 1 of 2",
        "Encoding image 2 of 2",
        f"Reading {model.stats.prompt_tokens} tokens",
    ]
    second = [sentence for sentence in said if "image 2" in sentence]
    assert re.search(r"about \d+ s left$", second[0])
    assert second[-1].endswith("any moment now")


def test_seconds_left_of_a_picture(monkeypatch):
    now, clock = [100.0], EncodingTimes()
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


# ---- Cut ------------------------------------------------------------------------------------------------------------


def test_only_an_answer_that_its_limit_ended_is_cut(model, chat):
    model.picture_s = 0

    def state(limit):
        turn = about(TYPED)
        asyncio.run(answer(chat, turn, max_new_tokens=limit))
        return turn.state

    assert state(100) == ANSWERED
    tokens = model.stats.new_tokens  # with the one that ends it
    assert [state(limit) for limit in (tokens - 1, tokens, tokens + 1)] == [CUT, ANSWERED, ANSWERED]


def test_which_tokens_end_an_answer():
    import torch

    output = torch.tensor([[1, 2, 3, 7, 8]])
    assert hit_token_limit(output, 3, 2, 9)
    assert hit_token_limit(output, 3, 2, None)
    assert not hit_token_limit(output, 3, 2, [9, 8])
    assert not hit_token_limit(output, 3, 3, 9)


# ---- Page -----------------------------------------------------------------------------------------------------------


def test_first_words_within_two_steps_of_a_question_typed_for_as_long_as_its_picture_takes(page, model, monkeypatch):
    """The 11B's steps take a third of a second each: no picture is encoded, and the prompt and its first word are all
    that the answer waits for."""
    page.attach(path_of(TYPED))
    wait_until(lambda: model.looks)
    page.box.press_sequentially(TYPED["question"])
    model.picture_s = 0
    wait_until(lambda: not ahead_threads())
    steps, step = [], model.language_model.infer
    monkeypatch.setattr(model.language_model, "infer", lambda *given: steps.append(1) or step(*given))
    model.step_s, model.free_steps = HELD, 2
    page.send.click()
    expect(page.bot).to_contain_text([TYPED["answer"][:1]])
    assert len(model.looks) == 1
    assert len(steps) <= 3  # the third is held
    model.step_s = 0
    page.expect_answers(TYPED["answer"], "1 cached")


@pytest.mark.returning
def test_a_question_waits_for_what_is_left_of_its_picture(page, model):
    page.attach(path_of(OTHER))
    wait_until(lambda: model.looks)
    page.ask(OTHER["question"])
    expect(page.bot).to_contain_text(["Encoding image 1 of 1"])
    model.picture_s = 0
    page.expect_answers(OTHER["answer"], "1 picture")
    assert (len(model.looks), model.given_up) == (1, 0)
    assert model.stats.image_s[0] < time.perf_counter() - model.looks[0]


def test_the_page_gives_up_what_is_taken_out_of_the_box_or_closed(page, url, model, monkeypatch):
    monkeypatch.setattr("ov_mllama.chat.answers.GRACE_S", 0.2)
    page.attach(path_of(THIRD))
    wait_until(lambda: model.looks)
    page.tab.locator(".delete-button").first.click()
    expect(page.tab.locator(".thumbnail-item")).to_have_count(0)
    wait_until(lambda: model.given_up)
    closed = Tab(page.context, url)
    closed.attach(path_of(OTHER))
    wait_until(lambda: len(model.looks) == 2)
    closed.tab.close()
    wait_until(lambda: model.given_up == 2)
    wait_until(lambda: not ahead_threads())


def press_stop(page) -> None:
    """Waits until the page says that the answer was stopped, and takes the next question: the model's step, which is
    held, does not end before."""
    page.to_front()
    page.stop.click()
    expect(page.bot.last).to_contain_text("Stopped.", timeout=20_000)
    expect(page.send).to_have_count(1)


@pytest.mark.returning
def test_stop_while_a_picture_is_looked_at(page, model):
    page.ask(TYPED["question"], path_of(TYPED))
    expect(page.bot).to_contain_text(["Encoding image 1 of 1"])
    press_stop(page)
    expect(page.bot).to_have_count(1)
    model.picture_s = 0
    page.ask(WHO)
    page.expect_answers("Stopped.", SELF, "tokens per second")


@pytest.mark.returning
def test_stop_while_the_prompt_is_read(page, model):
    model.as_new(step_s=HELD)
    page.ask(WHO)
    expect(page.bot).to_contain_text(["Reading"])
    press_stop(page)
    expect(page.bot).to_have_count(1)


@pytest.mark.returning
def test_stop_between_words_keeps_them(page, model):
    model.as_new(step_s=HELD)
    model.free_steps = 5
    page.ask(WHO)
    expect(page.bot).to_contain_text(["I describe shapes"], timeout=20_000)
    press_stop(page)
    page.expect_answers("I describe shapes", "Stopped.")
    model.step_s = 0
    wait_until(lambda: not is_busy(model))
    assert len(model.llm_infer_time) < 10
    page.new_chat()
    page.history.first.click()
    page.expect_answers("I describe shapes", "Stopped.")


def test_stop_in_line_lets_the_others_go_on(page, url, model):
    second, third = Tab(page.context, url), Tab(page.context, url)
    model.as_new(step_s=HELD)
    model.free_steps = 2
    page.ask(WHO)
    expect(page.bot).to_contain_text(["I"], timeout=20_000)
    for tab in (second, third):
        tab.ask(WHO)
        expect(tab.bot).to_contain_text(["Waiting for"])
    expect(third.bot).to_contain_text(["Waiting for 2 other conversations’ answers"])
    press_stop(second)
    expect(third.bot).to_contain_text(["Waiting for another conversation’s answer"])
    model.step_s = 0
    for tab in (page, third):
        tab.expect_answers(SELF, "tokens per second")


def test_an_answer_that_was_cut_says_so_and_goes_on(page, model):
    model.picture_s = 0
    page.settings()
    page.allow(4)
    page.ask(WHO)
    page.expect_answers("I", "Token limit reached")
    page.allow(100)
    page.tab.get_by_role("button", name=CONTINUE).click()
    page.expect_answers(SELF, "tokens per second")
    expect(page.user).to_have_count(1)
    expect(page.bot.first).to_have_text(SELF)
