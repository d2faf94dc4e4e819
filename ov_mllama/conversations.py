"""Conversations that outlive page and program: a small SQLite file and a folder of pictures, in the user's own data.

    <user's data>/ov_mllama/chat.sqlite3, pictures/<conversation>/<digest>/<name>

They are read and written by this program alone, and nobody but who began a conversation is given it.
"""

import contextlib
import hashlib
import json
import secrets
import shutil
import sqlite3
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs

DAY_S = 24 * 60 * 60
TITLE_LENGTH = 60  # characters of a first question that name its conversation
TABLES = """
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, changed REAL NOT NULL, turns TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_owner ON conversations (owner, changed);
CREATE TABLE IF NOT EXISTS settings (owner TEXT PRIMARY KEY, chosen TEXT NOT NULL);
"""

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
    """

    question: str
    pictures: list[Path] = field(default_factory=list)
    answer: str = ""
    note: str = ""
    state: str = WAITING
    asked: float = field(default_factory=time.time, compare=False)


@dataclass(eq=False)
class Conversation:
    """Turns, whose they are and how they are called. One that nobody asked anything yet is kept nowhere.

    Attributes:
        owner: who began it.
        title: "" until the first question gives it one.
        gone: it was deleted and is not to be kept any more.
    """

    owner: str
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    title: str = ""
    turns: list[Turn] = field(default_factory=list)
    gone: bool = False

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
        self.folder = Path(folder) if folder else platformdirs.user_data_path("ov_mllama", appauthor=False)
        self.pictures, self.uploads, self.examples = (
            self.folder / name for name in ("pictures", "uploads", "examples")
        )
        self.version = 0
        self._open: weakref.WeakValueDictionary[str, Conversation] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.folder / "chat.sqlite3", timeout=10)) as database, database:
            database.executescript(TABLES)
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
        conversation = self._open.get(key)
        if conversation is None:
            with self._database() as database:
                row = database.execute("SELECT owner, title, turns FROM conversations WHERE id = ?", [key]).fetchone()
            if row is None:
                return None
            turns = [
                Turn(**{**turn, "pictures": [*map(self._picture, turn["pictures"])]}) for turn in json.loads(row[2])
            ]
            for turn in turns:
                if turn.state == WAITING:
                    turn.state, turn.note = STOPPED, "The program ended before the answer did."
            conversation = self._open[key] = Conversation(row[0], key, row[1], turns)
        return conversation if conversation.owner == owner and not conversation.gone else None

    def save(self, conversation: Conversation) -> None:
        """Keeps a conversation as it is now, under its first question if it has no title yet; one whose questions were
        all taken back is kept no longer."""
        if conversation.gone:
            return
        if not conversation.turns:
            conversation.title = ""
            self._forget(conversation)
            return
        first = conversation.turns[0].question.strip() or "A picture"
        title = conversation.title or " ".join(first.split())[:TITLE_LENGTH]
        conversation.title = title.encode(errors="replace").decode()  # halves of characters are no text for SQLite
        turns = [
            {**asdict(turn), "pictures": [path.relative_to(self.pictures).as_posix() for path in turn.pictures]}
            for turn in conversation.turns
        ]
        row = [conversation.id, conversation.owner, conversation.title, conversation.turns[-1].asked, json.dumps(turns)]
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?)", row)
        self._open[conversation.id] = conversation
        self.version += 1

    def delete(self, conversation: Conversation) -> None:
        """Forgets a conversation and its pictures for good."""
        conversation.gone = True
        self._forget(conversation)
        shutil.rmtree(self.pictures / conversation.id, ignore_errors=True)

    def _forget(self, conversation: Conversation) -> None:
        with self._database() as database:
            database.execute("DELETE FROM conversations WHERE id = ?", [conversation.id])
        self.version += 1

    def keep(self, conversation: Conversation, file: Path) -> Path:
        """A copy of a picture that lives as long as its conversation; twice the same picture is one file."""
        with file.open("rb") as picture:
            digest = hashlib.file_digest(picture, "sha256").hexdigest()[:16]
        kept = self.pictures / conversation.id / digest / file.name
        if not kept.is_file():
            for folder in (self.folder, self.pictures, kept.parent.parent, kept.parent):  # `parents` have no mode
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = self.pictures / conversation.id / f"{secrets.token_hex(8)}.part"
            shutil.copyfile(file, part)
            part.replace(kept)
        return kept

    def tidy(self) -> None:
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

    def _picture(self, name: str) -> Path:
        return self.pictures / name
