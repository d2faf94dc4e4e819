"""Conversations that outlive page and program: a small SQLite file and a folder of pictures, in the user's own data.

    <user's data>/ov_mllama/chat.sqlite3, pictures/<conversation>/<digest>-<name>.png

They are read and written by this program alone, and nobody but who began a conversation is given it.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs
from PIL import Image

from ov_mllama.runtime.images import open_picture

DAY_S = 24 * 60 * 60
TITLE_LENGTH = 60  # characters of a first question that name its conversation
TIMEOUT_S = 10  # for which another program's writing is waited for
MAX_TITLE = 100  # characters of a title that somebody gives

# Each step makes the file's next format, `PRAGMA user_version`; a step that has been released is not changed any more
MIGRATIONS = (
    # of earlier versions, whose files say 0
    """
    CREATE TABLE IF NOT EXISTS conversations (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, changed REAL NOT NULL, turns TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS by_owner ON conversations (owner, changed);
    CREATE TABLE IF NOT EXISTS settings (owner TEXT PRIMARY KEY, chosen TEXT NOT NULL);
    """,
    # a browser could call itself "user alice": who an owner is, is said by the prefix
    """
    UPDATE conversations SET owner = CASE WHEN owner GLOB 'user *' THEN 'user:' || substr(owner, 6)
        ELSE 'browser:' || owner END;
    UPDATE settings SET owner = CASE WHEN owner GLOB 'user *' THEN 'user:' || substr(owner, 6)
        ELSE 'browser:' || owner END;
    """,
)

# How a turn stands
WAITING, ANSWERED, CUT, STOPPED, FAILED = "waiting", "answered", "cut", "stopped", "failed"


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        question: its text; may be empty where there are pictures.
        pictures: their files.
        answer: as far as it is written.
        note: what is to be said of the answer: the time it took, or why there is none.
        state: WAITING until the answer is there; CUT by its limit; STOPPED by whoever asked; FAILED.
        asked: when, in seconds since 1970.
        remarks: about its pictures.
    """

    question: str
    pictures: list[Path] = field(default_factory=list)
    answer: str = ""
    note: str = ""
    state: str = WAITING
    asked: float = field(default_factory=time.time, compare=False)
    remarks: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Conversation:
    """Turns, whose they are and how they are called. One that nobody asked anything yet is kept nowhere.

    Attributes:
        owner: who began it.
        title: "" until the first question gives it one.
        deleted: it was deleted and is not to be kept any more.
        unsaved: why the last save failed; "" once one has succeeded.
    """

    owner: str
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    title: str = ""
    turns: list[Turn] = field(default_factory=list)
    deleted: bool = False
    unsaved: str = ""

    @property
    def name(self) -> str:
        """What to call it."""
        return self.title or "New chat"


class Conversations:
    """All of them.

    Args:
        folder: where they are kept, made with the first; default: the user's data folder.

    Attributes:
        pictures, uploads, examples: folders of the conversations' pictures, of those that are about to be asked about,
            and of those that a page suggests.
        version: grows with every change, so that who shows a list knows when to look again.
    """

    def __init__(self, folder: Path | None = None):
        folder = Path(folder) if folder else platformdirs.user_data_path("ov_mllama", appauthor=False)
        self.folder = folder.resolve()  # no link leads to a picture that is served
        self.pictures, self.uploads, self.examples = (
            self.folder / name for name in ("pictures", "uploads", "examples")
        )
        self.version = 0
        self._open: weakref.WeakValueDictionary[str, Conversation] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()  # of what is read and written from several threads

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self.folder / "chat.sqlite3"
        with contextlib.closing(sqlite3.connect(file, timeout=TIMEOUT_S)) as database, database:
            migrate(database, file)
            yield database

    def titles(self, owner: str) -> list[tuple[str, str]]:
        """Name and id of each of a person's conversations, the one asked last first."""
        with self._database() as database:
            rows = database.execute(
                "SELECT title, id FROM conversations WHERE owner = ? ORDER BY changed DESC", [owner]
            )
            return list(rows)

    def get(self, key: str, owner: str) -> Conversation | None:
        """A person's conversation by its id; None where there is none, or it is somebody else's.

        Every caller gets the same object. An answer that the program's end has cut off is STOPPED.
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
                conversation.turns = [self._turn(conversation, fields) for fields in json.loads(row[2])]
                self._open[key] = conversation
        return conversation if conversation.owner == owner and not conversation.deleted else None

    def owner(self, key: str) -> str | None:
        """Return a conversation's owner by its id; None where there is none."""
        conversation = self._open.get(key)
        if conversation is not None:
            return None if conversation.deleted else conversation.owner
        with self._database() as database:
            row = database.execute("SELECT owner FROM conversations WHERE id = ?", [key]).fetchone()
        return row[0] if row else None

    def adopt(self, former: str, owner: str) -> None:
        """Hand a former owner's conversations and settings over; settings of the new owner's stay."""
        with self._lock, self._database() as database:
            database.execute("UPDATE conversations SET owner = ? WHERE owner = ?", [owner, former])
            database.execute("UPDATE OR IGNORE settings SET owner = ? WHERE owner = ?", [owner, former])
            for conversation in list(self._open.values()):
                if conversation.owner == former:
                    conversation.owner = owner
        self.version += 1

    def _turn(self, conversation: Conversation, fields: dict) -> Turn:
        """A turn as it was saved, by whatever version of this program; what it does not know is left out."""
        known = {each.name for each in dataclasses.fields(Turn)} & fields.keys()
        turn = Turn(**{"question": "", **{name: fields[name] for name in known}})
        turn.pictures = [self._as_stored_today(conversation, self.pictures / name) for name in turn.pictures]
        if turn.state == WAITING:
            turn.state, turn.note = STOPPED, "The program ended before the answer did."
        return turn

    def _as_stored_today(self, conversation: Conversation, picture: Path) -> Path:
        """A picture that an earlier version has kept as it was uploaded, stored anew."""
        if picture.parent.parent == self.pictures:
            return picture
        try:
            return self.keep(conversation, picture)
        except (ValueError, OSError):  # it has gone, or was none
            return picture

    def save(self, conversation: Conversation) -> None:
        """Keeps a conversation as it is now, under its first question if it has no title yet; one whose questions were
        all taken back is kept no longer.

        Raises:
            sqlite3.Error, OSError: it could not be written.
        """
        self.write(conversation, self.snapshot(conversation))

    def snapshot(self, conversation: Conversation) -> list | None:
        """Return a conversation's row for `write`, as it is now; None where it has no turns."""
        if not conversation.turns:
            conversation.title = ""
            return None
        first = conversation.turns[0].question.strip() or "A picture"
        title = conversation.title or " ".join(first.split())[:TITLE_LENGTH]
        conversation.title = title.encode(errors="replace").decode()  # halves of characters are no text for SQLite
        turns = [
            {**asdict(turn), "pictures": [path.relative_to(self.pictures).as_posix() for path in turn.pictures]}
            for turn in conversation.turns
        ]
        return [
            conversation.id,
            conversation.owner,
            conversation.title,
            conversation.turns[-1].asked,
            json.dumps(turns),
        ]

    def write(self, conversation: Conversation, row: list | None) -> None:
        """Write a conversation's `snapshot`, from any thread.

        Raises:
            sqlite3.Error, OSError: it could not be written.
        """
        with self._lock:
            if conversation.deleted:
                return
            if row is None:
                self._forget(conversation)
                return
            with self._database() as database:
                database.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?)", row)
            self._open[conversation.id] = conversation
            self.version += 1

    def delete(self, conversation: Conversation) -> None:
        """Forgets a conversation and its pictures for good.

        Raises:
            sqlite3.Error, OSError: it could not be deleted, and is still there.
        """
        with self._lock:
            try:
                conversation.deleted = True
                self._forget(conversation)
            except BaseException:
                conversation.deleted = False
                raise
        shutil.rmtree(self.pictures / conversation.id, ignore_errors=True)

    def _forget(self, conversation: Conversation) -> None:
        with self._database() as database:
            database.execute("DELETE FROM conversations WHERE id = ?", [conversation.id])
        self.version += 1

    def keep(self, conversation: Conversation, file: Path) -> Path:
        """Store a picture anew for as long as its conversation lives: a PNG of the pixels that `open_picture` makes of
        it, without EXIF and other metadata, named by its pixels' digest and its old name. Twice the same picture is
        one file.

        Raises:
            PictureError: it is missing or no picture.
            OSError: it could not be written.
        """
        return self.store(conversation, open_picture(file), file.stem)

    def store(self, conversation: Conversation, image: Image.Image, name: str) -> Path:
        """Store an opened picture, as `keep`.

        Args:
            image: RGB.
            name: without suffix; characters that mean something elsewhere are left out.
        """
        self._open.setdefault(conversation.id, conversation)  # its owner is shown the picture before the first save
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]
        # a question that is taken back and asked again brings the name that was made here
        name = re.sub(r"[^\w -]", "", re.sub("^[0-9a-f]{16}-", "", name)).strip()[:40] or "picture"
        kept = self.pictures / conversation.id / f"{digest}-{name}.png"
        if not kept.is_file():
            for folder in (self.folder, self.pictures, kept.parent):  # `parents` have no mode
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = kept.with_name(f"{secrets.token_hex(8)}.part")
            try:
                image.save(part, "PNG", compress_level=1)  # 0.9 s of 12 megapixels; 6 takes 5 s for a tenth less
                part.replace(kept)
            finally:
                part.unlink(missing_ok=True)
        return kept

    def delete_orphans(self) -> None:
        """Deletes pictures that belong to no conversation any more: of questions taken back, or, uploads too, of a
        program that was killed. Those of the last day stay, because they may belong to a question that is about to be
        asked."""
        with self._database() as database:
            known = {key for (key,) in database.execute("SELECT id FROM conversations")}
        for path in [*self.pictures.glob("*"), *self.uploads.glob("*")]:
            with contextlib.suppress(FileNotFoundError):  # another chat may delete it just then
                if path.name in known or path.stat().st_mtime >= time.time() - DAY_S:
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:  # an upload that was broken off
                    path.unlink()

    def settings(self, owner: str) -> list | None:
        """What a person has chosen last, as given to `choose`; None before."""
        with self._database() as database:
            row = database.execute("SELECT chosen FROM settings WHERE owner = ?", [owner]).fetchone()
        return json.loads(row[0]) if row else None

    def choose(self, owner: str, settings: list) -> None:
        """Keeps what a person has chosen."""
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", [owner, json.dumps(settings)])


def migrate(database: sqlite3.Connection, file: Path) -> None:
    """Bring the chat's SQLite file to the format of this version of the program, step by step, all or nothing.

    Args:
        file: its path, for the error.
    Raises:
        ValueError: a newer version of the program has written it.
    """
    if database.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    database.execute("BEGIN IMMEDIATE")  # another program may begin just now
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ValueError(
            f"{file} has format {version}, which a newer version of this program has written; this one knows up to "
            f"{len(MIGRATIONS)}: update the program, or move the file away."
        )
    for step in MIGRATIONS[version:]:
        for statement in filter(str.strip, step.split(";")):
            database.execute(statement)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    database.commit()
