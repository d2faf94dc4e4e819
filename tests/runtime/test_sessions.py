"""Conversations side by side: each has its own KV cache, none changes another's tokens."""

import numpy as np
import pytest
import torch

from conftest import F32
from ov_mllama.export.convert import convert_language_model
from ov_mllama.runtime.ir import save_ir
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.language import OVLanguageModel
from ov_mllama.runtime.sessions import SessionPool
from ov_mllama.runtime.shapes import MllamaShapes
from tiny_mllama import make_llama

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)


@pytest.fixture
def model(fresh_model):
    return fresh_model


def greedy(session, prompt: Prompt, encoded, tokens: int):
    """A generator of the session's greedy tokens, one a step."""
    logits = session.prefill(prompt, encoded)
    for _ in range(tokens):
        token = logits[:, -1].argmax(-1)
        yield int(token[0])
        logits = session.decode(token[:, None])


def prompt_of(pair, model, case):
    """A session's arguments for the processor's tensors."""
    from ov_mllama.runtime.cross_attention import tiles_seen
    from ov_mllama.runtime.vision import ImageInputs, image_keys

    inputs = {name: tensor.numpy() for name, tensor in pair.inputs(case).items()}
    if "pixel_values" not in inputs:
        return Prompt(inputs["input_ids"]), None
    images = ImageInputs(*(inputs[name] for name in ImageInputs._fields))
    seen = tiles_seen(images.cross_attention_mask, inputs["input_ids"].shape[1])
    prompt = Prompt(inputs["input_ids"], seen=seen, image_keys=image_keys(images))
    return prompt, model.image_encoder.encode(images)


def test_two_sessions_interleaved_token_by_token(pair, model):
    cases, tokens = ("wide", "text before image", "text only"), 10
    expected = {
        case: pair.hf.generate(**pair.inputs(case), **dict(GREEDY, max_new_tokens=tokens))[0, -tokens:].tolist()
        for case in cases
    }
    running = {
        case: greedy(model.language_model.session(), *prompt_of(pair, model, case), tokens=tokens) for case in cases
    }
    actual = {case: [] for case in cases}
    for _ in range(tokens):
        for case, stream in running.items():
            actual[case].append(next(stream))
    assert actual == expected


def follow_up(pair, output, word: str):
    """The processor's tensors of a conversation with one more question."""
    inputs = dict(pair.inputs(word))
    more = torch.tensor([[70, 71, 72]])
    inputs["input_ids"] = torch.cat([output, more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def test_a_follow_up_in_either_conversation_reuses_its_own_beginning(pair, model):
    outputs = {case: model.generate(**pair.inputs(case), **GREEDY) for case in ("wide", "tall", "text only")}
    for case, output in outputs.items():
        longer = follow_up(pair, output, case)
        expected = pair.hf.generate(**longer, **GREEDY)
        assert model.generate(**longer, **GREEDY).tolist() == expected.tolist()
        assert model.stats.reused_tokens == output.shape[1] - 1, case
    assert len(model.sessions) == 3


def test_calls_of_the_model_do_not_disturb_a_generation(pair, model):
    """`generate` takes a session of its own: a processor that asks the model meanwhile changes nothing."""
    inputs, other = pair.inputs("wide"), pair.inputs("tall")
    expected = pair.hf.generate(**inputs, **GREEDY)
    asked = []

    def meddling(input_ids, scores):
        asked.append(model(**other).logits)
        return scores

    assert model.generate(**inputs, **GREEDY, logits_processor=[meddling]).tolist() == expected.tolist()
    with torch.no_grad():
        reference = pair.hf(**other).logits
    assert len(asked) == 12
    for logits in asked:
        torch.testing.assert_close(logits, reference, atol=1e-3, rtol=0)


def text(*ids):
    return Prompt(np.array([ids]))


def test_the_oldest_conversation_goes_first(model):
    column = model.language_model.token_bytes
    assert column == 2 * 3 * 2 * 8 * 4  # keys and values, three layers, two heads of eight numbers in f32
    sessions = SessionPool(model.language_model, cache_bytes=25 * column)
    taken = []
    for start in (10, 20, 30):
        session = sessions.acquire(text(*range(start, start + 10)))
        session.prefill(text(*range(start, start + 10)))
        taken.append(session)
        sessions.release()
    assert taken[2] is taken[0]
    assert taken[1] is not taken[0]
    assert sessions.held_bytes == 20 * column
    assert sessions.acquire(text(*range(20, 40))) is taken[1]  # whose beginning it is


def test_conversations_in_use_are_not_taken(model):
    sessions = SessionPool(model.language_model, cache_bytes=0)
    first, second = sessions.acquire(text(1, 2, 3)), sessions.acquire(text(1, 2, 3))
    assert first is not second
    for session in (first, second):
        session.prefill(text(1, 2, 3))
    sessions.release()
    assert len(sessions) == 1
    assert sessions.acquire(text(1, 2, 3, 4)) is second


def test_a_conversation_that_is_gone_on_with_is_used_last(pair, model):
    """By its cache, not by its words: it is neither dropped for others nor lent to them meanwhile."""
    column = model.language_model.token_bytes
    model.sessions.cache_bytes = 60 * column
    inputs, other = pair.inputs("text only"), torch.tensor([[65, 66, 67]])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    model.generate(other, **GREEDY)
    longer = torch.cat([first.sequences, torch.tensor([[70, 71]])], 1)
    asked = []

    def meddling(input_ids, scores):
        asked.append(model.generate(other + len(asked), **dict(GREEDY, max_new_tokens=2)))
        return scores

    again = model.generate(
        longer,
        attention_mask=torch.ones_like(longer),
        past_key_values=first.past_key_values,
        logits_processor=[meddling],
        return_dict_in_generate=True,
        **GREEDY,
    )
    expected = pair.hf.generate(longer, attention_mask=torch.ones_like(longer), **GREEDY)
    assert again.sequences.tolist() == expected.tolist()
    assert len(asked) == 12
    assert model.sessions._sessions[-1].cache is not None


def test_what_is_only_kept_makes_room(pair, model, monkeypatch):
    """A prompt is refused for want of memory only when nothing kept could be dropped for it."""
    for case in ("wide", "tall"):
        model.generate(**pair.inputs(case), **GREEDY)
    asked = []

    def refuse_once(*_):
        asked.append(model.image_encoder.cache.nbytes)
        if len(asked) == 1:
            raise MemoryError

    monkeypatch.setattr("ov_mllama.runtime.sessions.check_prompt_fits", refuse_once)
    inputs = pair.inputs("large")
    expected = pair.hf.generate(**inputs, **GREEDY)
    assert model.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    assert asked[0] > 0
    assert asked[1] == 0
    assert len(model.sessions) == 1


def test_growing_conversations_make_the_oldest_leave(pair, model):
    column = model.language_model.token_bytes
    tile = 2 * 2 * 17 * 2 * 8 * 4  # two layers' keys and values, 17 rows, two heads of eight numbers in f32
    room = model.sessions.cache_bytes = 70 * column + 4 * tile
    for case, tiles in (("wide", 2), ("tall", 2), ("text only", 0), ("large", 4)):
        output = model.generate(**pair.inputs(case), **GREEDY)
        held = column * (output.shape[1] - 1) + tile * tiles  # the last token was never fed back
        assert held <= model.sessions.held_bytes <= room
    assert 1 < len(model.sessions) < 4


def test_many_small_conversations_are_few_sessions(pair, model):
    for number in range(3 * SessionPool.MAX_SESSIONS):
        model.generate(torch.tensor([[65 + number, 66, 67]]), **dict(GREEDY, max_new_tokens=1))
    assert len(model.sessions) == SessionPool.MAX_SESSIONS


def test_without_cross_attention_layers_it_is_a_llama(tmp_path):
    """A draft model is that: traced, saved and run by the same code."""
    llama = make_llama(100, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, initializer_range=0.2)
    save_ir(convert_language_model(llama), tmp_path / "llama.xml", {"format": "16 bit"})
    shapes = MllamaShapes.from_config(llama.config)
    assert (shapes.cross_layers, shapes.self_layers, shapes.cross_kv_names) == ((), (0, 1, 2), [])
    session = OVLanguageModel(tmp_path / "llama.xml", shapes, ov_config=F32).session()
    ids = torch.randint(100, (1, 20))
    expected = llama.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None)[0, 20:].tolist()
    assert list(greedy(session, Prompt(ids.numpy()), None, 12)) == expected


def test_the_plugin_is_asked_nothing_while_another_thread_may_compute(pair, model, monkeypatch):
    """Beside an inference `get_property` waits for its end with the interpreter's lock: a chat stood still for 60 s."""

    def asked(*_):
        raise AssertionError("get_property beside an inference")

    monkeypatch.setattr("openvino.CompiledModel.get_property", asked)
    model.generate(**pair.inputs("two images"), **GREEDY)
    model.generate(**pair.inputs("chat"), **GREEDY)
