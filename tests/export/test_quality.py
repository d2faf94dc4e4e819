"""The price list: batches answer as single questions do, and a process that hangs or dies ends with a sentence."""

import os
import shutil
import time

import numpy as np
import pytest

from conftest import DEMO, F32
from demo_model.evaluate import heldout_samples
from ov_mllama.export import isolation, quality
from ov_mllama.export.quality import price_list
from ov_mllama.runtime.errors import UserError
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME
from ov_mllama.runtime.prompts import prompts_about
from ov_mllama_helper import OVMLlamaForConditionalGeneration


@pytest.fixture(scope="module")
def demo_ir(demo_dir, tmp_path_factory):
    return shutil.copytree(demo_dir, tmp_path_factory.mktemp("quality") / "ov")


@pytest.fixture(scope="module")
def samples():
    return list(heldout_samples(24, seed=3))


def test_batches_answer_as_one_by_one_in_f32(demo_ir, samples, processor, monkeypatch):
    model = OVMLlamaForConditionalGeneration(demo_ir, ov_config=F32)
    answers, scores = [], []
    for size in (1, 11):
        monkeypatch.setattr(quality, "BATCH", size)
        tokens, log_probs = [], []
        for batch in quality.batches(samples):
            prompts = prompts_about(processor, batch)
            tokens += quality.greedy(model, processor, prompts)
            log_probs += quality.score(model, processor, prompts, tokens[-len(batch) :])
        answers.append(tokens)
        scores.append(log_probs)
    assert answers[0] == answers[1]
    for one, many in zip(*scores, strict=True):
        np.testing.assert_allclose(one, many, atol=1e-3)
    for tokens, log_probs in zip(answers[0], scores[0], strict=True):
        assert log_probs.argmax(-1).tolist() == tokens  # along its own greedy answer the likeliest token comes next


def test_price_list_has_a_row_for_the_original_and_each_variant(demo_ir, samples):
    original, variant = price_list(DEMO, demo_ir, {"FP16": (LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME)}, samples)
    assert (original["variant"], variant["variant"]) == ("PyTorch f32", "FP16")
    assert original["kl"] == original["lost"] == original["won"] == 0
    assert variant["kl"] < 0.01
    assert variant["questions"] == len(samples)
    assert abs(variant["lost"] - variant["won"]) <= 1
    assert 0 < variant["next_token_ms"] < variant["first_token_ms"]


# ---- Processes ----


def count_up(count, report):
    for _ in range(count):
        report(2)
    return os.getpid()


def hang(report):
    time.sleep(600)


def die(report):
    os._exit(3)


def refuse(report):
    raise ValueError("a reason")


def run(function, *arguments, on_progress=print):
    return isolation.run_in_process(function, *arguments, on_progress=on_progress, preload=isolation.__name__)


def test_result_and_progress_come_from_another_process():
    progress = []
    assert run(count_up, 3, on_progress=progress.append) != os.getpid()
    assert progress == [2, 2, 2]
    with pytest.raises(ValueError, match="a reason"):
        run(refuse)


def test_hanging_process_is_ended(monkeypatch):
    monkeypatch.setattr(isolation, "SILENCE_TIMEOUT_S", 0.5)
    with pytest.raises(UserError, match="made no progress for 500 ms"):
        run(hang)


def test_dying_process_is_noticed():
    with pytest.raises(UserError, match="ended with exit code 3"):
        run(die)
