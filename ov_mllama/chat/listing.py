"""Event handlers of the list of chats: search, pin, delete several, import, temporary chats."""

import asyncio
import datetime
import logging
import sqlite3
from collections.abc import Collection, Iterable
from typing import NamedTuple

import gradio as gr

from ov_mllama.chat.imports import import_chat
from ov_mllama.chat.page_input import bounded_text, uploaded, user_error
from ov_mllama.chat.search import MAX_GROUPS, MAX_LISTED, MAX_QUERY, grouped
from ov_mllama.chat.store import Conversation
from ov_mllama.chat.tabs import Page, Tabs
from ov_mllama.runtime.errors import UserError

logger = logging.getLogger(__name__)

MAX_DELETED = 10_000  # chats at once


class ChatList(NamedTuple):
    """The list of a page.

    Attributes:
        groups: headings, and titles and ids below each.
        current: id of the chat that the page shows; "" for none of the list.
        more: whether there are more than are listed.
        searched: whether only chats that match a query are listed.
        selecting: whether several can be selected.
    """

    groups: list[tuple[str, list[tuple[str, str]]]]
    current: str
    more: bool
    searched: bool
    selecting: bool

    def updates(self, ticked: Collection[str]) -> list:
        """Return updates for the components of `sidebar.list_outputs`.

        Args:
            ticked: ids of the chats that are selected.
        """
        radios = [
            gr.Radio(rows, label=heading, visible=True, value=self._selected(rows))
            for heading, rows in ([] if self.selecting else self.groups)
        ]
        hidden = [gr.Radio([], value=None, visible=False)] * (MAX_GROUPS - len(radios))
        chats = [row for _, rows in self.groups for row in rows]
        return [
            *radios,
            *hidden,
            gr.Button(visible=self.more),
            gr.Markdown(visible=self.searched and not chats),
            gr.CheckboxGroup(chats, value=[key for _, key in chats if key in ticked], visible=self.selecting),
            gr.Button(visible=self.selecting),
            gr.Button("Cancel" if self.selecting else "Select", visible=self.selecting or bool(chats)),
        ]

    def _selected(self, rows: list[tuple[str, str]]) -> str | None:
        return next((key for _, key in rows if key == self.current), None)


class ListTabs(Tabs):
    """Open tabs, with the handlers of their lists."""

    async def _list_chats(self, page: Page) -> None:
        """Read a page's list if it has changed; if that fails, the old one stays."""
        key = page.conversation.id if page.conversation.turns and not page.conversation.temporary else ""
        today = datetime.date.today()
        wanted = (self.conversations.version, page.query, page.limit, key, today)
        if page.listed_as != wanted:
            try:
                chats = await asyncio.to_thread(self.conversations.find, page.owner, page.query, page.limit + 1)
                page.pinned = await asyncio.to_thread(self.conversations.is_pinned, key)
            except (sqlite3.Error, OSError):
                logger.warning("The list of chats cannot be read", exc_info=True)
            else:
                page.groups, page.more = grouped(chats[: page.limit], today), len(chats) > page.limit
                page.listed_as = wanted

    async def begin_new(self, request: gr.Request) -> None:
        """Show an empty conversation; an answer under way continues in its own."""
        page = self.page(request)
        await self._show(page, Conversation(page.owner))

    async def reopen(self, key: str, request: gr.Request) -> None:
        """Show an earlier conversation."""
        page = self.page(request)
        await self._show(page, await self.stored(key, page.owner) or Conversation(page.owner))

    async def search(self, query: str, request: gr.Request) -> None:
        """List the chats that match a query."""
        page = self.find(request)
        if page:  # the event may precede `open`
            page.query, page.limit = bounded_text(query, MAX_QUERY, "search").strip(), MAX_LISTED

    async def show_more(self, request: gr.Request) -> None:
        """List more chats."""
        self.page(request).limit += MAX_LISTED

    async def pin(self, request: gr.Request) -> None:
        """Pin the conversation to the top of the list, or unpin it."""
        talk = self.page(request).conversation
        if talk.turns and not talk.temporary:
            pinned = await self._read(self.conversations.is_pinned, talk.id)
            await self._read(self.conversations.pin, talk, not pinned)

    async def select(self, request: gr.Request) -> None:
        """Begin to select several chats, or cancel it."""
        page = self.page(request)
        page.selecting, page.ticked = not page.selecting, set()

    async def tick(self, keys: list, request: gr.Request) -> None:
        """Note which chats are selected, for the next change of the list."""
        self.page(request).ticked = {key for key in keys[:MAX_DELETED] if isinstance(key, str)}

    async def delete_selected(self, keys: list, sure: str, request: gr.Request) -> None:
        """Delete several conversations and their images, if their owner has confirmed it; others' are ignored."""
        page = self.page(request)
        if not isinstance(keys, list) or len(keys) > MAX_DELETED:
            raise user_error(f"Select at most {MAX_DELETED} chats.")
        if sure:
            texts = {key for key in keys if isinstance(key, str) and key.isascii()}
            found = [await self._read(self.conversations.get, key, page.owner) for key in texts]
            await self._delete([talk for talk in found if talk])
            page.selecting, page.ticked = False, set()

    async def _delete(self, talks: Iterable[Conversation]) -> None:
        """Delete conversations and their images, what the model has encoded of these included."""
        for talk in talks:
            await self.chat.stop(talk)
            await self._remove_encoded(talk)
        await self._read(self.conversations.delete, *talks)

    async def _remove_encoded(self, talk: Conversation) -> None:
        pictures = [*self.conversations.pictures.glob(f"{talk.id}/*.png")]
        await asyncio.to_thread(self.chat.remove_encoded, pictures)

    async def import_chat(self, file: str, request: gr.Request) -> None:
        """Store an uploaded export as a new conversation, and show it."""
        page = self.page(request)
        try:
            imported = await self._read(import_chat, uploaded(file), self.conversations, page.owner)
        except UserError as error:
            raise user_error(error) from error
        except MemoryError as error:
            raise user_error("There is too little memory to open the pictures: close other programs.") from error
        await self._show(page, imported)

    async def begin_temporary(self, request: gr.Request) -> None:
        """Show an empty conversation that is never stored."""
        page = self.page(request)
        await self._show(page, self.conversations.begin_temporary(page.owner))

    async def _show(self, page: Page, conversation: Conversation) -> None:
        """Show a conversation. A temporary one that was shown ends: its answer and what was encoded of its images."""
        left, page.conversation = page.conversation, conversation
        if left.temporary:
            await self._end(left)

    async def _end(self, temporary: Conversation) -> None:
        await self.chat.stop(temporary)
        await self._remove_encoded(temporary)

    async def on_close(self, request: gr.Request) -> None:
        """Forget a closed tab and cancel its prefetching; its answers continue, but for a temporary conversation's."""
        page = self.forget(request)
        if page and page.conversation.temporary:
            await self._end(page.conversation)
