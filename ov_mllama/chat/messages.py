"""Turns of a conversation as messages for the chat template."""

from collections.abc import Collection, Sequence
from pathlib import Path

from ov_mllama.chat.turns import Turn
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.prompts import escape_special_tokens


def to_messages(turns: Sequence[Turn], system: str = "") -> tuple[list[dict], list[Path]]:
    """Return a conversation's messages for the chat template, and its images in the template's order.

    Args:
        turns: the last one is the question; earlier ones without an answer are left out.
        system: system prompt; may be empty.
    Raises:
        ValueError: if there is no question.
    """
    *before, question = turns
    if not question.pictures and not question.question.strip():
        raise InputError("There is no question yet: write one, or add a picture.")
    answered = [turn for turn in before if turn.answer]
    messages = [message("system", system)] if system.strip() else []
    for turn in answered:
        messages += [message("user", turn.question, turn.pictures), message("assistant", turn.answer)]
    messages.append(message("user", question.question, question.pictures))
    return messages, [picture for turn in [*answered, question] for picture in turn.pictures]


def details_of(turns: Sequence[Turn]) -> list[str]:
    """Return the detail of each image of `to_messages`: full up to the last turn with a closer look."""
    *before, question = turns
    used = [*(turn for turn in before if turn.answer), question]
    closer = max((i for i, turn in enumerate(used) if turn.closer), default=-1)
    return ["high" if i <= closer else turn.detail for i, turn in enumerate(used) for _ in turn.pictures]


def message(role: str, text: str, pictures: Collection[Path] = ()) -> dict:
    """Return a message for the chat template: images first, then text without special tokens."""
    texts = [{"type": "text", "text": escape_special_tokens(text.strip())}] if text.strip() else []
    return {"role": role, "content": [*({"type": "image"} for _ in pictures), *texts]}
