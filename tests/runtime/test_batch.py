"""Sequences that join and leave a batch: their logits, and the memory that they hold."""

import gc
import weakref

import numpy as np
import pytest

from chat_page import path_of
from conftest import demo_samples
from ov_mllama.runtime.batch import Batch, Prefill
from ov_mllama.runtime.errors import OutOfMemoryError
from ov_mllama.runtime.prompts import prompt_tensors

SAMPLES = demo_samples()


@pytest.fixture
def prefill(demo_model_f32, processor):
    """A function that returns the prefill of a question about images."""
    demo_model_f32.forget()

    def begin(question: str, *samples) -> Prefill:
        content = [*({"type": "image"} for _ in samples), {"type": "text", "text": question}]
        paths = [path_of(sample) for sample in samples]
        messages = [{"role": "user", "content": content}]
        return Prefill(demo_model_f32, dict(prompt_tensors(demo_model_f32, processor, messages, paths, 100)[0]))

    return begin


def decoded_alone(model, prefill: Prefill) -> np.ndarray:
    batch = Batch(model)
    prefill.step()
    batch.join(prefill)
    logits = batch.decode([5])
    batch.leave([0])
    return logits[0]


@pytest.mark.parametrize(("stay", "other"), [((), SAMPLES[0]), ((SAMPLES[0],), None)], ids=["texts", "image"])
def test_row_joins_rows_of_the_same_images_after_another_has_left(demo_model_f32, prefill, stay, other):
    expected = decoded_alone(demo_model_f32, prefill("Which?", *stay))
    batch = Batch(demo_model_f32)
    for samples in (stay, [other] if other else [], stay, stay):
        if len(batch._tokens) == 3:
            batch.leave([1])
        row = prefill("Which?", *samples)
        row.step()
        batch.join(row)
    np.testing.assert_allclose(batch.decode([5, 5, 5]), [expected] * 3, rtol=0, atol=1e-4)


def test_answer_does_not_hold_what_only_its_prompt_needed(demo_model_f32, prefill):
    row = prefill("Which?", SAMPLES[0], SAMPLES[1])
    held = [weakref.ref(array) for array in (row.images.pixel_values, *row._encoded.key_values.values())]
    row.step()
    batch = Batch(demo_model_f32)
    batch.join(row)
    batch.decode([5])
    demo_model_f32.image_encoder.forget()
    gc.collect()
    assert [each() is None for each in held] == [True] * len(held)


def test_prompt_without_memory_leaves_its_session_evictable(demo_model_f32, prefill, monkeypatch):
    decoded_alone(demo_model_f32, prefill("Which?"))

    def full(*_):
        raise OutOfMemoryError("full")

    monkeypatch.setattr("ov_mllama.runtime.model.evict_for", full)
    with pytest.raises(OutOfMemoryError):
        prefill("Which?").step()
    demo_model_f32.sessions.forget()
    assert not len(demo_model_f32.sessions)
