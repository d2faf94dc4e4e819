"""Validation and bounds of what a browser sends to the chat page: any program may send anything."""

import functools
import html
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ov_mllama.chat.answers import GenerationSettings
from ov_mllama.chat.owners import file_within

MAX_QUESTION, MAX_SYSTEM = 500_000, 20_000  # characters; a context of 131072 tokens is about half a million
MAX_IMAGES = 100  # of a question


def refuse(sentence: object) -> gr.Error:
    """An error that the page shows as text."""
    return gr.Error(html.escape(str(sentence)), print_exception=False)


def showing_refusal(find: Callable, action: Callable) -> Callable:
    """Wrap an event's function so that its page shows, below the text box, why it was refused: Gradio's page shows no
    error of an event without queue.

    Args:
        find: the page of a request; None where there is none.
    """

    @functools.wraps(action)
    async def shown(*given):
        page = find(next(each for each in given if isinstance(each, gr.Request)))
        if page:
            page.refused = ""
        try:
            return await action(*given)
        except gr.Error as error:
            if page:
                page.refused = html.unescape(str(error.message))
            raise

    return shown


def images_of(message: dict | None) -> list[Path]:
    """The uploads that a text box's message names: regular files of the upload folder, and nothing else.

    Args:
        message: whatever was sent.
    Raises:
        gr.Error: anything else, or an upload that Gradio has deleted, after an hour.
    """
    files = (message or {}).get("files") or []
    if len(files) > MAX_IMAGES:
        raise refuse(f"The question has {len(files)} pictures: ask about at most {MAX_IMAGES}.")
    return [uploaded(file) for file in files]


def uploaded(file: object) -> Path:
    """The upload that a text box's file names, as `images_of`."""
    name = file.get("path") if isinstance(file, dict) else file
    path = file_within(Path(get_upload_folder()), name)
    if path is None:  # one sentence, which does not tell whether there is such a file elsewhere
        raise refuse(f"{Path(str(name)).name[:100]} has waited too long, or is no upload: please add it again.")
    return path


def text_of(message: dict | None) -> str:
    """The text of a text box's message.

    Raises:
        gr.Error: it is too long.
    """
    return bounded_text((message or {}).get("text") or "", MAX_QUESTION, "question").strip()


def bounded_text(text: object, limit: int, name: str) -> str:
    """A text of at most so many characters.

    Raises:
        gr.Error: it is longer, or no text.
    """
    if not isinstance(text, str):
        raise refuse(f"The {name} is no text.")
    if len(text) > limit:
        raise refuse(f"The {name} has {len(text)} characters: use at most {limit}.")
    return text


def checked_settings(values: Sequence) -> GenerationSettings:
    """Settings as a page sends them.

    Raises:
        gr.Error: they are not of their types, or out of bounds.
    """
    try:
        system, tokens, temperature, top_p = values
        wishes = GenerationSettings(system or "", int(tokens), float(temperature), float(top_p))
    except (TypeError, ValueError, OverflowError) as error:
        raise refuse("A setting is missing or no number: load the page again.") from error
    bounded_text(wishes.system, MAX_SYSTEM, "system prompt")
    if not (1 <= wishes.max_new_tokens <= 2048 and 0 <= wishes.temperature <= 2 and 0 < wishes.top_p <= 1):
        raise refuse("A setting is out of its bounds: load the page again.")
    return wishes


class Recent(OrderedDict):
    """A mapping of bounded size: the entry used longest ago is evicted.

    Args:
        size: entries at most.
        evicted: called with the key of each entry that is evicted.
    """

    def __init__(self, size: int, evicted: Callable = lambda key: None):
        super().__init__()
        self.size, self.evicted = size, evicted

    def get(self, key, default=None):
        if key in self:
            self.move_to_end(key)
        return super().get(key, default)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.size:
            self.evicted(self.popitem(last=False)[0])
