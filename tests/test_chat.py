"""The chat: its handlers alone, its endpoint through gradio_client, and its page in a real browser."""

import asyncio
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import httpx
import psutil
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image, ImageChops
from playwright.sync_api import expect, sync_playwright
from transformers import AutoProcessor

from conftest import DEMO, demo_samples
from data_preprocessing import questions_about
from gradio_helper import LAUNCH, Chat, answered, edited, make_demo, remark, to_messages
from ov_mllama.conversation import plain
from ov_mllama_helper import OVMLlamaForConditionalGeneration, convert_mllama

SAMPLES = demo_samples()
LONG = 1500  # max_new_tokens for which the model below talks to the end


def path_of(sample) -> str:
    return str(DEMO / "samples" / sample["file_name"])


class TalkativeModel(OVMLlamaForConditionalGeneration):
    """The demo model, with answers long and slow enough to be stopped, and a way to make it fail."""

    def generate(self, max_new_tokens, **inputs):
        if max_new_tokens == LONG + 1:
            raise RuntimeError("out of order")
        if max_new_tokens == LONG:
            inputs["min_new_tokens"] = LONG
            inputs["stopping_criteria"] = [lambda *_, **__: time.sleep(0.05) or torch.tensor([False])]
        return super().generate(max_new_tokens=max_new_tokens, **inputs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TalkativeModel(convert_mllama(DEMO, tmp_path_factory.mktemp("chat") / "ov"))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(DEMO)


# ---- Handlers -------------------------------------------------------------------------------------------------------


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture(path):
    return {"type": "file", "file": {"path": path}}


def test_history_becomes_messages_with_pictures_where_they_were_asked_about():
    history = [
        user(picture("a.png"), picture("b.png"), {"type": "text", "text": "Which?"}),
        assistant("The first."),
        remark("1 s"),
        user({"type": "text", "text": "Sure?"}),
        assistant("Yes."),
    ]
    messages, pictures = to_messages({"text": "And here?", "files": ["c.png"]}, history, "Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [[part["type"] for part in message["content"]] for message in messages] == [
        ["text"],
        ["image", "image", "text"],
        ["text"],
        ["text"],
        ["text"],
        ["image", "text"],
    ]
    assert [path.name for path in pictures] == ["a.png", "b.png", "c.png"]


def test_what_was_not_answered_is_not_repeated():
    failed = [user("Broken?"), remark("⚠️ no picture")]
    assert answered([*failed, user("Hello"), assistant("Hi"), user("Stopped before a word")]) == [
        user("Hello"),
        assistant("Hi"),
    ]


def test_typed_special_tokens_stay_text(processor):
    text = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes<|image|>"
    ids = processor.tokenizer(plain(text), add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(processor.tokenizer.all_special_ids)
    assert processor.image_token_id not in ids
    assert plain("a < b | c") == "a < b | c"


def test_edit_takes_back_the_question_and_what_follows():
    history = [
        user(picture("a.png"), {"type": "text", "text": "Old?"}),
        assistant("Yes."),
        user({"path": "b.png"}, "Second?"),
        assistant("No."),
    ]
    edit = gr.EditData(None, {"index": 2, "value": "New?", "previous_value": "Second?"})
    assert edited(history, edit) == (history[:2], history[:2], {"text": "New?", "files": ["b.png"]})


def test_retry_gives_its_pictures_as_dicts():
    _, pictures = to_messages({"text": "Again?", "files": [{"path": "a.png", "meta": {}}]}, [])
    assert [path.name for path in pictures] == ["a.png"]


def test_nothing_asked():
    with pytest.raises(ValueError, match="no question"):
        to_messages({"text": "  ", "files": []}, [])


def respond(chat, message, **arguments):
    async def last():
        return [piece async for piece in chat.respond(message, [], **arguments)][-1]

    return asyncio.run(last())


def test_conversation_longer_than_the_context_is_refused_first(model, processor):
    sentence = respond(Chat(model, processor), {"text": "word " * 200_000})[0]["metadata"]["title"]
    assert "more than the" in sentence


def test_failing_generation_is_said_and_the_next_one_works(model, processor):
    chat, question = Chat(model, processor), {"text": "What can you do?"}
    assert "RuntimeError: out of order" in respond(chat, question, max_new_tokens=LONG + 1)[-1]["metadata"]["title"]
    assert respond(chat, question)[0] == "I describe shapes, count them and read digits."


def test_closing_the_stream_ends_the_generation(model, processor):
    async def closed_early():
        stream = Chat(model, processor).respond({"text": "What can you do?"}, [], max_new_tokens=LONG)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(closed_early())
    assert len(model.llm_infer_time) < 100
    assert threading.active_count() < 50


def test_sampling_and_greedy(model, processor, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "generate", lambda **arguments: seen.append(arguments))
    chat = Chat(model, processor)
    respond(chat, {"text": "?"}, temperature=0)
    respond(chat, {"text": "?"}, temperature=0.7, top_p=0.5)
    assert [arguments["do_sample"] for arguments in seen] == [False, True]
    assert (seen[1]["temperature"], seen[1]["top_p"]) == (0.7, 0.5)


# ---- Endpoint -------------------------------------------------------------------------------------------------------


def as_message(sample) -> dict:
    return {"text": sample["question"], "files": [handle_file(path_of(sample))]}


@pytest.fixture(scope="module")
def url(model, processor):
    demo = make_demo(model, processor, questions_about(DEMO)[:2])
    _, address, _ = demo.launch(**LAUNCH, prevent_thread_lock=True)
    yield address
    demo.close()


def test_it_listens_on_this_machine_only_and_serves_no_other_files(url):
    assert url.startswith("http://127.0.0.1:")
    port = int(url.rstrip("/").rpartition(":")[2])
    listening = {
        c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    for path in ("/etc/passwd", str(DEMO / "config.json"), "../../etc/passwd"):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)


def test_examples_are_those_given(model, processor):
    given = questions_about(DEMO)[:2]
    demo = make_demo(model, processor, given)
    shown = [example["text"] for (example,) in demo.examples]
    assert shown == [*(sample["question"] for sample in given), "What can you do?"]
    for (example,), sample in zip(demo.examples, given, strict=False):
        assert ImageChops.difference(Image.open(example["files"][0]["path"]), sample["image"]).getbbox() is None
    assert [example["text"] for (example,) in make_demo(model, processor).examples] == ["What can you do?"]


def test_client_asks_by_name(url):
    answer, note = Client(url, verbose=False).predict(as_message(SAMPLES[0]), api_name="/chat")
    assert answer == SAMPLES[0]["answer"]
    assert "s to the first token" in note["metadata"]["title"]


def test_a_client_is_one_conversation(url):
    client = Client(url, verbose=False)
    client.predict(as_message(SAMPLES[2]), api_name="/chat")
    follow_up = {"text": "How many shapes are there?", "files": []}
    assert client.predict(follow_up, api_name="/chat")[0] == "There are two shapes."
    assert Client(url, verbose=False).predict(follow_up, api_name="/chat")[0] != "There are two shapes."


def test_four_clients_at_once_get_their_own_answers(url):
    client_count, rounds, before = 4, 3, psutil.Process().memory_info().rss

    def ask(number):
        samples = [SAMPLES[(number * rounds + i) % len(SAMPLES)] for i in range(rounds)]
        asked = ((sample, Client(url, verbose=False)) for sample in samples)  # a conversation of its own for each
        return [(client.predict(as_message(sample), api_name="/chat")[0], sample["answer"]) for sample, client in asked]

    with ThreadPoolExecutor(client_count) as pool:
        answers = [pair for pairs in pool.map(ask, range(client_count)) for pair in pairs]
    assert len(answers) == client_count * rounds
    assert all(actual == expected for actual, expected in answers)
    assert psutil.Process().memory_info().rss - before < 300e6


# ---- Page -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    flags = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *flags])
        yield browser
        browser.close()


class Page:
    """One tab, as a person uses it."""

    def __init__(self, browser, url: str):
        self.tab = browser.new_context(viewport={"width": 1100, "height": 900}).new_page()
        self.requests = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(url)
        self.box = self.tab.locator("textarea[data-testid=textbox]").first
        expect(self.box).to_be_enabled(timeout=20_000)

    def ask(self, question: str, *files: str) -> None:
        if files:
            self.tab.locator("input[type=file]").first.set_input_files(list(files))
            expect(self.tab.locator(".thumbnail-item")).to_have_count(len(files), timeout=20_000)
        self.box.fill(question)
        self.tab.locator("button.submit-button").click()

    def allow(self, tokens: int) -> None:
        """Sets the longest answer, again if the page, just opened, sets it back."""
        for _ in range(20):
            self.tab.get_by_label("number input for Longest answer, tokens").fill(str(tokens))
            self.tab.keyboard.press("Tab")
            self.tab.wait_for_timeout(300)
            if self.tab.get_by_label("range slider for Longest answer, tokens").input_value() == str(tokens):
                return
        pytest.fail("the number was not taken")

    def expect_answer(self, text: str) -> None:
        expect(self.tab.locator("[data-testid=bot]").filter(has_text=text).last).to_be_visible(timeout=30_000)
        self.expect_ready()

    def expect_ready(self) -> None:
        expect(self.tab.locator("button.stop-button")).to_have_count(0, timeout=30_000)
        expect(self.box).to_be_enabled(timeout=30_000)


@pytest.fixture
def page(browser, url):
    page = Page(browser, url)
    yield page
    page.tab.context.close()


def test_conversation_about_a_picture(page, url):
    sample = SAMPLES[2]
    page.ask("Describe this image.", path_of(sample))
    page.expect_answer(sample["answer"])
    page.expect_answer("tokens per second")
    expect(page.tab.get_by_role("button", name="Share")).to_have_count(0)  # it would upload to the Hugging Face hub
    page.ask("How many shapes are there?")
    page.expect_answer("There are two shapes.")
    assert all(request.startswith((url, "data:", "blob:")) for request in page.requests), (
        "something came from elsewhere"
    )


def test_stop_then_go_on(page, model):
    page.tab.get_by_text("Settings").click()
    page.allow(LONG)
    page.ask("What can you do?")
    stop = page.tab.locator("button.stop-button")
    expect(stop).to_be_visible(timeout=20_000)
    expect(page.tab.locator("[data-testid=bot]").last).to_contain_text("shapes", timeout=20_000)
    stop.click(force=True)  # the page is too busy drawing for Playwright to call it still
    page.expect_ready()
    time.sleep(0.5)
    steps = len(model.llm_infer_time)
    time.sleep(0.5)
    assert len(model.llm_infer_time) == steps < LONG, "the generation went on"
    page.tab.get_by_role("button", name="New chat").click()
    page.allow(100)
    page.ask(SAMPLES[0]["question"], path_of(SAMPLES[0]))
    page.expect_answer(SAMPLES[0]["answer"])


def test_closing_the_tab_ends_the_generation(page, model):
    page.tab.get_by_text("Settings").click()
    page.allow(LONG)
    page.ask("What can you do?")
    expect(page.tab.locator("[data-testid=bot]").last).to_contain_text("shapes", timeout=20_000)
    page.tab.close()
    time.sleep(1)
    steps = len(model.llm_infer_time)
    time.sleep(0.5)
    assert len(model.llm_infer_time) == steps < LONG, "the generation went on"


def test_retry_undo_and_clear(page, model, monkeypatch):
    page.ask(SAMPLES[0]["question"], path_of(SAMPLES[0]))
    page.expect_answer(SAMPLES[0]["answer"])
    answers, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: answers.append(generate(**inputs)) or answers[-1])
    page.tab.get_by_label("Retry").last.click()
    for _ in range(100):  # the old answer is still there
        if answers:
            break
        page.tab.wait_for_timeout(100)
    assert answers
    monkeypatch.undo()
    page.expect_answer(SAMPLES[0]["answer"])
    expect(page.tab.get_by_text("No answer")).to_have_count(0)
    expect(page.tab.locator("[data-testid=user]").filter(has_text=SAMPLES[0]["question"])).to_have_count(1)
    page.tab.get_by_label("Undo").last.click()
    expect(page.box).to_have_value(SAMPLES[0]["question"])
    expect(page.tab.locator("[data-testid=bot]")).to_have_count(0)
    page.tab.locator("button.submit-button").click()
    page.expect_answer(SAMPLES[0]["answer"])
    page.tab.get_by_label("Clear").first.click()
    expect(page.tab.locator("[data-testid=user]")).to_have_count(0)


def test_edited_question_keeps_its_picture_and_what_came_before(page):
    page.ask(SAMPLES[0]["question"], path_of(SAMPLES[0]))
    page.expect_answer(SAMPLES[0]["answer"])
    page.ask(SAMPLES[2]["question"], path_of(SAMPLES[2]))
    page.expect_answer(SAMPLES[2]["answer"])
    page.tab.get_by_label("Edit").last.click()
    page.tab.locator(".edit-textarea").fill("How many shapes are there?")
    page.tab.get_by_label("Submit").first.click()
    page.expect_answer("There are two shapes.")
    expect(page.tab.locator("[data-testid=user]").filter(has_text=SAMPLES[2]["question"])).to_have_count(0)
    expect(page.tab.locator("[data-testid=user]").filter(has_text="How many shapes")).to_have_count(1)
    expect(page.tab.locator("[data-testid=user] img")).to_have_count(2)
    expect(page.tab.locator("[data-testid=bot]").filter(has_text=SAMPLES[0]["answer"])).to_have_count(1)


def test_saved_chat_is_reopened_and_gone_on_with(page):
    page.ask("Describe this image.", path_of(SAMPLES[2]))
    page.expect_answer(SAMPLES[2]["answer"])
    page.tab.get_by_role("button", name="New chat").click()
    expect(page.tab.locator("[data-testid=bot]")).to_have_count(0)
    page.tab.get_by_text("Describe this image.").click()  # in the sidebar, nowhere else now
    expect(page.tab.locator("[data-testid=bot]")).to_have_count(2)  # the answer and what it cost
    page.expect_answer(SAMPLES[2]["answer"])
    page.ask("How many shapes are there?")
    page.expect_answer("There are two shapes.")


def test_broken_picture_then_go_on(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    page.ask("What is it?", str(tmp_path / "broken.png"))
    page.expect_answer("broken.png is not a picture that can be read")
    page.ask(SAMPLES[1]["question"], path_of(SAMPLES[1]))
    page.expect_answer(SAMPLES[1]["answer"])


def test_two_tabs_keep_their_conversations_apart(browser, url):
    tabs = [Page(browser, url) for _ in range(2)]
    samples = SAMPLES[2], SAMPLES[0]
    for tab, sample in zip(tabs, samples, strict=True):
        tab.ask(sample["question"], path_of(sample))
    for tab, sample, other in zip(tabs, samples, samples[::-1], strict=True):
        tab.expect_answer(sample["answer"])
        assert other["answer"] not in tab.tab.inner_text("body")
        tab.tab.context.close()
