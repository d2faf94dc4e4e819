"""Persistent conversations: a SQLite file and a folder of images in the user's data folder.

    <user's data>/ov_mllama/chat.sqlite3, pictures/<conversation>/<digest>-<name>.png

Each conversation is readable by its owner only.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import shutil
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ov_mllama.chat.migrations import migrate
from ov_mllama.chat.search import ListedChat, find
from ov_mllama.chat.turns import STOPPED, WAITING, Turn, every_turn
from ov_mllama.chat.user_data import data_folder
from ov_mllama.runtime.images import load_image

DAY_S = 24 * 60 * 60
TITLE_LENGTH = 60  # characters of a title made from the first question
MAX_TITLE = 100  # characters of a title set by the owner
TIMEOUT_S = 10  # for another program's transaction


@dataclass(eq=False)
class Conversation:
    """Turns with owner and title. One without turns is not stored.

    Attributes:
        owner: as `owners.owner_of` returns it.
        title: "" before the first question.
        deleted: whether it was deleted, and must not be saved again.
        unsaved: error of the last save; "" after a success.
        temporary: whether it is never stored, see `begin_temporary`.
    """

    owner: str
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    title: str = ""
    turns: list[Turn] = field(default_factory=list)
    deleted: bool = False
    unsaved: str = ""
    temporary: bool = False

    @property
    def name(self) -> str:
        """Title, or a placeholder."""
        return self.title or ("Temporary chat" if self.temporary else "New chat")


class Conversations:
    """Store of all conversations.

    Args:
        folder: created with the first conversation; default: the user's data folder.

    Attributes:
        pictures, uploads, examples: folders of stored images, of uploads for the next question, and of the page's
            examples.
        version: incremented with every change, to invalidate lists.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = Path(folder or data_folder()).resolve()  # served images are at paths without links
        self.pictures, self.uploads, self.examples = (
            self.folder / name for name in ("pictures", "uploads", "examples")
        )
        self.version = 0
        self._open: weakref.WeakValueDictionary[str, Conversation] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()  # for `_open` and the database

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self.folder / "chat.sqlite3"
        with contextlib.closing(sqlite3.connect(file, timeout=TIMEOUT_S)) as database, database:
            migrate(database, file)
            yield database

    def find(self, owner: str, query: str = "", limit: int = -1) -> list[ListedChat]:
        """Return an owner's conversations that match a query, as `search.find`; limit -1: all."""
        with self._database() as database:
            return find(database, owner, query, limit)

    def is_pinned(self, key: str) -> bool:
        """Return whether a conversation is pinned, by its id."""
        with self._database() as database:
            return (1,) in database.execute("SELECT pinned FROM listed WHERE id = ?", [key])

    def begin_temporary(self, owner: str) -> Conversation:
        """Return a temporary conversation. Its pictures are deleted once nothing refers to it."""
        conversation = Conversation(owner, temporary=True)
        weakref.finalize(conversation, shutil.rmtree, self.pictures / conversation.id, ignore_errors=True)
        return conversation

    def delete_temporary(self) -> None:
        """Delete the pictures of temporary conversations, when the program ends."""
        for conversation in list(self._open.values()):
            if conversation.temporary:
                self.delete_pictures(conversation)

    def pin(self, conversation: Conversation, pinned: bool) -> None:
        """Pin a stored conversation to the top of its owner's list, or unpin it."""
        with self._database() as database:
            database.execute("UPDATE listed SET pinned = ? WHERE id = ?", [pinned, conversation.id])
        self.version += 1

    def get(self, key: str, owner: str) -> Conversation | None:
        """Return an owner's conversation by its id; None if there is none, or it is another owner's.

        Every caller gets the same object. An answer that was under way when the program ended is STOPPED.
        """
        with self._lock:
            conversation = self._open.get(key)
            if conversation is None:
                with self._database() as database:
                    row = database.execute(
                        "SELECT owner, title, turns FROM conversations WHERE id = ?", [key]
                    ).fetchone()
                if row is None or row[0] != owner:
                    return None
                conversation = Conversation(row[0], key, row[1])
                conversation.turns = self._turns(conversation, json.loads(row[2]))
                self._open[key] = conversation
        return conversation if conversation.owner == owner and not conversation.deleted else None

    def owner(self, key: str) -> str | None:
        """Return a conversation's owner by its id; None if there is none."""
        conversation = self._open.get(key)
        if conversation is not None:
            return None if conversation.deleted else conversation.owner
        with self._database() as database:
            row = database.execute("SELECT owner FROM conversations WHERE id = ?", [key]).fetchone()
        return row[0] if row else None

    def adopt(self, former: str, owner: str) -> None:
        """Give a former owner's conversations to an owner, and its settings unless the owner has some."""
        with self._lock, self._database() as database:
            database.execute("UPDATE conversations SET owner = ? WHERE owner = ?", [owner, former])
            database.execute("UPDATE OR IGNORE settings SET owner = ? WHERE owner = ?", [owner, former])
            for conversation in list(self._open.values()):
                if conversation.owner == former:
                    conversation.owner = owner
        self.version += 1

    def _turns(self, conversation: Conversation, rows: list[dict]) -> list[Turn]:
        return [self._turn(conversation, fields) for fields in rows]

    def _turn(self, conversation: Conversation, fields: dict) -> Turn:
        """Return a turn that any version of this program has saved, without unknown fields."""
        known = {each.name for each in dataclasses.fields(Turn)} & fields.keys()
        turn = Turn(**{"question": "", **{name: fields[name] for name in known}})
        turn.others = [self._turns(conversation, tail) for tail in turn.others]  # type: ignore[arg-type]
        turn.pictures = [self._as_stored_today(conversation, self.pictures / name) for name in turn.pictures]
        if turn.state == WAITING:
            turn.state, turn.note = STOPPED, "The program ended before the answer did."
        return turn

    def _as_stored_today(self, conversation: Conversation, picture: Path) -> Path:
        """Return a picture; store it first if an earlier version has left it as it was uploaded."""
        if picture.parent.parent == self.pictures:
            return picture
        try:
            return self.store_file(conversation, picture)
        except (ValueError, OSError):  # deleted, or no image
            return picture

    def save(self, conversation: Conversation) -> None:
        """Save a conversation, titled by its first question if it has no title; one without turns is deleted.

        Raises:
            sqlite3.Error, OSError: if it could not be written.
        """
        self.write(conversation, self.snapshot(conversation))

    def snapshot(self, conversation: Conversation) -> list | None:
        """Return a conversation's row for `write`, as it is now; None if it has no turns."""
        if not conversation.turns:
            conversation.title = ""
            return None
        first = conversation.turns[0].question.strip() or "A picture"
        title = conversation.title or " ".join(first.split())[:TITLE_LENGTH]
        conversation.title = title.encode(errors="replace").decode()  # lone surrogates are invalid for SQLite
        return [
            conversation.id,
            conversation.owner,
            conversation.title,
            max(turn.asked for turn in every_turn(conversation.turns)),
            json.dumps(self._fields(conversation.turns)),
        ]

    def _fields(self, turns: list[Turn]) -> list[dict]:
        """Return turns, hidden variants too, as JSON has them."""
        return [
            {
                **vars(turn),
                "pictures": [path.relative_to(self.pictures).as_posix() for path in turn.pictures],
                "others": [self._fields(tail) for tail in turn.others],
            }
            for turn in turns
        ]

    def write(self, conversation: Conversation, row: list | None) -> None:
        """Write a conversation's `snapshot`, from any thread.

        Raises:
            sqlite3.Error, OSError: if it could not be written.
        """
        with self._lock:
            if conversation.deleted or conversation.temporary:
                return
            if row is None:
                self._delete_rows(conversation)
                return
            with self._database() as database:
                database.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?)", row)
            self._open[conversation.id] = conversation
            self.version += 1

    def delete(self, *conversations: Conversation) -> None:
        """Delete conversations and their pictures: all, or in case of an error none.

        Raises:
            sqlite3.Error, OSError: if they could not be deleted, and are still there.
        """
        with self._lock:
            try:
                for each in conversations:
                    each.deleted = True
                self._delete_rows(*conversations)
            except BaseException:
                for each in conversations:
                    each.deleted = False
                raise
        for each in conversations:
            self.delete_pictures(each)

    def delete_pictures(self, conversation: Conversation) -> None:
        """Delete the pictures of a conversation that has none any more."""
        shutil.rmtree(self.pictures / conversation.id, ignore_errors=True)

    def _delete_rows(self, *conversations: Conversation) -> None:
        with self._database() as database:
            database.executemany("DELETE FROM conversations WHERE id = ?", [[each.id] for each in conversations])
            database.execute("INSERT INTO texts (texts) VALUES ('optimize')")  # else it holds deleted words for a time
        self.version += 1

    def store_file(self, conversation: Conversation, file: Path) -> Path:
        """Open an image file, and store it as `store_image`.

        Raises:
            PictureError: if it is missing, or no image.
            OSError: if it could not be written.
        """
        return self.store_image(conversation, load_image(file), file.stem)

    def store_image(self, conversation: Conversation, image: Image.Image, name: str) -> Path:
        """Store an image for a conversation's lifetime, as a PNG without metadata, and return its path.

        It is named by its pixels' digest and its old name, so that the same image is stored once.

        Args:
            image: RGB.
            name: without suffix; special characters are removed.
        """
        self._open.setdefault(conversation.id, conversation)  # the page requests the image before the first save
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]
        # after Undo, the name has a digest already
        name = re.sub(r"[^\w -]", "", re.sub("^[0-9a-f]{16}-", "", name)).strip()[:40] or "picture"
        stored = self.pictures / conversation.id / f"{digest}-{name}.png"
        if not stored.is_file():
            for folder in (self.folder, self.pictures, stored.parent):  # `parents` have no mode
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = stored.with_name(f"{secrets.token_hex(8)}.part")
            try:
                image.save(part, "PNG", compress_level=1)  # 0.9 s for 12 megapixels; level 6 takes 5 s and saves 10 %
                part.replace(stored)
            finally:
                part.unlink(missing_ok=True)
        return stored

    def delete_orphans(self) -> None:
        """Delete pictures without a conversation and uploads that a killed program has left. Those of the last day
        stay: a question about them may follow."""
        with self._database() as database:
            known = {key for (key,) in database.execute("SELECT id FROM conversations")}
        for path in [*self.pictures.glob("*"), *self.uploads.glob("*")]:
            with contextlib.suppress(FileNotFoundError):  # deleted by another chat
                if path.name in known or path.stat().st_mtime >= time.time() - DAY_S:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:  # an incomplete upload
                    path.unlink()

    def settings(self, owner: str) -> dict | list | None:
        """Return the settings that an owner has saved last; None if there are none."""
        with self._database() as database:
            row = database.execute("SELECT chosen FROM settings WHERE owner = ?", [owner]).fetchone()
        return json.loads(row[0]) if row else None

    def save_settings(self, owner: str, settings: dict) -> None:
        """Save an owner's settings."""
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", [owner, json.dumps(settings)])
