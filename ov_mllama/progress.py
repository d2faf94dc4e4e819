"""How far a prompt is, told by the thread that computes it to whoever looks; and how long pictures take."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Progress:
    """What a prompt waits for, in plain words: `str(progress)` from any thread, at any time."""

    def __init__(self):
        self.enter("Waiting")

    def enter(self, stage: str, left_s: Callable[[], float | None] = lambda: None) -> None:
        """A stage begins.

        Args:
            stage: what is done now, as "Reading 310 tokens".
            left_s: tells the seconds that it will still take, or None where nobody knows.
        """
        self._now = stage, time.perf_counter(), left_s  # one assignment: who reads sees all of it or nothing

    def __str__(self) -> str:
        stage, since, left_s = self._now
        left = left_s()
        if left is None:
            return f"{stage} ... {time.perf_counter() - since:.0f} s"
        return f"{stage} ... " + (f"about {left:.0f} s left" if left >= 1 else "any moment now")


class PictureClock:
    """When the picture under way began, and how long earlier ones took."""

    def __init__(self):
        self._took: dict[int, float] = {}  # seconds of the last picture of so many computed tiles
        self._under_way: tuple[bytes, int, float] | None = None

    @contextlib.contextmanager
    def timing(self, key: bytes, tiles: int) -> Iterator[None]:
        """A picture is encoded inside; one that fails or is given up tells nothing of how long others take.

        Args:
            key: the image's, see `image_keys`.
            tiles: that are computed of it.
        """
        started = time.perf_counter()
        self._under_way = key, tiles, started
        try:
            yield
            self._took[tiles] = time.perf_counter() - started
        finally:
            self._under_way = None

    def left_s(self, key: bytes, tiles: int) -> float | None:
        """Seconds until a picture is encoded, with what is left of another one under way; None before the first."""
        under_way, whole = self._under_way, self._expected_s(tiles)
        if under_way is None or whole is None:
            return whole
        other, its_tiles, since = under_way
        left = max(0.0, (self._expected_s(its_tiles) or 0.0) - (time.perf_counter() - since))
        return left if other == key else left + whole

    def _expected_s(self, tiles: int) -> float | None:
        """As the last picture of as many tiles took, else the one nearest to it, tile for tile."""
        took = dict(self._took)  # another thread may add to it
        if not took:
            return None
        nearest = min(took, key=lambda known: abs(known - tiles))
        return took[nearest] * tiles / nearest
