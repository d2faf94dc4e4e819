"""Reuse, and computing ahead: a conversation's beginning, drafts of assisted decoding; and what it is said
to have cost. Each against a model that knows nothing of the calls before."""

import itertools
import random

import numpy as np
import pytest
import torch
from transformers.generation.candidate_generator import CandidateGenerator

from conftest import CASES, F32
from ov_mllama.runtime.kv_cache import OVCache
from ov_mllama.runtime.speculative import InVocabularyDrafts
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_llama

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
SINGLE = [case for case in CASES if "batch" not in case and "padded" not in case]


@pytest.fixture
def model(fresh_model):
    return fresh_model


def conversation(pair, pictures=1):
    """The processor's tensors for three questions in a row about the same pictures."""
    images = [pair.picture(2, 1, 2), pair.picture(1, 1, 1)][:pictures]
    messages = [{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": "What is it?"}]}]
    for answer, question in [("Noise.", "Sure?"), ("Very much so.", "Why?"), ("", "")]:
        text = pair.processor.apply_chat_template(messages, add_generation_prompt=True)
        yield pair.processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})


# ---- A conversation's beginning ----


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_a_follow_up_computes_only_what_is_new(pair, model, pictures):
    lengths = []
    for inputs in conversation(pair, pictures):
        expected = pair.hf.generate(**inputs, **GREEDY)
        assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()
        lengths.append(inputs["input_ids"].shape[1])
        if len(lengths) > 1:
            assert model.stats.reused_tokens >= lengths[-2]
            assert model.stats.images_cached == model.stats.images == pictures
    assert model.stats.prompt_tokens == lengths[-1]


@pytest.mark.parametrize("pictures", [1, 2])
def test_follow_up_encodes_nothing_although_the_image_cache_is_too_small(pair, model, pictures, monkeypatch):
    """The session holds the K/V of its images already, and with the 11B each would take a minute."""
    model.image_encoder.cache.max_bytes = 1
    encoded = []
    infer = model.image_encoder._infer
    monkeypatch.setattr(model.image_encoder, "_infer", lambda *given: encoded.append(1) or infer(*given))
    for inputs in conversation(pair, pictures):
        expected = pair.hf.generate(**inputs, **GREEDY)
        assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()
        assert len(encoded) == model.stats.images == pictures
    assert model.stats.images_cached == pictures


def test_follow_up_with_another_image_encodes_all_its_images(pair, model):
    """Text that sees other tiles than the session's last tokens reads K/V that the session does not hold."""
    model.image_encoder.cache.max_bytes = 1
    first = pair.inputs("wide")
    model.generate(**first, **GREEDY)
    text = "<|image|>what is it, and <|image|>this?"
    images = [pair.picture(2, 1, 2), pair.picture(1, 1, 1)]
    inputs = pair.processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    expected = pair.hf.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    assert model.stats.images_cached == 0


def test_the_logits_are_a_fresh_calls(pair, model):
    for inputs in conversation(pair):
        fresh = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)(**inputs, logits_to_keep=1)
        actual = model(**inputs, logits_to_keep=1)
        torch.testing.assert_close(actual.logits, fresh.logits, atol=1e-5, rtol=0)
    assert model.stats.reused_tokens > 0


def test_the_models_own_answer_is_reused_too(pair, model):
    inputs = next(conversation(pair))
    answer = model.generate(**inputs, **GREEDY)
    longer = dict(inputs, input_ids=torch.cat([answer, torch.tensor([[70, 71]])], 1))
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    expected = pair.hf.generate(**longer, **GREEDY)
    assert model.generate(**longer, **GREEDY).tolist() == expected.tolist()
    assert model.stats.reused_tokens == answer.shape[1] - 1  # the last token was never fed back


@pytest.mark.torture
def test_any_order_of_calls_gives_the_same(pair, model, times):
    """Every case after every other, so that each meets caches warm and cold; without --torture a third of that."""
    expected = {case: pair.hf.generate(**pair.inputs(case), **GREEDY).tolist() for case in CASES}
    order = [case for two in itertools.permutations(CASES, 2) for case in two]
    random.Random(0).shuffle(order)  # noqa: S311
    for case in order[:: times(3, 1)]:
        assert model.generate(**pair.inputs(case), **GREEDY).tolist() == expected[case], case


def test_the_same_words_about_another_picture_start_anew(pair, model):
    model.generate(**pair.inputs("wide"), **GREEDY)
    model.generate(**pair.inputs("tall"), **GREEDY)
    assert model.stats.reused_tokens == 0
    assert model.stats.images_cached == 0


def test_all_logits_are_computed_where_all_are_asked_for(pair, model):
    inputs = pair.inputs("chat")
    model.generate(**inputs, **GREEDY)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_forget(pair, model):
    inputs = pair.inputs("wide")
    expected = model.generate(**inputs, **GREEDY)
    model.forget()
    assert model.image_encoder.cache.nbytes == 0
    assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    assert model.stats.reused_tokens == model.stats.images_cached == 0


def test_a_state_mostly_of_hidden_columns_is_cleared(pair, model):
    inputs = pair.inputs("text only")
    length = inputs["input_ids"].shape[1]
    model.generate(**inputs, **dict(GREEDY, max_new_tokens=3 * length))
    model.generate(**inputs, **GREEDY)
    assert model.stats.reused_tokens == 0


def test_an_interrupted_step_is_not_built_on(pair, model, monkeypatch):
    inputs = pair.inputs("chat")
    expected = model.generate(**inputs, **GREEDY)

    def interrupted(*given):
        infer(*given)
        raise KeyboardInterrupt

    infer = model.language_model.infer
    monkeypatch.setattr(model.language_model, "infer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **GREEDY)
    monkeypatch.undo()
    assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    assert model.stats.reused_tokens == 0


@pytest.mark.parametrize(
    "options", [{"position_ids": torch.tensor([[300]])}, {"attention_mask": torch.tensor([[1, 0] + [1] * 17])}]
)
def test_a_step_computed_otherwise_is_nobodys_beginning(pair, model, options):
    """Positions or a mask of one's own: what follows the same tokens elsewhere was computed otherwise."""
    ids = pair.inputs("text only")["input_ids"]
    options = {name: value[:, : ids.shape[1] + 1] for name, value in options.items()}
    first = model(ids)
    model(torch.tensor([[70]]), past_key_values=first.past_key_values, **options)
    longer = torch.cat([ids, torch.tensor([[70, 71, 72]])], 1)
    with torch.no_grad():
        expected = pair.hf(longer, logits_to_keep=1).logits
    torch.testing.assert_close(model(longer, logits_to_keep=1).logits, expected, atol=1e-3, rtol=0)


# ---- Drafts ----


class Oracle(CandidateGenerator):
    """Drafts `count` tokens: those of `sequence`, each wrong where `wrong` says so for its place in the draft."""

    requires_model_outputs = False

    def __init__(self, sequence, count, wrong=()):
        self.sequence, self.count, self.wrong = sequence, count, wrong

    def get_candidates(self, input_ids, **kwargs):
        length = input_ids.shape[1]
        draft = self.sequence[:, length : min(length + self.count, self.sequence.shape[1] - 1)].clone()
        for place in self.wrong:
            draft[:, place : place + 1] += 1
        return torch.cat([input_ids, draft], 1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        pass


@pytest.mark.parametrize("case", SINGLE)
def test_prompt_lookup_gives_greedys_tokens(pair, model, case):
    inputs = pair.inputs(case)
    expected = pair.hf.generate(**inputs, **dict(GREEDY, max_new_tokens=40))
    for count in (1, 3, 8):
        actual = model.generate(**inputs, **dict(GREEDY, max_new_tokens=40), prompt_lookup_num_tokens=count)
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("wrong", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_drafts_right_and_wrong(pair, model, monkeypatch, wrong):
    inputs = pair.inputs("wide")
    expected = pair.hf.generate(**inputs, **GREEDY)
    monkeypatch.setattr(model, "_get_candidate_generator", lambda **_: Oracle(expected, 3, wrong))
    actual = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3)
    assert actual.tolist() == expected.tolist()
    assert model.stats.new_tokens == 12
    if not wrong:
        assert (model.stats.drafted_tokens, model.stats.accepted_tokens) == (9, 9)
        assert len(model.llm_infer_time) == 3
    if wrong == (0, 1, 2):
        assert model.stats.accepted_tokens == 0


def test_wrong_drafts_become_rare(pair, model, monkeypatch):
    inputs, kwargs = pair.inputs("wide"), dict(GREEDY, max_new_tokens=40)
    expected = pair.hf.generate(**inputs, **kwargs)
    drafts = InVocabularyDrafts(Oracle(expected, 3, (0, 1, 2)), model.shapes.vocab_size, back_off=True)
    monkeypatch.setattr(model, "_get_candidate_generator", lambda **_: drafts)
    assert model.generate(**inputs, **kwargs, prompt_lookup_num_tokens=3).tolist() == expected.tolist()
    assert model.stats.drafted_tokens == 5 * 3  # in steps 1, 3, 7, 15 and 31
    drafts.drafts.wrong, drafts.remaining = (), 0
    model.generate(**inputs, **kwargs, prompt_lookup_num_tokens=3)
    assert model.stats.accepted_tokens == model.stats.drafted_tokens == 30  # ten steps of four tokens


def test_a_conversation_with_drafts(pair, model):
    for inputs in conversation(pair):
        expected = pair.hf.generate(**inputs, **GREEDY)
        assert model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3).tolist() == expected.tolist()
    assert model.stats.reused_tokens > 0


@pytest.mark.parametrize("case", ["one tile", "two images", "text only"])
def test_assistant_model_gives_greedys_tokens(pair, model, case):
    inputs = pair.inputs(case)
    expected = pair.hf.generate(**inputs, **GREEDY)
    helper = make_llama(model.shapes.vocab_size)
    assert model.generate(**inputs, **GREEDY, assistant_model=helper).tolist() == expected.tolist()
    assert model.stats.drafted_tokens > 0


# ---- The cache alone ----


def test_hidden_columns_follow_what_was_taken_back():
    """Against a list kept by hand, over random appends and crops."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        cache, held, serial = OVCache(), [], itertools.count()
        for _ in range(10):
            query = int(generator.integers(1, 5))
            new = [next(serial) for _ in range(query)]
            cache.append(np.array([new]))
            held += new
            taken = int(generator.integers(0, query + 1))
            cache.crop(-taken)
            held = held[: len(held) - taken]
        assert cache.tokens == cache.positions == held  # a token's serial number is its column
        assert cache.get_seq_length() == len(held)
        mask = cache.hide(np.ones((1, len(held) + 2), np.int64))
        assert mask[0].nonzero()[0].tolist() == [*held, cache.num_slots, cache.num_slots + 1]


def test_crop_takes_no_more_than_there_is():
    cache = OVCache()
    cache.append(np.array([[1, 2, 3]]))
    cache.crop(-5)
    assert cache.tokens == cache.positions == []


def test_rows_chosen_twice_before_a_step_are_composed():
    cache = OVCache()
    cache.batch, cache.last_seen, cache.image_keys = 3, np.zeros((3, 1, 0), bool), [(), (), ()]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 4, 1, 0, 2, 3]))
    cache.reorder_cache(torch.tensor([1, 0, 0, 0, 0, 0]))
    assert cache.beam_idx.tolist() == [2, 2, 2, 2, 2, 2]
    cache.batch_select_indices(torch.tensor([0]))
    assert (cache.beam_idx.tolist(), cache.batch) == ([2], 1)


def test_crop_takes_negative_numbers_only():
    with pytest.raises(ValueError, match="negative"):
        OVCache().crop(3)


# ---- Statistics ----


def test_stats_agree_with_the_times(pair, model):
    output = model.generate(**pair.inputs("two images"), **GREEDY)
    stats = model.stats
    assert stats.new_tokens == 12
    assert stats.prompt_tokens == output.shape[1] - 12
    assert (stats.images, stats.images_cached) == (2, 0)
    assert stats.first_token_s == sum(model.vision_encoder_infer_time) + model.llm_infer_time[0]
    assert stats.step_s == model.llm_infer_time[1:]
    assert stats.tokens_per_s == pytest.approx(11 / sum(stats.step_s))
    assert stats.load_s > 0
    assert stats.warm_up_s > 0
    assert stats.peak_gb is None or 0.1 < stats.peak_gb < 100
    numbers = stats.to_dict()
    assert numbers["new_tokens"] == 12
    assert numbers["accepted_tokens"] == 0
    assert len(numbers["step_s"]) == 11
    line = str(stats)
    assert "\n" not in line
    assert "2 pictures" in line
    assert "12 generated" in line


def test_stats_of_drafts_do_not_depend_on_the_head(pair):
    counted = []
    for sliced in (True, False):
        model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, slice_lm_head=sliced)
        model.generate(**pair.inputs("chat"), **GREEDY, prompt_lookup_num_tokens=3)
        stats = model.stats
        counted.append((stats.prompt_tokens, stats.new_tokens, stats.drafted_tokens, stats.rejected_tokens))
    assert counted[0] == counted[1]
    assert counted[0][:2] == (pair.inputs("chat")["input_ids"].shape[1], 12)


def test_stats_before_anything_was_asked(model):
    assert model.stats.new_tokens == 0
    assert str(model.stats)
