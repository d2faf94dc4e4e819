"""Properties over generated inputs (hypothesis), each against a slower and simpler way to the same."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from transformers import MllamaForConditionalGeneration

from notebook_utils import follow
from ov_mllama.chat.answers import to_messages
from ov_mllama.chat.turns import Turn
from ov_mllama.export.settings import GROUP_SIZES, INT4, Settings
from ov_mllama.runtime.cross_attention import take_tiles, tiles_seen, visible_kv
from ov_mllama.runtime.prompts import escape_special_tokens
from ov_mllama.runtime.shapes import MASKED, MllamaShapes
from ov_mllama.runtime.vision import Encoded
from ov_mllama_helper import OVMLlamaForConditionalGeneration, convert_mllama

pytestmark = pytest.mark.torture
EXAMPLES = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHAPES = MllamaShapes(4, 3, 4, 2, 4, (0,), (1,), 10, 18, 512)  # three rows a tile


@pytest.fixture
def run(times, tally):
    """`run(test, short, long)`: tries a hypothesis test on so many examples, without and with --torture."""

    def run(test, short, long):
        tried = []
        settings(max_examples=times(short, long), **EXAMPLES)(
            given(st.data())(lambda data: (tried.append(1), test(data.draw))[0])
        )()
        tally("generated examples", len(tried))

    return run


# ---- Masks and tiles ----


def attention(query, key, value, bias):
    """Plain softmax attention: query [batch, heads, query, dim], key [.., dim, rows], value [.., rows, dim]."""
    scores = query @ key + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ value


def test_a_restricted_view_attends_as_the_whole(run):
    def test(draw):
        batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 5))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        kv_batch = draw(st.sampled_from([1, batch]))
        # each column stands for one tile or several
        counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
        tiles, columns = sum(counts), len(counts)
        rows = columns * SHAPES.patches_per_tile
        mask = draw(arrays(bool, (batch, queries, tiles)))
        stands_for = np.repeat(np.eye(columns, dtype=bool), counts, axis=1)[None].repeat(kv_batch, 0)
        key = rng.standard_normal((kv_batch, 2, 4, rows)).astype(np.float32)
        value = rng.standard_normal((kv_batch, 2, rows, 4)).astype(np.float32)
        query = rng.standard_normal((batch, 2, queries, 4)).astype(np.float32)

        key_values = {"cross_attn_key_values.1.key": key, "cross_attn_key_values.1.value": value}
        view = visible_kv(Encoded(key_values, stands_for, [], 0), mask, SHAPES)
        seen = mask | ~mask.any(-1, keepdims=True)  # a token that may see nothing attends to everything
        bias = np.where(seen, 0, MASKED).astype(np.float32).repeat(SHAPES.patches_per_tile, -1)[:, None]
        every = np.repeat(
            np.arange(rows).reshape(columns, -1), counts, axis=0
        ).ravel()  # each tile with rows of its own
        expected = attention(query, key[..., every], value[:, :, every], bias)
        actual = attention(query, *view.key_values.values(), view.bias)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        assert np.array_equal(view.sees_image[..., 0] == 1, mask.any(-1))

    run(test, 50, 3000)


def test_tiles_are_taken_in_order(run):
    def test(draw):
        tiles = draw(arrays(bool, draw(st.integers(1, 8))).filter(np.any))
        patches = draw(st.integers(1, 5))
        rows = np.arange(len(tiles) * patches)
        expected = [row for row in rows if tiles[row // patches]]
        key = np.broadcast_to(rows, (1, 2, 4, len(rows)))
        assert take_tiles("x.key", key, tiles)[0, 1, 3].tolist() == expected
        assert take_tiles("x.value", key.swapaxes(2, 3), tiles)[0, 1, :, 2].tolist() == expected

    run(test, 50, 3000)


def test_later_tokens_see_what_the_last_one_does(run):
    def test(draw):
        mask = draw(arrays(np.int64, array_shapes(min_dims=4, max_dims=4, max_side=4), elements=st.integers(0, 1)))
        length = draw(st.integers(1, 8))
        seen = tiles_seen(mask, length)
        for token in range(length):
            source = mask[:, min(token, mask.shape[1] - 1)]
            assert np.array_equal(seen[:, token], source.reshape(len(mask), -1) == 1)

    run(test, 50, 3000)


# ---- A conversation's beginning ----


def test_any_prompts_in_any_order_answer_as_a_fresh_model(run, pair):
    """Prompts over three letters, so that they often begin alike, about two pictures or none."""
    warm = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config={"EXECUTION_MODE_HINT": "ACCURACY"})
    pictures = [None, [pair.picture(1, 1, 1)], [pair.picture(2, 1, 2)]]
    reused = []

    def test(draw):
        for _ in range(draw(st.integers(1, 4))):
            images = pictures[draw(st.integers(0, 2))]
            text = "<|image|>" * bool(images) + draw(st.text("abc", min_size=1, max_size=12))
            inputs = pair.processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
            pair.ov.forget()
            expected = pair.ov(**inputs, logits_to_keep=1).logits
            actual = warm(**inputs, logits_to_keep=1).logits
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
            reused.append(warm.stats.reused_tokens)

    run(test, 12, 1000)
    assert sum(number > 0 for number in reused) > len(reused) / 20  # else nothing was tested


@pytest.mark.parametrize("reference", ["meta", "transformers"])
def test_any_calls_in_any_order_give_pytorchs_logits_and_tokens(pair, tmp_path, times, tally, monkeypatch, reference):
    """Texts before, between and behind images; chunks, drafts and image caches of any size; other images."""
    folder = convert_mllama(pair.checkpoint, tmp_path / "ov", reference=reference)
    model = OVMLlamaForConditionalGeneration(folder, ov_config={"EXECUTION_MODE_HINT": "ACCURACY"})
    original = MllamaForConditionalGeneration.from_pretrained(pair.checkpoint, dtype=torch.float32).eval()
    original, rng = follow(original, model.reference), random.Random(11)  # noqa: S311
    pictures = [pair.picture(1, 1, 1), pair.picture(2, 1, 2), pair.picture(0.9, 2, 3), pair.picture(1.8, 1, 9)]
    reused, wrong, tried = 0, [], times(60, 3000)
    for _ in range(tried):
        model.image_encoder.cache.max_bytes = rng.choice([1, 10**9])
        monkeypatch.setattr("ov_mllama.runtime.language.PREFILL_TOKENS", rng.choice([3, 5, 128]))
        images = rng.choices(pictures, k=rng.choice([0, 1, 1, 1, 2]))
        text = "a" * rng.choice([0, 4, 8, 8]) + "".join("<|image|>" + "b" * rng.choice([1, 3, 6]) for _ in images)
        inputs = pair.processor(
            text=text or "a", images=[images] if images else None, return_tensors="pt", add_special_tokens=False
        )
        if rng.random() < 0.5:
            keep = rng.randint(1, inputs["input_ids"].shape[1])
            with torch.no_grad():
                expected = original(**inputs).logits[:, -keep:]
            right = torch.allclose(model(**inputs, logits_to_keep=keep).logits, expected, atol=1e-3)
        else:
            greedy = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
            drafts = rng.choice([{}, {"prompt_lookup_num_tokens": rng.randint(2, 5)}])
            expected = original.generate(**inputs, **greedy)
            right = torch.equal(model.generate(**inputs, **greedy, **drafts), expected)
        reused += model.stats.reused_tokens > 0
        wrong += [text] * (not right)
    assert reused > tried / 20  # else nothing was tested
    tally("calls in any order", tried, wrong)


# ---- File names ----


def some_settings(draw) -> Settings:
    algo = draw(st.sampled_from([*INT4, "int8_asym"]))
    flag = st.booleans() if algo in INT4 else st.just(False)
    return Settings(
        algo=algo,
        ratio=draw(st.integers(0, 10)) / 10 if algo in INT4 else 1.0,
        sm=draw(st.sampled_from([None, "hessian_input_activation", "max_activation_variance"])),
        awq=draw(flag),
        scale_estimation=draw(flag),
        lora=draw(flag),
        gptq=draw(flag),
        group_size=draw(st.sampled_from(GROUP_SIZES)) if algo in INT4 else -1,
        all_layers=draw(flag),
        dataset_size=0,
        int8_layers=tuple(draw(st.lists(st.sampled_from(["cross_attn.o_proj", "mlp.down_proj"]), unique=True))),
    )


def test_other_settings_have_another_file_name(run):
    def test(draw):
        one, other = some_settings(draw), some_settings(draw)
        assert (one.file_name == other.file_name) == (one == other)
        assert one.file_name.endswith(".xml")
        assert "/" not in one.file_name
        assert one.file_name.isascii()

    run(test, 150, 20_000)


# ---- The page's history ----


def test_any_history_becomes_a_conversation(run):
    pictures_of = st.lists(st.integers(0, 9).map(lambda number: Path(f"{number}.png")), max_size=3)
    turn = st.builds(Turn, st.text(max_size=5), pictures_of, st.text(max_size=5))

    def test(draw):
        before, files = draw(st.lists(turn, max_size=8)), draw(pictures_of)
        question, system = "?" + draw(st.text(max_size=5)), draw(st.text(max_size=3))
        messages, pictures = to_messages([*before, Turn(question, files)], system)
        images = [part for message in messages for part in message["content"] if part["type"] == "image"]
        assert len(images) == len(pictures)
        assert pictures[len(pictures) - len(files) :] == files
        roles = [message["role"] for message in messages]
        assert roles[0] == "system" if system.strip() else "system" not in roles
        turns = [role for role in roles if role != "system"]
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        assert len(turns) == 2 * sum(bool(turn.answer) for turn in before) + 1
        assert messages[-1]["content"][-1] == {"type": "text", "text": escape_special_tokens(question.strip())}

    run(test, 100, 5000)
