"""Conversations as a page shows them, and as a file keeps them."""

import functools
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from ov_mllama.conversations import CUT, FAILED, STOPPED, WAITING, Conversation, Turn
from ov_mllama.images import open_picture

NO_BROWSER_SHOWS = (".heic", ".heif", ".tif", ".tiff", ".ppm")
GO_ON = "Go on"


@functools.lru_cache(1000)  # a page asks ten times a second
def with_formulas(text: str) -> str:
    """Text in which formulas between single dollars are marked as such, and sums of money are not (pandoc's rule: no
    space inside the dollars, no digit behind the second); code stays as it is."""
    pieces = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)
    formula = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\d$])")
    pieces[::2] = [formula.sub(r"\\(\1\\)", piece) for piece in pieces[::2]]
    return "".join(pieces)


def shown_picture(path: Path) -> Path:
    """The file that a browser shows for a kept picture, made if need be."""
    if path.suffix.lower() not in NO_BROWSER_SHOWS or not path.is_file():
        return path
    copy = path.with_name(f"{path.name}.jpg")
    if not copy.is_file():
        try:
            part = path.with_name(f"{secrets.token_hex(8)}.part")
            open_picture(path).save(part, "JPEG", quality=90)
            part.replace(copy)
        except ValueError:
            return path
    return copy


def remark(title: str, **more) -> dict:
    """A line about the conversation that is no part of it."""
    metadata = {"title": title} | ({"status": more.pop("status")} if "status" in more else {})
    return {"role": "assistant", "content": "", "metadata": metadata, **more}


def bubbles(turns: Iterable[Turn], waits: str = "") -> list[dict]:
    """A conversation as Gradio's messages.

    Args:
        waits: what the last answer waits for, if it is under way.
    """
    messages: list[dict] = []
    for turn in turns:
        pictures = [{"path": str(shown_picture(picture))} for picture in turn.pictures]
        messages.append({"role": "user", "content": [*pictures, *([turn.question] if turn.question else [])]})
        if turn.answer:
            messages.append({"role": "assistant", "content": with_formulas(turn.answer)})
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
    return f"pictures/{picture.parent.name[:6]}-{picture.name}"


def as_markdown(conversation: Conversation) -> str:
    """A conversation to keep elsewhere; its pictures are beside it, under `exported_name`."""
    lines = [f"# {conversation.name}", ""]
    for turn in conversation.turns:
        lines += [f"![]({quote(exported_name(picture))})" for picture in turn.pictures]
        lines += ["", *(f"> {line}" for line in turn.question.splitlines()), "", turn.answer, ""]
        lines += [f"<sub>{turn.note}</sub>", ""] if turn.note else []
    return "\n".join(lines)
