"""Typed text and its display: words that an input method composes, right-to-left text; what is announced."""

import pytest

from chat_page import SELF, WHO, expect

HEBREW, ENGLISH = "שלום, מה יש בתמונה?", "And in English: 3 * 4?"
MIXED = f"""{HEBREW}

- ראשון `red.png`
- second

| צבע | מספר |
|---|---|
| אדום | 3 |

{ENGLISH}

```
x = "שלום"
```
"""


def compose(page, code: int, kinds=("keydown", "keypress")) -> None:
    """Compose a word in the field that has the focus, and press Enter while it is composed.

    Args:
        code: 229 as browsers report the key, 13 as some input methods' programs send it.
        kinds: events of the key besides those that the browser makes.
    """
    devtools = page.context.new_cdp_session(page.tab)
    devtools.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": code}
    devtools.send("Input.dispatchKeyEvent", {"type": "keyDown", "text": "\r" if code == 13 else "", **enter})
    devtools.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    for kind in kinds:  # as Safari sends it after the composition
        page.tab.evaluate(
            "kind => document.activeElement.dispatchEvent(new KeyboardEvent(kind, {key: 'Enter', code: 'Enter', "
            "keyCode: 229, bubbles: true, cancelable: true}))",
            kind,
        )
    devtools.send("Input.insertText", {"text": "日本"})


def test_enter_that_ends_a_composition_sends_and_renames_nothing(page):
    for code in (229, 13):
        page.box.focus()
        compose(page, code)
        expect(page.box).to_have_value("日本")
        page.box.fill("")
    page.box.fill(WHO)
    page.tab.keyboard.press("Enter")
    page.expect_answers(SELF, "tokens per second")
    expect(page.user).to_have_count(1)

    name = page.tab.get_by_label("Name of this chat")
    name.fill("")
    compose(page, 13)
    expect(name).to_have_value("日本")
    page.tab.wait_for_timeout(400)  # a rename would be shown
    expect(page.history).to_have_text([WHO])
    name.press("Enter")
    expect(page.history).to_have_text(["日本"])

    page.press("Edit")
    page.tab.locator(".edit-textarea").fill("")
    compose(page, 13)
    page.tab.wait_for_timeout(400)
    expect(page.tab.locator(".edit-textarea")).to_have_value("日本")


@pytest.mark.returning
def test_a_composition_goes_on_when_an_answer_ends(page, says):
    says.over, says.text = False, "An answer"
    page.ask("Slow?")
    expect(page.bot.first).to_contain_text("An answer")
    page.box.focus()
    devtools = page.context.new_cdp_session(page.tab)
    devtools.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
    says.over = True
    page.expect_answers("An answer", "1 s")
    expect(page.box).to_have_value("にほん")
    devtools.send("Input.insertText", {"text": "日本"})
    expect(page.box).to_have_value("日本")
    page.box.fill("")


@pytest.mark.returning
def test_text_has_the_direction_of_its_language(page, says):
    says.text = MIXED
    page.ask(f"{HEBREW}\n{ENGLISH}")
    page.expect_answers(HEBREW, "1 s")
    direction = "e => [getComputedStyle(e).direction, getComputedStyle(e).textAlign]"
    answer = page.bot.first
    parts = answer.locator("p"), answer.locator("ul"), answer.locator("table"), answer.locator("p").last
    assert [part.first.evaluate(direction)[0] for part in parts] == ["rtl", "rtl", "rtl", "ltr"]
    assert answer.locator("td").first.evaluate(direction) == ["rtl", "start"]
    for code in answer.locator("code").all():
        assert code.evaluate(direction)[0] == "ltr"
    box, history = page.box, page.history.first.locator("span")
    box.fill(HEBREW)
    assert [part.evaluate(direction) for part in (box, history)] == [["rtl", "start"]] * 2
    box.fill(ENGLISH)
    assert box.evaluate(direction) == ["ltr", "start"]
    box.fill("")
    # each line of a question by itself: both begin at their own side
    sides = """e => [...e.querySelectorAll('p')].flatMap(p => {
        const text = p.firstChild, range = document.createRange(), at = text.data.indexOf('And');
        const left = (from, to) => (range.setStart(text, from), range.setEnd(text, to), range.getBoundingClientRect());
        return [left(0, 1).right - left(1, 2).right > 0, left(at, at + 1).left < left(at + 1, at + 2).left];
    })"""
    assert page.user.first.evaluate(sides) == [True, True]


@pytest.mark.returning
def test_what_is_announced(page, says):
    status, log = page.tab.locator(".announced"), page.tab.locator("[role=log]")
    says.over, says.text = False, "It is *so* <b>."
    page.ask(f"{ENGLISH}\nMore")
    expect(status).to_have_text("Answering")
    expect(log).to_have_attribute("aria-busy", "true")
    says.over = True
    page.expect_answers("It is so", "1 s")
    expect(status).to_have_text("Ready for a question")
    expect(log).to_have_attribute("aria-busy", "false")
    expect(page.user.first).to_have_attribute("aria-label", f"user's message: {ENGLISH}\nMore")
    expect(page.bot.first).to_have_attribute("aria-label", "bot's message: It is *so* <b>.")
    for role, name in (("navigation", "Chats and settings"), ("group", "How closely pictures are looked at")):
        expect(page.tab.get_by_role(role, name=name)).to_have_count(1)
    unlabelled = """() => [...document.querySelectorAll('input, textarea, select')].filter(e => e.checkVisibility()
        && e.type !== 'file' && !(e.ariaLabel || e.placeholder || e.labels?.length)).map(e => e.outerHTML)"""
    page.settings()
    assert page.tab.evaluate(unlabelled) == []
    page.settings()
