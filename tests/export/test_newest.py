"""Choice of the two IRs that are loaded from a folder, by `make chat` too."""

import os
import re

import httpx
import pytest

from chat_page import wait_until
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama_compression import compress, optimize_vision_encoder


def best_pair(copy):
    return newest(copy, LANGUAGE_MODEL_NAME), newest(copy, VISION_ENCODER_NAME)


def test_the_compressed_ones_made_last(copy):
    assert best_pair(copy) == (LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME)
    eight = compress(copy, algo="int8_asym")
    four = compress(copy, group_size=32)
    vision = optimize_vision_encoder(copy, "INT8 weights compression")
    assert best_pair(copy) == (four.name, vision.name)
    os.utime(eight, (2e9, 2e9))
    assert best_pair(copy) == (eight.name, vision.name)


def test_none_that_does_not_fit(copy):
    four = compress(copy, group_size=32)
    text = four.read_text(encoding="utf-8")
    for change in (r'<checkpoint value="\w', r'<converter_version value="\w'):
        four.write_text(re.sub(change, lambda found: found[0][:-1] + "x", text), encoding="utf-8")
        assert best_pair(copy)[0] == LANGUAGE_MODEL_NAME
    four.write_text(text[: len(text) // 2], encoding="utf-8")
    assert best_pair(copy)[0] == LANGUAGE_MODEL_NAME
    (copy / LANGUAGE_MODEL_NAME).unlink()
    assert newest(copy, VISION_ENCODER_NAME) == VISION_ENCODER_NAME
    with pytest.raises(FileNotFoundError, match="openvino_language_model.*for this version: run convert_mllama"):
        best_pair(copy)


def test_the_command_says_which_and_serves_them(copy, start):
    four = compress(copy, group_size=32)
    chat = start("from ov_mllama.__main__ import main; main()", "chat", "--model-dir", copy)

    def is_up() -> bool:
        assert chat.poll() is None, chat.said()
        return "The chat is at" in chat.said()

    wait_until(is_up, 600)
    assert f"{four.name} and {VISION_ENCODER_NAME}" in chat.said().partition("The chat is at")[0]
    [url] = re.findall(r"The chat is at (http://127\.0\.0\.1:\d+)", chat.said())
    assert httpx.get(url).status_code == 200
