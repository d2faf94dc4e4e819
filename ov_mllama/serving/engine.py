"""Steps of the active requests: a chunk of one newcomer's prompt, and a token of each running answer.

preparing (by other threads: images are encoded) -> prefilling -> running
"""

import logging
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from ov_mllama.runtime.batch import SHARED_PREFILL_TOKENS, Batch
from ov_mllama.serving.sequences import PendingRequest

logger = logging.getLogger(__name__)


class Engine:
    """Active requests, for the thread that answers.

    Args:
        finish: called with each request that has ended, and its error.
        requeue: called with requests that have to run again; their answers are continued.

    Attributes:
        preparing: requests whose prompts are being prepared.
        prefilling: those that get a chunk in turn.
        running: those that get a token with each step.
    """

    def __init__(
        self,
        model,
        eos_token_ids: list[int],
        finish: Callable[[PendingRequest, BaseException | None], None],
        requeue: Callable[[list[PendingRequest]], None],
    ):
        self.model, self._eos_token_ids = model, eos_token_ids
        self._finish_request, self._requeue_requests = finish, requeue
        self.preparing: list[PendingRequest] = []
        self.prefilling: deque[PendingRequest] = deque()
        self.running: list[PendingRequest] = []
        self._batch = Batch(model)

    @property
    def active(self) -> list[PendingRequest]:
        """Requests in order of their progress."""
        return [*self.preparing, *self.prefilling, *self.running]

    def collect(self) -> None:
        """Have prepared requests prefilled."""
        for pending in [each for each in self.preparing if each.prefill and each.prefill.done()]:
            self.preparing.remove(pending)
            self.prefilling.append(pending)

    def step(self) -> bool:
        """Compute a chunk of one newcomer, who joins after its last one, and a token of each running answer.

        Returns:
            whether any request has ended.
        """
        ended = False
        with self.model.turn:
            try:
                self._requeue_lost()
                ended |= self._leave()
                if self.prefilling:
                    self._prefill()
                if self.running:
                    self._decode()
                ended |= self._leave()
            except Exception as error:
                if not self.running:
                    raise
                self._fail(self.running, error)
                self._batch.clear()
        return ended

    def fail(self, error: BaseException) -> None:
        """Finish all active requests with an error."""
        self._batch.clear()
        for pending in self.active:
            self._finish(pending, error)

    def _prefill(self) -> None:
        """Compute a chunk of the newcomer whose turn it is."""
        pending = self.prefilling[0]
        self.prefilling.rotate(-1)
        try:
            prefill = pending.prefill.result()  # type: ignore[union-attr]
            logits = prefill.step(SHARED_PREFILL_TOKENS if self.running else 0)
        except BaseException as error:  # noqa: BLE001 - of this request only
            of_openvino = type(error) is RuntimeError  # in a graph that all requests share
            self._fail([pending], error, may_be_of_others=of_openvino or isinstance(error, MemoryError))
            self._requeue_lost()
            return
        if logits is not None:
            self._append_token(pending, logits)
            if not pending.ended:
                self.prefilling.remove(pending)
                self.running.append(pending)
                self._batch.join(prefill)

    def _decode(self) -> None:
        logits = self._batch.decode([pending.sequence.last_token for pending in self.running])
        for pending, row in zip(self.running, logits, strict=True):
            self._append_token(pending, row)

    def _append_token(self, pending: PendingRequest, logits: np.ndarray) -> None:
        """Sample the next token of an answer; an error is of this answer only."""
        try:
            token = pending.sequence.sample(torch.from_numpy(logits))
            pending.sequence.append_token(token, self._eos_token_ids)
        except BaseException as error:  # noqa: BLE001
            self._finish_request(pending, error)  # and leaves

    def _leave(self) -> bool:
        """Finish requests that have ended, free their memory, and return whether there were any."""
        # once, as clients cancel at any time
        ended = [pending for pending in [*self.prefilling, *self.running] if pending.ended]
        if rows := [row for row, pending in enumerate(self.running) if pending in ended]:
            self._batch.leave(rows)
        for pending in ended:
            if prefill := pending.prefilled:
                prefill.close()
            self._finish(pending)
        return bool(ended)

    def _remove(self, pending: PendingRequest) -> None:
        for stage in (self.preparing, self.prefilling, self.running):
            if pending in stage:
                stage.remove(pending)
        pending.prefill = None

    def _finish(self, pending: PendingRequest, error: BaseException | None = None) -> None:
        self._finish_request(pending, error)
        self._remove(pending)

    def _fail(self, failed: list[PendingRequest], error: BaseException, may_be_of_others: bool = True) -> None:
        """Finish requests with an error, or requeue them to run one by one if others may have caused it: what needs too
        much memory together may fit alone."""
        if may_be_of_others and len(self.active) > 1:
            logger.warning("A step has failed, requests continue one by one (%d): %s", len(failed), error)
            for pending in failed:
                pending.exclusive = True
            self._requeue(failed)
        else:
            for pending in [*failed]:
                self._finish(pending, error)

    def _requeue(self, pendings: list[PendingRequest]) -> None:
        pendings = [*pendings]
        for pending in pendings:
            self._remove(pending)
        self._requeue_requests(pendings)

    def _requeue_lost(self) -> None:
        """Requeue requests whose KV caches a failed inference of another has reset."""
        self._requeue([pending for pending in self.prefilling if (each := pending.prefilled) and each.lost])
        if self._batch.lost:
            self._requeue(self.running)
            self._batch.clear()
