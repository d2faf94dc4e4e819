"""Images encoded ahead of the question about them, given up, and waited for."""

import signal
import threading
import time

import numpy as np
import pytest
import torch

from conftest import F32
from ov_mllama.runtime.images import at_detail
from ov_mllama.runtime.inference import Cancelled, acquire, run
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.prompts import prompt_tensors

GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
PICTURE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Held:
    """The vision encoder's infer request, whose inferences do not end before `released` is set."""

    def __init__(self, request):
        self.request, self.released, self.begun = request, threading.Event(), threading.Event()
        self.runs = self.cancelled = 0

    def __getattr__(self, name):
        return getattr(self.request, name)

    def start_async(self, *args, **kwargs):
        self.runs += 1
        self.request.start_async(*args, **kwargs)
        self.begun.set()

    def cancel(self):
        self.cancelled += 1
        self.request.cancel()

    def wait_for(self, milliseconds):
        return self.released.wait(milliseconds / 1000) and self.request.wait_for(milliseconds)


@pytest.fixture
def model(pair):
    return OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)


@pytest.fixture
def held(model):
    model.image_encoder._request = held = Held(model.image_encoder._request)
    yield held
    held.released.set()


class Thread(threading.Thread):
    """Calls a function; `outcome` is what it returned or raised."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(daemon=True)
        self.call = lambda: function(*args, **kwargs)
        self.start()

    def run(self):
        try:
            self.outcome = self.call()
        except Exception as error:  # noqa: BLE001
            self.outcome = error

    def result(self):
        self.join(60)
        assert not self.is_alive()
        return self.outcome


def wait_until(condition) -> None:
    until = time.perf_counter() + 60
    while not condition():
        assert time.perf_counter() < until
        time.sleep(0.01)


def picture_of(inputs) -> dict:
    return {name: inputs[name] for name in PICTURE}


def assert_right(pair, answer, inputs):
    assert answer.tolist() == pair.hf.generate(**inputs, **GREEDY).tolist()


@pytest.mark.parametrize("case", ["wide", "two images", "mixed batch"])
def test_what_was_encoded_ahead_is_not_encoded_again(pair, model, case):
    inputs = pair.inputs(case)
    seconds = model.encode_images(**picture_of(inputs))
    assert_right(pair, model.generate(**inputs, **GREEDY), inputs)
    assert model.stats.images_cached == len(seconds) == model.stats.images > 0


def test_a_prompt_waits_for_the_image_under_way(pair, model, held):
    inputs = pair.inputs("wide")
    ahead = Thread(model.encode_images, **picture_of(inputs))
    assert held.begun.wait(60)
    asked = Thread(model.generate, **inputs, **GREEDY)
    asked.join(0.3)
    assert asked.is_alive()
    held.released.set()
    assert_right(pair, asked.result(), inputs)
    assert len(ahead.result()) == 1
    assert held.runs == 1
    assert model.stats.images_cached == 1


def test_text_does_not_wait_for_it(pair, model, held):
    ahead = Thread(model.encode_images, **picture_of(pair.inputs("wide")))
    assert held.begun.wait(60)
    inputs = pair.inputs("text only")
    assert_right(pair, Thread(model.generate, **inputs, **GREEDY).result(), inputs)
    assert ahead.is_alive()


def test_it_is_given_up_at_once(pair, model, held):
    """The first image is kept; the second is given up, and right when it is asked for again."""
    inputs, stop = pair.inputs("two images"), threading.Event()
    held.released.set()
    model.encode_images(**{name: tensor[:, :1] for name, tensor in picture_of(inputs).items()})
    held.released.clear()
    held.begun.clear()
    ahead = Thread(model.encode_images, **picture_of(inputs), stop=stop)
    assert held.begun.wait(60)
    stop.set()
    assert isinstance(ahead.result(), Cancelled)
    assert not held.released.is_set()  # the inference was not waited for
    assert held.cancelled == 1
    assert_right(pair, model.generate(**inputs, **GREEDY), inputs)
    assert model.stats.images_cached == 1


def test_waiting_for_another_image_is_given_up_too(pair, model, held):
    ahead = Thread(model.encode_images, **picture_of(pair.inputs("wide")))
    assert held.begun.wait(60)
    stop = threading.Event()
    second = Thread(model.encode_images, **picture_of(pair.inputs("tall")), stop=stop)
    stop.set()
    assert isinstance(second.result(), Cancelled)
    assert ahead.is_alive()
    assert held.runs == 1


# ---- Stopping an answer ----


def test_an_answer_is_stopped_while_its_image_is_encoded(pair, model, held):
    inputs, stop = pair.inputs("wide"), threading.Event()
    asked = Thread(model.generate, **inputs, **GREEDY, stop=stop)
    assert held.begun.wait(60)
    stop.set()
    assert isinstance(asked.result(), Cancelled)
    held.released.set()
    assert_right(pair, model.generate(**inputs, **GREEDY), inputs)


def test_an_answer_is_stopped_while_its_prompt_is_computed(pair, model, monkeypatch):
    """At the end of the tokens under way; those before it are still there when it is asked for again."""
    inputs, stop = pair.inputs("text before image"), threading.Event()
    infer, computed = model.language_model.infer, []
    monkeypatch.setattr("ov_mllama.runtime.language.PREFILL_TOKENS", 3)

    def stopped_in_the_fourth(request, given):
        computed.append(given["input_ids"].shape[1])
        if len(computed) == 4:
            stop.set()
        return infer(request, given)

    monkeypatch.setattr(model.language_model, "infer", stopped_in_the_fourth)
    with pytest.raises(Cancelled):
        model.generate(**inputs, **GREEDY, stop=stop)
    assert computed == [3] * 4
    stop.clear()
    assert_right(pair, model.generate(**inputs, **GREEDY, stop=stop), inputs)
    assert model.stats.images_cached == 1
    assert model.stats.reused_tokens == 12


def test_an_answer_is_stopped_between_tokens(pair, model):
    """The part that was written is returned."""
    inputs, stop = pair.inputs("wide"), threading.Event()

    class StopAtThird:
        count = 0

        def put(self, value):
            self.count += 1
            if self.count == 3:  # the prompt, two tokens; another one is under way
                stop.set()

        def end(self):
            pass

    answer = model.generate(**inputs, **GREEDY, stop=stop, streamer=StopAtThird())
    length = inputs["input_ids"].shape[1]
    assert answer.tolist() == pair.hf.generate(**inputs, **GREEDY)[:, : length + 3].tolist()


def test_waiting_for_a_turn_is_given_up():
    lock, stop = threading.RLock(), threading.Event()

    def wait():
        with acquire(lock, stop):
            pytest.fail("it was not its turn")

    with lock:
        waiting = Thread(wait)
        time.sleep(0.1)
        assert waiting.is_alive()
        stop.set()
        assert isinstance(waiting.result(), Cancelled)
    with acquire(lock):
        pass


def test_what_cannot_be_encoded_is_refused(pair, model):
    picture = picture_of(pair.inputs("wide"))
    assert model.encode_images(None, None, None) == []
    with pytest.raises(ValueError, match="aspect_ratio_mask"):
        model.encode_images(**{**picture, "aspect_ratio_mask": None})
    with pytest.raises(ValueError, match="processor in the model's own folder"):
        model.encode_images(**{**picture, "pixel_values": torch.zeros(1, 1, 4, 3, 5, 5)})


def test_an_image_that_a_prompt_waits_for_is_not_given_up(pair, model, held):
    inputs, stop = pair.inputs("wide"), threading.Event()
    ahead = Thread(model.encode_images, **picture_of(inputs), stop=stop)
    assert held.begun.wait(60)
    asked = Thread(model.generate, **inputs, **GREEDY)
    wait_until(lambda: model.image_encoder._awaited)
    stop.set()
    ahead.join(0.3)
    assert ahead.is_alive()
    held.released.set()
    assert_right(pair, asked.result(), inputs)
    assert len(ahead.result()) == 1
    assert (held.runs, held.cancelled) == (1, 0)


def test_a_prompts_image_goes_before_the_next_one(pair, model, held):
    pictures = [[pair.picture(1, 1, seed)] for seed in (11, 12, 13)]
    gallery = pair.processor(text=["<|image|>a"] * 3, images=pictures, padding=True, return_tensors="pt")
    inputs, order = pair.inputs("wide"), []
    ahead = Thread(model.encode_images, **picture_of(gallery))
    assert held.begun.wait(60)
    infer = model.image_encoder._infer
    model.image_encoder._infer = lambda given, stop: order.append(given["pixel_values"]) or infer(given, stop)
    asked = Thread(model.generate, **inputs, **GREEDY)
    wait_until(lambda: model.image_encoder._awaited)
    held.released.set()
    assert_right(pair, asked.result(), inputs)
    assert len(ahead.result()) == 3
    expected = [inputs["pixel_values"][0, 0], *gallery["pixel_values"][1:, 0]]
    assert len(order) == len(expected)
    for computed, pixels in zip(order, expected, strict=True):
        np.testing.assert_array_equal(computed, pixels[: len(computed)])  # the padding tiles at its end are one


def test_images_ahead_wait_while_a_prompt_waits_for_another(pair, model, held):
    awaited, stop = model.image_encoder._awaited, threading.Event()
    held.released.set()
    awaited.append(b"another")
    waiting = [Thread(model.encode_images, **picture_of(pair.inputs("wide")), stop=event) for event in (None, stop)]
    time.sleep(0.3)
    stop.set()
    assert isinstance(waiting[1].result(), Cancelled)
    assert held.runs == 0
    awaited.remove(b"another")
    assert len(waiting[0].result()) == held.runs == 1


def test_an_inference_that_is_stopped_before_is_not_begun(model, held):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        run(held, {}, stop)
    assert held.runs == held.cancelled == 0


def test_a_stop_that_is_set_before_begins_nothing(pair, model, held):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        model.encode_images(**picture_of(pair.inputs("wide")), stop=stop)
    with pytest.raises(Cancelled):
        model.generate(**pair.inputs("wide"), **GREEDY, stop=stop)
    assert held.runs == 0


def test_an_interrupt_while_an_image_is_encoded(pair, model, monkeypatch):
    """Ctrl-C arrives in Python between two looks: the inference is cancelled, and the next call is right."""
    seen = []

    class Interrupted(Held):
        def wait_for(self, milliseconds):
            seen.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr("ov_mllama.runtime.vision.run", lambda request, *given: run(Interrupted(request), *given))
    inputs = pair.inputs("wide")
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **GREEDY)
    assert [request.cancelled for request in seen] == [1]
    monkeypatch.undo()
    assert_right(pair, model.generate(**inputs, **GREEDY), inputs)


def test_an_interrupt_while_the_language_model_computes(pair, model, monkeypatch):
    """Python notices a real Ctrl-C when the step has ended. Its tokens are lost, the weights not compiled anew."""
    compiled, infer, inputs = model.language_model.compiled, model.language_model.infer, pair.inputs("wide")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it

    def interrupted(*given):
        infer(*given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(model.language_model, "infer", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **GREEDY)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert model.language_model.compiled is compiled
    assert_right(pair, model.generate(**inputs, **GREEDY), inputs)


# ---- Detail ----


@pytest.mark.parametrize("size", [(500, 300), (30, 900), (56, 56), (20, 10), (112, 57)])
def test_low_detail_is_one_tile(pair, size):
    image = pair.picture(size[0] / pair.tile, size[1] / pair.tile)
    inputs = pair.processor(text="<|image|>", images=[at_detail(image, "low", pair.tile)], return_tensors="pt")
    assert inputs["aspect_ratio_mask"].sum() == 1
    assert at_detail(image, "high", pair.tile) is image


def test_detail_of_a_conversation(pair, model):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    pictures = [pair.picture(3, 3)]

    def tiles(detail):
        inputs, _ = prompt_tensors(model, pair.processor, messages, pictures, 10, detail)
        return int(inputs["aspect_ratio_mask"].sum())

    assert tiles("low") == 1
    assert tiles("high") == 4
    with pytest.raises(ValueError, match="low, high"):
        tiles("medium")
