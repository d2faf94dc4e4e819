"""GET /metrics: what is counted, in Prometheus' text format."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx

from chat_page import SELF, WHO, wait_until
from openai_client import ASKED, BEARER, HTTP, complete, is_busy, post, raises, refusal, small_server, text, user

LINE = re.compile(r'(ov_mllama_[a-z_]+(?:\{[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*\})?) (-?[0-9.e+]+)')


def metrics(url: str) -> dict[str, float]:
    answer = HTTP.get(f"{url}/metrics", headers=BEARER)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in answer.text.splitlines():
        if not line.startswith("#"):
            name, value = LINE.fullmatch(line).groups()
            assert f"# TYPE {re.sub('_(bucket|sum|count)$', '', name.partition('{')[0])} " in answer.text
            values[name.removeprefix("ov_mllama_")] = float(value)
    return values


def test_answers_tokens_and_responses_are_counted(slow_demo, processor):
    slow_demo.as_new()
    with small_server(slow_demo, processor, max_queue=2) as (url, _):
        before = metrics(url)
        assert before["prompt_tokens_total"] == before["time_to_first_token_seconds_count"] == 0
        usage = post(url, ASKED).json()["usage"]
        post(url, {**ASKED, "max_tokens": 2, "stream": True})
        assert HTTP.post(f"{url}/v1//chat/completions/", json={}, headers=BEARER).status_code == 400
        assert HTTP.get(f"{url}/v1/{'x' * 9}", headers=BEARER).status_code == 404
        HTTP.post(f"{url}/api/generate", json={"model": "demo", "prompt": WHO, "stream": False}, headers=BEARER)
        wait_until(lambda: metrics(url)["requests_running"] == 0)
        after = metrics(url)
    assert after['http_responses_total{path="/v1/chat/completions",status="200"}'] == 2
    assert after['http_responses_total{path="/v1/chat/completions",status="400"}'] == 1
    assert after['http_responses_total{path="/api/generate",status="200"}'] == 1
    assert after['http_responses_total{path="other",status="404"}'] == 1
    assert after['answers_total{reason="stop"}'] == 2
    assert after['answers_total{reason="length"}'] == 1
    assert after["prompt_tokens_total"] == 3 * usage["prompt_tokens"]
    assert after["answer_tokens_total"] >= usage["completion_tokens"] + 2
    assert after['time_to_first_token_seconds_bucket{le="+Inf"}'] == after["time_to_first_token_seconds_count"] == 3
    assert after["time_to_first_token_seconds_sum"] > 0
    assert after["resident_memory_bytes"] > 1e7


def test_queue_and_errors_are_shown(client, server, scheduler, slow_demo, monkeypatch):
    slow_demo.step_s = 60
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(complete, client, user(text(WHO)))
        wait_until(lambda: is_busy(slow_demo))
        others = [pool.submit(complete, client, user(text(WHO))) for _ in range(2)]
        wait_until(lambda: metrics(server)["requests_waiting"] == 2)
        shown = metrics(server)
        slow_demo.step_s = 0
        assert [each.result().choices[0].message.content for each in [first, *others]] == [SELF] * 3
    assert shown["requests_running"] == 1
    assert shown["queue_bytes"] >= 0
    monkeypatch.setattr(slow_demo, "begin", raises(RuntimeError("out of order")))
    errors = metrics(server).get('answers_total{reason="error"}', 0)
    refusal(client)
    wait_until(lambda: metrics(server)['answers_total{reason="error"}'] == errors + 1)


def test_metrics_need_the_key(server):
    assert httpx.get(f"{server}/metrics").status_code == 401
