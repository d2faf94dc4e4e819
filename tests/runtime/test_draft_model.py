"""A draft model changes no token of an answer, guesses as transformers would, and is asked only while that pays."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import ov_mllama.export.compress
from conftest import CASES, DEMO, F32
from demo_model.evaluate import heldout_samples
from ov_mllama.export.compress import make_draft_model
from ov_mllama.export.settings import Settings
from ov_mllama.runtime import speculative
from ov_mllama.runtime.prompts import prompts_about
from ov_mllama.runtime.speculative import STEP, STEP_WITHOUT_VNNI, TOKENS, DraftLengthPolicy, OVDraftModel
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_llama

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
SINGLE = [case for case in CASES if "batch" not in case and "padded" not in case]


def save_llama(folder, tokenizer, vocab_size, seed=0):
    """A random text-only Llama in 16 bit, its head tied to its embedding as the real 1B's is."""
    settings = {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
    model = make_llama(vocab_size, seed, tie_word_embeddings=True, **settings).half()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(pair, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "small", pair.processor.tokenizer, pair.ov.shapes.vocab_size)


@pytest.fixture(scope="module")
def draft_dir(checkpoint):
    return make_draft_model(checkpoint, checkpoint.parent / "draft")


@pytest.fixture(scope="module")
def one_draft(draft_dir):
    return OVDraftModel(draft_dir, ov_config=F32)


@pytest.fixture
def draft(one_draft):
    """One that has seen nothing yet."""
    one_draft.session.reset()
    one_draft.schedule, one_draft.drafts = DraftLengthPolicy(), None
    return one_draft


@pytest.mark.parametrize("case", SINGLE)
def test_no_token_changes(any_pair, draft, case):
    inputs = any_pair.inputs(case)
    expected = any_pair.hf.generate(**inputs, **GREEDY)
    for draft.drafts in (3, 3, None):  # the second time it has something to go on with
        actual = any_pair.ov.generate(**inputs, **GREEDY, assistant_model=draft)
        assert actual.tolist() == expected.tolist()
        assert any_pair.ov.stats.drafted_tokens > 0 or draft.drafts is None
        assert any_pair.ov.stats.new_tokens == 12


def test_it_guesses_as_transformers_does(checkpoint, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(ov_mllama.export.compress, "compress_weights", lambda model, _: model)
    exact = OVDraftModel(make_draft_model(checkpoint, tmp_path / "exact"), ov_config=F32)
    original = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    text = rng.integers(60, 200, 9)
    for _ in range(6):  # as after steps in which some guesses were right, some not
        expected = original.generate(torch.tensor(text[None]), do_sample=False, max_new_tokens=4, eos_token_id=None)
        assert exact.draft_tokens(text, 4) == expected[0, len(text) :].tolist()
        right = int(rng.integers(0, 4))
        text = np.array([*expected[0, : len(text) + right].tolist(), int(rng.integers(60, 200))])
    assert exact.session.cache.stats.reused_tokens > 0


class Knowing(OVDraftModel):
    """Knows the answer and gives it, or never does."""

    def knows(self, answer, right=True):
        self.answer, self.right = answer[0].numpy(), right
        return self

    def draft_tokens(self, tokens, count, ends=frozenset()):
        guessed = self.answer[len(tokens) :][:count]
        return list(guessed if self.right else (guessed + 1) % self.vocab_size)


@pytest.mark.parametrize("right", [True, False])
def test_how_many_are_drafted_follows_what_was_right(pair, draft_dir, right, monkeypatch):
    inputs, kwargs = pair.inputs("text only"), dict(GREEDY, max_new_tokens=60)
    expected = pair.hf.generate(**inputs, **kwargs)
    helper = Knowing(draft_dir).knows(expected, right)
    # the tiny model's own times say nothing: as on the 11B, a guess costs a fifth of a step
    update = helper.schedule.update
    monkeypatch.setattr(
        helper.schedule, "update", lambda drafted, accepted, *_: update(drafted, accepted, drafted / 5, 1.0)
    )
    assert pair.ov.generate(**inputs, **kwargs, assistant_model=helper).tolist() == expected.tolist()
    stats = pair.ov.stats
    if right:
        assert stats.rejected_tokens == 0
        assert len(stats.step_s) < 60 / 3
    else:
        assert stats.accepted_tokens == 0
        assert stats.drafted_tokens <= 6
        assert helper.schedule.pause >= 32


def test_a_draft_that_never_hits_costs_a_twentieth():
    schedule, extra, steps = DraftLengthPolicy(), 0.0, 0
    for limit in (32, 200):
        while steps < limit:
            drafted = schedule.count()
            steps += 1
            if drafted:
                step = np.interp(drafted + 1, TOKENS, STEP)
                extra += step - 1 + 0.155 * drafted  # a guess of a 1B beside a step of the 11B, both in INT4
                schedule.update(drafted, 0, 0.155 * drafted, step)
        assert extra / steps <= 0.05, steps


def test_without_vnni_drafts_pay_only_where_most_are_right():
    """A step of four tokens takes 2.3 times one's there, and 1.4 with VNNI."""
    counts = {}
    for step in (STEP, STEP_WITHOUT_VNNI):
        policy = DraftLengthPolicy(step)
        for number in range(100):  # two of five are right
            policy.update(1, number % 5 % 2, 0.155, step[1])
        counts[step] = max(map(policy.gain, range(1, 9)))
    assert counts[STEP_WITHOUT_VNNI] < 1 < counts[STEP]


def test_more_are_drafted_the_more_are_right():
    schedule, counts = DraftLengthPolicy(), []
    for right in (0.3, 0.6, 0.9, 0.99):
        schedule.acceptance_rate, schedule.cost = right, 0.155
        counts.append(schedule.count())
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == DraftLengthPolicy.MAX_DRAFT_TOKENS


def test_a_slow_draft_is_not_asked(draft):
    schedule = draft.schedule
    for _ in range(150):
        drafted = schedule.count()
        if drafted:
            schedule.update(drafted, drafted, seconds=2.0 * drafted, step_seconds=1.0)  # slower than the large model
    assert schedule.pause == 64


def test_answers_end_where_they_would_end(pair, draft):
    inputs = pair.inputs("chat")
    plain = pair.hf.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    end = int(plain[0, -5])
    for kwargs in (dict(max_new_tokens=1), dict(max_new_tokens=2), dict(max_new_tokens=12, eos_token_id=end)):
        kwargs = {"do_sample": False, "eos_token_id": None, **kwargs}
        expected = pair.hf.generate(**inputs, **kwargs)
        assert pair.ov.generate(**inputs, **kwargs, assistant_model=draft).tolist() == expected.tolist()


def test_an_end_that_is_guessed_right_counts_as_right(pair, draft_dir):
    inputs = pair.inputs("text only")
    plain = pair.hf.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=None)
    asked, new = inputs["input_ids"].shape[1], plain[0, inputs["input_ids"].shape[1] :].tolist()
    ends_at = next(i for i in range(5, 40) if new[i] not in new[:i])
    helper, noted = Knowing(draft_dir).knows(plain), []
    helper.drafts = 3
    helper.schedule.update = lambda drafted, right, *_: noted.append((drafted, right))
    output = pair.ov.generate(
        **inputs, do_sample=False, max_new_tokens=40, eos_token_id=new[ends_at], assistant_model=helper
    )
    assert output.shape[1] == asked + ends_at + 1
    last = (ends_at + 1) % 4  # of four tokens a step, the answer's last step has so many
    assert noted[-1][1] == (last or 3)
    assert all(right == drafted for drafted, right in noted[:-1])


def test_nothing_but_a_picture_is_no_text_to_go_on_with(pair, draft_dir):
    draft, inputs = OVDraftModel(draft_dir, drafts=2), dict(pair.inputs("one tile"))
    inputs["input_ids"] = torch.tensor([[pair.ov.config.image_token_index]])
    inputs["attention_mask"] = inputs["attention_mask"][:, :1]
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"][:, -1:]
    expected = pair.hf.generate(**inputs, **GREEDY)
    assert pair.ov.generate(**inputs, **GREEDY, assistant_model=draft).tolist() == expected.tolist()


def test_other_settings_make_another(checkpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    for settings in (Settings(), Settings(ratio=0.5), Settings(ratio=0.5)):
        make_draft_model(checkpoint, tmp_path / "draft", settings)
    assert caplog.text.count("already exists") == 1
    with pytest.raises(ValueError, match="without data"):
        make_draft_model(checkpoint, tmp_path / "draft", Settings(dataset_size=2, sm="max_activation_variance"))


def test_reading_the_prompt_counts_to_the_first_token(pair, draft_dir, monkeypatch):
    draft = OVDraftModel(draft_dir, drafts=2)
    guess, took = draft.draft_tokens, []
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: sum(took)))

    def guessing(*arguments):
        took.append(0.01 if took else 0.5)
        return guess(*arguments)

    draft.draft_tokens = guessing
    pair.ov.generate(**pair.inputs("one tile"), **GREEDY, assistant_model=draft)
    stats = pair.ov.stats
    assert stats.draft_prompt_s == 0.5
    assert stats.first_token_s == pytest.approx(stats.vision_s + stats.draft_prompt_s + stats.prefill_s)
    assert stats.draft_s == pytest.approx(sum(took[1:]))
    assert len(took) > 2


@pytest.mark.torture
def test_drafts_change_no_chance_of_a_sampled_answer(pair, draft_dir, times):
    """Answers of two tokens, beside what transformers finds each pair's chance to be. The likeliest are guessed."""
    count = times(200, 400)
    inputs, asked = pair.inputs("text only"), pair.inputs("text only")["input_ids"].shape[1]
    helper = Knowing(draft_dir).knows(pair.hf.generate(**inputs, **GREEDY))
    helper.drafts = 2
    sampling = {"do_sample": True, "top_k": 3, "temperature": 2.0, "max_new_tokens": 2, "eos_token_id": None}
    torch.manual_seed(0)
    answers = Counter(
        tuple(pair.ov.generate(**inputs, **sampling, assistant_model=helper)[0, asked:].tolist()) for _ in range(count)
    )

    def chances(*after: int):
        ids = torch.cat([inputs["input_ids"], torch.tensor([after], dtype=torch.long)], 1)
        likeliest = (pair.hf(input_ids=ids).logits[0, -1] / 2).topk(3)
        return zip(likeliest.indices.tolist(), likeliest.values.softmax(-1).tolist(), strict=True)

    expected = {(first, second): p * q for first, p in chances() for second, q in chances(first)}
    assert answers.keys() <= expected.keys()
    for answer, chance in expected.items():
        assert abs(answers[answer] / count - chance) < 4 * (chance * (1 - chance) / count) ** 0.5
    guessed = tuple(helper.answer[asked:][:2].tolist())
    assert 0.02 < expected[guessed] < 0.9


def test_another_vocabulary_is_refused(pair, tmp_path):
    other = save_llama(tmp_path / "other", pair.processor.tokenizer, pair.ov.shapes.vocab_size + 8)
    helper = OVDraftModel(make_draft_model(other, tmp_path / "draft"))
    asked = {**pair.inputs("one tile"), **GREEDY, "assistant_model": helper}
    with pytest.raises(ValueError, match="different tokenizers"):  # transformers' own, which advises to give both
        pair.ov.generate(**asked)
    asked |= dict.fromkeys(("tokenizer", "assistant_tokenizer"), pair.processor.tokenizer)
    with pytest.raises(ValueError, match="needs the same tokenizer"):
        pair.ov.generate(**asked)


def test_only_a_llama_is_taken(pair, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is a 'mllama' checkpoint; a draft model is a Llama for text"):
        make_draft_model(pair.checkpoint, tmp_path)
    with pytest.raises(ValueError, match="need calibration"):
        make_draft_model(checkpoint, tmp_path, Settings(scale_estimation=True))
    with pytest.raises(FileNotFoundError, match="is missing"):
        OVDraftModel(pair.model_dir)


def test_it_is_made_once(draft_dir, checkpoint, caplog):
    caplog.set_level("INFO")
    before = (draft_dir / "openvino_draft_model.bin").stat()
    make_draft_model(checkpoint, draft_dir)
    assert (draft_dir / "openvino_draft_model.bin").stat().st_mtime_ns == before.st_mtime_ns
    assert "already exists" in caplog.text


def test_the_large_model_alone_goes_on_as_before(pair, draft):
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    inputs = pair.inputs("wide")
    expected = pair.hf.generate(**inputs, **GREEDY)
    for kwargs in ({"assistant_model": draft}, {}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(**inputs, **GREEDY, **kwargs).tolist() == expected.tolist()


@pytest.mark.torture
def test_the_demos_own_is_mostly_right(demo_model_f32, processor, tmp_path, times):
    """On held-out first questions, whose answers repeat nothing."""
    model, drafted, accepted = demo_model_f32, 0, 0
    own = OVDraftModel(make_draft_model(DEMO / "draft", tmp_path / "draft"), ov_config=F32, drafts=3)
    for sample in heldout_samples(times(15, 40)):
        inputs = prompts_about(processor, [sample])
        plain = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=60, assistant_model=own)
        assert output.tolist() == plain.tolist()
        drafted, accepted = drafted + model.stats.drafted_tokens, accepted + model.stats.accepted_tokens
    assert accepted > 0.4 * drafted > 0
