"""Exported conversations as JSON, and their import from a .zip that may come from anywhere.

    chat.json: {"format": FORMAT, "version": VERSION, "title", "turns": [{fields of a Turn}]}
    pictures/<name>: images that the turns name

Of the .zip only these are read, into memory; nothing is unpacked, and no name in it becomes a path.
"""

import contextlib
import json
import math
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ov_mllama.chat.page_input import MAX_IMAGES, MAX_QUESTION
from ov_mllama.chat.store import MAX_TITLE, Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, EDITED, FAILED, STOPPED, WAITING, Turn
from ov_mllama.runtime.errors import ImageError, InputError
from ov_mllama.runtime.images import DETAILS, load_image

FORMAT, VERSION = "ov_mllama chat", 1
MAX_JSON_BYTES = 20_000_000
MAX_PICTURE_BYTES, MAX_PICTURES_BYTES = 100_000_000, 500_000_000  # of one, and of all together
BROKEN = "The file is no .zip that can be read, or it is broken: export the chat again."
MAX_TURNS, MAX_ANSWER, MAX_NOTE, MAX_REMARKS = 10_000, 1_000_000, 10_000, 100


def export_name(picture: Path) -> str:
    """Return an image's path within an export."""
    return f"pictures/{picture.name}"


def to_json(conversation: Conversation) -> str:
    """Return an export's JSON: the variant that is shown."""
    turns = []
    for turn in conversation.turns:
        fields = {name: value for name, value in vars(turn).items() if name not in ("others", "position")}
        turns.append(fields | {"pictures": [export_name(picture) for picture in turn.pictures if picture.is_file()]})
    return json.dumps({"format": FORMAT, "version": VERSION, "title": conversation.title, "turns": turns}, indent=1)


def import_chat(file: Path, conversations: Conversations, owner: str) -> Conversation:
    """Store an exported conversation as a new one of an owner, and return it. An error leaves nothing behind.

    Raises:
        InputError: if the file is no export, is broken, or exceeds a limit.
        sqlite3.Error, OSError: if it could not be written.
    """
    conversation = Conversation(owner)
    pictures: dict[str, Path] = {}
    try:
        with contextlib.closing(Members(file)) as members:
            conversation.title, turns = checked_export(members.read_json())
            for turn, names in turns:
                for name in names:
                    if name not in pictures:
                        pictures[name] = store_picture(members, name, conversations, conversation)
                conversation.turns.append(replace(turn, pictures=[pictures[name] for name in names]))
        conversations.save(conversation)
    except BaseException:
        shutil.rmtree(conversations.pictures / conversation.id, ignore_errors=True)
        raise
    return conversation


class Members:
    """Files in a .zip, read within limits whatever it claims of itself.

    Args:
        file: of the .zip.

    Attributes:
        left_bytes: that all pictures together may still have.
    """

    def __init__(self, file: Path):
        self.left_bytes = MAX_PICTURES_BYTES
        try:
            self._archive = zipfile.ZipFile(file)
        except Exception as error:  # it raises anything on a broken file
            raise InputError(BROKEN) from error

    def close(self) -> None:
        self._archive.close()

    def read_json(self) -> object:
        """Return what chat.json holds."""
        content = self._read("chat.json", MAX_JSON_BYTES)
        if content is None:
            raise InputError("The .zip has no chat.json: import a chat that this version or a later one has exported.")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError("The chat.json in the .zip is broken: export the chat again.") from error

    def read_picture(self, name: str) -> bytes:
        """Return a picture's bytes."""
        content = self._read(name, min(self.left_bytes, MAX_PICTURE_BYTES))
        if content is None:
            raise InputError(f"The .zip has no {name[:100]}: export the chat again.")
        self.left_bytes -= len(content)
        return content

    def _read(self, name: str, limit: int) -> bytes | None:
        """Return a file's bytes; None if there is none.

        Raises:
            InputError: if it has more than `limit`, or the .zip is broken.
        """
        try:
            with self._archive.open(name) as member:
                content = member.read(limit + 1)
        except KeyError:
            return None
        except Exception as error:  # decoders raise anything on a broken file
            raise InputError(BROKEN) from error
        if len(content) > limit:
            raise InputError(f"{name[:100]} in the .zip has more than {limit // 1_000_000} MB, as no export has.")
        return content


def store_picture(members: Members, name: str, conversations: Conversations, conversation: Conversation) -> Path:
    """Store an image of a .zip, and return its path."""
    try:
        image = load_image(members.read_picture(name))
    except ImageError as error:
        raise InputError(f"{name[:100]} in the .zip cannot be used: {error}") from error
    return conversations.store_image(conversation, image, re.sub(r".*/|\.\w+$", "", name))


def checked_export(content: object) -> tuple[str, list[tuple[Turn, list[str]]]]:
    """Return title and turns of an export, each with the names of its pictures in the .zip.

    Raises:
        InputError: if anything in it is not as `to_json` writes it. Unknown fields are ignored.
    """
    fields = content if isinstance(content, dict) else {}
    if fields.get("format") != FORMAT:
        raise InputError("The chat.json in the .zip is of another program: only this chat's exports are imported.")
    if fields.get("version") != VERSION:
        found = str(fields.get("version"))[:20]
        raise InputError(f"The export has version {found}; this program knows {VERSION}: update the program.")
    turns = fields.get("turns")
    if not isinstance(turns, list) or not 0 < len(turns) <= MAX_TURNS:
        raise InputError(f"The export has no turns, or more than {MAX_TURNS}.")
    return checked_text(fields, "title", MAX_TITLE).strip(), [checked_turn(turn) for turn in turns]


def checked_turn(fields: object) -> tuple[Turn, list[str]]:
    """Return a turn of an export, as `checked_export`; an answer under way is STOPPED."""
    if not isinstance(fields, dict):
        raise InputError("A turn of the export is broken: export the chat again.")
    asked = checked(fields, "asked", time.time(), lambda value: type(value) in (int, float) and math.isfinite(value))
    state = checked(fields, "state", ANSWERED, (WAITING, ANSWERED, CUT, STOPPED, FAILED, EDITED).__contains__)
    turn = Turn(
        question=checked_text(fields, "question", MAX_QUESTION),
        answer=checked_text(fields, "answer", MAX_ANSWER),
        note=checked_text(fields, "note", MAX_NOTE),
        state=STOPPED if state == WAITING else state,
        asked=min(max(float(asked), 0.0), time.time()),
        remarks=checked_texts(fields, "remarks", MAX_REMARKS),
        detail=checked(fields, "detail", "high", DETAILS.__contains__),
        closer=checked(fields, "closer", False, lambda value: type(value) is bool),
    )
    return turn, checked_texts(fields, "pictures", MAX_IMAGES)


def checked(fields: dict, name: str, default, is_valid: Callable):
    """Return a field of an export that is valid; the default if it is missing."""
    value = fields.get(name, default)
    try:
        valid = is_valid(value)
    except (TypeError, OverflowError):
        valid = False
    if not valid:
        raise InputError(f"The field {name} of the export is broken: export the chat again.")
    return value


def checked_text(fields: dict, name: str, limit: int) -> str:
    """Return a field that is a text of at most `limit` characters."""
    return checked(fields, name, "", lambda value: isinstance(value, str) and len(value) <= limit)


def checked_texts(fields: dict, name: str, limit: int) -> list[str]:
    """Return a field that is a list of at most `limit` short texts."""
    return checked(
        fields,
        name,
        [],
        lambda value: (
            isinstance(value, list)
            and len(value) <= limit
            and all(isinstance(each, str) and len(each) <= MAX_NOTE for each in value)
        ),
    )
