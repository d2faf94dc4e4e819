"""One inference, and how to give it up before it is done."""

import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np
import openvino as ov
import torch
from transformers import StoppingCriteria

POLL_S = 0.05  # how soon after `stop` is set something is given up


class Cancelled(RuntimeError):
    """What was under way has been given up, as it was asked to be."""


def check_stop(stop) -> None:
    """Raises `Cancelled` once the event is set; None never is."""
    if stop and stop.is_set():
        raise Cancelled("Stopped, as it was asked to be.")


class StopOnEvent(StoppingCriteria):
    """Ends `generate` after the token during which the event was set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool)


def run(request: ov.InferRequest, inputs: dict[str, np.ndarray], stop=None) -> None:
    """`request.infer`, but given up between two layers when `stop` is set or the interpreter is interrupted.

    Args:
        stop: `threading.Event`, or anything with its `is_set`.
    Raises:
        Cancelled: `stop` was set.
    """
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
    """The lock (`threading.Lock` or `RLock`), held; waiting for it can be given up.

    Raises:
        Cancelled: `stop` was set before or meanwhile.
    """
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
