"""Full-text index and list of conversations: SQL for `Conversations`, and groups by day.

listed: number of each conversation in the index, and whether it is pinned
texts: FTS5 index of titles, questions and answers; triggers update it with every write
"""

import calendar
import datetime
import itertools
import re
import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

MAX_QUERY = 200  # characters
MAX_LISTED = 100  # chats, and more with each "Show more": a browser needs 0.8 s for 2000
MAX_GROUPS = 12  # of a list; all that is older goes into the last one

_TEXT = """{row}title || char(10) || coalesce((
    SELECT group_concat(coalesce(json_extract(value, '$.question'), '') || char(10)
        || coalesce(json_extract(value, '$.answer'), ''), char(10))
    FROM json_each(CASE WHEN json_valid({row}turns) THEN {row}turns ELSE '[]' END)), '')"""
_NUMBER = "(SELECT number FROM listed WHERE id = {row}.id)"

# A step of `migrations.MIGRATIONS`. REPLACE fires no delete trigger, and its policy overrides an OR IGNORE within one
SCHEMA = f"""
    CREATE TABLE listed (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, pinned INTEGER NOT NULL DEFAULT 0);
    INSERT INTO listed (id) SELECT id FROM conversations;
    CREATE VIRTUAL TABLE texts USING fts5 (text, tokenize = 'unicode61 remove_diacritics 2');
    INSERT INTO texts (rowid, text) SELECT number, {_TEXT.format(row="")} FROM conversations JOIN listed USING (id);
    CREATE TRIGGER index_conversation AFTER INSERT ON conversations BEGIN
        INSERT INTO listed (id) SELECT NEW.id WHERE NOT EXISTS (SELECT 1 FROM listed WHERE id = NEW.id);
        DELETE FROM texts WHERE rowid = {_NUMBER.format(row="NEW")};
        INSERT INTO texts (rowid, text) VALUES ({_NUMBER.format(row="NEW")}, {_TEXT.format(row="NEW.")});
    END;
    CREATE TRIGGER unindex_conversation AFTER DELETE ON conversations BEGIN
        DELETE FROM texts WHERE rowid = {_NUMBER.format(row="OLD")};
        DELETE FROM listed WHERE id = OLD.id;
    END;
"""  # noqa: S608 - constants

# Scripts without spaces between words, which the index holds as one word: these are searched as parts of the text
_NO_SPACES = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\U0010ffff]")


class ListedChat(NamedTuple):
    """A conversation in a list.

    Attributes:
        changed: seconds since 1970.
    """

    title: str
    id: str
    changed: float
    pinned: bool


def find(database: sqlite3.Connection, owner: str, query: str, limit: int) -> list[ListedChat]:
    """Return an owner's conversations that have all words of a query, or words that begin with them; pinned ones first,
    then the latest.

    Args:
        query: any text; all conversations have "".
        limit: of what is returned.
    """
    conditions, values = _conditions(query)
    # CROSS JOIN: in this order; in SQLite's own a search among 2000 chats takes 300 ms instead of 2 ms
    matching = "texts CROSS JOIN listed ON number = texts.rowid CROSS JOIN" if conditions else "listed JOIN"
    rows = database.execute(
        f"SELECT title, id, changed, pinned FROM {matching} conversations USING (id) "  # noqa: S608 - constants
        f"WHERE {' AND '.join(['owner = ?', *conditions])} ORDER BY pinned DESC, changed DESC LIMIT ?",
        [owner, *values, limit],
    )
    return [ListedChat(title, key, changed, bool(pinned)) for title, key, changed, pinned in rows]


def _conditions(query: str) -> tuple[list[str], list[str]]:
    """Return SQL for the words of a query, and their values: quoted, so that none is an operator of FTS5."""
    words = query.encode(errors="replace").decode().replace("\0", " ").split()
    parts = [word for word in words if _NO_SPACES.search(word) or not any(map(str.isalnum, word))]
    prefixes = ['"{}"*'.format(word.replace('"', '""')) for word in words if word not in parts]
    patterns = ["%{}%".format(re.sub(r"[\\%_]", r"\\\g<0>", part)) for part in parts]
    conditions = ["texts MATCH ?"] * bool(prefixes) + [r"text LIKE ? ESCAPE '\'"] * len(patterns)
    return conditions, [" ".join(prefixes)] * bool(prefixes) + patterns


def day_group(changed: float, today: datetime.date) -> str:
    """Return the heading of a conversation in a list, by its last day on this machine's clock."""
    day = datetime.date.fromtimestamp(changed)
    age = (today - day).days
    for days, heading in ((0, "Today"), (1, "Yesterday"), (7, "Previous 7 days"), (30, "Previous 30 days")):
        if age <= days:
            return heading
    month = calendar.month_name[day.month]
    return month if day.year == today.year else f"{month} {day.year}"


def grouped(chats: Iterable[ListedChat], today: datetime.date) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return headings, and titles and ids below each; at most MAX_GROUPS.

    Args:
        chats: as `find` returns them.
    """
    groups = itertools.groupby(chats, lambda chat: "Pinned" if chat.pinned else day_group(chat.changed, today))
    rows = [(heading, [(chat.title, chat.id) for chat in group]) for heading, group in groups]
    older = [row for _, group in rows[MAX_GROUPS - 1 :] for row in group]
    return rows if len(rows) <= MAX_GROUPS else [*rows[: MAX_GROUPS - 1], ("Older", older)]
