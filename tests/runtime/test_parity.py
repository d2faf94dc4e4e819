"""The converted model against transformers at f32: logits within 1e-3 and the same tokens, whatever goes in."""

from functools import cache

import pytest
import torch

from conftest import CASES

ATOL = 1e-3
GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)


def both(pair, inputs, **kwargs):
    return pair.hf.generate(**inputs, **kwargs), pair.ov.generate(**inputs, **kwargs)


@cache
def expected_logits(pair, case: str) -> torch.Tensor:
    with torch.no_grad():
        return pair.hf(**pair.inputs(case)).logits


@cache
def expected_tokens(pair, case: str) -> list[list[int]]:
    return pair.hf.generate(**pair.inputs(case), **GREEDY).tolist()


@pytest.mark.parametrize("case", CASES)
def test_logits(any_pair, case):
    inputs = any_pair.inputs(case)
    actual = any_pair.ov(**inputs).logits
    real = inputs["attention_mask"].bool()  # transformers computes padding rows too; nobody reads them
    torch.testing.assert_close(actual[real], expected_logits(any_pair, case)[real], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_greedy(any_pair, case):
    actual = any_pair.ov.generate(**any_pair.inputs(case), **GREEDY)
    assert actual.tolist() == expected_tokens(any_pair, case)


@pytest.mark.parametrize("case", CASES)
def test_a_long_prompt_is_computed_in_steps(any_pair, case, monkeypatch):
    monkeypatch.setattr("ov_mllama.runtime.language.PREFILL_TOKENS", 5)
    any_pair.ov.forget()  # or an earlier call's tokens are reused, and a step computes few
    test_logits(any_pair, case)
    any_pair.ov.forget()
    test_greedy(any_pair, case)
    any_pair.ov.forget()
    inputs = any_pair.inputs(case)
    last, real = any_pair.ov(**inputs, logits_to_keep=7).logits, inputs["attention_mask"][:, -7:].bool()
    monkeypatch.undo()
    any_pair.ov.forget()
    at_once = any_pair.ov(**inputs, logits_to_keep=7).logits
    torch.testing.assert_close(last[real], at_once[real], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["large", "text only", "padded text only", "mixed batch", "chat"])
def test_beams(any_pair, case):
    kwargs = dict(GREEDY, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    expected, actual = both(any_pair, any_pair.inputs(case), **kwargs)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["one tile", "mixed batch", "text only"])
def test_sampling_with_a_seed(any_pair, case):
    inputs, tokens = any_pair.inputs(case), []
    for model in (any_pair.hf, any_pair.ov):
        torch.manual_seed(7)
        tokens.append(
            model.generate(
                **inputs, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=20, num_return_sequences=2
            )
        )
    assert tokens[1].tolist() == tokens[0].tolist()


def test_calls_do_not_remember_each_other(any_pair):
    cases = ["wide", "text only", "mixed batch", "one tile", "wide"]
    for case in cases:
        actual = any_pair.ov.generate(**any_pair.inputs(case), **GREEDY)
        assert actual.tolist() == expected_tokens(any_pair, case), case


def test_the_comparison_sees_the_picture(any_pair):
    """Guards the suite itself: with closed gates every comparison above would hold without any picture."""
    inputs = any_pair.inputs("one tile")
    other = dict(inputs, pixel_values=inputs["pixel_values"].flip(-1))
    assert (any_pair.ov(**inputs).logits - any_pair.ov(**other).logits).abs().max() > 0.1


def test_default_precision_is_finite(any_pair):
    """bf16 where the CPU has it. openvino_notebooks#2442: NaN logits become "!!!!"."""
    from ov_mllama_helper import OVMLlamaForConditionalGeneration

    model = OVMLlamaForConditionalGeneration(any_pair.model_dir)
    for case in CASES:
        inputs = any_pair.inputs(case)
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        exact = any_pair.ov(**inputs).logits[inputs["attention_mask"].bool()]
        assert torch.isfinite(logits).all()
        assert (logits - exact).abs().mean() < 0.1 * exact.std(), case
