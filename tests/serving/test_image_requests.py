"""Images of requests: headers, broken ones, too many of them, and how they share a batch."""

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image
from transformers import AutoProcessor

from chat_page import WHO, wait_until
from conftest import DEMO, demo_samples
from openai_client import (
    ASKED,
    about,
    alone,
    complete,
    encoded,
    is_busy,
    photograph,
    picture,
    post,
    raises,
    refusal,
    small_server,
    text,
    user,
)
from ov_mllama.runtime.batch import Batch
from ov_mllama.runtime.prompts import padded, prompt_inputs, prompts_about
from ov_mllama.serving.images import ImageFile
from ov_mllama.serving.scheduler import computed_tiles

SAMPLES = demo_samples()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"no picture", "invalid_image"),
        (b"\xff\xd8\xff\xe0", "invalid_image"),
        (photograph(64, 64, form="PNG")[:20], "invalid_image"),
        (b"BM" + b"\0" * 60, "invalid_image"),
        (b"P6 20000 20000 255\n", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "invalid_image"),
    ],
)
def test_unreadable_header_is_refused_at_once(client, slow_demo, data, code, monkeypatch):
    monkeypatch.setattr("ov_mllama.serving.scheduler.prompt_text", raises(AssertionError))
    error = refusal(client, user(encoded(data), text("?")))
    assert isinstance(error, openai.BadRequestError)
    assert error.code == code
    assert error.param == "messages[0].content[0].image_url"


def test_image_broken_behind_its_header_fails_alone(client, scheduler, slow_demo):
    whole = photograph(300, 200)
    slow_demo.as_new(step_s=60)
    asked = [about(SAMPLES[0]), user(encoded(whole[: len(whole) // 2]), text("?")), about(SAMPLES[2])]
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(complete, client, user(text(WHO)))
        wait_until(lambda: is_busy(slow_demo))
        one, broken, other = [pool.submit(complete, client, messages) for messages in asked]
        wait_until(lambda: len(scheduler._waiting) == 3)
        slow_demo.step_s = 0
        first.result()
        assert isinstance(broken.exception(), openai.BadRequestError)
        assert broken.exception().param == "messages[0].content[0].image_url"
        assert one.result().choices[0].message.content == SAMPLES[0]["answer"]
        assert other.result().choices[0].message.content == SAMPLES[2]["answer"]
    assert isinstance(refusal(client, asked[1]), openai.BadRequestError)  # and alone


def test_too_many_images_are_refused(client):
    tiny = encoded(photograph(16, 16))
    assert complete(client, user(*[tiny] * 16, text("?")), max_tokens=1)
    assert refusal(client, user(*[tiny] * 17, text("?"))).code == "too_large"


@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (60, 40)), (3, (60, 40)), (6, (40, 60)), (8, (40, 60)), (9, (60, 40))]
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_size_is_that_of_the_image_upright(form, orientation, size):
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, form, exif=exif)
    image = ImageFile.from_bytes(file.getvalue())
    assert (image.width, image.height) == image.decode(560).size
    if form in ("JPEG", "PNG", "WEBP"):
        assert (image.width, image.height) == size


def ask_together(model, processor, pictures: list[bytes], **options) -> list[int]:
    """Asks about each picture while the model is busy; how many answers shared each step."""
    model.as_new(step_s=60)
    long = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 999}}}
    with small_server(model, processor, **options) as (url, batches), ThreadPoolExecutor(len(pictures) + 1) as pool:
        first = pool.submit(post, url, {**ASKED, "max_tokens": 2})
        wait_until(lambda: is_busy(model))
        body = {"model": "demo", "max_tokens": 60, "response_format": long}
        asked = [pool.submit(post, url, {**body, "messages": user(encoded(data), text("?"))}) for data in pictures]
        wait_until(lambda: len(batches._waiting) == len(pictures))
        with count_rows() as sizes:
            model.step_s = 0.005
            assert all(each.result().is_success for each in [first, *asked])
    return sizes


@contextlib.contextmanager
def count_rows():
    """Rows of each step of a batch."""
    sizes, decode = [], Batch.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "decode", lambda self, tokens: sizes.append(len(tokens)) or decode(self, tokens))
        yield sizes


def pictures_of(tiles_wide: int, tiles_high: int, count: int) -> list[bytes]:
    """For the demo's tiles of 112 pixels."""
    return [photograph(112 * tiles_wide, 112 * tiles_high, seed) for seed in range(count)]


@pytest.mark.parametrize(("wide", "high", "each"), [(1, 1, 2), (2, 1, 3), (1, 2, 3), (3, 1, 4), (2, 2, 4)])
def test_empty_tile_counts_too(slow_demo, wide, high, each):
    assert computed_tiles(slow_demo, ImageFile.from_bytes(pictures_of(wide, high, 1)[0])) == each


@pytest.mark.parametrize(("wide", "high", "each"), [(2, 1, 3), (2, 2, 4)])
def test_tiles_of_a_batch_are_limited_as_they_are_encoded(slow_demo, processor, wide, high, each):
    """An empty tile among them: 16 in all."""
    assert max(ask_together(slow_demo, processor, pictures_of(wide, high, 8))) == 16 // each


def test_detail_low_is_one_tile_of_a_batch(slow_demo):
    image = ImageFile.from_bytes(pictures_of(2, 2, 1)[0], "low")
    assert image.real_tiles(112, 4) == 1


def test_same_image_counts_once(slow_demo, processor):
    assert max(ask_together(slow_demo, processor, pictures_of(2, 2, 1) * 8)) == 8


@pytest.mark.parametrize("room", [16, 9])
def test_eight_images_of_two_tiles_are_encoded_once_each(slow_demo, processor, monkeypatch, room):
    """The image cache holds a batch's images, whatever its size."""
    encoder = slow_demo.image_encoder
    tile = encoder.shapes.cross_kv_bytes(encoder.shapes.patches_per_tile)
    monkeypatch.setattr(encoder.cache, "max_bytes", room * tile)
    sizes = ask_together(slow_demo, processor, pictures_of(2, 1, 8))
    assert len(slow_demo.looks) == 8
    assert max(sizes) == room // 3


@pytest.fixture
def right():
    """The demo's processor with a tokenizer that was saved after training."""
    processor = AutoProcessor.from_pretrained(DEMO)
    processor.tokenizer.padding_side = "right"
    return processor


ASK_BOTH = [
    "Who are you?",
    "Please tell me in a few words, or in more of them if it must be, what it is that you can do for people?",
]


@pytest.mark.parametrize("samples", [(), (SAMPLES[0],)])
def test_batch_of_a_tokenizer_that_pads_right_is_answered_as_alone(slow_demo, processor, right, samples):
    expected = [alone(slow_demo, processor, words, *samples) for words in ASK_BOTH]
    slow_demo.as_new(step_s=60)
    with count_rows() as sizes, small_server(slow_demo, right) as (url, batches), ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, url, ASKED)
        wait_until(lambda: is_busy(slow_demo))
        bodies = [{"model": "demo", "messages": user(*map(picture, samples), text(words))} for words in ASK_BOTH]
        asked = [pool.submit(post, url, body) for body in bodies]
        wait_until(lambda: len(batches._waiting) == len(asked))
        slow_demo.step_s = 0
        answers = [each.result().json() for each in asked]
        assert first.result().is_success
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
    assert 2 in sizes
    assert right.tokenizer.padding_side == "right"
    assert right.tokenizer.backend_tokenizer.padding is None


def test_prompts_about_are_padded_left_whatever_the_tokenizer_says(processor, right):
    samples = [{"image": SAMPLES[i]["image"].convert("RGB"), "question": words} for i, words in enumerate(ASK_BOTH)]
    expected = prompts_about(processor, samples)
    inputs = prompts_about(right, samples)
    assert all(np.array_equal(inputs[name], expected[name]) for name in expected)
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][:, -1].all()
    assert right.tokenizer.padding_side == "right"
    theirs = processor(
        text=[
            processor.apply_chat_template(user({"type": "image"}, text(words)), add_generation_prompt=True)
            for words in ASK_BOTH
        ],
        images=[[sample["image"]] for sample in samples],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert set(theirs) == set(inputs)
    assert all(np.array_equal(inputs[name], theirs[name]) for name in theirs)  # but on the left, it is the processor's


def test_prompts_are_padded_without_a_padding_token(right):
    prompts = [prompt_inputs(right, words, []) for words in ASK_BOTH]
    assert padded(prompts, None)["attention_mask"].sum(1).tolist() == [p["input_ids"].shape[1] for p in prompts]
