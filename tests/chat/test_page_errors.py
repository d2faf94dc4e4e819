"""Errors that a page shows: saves that fail, refusals, pictures that cannot be opened."""

import io
import sqlite3
from pathlib import Path

import pytest
from gradio.utils import get_upload_folder
from PIL import Image, ImageChops

from chat_client import png
from chat_page import SELF, WHO, Tab, expect, wait_until
from conftest import demo_samples
from ov_mllama.chat.page_input import MAX_QUESTION
from ov_mllama.chat.store import Conversations

SAMPLE = demo_samples()[0]


def test_save_that_fails_is_said_and_tried_again(page, url, says, demo, monkeypatch):

    says.text = "Yes."
    foot, real = page.tab.locator(".block.foot"), Conversations.write

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Conversations, "write", full, raising=False)
    page.ask("Is it kept?")
    page.expect_answers("Yes.", "1 s")
    expect(foot).to_contain_text("This chat could not be saved (database or disk is full)")
    monkeypatch.setattr(Conversations, "write", real)
    expect(foot).not_to_contain_text("could not be saved", timeout=10_000)
    expect(page.history).to_have_text(["Is it kept?"])
    second = Tab(page.context, url)
    expect(second.history).to_have_text(["Is it kept?"])


@pytest.mark.returning
def test_refusal_is_shown_below_the_box(page, says, demo, tmp_path):
    """Gradio's page shows no error of an event without queue: a question seemed to do nothing."""
    says.text = "Yes."
    foot = page.tab.locator(".block.foot")
    (tmp_path / "gone <b>.png").write_bytes(png())
    page.attach(tmp_path / "gone <b>.png")
    for upload in Path(get_upload_folder()).rglob("gone*"):  # as Gradio does after an hour
        upload.unlink()
    page.box.fill("What is it?")
    page.send.click()
    expect(foot).to_contain_text("has waited too long")
    expect(foot.locator("b")).to_have_count(0)
    expect(page.box).to_have_value("What is it?")
    page.tab.locator(".thumbnail-item button").first.click()
    page.send.click()
    page.expect_answers("Yes.", "1 s")
    expect(foot).not_to_contain_text("has waited too long")
    page.box.fill("x" * (MAX_QUESTION + 1))
    page.send.click()
    expect(foot).to_contain_text(f"use at most {MAX_QUESTION}")
    page.box.fill("Short")
    page.send.click()
    page.expect_answers("Yes.", "1 s", "Yes.", "1 s")
    expect(foot).not_to_contain_text("use at most")


@pytest.mark.returning
@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "too little memory"), (OSError(5, "Input/output error"), "Input/output error")]
)
def test_picture_that_the_machine_cannot_open_is_said(page, says, tmp_path, monkeypatch, error, said):
    says.text = "Yes."
    (tmp_path / "picture.png").write_bytes(png())
    page.attach(tmp_path / "picture.png")
    page.box.fill("What is it?")

    def fails(source):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("ov_mllama.chat.pages.load_image", fails)
        page.send.click()
        expect(page.tab.locator(".block.foot")).to_contain_text(said)
    expect(page.box).to_have_value("What is it?")
    page.send.click()
    page.expect_answers("Yes.", "1 s")


def test_example_is_answered_as_before(page, slow_demo):
    slow_demo.as_new()
    page.tab.get_by_role("button", name=WHO).click()
    page.expect_answers(SELF, "tokens per second")
    page.new_chat()
    page.tab.get_by_role("button", name=SAMPLE["question"]).click()
    page.expect_answers(SAMPLE["answer"], "1 picture")
    picture = page.tab.locator(".message.component img")
    wait_until(lambda: picture.evaluate("picture => picture.complete && picture.naturalWidth > 0"))
    content = page.tab.request.get(picture.get_attribute("src")).body()
    assert ImageChops.difference(Image.open(io.BytesIO(content)), SAMPLE["image"].convert("RGB")).getbbox() is None
