"""Event handlers of the chat page, for all open tabs.

    store.py -> what a page shows; events of a page -> answers.py -> store.py

A page polls, and is then refreshed. Nothing else writes on it, so a second tab, a reload, Back and a restart of the
server all show the stored conversation.
"""

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from ov_mllama.chat.answers import Chat
from ov_mllama.chat.documents import pdfs_of
from ov_mllama.chat.listing import ChatList, ListTabs
from ov_mllama.chat.page_input import bounded_text, checked_settings, images_of, text_of, user_error
from ov_mllama.chat.render import describe_model, detail_choices, escape_markup, to_gradio, write_export
from ov_mllama.chat.store import MAX_TITLE, Conversation
from ov_mllama.chat.tabs import Page, key_of
from ov_mllama.chat.turns import WAITING, Turn
from ov_mllama.chat.variants import Variants
from ov_mllama.runtime.images import DETAILS, PictureError, load_image
from ov_mllama.runtime.inference import Progress

POLL_S = 0.3  # during an answer; about one token of the 11B
IDLE_POLL_S = 1.0  # else, for changes in other tabs
MAX_PROGRAM_TURNS = 200
LOST = "The connection was lost, and with it the temporary chat: this is a new one."
TEMPORARY = "**Temporary chat:** it is not stored, and ends with this tab."


class Pages(ListTabs, Variants):
    """Event handlers of the open tabs. They change conversations; `refresh` alone writes on pages.

    Args:
        chat, by_name: as for `Tabs`.
        examples: questions and their image files, as the page shows them.
    """

    def __init__(self, chat: Chat, examples: Sequence[tuple[str, Sequence[Path]]] = (), by_name: bool = True):
        super().__init__(chat, by_name)
        self.examples = examples

    def _state(self, page: Page) -> list:
        """Return what a page should show: messages, whether it is busy or pinned, id, name, foot, details, list."""
        if page.conversation.deleted:
            page.conversation = Conversation(page.owner)
        talk, running = page.conversation, self.chat.answering(page.conversation)
        progress = "Stopping ..." if running and running.task.cancelling() else str(running and running.progress)
        key = key_of(talk)
        states = self.chat.prefetcher.states(page.key)
        pictures = [f"Picture{'s' * (len(states) > 1)}: {', '.join(states)}"] * bool(states)
        hidden = bool(running) and all(turn.state != WAITING for turn in talk.turns)
        writing = [f"Another answer: {escape_markup(progress)}"] * hidden
        model = escape_markup(describe_model(self.chat.model))
        stays = TEMPORARY if talk.temporary else "Everything stays on the machine that serves this page."
        foot = " · ".join([*(pictures or writing or [model]), stays])
        errors = [f"⚠️ {escape_markup(message)}" for message in (page.error, talk.unsaved) if message]
        return [
            to_gradio(talk.turns, progress),
            bool(running),
            page.pinned,
            key,
            talk.name,
            "\n\n".join([foot, *errors]),
            detail_choices(self.chat.model),
            ChatList(page.groups, key, page.more, bool(page.query), page.selecting),
        ]

    async def poll(self, opened: str, key: str, version: str, request: gr.Request):
        """Return a new random word if a page is out of date. Called often, so it must be cheap.

        Args:
            opened, key, version: state of the page.
        """
        if not opened:
            return gr.skip()
        page = self._pages.get(self._key(request))
        if page is None:
            page = await self.connect(key, request)
            page.error = LOST * page.conversation.temporary
        await self._list_chats(page)
        current = version == str(page.version) and self._state(page) == page.shown
        return gr.skip() if current else secrets.token_hex(8)

    async def refresh(self, version: str, request: gr.Request) -> list:
        """Return updates for a page's components that have changed; for all if an earlier update was lost.

        Args:
            version: of what the page shows.
        """
        page = self.page(request)
        await self._list_chats(page)
        before = page.shown if version == str(page.version) else [None] * len(page.shown)
        page.shown, page.version = self._state(page), page.version + 1
        messages, busy, pinned, *texts, details, chats = page.shown
        box, pin = gr.MultimodalTextbox(submit_btn=not busy, stop_btn=busy), "Unpin" if pinned else "Pin"
        updates = [
            [messages],
            [box],
            [pin],
            *([text] for text in texts),
            [gr.Radio(details)],
            chats.updates(page.ticked),
        ]
        changed = zip(updates, page.shown, before, strict=True)
        timer = gr.Timer(POLL_S if busy else IDLE_POLL_S) if busy != before[1] else gr.skip()
        parts = (part if now != then else gr.skip() for group, now, then in changed for part in group)
        return [str(page.version), timer, *parts]

    async def ask(self, message: dict, request: gr.Request, *settings):
        """Ask the text box's question and empty the box; during an answer, and after an error, it stays."""
        return await self._ask(text_of(message), images_of(message), request, settings)

    async def _ask(self, text: str, images: Sequence[Path], request: gr.Request, settings: Sequence):
        """Ask a question; its images are known to be uploads or examples."""
        page, checked = self.page(request), checked_settings(settings)
        talk = page.conversation
        if not text and not images:
            return gr.skip()
        try:
            stored = [await asyncio.to_thread(self._store, talk, image) for image in images]
        except PictureError as error:
            raise user_error(error) from error
        except OSError as error:
            raise user_error(f"The picture could not be read or stored ({error.strerror}): try again.") from error
        except MemoryError as error:
            raise user_error("There is too little memory to open the picture: close other programs.") from error
        if talk.deleted or (talk.temporary and page.conversation is not talk):  # while the images were stored
            await asyncio.to_thread(self.conversations.delete_pictures, talk)
            raise user_error("This chat has ended meanwhile: ask in another one.")
        if self.chat.answering(talk):
            raise user_error("One answer at a time: stop this one first, or wait for its end.")
        remarks = [remark for _, remark in stored if remark]
        talk.turns.append(Turn(text, [picture for picture, _ in stored], remarks=remarks, detail=checked.detail))
        self.chat.begin(talk, checked, images)
        return {"text": "", "files": []}

    def _store(self, talk: Conversation, image: Path) -> tuple[Path, str]:
        """Store an image, in a thread; return its file and a remark, such as on its frames."""
        opened = load_image(image)
        return self.conversations.store_image(talk, opened, image.stem), opened.info.get("remark", "")

    async def example(self, chosen: gr.SelectData, request: gr.Request, *settings) -> None:
        """Ask an example, by its index; the rest of the event is not trusted."""
        index = chosen.index
        if type(index) is not int or not 0 <= index < len(self.examples):
            raise user_error("There is no such example.")
        text, images = self.examples[index]
        await self._ask(text, images, request, settings)

    async def rename(self, name: str, key: str, request: gr.Request) -> str:
        """Rename the conversation, to its first question if the name is empty; return its name.

        Args:
            key: of the one that was renamed: another may be shown by now.
        """
        talk = self.page(request).conversation
        name = bounded_text(name, MAX_TITLE, "name")
        if talk.turns and key == key_of(talk) and name != talk.name:
            talk.title = name.strip()
            self.chat.save(talk)
        return talk.name

    async def delete(self, sure: str, request: gr.Request) -> None:
        """Delete the conversation and its images, if its owner has confirmed it."""
        talk = self.page(request).conversation
        if sure and talk.turns:
            await self._delete([talk])

    async def export(self, request: gr.Request) -> str:
        """Return the path of a .zip with the conversation's Markdown and images."""
        return await asyncio.to_thread(write_export, self.page(request).conversation)

    async def choose(self, opened: str, request: gr.Request, *settings) -> None:
        """Save the settings, unless the page has not received the saved ones yet."""
        if opened:
            owner = self.page(request).owner
            await self._read(self.conversations.save_settings, owner, checked_settings(settings)._asdict())

    async def on_typing(self, message: dict | None, detail: str, request: gr.Request) -> None:
        """Prefetch the images in the text box of a connected page. An invalid one is left to the question's error."""
        key = self._key(request)
        if page := self._pages.get(key):
            try:
                images = [] if page.conversation.temporary else images_of(message)  # or their encoded form would stay
            except gr.Error:
                images = []
            images = [image for image in images if image not in pdfs_of(images)]  # their pages follow
            self.chat.prefetcher.prefetch(key, images, detail if detail in DETAILS else "high")

    async def api_chat(self, message: dict, request: gr.Request, *settings) -> tuple[str, str]:
        """Return answer and note for gradio_client, whose sessions are conversations that are not stored."""
        checked, key = checked_settings(settings), self._key(request)
        turn = Turn(text_of(message), images_of(message), detail=checked.detail)
        turns = self._programs.get(key, [])
        self._programs[key] = turns
        turns.append(turn)
        del turns[:-MAX_PROGRAM_TURNS]
        await self.chat.answer(turns, Progress(), checked)
        return turn.answer, turn.note
