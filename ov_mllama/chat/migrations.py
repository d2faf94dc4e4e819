"""Formats of the chat's SQLite file, and the migration of earlier ones."""

import sqlite3
from pathlib import Path

from ov_mllama.chat import search

# Each step leads to the next format (`PRAGMA user_version`); released steps never change
MIGRATIONS = (
    # of earlier versions, whose files say 0
    """
    CREATE TABLE IF NOT EXISTS conversations (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, changed REAL NOT NULL, turns TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS by_owner ON conversations (owner, changed);
    CREATE TABLE IF NOT EXISTS settings (owner TEXT PRIMARY KEY, chosen TEXT NOT NULL);
    """,
    # a browser could call itself "user alice": the prefix now tells owners apart
    """
    UPDATE conversations SET owner = CASE WHEN owner GLOB 'user *' THEN 'user:' || substr(owner, 6)
        ELSE 'browser:' || owner END;
    UPDATE settings SET owner = CASE WHEN owner GLOB 'user *' THEN 'user:' || substr(owner, 6)
        ELSE 'browser:' || owner END;
    """,
    search.SCHEMA,
    "CREATE TABLE IF NOT EXISTS presets (owner TEXT, name TEXT, chosen TEXT NOT NULL, PRIMARY KEY (owner, name));",
)


def migrate(database: sqlite3.Connection, file: Path) -> None:
    """Migrate the SQLite file to this version's format, in one transaction.

    Args:
        file: its path, for the error.
    Raises:
        ValueError: if a newer version of the program has written it.
    """
    if database.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS):
        return
    database.execute("BEGIN IMMEDIATE")  # against other programs
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise ValueError(
            f"{file} has format {version} of a newer version of this program; this one knows up to "
            f"{len(MIGRATIONS)}: update the program, or move the file away."
        )
    for step in MIGRATIONS[version:]:
        statement = ""
        for line in step.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                database.execute(statement)
                statement = ""
        database.execute(statement)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    database.commit()
