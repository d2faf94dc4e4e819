"""What the open tabs of the chat show and do.

    conversations.py -> what a page shows; what is done on a page -> chat.py -> conversations.py

A page asks for `news` and then to be shown them. Nothing else writes on it, so a second tab, a reload, Back and a new
start of the server all show what is kept.
"""

import asyncio
import logging
import re
import secrets
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.chat.answers import Chat, GenerationSettings
from ov_mllama.chat.owners import owner_of
from ov_mllama.chat.page_input import MAX_QUESTION, Recent, bounded_text, checked_settings, images_of, refuse, text_of
from ov_mllama.chat.shown import GO_ON, as_typed, bubbles, exported, who_answers
from ov_mllama.chat.store import MAX_TITLE, Conversation, Turn
from ov_mllama.runtime.images import PictureError, open_picture
from ov_mllama.runtime.inference import Progress

logger = logging.getLogger(__name__)

POLL_S = 0.3  # how soon a page shows how an answer grows; a token takes the 11B as long
IDLE_POLL_S = 1.0  # and what else has changed, such as in another tab: looking costs browser and server time
MAX_PAGES, MAX_PROGRAMS, MAX_OWNERS = 1000, 100, 1000  # remembered; those used longest ago are forgotten
MAX_PROGRAM_TURNS = 200
FORMER_TOKEN = re.compile("[0-9a-f]{32}")  # in the browser's local storage, of earlier versions
OPENED = "opened"


class Page:
    """One tab.

    Attributes:
        owner: whose conversations it shows.
        conversation: the one that it shows.
        shown: what it shows already, by output of `show`.
        version: of what it shows.
        refused: why what was done last was refused, such as a question.
    """

    def __init__(self, owner: str, conversation: Conversation):
        self.owner, self.conversation = owner, conversation
        self.shown: list = [None] * 6
        self.version = 0
        self.refused = ""


class Tabs:
    """The open tabs. One is known by its owner and its session together: a session's name, which the browser chooses,
    is worth nothing without its owner's login or cookie.

    Args:
        chat: what answers.
        by_name: as for `owners.owner_of`.
    """

    def __init__(self, chat: Chat, by_name: bool = True):
        self.chat, self.conversations, self.by_name = chat, chat.conversations, by_name
        self._pages: Recent = Recent(MAX_PAGES, lambda key: chat.ahead.want(key, []))
        self._programs: Recent = Recent(MAX_PROGRAMS)
        self._titles: Recent = Recent(MAX_OWNERS)

    def _key(self, request: gr.Request) -> tuple[str | None, str]:
        """Owner and session of a request."""
        return owner_of(request.username, request.cookies, self.by_name), request.session_hash

    def find(self, request: gr.Request) -> Page | None:
        """The tab that a request comes from; None where the server does not know it, or it is somebody else's."""
        return self._pages.get(self._key(request))

    def page(self, request: gr.Request) -> Page:
        """The tab that a request comes from.

        Raises:
            gr.Error: the server began anew, and the page has not said yet what it shows; or it is somebody else's.
        """
        page = self.find(request)
        if page is None:
            raise gr.Error("The page was just connecting: please try again.", print_exception=False)
        return page

    async def connect(self, key: str, request: gr.Request) -> Page:
        """A tab says what it shows: the first time, and after the server began anew.

        Raises:
            gr.Error: its browser takes no cookies; what is kept cannot be read.
        """
        owner, session = self._key(request)
        if owner is None:
            raise refuse("The page needs a cookie to know whose chats it shows: allow it, or open it in its own tab.")
        kept = await self._read(self.conversations.get, key, owner) if key else None
        page = self._pages[owner, session] = Page(owner, kept or Conversation(owner))
        return page

    @staticmethod
    async def _read(function, *arguments):
        """What a function of `conversations` returns, from a thread: it may wait for another program.

        Raises:
            gr.Error: it failed.
        """
        try:
            return await asyncio.to_thread(function, *arguments)
        except (sqlite3.Error, OSError) as error:
            raise refuse(f"The chats cannot be read or written just now ({error}): try again.") from error

    async def open(self, former: str, request: gr.Request) -> list:
        """A tab was opened or loaded again: that it was, its token of earlier versions, used up, and settings. Before
        it has this answer it asks for no news and keeps no settings.

        Args:
            former: the token that earlier versions kept in the browser's local storage; its conversations become those
                of the browser's cookie.
        """
        owner, _ = self._key(request)
        if owner and owner.startswith("browser:") and isinstance(former, str) and FORMER_TOKEN.fullmatch(former):
            await self._read(self.conversations.adopt, f"browser:{former}", owner)
        page = await self.connect(request.query_params.get("chat", ""), request)
        return [OPENED, "", *(await self._read(self.conversations.settings, page.owner) or GenerationSettings())]

    def on_close(self, request: gr.Request) -> None:
        """A tab was closed: its answers are written on, its pictures are not wanted any more."""
        key = self._key(request)
        self._pages.pop(key, None)
        self._programs.pop(key, None)
        self.chat.ahead.want(key, [])

    async def _list_chats(self, owner: str) -> None:
        """Read an owner's titles where they have changed; while they cannot be read, the old ones are shown."""
        version = self.conversations.version
        if self._titles.get(owner, (None,))[0] != version:
            try:
                self._titles[owner] = version, await asyncio.to_thread(self.conversations.titles, owner)
            except (sqlite3.Error, OSError):
                logger.warning("The list of chats cannot be read", exc_info=True)


class Pages(Tabs):
    """What the open tabs show and do. `show` alone writes on a page, so whatever is done there only changes a
    conversation, and every tab that shows it follows.

    Args:
        chat, by_name: as for `Tabs`.
        examples: questions and their images' files, as the page shows them.
    """

    def __init__(self, chat: Chat, examples: Sequence[tuple[str, Sequence[Path]]] = (), by_name: bool = True):
        super().__init__(chat, by_name)
        self.examples = examples

    def _look(self, page: Page) -> list:
        """What a page should show: messages, whether an answer is under way, earlier chats, id, name, who answers."""
        if page.conversation.deleted:
            page.conversation = Conversation(page.owner)
        _, titles = self._titles.get(page.owner, (None, []))
        talk, under_way = page.conversation, self.chat.answering(page.conversation)
        waits = "Stopping ..." if under_way and under_way.task.cancelling() else str(under_way and under_way.progress)
        key = talk.id if talk.turns else ""
        foot = f"{as_typed(who_answers(self.chat.model))} · Everything stays on the machine that serves this page."
        return [
            bubbles(talk.turns, waits),
            bool(under_way),
            (titles, key),
            key,
            talk.name,
            "\n\n".join([foot, *(f"⚠️ {as_typed(sentence)}" for sentence in (page.refused, talk.unsaved) if sentence)]),
        ]

    async def poll(self, opened: str, key: str, version: str, request: gr.Request):
        """Another word whenever a page does not show what it should; asked often, so it must be cheap.

        Args:
            opened, key, version: what the page says of itself.
        """
        if not opened:
            return gr.skip()
        page = self._pages.get(self._key(request)) or await self.connect(key, request)
        await self._list_chats(page.owner)
        shows_all = version == str(page.version) and self._look(page) == page.shown
        return gr.skip() if shows_all else secrets.token_hex(8)

    async def refresh(self, version: str, request: gr.Request) -> list:
        """What has changed on a page, for its components; all of it if an earlier answer was lost on its way.

        Args:
            version: of what the page shows.
        """
        page = self.page(request)
        await self._list_chats(page.owner)
        before = page.shown if version == str(page.version) else [None] * len(page.shown)
        page.shown, page.version = self._look(page), page.version + 1
        messages, busy, (titles, current), key, name, foot = page.shown
        parts = [
            messages,
            gr.MultimodalTextbox(submit_btn=not busy, stop_btn=busy),
            gr.Radio(titles, value=current or None),
            key,
            name,
            foot,
        ]
        changed = [
            part if now != then else gr.skip() for part, now, then in zip(parts, page.shown, before, strict=True)
        ]
        timer = gr.Timer(POLL_S if busy else IDLE_POLL_S)
        return [str(page.version), timer if busy != before[1] else gr.skip(), *changed]

    async def ask(self, message: dict, request: gr.Request, *wishes):
        """Asks what is in the text box, and empties it; while an answer is under way, and where a picture cannot be
        used, it stays there."""
        return await self._ask(text_of(message), images_of(message), request, wishes)

    async def _ask(self, text: str, images: Sequence[Path], request: gr.Request, wishes: Sequence):
        """`ask` about files that are known to be uploads or examples."""
        page, checked = self.page(request), checked_settings(wishes)
        talk = page.conversation
        if not text and not images:
            return gr.skip()
        try:
            stored = [await asyncio.to_thread(self._store, talk, image) for image in images]
        except PictureError as error:
            raise refuse(error) from error
        except OSError as error:
            raise refuse(f"The picture could not be read or stored ({error.strerror}): try again.") from error
        except MemoryError as error:
            raise refuse("There is too little memory to open the picture: close other programs.") from error
        if self.chat.answering(talk):
            raise refuse("One answer at a time: stop this one first, or wait for its end.")
        remarks = [remark for _, remark in stored if remark]
        talk.turns.append(Turn(text, [picture for picture, _ in stored], remarks=remarks))
        self.chat.begin(talk, checked, images)
        return {"text": "", "files": []}

    def _store(self, talk: Conversation, image: Path) -> tuple[Path, str]:
        """Store an image anew, in a thread; its file, and a remark on what was opened of it."""
        opened = open_picture(image)
        return self.conversations.store(talk, opened, image.stem), opened.info.get("remark", "")

    async def example(self, chosen: gr.SelectData, request: gr.Request, *wishes) -> None:
        """Asks one of the examples, by its number; what else the event says of it is not believed."""
        index = chosen.index
        if type(index) is not int or not 0 <= index < len(self.examples):
            raise refuse("There is no such example.")
        text, images = self.examples[index]
        await self._ask(text, images, request, wishes)

    async def continue_answer(self, request: gr.Request, *wishes) -> None:
        """Asks for the rest of an answer that was cut."""
        await self._ask(GO_ON, [], request, wishes)

    async def stop(self, request: gr.Request) -> None:
        """Stops the answer under way."""
        await self.chat.stop(self.page(request).conversation)

    async def retry(self, request: gr.Request, *wishes) -> None:
        """Answers the last question again."""
        talk, checked = self.page(request).conversation, checked_settings(wishes)
        await self.chat.stop(talk)
        if talk.turns:  # another tab may have taken them back
            self.chat.begin(talk, checked)

    async def undo(self, request: gr.Request):
        """Takes the last question back into the text box."""
        talk = self.page(request).conversation
        await self.chat.stop(talk)
        if not talk.turns:
            return gr.skip()
        turn = talk.turns.pop()
        self.chat.save(talk)
        kept = [picture for picture in turn.pictures if picture.is_file()]
        copies = [await asyncio.to_thread(save_file_to_cache, picture, get_upload_folder()) for picture in kept]
        return {"text": turn.question, "files": copies}

    async def edit(self, edited: gr.EditData, request: gr.Request, *wishes) -> None:
        """Asks a question in other words, about the pictures that it had; what came after it is gone."""
        talk, checked = self.page(request).conversation, checked_settings(wishes)
        question = bounded_text(edited.value, MAX_QUESTION, "question")
        index = edited.index[0] if isinstance(edited.index, (list, tuple)) and edited.index else edited.index
        await self.chat.stop(talk)
        messages = bubbles(talk.turns)
        if type(index) is not int or not 0 <= index < len(messages) or messages[index]["role"] != "user":
            raise refuse("There is no such question any more.")
        asked = sum(message["role"] == "user" for message in messages[:index])
        talk.turns[asked:] = [Turn(question, talk.turns[asked].pictures, remarks=talk.turns[asked].remarks)]
        self.chat.begin(talk, checked)

    async def begin_new(self, request: gr.Request) -> None:
        """An empty conversation; an answer under way is written on in its own."""
        page = self.page(request)
        page.conversation = Conversation(page.owner)

    async def reopen(self, key: str, request: gr.Request) -> None:
        """An earlier conversation."""
        page = self.page(request)
        kept = await self._read(self.conversations.get, key, page.owner) if isinstance(key, str) else None
        page.conversation = kept or Conversation(page.owner)

    async def rename(self, name: str, request: gr.Request) -> str:
        """Another name for the conversation; none is its first question again. What it is called now."""
        talk = self.page(request).conversation
        name = bounded_text(name, MAX_TITLE, "name")
        if talk.turns and name != talk.name:
            talk.title = name.strip()
            self.chat.save(talk)
        return talk.name

    async def delete(self, sure: str, request: gr.Request) -> None:
        """Deletes the conversation, with its pictures, if its owner is sure."""
        talk = self.page(request).conversation
        if sure and talk.turns:
            await self.chat.stop(talk)
            await self._read(self.conversations.delete, talk)

    async def export(self, request: gr.Request) -> str:
        """The conversation as a file: Markdown and its pictures in a .zip."""
        return await asyncio.to_thread(exported, self.page(request).conversation)

    async def choose(self, opened: str, request: gr.Request, *wishes) -> None:
        """Keeps the settings for the next time; not those that a page shows before it was opened."""
        if opened:
            await self._read(self.conversations.choose, self.page(request).owner, [*checked_settings(wishes)])

    async def being_written(self, message: dict | None, request: gr.Request) -> None:
        """What the text box holds now: its pictures are encoded ahead, on a page that is connected. One that is no
        upload any more is left to the question about it."""
        key = self._key(request)
        if self._pages.get(key):
            try:
                images = images_of(message)
            except gr.Error:
                images = []
            self.chat.ahead.want(key, images)

    async def api_chat(self, message: dict, request: gr.Request, *wishes) -> tuple[str, str]:
        """For gradio_client, whose sessions are conversations that are kept nowhere: answer and note."""
        turn, checked, key = Turn(text_of(message), images_of(message)), checked_settings(wishes), self._key(request)
        turns = self._programs.get(key, [])
        self._programs[key] = turns
        turns.append(turn)
        del turns[:-MAX_PROGRAM_TURNS]
        await self.chat.answer(turns, Progress(), checked)
        return turn.answer, turn.note
