"""One inference and its cancellation."""

import contextlib
import time
from collections.abc import Callable

import numpy as np
import openvino as ov
import torch

POLL_S = 0.05  # interval of polling a stop event


class Cancelled(RuntimeError):
    """A computation that ended early because its stop event was set."""


def check_stop(stop) -> None:
    """Raise `Cancelled` once the event is set; None never is."""
    if stop and stop.is_set():
        raise Cancelled("Cancelled: the stop event is set.")


def stopping_criterion(stop) -> Callable[..., torch.Tensor]:
    """Return a stopping criterion for `generate` that is met once the event is set."""
    return lambda input_ids, scores, **_: torch.full((len(input_ids),), stop.is_set())


def run(request: ov.InferRequest, inputs: dict[str, np.ndarray], stop=None) -> None:
    """Run `request.infer`, cancelled between two layers when `stop` (with `is_set`) is set or Python is interrupted."""
    check_stop(stop)
    try:
        request.start_async(inputs, share_inputs=True)
        while not request.wait_for(round(1000 * POLL_S)):
            check_stop(stop)
    except BaseException:
        request.cancel()
        with contextlib.suppress(RuntimeError):  # that it was cancelled
            request.wait()
        raise


@contextlib.contextmanager
def acquire(lock, stop=None):
    """Hold a lock (`threading.Lock` or `RLock`); waiting for it can be cancelled."""
    acquired = False
    try:
        while not acquired:
            check_stop(stop)
            acquired = lock.acquire(timeout=POLL_S)
        yield
    finally:
        if acquired:
            lock.release()


class Progress:
    """The stage that a prompt is in, for display: `str(progress)` from any thread, at any time."""

    def __init__(self):
        self.enter("Waiting")

    def enter(self, stage: str, left_s: Callable[[], float | None] = lambda: None) -> None:
        """Begin a stage, such as "Reading 310 tokens"; `left_s` returns the seconds left, or None if unknown."""
        self._now = stage, time.perf_counter(), left_s  # one assignment, hence atomic

    def __str__(self) -> str:
        stage, since, left_s = self._now
        left = left_s()
        if left is None:
            return f"{stage} ... {time.perf_counter() - since:.0f} s"
        return f"{stage} ... " + (f"about {left:.0f} s left" if left >= 1 else "any moment now")
