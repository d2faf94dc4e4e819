"""Variants of answers and questions: nothing that was written is lost, and what is shown is what follow-ups use."""

import asyncio
import json
from types import SimpleNamespace

import gradio as gr
import pytest

from chat_page import Tab, expect, path_of
from conftest import demo_samples
from ov_mllama.chat.answers import Chat, GenerationSettings
from ov_mllama.chat.messages import details_of, to_messages
from ov_mllama.chat.owners import COOKIE
from ov_mllama.chat.pages import Pages
from ov_mllama.chat.render import CONTINUE, LOOK_CLOSER, WHERE_IT_LOOKED, to_gradio, to_markdown
from ov_mllama.chat.store import Conversations
from ov_mllama.chat.turns import (
    ANSWERED,
    CUT,
    EDITED,
    FAILED,
    MAX_DEPTH,
    STOPPED,
    WAITING,
    Turn,
    begin_variant,
    every_turn,
    flip_variant,
    take_back,
)
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.inference import Progress

SAMPLES = demo_samples()
SETTINGS = GenerationSettings()


def turn(question: str, answer: str = "", state: str = ANSWERED, **fields) -> Turn:
    return Turn(question, answer=answer, state=state, **fields)


def shown(turns) -> list[tuple[str, str]]:
    return [(each.question, each.answer) for each in turns]


# ---- Turns ----------------------------------------------------------------------------------------------------------


def test_new_variant_hides_the_turns_that_it_replaces():
    turns = [turn("a", "1"), turn("b", "2"), turn("c", "3")]
    begin_variant(turns, 1, turn("B", "4"))
    assert shown(turns) == [("a", "1"), ("B", "4")]
    begin_variant(turns, 1, turn("B", "5"))
    turns.append(turn("d", "6"))
    expected = [
        [("a", "1"), ("b", "2"), ("c", "3")],
        [("a", "1"), ("B", "4")],
        [("a", "1"), ("B", "5"), ("d", "6")],
    ]
    for step in (1, -1):
        for _ in range(2):
            position = turns[1].position
            assert shown(turns) == expected[position]
            assert len(turns[1].others) == 2
            flip_variant(turns, 1, step)
            assert turns[1].position == (position + step) % 3
    assert sorted(each.answer for each in every_turn(turns)) == list("123456")


def test_variants_within_hidden_variants_stay():
    turns = [turn("a", "1"), turn("b", "2")]
    begin_variant(turns, 1, turn("b", "3"))
    begin_variant(turns, 0, turn("A", "4"))
    flip_variant(turns, 0, 1)
    assert (shown(turns), turns[1].position, len(turns[1].others)) == ([("a", "1"), ("b", "3")], 1, 1)
    flip_variant(turns, 1, -1)
    flip_variant(turns, 0, 1)
    flip_variant(turns, 0, 1)
    assert shown(turns) == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize("state", [FAILED, STOPPED])
def test_variant_without_an_answer_is_replaced(state):
    turns = [turn("a", "1"), turn("b", "2")]
    begin_variant(turns, 1, turn("b", state=state))
    begin_variant(turns, 1, turn("b", "3"))
    assert (shown(turns)[1], turns[1].position, len(turns[1].others)) == (("b", "3"), 1, 1)
    begin_variant(turns, 1, turn("b", "It", state=state))
    begin_variant(turns, 1, turn("b", "4"))
    assert len(turns[1].others) == 3


def test_question_is_taken_back_with_all_its_answers_but_no_other_branch():
    turns = [turn("a", "1"), turn("b", "2")]
    begin_variant(turns, 1, turn("b", "3"))
    assert take_back(turns).answer == "3"
    assert shown(turns) == [("a", "1")]
    turns.append(turn("b", "2"))
    begin_variant(turns, 0, turn("A", "4"))
    begin_variant(turns, 0, turn("A", "5"))
    assert take_back(turns).question == "A"
    assert (shown(turns), turns[0].others) == ([("a", "1"), ("b", "2")], [])


def test_nesting_is_bounded_and_stored(pages, request_):
    turns = [turn(str(i), "Yes.") for i in range(MAX_DEPTH + 1)]
    for i in reversed(range(1, MAX_DEPTH + 1)):
        begin_variant(turns, i, turn(f"{i}'", "Yes."))
    with pytest.raises(InputError, match="levels deep"):
        begin_variant(turns, 0, turn("0'", "Yes."))
    assert len(turns) == 2
    for i in range(100):
        begin_variant(turns, 1, turn(str(i), "Yes."))
    assert len(turns[1].others) == 101
    talk = pages.page(request_).conversation
    talk.turns = turns
    pages.conversations.save(talk)
    stored = another_program(pages.conversations).get(talk.id, talk.owner).turns
    assert [each.question for each in every_turn(stored)] == [each.question for each in every_turn(turns)]


# ---- Stored ---------------------------------------------------------------------------------------------------------


def another_program(store) -> Conversations:
    return Conversations(store.folder)


def test_hidden_variants_are_stored_with_their_pictures_and_stopped_by_the_programs_end(pages, request_, tmp_path):
    store, talk = pages.conversations, pages.page(request_).conversation
    picture = stored_picture(pages)
    talk.turns = [turn("a", "1", pictures=[picture]), turn("b", "2")]
    begin_variant(talk.turns, 1, turn("b", "3"))
    begin_variant(talk.turns, 0, Turn("A", answer="It is"))
    flip_variant(talk.turns, 0, 1)
    assert talk.turns[0].others[0][0].state == WAITING
    store.save(talk)
    again = another_program(store).get(talk.id, talk.owner)
    flip_variant(again.turns, 0, 1)
    assert (again.turns[0].state, again.turns[0].answer) == (STOPPED, "It is")
    flip_variant(again.turns, 0, 1)
    flip_variant(again.turns, 1, 1)
    assert again.turns[0].pictures == [picture]
    assert shown(again.turns) == [("a", "1"), ("b", "2")]
    flip_variant(again.turns, 0, 1)  # the picture is hidden
    store.save(talk)
    store.delete_orphans()
    assert picture.is_file()
    asyncio.run(pages.delete("yes", request_))
    assert not picture.exists()


def test_flip_leaves_a_chats_place_in_the_list(pages, request_):
    store, talk = pages.conversations, pages.page(request_).conversation
    talk.turns = [turn("a", "1", asked=1.0)]
    begin_variant(talk.turns, 0, turn("A", "2", asked=5.0))
    rows = []
    for _ in range(2):
        rows.append(store.snapshot(talk)[3])
        flip_variant(talk.turns, 0, 1)
    assert rows == [5.0, 5.0]


# ---- Handlers -------------------------------------------------------------------------------------------------------


class Numbered(Chat):
    """A chat whose answers are numbers, or begin with one and take for ever.

    Attributes:
        prompts: messages of each question, and what is written of its answer.
        held: whether answers take for ever.
    """

    def __init__(self, conversations):
        model = SimpleNamespace(stats=SimpleNamespace(tokens_per_s=0))
        super().__init__(model, None, conversations)
        self.prompts, self.held, self.begun = [], False, asyncio.Event()

    async def answer(self, turns, progress, settings, uploads=()):
        last = turns[-1]
        self.prompts.append((to_messages(turns)[0], last.answer))
        try:
            last.answer += str(len(self.prompts))
            self.begun.set()
            if self.held:
                await asyncio.Event().wait()
            last.state, last.note = ANSWERED, "1 s"
        except asyncio.CancelledError:
            last.state = STOPPED
            raise


def texts(messages) -> list[str]:
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def request_of(session: str, token: str = "a" * 64) -> SimpleNamespace:
    return SimpleNamespace(session_hash=session, username=None, query_params={}, cookies={COOKIE: token})


@pytest.fixture
def request_():
    return request_of("tab")


@pytest.fixture
def pages(tmp_path, request_):
    pages = Pages(Numbered(Conversations(tmp_path / "data")))
    asyncio.run(pages.open("", request_))
    return pages


def play(pages, *steps) -> list:
    """The page's turns after steps: coroutine functions, each called once the answer of the one before has ended."""

    async def run():
        for step in steps:
            await step()
            while running := pages.chat.answering(pages.page(request_of("tab")).conversation):
                if pages.chat.held:
                    break
                await asyncio.wait([running.task])
                await asyncio.sleep(0)
        pages.chat.flush()

    asyncio.run(run())
    return pages.page(request_of("tab")).conversation.turns


def stored_picture(pages):
    talk = pages.page(request_of("tab")).conversation
    return pages.conversations.store_image(talk, SAMPLES[0]["image"], "a")


def asks(pages, text: str, session: str = "tab"):
    return lambda: pages.ask({"text": text, "files": []}, request_of(session), *SETTINGS)


def retries(pages, session: str = "tab"):
    return lambda: pages.retry(request_of(session), *SETTINGS)


def flips(pages, choice="0 1", session: str = "tab"):
    return lambda: pages.flip(choice, request_of(session))


def edits(pages, index, value, session: str = "tab"):
    edited = SimpleNamespace(index=index, value=value, previous_value="")
    return lambda: pages.edit(edited, request_of(session), *SETTINGS)


def chooses(pages, value):
    return lambda: pages.choose_option(SimpleNamespace(value=value, index=0), request_of("tab"), *SETTINGS)


def test_retry_adds_an_answer_and_follow_ups_and_export_use_the_one_shown(pages):
    turns = play(pages, asks(pages, "a"), retries(pages), retries(pages), flips(pages, "0 -1"), asks(pages, "b"))
    assert shown(turns) == [("a", "2"), ("b", "4")]
    assert texts(pages.chat.prompts[-1][0]) == ["a", "2", "b"]
    conversation = pages.page(request_of("tab")).conversation
    exported = to_markdown(conversation)
    assert "> a" in exported
    assert [line for line in exported.splitlines() if line.isdigit()] == ["2", "4"]
    stored = another_program(pages.conversations).get(conversation.id, conversation.owner)
    assert shown(stored.turns) == shown(turns)
    assert {each.answer for each in every_turn(stored.turns)} == set("1234")
    turns = play(pages, flips(pages), asks(pages, "c"))
    assert (shown(turns), texts(pages.chat.prompts[-1][0])) == ([("a", "3"), ("c", "5")], ["a", "3", "c"])


def test_edited_question_is_a_branch_with_its_pictures(pages):
    [first, _], picture = play(pages, asks(pages, "a"), asks(pages, "b")), stored_picture(pages)
    first.pictures = [picture]
    turns = play(pages, edits(pages, 0, "A"))
    assert (shown(turns), turns[0].pictures) == ([("A", "3")], [picture])
    assert texts(pages.chat.prompts[-1][0]) == ["A"]
    turns = play(pages, flips(pages))
    assert shown(turns) == [("a", "1"), ("b", "2")]


def test_edited_answer_is_what_follow_ups_see_and_the_model_continues(pages):
    turns = play(pages, asks(pages, "a"), asks(pages, "b"), edits(pages, [1], "A cat ![\u2060x](y)"))
    assert (shown(turns), turns[0].state) == ([("a", "A cat ![x](y)")], EDITED)
    assert len(pages.chat.prompts) == 2  # nothing was asked
    assert "<sub>Edited</sub>" in to_markdown(pages.page(request_of("tab")).conversation)
    play(pages, asks(pages, "c"))
    assert texts(pages.chat.prompts[-1][0]) == ["a", "A cat ![x](y)", "c"]
    turns = play(pages, flips(pages))
    assert shown(turns) == [("a", "1"), ("b", "2")]
    turns = play(pages, flips(pages), retries(pages), edits(pages, 4, "Yes"))
    assert [option["value"] for option in to_gradio(turns)[-1]["options"]] == [CONTINUE]
    turns = play(pages, chooses(pages, CONTINUE))
    assert (turns[-1].answer, turns[-1].state) == ("Yes5", ANSWERED)
    assert pages.chat.prompts[-1][1] == "Yes"
    assert len(turns[-1].others) == 2


def test_unchanged_answer_is_no_variant_and_an_empty_one_is_refused(pages):
    turns = play(pages, asks(pages, "a"))
    turns[0].answer = "1 ![x](y)"
    for text in ("1 ![x](y)", "1 !\u2060[x](y)"):
        assert not play(pages, edits(pages, 1, text))[0].others
    for text in ("", " \n\u2060"):
        with pytest.raises(gr.Error, match="needs some text"):
            play(pages, edits(pages, 1, text))
    assert not turns[0].others


def test_page_is_shown_anew_after_an_edit_that_changed_nothing(pages):
    """The browser shows the text of an edit before the server has it."""
    play(pages, asks(pages, "a"))
    request = request_of("tab")

    async def update():
        version = (await pages.refresh("", request))[0]
        assert await pages.poll("opened", "", version, request) == gr.skip()
        await pages.edit(SimpleNamespace(index=1, value="1"), request, *SETTINGS)
        assert await pages.poll("opened", "", version, request) != gr.skip()
        return await pages.refresh(version, request)

    assert asyncio.run(update())[2] == to_gradio(pages.page(request).conversation.turns)


@pytest.mark.parametrize("state", [CUT, STOPPED, EDITED, FAILED])
def test_unfinished_answer_is_continued_in_place(pages, state):
    talk = pages.page(request_of("tab")).conversation
    talk.turns = [turn("a", "It is ", state)]
    assert CONTINUE in [option["value"] for option in to_gradio(talk.turns)[-1]["options"]]
    turns = play(pages, chooses(pages, CONTINUE))
    assert (shown(turns), turns[0].others) == ([("a", "It is 1")], [])


def test_what_cannot_be_continued_is_left(pages):
    talk = pages.page(request_of("tab")).conversation
    for turns in ([], [turn("a", "1")], [turn("a", state=STOPPED)], [turn("a", "It", CUT)]):
        talk.turns = turns
        for option in ("Other", None) if turns and turns[0].can_continue else (CONTINUE, "Other", None):
            play(pages, chooses(pages, option))
        assert not pages.chat.prompts
        assert len(talk.turns) == len(turns)


def test_closer_look_is_a_variant_and_the_quick_answer_stays_quick(pages):
    picture, talk = stored_picture(pages), pages.page(request_of("tab")).conversation
    talk.turns = [turn("a", "1", pictures=[picture], detail="low"), turn("b", "2", detail="low")]
    turns = play(pages, chooses(pages, LOOK_CLOSER))
    assert (details_of(turns), len(turns[1].others)) == (["high"], 1)
    assert details_of([*turns, turn("c")]) == ["high"]
    assert to_gradio(turns)[-1]["options"] == [{"value": WHERE_IT_LOOKED}]
    play(pages, flips(pages, "1 1"))
    assert details_of(turns) == ["low"]
    assert {"value": LOOK_CLOSER} in to_gradio(turns)[-1]["options"]
    play(pages, flips(pages, "1 1"), retries(pages))
    assert details_of(turns) == ["high"]
    turns = play(pages, lambda: pages.retry(request_of("tab"), *SETTINGS._replace(detail="low")))
    assert details_of(turns) == ["low"]


# ---- During an answer -----------------------------------------------------------------------------------------------


def test_answer_continues_in_its_own_variant_while_another_is_shown(pages):
    chat, talk = pages.chat, pages.page(request_of("tab")).conversation
    play(pages, asks(pages, "a"))

    async def meanwhile():
        chat.held, chat.begun = True, asyncio.Event()
        await pages.retry(request_of("tab"), *SETTINGS)
        await chat.begun.wait()
        assert "2/2" in to_gradio(talk.turns, "Writing ... 1 s")[-1]["content"]
        await pages.flip("0 1", request_of("tab"))
        assert shown(talk.turns) == [("a", "1")]
        assert chat.answering(talk)
        assert "Another answer: Waiting" in pages._state(pages.page(request_of("tab")))[5]
        with pytest.raises(gr.Error, match="One answer at a time"):
            await pages.ask({"text": "b", "files": []}, request_of("tab"), *SETTINGS)
        await pages.stop(request_of("tab"))

    asyncio.run(meanwhile())
    [[hidden]] = talk.turns[0].others
    assert (hidden.answer, hidden.state, shown(talk.turns)) == ("2", STOPPED, [("a", "1")])


def test_flip_between_the_question_and_its_first_step_leaves_the_answer_its_turn(pages):
    talk = pages.page(request_of("tab")).conversation
    play(pages, asks(pages, "a"))

    async def at_once():
        await pages.retry(request_of("tab"), *SETTINGS)
        await pages.flip("0 1", request_of("tab"))

    turns = play(pages, at_once)
    assert (shown(turns), shown(turns[0].others[0])) == ([("a", "1")], [("a", "2")])
    assert talk.turns[0].others[0][0].state == ANSWERED


@pytest.mark.parametrize("step", [retries, lambda pages: edits(pages, 0, "A")])
def test_what_was_written_when_another_variant_was_begun_stays(pages, step):
    talk = pages.page(request_of("tab")).conversation

    async def interrupted():
        chat = pages.chat
        chat.held, chat.begun = True, asyncio.Event()
        await pages.ask({"text": "a", "files": []}, request_of("tab"), *SETTINGS)
        await chat.begun.wait()
        chat.held = False
        await step(pages)()

    play(pages, interrupted)
    [[hidden]] = talk.turns[0].others
    assert (hidden.answer, hidden.state, talk.turns[0].answer) == ("1", STOPPED, "2")


# ---- Hostile --------------------------------------------------------------------------------------------------------

NO_CHOICES = ["1 1", "-1 1", "0 0", "0 2", "0 -2", "999999 1", f"{10**30} 1", "", "0", "0 1 1", " 0 1", "0 1\n", "x 1"]
NO_CHOICES += ["True 1", "٠ 1", None, True, 0, 1.0, ["0", "1"], {"0": 1}]


@pytest.mark.parametrize("choice", NO_CHOICES, ids=repr)
def test_flip_of_nothing_is_refused(pages, choice):
    turns = play(pages, asks(pages, "a"), retries(pages), asks(pages, "b"))
    with pytest.raises(gr.Error, match="There is no other answer"):
        play(pages, flips(pages, choice))
    assert shown(turns) == [("a", "2"), ("b", "3")]


@pytest.mark.parametrize("index", [True, -1, 2, 10**30, 0.0, "0", None, [], [True], [[0]], {}], ids=repr)
def test_edit_of_nothing_is_refused(pages, index):
    turns = play(pages, asks(pages, "a"), retries(pages))
    with pytest.raises(gr.Error, match="There is no such message"):
        play(pages, edits(pages, index, "stolen"))  # 2: the status line
    for value in (None, {"path": "/etc/hostname"}, "x" * 600_000):
        with pytest.raises(gr.Error):
            play(pages, edits(pages, 1, value))
    assert (shown(turns), len(turns[0].others)) == ([("a", "2")], 1)


def test_another_owners_page_is_out_of_reach(pages):
    turns = play(pages, asks(pages, "a"), retries(pages))
    stranger = request_of("tab", "b" * 64)  # who knows the session

    async def try_all():
        for call in (
            lambda: pages.flip("0 1", stranger),
            lambda: pages.retry(stranger, *SETTINGS),
            lambda: pages.edit(SimpleNamespace(index=1, value="stolen"), stranger, *SETTINGS),
            lambda: pages.choose_option(SimpleNamespace(value=CONTINUE), stranger, *SETTINGS),
        ):
            with pytest.raises(gr.Error, match="just connecting"):
                await call()

    asyncio.run(try_all())
    assert (shown(turns), len(turns[0].others)) == ([("a", "2")], 1)


def test_answers_cannot_write_buttons():
    text = '<button name="flip" value="0 1" title="Next answer"></button>'
    for message in to_gradio([turn(text, text), turn("b", text, FAILED, note=text)]):
        assert "<button" not in json.dumps(message, ensure_ascii=False)


# ---- With the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_continued_answer_is_the_one_that_was_not_cut(model, processor, tmp_path, tokens):
    chat, about = Chat(model, processor, Conversations(tmp_path)), SAMPLES[0]
    asked = Turn(about["question"], [path_of(about)])
    for limit, state in ((tokens, CUT), (100, ANSWERED)):
        asyncio.run(chat.answer([asked], Progress(), SETTINGS._replace(max_new_tokens=limit)))
        assert asked.state == state
        assert about["answer"].startswith(asked.answer)
    assert asked.answer == about["answer"]


# ---- Page -----------------------------------------------------------------------------------------------------------


def answer_with(page, says, text: str, label: str) -> None:
    """Has the next answer say a text, and presses a button that begins it."""
    says.text = text
    page.press(label)
    expect(page.bot.first).to_have_text(text)
    page.expect_ready()


def test_answers_and_questions_are_flipped_through_with_the_keyboard_in_every_tab(page, url, says):
    says.text = "First"
    page.ask("Which?")
    page.expect_answers("First", "1 s")
    expect(page.tab.locator("[name=flip]")).to_have_count(0)
    answer_with(page, says, "Second", "Retry")
    buttons = page.tab.locator(".message-row:has(.thought-group) + .message-buttons button:visible")
    assert buttons.evaluate_all("buttons => buttons.map(button => button.ariaLabel)") == ["Retry", "Undo"]
    expect(page.note).to_contain_text("2/2")
    before, after = (page.tab.get_by_role("button", name=f"{which} answer") for which in ("Previous", "Next"))
    before.focus()
    for text, position in (("First", "1/2"), ("Second", "2/2"), ("First", "1/2")):
        page.tab.keyboard.press("Enter")
        expect(page.bot.first).to_have_text(text)
        expect(page.note).to_contain_text(position)
        expect(before).to_be_focused()
    assert page.note.evaluate("e => getComputedStyle(e.querySelector('[name=flip]')).outlineStyle") == "solid"
    expect(page.tab.get_by_label("Answer 1/2")).to_be_visible()
    page.note.locator(".title").click()
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_timeout(300)
    expect(before).to_be_visible()

    page.press("Edit", "-right")
    page.tab.locator(".edit-textarea").fill("What?")
    says.text = "Third"
    page.tab.get_by_label("Submit").first.click()
    page.expect_answers("Third", "3/3")
    second = Tab(page.context, url, "?" + page.tab.url.rpartition("?")[2])
    second.expect_answers("Third", "3/3")
    second.tab.get_by_role("button", name="Next answer").click()
    for tab in (second, page):
        expect(tab.user).to_have_text(["Which?"])
        tab.expect_answers("First", "1/3")
    page.tab.reload()
    page.expect_answers("First", "1/3")
    page.to_front()
    says.text = "Follow-up"
    page.ask("And?")
    page.expect_answers("First", "1/3", "Follow-up", "1 s")
    after.click()
    expect(page.bot).to_have_count(2)
    page.expect_answers("Second", "2/3")
    assert page.console == []


ODD = "A &#35; and ![x](y), <b>no</b>"


@pytest.mark.returning
def test_edited_answer_is_shown_as_typed_and_continued_in_place(page, says):
    says.text = ODD
    page.ask("Odd?")
    page.expect_answers("no", "1 s")
    page.press("Edit", "-left")
    area = page.tab.locator(".edit-textarea")
    expect(area).to_have_value(ODD)
    area.fill("It is")
    page.tab.get_by_label("Submit").first.focus()
    page.tab.keyboard.press("Enter")
    page.expect_answers("It is", "Edited")
    expect(page.box).to_be_focused()
    says.text = " a cat."
    page.tab.get_by_role("button", name=CONTINUE).click()
    page.expect_answers("It is a cat.", "2/2")
    expect(page.bot.first).to_have_text("It is a cat.")
    expect(page.user).to_have_count(1)
    page.press("Edit", "-left")
    page.tab.get_by_role("button", name="Next answer").click()
    page.expect_answers("no", "1/2")
    expect(area).to_have_count(0)  # or it would be an edit of this answer

    page.press("Edit", "-right")
    area.fill("Odd?!")
    page.new_chat()
    says.text = "Another"
    page.ask("Other?")
    page.expect_answers("Another", "1 s")
    expect(area).to_have_count(0)
    page.press("Edit", "-right")
    expect(area).to_have_value("Other?")
    page.history.filter(has_text="Odd?").click()
    page.expect_answers("no", "1/2")
    expect(area).to_have_count(0)
