"""Conversations as Gradio messages and as exported Markdown."""

import functools
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.chat.imports import export_name, to_json
from ov_mllama.chat.store import Conversation
from ov_mllama.chat.turns import ANSWERED, CUT, FAILED, STOPPED, WAITING, Turn

CONTINUE, LOOK_CLOSER, WHERE_IT_LOOKED = "Continue", "Look closer", "Where it looked"  # options below an answer
JOINER = "\u2060"  # zero width
LATEX: list[dict] = [  # delimiters of formulas
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
]


@functools.lru_cache(1000)  # pages poll
def render_answer(text: str) -> str:
    """Return an answer as the page's Markdown, with formulas and without images or HTML."""
    return apply_outside_formulas(mark_formulas(text), block_loading)


def mark_formulas(text: str) -> str:
    """Mark formulas between single dollars, but no sums of money (pandoc's rule: no space inside the dollars, no digit
    behind the second), and nothing in code."""
    pieces = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    formula = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\d$])")
    pieces[::2] = [formula.sub(r"\\(\1\\)", piece) for piece in pieces[::2]]
    return "".join(pieces)


MARKUP = re.compile(r"[\\`*_{}\[\]<>#&!|~$@%^/=+\-\t\r\n]|(?<=www)\.|^(?: +|\d+[.)])", re.IGNORECASE)


def escape_markup(text: str) -> str:
    """Return Markdown that shows a text literally, without formatting, HTML, formulas or links.

    Markup becomes character references, which page.js decodes where text is edited or copied.
    """
    return MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text)


def block_loading(text: str) -> str:
    """Turn the images of Markdown into links and its HTML into text, so that the page fetches nothing before a click.

    The invisible JOINER separates "!" from "[" and "<" from a tag's name; in code too, because the browser decides
    where code begins. page.js removes it from copied text.
    """
    text = text.replace("```mermaid", "``` mermaid")  # a diagram may name images
    return re.sub(r"!(?=\[)|<(?=[A-Za-z/!?])", rf"\g<0>{JOINER}", text)


def unrender_answer(text: str) -> str:
    """Return an answer that was edited on the page: as `render_answer` got it, except that formulas between single
    dollars have TeX's brackets."""
    return text.replace(JOINER, "").replace("``` mermaid", "```mermaid")


def apply_outside_formulas(text: str, change: Callable[[str], str]) -> str:
    """Change a text except for its formulas, which are found as the page finds them and never become HTML."""
    formulas: list[str] = []

    def cut_out(found: re.Match) -> str:
        formulas.append(found[0])
        return f"\ue000{len(formulas) - 1}\ue001"

    text = text.replace("\ue000", "")
    for each in LATEX:
        text = re.sub(f"{re.escape(each['left'])}.+?{re.escape(each['right'])}", cut_out, text, flags=re.DOTALL)
    text = change(text)
    for i in reversed(range(len(formulas))):  # later ones may contain earlier ones
        text = text.replace(f"\ue000{i}\ue001", formulas[i])
    return text


def status_message(title: str, status: str = "", options: Sequence[str] = (), content: str = "") -> dict:
    """Return a status line of a conversation as a Gradio message, with options to choose from.

    Args:
        content: Markdown beside it.
    """
    metadata = {"title": escape_markup(title)} | ({"status": status} if status else {})
    offered = {"options": [{"value": option} for option in options]} if options else {}
    return {"role": "assistant", "content": content, "metadata": metadata, **offered}


def variant_buttons(index: int, turn: Turn) -> str:
    """Return Markdown of two buttons for `Variants.flip`, such as "< 2/3 >"; "" for a turn without variants."""
    if not turn.others:
        return ""
    before, after = (
        f'<button name="flip" value="{index} {step}" title="{name} answer"></button>'
        for step, name in ((-1, "Previous"), (1, "Next"))
    )
    return f"{before} {turn.position + 1}/{len(turn.others) + 1} {after}"


def to_gradio(turns: Iterable[Turn], progress: str = "") -> list[dict]:
    """Return a conversation as Gradio messages.

    Args:
        progress: of the answer under way.
    """
    messages: list[dict] = []
    quick = sees = False  # whether a picture before was shrunk; whether there is one
    for i, turn in enumerate(turns):
        quick = (quick or (bool(turn.pictures) and turn.detail == "low")) and not turn.closer
        sees = sees or bool(turn.pictures)
        pictures = [{"path": str(picture)} for picture in turn.pictures]
        question = [escape_markup(turn.question)] if turn.question else []
        messages.append({"role": "user", "content": [*pictures, *question]})
        if turn.answer:
            messages.append({"role": "assistant", "content": render_answer(turn.answer)})
        buttons = variant_buttons(i, turn)
        if turn.state != WAITING:
            options = [CONTINUE] * turn.can_continue + [LOOK_CLOSER] * quick
            options += [WHERE_IT_LOOKED] * (sees and bool(turn.answer) and turn.state in (ANSWERED, CUT))
            messages.append(status_message(ending(turn), options=options, content=buttons))
        elif buttons or not turn.answer or not progress.startswith("Writing"):
            messages.append(status_message(progress, status="pending", content=buttons))
    return messages


def ending(turn: Turn) -> str:
    """Return the status line of a turn whose answer has ended."""
    titles = {
        CUT: f"Token limit reached · {turn.note}",
        STOPPED: f"Stopped. {turn.note}".strip(),
        FAILED: f"No answer: {turn.note}",
    }
    return titles.get(turn.state, turn.note)


def describe_model(model) -> str:
    """Return the model's name, weight formats, device and last speed."""
    speed = model.stats.tokens_per_s
    speeds = [f"{speed:.{1 if speed < 10 else 0}f} tokens per second"] if speed else []
    return " · ".join([getattr(model, "about", "Llama 3.2 Vision"), *speeds])


def detail_choices(model) -> list[tuple[str, str]]:
    """Return labels and values of the details, with the times that pictures have taken on this machine."""
    encoder = getattr(model, "image_encoder", None)
    tiles = encoder.shapes.max_num_tiles if encoder else 4
    names = (("Quick (1 tile", 1, "low"), (f"Full ({tiles} tiles", tiles, "high"))
    choices = []
    for name, count, detail in names:
        expected_s = encoder.expected_s(count) if encoder else None
        about = f", about {expected_s:.0f} s" if expected_s and expected_s >= 1 else ""
        choices.append((f"{name}{about})", detail))
    return choices


def escape_with_backslashes(text: str) -> str:
    """Return readable Markdown that shows a text without images, links, HTML or headings."""
    return re.sub(r"[\\`*_\[\]<>#|~!&$]", r"\\\g<0>", text)


def to_markdown(conversation: Conversation) -> str:
    """Return an export's Markdown, which shows the images under `export_name` and no others."""
    lines = [f"# {escape_with_backslashes(' '.join(conversation.name.split()))}", ""]
    for turn in conversation.turns:
        lines += [f"![]({quote(export_name(picture))})" for picture in turn.pictures]
        lines += ["", *(f"> {escape_with_backslashes(line)}" for line in turn.question.splitlines()), ""]
        lines += [block_loading(turn.answer), ""]
        lines += [f"<sub>{escape_with_backslashes(' '.join(turn.note.split()))}</sub>", ""] if turn.note else []
    return "\n".join(lines)


def write_export(conversation: Conversation) -> str:
    """Write a conversation as a .zip of Markdown, JSON and images into Gradio's folder, and return its path.

    `imports.import_chat` reads the JSON.
    """
    name = re.sub(r"[^\w -]", "", conversation.name).strip()[:60] or "chat"
    pictures = {picture for turn in conversation.turns for picture in turn.pictures if picture.is_file()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("chat.md", to_markdown(conversation).encode(errors="replace"))  # lone surrogates
            file.writestr("chat.json", to_json(conversation))
            for picture in pictures:
                file.write(picture, export_name(picture))
        return save_file_to_cache(path, get_upload_folder())
