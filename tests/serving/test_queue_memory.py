"""Memory of the server while photographs wait: they are held as they came, and decoded one after the other."""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from chat_page import wait_until
from openai_client import ASKED, HTTP, encoded, photograph, text, user
from programs import free_port

pytestmark = pytest.mark.alone  # it measures memory, and its decoders fill both cores

SLOW_SERVER = """
import sys, time
from ov_mllama.serving import app, load
schedulers, steps = [], []
def slowed(*given, **options):
    model, processor = load(*given, **options)
    step = model.language_model.infer
    def wait(*given):
        steps.append(1)
        while len(steps) > 1 and len(steps) < 10 and len(schedulers[0]._reservations) < 33:
            time.sleep(0.02)
        return step(*given)
    model.language_model.infer = wait
    return model, processor
made = app.Scheduler
app.Scheduler = lambda *given: schedulers.append(made(*given)) or schedulers[0]
app.load = slowed
app.main(sys.argv[1:])
"""


def anonymous(pid: int) -> float:
    """GB of a process's memory that is no file's."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / 1e9


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_32_waiting_photographs_of_12_megapixels_fit_into_memory(start, demo_dir, record_property):
    """One question is answered once 32 of them wait; then they are answered."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = start(SLOW_SERVER, "--model-dir", demo_dir, "--name", "demo", "--port", port)

    def is_up() -> bool:
        assert server.poll() is None, server.said()
        with suppress(httpx.TransportError):
            return HTTP.get(f"{url}/health").is_success
        return False

    photographs = [photograph(4000, 3000, seed, quality=88) for seed in range(4)]
    assert all(3e6 < len(data) < 7e6 for data in photographs), [len(data) for data in photographs]
    bodies = [
        {
            "model": "demo",
            "messages": user(encoded(photographs[i % 4] + bytes(i)), text("What is it?")),
            "max_tokens": 2,
        }
        for i in range(32)
    ]
    wait_until(is_up, 120)
    before, used, over = anonymous(server.pid), [], threading.Event()

    def watch():
        while not over.wait(0.05):
            used.append(anonymous(server.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    asked, stream = f"{url}/v1/chat/completions", {**ASKED, "stream": True}
    with (
        ThreadPoolExecutor(32) as pool,
        HTTP.stream("POST", asked, json=stream, timeout=300) as slow,
    ):
        lines = slow.iter_lines()
        next(line for line in lines if '"content":"I' in line)  # it is answered, and holds no place in the queue
        answers = list(pool.map(lambda body: HTTP.post(asked, json=body, timeout=300), bodies))
        assert "data: [DONE]" in list(lines)
    over.set()
    watching.join()
    record_property("peak_gb", max(used))
    print(f"\nbefore {before:.2f} GB, at the peak {max(used):.2f} GB")  # shown with -s
    assert [answer.status_code for answer in answers] == [200] * 32
    assert max(used) < 1.5
