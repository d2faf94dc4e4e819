"""Prompts computed in chunks: of any length, with any number of logits to keep, each time in a fresh state."""

import numpy as np
import pytest
import torch
from test_draft_model import save_llama

from conftest import F32
from ov_mllama.export.compress import make_draft_model
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.language import PREFILL_TOKENS
from ov_mllama.runtime.speculative import OVDraftModel

LENGTHS = (*range(120, 133), *range(250, 261))  # around one chunk and two
GREEDY = dict(do_sample=False, max_new_tokens=10, eos_token_id=None)


@pytest.fixture(scope="module")
def draft(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    llama = save_llama(folder / "llama", pair.processor.tokenizer, pair.ov.shapes.vocab_size)
    return OVDraftModel(make_draft_model(llama, folder / "ov"), ov_config=F32)


def random_ids(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(60, 200, (1, length))


@pytest.fixture(scope="module")
def expected(pair):
    """Logits of transformers for `random_ids` of each length."""
    with torch.no_grad():
        return {length: pair.hf(torch.tensor(random_ids(length))).logits[0].numpy() for length in LENGTHS}


@pytest.mark.torture
@pytest.mark.parametrize("length", LENGTHS)
def test_every_logits_to_keep_gives_as_many_right_logits(pair, expected, length, times):
    ends = {keep + near for keep in (1, PREFILL_TOKENS, length - PREFILL_TOKENS, length) for near in range(-3, 4)}
    every = range(1, length + 1)
    for keep in times(sorted(ends & {*every}), every):
        logits = pair.ov.language_model.session().prefill(Prompt(random_ids(length), logits_to_keep=keep))
        assert logits.shape[1] == keep
        np.testing.assert_allclose(logits[0], expected[length][-keep:], atol=1e-3)


@pytest.mark.torture
@pytest.mark.parametrize("length", LENGTHS)
def test_drafts_across_a_chunk_boundary_change_no_token(pair, draft, length, times):
    """Drafted tokens are checked together with the prompt, so that its last chunk may hold less than them."""
    text = torch.tensor(random_ids(length))
    text[:, -12:] = text[:, :12]  # something for prompt lookup to find
    tokens = pair.hf.generate(text, **GREEDY).tolist()
    for drafts in times((3 if length % 2 else 10,), range(3, 11)):
        pair.ov.forget()
        assert pair.ov.generate(text, **GREEDY, prompt_lookup_num_tokens=drafts).tolist() == tokens
        assert pair.ov.stats.drafted_tokens
        pair.ov.forget()
        draft.session.reset()
        draft.drafts = drafts
        assert pair.ov.generate(text, **GREEDY, assistant_model=draft).tolist() == tokens


@pytest.mark.torture
@pytest.mark.parametrize("case", ["text before image", "one tile", "mixed batch"])
@pytest.mark.parametrize("step", [1, 3, 5, 8])
def test_logits_to_keep_beside_images_and_padding(pair, case, step, times, monkeypatch):
    """Those of the last chunk and one more, and of all chunks but the first or a part of it; with --torture any."""
    monkeypatch.setattr("ov_mllama.runtime.language.PREFILL_TOKENS", step * len(pair.inputs(case)["input_ids"]))
    inputs = pair.inputs(case)
    with torch.no_grad():
        expected = pair.hf(**inputs).logits
    real = inputs["attention_mask"].bool()
    length = inputs["input_ids"].shape[1]
    every = range(1, length + 1)
    for keep in times(sorted({*every[: step + 1], *every[-step - 1 :]}), every):
        pair.ov.forget()
        logits = pair.ov(**inputs, logits_to_keep=keep).logits
        torch.testing.assert_close(logits[real[:, -keep:]], expected[:, -keep:][real[:, -keep:]], atol=1e-3, rtol=0)


def test_lengths_surround_the_chunks():
    """Guards the tests above: another PREFILL_TOKENS needs other lengths."""
    assert {PREFILL_TOKENS, 2 * PREFILL_TOKENS} < set(LENGTHS)
