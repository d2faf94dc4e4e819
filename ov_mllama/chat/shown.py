"""Conversations as a page shows them, and as a file keeps them."""

import functools
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from ov_mllama.chat.store import CUT, FAILED, STOPPED, WAITING, Conversation, Turn

GO_ON = "Go on"
JOINER = "\u2060"  # has no width
LATEX: list[dict] = [  # what begins and ends a formula
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))
]


@functools.lru_cache(1000)  # a page asks ten times a second
def as_answer(text: str) -> str:
    """An answer as the page shows it: Markdown with formulas that loads nothing."""
    return outside_formulas(with_formulas(text), loads_nothing)


def with_formulas(text: str) -> str:
    """Text in which formulas between single dollars are marked as such, and sums of money are not (pandoc's rule: no
    space inside the dollars, no digit behind the second); code stays as it is."""
    pieces = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    formula = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\d$])")
    pieces[::2] = [formula.sub(r"\\(\1\\)", piece) for piece in pieces[::2]]
    return "".join(pieces)


MARKUP = re.compile(r"[\\`*_{}\[\]<>#&!|~$@%^/=+\-\t\r\n]|(?<=www)\.|^(?: +|\d+[.)])", re.IGNORECASE)


def as_typed(text: str) -> str:
    """Markdown that shows a text as it was typed: no formatting, HTML, formula, link or line break of its own.

    What could be markup becomes character references, which page.js undoes where text is edited or copied.
    """
    return MARKUP.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text)


def loads_nothing(text: str) -> str:
    """Markdown whose pictures are links and whose HTML is text: nothing is fetched before a person clicks.

    JOINER, which nobody sees, parts "!" from "[" and "<" from what makes it a tag, in code too, because where code
    begins is the browser's to say; page.js removes it from what is copied.
    """
    text = text.replace("```mermaid", "``` mermaid")  # a diagram may name pictures
    return re.sub(r"!(?=\[)|<(?=[A-Za-z/!?])", rf"\g<0>{JOINER}", text)


def outside_formulas(text: str, change: Callable[[str], str]) -> str:
    """Text with a change to all but its formulas, which are found as the page finds them: it never makes HTML of them,
    and they stay as they are."""
    formulas: list[str] = []

    def cut_out(found: re.Match) -> str:
        formulas.append(found[0])
        return f"\ue000{len(formulas) - 1}\ue001"

    text = text.replace("\ue000", "")
    for each in LATEX:
        text = re.sub(f"{re.escape(each['left'])}.+?{re.escape(each['right'])}", cut_out, text, flags=re.DOTALL)
    text = change(text)
    for i in reversed(range(len(formulas))):  # the later ones may contain earlier ones
        text = text.replace(f"\ue000{i}\ue001", formulas[i])
    return text


def remark(title: str, **more) -> dict:
    """A line about the conversation that is no part of it; its title is text."""
    metadata = {"title": as_typed(title)} | ({"status": more.pop("status")} if "status" in more else {})
    return {"role": "assistant", "content": "", "metadata": metadata, **more}


def bubbles(turns: Iterable[Turn], waits: str = "") -> list[dict]:
    """A conversation as Gradio's messages.

    Args:
        waits: what the last answer waits for, if it is under way.
    """
    messages: list[dict] = []
    for turn in turns:
        pictures = [{"path": str(picture)} for picture in turn.pictures]
        question = [as_typed(turn.question)] if turn.question else []
        messages.append({"role": "user", "content": [*pictures, *question]})
        if turn.answer:
            messages.append({"role": "assistant", "content": as_answer(turn.answer)})
        if turn.state == WAITING:
            if not turn.answer or waits.startswith("Stopping"):
                messages.append(remark(waits, status="pending"))
        elif turn.state == CUT:
            messages.append(remark(f"Cut at its longest · {turn.note}", options=[{"value": GO_ON}]))
        elif turn.state == STOPPED:
            messages.append(remark(f"Stopped. {turn.note}".strip()))
        else:
            messages.append(remark(f"No answer: {turn.note}" if turn.state == FAILED else turn.note))
    return messages


def who_answers(model) -> str:
    """The model's name, the formats of its weights, its device, and how fast it was last."""
    speed = model.stats.tokens_per_s
    fast = [f"{speed:.{1 if speed < 10 else 0}f} tokens per second"] if speed else []
    return " · ".join([getattr(model, "about", "Llama 3.2 Vision"), *fast])


def exported_name(picture: Path) -> str:
    """Of a kept picture, beside a conversation's text."""
    return f"pictures/{picture.name}"


def escaped(text: str) -> str:
    """Text within Markdown: nothing in it is a picture, a link, HTML or a heading, and it stays readable."""
    return re.sub(r"[\\`*_\[\]<>#|~!&$]", r"\\\g<0>", text)


def as_markdown(conversation: Conversation) -> str:
    """A conversation to keep elsewhere; its pictures are beside it, under `exported_name`, and no others are shown."""
    lines = [f"# {escaped(' '.join(conversation.name.split()))}", ""]
    for turn in conversation.turns:
        lines += [f"![]({quote(exported_name(picture))})" for picture in turn.pictures]
        lines += ["", *(f"> {escaped(line)}" for line in turn.question.splitlines()), ""]
        lines += [loads_nothing(turn.answer), ""]
        lines += [f"<sub>{escaped(' '.join(turn.note.split()))}</sub>", ""] if turn.note else []
    return "\n".join(lines)


def exported(conversation: Conversation) -> str:
    """Write a conversation's .zip, Markdown and its pictures, into Gradio's folder of files that it sends, under the
    file's digest; its path."""
    from gradio.processing_utils import save_file_to_cache
    from gradio.utils import get_upload_folder

    name = re.sub(r"[^\w -]", "", conversation.name).strip()[:60] or "chat"
    pictures = {picture for turn in conversation.turns for picture in turn.pictures if picture.is_file()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("chat.md", as_markdown(conversation))
            for picture in pictures:
                file.write(picture, exported_name(picture))
        return save_file_to_cache(path, get_upload_folder())
