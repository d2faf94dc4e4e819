"""Validation of requests to the chat page: any program may send anything."""

import functools
import html
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ov_mllama.chat.decoding import GenerationSettings
from ov_mllama.chat.owners import file_within
from ov_mllama.chat.schemas import MAX_SCHEMA_CHARS, schema_of
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.images import DETAILS

MAX_QUESTION, MAX_SYSTEM = 500_000, 20_000  # characters; a context of 131072 tokens is about 500 000
MAX_IMAGES = 100  # per question
TOP_K, PENALTY, SEED = (1, 1000), (1, 2), (0, 2**32 - 1)  # least and most


def user_error(message: object) -> gr.Error:
    """Return an error that the page shows as text."""
    return gr.Error(html.escape(str(message)), print_exception=False)


def report_errors(find: Callable, handler: Callable) -> Callable:
    """Wrap an event handler so that its error is shown below the text box: Gradio shows none for events without queue.

    Args:
        find: returns the page of a request, or None.
    """

    @functools.wraps(handler)
    async def wrapped(*arguments):
        page = find(next(each for each in arguments if isinstance(each, gr.Request)))
        if page:
            page.error = ""
        try:
            return await handler(*arguments)
        except gr.Error as error:
            if page:
                page.error = html.unescape(str(error.message))
            raise

    return wrapped


def images_of(message: dict | None) -> list[Path]:
    """Return the uploads that a text box's message names: regular files of the upload folder.

    Raises:
        gr.Error: for anything else, and for an upload that Gradio has deleted after an hour.
    """
    files = (message or {}).get("files") or []
    if len(files) > MAX_IMAGES:
        raise user_error(f"The question has {len(files)} pictures: ask about at most {MAX_IMAGES}.")
    return [uploaded(file) for file in files]


def uploaded(file: object) -> Path:
    """Return the upload that a text box's file names, as `images_of`."""
    name = file.get("path") if isinstance(file, dict) else file
    path = file_within(Path(get_upload_folder()), name)
    if path is None:  # the same for files elsewhere, which are not disclosed
        raise user_error(f"{Path(str(name)).name[:100]} has waited too long, or is no upload: please add it again.")
    return path


def text_of(message: dict | None) -> str:
    """Return the text of a text box's message.

    Raises:
        gr.Error: if it is too long.
    """
    return bounded_text((message or {}).get("text") or "", MAX_QUESTION, "question").strip()


def bounded_text(text: object, limit: int, name: str) -> str:
    """Return a text of at most `limit` characters.

    Raises:
        gr.Error: if it is longer, or no text.
    """
    if not isinstance(text, str):
        raise user_error(f"The {name} is no text.")
    if len(text) > limit:
        raise user_error(f"The {name} has {len(text)} characters: use at most {limit}.")
    return text


def checked_settings(values: Sequence) -> GenerationSettings:
    """Return the settings that a page has sent.

    Raises:
        gr.Error: if a type is wrong, or a value out of bounds.
    """
    try:
        system, tokens, temperature, top_p, detail, top_k, penalty, seed, schema = GenerationSettings(*values)
        settings = GenerationSettings(
            system or "",
            int(tokens),
            float(temperature),
            float(top_p),
            str(detail),
            None if top_k is None else int(top_k),
            None if penalty is None else float(penalty),
            None if seed is None else int(seed),
            schema or "",
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise user_error("A setting is missing or no number: load the page again.") from error
    bounded_text(settings.system, MAX_SYSTEM, "system prompt")
    numbers = 1 <= settings.max_new_tokens <= 2048 and 0 <= settings.temperature <= 2 and 0 < settings.top_p <= 1
    if not numbers or settings.detail not in DETAILS:
        raise user_error("A setting is out of its bounds: load the page again.")
    for name, value, (least, most) in (
        ("Top-k", settings.top_k, TOP_K),
        ("The repetition penalty", settings.repetition_penalty, PENALTY),
        ("The seed", settings.seed, SEED),
    ):
        if value is not None and not least <= value <= most:
            raise user_error(f"{name} is {str(value)[:20]}: choose {least} to {most}, or leave it empty.")
    try:
        schema_of(bounded_text(settings.schema, MAX_SCHEMA_CHARS, "JSON schema"))
    except InputError as error:
        raise user_error(error) from error
    return settings


def restored(saved: dict | Sequence | None) -> GenerationSettings:
    """Return settings that any version has saved: by name, or by position, as earlier versions did. Those that are not
    valid any more are the defaults."""
    named = saved if isinstance(saved, dict) else dict(zip(GenerationSettings._fields, saved or (), strict=False))
    known = {name: value for name, value in named.items() if name in GenerationSettings._fields}
    try:
        return checked_settings(GenerationSettings(**known))
    except gr.Error:
        return GenerationSettings()


class LruDict(OrderedDict):
    """A mapping that evicts its least recently used entry.

    Args:
        size: entries at most.
        on_evict: called with the key of each evicted entry.
    """

    def __init__(self, size: int, on_evict: Callable = lambda key: None):
        super().__init__()
        self.size, self.on_evict = size, on_evict

    def get(self, key, default=None):
        if key in self:
            self.move_to_end(key)
        return super().get(key, default)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.size:
            self.on_evict(self.popitem(last=False)[0])
