"""Shared by the tests of the chat: the demo model as slow as the 11B, answers made up, and a browser's tab as a person
uses it."""

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from playwright.sync_api import expect as check

from conftest import DEMO
from ov_mllama.runtime.image_cache import EncodingTimes
from ov_mllama.runtime.inference import check_stop
from ov_mllama_helper import OVMLlamaForConditionalGeneration

SELF = "I describe shapes, count them and read digits."  # the demo's answer to:
WHO = "What can you do?"


class Slow(OVMLlamaForConditionalGeneration):
    """The demo model, as slow as the 11B.

    Attributes:
        picture_s, step_s: seconds that each picture and each step of the language model take.
        free_steps: so many of the next steps take no time.
        looks: moments at which a picture was begun.
        given_up: how many were.
    """

    def __init__(self, *args, **options):
        self.picture_s = self.step_s = 0.0
        self.free_steps = 0
        super().__init__(*args, **options)
        self.as_new()
        self._look, self.image_encoder._infer = self.image_encoder._infer, self.look
        self._step, self.language_model.infer = self.language_model.infer, self.step

    def as_new(self, picture_s=0.0, step_s=0.0):
        self.picture_s = self.step_s = 0.0  # or what is still computed for an earlier test holds up `forget`
        self.forget()
        self.image_encoder._clock = EncodingTimes()
        self.picture_s, self.step_s, self.free_steps, self.looks, self.given_up = picture_s, step_s, 0, [], 0

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
        began = time.perf_counter()
        while time.perf_counter() - began < self.step_s and not self.free_steps:  # which may change meanwhile
            time.sleep(0.02)
        self.free_steps = max(0, self.free_steps - 1)
        return self._step(request, inputs)


class Says:
    """An answer in place of the model's: `text`, which may grow until it is `over`."""

    def __init__(self):
        self.text, self.over = "", True

    async def words(self, model, processor, note, progress, **inputs):
        said = 0
        progress.enter("Writing")
        while not self.over or said < len(self.text):
            if said < len(self.text):
                piece, said = self.text[said:], len(self.text)
                yield piece
            await asyncio.sleep(0.02)
        note(SimpleNamespace(times="1 s"), False)


def ahead_threads() -> list[threading.Thread]:
    """Those that encode pictures ahead."""
    return [thread for thread in threading.enumerate() if thread.name == "image prefetch"]


def wait_until(condition, seconds=30.0) -> float:
    """Seconds until something holds."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds
        time.sleep(0.02)
    return time.perf_counter() - started


def path_of(sample: dict) -> Path:
    """Of a sample's picture."""
    return DEMO / "samples" / sample["file_name"]


class expect:  # noqa: N801
    """Playwright's assertions about a locator, tried every 20 ms; Playwright itself soon tries only every second."""

    def __init__(self, locator):
        self._locator, self._assertions = locator, check(locator)

    def __getattr__(self, name: str):
        def soon(*expected, timeout=20_000, **options) -> None:
            deadline = time.monotonic() + timeout / 1000
            while True:
                try:
                    return getattr(self._assertions, name)(*expected, timeout=1, **options)
                except AssertionError:
                    if time.monotonic() > deadline:
                        raise
                self._locator.page.wait_for_timeout(20)

        return soon


class Tab:
    """A browser's tab with the chat in it.

    Args:
        browser: a browser, whose tab is somebody else's; or a context, whose tabs are one person's.
        query: of the address.

    Attributes:
        shown: whether the tab has the page, and has not left it.
    """

    def __init__(self, browser, url: str, query: str = "", **context):
        self.context = browser
        if hasattr(browser, "new_context"):
            self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **context})
        self.tab = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.console: list[str] = []  # what a developer would be warned of there
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", lambda line: line.type in ("error", "warning") and self.console.append(line.text))
        self.box = self.tab.get_by_placeholder("Ask a question")
        self.user = self.tab.locator("[data-testid=user]")  # one for each picture and each text
        self.bot = self.tab.locator("[data-testid=bot]")  # answers and remarks
        self.note = self.tab.locator(".thought-group")
        self.history = self.tab.locator(".history label")
        self.send = self.tab.locator("button.submit-button")
        self.stop = self.tab.locator("button.stop-button")
        self.load(url + query)

    def load(self, address: str) -> None:
        """Load the page, and wait until it is shown."""
        self.shown = True
        self.tab.goto(address)
        self.expect_ready()
        expect(self.tab.locator(".block.foot")).to_contain_text("Everything stays")

    def leave(self, url: str) -> None:
        """Leave the page as a tab that is closed does: `load` then is the first load of somebody who was never here. It
        takes half of a new tab's time, whose process compiles the page's scripts again."""
        self.shown = False
        self.tab.goto(f"{url}robots.txt")  # which may not exist, but is of the page's origin
        self.tab.evaluate("() => { sessionStorage.clear(); localStorage.clear(); }")
        self.tab.mouse.move(0, 0)
        self.context.clear_cookies()

    def forget(self) -> None:
        """Forget what was seen and permitted so far."""
        self.context.clear_permissions()
        for seen in (self.requests, self.errors, self.console):
            seen.clear()

    def close(self) -> None:
        self.context.close()

    def to_front(self) -> None:
        """Show the tab before others: behind them, each click waits for frames, which come once a second there."""
        self.tab.bring_to_front()

    def attach(self, *files) -> None:
        """Adds pictures to the question."""
        chosen = self.tab.locator(".multimodal-textbox input[type=file]").first
        chosen.evaluate("input => input.value = ''")  # or the same file again is no change
        chosen.set_input_files([str(file) for file in files])
        expect(self.tab.locator(".thumbnail-item")).to_have_count(len(files), timeout=20_000)

    def ask(self, question: str, *files) -> None:
        """Sends a question."""
        self.to_front()
        if files:
            self.attach(*files)
        self.box.fill(question)
        self.send.click()
        expect(self.box).to_have_value("")

    def expect_answers(self, *texts: str, timeout=20_000) -> None:
        """Waits until the page shows these answers and remarks, in this order and no others, and takes a question."""
        expect(self.bot).to_have_count(len(texts), timeout=timeout)
        expect(self.bot).to_contain_text(list(texts), timeout=timeout)
        self.expect_ready()

    def expect_ready(self) -> None:
        """Waits until a question can be sent."""
        expect(self.send).to_have_count(1, timeout=20_000)
        expect(self.box).to_be_enabled(timeout=20_000)

    def press(self, label: str, side: str = "") -> None:
        """Presses one of the buttons under the last message that has it; under the last question (`side` "-right") or
        answer ("-left")."""
        self.tab.locator(f".message-buttons{side} [aria-label='{label}']:visible").last.click()

    def new_chat(self) -> None:
        """Begins another conversation."""
        self.tab.get_by_role("button", name="New chat").click()
        expect(self.bot).to_have_count(0)

    def settings(self) -> None:
        """Opens them."""
        self.to_front()
        self.tab.get_by_text("Settings").click()

    def allow(self, tokens: int) -> None:
        """Sets the longest answer, again where the settings, just opened, set it back."""
        shown = self.tab.get_by_label("range slider for Max new tokens")
        for _ in range(20):
            self.tab.get_by_label("number input for Max new tokens").fill(str(tokens))
            self.tab.keyboard.press("Tab")
            self.tab.wait_for_timeout(300)
            if shown.input_value() == str(tokens):
                return
        raise AssertionError("the number was not taken")


def drop(page, files: dict[str, str], target: str, event="drop") -> None:
    """Drops, or pastes, files on a part of the page; a picture is painted there."""
    page.tab.evaluate(
        """async ([files, target, kind]) => {
            const data = new DataTransfer();
            for (const [name, type] of Object.entries(files)) {
                const canvas = new OffscreenCanvas(40, 30);
                const brush = canvas.getContext("2d");
                brush.fillStyle = `hsl(${parseInt(name) * 90} 50% 50%)`;
                brush.fillRect(5, 5, 20, 20);
                const content = type === "image/png" ? await canvas.convertToBlob() : "no picture";
                data.items.add(new File([content], name, { type }));
            }
            const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
            document.querySelector(target).dispatchEvent(event);
        }""",
        [files, target, event],
    )


# Of an element in the page: how far its text stands out from what is behind it, by WCAG 2
CONTRAST = """element => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const above = [];
    for (let e = element; e; e = e.parentElement) above.unshift(e);
    const layers = above.map(e => getComputedStyle(e));
    const painted = (text) => {
        canvas.globalAlpha = 1;
        canvas.fillStyle = "white";
        canvas.fillRect(0, 0, 1, 1);
        for (const style of layers) {
            canvas.fillStyle = style.backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
        }
        canvas.globalAlpha = layers.reduce((alpha, style) => alpha * style.opacity, 1);
        canvas.fillStyle = text ? layers.at(-1).color : "transparent";
        canvas.fillRect(0, 0, 1, 1);
        const light = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
            value => value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2] + 0.05;
    };
    const [one, other] = [painted(true), painted(false)];
    return Math.max(one, other) / Math.min(one, other);
}"""

# Where the keyboard is: its name, and whether that can be seen; null at the page's end
FOCUSED = """() => {
    const e = document.activeElement, around = e.closest("label");
    if (e === document.body) return null;
    const seen = [e, around].some(each => each && getComputedStyle(each).outlineStyle !== "none");
    const name = e.ariaLabel || e.innerText || e.placeholder || around?.innerText || "";
    return [name.trim().split("\\n")[0], seen || e.matches("textarea, input")];
}"""
