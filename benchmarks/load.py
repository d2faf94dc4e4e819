"""Load test of the server and its memory: python -m benchmarks.load MODEL_DIR [--clients 8] [--seconds 120]

Starts `ov-mllama serve` and sends requests with OpenAI's client: photographs and plain questions at random, streamed or
not; clients disconnect from every fifth stream after its first chunk. Keys of the JSON: answered, left (disconnected),
refused (429: the queue is full), lost (other errors: should be 0), tokens_per_s, first_token_s (median and 95th
percentile of streams), longest_s (slowest request), anonymous_gb (memory of the server by seconds since the first
request).
"""

import argparse
import base64
import collections
import io
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai

from benchmarks.benchmark import anonymous, provenance, report
from ov_mllama.export.samples import photographs


def start(model_dir: Path, port: int) -> subprocess.Popen:
    """Start a server and wait until its model is loaded."""
    command = [sys.executable, "-m", "ov_mllama", "serve", "--model-dir", str(model_dir)]
    server = subprocess.Popen([*command, "--port", str(port), "--name", "model"])  # noqa: S603
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:  # 503 while it loads
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("The server did not start.")


def conversations() -> list[list[dict]]:
    """Return messages with and without an image."""
    result = [[{"role": "user", "content": "What can be done with an old bicycle?"}]]
    for sample in photographs():
        file = io.BytesIO()
        sample["image"].save(file, "jpeg")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample["question"]}]
        result.append([{"role": "user", "content": parts}])
    return result


class Clients:
    """Clients that send requests until a deadline.

    Args:
        until: deadline by `time.monotonic`.
        tokens: token limit of each answer.
    """

    def __init__(self, url: str, until: float, tokens: int):
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.until, self.options = until, {"model": "model", "max_tokens": tokens}
        self.conversations = conversations()
        self.first_token_s: list[float] = []

    def run(self, number: int) -> tuple[collections.Counter, float]:
        """Run one client; return counts of outcomes and "tokens", and the seconds of its slowest request."""
        rng, counts, longest_s = random.Random(number), collections.Counter(), 0.0  # noqa: S311
        while time.monotonic() < self.until:
            started = time.monotonic()
            try:
                outcome, tokens = self.request(rng)
            except openai.RateLimitError as full:
                outcome, tokens = "refused", 0
                time.sleep(float(full.response.headers["retry-after"]))
            except openai.OpenAIError as error:
                outcome, tokens = "lost", 0
                print(f"lost: {error}", flush=True)
            counts.update({outcome: 1, "tokens": tokens})
            longest_s = max(longest_s, time.monotonic() - started)
        return counts, longest_s

    def request(self, rng: random.Random) -> tuple[str, int]:
        """Send a random request; return its outcome and number of tokens."""
        create, messages = self.client.chat.completions.create, rng.choice(self.conversations)
        if rng.random() < 0.5:
            return "answered", create(messages=messages, **self.options).usage.completion_tokens
        leaves, started = rng.random() < 0.2, time.monotonic()
        more = {"stream": True, "stream_options": {"include_usage": True}}
        with create(messages=messages, **more, **self.options) as stream:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    if started:
                        self.first_token_s.append(time.monotonic() - started)
                        started = 0
                    if leaves:
                        return "left", 0
                if chunk.usage:
                    return "answered", chunk.usage.completion_tokens
        return "lost", 0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server, memory = start(options.model_dir, port), {}
    started = time.monotonic()
    clients = Clients(f"http://127.0.0.1:{port}/v1", started + options.seconds, options.tokens)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(5):
            memory[round(time.monotonic() - started)] = anonymous(server.pid)

    threading.Thread(target=watch, daemon=True).start()
    try:
        with ThreadPoolExecutor(options.clients) as pool:
            counts, longest_s = zip(*pool.map(clients.run, range(options.clients)), strict=True)
    finally:
        done.set()
        server.terminate()
        server.wait()
    first = clients.first_token_s
    total, seconds = sum(counts, collections.Counter()), time.monotonic() - started
    result = {
        **provenance("benchmarks.load"),
        **{name: total[name] for name in ("answered", "left", "refused", "lost")},
        "tokens_per_s": total["tokens"] / seconds,
        "first_token_s": {"median": statistics.median(first), "95%": statistics.quantiles(first, n=20)[-1]},
        "longest_s": max(longest_s),
        "anonymous_gb": memory,
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
