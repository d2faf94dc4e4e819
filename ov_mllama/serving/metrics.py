"""Metrics of the server in Prometheus' text format: requests, queue, tokens, time to first token, memory."""

import threading
import time
from collections import Counter
from collections.abc import Iterator

import psutil
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ov_mllama.serving.scheduler import Scheduler
from ov_mllama.serving.sequences import PendingRequest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # of the time to first token

# Paths whose responses are counted by name; others of the APIs are counted as "other"
COUNTED_PATHS = {
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"),
    *("/api/chat", "/api/generate", "/api/show", "/api/tags"),
}


class Metrics:
    """Counts since the server's start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # answers end in the model's thread
        self._responses: Counter[tuple[str, int]] = Counter()
        self._answers: Counter[str] = Counter()
        self._prompt_tokens = self._answer_tokens = 0
        self._first_tokens: Counter[float] = Counter()  # by the upper bound of their bucket
        self._first_token_s = 0.0

    def count_response(self, path: str, status: int) -> None:
        """Count a response.

        Args:
            path: one of few, as each is a time series.
        """
        with self._lock:
            self._responses[path, status] += 1

    def watch(self, pending: PendingRequest) -> None:
        """Count a request's answer when it ends; call it when the request enters the queue."""
        received_s = time.perf_counter()
        pending.on_finish = lambda: self._count_answer(pending, received_s)

    def _count_answer(self, pending: PendingRequest, received_s: float) -> None:
        sequence = pending.sequence
        reason = "error" if pending.error else sequence.finish_reason or "cancelled"
        with self._lock:
            self._answers[reason] += 1
            self._prompt_tokens += sequence.num_prompt_tokens
            self._answer_tokens += sequence.num_tokens
            if sequence.first_token_s:
                waited_s = sequence.first_token_s - received_s
                self._first_token_s += waited_s
                self._first_tokens[min((bound for bound in BUCKETS_S if waited_s <= bound), default=float("inf"))] += 1

    def text(self, scheduler: Scheduler) -> str:
        """Return all metrics."""
        with self._lock:
            return "".join(f"{line}\n" for line in [*self._counters(), *self._first_token_times(), *gauges(scheduler)])

    def _counters(self) -> Iterator[str]:
        yield from header("http_responses_total", "counter", "HTTP responses of the APIs by path and status code")
        for (path, status), count in sorted(self._responses.items()):
            yield f'ov_mllama_http_responses_total{{path="{path}",status="{status}"}} {count}'
        yield from header("answers_total", "counter", "Answers that have ended, by reason")
        for reason, count in sorted(self._answers.items()):
            yield f'ov_mllama_answers_total{{reason="{reason}"}} {count}'
        yield from metric("prompt_tokens_total", "counter", "Tokens of prompts", self._prompt_tokens)
        yield from metric("answer_tokens_total", "counter", "Generated tokens", self._answer_tokens)

    def _first_token_times(self) -> Iterator[str]:
        name = "time_to_first_token_seconds"
        yield from header(name, "histogram", "Time from a request's place in the queue to its first token")
        for bound in (*BUCKETS_S, float("inf")):
            count = sum(number for upper, number in self._first_tokens.items() if upper <= bound)
            yield f'ov_mllama_{name}_bucket{{le="{"+Inf" if bound == float("inf") else bound}"}} {count}'
        yield f"ov_mllama_{name}_sum {self._first_token_s:.6f}"
        yield f"ov_mllama_{name}_count {sum(self._first_tokens.values())}"


def gauges(scheduler: Scheduler) -> Iterator[str]:
    """Yield the lines of metrics that describe this moment."""
    reservations = scheduler.reservations()
    waiting, nbytes = (sum(getattr(each, name) for each in reservations) for name in ("waiting", "nbytes"))
    yield from metric("requests_waiting", "gauge", "Requests that are read or wait", waiting)
    yield from metric("requests_running", "gauge", "Requests that are answered", len(reservations) - waiting)
    yield from metric("queue_bytes", "gauge", "Memory of the requests that wait or run", nbytes)
    cache = scheduler.model.image_encoder.cache
    yield from metric("image_cache_bytes", "gauge", "Memory of the encoded images", cache.nbytes)
    yield from metric("resident_memory_bytes", "gauge", "Memory of the process", psutil.Process().memory_info().rss)


def metric(name: str, kind: str, description: str, value: float) -> Iterator[str]:
    """Yield the lines of a metric without labels."""
    yield from header(name, kind, description)
    yield f"ov_mllama_{name} {value}"


def header(name: str, kind: str, description: str) -> Iterator[str]:
    """Yield the lines that precede a metric's values."""
    yield f"# HELP ov_mllama_{name} {description}."
    yield f"# TYPE ov_mllama_{name} {kind}"


class CountResponses:
    """ASGI middleware that counts the responses of the APIs."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not path.startswith(("/v1/", "/api/")):
            await self.app(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count_response(path if path in COUNTED_PATHS else "other", message["status"])
            await send(message)

        await self.app(scope, receive, send_and_count)
