"""Turns of a conversation, and their variants: several answers to a question, several versions of a question.

A conversation's `turns` are the variant that is shown. Its turn `i` has `others`, hidden lists of turns that could
stand in place of `turns[i:]`, and so have the turns in those.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ov_mllama.runtime.errors import InputError

# States of a turn
WAITING, ANSWERED, CUT, STOPPED, FAILED = "waiting", "answered", "cut", "stopped", "failed"
EDITED = "edited"
OPENING = "```json\n"  # of an answer by a schema, which the model cannot continue

MAX_DEPTH = 50  # of variants within hidden variants: they are nested JSON


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        question: its text; may be empty if there are pictures.
        pictures: their files.
        answer: as far as it is written.
        note: statistics of the answer, or the error.
        state: WAITING until the answer has ended; CUT at the token limit; STOPPED by the user; FAILED; EDITED: written
            by the user.
        asked: seconds since 1970.
        remarks: on its pictures.
        detail: of its pictures, see `images.at_detail`.
        closer: whether it has the pictures of earlier turns read at full detail.
        others: hidden variants, each the turns from this one on; none for the first turn of a hidden variant.
        position: index of the shown variant among all.
    """

    question: str
    pictures: list[Path] = field(default_factory=list)
    answer: str = ""
    note: str = ""
    state: str = WAITING
    asked: float = field(default_factory=time.time, compare=False)
    remarks: list[str] = field(default_factory=list)
    detail: str = "high"
    closer: bool = False
    others: list[list["Turn"]] = field(default_factory=list)
    position: int = 0

    @property
    def can_continue(self) -> bool:
        """True if the model may write more of the answer."""
        return bool(self.answer) and self.state not in (WAITING, ANSWERED) and not self.answer.startswith(OPENING)

    def again(self, **changes) -> "Turn":
        """Return a variant of the turn without an answer, with changes."""
        blank = {"answer": "", "note": "", "state": WAITING, "others": [], "position": 0}
        return replace(self, **{**blank, **changes})


def begin_variant(turns: list[Turn], index: int, turn: Turn) -> None:
    """Show a new variant from a turn on, and hide the present one, unless that is one turn without an answer.

    Args:
        turn: first turn of the new variant.
    Raises:
        InputError: if variants are nested too deeply.
    """
    hidden = turns[index:]
    variants = _all_variants(hidden)
    if len(hidden) == 1 and not hidden[0].answer:
        position = hidden[0].position
        del variants[position]
    else:
        position = len(variants)
    if max(_depth(hidden[:1]), 1 + _depth(hidden[1:])) > MAX_DEPTH:
        raise InputError(f"This chat has variants {MAX_DEPTH} levels deep: continue in a new one.")
    variants.insert(position, [turn])
    _show(turns, index, variants, position)


def flip_variant(turns: list[Turn], index: int, step: int) -> None:
    """Show the next variant from a turn on (`step` 1), or the previous one (-1); from the last to the first."""
    variants = _all_variants(turns[index:])
    _show(turns, index, variants, (turns[index].position + step) % len(variants))


def take_back(turns: list[Turn]) -> Turn:
    """Remove and return the last turn, with its question's other answers. If variants are left there, of another
    question or with turns that follow, the nearest is shown.
    """
    last, index = turns[-1], len(turns) - 1
    question = last.question, last.pictures
    left = [tail for tail in last.others if len(tail) > 1 or (tail[0].question, tail[0].pictures) != question]
    position = min(last.position, len(left) - 1)
    turns.pop()
    if left:
        _show(turns, index, left, position)
    return last


def every_turn(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Yield the turns of all variants."""
    for turn in turns:
        yield turn
        for tail in turn.others:
            yield from every_turn(tail)


def _all_variants(tail: list[Turn]) -> list[list[Turn]]:
    first = tail[0]
    return [*first.others[: first.position], tail, *first.others[first.position :]]


def _show(turns: list[Turn], index: int, variants: list[list[Turn]], position: int) -> None:
    """Show one of the variants from a turn on, and hide the others."""
    for tail in variants:
        tail[0].others, tail[0].position = [], 0
    shown = variants[position]
    shown[0].others, shown[0].position = [*variants[:position], *variants[position + 1 :]], position
    turns[index:] = shown


def _depth(turns: Sequence[Turn]) -> int:
    """Return how deeply variants are nested in turns; 0 if there are none."""
    return max((1 + _depth(tail) for turn in turns for tail in turn.others), default=0)
