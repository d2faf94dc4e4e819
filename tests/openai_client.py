"""What the tests of the server share: an app on a free port, and questions as OpenAI's client asks them."""

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn

from chat_page import path_of, wait_until
from ov_mllama.runtime.prompts import prompt_tensors

KEY = "secret"


@contextlib.contextmanager
def served(app) -> Iterator[str]:
    """The app's address, while it is there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def picture(sample, **more) -> dict:
    encoded = base64.b64encode(path_of(sample).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}", **more}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts]}]


def about(sample) -> list[dict]:
    return user(picture(sample), text(sample["question"]))


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
