"""What the tests of the chat share: the demo model as slow as the 11B, and a browser's tab as a person uses it."""

import threading
import time
from pathlib import Path

from playwright.sync_api import expect

from conftest import DEMO
from ov_mllama.inference import check_stop
from ov_mllama.progress import PictureClock
from ov_mllama_helper import OVMLlamaForConditionalGeneration

SELF = "I describe shapes, count them and read digits."  # the demo's answer to:
WHO = "What can you do?"


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

    def as_new(self, picture_s=0.0, step_s=0.0):
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


def ahead_threads() -> list[threading.Thread]:
    """Those that encode pictures ahead."""
    return [thread for thread in threading.enumerate() if thread.name == "pictures ahead"]


def wait_until(condition, seconds=8.0) -> float:
    """Seconds until something holds."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds
        time.sleep(0.02)
    return time.perf_counter() - started


def path_of(sample: dict) -> Path:
    """Of a sample's picture."""
    return DEMO / "samples" / sample["file_name"]


class Tab:
    """A browser's tab with the chat in it.

    Args:
        browser: a browser, whose tab is somebody else's; or a context, whose tabs are one person's.
        query: of the address.
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
        self.tab.goto(url + query)
        self.box = self.tab.get_by_placeholder("Ask a question")
        self.user = self.tab.locator("[data-testid=user]")  # one for each picture and each text
        self.bot = self.tab.locator("[data-testid=bot]")  # answers and remarks
        self.note = self.tab.locator(".thought-group")
        self.history = self.tab.locator(".history label")
        self.send = self.tab.locator("button.submit-button")
        self.stop = self.tab.locator("button.stop-button")
        self.expect_ready()
        expect(self.tab.locator(".block.foot")).to_contain_text("Everything stays")  # the page is shown

    def close(self) -> None:
        self.context.close()

    def attach(self, *files) -> None:
        """Adds pictures to the question."""
        self.tab.locator("input[type=file]").first.set_input_files([str(file) for file in files])
        expect(self.tab.locator(".thumbnail-item")).to_have_count(len(files), timeout=20_000)

    def ask(self, question: str, *files) -> None:
        """Sends a question."""
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

    def press(self, label: str) -> None:
        """Presses one of the buttons under the last message that has it."""
        self.tab.get_by_label(label).last.click()

    def new_chat(self) -> None:
        """Begins another conversation."""
        self.tab.get_by_role("button", name="New chat").click()
        expect(self.bot).to_have_count(0)

    def settings(self) -> None:
        """Opens them."""
        self.tab.get_by_text("Settings").click()

    def allow(self, tokens: int) -> None:
        """Sets the longest answer."""
        self.tab.get_by_label("number input for Longest answer, tokens").fill(str(tokens))
        self.tab.keyboard.press("Tab")
        expect(self.tab.get_by_label("range slider for Longest answer, tokens")).to_have_value(str(tokens))
        self.tab.wait_for_timeout(200)
