"""The queue: what waits, how much memory it may hold, and who is told to come again."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from chat_page import WHO, wait_until
from conftest import demo_samples
from openai_client import (
    ASKED,
    KEY,
    complete,
    encoded,
    is_busy,
    photograph,
    post,
    raises,
    small_server,
    text,
    user,
)
from ov_mllama.runtime.errors import ImageError
from ov_mllama.runtime.images import load_image
from ov_mllama.serving import guards

SAMPLES = demo_samples()


def test_waiting_images_are_held_encoded(slow_demo, processor, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "ov_mllama.serving.images.load_image", lambda data, page: opened.append(len(data)) or load_image(data, page)
    )
    slow_demo.as_new(step_s=60)
    data = photograph(1200, 800)
    asked = {"model": "demo", "messages": user(encoded(data), text("?")), "max_tokens": 2}
    with small_server(slow_demo, processor) as (url, batches), ThreadPoolExecutor(5) as pool:
        first = pool.submit(post, url, ASKED)
        wait_until(lambda: is_busy(slow_demo))
        others = [pool.submit(post, url, asked) for _ in range(4)]
        wait_until(lambda: len(batches._waiting) == 4)
        early = list(opened)
        slow_demo.step_s = 0
        assert all(each.result().is_success for each in [first, *others])
    assert not early
    assert opened == [len(data)] * 4


def test_full_queue_of_bytes_is_told_429(slow_demo, processor):
    slow_demo.as_new(step_s=60)
    data = photograph(800, 600)
    messages = {"model": "demo", "messages": user(encoded(data), text("?")), "max_tokens": 3}
    with small_server(slow_demo, processor, queue_bytes=4 * len(data)) as (url, batches), ThreadPoolExecutor(9) as pool:
        batches._last_batch_s = 7.4
        asked = [pool.submit(post, url, messages) for _ in range(8)]
        wait_until(lambda: sum(each.done() for each in asked) + len(batches._reservations) == 8)
        slow_demo.step_s = 0
        answers = [each.result() for each in asked]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert sum(answer.is_success for answer in answers) == 8 - len(refused) >= 2
        for answer in refused:
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(answer.headers["Retry-After"]) >= 1
        wait_until(lambda: not batches._reservations)
        assert post(url, messages).is_success
        larger = {**messages, "messages": user(*[encoded(data)] * 5)}
        assert post(url, larger).status_code == 413


def test_bodies_under_way_count(slow_demo, processor):
    slow_demo.as_new()
    with small_server(slow_demo, processor, queue_bytes=1_000_000, max_queue=3) as (url, batches):
        port = int(url.rpartition(":")[2])
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 900000\r\n\r\n"
        with contextlib.ExitStack() as stack:
            uploads = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3)]
            for upload in uploads[:2]:
                upload.sendall(head.encode() + b" " * 450_000)
            wait_until(lambda: sum(place.nbytes for place in batches._reservations) == 900_000)
            answer = post(url, {**ASKED, "user": "x" * 200_000})
            assert answer.status_code == 429
            assert "1 MB" in answer.json()["error"]["message"]
            assert post(url, ASKED).is_success
            uploads[2].sendall(head.encode())
            wait_until(lambda: len(batches._reservations) == 3)
            answer = post(url, ASKED)
            assert answer.status_code == 429
            assert "3 requests" in answer.json()["error"]["message"]
        wait_until(lambda: not batches._reservations)  # who leaves amid an upload leaves room
        assert post(url, ASKED).is_success


def test_upload_that_stalls_ends(slow_demo, processor, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.parsing.BODY_TIMEOUT_S", 0.3)
    slow_demo.as_new()
    with small_server(slow_demo, processor) as (url, batches):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as upload:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            upload.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
            assert upload.recv(20).startswith(b"HTTP/1.1 408")
        wait_until(lambda: not batches._reservations)


def test_retry_after_is_the_time_of_a_batch(client, server, slow_demo, processor):
    slow_demo.as_new()
    with small_server(slow_demo, processor, max_queue=1) as (_, batches):
        for took_s, said in ((7.4, "7"), (0.01, "1"), (900, "60")):
            batches._last_batch_s = took_s
            place = batches.reserve()
            with pytest.raises(guards.ApiError) as full:
                batches.reserve()
            batches.release(place)
            assert full.value.status == 429
            assert full.value.headers == {"Retry-After": said}
            assert f"in {said} s" in str(full.value)


def test_freed_memory_is_given_back_after_each_batch(client, monkeypatch):
    given = []
    monkeypatch.setattr("ov_mllama.serving.scheduler.trim_memory", lambda: given.append(1))
    for count in (1, 2):
        complete(client, user(text(WHO)))
        wait_until(lambda count=count: len(given) == count)


def test_request_without_a_thread_gets_an_error(client, server, scheduler, monkeypatch):
    """Not a place among the active ones, which it would hold forever."""
    monkeypatch.setattr(scheduler._pools[False], "submit", raises(RuntimeError("can't start new thread")))
    assert post(server, ASKED, timeout=5).status_code == 500
    monkeypatch.undo()
    assert not scheduler._engine.active
    assert post(server, ASKED).is_success


def test_broken_image_does_not_change_retry_after(client, server, scheduler, monkeypatch):
    monkeypatch.setattr(scheduler, "_last_batch_s", 7.4)
    monkeypatch.setattr("ov_mllama.serving.images.load_image", raises(ImageError("broken")))
    assert post(server, {"model": "demo", "messages": user(encoded(photograph(80, 80)), text("?"))}).status_code == 400
    wait_until(lambda: not scheduler._reservations)
    assert scheduler._last_batch_s == 7.4
