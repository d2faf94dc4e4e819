"""Pictures encoded while the question about them is still being written."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Collection, Hashable, Iterator
from pathlib import Path
from typing import NamedTuple

from ov_mllama.conversation import picture_tensors
from ov_mllama.inference import Stopped

logger = logging.getLogger(__name__)

GRACE_S = 2.0  # a picture is given up so long after it was taken away: a question that is sent empties its box first


def clock() -> float:
    """`time.monotonic`, and the end of all time once the program ends: nothing is wanted any more then."""
    return time.monotonic() if threading.main_thread().is_alive() else math.inf


class Unwanted(NamedTuple):
    """An event that is set once nobody wants a picture any more."""

    ahead: "PicturesAhead"
    picture: Path

    def is_set(self) -> bool:
        return not self.ahead.wants(self.picture)


class PicturesAhead:
    """Encodes pictures that somebody is about to ask about, one at a time and after those of prompts.

    Errors are silent here: the question about the picture says them. There is a thread only while there is work.

    Args:
        model, processor: as for `conversation.prompt_tensors`.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self._until: dict[tuple[Hashable, Path], float] = {}  # when an owner's picture is given up, by `clock`
        self._begun: set[Path] = set()  # of those wanted, whatever came of it
        self._working = False
        self._lock = threading.Lock()

    def want(self, owner: Hashable, pictures: Collection[Path]) -> None:
        """Sets which pictures an owner, such as a page, is about to ask about; others of its are given up soon.

        Args:
            pictures: all of them, those named before too; none when it goes away.
        """
        with self._lock:
            self._drop_expired()
            soon = clock() + GRACE_S
            for (who, picture), until in self._until.items():
                if who == owner and picture not in pictures:
                    self._until[who, picture] = min(until, soon)
            self._until |= {(owner, picture): math.inf for picture in pictures}
            if pictures and not self._working:
                self._working = True
                threading.Thread(target=self._work, name="pictures ahead").start()

    def wants(self, picture: Path) -> bool:
        """Whether anybody wants a picture."""
        now = clock()
        with self._lock:
            return any(until > now for (_, wanted), until in self._until.items() if wanted == picture)

    @contextlib.contextmanager
    def holding(self, pictures: Collection[Path]) -> Iterator[None]:
        """Of a question's pictures, those that are wanted stay so while it waits: its box is empty meanwhile."""
        question = object()
        self.want(question, [picture for picture in pictures if self.wants(picture)])
        try:
            yield
        finally:
            self.want(question, [])

    def _drop_expired(self) -> None:
        now = clock()
        self._until = {wanted: until for wanted, until in self._until.items() if until > now}
        self._begun &= {picture for _, picture in self._until}

    def _next(self) -> Path | None:
        """The picture wanted longest that was not begun; None ends the thread."""
        with self._lock:
            self._drop_expired()
            picture = next((picture for _, picture in self._until if picture not in self._begun), None)
            self._working = picture is not None
            if picture is not None:
                self._begun.add(picture)
            return picture

    def _work(self) -> None:
        while (picture := self._next()) is not None:
            try:
                tensors = picture_tensors(self.model, self.processor, picture)
                self.model.encode_images(**tensors, stop=Unwanted(self, picture))
            except Stopped:
                self._begun.discard(picture)  # it may come back
            except Exception:
                logger.debug("%s was not encoded ahead", picture, exc_info=True)
