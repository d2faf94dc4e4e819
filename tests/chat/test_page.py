"""The chat page as a person sees and uses it, in a real browser: pictures of every kind, formulas, a phone, the
dark, a keyboard alone, and text that would like to be a program."""

import re

import pillow_heif
import pytest
from PIL import Image

from chat_page import CONTRAST, FOCUSED, SELF, WHO, Tab, drop, expect, path_of
from conftest import demo_samples

SAMPLE = demo_samples()[0]
PHONE = {"width": 390, "height": 844}
READABLE = 4.5  # contrast of text, by WCAG 2 AA


def test_it_says_who_answers_and_what_the_model_knows(page, model, demo_dir):
    foot = page.tab.locator(".block.foot")
    assert model.about == f"{demo_dir.name} · 16 bit, pictures 16 bit · CPU"
    expect(foot).to_contain_text(model.about)
    expect(foot).to_contain_text("Everything stays on the machine")
    expect(page.tab.locator(".placeholder")).to_contain_text(model.config.about)
    page.ask(WHO)
    page.expect_answers(SELF, "tokens per second")
    expect(foot).to_contain_text("tokens per second")


@pytest.mark.returning
def test_only_a_conversation_can_be_named_exported_or_deleted(page):
    for name in ("Export", "Delete"):
        expect(page.tab.get_by_role("button", name=name)).to_be_hidden()
    page.ask(WHO)
    page.expect_answers(SELF, "tokens per second")
    for name in ("Export", "Delete"):
        expect(page.tab.get_by_role("button", name=name)).to_be_visible()
    expect(page.tab.get_by_label("Name of this chat")).to_have_value(WHO)


# ---- Pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.returning
def test_heic_is_shown_and_answered_like_its_pixels(page, tmp_path):
    pillow_heif.from_pillow(SAMPLE["image"].convert("RGB")).save(tmp_path / "a.heic", quality=90)
    pixels = pillow_heif.open_heif(tmp_path / "a.heic")
    Image.frombytes(pixels.mode, pixels.size, bytes(pixels.data), "raw", pixels.mode, pixels.stride).save(
        tmp_path / "a.png"
    )
    answers = []
    for name in ("a.heic", "a.png"):
        page.ask(SAMPLE["question"], tmp_path / name)
        page.expect_answers("", "1 picture")
        answers.append(page.bot.first.inner_text())
        expect(page.tab.locator(".message.component img")).to_be_visible()
        page.tab.wait_for_function("document.querySelector('.message.component img').naturalWidth > 0")
        page.new_chat()
    assert answers[0] == answers[1]


@pytest.mark.returning
def test_what_is_no_picture_is_refused_at_once(page, tmp_path):
    message = page.tab.get_by_test_id("toast-body")
    for name, kind in (("a.svg", "image/svg+xml"), ("a.txt", "text/plain")):
        (tmp_path / name).write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        for target in ("", "[role=log]", ".multimodal-textbox textarea"):
            if target:
                drop(page, {name: kind}, target)
            else:
                page.tab.locator(".multimodal-textbox input[type=file]").first.set_input_files(str(tmp_path / name))
            expect(message).to_contain_text(re.compile("Invalid file type|Accepted formats: .jpg"))
            expect(page.tab.locator(".thumbnail-item")).to_have_count(0)
            page.tab.get_by_test_id("toast-close").click()
            expect(message).to_have_count(0)


@pytest.mark.returning
def test_pictures_may_be_dropped_anywhere_and_pasted(page):
    thumbnails = page.tab.locator(".thumbnail-item")
    for count, target in enumerate(("[role=log]", ".sidebar", ".multimodal-textbox textarea"), 1):
        drop(page, {f"{count}.png": "image/png"}, target)
        expect(thumbnails).to_have_count(count)
    page.box.focus()
    drop(page, {"4.png": "image/png"}, ".multimodal-textbox textarea", "paste")
    expect(thumbnails).to_have_count(4)
    page.ask("What do you see?")
    page.expect_answers("", "4 pictures")


@pytest.mark.returning
def test_a_picture_opens_large_and_closes(page):
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    picture, large = page.tab.locator(".message.component img"), page.tab.locator("dialog.picture")
    expect(page.tab.get_by_label("Fullscreen")).to_be_hidden()
    small = picture.bounding_box()["width"]
    picture.click()
    expect(large).to_be_visible()
    assert large.locator("img").bounding_box()["width"] > 2 * small
    large.click()
    expect(large).to_have_count(0)
    page.tab.get_by_label("Open the picture large").focus()
    page.tab.keyboard.press("Enter")
    expect(large).to_be_visible()
    page.tab.keyboard.press("Escape")
    expect(large).to_have_count(0)


# ---- Text -----------------------------------------------------------------------------------------------------------


@pytest.mark.returning
def test_formulas_are_set_and_sums_of_money_are_not(page, says):
    says.text = (
        "It is $x^2$ for $5 and $10, or \\(y_1\\), or\n\n$$\nz_2\n$$\n\nand \\[w^3\\] and `$HOME$ $a$`\n\n"
        "```\ncost = $b$ \\(c\\)\n```\n"
    )
    page.ask("How much?")
    page.expect_answers("for $5 and $10, or", "1 s")
    formulas = page.bot.first.locator(".katex annotation")
    expect(formulas).to_have_text(["x^2", "y_1", "z_2", "w^3"])
    expect(page.bot.first.locator(".katex-display")).to_have_count(2)
    expect(page.bot.first.locator("code")).to_have_text(["$HOME$ $a$", "cost = $b$ \\(c\\)\n"])
    expect(page.bot.first.locator(".katex-error")).to_have_count(0)


@pytest.mark.returning
def test_text_is_no_program(page, says):
    evil = (
        "<script>window.__pwned = 1</script><img src=x onerror='window.__pwned = 2'>"
        "<iframe srcdoc='<script>parent.__pwned = 3</script>'></iframe>"
        "<a href='javascript:window.__pwned = 4'>a</a> [b](javascript:window.__pwned=5) <b onclick='__pwned = 6'>c</b> "
        "$\\href{javascript:window.__pwned=7}{d}$"
    )
    says.text = evil
    page.ask(evil)
    page.expect_answers("", "1 s")
    name = page.tab.get_by_label("Name of this chat")
    name.fill("<img src=x onerror='window.__pwned = 8'>")
    name.press("Tab")
    expect(page.history.first).to_contain_text("onerror")
    for link in page.tab.locator("[role=log] a, [role=log] b").all():
        link.click(force=True, timeout=2000)
    page.tab.wait_for_timeout(300)
    assert page.tab.evaluate("window.__pwned") is None
    assert len(page.context.pages) == 1


@pytest.mark.returning
def test_who_reads_above_stays_there_while_an_answer_grows_and_who_is_at_the_end_follows(page, says):
    log = page.tab.locator("[role=log]")
    says.over, says.text = False, "line\n\n" * 60
    page.ask("Long?")
    at_the_end = "() => { const e = document.querySelector('[role=log]'); return e.scrollHeight > 1500 && "
    at_the_end += "e.scrollTop + e.clientHeight > e.scrollHeight - 40 }"
    page.tab.wait_for_function(at_the_end)
    says.text += "more\n\n" * 20
    expect(page.bot.first).to_contain_text("more")
    page.tab.wait_for_function(at_the_end)
    log.hover()
    page.tab.mouse.wheel(0, -600)
    page.tab.wait_for_function(f"!({at_the_end})()")
    page.tab.wait_for_timeout(300)
    top, height = log.evaluate("e => [e.scrollTop, e.scrollHeight]")
    says.text += "and more\n\n" * 20
    expect(page.bot.first).to_contain_text("and more")
    says.text, says.over = says.text + "the end", True
    page.expect_answers("the end", "1 s")
    assert log.evaluate("e => e.scrollTop") == top
    assert log.evaluate("e => e.scrollHeight") > height
    page.ask("And now?")
    page.tab.wait_for_function(at_the_end)


# ---- Wherever it is read --------------------------------------------------------------------------------------------


def test_on_a_phone(browser, url):
    page = Tab(browser, url, viewport=PHONE, has_touch=True, is_mobile=True)
    tab = page.tab
    expect(tab.locator(".sidebar.open")).to_have_count(0)
    page.box.tap()
    page.box.fill(WHO)
    page.send.tap()
    page.expect_answers(SELF, "tokens per second")
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert tab.locator("[role=log]").evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    top = tab.locator(".top").bounding_box()
    assert top["y"] + top["height"] < 0.15 * PHONE["height"]
    tab.locator(".sidebar .toggle-button").tap()
    page.history.first.tap()
    expect(tab.locator(".sidebar.open")).to_have_count(0)
    for part in (page.box, page.send, page.note, tab.get_by_role("button", name="Delete")):
        box = part.bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= PHONE["width"]
        assert 0 <= box["y"] < box["y"] + box["height"] <= PHONE["height"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, url, says, scheme):
    page = Tab(browser, url, color_scheme=scheme)
    says.text = "An answer with [a link](https://example.org) and `code`."
    page.ask("A question")
    page.expect_answers("An answer", "1 s")
    back = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")
    parts = {
        "question": page.user.locator("p"),
        "answer": page.bot.first.locator("p"),
        "link": page.bot.first.locator("a"),
        "code": page.bot.first.locator("code"),
        "note": page.note.locator("p"),
        "foot": page.tab.locator(".block.foot p"),
        "chat": page.history.first.locator("span"),
        "button": page.tab.get_by_role("button", name="Export"),
    }
    found = {name: part.evaluate(CONTRAST) for name, part in parts.items()}
    assert min(found.values()) >= READABLE, found
    page.close()


def test_everything_is_reached_and_done_with_a_keyboard(page):
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.tab.get_by_label("Toggle Sidebar").focus()  # the page's first
    reached = []
    while page.tab.keyboard.press("Tab") or (focused := page.tab.evaluate(FOCUSED)):
        name, seen = focused
        assert seen, f"where the keyboard is cannot be seen: {name}"
        reached.append(name)
        assert len(reached) < 50
    wanted = {"New chat", SAMPLE["question"], "Settings", "Export", "Delete", "Name of this chat", "Copy message"}
    wanted |= {"Edit", "Retry", "Undo", "Upload a file", "Submit", "Ask a question or add pictures"}
    assert wanted | {"Open the picture large"} <= set(reached), wanted - set(reached)
    page.tab.get_by_label("Retry").focus()
    page.tab.keyboard.press("Enter")
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.tab.get_by_role("button", name="New chat").focus()
    page.tab.keyboard.press("Enter")
    expect(page.bot).to_have_count(0)
    page.box.focus()
    page.tab.keyboard.type(WHO)
    page.tab.keyboard.press("Enter")
    page.expect_answers(SELF, "tokens per second")
    expect(page.history).to_have_count(2)
    page.history.last.locator("input").focus()
    page.tab.keyboard.press("Space")
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.tab.once("dialog", lambda dialog: dialog.accept())
    page.tab.get_by_role("button", name="Delete").focus()
    page.tab.keyboard.press("Enter")
    expect(page.bot).to_have_count(0)
    expect(page.box).to_be_focused()


def test_what_a_screen_reader_says(page):
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    expect(page.tab.get_by_role("group", name="Today")).to_be_visible()
    expect(page.tab.get_by_role("radio", name=SAMPLE["question"])).to_be_checked()
    expect(page.tab.get_by_label("Open the picture large")).to_have_count(1)
    unnamed = "buttons => buttons.filter(b => b.checkVisibility() && !(b.ariaLabel || b.innerText.trim() || b.title))"
    buttons = page.tab.locator("button, [role=button], a")
    assert buttons.evaluate_all(f"b => ({unnamed})(b).map(b => b.outerHTML.slice(0, 200))") == []


def test_nothing_is_said_in_the_console_during_a_conversation(page):
    page.ask(SAMPLE["question"], path_of(SAMPLE))
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.press("Retry")
    page.tab.wait_for_timeout(300)
    page.expect_answers(SAMPLE["answer"], "1 picture")
    page.tab.locator(".message.component img").click()
    page.tab.keyboard.press("Escape")
    page.settings()
    page.allow(3)
    page.ask(WHO)
    page.expect_answers(SAMPLE["answer"], "1 picture", "", "Token limit reached")
    page.new_chat()
    page.history.first.click()
    page.expect_answers(SAMPLE["answer"], "1 picture", "", "Token limit reached")
    page.tab.once("dialog", lambda dialog: dialog.accept())
    page.tab.get_by_role("button", name="Delete").click()
    expect(page.history).to_have_count(0)
    assert page.console == []
