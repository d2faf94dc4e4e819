"""What the open tabs of the chat show and do.

    conversations.py -> what a page shows; what is done on a page -> chat.py -> conversations.py

A page asks for `news` and then to be shown them. Nothing else writes on it, so a second tab, a reload, Back and a new
start of the server all show what is kept.
"""

import asyncio
import re
import secrets
import tempfile
import zipfile
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ov_mllama.chat import Chat, Wishes
from ov_mllama.conversations import Conversation, Turn
from ov_mllama.progress import Progress
from ov_mllama.shown import GO_ON, as_markdown, bubbles, exported_name, shown_picture, who_answers

LOOK_EVERY_S = 0.3  # how soon a page shows how an answer grows; a token takes the 11B as long
IDLE_LOOK_EVERY_S = 1.0  # and what else has changed, such as in another tab: looking costs browser and server time


def paths_of(message: dict) -> list[Path]:
    """The pictures of a text box, or of an example."""
    return [Path(file["path"] if isinstance(file, dict) else file) for file in message.get("files") or []]


class Page:
    """One tab.

    Attributes:
        owner: whose conversations it shows.
        conversation: the one that it shows.
        shown: what it shows already, by output of `show`.
        version: of what it shows.
    """

    def __init__(self, owner: str, conversation: Conversation):
        self.owner, self.conversation = owner, conversation
        self.shown: list = [None] * 6
        self.version = 0


class Pages:
    """What the open tabs show and do. `show` alone writes on a page, so whatever is done there only changes a
    conversation, and every tab that shows it follows."""

    def __init__(self, chat: Chat):
        self.chat, self.conversations = chat, chat.conversations
        self._pages: dict[str, Page] = {}
        self._programs: dict[str, list[Turn]] = {}
        self._titles: dict[str, tuple[int, list]] = {}

    def page(self, request: gr.Request) -> Page:
        """The tab that a request comes from.

        Raises:
            gr.Error: the server began anew, and the page has not said yet what it shows.
        """
        if request.session_hash not in self._pages:
            raise gr.Error("The page was just connecting: please try again.")
        return self._pages[request.session_hash]

    def connect(self, owner: str, key: str, request: gr.Request) -> Page:
        """A tab says whose it is and what it shows: the first time, and after the server began anew."""
        owner = f"user {request.username}" if request.username else owner
        kept = self.conversations.get(key, owner) if key else None
        page = self._pages[request.session_hash] = Page(owner, kept or Conversation(owner))
        return page

    async def open(self, owner: str, request: gr.Request) -> list:
        """A tab was opened or loaded again: whose it is, for itself and to keep, made up the first time; and settings.
        Before it has this answer it asks for no news and keeps no settings."""
        owner = owner or secrets.token_hex(16)
        page = self.connect(owner, request.query_params.get("chat", ""), request)
        return [owner, owner, *(self.conversations.settings(page.owner) or Wishes())]

    def left(self, request: gr.Request) -> None:
        """A tab was closed: its answers are written on, its pictures are not wanted any more."""
        self._pages.pop(request.session_hash, None)
        self._programs.pop(request.session_hash, None)
        self.chat.ahead.want(request.session_hash, [])

    def _look(self, page: Page) -> list:
        """What a page should show: messages, whether an answer is under way, earlier chats, id, name, who answers."""
        if page.conversation.gone:
            page.conversation = Conversation(page.owner)
        version, titles = self._titles.get(page.owner, (None, []))
        if version != self.conversations.version:
            version, titles = self.conversations.version, self.conversations.titles(page.owner)
            self._titles[page.owner] = version, titles
        talk, under_way = page.conversation, self.chat.answering(page.conversation)
        waits = "Stopping ..." if under_way and under_way.task.cancelling() else str(under_way and under_way.progress)
        key = talk.id if talk.turns else ""
        return [
            bubbles(talk.turns, waits),
            bool(under_way),
            (titles, key),
            key,
            talk.name,
            who_answers(self.chat.model),
        ]

    async def news(self, owner: str, key: str, version: str, request: gr.Request):
        """Another word whenever a page does not show what it should; asked often, so it must be cheap.

        Args:
            owner, key, version: what the page says of itself.
        """
        if not owner:  # it has not been opened yet
            return gr.skip()
        page = self._pages.get(request.session_hash) or self.connect(owner, key, request)
        shows_all = version == str(page.version) and self._look(page) == page.shown
        return gr.skip() if shows_all else secrets.token_hex(8)

    async def show(self, version: str, request: gr.Request) -> list:
        """What has changed on a page, for its components; all of it if an earlier answer was lost on its way.

        Args:
            version: of what the page shows.
        """
        page = self.page(request)
        before = page.shown if version == str(page.version) else [None] * len(page.shown)
        page.shown, page.version = self._look(page), page.version + 1
        messages, busy, (titles, current), key, name, who = page.shown
        parts = [
            messages,
            gr.MultimodalTextbox(submit_btn=not busy, stop_btn=busy),
            gr.Radio(titles, value=current or None),
            key,
            name,
            f"{who} · Everything stays on the machine that serves this page.",
        ]
        changed = [
            part if now != then else gr.skip() for part, now, then in zip(parts, page.shown, before, strict=True)
        ]
        timer = gr.Timer(LOOK_EVERY_S if busy else IDLE_LOOK_EVERY_S)
        return [str(page.version), timer if busy != before[1] else gr.skip(), *changed]

    async def ask(self, message: dict, request: gr.Request, *wishes):
        """Asks what is in the text box, and empties it; while an answer is under way it stays there."""
        page = self.page(request)
        talk, text = page.conversation, (message.get("text") or "").strip()
        uploads = paths_of(message)
        if not text and not uploads:
            return gr.skip()
        try:
            pictures = [await asyncio.to_thread(self._keep, talk, file) for file in uploads]
        except FileNotFoundError as error:  # Gradio keeps uploads for an hour
            raise gr.Error(f"{Path(error.filename).name} has waited too long: please add it again.") from error
        if self.chat.answering(talk):
            gr.Info("One answer at a time: stop this one first, or wait for its end.")
            return gr.skip()
        talk.turns.append(Turn(text, pictures))
        self.chat.begin(talk, Wishes(*wishes), uploads)
        return {"text": "", "files": []}

    def _keep(self, talk: Conversation, upload: Path) -> Path:
        picture = self.conversations.keep(talk, upload)
        shown_picture(picture)  # made now, in a thread
        return picture

    async def example(self, chosen: gr.SelectData, request: gr.Request, *wishes) -> None:
        """Asks one of the examples."""
        await self.ask(chosen.value, request, *wishes)

    async def go_on(self, request: gr.Request, *wishes) -> None:
        """Asks for the rest of an answer that was cut."""
        await self.ask({"text": GO_ON}, request, *wishes)

    async def stop(self, request: gr.Request) -> None:
        """Stops the answer under way."""
        await self.chat.stop(self.page(request).conversation)

    async def retry(self, request: gr.Request, *wishes) -> None:
        """Answers the last question again."""
        talk = self.page(request).conversation
        await self.chat.stop(talk)
        if talk.turns:  # another tab may have taken them back
            self.chat.begin(talk, Wishes(*wishes))

    async def undo(self, request: gr.Request):
        """Takes the last question back into the text box."""
        talk = self.page(request).conversation
        await self.chat.stop(talk)
        if not talk.turns:
            return gr.skip()
        turn = talk.turns.pop()
        self.conversations.save(talk)
        return {"text": turn.question, "files": [str(picture) for picture in turn.pictures]}

    async def edit(self, edited: gr.EditData, request: gr.Request, *wishes) -> None:
        """Asks a question in other words, about the pictures that it had; what came after it is gone."""
        talk = self.page(request).conversation
        await self.chat.stop(talk)
        index = edited.index[0] if isinstance(edited.index, (list, tuple)) else edited.index
        asked = sum(message["role"] == "user" for message in bubbles(talk.turns)[:index])
        talk.turns[asked:] = [Turn(edited.value, talk.turns[asked].pictures)]
        self.chat.begin(talk, Wishes(*wishes))

    async def begin_new(self, request: gr.Request) -> None:
        """An empty conversation; an answer under way is written on in its own."""
        page = self.page(request)
        page.conversation = Conversation(page.owner)

    async def reopen(self, key: str, request: gr.Request) -> None:
        """An earlier conversation."""
        page = self.page(request)
        page.conversation = self.conversations.get(key, page.owner) or Conversation(page.owner)

    async def rename(self, name: str, request: gr.Request) -> str:
        """Another name for the conversation; none is its first question again. What it is called now."""
        talk = self.page(request).conversation
        if talk.turns and name != talk.name:
            talk.title = name.strip()
            self.conversations.save(talk)
        return talk.name

    async def delete(self, sure: str, request: gr.Request) -> None:
        """Deletes the conversation, with its pictures, if its owner is sure."""
        talk = self.page(request).conversation
        if sure and talk.turns:
            talk.gone = True
            await self.chat.stop(talk)
            self.conversations.delete(talk)

    async def export(self, request: gr.Request) -> str:
        """The conversation as a file: Markdown and its pictures in a .zip."""
        talk = self.page(request).conversation
        name = re.sub(r"[^\w -]", "", talk.name).strip() or "chat"
        path = Path(tempfile.mkdtemp(dir=get_upload_folder())) / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("chat.md", as_markdown(talk))
            for picture in {picture for turn in talk.turns for picture in turn.pictures if picture.is_file()}:
                file.write(picture, exported_name(picture))
        return str(path)

    async def choose(self, owner: str, request: gr.Request, *wishes) -> None:
        """Keeps the settings for the next time; not those that a page shows before it was opened."""
        if owner:
            self.conversations.choose(self.page(request).owner, [*wishes])

    async def being_written(self, message: dict | None, request: gr.Request) -> None:
        """What the text box holds now: its pictures are encoded ahead."""
        self.chat.ahead.want(request.session_hash, paths_of(message or {}))

    async def answer_program(self, message: dict, request: gr.Request, *wishes) -> tuple[str, str]:
        """For gradio_client, whose sessions are conversations that are kept nowhere: answer and note."""
        turns = self._programs.setdefault(request.session_hash, [])
        turns.append(Turn((message.get("text") or "").strip(), paths_of(message)))
        await self.chat.answer(turns, Progress(), Wishes(*wishes))
        return turns[-1].answer, turns[-1].note
