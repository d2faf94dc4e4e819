"""Open tabs of the chat page, and the conversations that they show."""

import asyncio
import re
import sqlite3

import gradio as gr

from ov_mllama.chat.answers import Chat
from ov_mllama.chat.owners import owner_of
from ov_mllama.chat.page_input import LruDict, restored, user_error
from ov_mllama.chat.search import MAX_LISTED
from ov_mllama.chat.store import Conversation

MAX_PAGES, MAX_PROGRAMS = 1000, 100  # remembered; the least recently used are evicted
FORMER_TOKEN = re.compile("[0-9a-f]{32}")  # in the browser's local storage, of earlier versions
OPENED = "opened"
TEMPORARY_KEY = "temporary"  # a tab with it begins a new temporary chat when it is loaded, or connects again


def key_of(talk: Conversation) -> str:
    """Return a conversation's key in the page's URL; "" for one without turns."""
    return TEMPORARY_KEY if talk.temporary else talk.id if talk.turns else ""


class Page:
    """A tab.

    Attributes:
        owner: of the conversations that it shows.
        key: owner and session, as `Prefetcher` knows it.
        conversation: the one that it shows.
        shown: what it shows already, by output of `refresh`.
        version: of `shown`.
        error: of the last event, such as a rejected question.
        query, limit, selecting, ticked: of its list of chats, as the user has set them.
        groups, more: chats of the list, and whether there are more; as `search.grouped` returns them.
        pinned: whether `conversation` is pinned.
        listed_as: what `groups`, `more` and `pinned` depend on.
    """

    def __init__(self, owner: str, session: str, conversation: Conversation):
        self.owner, self.key, self.conversation = owner, (owner, session), conversation
        self.shown: list = [None] * 8
        self.version = 0
        self.error, self.query, self.limit = "", "", MAX_LISTED
        self.selecting = self.more = self.pinned = False
        self.ticked: set[str] = set()
        self.groups: list[tuple[str, list[tuple[str, str]]]] = []
        self.listed_as: tuple | None = None


class Tabs:
    """The open tabs, each identified by owner and session together: the browser chooses the session, so it is worth
    nothing without the owner's login or cookie.

    Args:
        chat: answers the questions.
        by_name: as for `owners.owner_of`.
    """

    def __init__(self, chat: Chat, by_name: bool = True):
        self.chat, self.conversations, self.by_name = chat, chat.conversations, by_name
        self._pages: LruDict = LruDict(MAX_PAGES, lambda key: chat.prefetcher.prefetch(key, []))
        self._programs: LruDict = LruDict(MAX_PROGRAMS)

    def _key(self, request: gr.Request) -> tuple[str | None, str]:
        """Return a request's owner and session."""
        return owner_of(request.username, request.cookies, self.by_name), request.session_hash

    def find(self, request: gr.Request) -> Page | None:
        """Return the tab that a request comes from; None if it is unknown or another owner's."""
        return self._pages.get(self._key(request))

    def page(self, request: gr.Request) -> Page:
        """Return the tab that a request comes from.

        Raises:
            gr.Error: if it is unknown, as just after a restart of the server, or another owner's.
        """
        page = self.find(request)
        if page is None:
            raise gr.Error("The page was just connecting: please try again.", print_exception=False)
        return page

    async def connect(self, key: str, request: gr.Request) -> Page:
        """Register a tab with the conversation that it shows, on opening and after a restart of the server.

        Raises:
            gr.Error: if its browser takes no cookies, or conversations cannot be read.
        """
        owner, session = self._key(request)
        if owner is None:
            raise user_error("The page needs a cookie to find your chats: allow it, or open it in its own tab.")
        if key == TEMPORARY_KEY:
            shown = self.conversations.begin_temporary(owner)
        else:
            shown = await self.stored(key, owner) or Conversation(owner)
        page = self._pages[owner, session] = Page(owner, session, shown)
        return page

    async def stored(self, key: object, owner: str) -> Conversation | None:
        """Return an owner's stored conversation by its id; None if there is none."""
        found = await self._read(self.conversations.get, key, owner) if isinstance(key, str) and key else None
        return found if found and not found.temporary else None

    @staticmethod
    async def _read(function, *arguments):
        """Call a function of `conversations` in a thread: it may wait for another program.

        Raises:
            gr.Error: if it failed.
        """
        try:
            return await asyncio.to_thread(function, *arguments)
        except (sqlite3.Error, OSError) as error:
            raise user_error(f"The chats cannot be read or written just now ({error}): try again.") from error

    async def open(self, former: str, request: gr.Request) -> list:
        """Register a tab that was opened or reloaded; return OPENED, the token to store (none), and the settings.
        Before that answer the tab neither polls nor saves settings.

        Args:
            former: token of earlier versions in the browser's local storage; its conversations go to the cookie's.
        """
        owner, _ = self._key(request)
        if owner and owner.startswith("browser:") and isinstance(former, str) and FORMER_TOKEN.fullmatch(former):
            await self._read(self.conversations.adopt, f"browser:{former}", owner)
        page = await self.connect(request.query_params.get("chat", ""), request)
        saved = await self._read(self.conversations.settings, page.owner)
        return [OPENED, "", *restored(saved)]

    def forget(self, request: gr.Request) -> Page | None:
        """Forget a closed tab, if it is known, and cancel its prefetching."""
        key = self._key(request)
        self._programs.pop(key, None)
        self.chat.prefetcher.prefetch(key, [])
        return self._pages.pop(key, None)
