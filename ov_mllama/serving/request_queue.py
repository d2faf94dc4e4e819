"""Queue of requests: what waits, and how much memory it holds."""

import threading
from collections import deque

from ov_mllama.serving.protocol import ApiError
from ov_mllama.serving.sequences import PendingRequest, Reservation

FIRST_ANSWER_S = 10.0  # duration of an answer that is assumed before there was one; it suits the 11B
MAX_RETRY_AFTER_S = 60  # clients do not wait longer at a time


class RequestQueue:
    """Requests that wait, first come, first served.

    Args:
        max_queue: requests that may wait, including those whose bodies are being read.
        queue_bytes: that all requests may hold, from the first byte read until their answers end.
    """

    def __init__(self, max_queue: int, queue_bytes: int):
        self.max_queue, self.queue_bytes = max_queue, queue_bytes
        self._reservations: set[Reservation] = set()
        self._waiting: deque[PendingRequest] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._last_batch_s = FIRST_ANSWER_S  # duration of the last answer

    @property
    def alive(self) -> bool:
        """True if requests are answered."""
        return self._open

    def reservations(self) -> list[Reservation]:
        """Return those of this moment."""
        with self._changed:
            return list(self._reservations)

    def reserve(self) -> Reservation:
        """Reserve a place in the queue, for `submit` or `release`.

        Raises:
            ApiError: if the queue is full, or nothing is answered any more.
        """
        if not (self._open and self.alive):
            raise ApiError(503, "The server no longer answers: restart it.", error_type="server_error")
        with self._changed:
            self._drop_cancelled()
            if sum(reservation.waiting for reservation in self._reservations) >= self.max_queue:
                raise queue_full(f"{self.max_queue} requests wait already", self._last_batch_s)
            reservation = Reservation()
            self._reservations.add(reservation)
            return reservation

    def resize(self, reservation: Reservation, nbytes: int) -> None:
        """Set the bytes that a request holds.

        Raises:
            ApiError: if all requests would hold more than `queue_bytes`.
        """
        with self._changed:
            self._drop_cancelled()
            if sum(other.nbytes for other in self._reservations) - reservation.nbytes + nbytes > self.queue_bytes:
                reason = f"The requests that wait hold {self.queue_bytes / 1e6:.0f} MB already"
                raise queue_full(reason, self._last_batch_s)
            reservation.nbytes = nbytes

    def release(self, reservation: Reservation) -> None:
        """Release a reservation."""
        with self._changed:
            self._reservations.discard(reservation)

    def _drop_cancelled(self) -> deque[PendingRequest]:
        """Finish cancelled requests, whose images would occupy the queue; return those that wait."""
        for pending in [each for each in self._waiting if each.sequence.cancelled.is_set()]:
            self._waiting.remove(pending)
            self._finish(pending)
        return self._waiting

    def _finish(self, pending: PendingRequest, error: Exception | None = None) -> None:
        """Finish a request and release its reservation."""
        pending.finish(error)
        self.release(pending.reservation)


def queue_full(reason: str, last_batch_s: float) -> ApiError:
    """Return the error of requests that the queue does not hold."""
    seconds = round(min(MAX_RETRY_AFTER_S, max(1, last_batch_s)))
    headers = {"Retry-After": str(seconds)}
    message = f"{reason}: try again in {seconds} s."
    return ApiError(429, message, "rate_limit_exceeded", error_type="requests", headers=headers)


def shutting_down() -> ApiError:
    """Return the error of requests that the server no longer runs."""
    return ApiError(503, "The server is shutting down.", error_type="server_error")
