"""A server under load, its memory watched: python -m benchmarks.load MODEL_DIR [--clients 8] [--seconds 120]

Starts `ov-mllama serve` and asks it with OpenAI's client: photographs and plain questions in turn, whole and
streamed, of which every fifth is left after its first words. Keys of the JSON: answered, left, refused (429: a full
line), lost (anything else: none should be), tokens_per_s, longest_s of an answer, anonymous_gb of the server by
seconds since the first question.
"""

import argparse
import base64
import collections
import io
import random
import socket
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
    """A server that answers."""
    server = subprocess.Popen(  # noqa: S603
        [
            sys.executable,
            "-m",
            "ov_mllama",
            "serve",
            "--model-dir",
            str(model_dir),
            "--port",
            str(port),
            "--name",
            "model",
        ]
    )
    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:  # 503 while it loads
                return server
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("The server did not start.")


def questions() -> list[list[dict]]:
    """Messages with and without a picture."""
    asked = [[{"role": "user", "content": "What can be done with an old bicycle?"}]]
    for sample in photographs():
        file = io.BytesIO()
        sample["image"].save(file, "jpeg")
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample["question"]}]
        asked.append([{"role": "user", "content": parts}])
    return asked


class Clients:
    """Ask until the time is over.

    Args:
        until: by `time.monotonic`.
    """

    def __init__(self, url: str, until: float, tokens: int):
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.until, self.options = until, {"model": "model", "max_tokens": tokens}
        self.asked = questions()

    def run(self, number: int) -> tuple[collections.Counter, float]:
        """One client: how often its questions ended how, with all "tokens", and the longest wait in seconds."""
        chance, counts, longest_s = random.Random(number), collections.Counter(), 0.0  # noqa: S311
        while time.monotonic() < self.until:
            started = time.monotonic()
            try:
                ended, tokens = self.one(chance)
            except openai.RateLimitError as full:
                ended, tokens = "refused", 0
                time.sleep(float(full.response.headers["retry-after"]))
            except openai.OpenAIError as error:
                ended, tokens = "lost", 0
                print(f"lost: {error}", flush=True)
            counts.update({ended: 1, "tokens": tokens})
            longest_s = max(longest_s, time.monotonic() - started)
        return counts, longest_s

    def one(self, chance: random.Random) -> tuple[str, int]:
        """A question: how it ended, and its tokens."""
        create, messages = self.client.chat.completions.create, chance.choice(self.asked)
        if chance.random() < 0.5:
            return "answered", create(messages=messages, **self.options).usage.completion_tokens
        leaves = chance.random() < 0.2
        more = {"stream": True, "stream_options": {"include_usage": True}}
        with create(messages=messages, **more, **self.options) as stream:
            for chunk in stream:
                if leaves and chunk.choices and chunk.choices[0].delta.content:
                    return "left", 0
                if chunk.usage:
                    return "answered", chunk.usage.completion_tokens
        return "lost", 0


def main() -> None:
    """The command line."""
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
    over = threading.Event()

    def watch() -> None:
        while not over.wait(5):
            memory[round(time.monotonic() - started)] = anonymous(server.pid)

    threading.Thread(target=watch, daemon=True).start()
    try:
        with ThreadPoolExecutor(options.clients) as pool:
            counts, longest_s = zip(*pool.map(clients.run, range(options.clients)), strict=True)
    finally:
        over.set()
        server.terminate()
        server.wait()
    total, seconds = sum(counts, collections.Counter()), time.monotonic() - started
    result = {
        **provenance("benchmarks.load"),
        **{name: total[name] for name in ("answered", "left", "refused", "lost")},
        "tokens_per_s": total["tokens"] / seconds,
        "longest_s": max(longest_s),
        "anonymous_gb": memory,
    }
    report(result, options.json)


if __name__ == "__main__":
    main()
