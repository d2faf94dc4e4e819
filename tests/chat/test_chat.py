"""The chat: what it makes of a conversation, its endpoint through gradio_client, and its page in a real browser."""

import asyncio
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client, handle_file
from PIL import Image, ImageChops

from chat_page import SELF, WHO, Tab, expect, path_of
from conftest import DEMO, demo_samples
from data_preprocessing import questions_about
from gradio_helper import LAUNCH, make_demo, written
from ov_mllama.chat.answers import Chat, GenerationSettings, to_messages
from ov_mllama.chat.render import CONTINUE, mark_formulas, to_gradio
from ov_mllama.chat.store import Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, FAILED, STOPPED, WAITING, Turn
from ov_mllama.runtime.inference import Progress
from ov_mllama.runtime.prompts import escape_special_tokens
from ov_mllama_helper import OVMLlamaForConditionalGeneration

SAMPLES = demo_samples()
LONG = 1500  # max_new_tokens for which the model below talks to the end


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
def model(demo_dir):
    return TalkativeModel(demo_dir)


@pytest.fixture
def chat(model, processor, tmp_path):
    return Chat(model, processor, Conversations(tmp_path))


# ---- What it makes of a conversation --------------------------------------------------------------------------------


def test_turns_become_messages_with_pictures_where_they_were_asked_about(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    turns = [Turn("Which?", [a, b], "The first."), Turn("Sure?", answer="Yes."), Turn(" And here? ", [c])]
    messages, pictures = to_messages(turns, "Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [[part["type"] for part in message["content"]] for message in messages] == [
        ["text"],
        ["image", "image", "text"],
        ["text"],
        ["text"],
        ["text"],
        ["image", "text"],
    ]
    assert pictures == [a, b, c]
    assert messages[-1]["content"][-1]["text"] == "And here?"


def test_what_was_not_answered_is_not_repeated(tmp_path):
    failed, stopped = Turn("Broken?", [tmp_path], state=FAILED), Turn("Long?", [tmp_path], "It is", state=STOPPED)
    messages, pictures = to_messages([failed, stopped, Turn("Hello")])
    assert [message["content"][-1]["text"] for message in messages] == ["Long?", "It is", "Hello"]
    assert pictures == [tmp_path]


def test_typed_special_tokens_stay_text(processor):
    text = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes<|image|>"
    ids = processor.tokenizer(escape_special_tokens(text), add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(processor.tokenizer.all_special_ids)
    assert processor.image_token_id not in ids
    assert escape_special_tokens("a < b | c") == "a < b | c"
    assert to_messages([Turn(text)])[0][0]["content"][0]["text"] == escape_special_tokens(text)


def test_nothing_asked():
    with pytest.raises(ValueError, match="no question"):
        to_messages([Turn("  ")])


def ask(chat, question, *pictures, **wishes) -> Turn:
    """One question and its answer."""
    turn = Turn(question, [*pictures])
    asyncio.run(chat.answer([turn], Progress(), GenerationSettings(**wishes)))
    return turn


def test_conversation_longer_than_the_context_is_refused_first(chat):
    turn = ask(chat, "word " * 20_000)
    assert turn.state == FAILED
    assert "exceed the model's context" in turn.note


def test_failing_generation_is_said_and_the_next_one_works(chat):
    turn = ask(chat, WHO, max_new_tokens=LONG + 1)
    assert (turn.state, turn.note) == (FAILED, "RuntimeError: out of order")
    turn = ask(chat, WHO)
    assert (turn.state, turn.answer) == (ANSWERED, SELF)


def test_cancelling_ends_the_generation_and_keeps_what_was_written(model, chat):
    turn = Turn(WHO)

    async def cancelled_early():
        task = asyncio.create_task(chat.answer([turn], Progress(), GenerationSettings(max_new_tokens=LONG)))
        while not turn.answer:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.5)

    asyncio.run(cancelled_early())
    assert turn.state == STOPPED
    assert len(model.llm_infer_time) < 100
    assert threading.active_count() < 50


def test_sampling_and_greedy(model, chat, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "generate", lambda **arguments: seen.append(arguments))
    ask(chat, "?", temperature=0)
    ask(chat, "?", temperature=0.7, top_p=0.5)
    assert [arguments["do_sample"] for arguments in seen] == [False, True]
    assert (seen[1]["temperature"], seen[1]["top_p"]) == (0.7, 0.5)


# ---- What a page shows of it ----------------------------------------------------------------------------------------


def titles(messages) -> list[str]:
    return [message["metadata"]["title"] for message in messages if "metadata" in message]


def test_a_turn_as_messages(tmp_path):
    picture = tmp_path / "a.png"
    asked, said, note = to_gradio([Turn("What?", [picture], "A cat.", "2 s", ANSWERED)])
    assert asked == {"role": "user", "content": [{"path": str(picture)}, "What?"]}
    assert (said["content"], titles([note])) == ("A cat.", ["2 s"])
    assert to_gradio([Turn("", [picture], "A cat.", "2 s", ANSWERED)])[0]["content"] == [{"path": str(picture)}]


def test_remarks_say_how_an_answer_stands():
    assert titles(to_gradio([Turn("?", state=WAITING)], "Looking ...")) == ["Looking ..."]
    assert titles(to_gradio([Turn("?", answer="It", state=WAITING)], "Looking ...")) == ["Looking ..."]  # continued
    assert titles(to_gradio([Turn("?", answer="It", state=WAITING)], "Writing ...")) == []
    assert titles(to_gradio([Turn("?", answer="It", state=WAITING)], "Stopping ...")) == ["Stopping ..."]
    assert titles(to_gradio([Turn("?", answer="It", state=STOPPED)])) == ["Stopped."]
    assert titles(to_gradio([Turn("?", note="too long", state=FAILED)])) == ["No answer: too long"]
    cut = to_gradio([Turn("?", answer="It", note="2 s", state=CUT)])[-1]
    assert (titles([cut]), cut["options"]) == (["Token limit reached · 2 s"], [{"value": CONTINUE}])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so $x^2$ is", r"so \(x^2\) is"),
        ("$a$, $b_1$", r"\(a\), \(b_1\)"),
        ("it costs $5 and $10.", None),
        ("$ 5 $", None),
        (r"\$x\$", None),
        ("$$x$$", None),
        ("`$x$` and $y$", r"`$x$` and \(y\)"),
        ("```\n$x$\n``` $y$", "```\n$x$\n``` " + r"\(y\)"),
        ("```\n$x$", None),
        ("from $HOME to $PATH", None),
    ],
)
def test_formulas_between_dollars_and_sums_of_money(text, shown):
    assert mark_formulas(text) == (shown or text)


# ---- Endpoint -------------------------------------------------------------------------------------------------------


def as_message(sample) -> dict:
    return {"text": sample["question"], "files": [handle_file(path_of(sample))]}


@pytest.fixture(scope="module")
def make(model, processor, tmp_path_factory):
    """`make()`: a page of one person's."""
    folder = tmp_path_factory.mktemp("conversations")
    return lambda: make_demo(model, processor, questions_about(DEMO)[:2], folder)


@pytest.fixture(scope="module")
def demo(make):
    demo = make()
    demo.launch(prevent_thread_lock=True)
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def url(demo):
    return demo.local_url


def test_it_listens_on_this_machine_only_and_serves_no_other_files(url):
    assert LAUNCH["server_name"] == "127.0.0.1"
    assert url.startswith("http://127.0.0.1:")
    port = int(url.rstrip("/").rpartition(":")[2])
    listening = {
        c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    for path in ("/etc/passwd", str(DEMO / "config.json"), "../../etc/passwd"):
        assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)


def test_uploads_are_the_users_alone(url):
    Client(url, verbose=False).predict(as_message(SAMPLES[1]), api_name="/chat")
    [upload] = Path(os.environ["GRADIO_TEMP_DIR"]).rglob(path_of(SAMPLES[1]).name)
    uploads = upload.parents[1]
    assert uploads.name == "uploads"
    assert stat.S_IMODE(uploads.stat().st_mode) == 0o700


def test_examples_are_those_given(tmp_path):
    given = questions_about(DEMO)[:2]
    *shown, last = written(given, tmp_path)
    assert [example["text"] for example in shown] == [sample["question"] for sample in given]
    for example, sample in zip(shown, given, strict=True):
        assert ImageChops.difference(Image.open(example["files"][0]), sample["image"]).getbbox() is None
    assert last == {"text": WHO}
    assert written([], tmp_path) == [last]


def test_client_asks_by_name(url):
    answer, note = Client(url, verbose=False).predict(as_message(SAMPLES[0]), api_name="/chat")
    assert answer == SAMPLES[0]["answer"]
    assert "s to the first token" in note


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


def test_conversation_about_a_picture(page, url):
    sample = SAMPLES[2]
    page.ask("Describe this image.", path_of(sample))
    page.expect_answers(sample["answer"], "tokens per second")
    expect(page.tab.get_by_role("button", name="Share")).to_have_count(0)  # it would upload to the Hugging Face hub
    expect(page.tab.get_by_role("button", name="Clear")).to_have_count(0)  # it would not ask first
    page.ask("How many shapes are there?")
    page.expect_answers(sample["answer"], "1 picture", "There are two shapes.", "tokens per second")
    assert all(request.startswith((url, "data:", "blob:")) for request in page.requests), (
        "something came from elsewhere"
    )


def test_an_example_is_asked_with_its_picture(page, demo, make):
    """After an hour, too, and the end of another page that shows it."""
    other = make()
    other.launch(prevent_thread_lock=True)
    other.close()
    delete_files_created_by_app(demo, age=-1)
    example = questions_about(DEMO)[0]
    page.tab.get_by_role("button", name=example["question"]).click()
    expect(page.user).to_have_count(2)
    page.expect_answers("", "1 picture")


@pytest.mark.returning
def test_retry_and_undo_with_a_picture(page, model, monkeypatch):
    sample = SAMPLES[0]
    page.ask(sample["question"], path_of(sample))
    page.expect_answers(sample["answer"], "1 picture")
    prompts, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: prompts.append(inputs) or generate(**inputs))
    page.press("Retry")
    for _ in range(100):  # the old answer looks the same
        if prompts:
            break
        page.tab.wait_for_timeout(100)
    assert prompts
    monkeypatch.undo()
    page.expect_answers(sample["answer"], "1 picture")
    expect(page.user).to_have_count(2)
    page.press("Undo")
    expect(page.bot).to_have_count(0)
    expect(page.box).to_have_value(sample["question"])
    expect(page.tab.locator(".thumbnail-item")).to_have_count(1)
    page.send.click()
    page.expect_answers(sample["answer"], "1 picture")


@pytest.mark.returning
def test_edited_question_keeps_its_picture_and_what_came_before(page):
    first, second = SAMPLES[0], SAMPLES[2]
    page.ask(first["question"], path_of(first))
    page.expect_answers(first["answer"], "1 picture")
    page.ask(second["question"], path_of(second))
    page.expect_answers(first["answer"], "1 picture", second["answer"], "2 pictures")
    page.press("Edit", "-right")
    page.tab.locator(".edit-textarea").fill("How many shapes are there?")
    page.tab.get_by_label("Submit").first.click()
    page.expect_answers(first["answer"], "1 picture", "There are two shapes.", "2 pictures")
    expect(page.user).to_have_count(4)
    expect(page.user.last).to_have_text("How many shapes are there?")
    page.tab.locator("[aria-label='Edit']:visible").first.click()
    page.tab.locator(".edit-textarea").fill("How many shapes are there?")
    page.tab.get_by_label("Submit").first.click()
    page.expect_answers("There are three shapes.", "1 picture")
    expect(page.user).to_have_count(2)


@pytest.mark.returning
def test_broken_picture_then_go_on(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    page.attach(tmp_path / "broken.png")
    page.box.fill("What is it?")
    page.send.click()
    foot = page.tab.locator(".block.foot")
    expect(foot).to_contain_text("broken.png is not an image that can be read")
    expect(page.bot).to_have_count(0)
    expect(page.box).to_have_value("What is it?")
    page.tab.locator(".delete-button").first.click()
    page.ask(SAMPLES[1]["question"], path_of(SAMPLES[1]))
    page.expect_answers(SAMPLES[1]["answer"], "1 picture")
    expect(foot).not_to_contain_text("broken.png")


def test_two_people_at_once_get_their_own_answers(page, browser, url):
    second = Tab(browser, url)
    tabs, samples = (page, second), (SAMPLES[2], SAMPLES[0])
    for tab, sample in zip(tabs, samples, strict=True):
        tab.ask(sample["question"], path_of(sample))
    for tab, sample, other in zip(tabs, samples, samples[::-1], strict=True):
        tab.expect_answers(sample["answer"], "1 picture")
        assert other["answer"] not in tab.tab.inner_text("body")
        expect(tab.history).to_have_count(1)
    second.close()
