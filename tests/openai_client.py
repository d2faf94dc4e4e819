"""Shared by the tests of the server: an app on a free port, and questions as OpenAI's client asks them."""

import base64
import contextlib
import io
import json
import socket
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from chat_page import WHO, path_of, wait_until
from ov_mllama.runtime.prompts import prompt_tensors
from ov_mllama.serving.app import create_app
from ov_mllama.serving.scheduler import Scheduler

KEY = "secret"
BEARER = {"Authorization": f"Bearer {KEY}"}
HTTP = httpx.Client(timeout=60)  # one for all: each new one reads its certificates for 30 ms


@contextlib.contextmanager
def served(app) -> Iterator[str]:
    """The app's address, while it is there."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def small_server(model, processor, **options) -> Iterator[tuple[str, Scheduler]]:
    """A server of its own: its address, and its batches.

    Args:
        options: of `Scheduler`.
    """
    batches = Scheduler(model, processor, **options)
    with served(create_app(batches, "demo", KEY)) as url:
        yield url, batches


def openai_client(url: str, key: str = KEY, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=HTTP, **options)


def picture(sample, **more) -> dict:
    encoded = base64.b64encode(path_of(sample).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}", **more}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts]}]


def about(sample) -> list[dict]:
    return user(picture(sample), text(sample["question"]))


ASKED = {"model": "demo", "messages": user(text(WHO))}


def complete(client, messages, **options):
    return client.chat.completions.create(model="demo", messages=messages, **options)


def refusal(client, messages=None, **options) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as refused:
        complete(client, messages or user(text("?")), **options)
    assert set(refused.value.response.json()["error"]) == {"message", "type", "param", "code"}
    return refused.value


def alone(model, processor, question: str, *samples) -> str:
    """The model's own answer."""
    content = [*({"type": "image"} for _ in samples), text(question)]
    inputs, _ = prompt_tensors(
        model, processor, [{"role": "user", "content": content}], [path_of(sample) for sample in samples], 100
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=100)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def post(url: str, body, **options) -> httpx.Response:
    """A request without OpenAI's client."""
    headers = {**BEARER, "Content-Type": "application/json", **options.pop("headers", {})}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(f"{url}/v1/chat/completions", content=content, headers=headers, **options)


def is_openai_error(answer: httpx.Response) -> bool:
    return set(answer.json()["error"]) == {"message", "type", "param", "code"}


def raises(error: BaseException):
    """A function that fails."""

    def fail(*_, **__):
        raise error

    return fail


def photograph(width: int, height: int, seed: int = 0, form: str = "JPEG", **options) -> bytes:
    """A picture that compresses as badly as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))
    noise = rng.integers(-12, 13, (height, width, 1), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(file, form, **options)
    return file.getvalue()


def encoded(data: bytes) -> dict:
    return {"type": "image_url", "image_url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}


def is_busy(model) -> bool:
    """Return whether it answers."""
    if model.turn.acquire(blocking=False):
        model.turn.release()
        return False
    return True
