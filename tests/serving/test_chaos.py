"""Clients that connect, send slowly, stop half-way or vanish: no other client's answer changes, no memory stays."""

import asyncio
import json
import random
import socket
import struct
from collections import Counter

import pytest

from chat_page import WHO, wait_until
from conftest import demo_samples
from openai_client import BEARER, about, small_server, text, user

SAMPLES = demo_samples()
QUESTIONS = [user(text(WHO)), about(SAMPLES[0]), about(SAMPLES[3]), user(text("word " * 200 + "Which?"))]
AT_ONCE = 24
KINDS = ("stays", "stays", "streams", "slow", "silent", "stops", "vanishes", "gibberish", "invalid")


def http_request(question: int, **more) -> bytes:
    body = json.dumps({"model": "demo", "messages": QUESTIONS[question], "max_tokens": 30, **more}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {BEARER['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def answer_of(response: bytes, stream: bool) -> tuple[int, str]:
    """Return status and text of a complete response."""
    head, _, body = response.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"transfer-encoding: chunked" in head.lower():
        chunks, body = body, b""
        while size := int((parts := chunks.partition(b"\r\n"))[0] or b"0", 16):
            body, chunks = body + parts[2][:size], parts[2][size + 2 :]
    if status != 200:
        return status, body.decode()
    if not stream:
        return status, json.loads(body)["choices"][0]["message"]["content"]
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    return status, "".join(choice["delta"].get("content") or "" for choice in choices)


async def client(port: int, kind: str, question: int, rng=random) -> tuple[int, str] | None:
    """Behave as a client of a kind; return the response of one that waits for it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stream = kind in ("streams", "vanishes")
    data = http_request(question, **({"stream": True} if stream else {}))
    if kind == "gibberish":
        data = rng.randbytes(200) + b"\r\n\r\n"
    if kind == "invalid":
        data = http_request(question, temperature="warm")
    if kind == "slow":
        for start in range(0, len(data), step := len(data) // 7):
            writer.write(data[start : start + step])
            await asyncio.sleep(rng.random() / 20)
    elif kind == "stops":
        writer.write(data[: rng.randrange(len(data))])
    elif kind != "silent":
        writer.write(data)
    if kind in ("stays", "streams", "slow", "invalid"):
        try:
            response = await reader.read()
        except ConnectionError:  # the queue is full, and the answer was sent before the request
            return 429, ""
        writer.close()
        return answer_of(response, stream)
    if kind == "vanishes":
        await reader.read(rng.choice([1, 400, 2000]))
    await asyncio.sleep(rng.random() / 10)
    if rng.random() < 0.5:  # closed with RST
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    return None


async def chaos(port: int, count: int, expected: list[str]) -> tuple[Counter, list]:
    """Run clients of random kinds, some at once; return the outcomes, and what was wrong."""
    outcomes, wrong, free = Counter(), [], asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        own = random.Random(number)  # noqa: S311
        kind, question = KINDS[number % len(KINDS)], own.randrange(len(QUESTIONS))
        async with free:
            result = await client(port, kind, question, own)
            while result and result[0] == 429:  # as clients do
                await asyncio.sleep(0.2)
                result = await client(port, kind, question, own)
        outcomes[kind, result and result[0]] += 1
        if result and result != ((400, result[1]) if kind == "invalid" else (200, expected[question])):
            wrong.append((kind, question, result))

    await asyncio.gather(*map(one, range(count)))
    return outcomes, wrong


@pytest.mark.torture
def test_no_client_changes_the_answers_of_others(slow_demo, processor, times, tally):
    slow_demo.as_new()
    with small_server(slow_demo, processor, max_batch=4, max_queue=16) as (url, scheduler):
        port = int(url.rpartition(":")[2])

        async def one_by_one() -> list:
            return [await client(port, "stays", question) for question in range(len(QUESTIONS))]

        alone = asyncio.run(one_by_one())
        assert {status for status, _ in alone} == {200}
        outcomes, wrong = asyncio.run(chaos(port, times(45, 500), [answer for _, answer in alone]))
        wait_until(lambda: not scheduler._reservations)
        assert not scheduler._engine.active
        assert scheduler.alive
        assert asyncio.run(one_by_one()) == alone
    print(outcomes)
    assert {kind for kind, _ in outcomes} == {*KINDS}
    tally("clients beside those that stop, send slowly or vanish", outcomes.total(), wrong)
