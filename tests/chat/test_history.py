"""No conversation is lost: by a reload, a second tab, another chat begun meanwhile, or a server that was killed."""

import contextlib
import io
import re
import zipfile
from urllib.parse import unquote

import httpx
import pytest
from PIL import Image, ImageChops

from chat_page import SELF, WHO, Tab, expect, path_of, wait_until
from conftest import demo_samples
from openai_client import HTTP, is_busy
from programs import free_port

SAMPLES = demo_samples()
CROSSES, SHAPES = SAMPLES[0], SAMPLES[2]
HOW_MANY, TWO = "How many shapes are there?", "There are two shapes."  # of SHAPES
DONE = "tokens per second"  # in the remark on a whole answer
FIRST_WORDS = re.compile("^I describe")  # SELF under way

SERVER = """
import sys, time
from transformers import AutoProcessor
from gradio_helper import make_demo
from ov_mllama.chat import answers
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration

model_dir, folder, port, step_s = sys.argv[1:]
model = OVMLlamaForConditionalGeneration(model_dir, check_golden=False)
step = model.language_model.infer
model.language_model.infer = lambda *arguments: time.sleep(float(step_s)) or step(*arguments)
answers.SAVE_EVERY_S = 0.3
make_demo(model, AutoProcessor.from_pretrained(model_dir), folder=folder).launch(server_port=int(port))
"""


def reload(page) -> None:
    page.tab.reload()
    expect(page.tab.locator(".block.foot")).to_contain_text("Everything stays")


def reopen(page, title: str) -> None:
    """Opens an earlier conversation."""
    page.history.filter(has_text=title).click()
    expect(selected(page)).to_have_text(title)


def selected(page):
    """The conversation that is marked in the list."""
    return page.tab.locator(".history label:has(input:checked)")


def address(page) -> str:
    """The server behind the page's address."""
    page.tab.wait_for_url("**/?chat=*")
    return "?" + page.tab.url.rpartition("?")[2]


def begin(page, model) -> str:
    """Asks WHO, and gives the first of the answer's words; the rest of them comes as the model's steps are freed."""
    model.step_s, model.free_steps = 60, 5
    page.ask(WHO)
    expect(page.bot.last).to_have_text(FIRST_WORDS, timeout=20_000)
    wait_until(lambda: not model.free_steps)
    return page.bot.last.inner_text()


def press_hidden(page, label: str) -> None:
    """Presses a button that is hidden while an answer is under way, as in a tab that does not know of it yet."""
    page.tab.get_by_label(label).last.dispatch_event("click")


def expect_pictures(page, count: int) -> None:
    """Waits until a page shows so many pictures, and a person sees them."""
    pictures = page.tab.locator("[role=log] [data-testid=user] img")
    expect(pictures).to_have_count(count)
    for i in range(count):
        wait_until(lambda i=i: pictures.nth(i).evaluate("picture => picture.complete && picture.naturalWidth > 0"))


# ---- Reload, tabs, people -------------------------------------------------------------------------------------------


@pytest.mark.returning
def test_an_answer_goes_on_while_its_page_is_loaded_again(page, model):
    words = begin(page, model)
    reload(page)
    expect(page.user).to_have_text([WHO])
    expect(page.bot.first).to_contain_text(words)
    expect(page.stop).to_have_count(1)
    assert SELF not in page.bot.first.inner_text()
    model.step_s = 0
    page.expect_answers(SELF, DONE)
    expect(page.user).to_have_count(1)


def test_a_page_that_is_loaded_again_shows_what_it_showed(page, model):
    model.step_s = 0
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    first = address(page)
    page.new_chat()
    page.ask(WHO)
    page.expect_answers(SELF, DONE)
    second = address(page)
    assert first != second
    for title, key, pictures in ((SHAPES["question"], first, 1), (WHO, second, 0)):
        reopen(page, title)
        page.tab.wait_for_url(f"**/{key}")
        reload(page)
        expect(selected(page)).to_have_text(title)
        expect(page.user).to_have_count(1 + pictures)
        expect_pictures(page, pictures)
        expect(page.bot).to_have_count(2)
        expect(page.history).to_have_text([WHO, SHAPES["question"]])
        assert address(page) == key


def test_two_tabs_write_at_once_and_none_is_lost(page, url, model):
    model.step_s = 0.02
    second = Tab(page.context, url)
    page.ask(WHO)
    second.ask(SHAPES["question"], path_of(SHAPES))
    for tab in (page, second):
        expect(tab.history).to_have_count(2)
    page.expect_answers(SELF, DONE)
    second.expect_answers(SHAPES["answer"], DONE)
    third = Tab(page.context, url)
    for title, answer in ((WHO, SELF), (SHAPES["question"], SHAPES["answer"])):
        reopen(third, title)
        third.expect_answers(answer, DONE)
    second.ask(HOW_MANY)
    for tab in (second, third):
        tab.expect_answers(SHAPES["answer"], DONE, TWO, DONE)
    page.expect_answers(SELF, DONE)


def test_a_conversation_in_two_tabs_shows_the_same_words_while_they_come(page, url, model):
    words = begin(page, model)
    second = Tab(page.context, url, address(page))
    expect(second.user).to_have_text([WHO])
    expect(second.bot.first).to_contain_text(words)
    model.free_steps = 3
    for tab in (page, second):
        expect(tab.bot.first).to_have_text(re.compile("count"))
    second.to_front()
    second.stop.click()
    for tab in (second, page):
        tab.expect_answers("count", "Stopped.")
    model.step_s = 0
    second.ask(WHO)
    for tab in (second, page):
        expect(tab.user).to_have_count(2)
        tab.expect_answers("count", "Stopped.", SELF, DONE)


def test_somebody_else_sees_none_of_it(page, browser, url, model):
    model.step_s = 0
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    other = Tab(browser, url, address(page))
    expect(other.tab.get_by_text("What would you like to know?")).to_be_visible()
    for nothing in (other.user, other.bot, other.history):
        expect(nothing).to_have_count(0)
    other.ask(WHO)
    other.expect_answers(SELF, DONE)
    assert address(other) != address(page)
    expect(other.history).to_have_count(1)
    expect(page.history).to_have_count(1)
    page.expect_answers(SHAPES["answer"], DONE)
    other.close()


# ---- Something else is done during an answer ------------------------------------------------------------------------


def test_a_new_chat_during_an_answer(page, model):
    begin(page, model)
    page.new_chat()
    model.free_steps = 1
    wait_until(lambda: not model.free_steps)
    page.tab.wait_for_timeout(500)
    assert (page.user.count(), page.bot.count()) == (0, 0)
    page.ask(SHAPES["question"], path_of(SHAPES))
    expect(page.user).to_have_count(2)
    expect(page.bot).to_contain_text(["Waiting for another conversation’s answer"])
    model.step_s = 0
    page.expect_answers(SHAPES["answer"], "1 picture")
    reopen(page, WHO)
    page.expect_answers(SELF, DONE)
    expect(page.user).to_have_text([WHO])


def test_an_earlier_chat_during_an_answer_and_back(page, model):
    model.step_s = 0
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    page.new_chat()
    words = begin(page, model)
    reopen(page, SHAPES["question"])
    page.expect_answers(SHAPES["answer"], DONE)
    reopen(page, WHO)
    expect(page.bot.first).to_contain_text(words)
    expect(page.stop).to_have_count(1)
    model.step_s = 0
    page.expect_answers(SELF, DONE)
    expect(page.user).to_have_text([WHO])


@pytest.mark.returning
def test_retry_during_an_answer(page, model):
    begin(page, model)
    press_hidden(page, "Retry")
    expect(page.bot.last).not_to_have_text(FIRST_WORDS)  # begun anew
    model.free_steps = 1  # of the old answer
    expect(page.bot.last).to_have_text(re.compile("Reading|^I"))
    expect(page.bot).not_to_contain_text([FIRST_WORDS])
    model.step_s = 0
    page.expect_answers(SELF, DONE)
    expect(page.user).to_have_count(1)


def test_undo_during_an_answer(page, model):
    begin(page, model)
    press_hidden(page, "Undo")
    expect(page.box).to_have_value(WHO)
    for nothing in (page.user, page.bot, page.history):
        expect(nothing).to_have_count(0)
    model.step_s = 0
    wait_until(lambda: not is_busy(model))
    assert len(model.llm_infer_time) < 10  # nobody waits for the rest of it
    page.expect_ready()
    page.send.click()
    page.expect_answers(SELF, DONE)
    expect(page.user).to_have_text([WHO])
    expect(page.history).to_have_text([WHO])


@pytest.mark.returning
def test_edit_during_an_answer(page, model):
    model.step_s = 0
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    model.step_s, model.free_steps = 60, 4
    page.ask(WHO)
    expect(page.bot.last).to_have_text(re.compile("^A"), timeout=20_000)  # about the picture again
    words = page.bot.last.inner_text()
    page.press("Edit", "-right")
    page.tab.locator(".edit-textarea").fill(HOW_MANY)
    model.free_steps = 3
    expect(page.tab.locator("[role=log]")).to_contain_text(re.compile(rf"{words}\s*\S"))  # words come
    expect(page.tab.locator(".edit-textarea")).to_have_value(HOW_MANY)
    page.tab.get_by_label("Submit").first.click()
    expect(page.user.last).to_have_text(HOW_MANY)
    model.step_s = 0
    page.expect_answers(SHAPES["answer"], DONE, TWO, DONE)
    expect(page.user).to_have_count(3)


# ---- Back, a killed server ------------------------------------------------------------------------------------------


def test_back_and_forward_go_through_conversations(page, model):
    model.step_s = 0
    page.ask(WHO)
    page.expect_answers(SELF, DONE)
    who = address(page)
    page.new_chat()
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    shapes = address(page)
    page.tab.go_back()
    expect(page.bot).to_have_count(0)
    page.tab.go_back()
    page.expect_answers(SELF, DONE)
    expect(selected(page)).to_have_text(WHO)
    assert address(page) == who
    page.tab.go_forward()
    expect(page.bot).to_have_count(0)
    page.tab.go_forward()
    page.expect_answers(SHAPES["answer"], DONE)
    expect(selected(page)).to_have_text(SHAPES["question"])
    assert address(page) == shapes


def serves(program, port: int) -> bool:
    """Return whether a program answers requests."""
    assert program.poll() is None, program.said()
    with contextlib.suppress(httpx.TransportError):
        return HTTP.get(f"http://127.0.0.1:{port}/config").is_success
    return False


def test_an_open_page_goes_on_after_the_server_was_killed(profile, start, demo_dir, tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    first = start(SERVER, demo_dir, tmp_path, port, 0.3)
    wait_until(lambda: serves(first, port), 60)
    page = Tab(profile, url)
    page.ask(SHAPES["question"], path_of(SHAPES))
    expect(page.bot.last).to_have_text(re.compile("top right"), timeout=20_000)  # by then some of it was kept
    first.kill()
    second = start(SERVER, demo_dir, tmp_path, port, 0)
    wait_until(lambda: serves(second, port), 60)
    stopped = "Stopped. The program ended before the answer did."
    page.expect_answers("A", stopped)
    expect(page.history).to_have_text([SHAPES["question"]])
    page.ask(HOW_MANY)
    page.expect_answers("A", stopped, TWO, "1 picture")
    expect_pictures(page, 1)
    reload(page)
    page.expect_answers("A", stopped, TWO, "1 picture")
    expect_pictures(page, 1)
    page.leave(url)
    page.tab.close()


# ---- Names, files, settings -----------------------------------------------------------------------------------------


def test_a_conversation_is_called_as_its_owner_says(page, model):
    model.step_s = 0
    page.ask(WHO)
    page.expect_answers(SELF, DONE)
    name = page.tab.locator(".name textarea, .name input")
    expect(name).to_have_value(WHO)
    for called in ("Zahlen & Bilder", "", "  ", "Shapes"):
        name.fill(called)
        name.press("Enter")
        expect(page.history).to_have_text([called.strip() or WHO])
        expect(name).to_have_value(called.strip() or WHO)
    reload(page)
    expect(page.history).to_have_text(["Shapes"])
    expect(name).to_have_value("Shapes")
    page.ask("Thanks")
    page.expect_answers(SELF, DONE, "", DONE)
    expect(page.history).to_have_text(["Shapes"])


def test_a_conversation_is_deleted_only_when_its_owner_is_sure(page, url, folder, model):
    model.step_s = 0
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    key = address(page).partition("=")[2]
    second = Tab(page.context, url, address(page))
    second.expect_answers(SHAPES["answer"], DONE)
    delete = page.tab.get_by_role("button", name="Delete")
    page.to_front()
    page.tab.once("dialog", lambda dialog: dialog.dismiss())
    delete.click()
    page.tab.wait_for_timeout(600)
    page.expect_answers(SHAPES["answer"], DONE)
    assert (folder / "pictures" / key).is_dir()
    page.tab.once("dialog", lambda dialog: dialog.accept())
    delete.click()
    for tab in (page, second):
        for nothing in (tab.user, tab.bot, tab.history):
            expect(nothing).to_have_count(0)
        tab.tab.wait_for_url(url)
    assert not (folder / "pictures" / key).exists()
    again = Tab(page.context, url, f"?chat={key}")
    expect(again.bot).to_have_count(0)
    page.ask(WHO)
    page.expect_answers(SELF, DONE)
    expect(page.history).to_have_text([WHO])


def test_a_deleted_conversation_is_not_written_on(page, demo, folder, model):
    begin(page, model)
    key = address(page).partition("=")[2]
    page.tab.once("dialog", lambda dialog: dialog.accept())
    page.tab.get_by_role("button", name="Delete").click()
    expect(page.bot).to_have_count(0)
    expect(page.history).to_have_count(0)
    page.expect_ready()
    model.step_s = 0
    wait_until(lambda: not is_busy(model))
    demo.chat.flush()
    assert key.encode() not in (folder / "chat.sqlite3").read_bytes()


@pytest.mark.returning
def test_a_conversation_is_exported_with_its_pictures(page, model, tmp_path):
    model.step_s = 0
    page.ask(SHAPES["question"], path_of(SHAPES))
    page.expect_answers(SHAPES["answer"], DONE)
    odd = tmp_path / "two crosses (1) é.png"
    odd.write_bytes(path_of(CROSSES).read_bytes())
    page.ask(CROSSES["question"], odd)
    page.expect_answers(SHAPES["answer"], DONE, CROSSES["answer"], DONE)
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename.endswith(".zip")
    with zipfile.ZipFile(download.value.path()) as exported:
        text = exported.read("chat.md").decode()
        linked = [unquote(link) for link in re.findall(r"!\[\]\((\S+)\)", text)]
        assert sorted(exported.namelist()) == sorted(["chat.json", "chat.md", *linked])
        for link, file in zip(linked, (path_of(SHAPES), odd), strict=True):
            pixels = Image.open(io.BytesIO(exported.read(link)))
            assert ImageChops.difference(pixels, Image.open(file).convert("RGB")).getbbox() is None
    for said in (SHAPES["question"], SHAPES["answer"], CROSSES["question"], CROSSES["answer"]):
        assert said in text


@pytest.mark.returning
def test_what_was_typed_survives_a_reload(page):
    page.box.fill("How many")
    page.tab.reload()
    expect(page.box).to_have_value("How many")
    page.box.press_sequentially(" are there?")
    page.send.click()
    expect(page.user).to_have_text(["How many are there?"])
    expect(page.bot).to_have_count(2)
    page.tab.reload()
    expect(page.bot).to_have_count(2)
    expect(page.box).to_have_value("")


def test_settings_survive_a_reload(page, url):
    page.settings()
    page.allow(7)
    page.tab.get_by_label("System prompt").fill("Be brief.")
    page.tab.keyboard.press("Tab")
    page.tab.wait_for_timeout(300)
    second = Tab(page.context, url)
    second.settings()
    reload(page)
    page.settings()
    for tab in (page, second):
        expect(tab.tab.get_by_label("System prompt")).to_have_value("Be brief.")
        expect(tab.tab.get_by_label("range slider for Max new tokens")).to_have_value("7")
        expect(tab.tab.get_by_label("range slider for Top-p (if temperature > 0)")).to_have_value("0.9")
