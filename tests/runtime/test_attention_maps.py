"""Heat maps of the cross-attention: transformers' weights, computed afterwards from queries and cached keys."""

import numpy as np
import openvino as ov
import pytest
import torch
from PIL import Image

from conftest import F32, demo_samples
from demo_model.scenes import draw, placed_scene, random_scene
from ov_mllama.runtime.attention_maps import (
    AnswerQueries,
    attention_weights,
    image_attention,
    in_image,
    peak_of,
    word_tokens,
)
from ov_mllama.runtime.checks import image_arrays
from ov_mllama.runtime.cross_attention import tiles_seen
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.prompts import load_processor, prompts_about
from ov_mllama.runtime.shapes import QUERIES
from ov_mllama.runtime.vision import ImageInputs

GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
IMAGE_CASES = ["one tile", "wide", "large", "two images", "images side by side", "chat"]


def recorded(model, inputs, **options) -> AnswerQueries:
    queries = AnswerQueries(inputs["input_ids"].shape[1])
    model.generate(**inputs, **{**GREEDY, **options}, queries=queries)
    return queries


def expected_weights(checkpoint, inputs, answer: list[int]) -> np.ndarray:
    """transformers' weights of the positions that predict the answer, f32 [layers, heads, tokens, all rows]."""
    from transformers import MllamaForConditionalGeneration

    hf = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    inputs, more = dict(inputs), len(answer) - 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    mask = inputs["cross_attention_mask"]
    inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].repeat(1, more, 1, 1)], 1)
    with torch.no_grad():
        attentions = hf.eval()(**inputs, output_attentions=True).attentions
    layers = hf.config.text_config.cross_attention_layers
    return np.stack([attentions[layer][0, :, -len(answer) :].numpy() for layer in layers])


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_weights_are_those_of_transformers(any_pair, case):
    inputs = any_pair.inputs(case)
    queries = recorded(any_pair.ov, inputs)
    expected = expected_weights(any_pair.checkpoint, inputs, queries.tokens)
    images = image_arrays(*(inputs[name] for name in ImageInputs._fields))
    seen = tiles_seen(images.cross_attention_mask, inputs["input_ids"].shape[1])[0, -1]
    encoded, asked = any_pair.ov.image_encoder.encode(images), queries.predicting(range(len(queries.tokens)))
    actual = attention_weights(asked, encoded, seen, any_pair.ov.shapes)
    by_tile = expected.reshape(*expected.shape[:3], len(seen), -1)
    assert by_tile[..., ~seen, :].max(initial=0) < 1e-6
    np.testing.assert_allclose(actual, by_tile[..., seen, :].reshape(actual.shape), atol=1e-3)
    np.testing.assert_allclose(actual.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(("case", "canvas", "size"), [("large", (2, 2), (2, 2, 4)), ("tall", (2, 1), (0.9, 2, 3))])
def test_map_is_the_mean_of_the_weights_of_patches(pair, case, canvas, size):
    inputs, image = pair.inputs(case), pair.picture(*size)
    queries = recorded(pair.ov, inputs)
    of_rows = expected_weights(pair.checkpoint, inputs, queries.tokens)[:, :, 1:4].mean((0, 1, 2))
    patches = of_rows.reshape(4, -1)[:, 1:]  # of each tile, behind its class token
    (heat,) = image_attention(pair.ov, inputs, queries, [1, 2, 3], [image])
    np.testing.assert_allclose(heat, in_image(patches, canvas, image.size, pair.tile), atol=1e-4)


def test_queries_do_not_depend_on_how_the_answer_was_computed(pair, monkeypatch):
    """The same with drafts, of which some are rejected, in chunks, or with all logits."""
    inputs = pair.inputs("large")
    plain = recorded(pair.ov, inputs, max_new_tokens=12)
    assert sorted(plain.rows) == [*range(-1, 11)]
    drafted = recorded(pair.ov, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    monkeypatch.setattr(pair.ov, "slice_lm_head", False)
    monkeypatch.setattr("ov_mllama.runtime.language.PREFILL_TOKENS", 3)
    pair.ov.forget()
    chunked = recorded(pair.ov, inputs, max_new_tokens=12)
    for other in (drafted, chunked):
        assert other.tokens == plain.tokens
        np.testing.assert_allclose(
            other.predicting(range(12)).astype(float), plain.predicting(range(12)).astype(float), atol=1e-2
        )


def test_only_one_row_is_recorded(pair):
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(InputError, match="2 rows"):
            recorded(pair.ov, pair.inputs("wide"), **options)
    assert recorded(pair.ov, pair.inputs("wide")).rows
    pair.ov.generate(**pair.inputs("wide"), **GREEDY)  # records nothing
    assert pair.ov._queries is None


def test_tiles_are_put_together_without_padding():
    tiles = np.zeros((4, 4), np.float32)  # of 2 x 2 patches
    tiles[2, 1] = 1  # the left tile of the second row, its right upper patch
    full = in_image(tiles, (2, 2), (80, 80), 40)
    assert full.shape == (80, 80)
    assert np.unravel_index(full.argmax(), full.shape)[0] in range(40, 60)
    assert np.unravel_index(full.argmax(), full.shape)[1] in range(20, 40)
    tiles[1, 1] = 2  # in the padding right of a tall image
    tall = in_image(tiles, (2, 2), (45, 90), 40)
    assert tall.shape == (80, 40)
    assert 0.9 < tall.max() <= 1
    small = in_image(tiles[:1] + 1, (1, 1), (10, 5), 40)  # enlarged to a tile's width
    assert small.shape == (20, 40)
    np.testing.assert_allclose(small, 1)


def test_peak_at_an_edge_is_the_centre_of_its_patch():
    tiles = np.zeros((1, 4), np.float32)
    tiles[0, 1] = 1
    y, x = peak_of(in_image(tiles, (1, 1), (40, 40), 40))
    assert (y, x) == (pytest.approx(9.5, abs=0.5), pytest.approx(29.5, abs=0.5))


def test_maps_of_several_images(pair):
    inputs, images = pair.inputs("two images"), [pair.picture(2, 1, 2), pair.picture(1, 1, 1)]
    queries = recorded(pair.ov, inputs)
    earlier, last = image_attention(pair.ov, inputs, queries, [0, 1], images)
    assert earlier is None  # the answer sees the last image only
    assert last.shape == (28, 28)
    inputs, images = pair.inputs("images side by side"), [pair.picture(1, 1, 1), pair.picture(0.9, 2, 3)]
    both = image_attention(pair.ov, inputs, recorded(pair.ov, inputs), [2], images)
    assert [each.shape for each in both] == [(28, 28), (56, 25)]
    assert image_attention(pair.ov, pair.inputs("text only"), queries, [0], []) == []


def test_evicted_images_are_encoded_again(pair, monkeypatch):
    inputs, image = pair.inputs("large"), pair.picture(2, 2, 4)
    queries = recorded(pair.ov, inputs)
    before = image_attention(pair.ov, inputs, queries, [1], [image])[0]
    pair.ov.forget()
    calls, infer = [], pair.ov.image_encoder._infer
    monkeypatch.setattr(pair.ov.image_encoder, "_infer", lambda *given: calls.append(1) or infer(*given))
    for _ in range(2):
        np.testing.assert_array_equal(image_attention(pair.ov, inputs, queries, [1], [image])[0], before)
    assert len(calls) == 1


@pytest.mark.parametrize("tokens", [[], [99], [-1]])
def test_tokens_that_were_not_recorded_are_refused(pair, tokens):
    inputs = pair.inputs("wide")
    with pytest.raises(InputError, match="indices from 0"):
        image_attention(pair.ov, inputs, recorded(pair.ov, inputs), tokens, [pair.picture(2, 1, 2)])


def test_model_of_an_earlier_version_answers_but_gives_no_queries(pair, copy):
    from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, parse_stamp, save_ir
    from ov_mllama_helper import OVMLlamaForConditionalGeneration

    path = copy / LANGUAGE_MODEL_NAME
    stamp, model = parse_stamp(path.read_text()), ov.Core().read_model(pair.model_dir / LANGUAGE_MODEL_NAME)
    model.remove_result(model.output(QUERIES).get_node())
    save_ir(model, path, stamp)
    earlier = OVMLlamaForConditionalGeneration(copy, ov_config=F32)
    inputs = pair.inputs("wide")
    assert earlier.generate(**inputs, **GREEDY).tolist() == pair.ov.generate(**inputs, **GREEDY).tolist()
    with pytest.raises(InputError, match=r"earlier version made it: delete it .*ov-mllama prepare"):
        recorded(earlier, inputs)


def test_words_and_their_tokens(processor):
    tokenizer = processor.tokenizer
    tokens = tokenizer("It's a purple star, é and 12.", add_special_tokens=False)["input_ids"]
    words = word_tokens(tokenizer, [*tokens, tokenizer.eos_token_id])
    assert [word for word, _ in words] == ["It's", "a", "purple", "star", "é", "and", "12"]
    for word, indices in words:
        assert word in tokenizer.decode([tokens[index] for index in indices])
    assert word_tokens(tokenizer, []) == []


def test_peak_is_on_the_shape_that_the_question_is_about(demo_model_f32, demo_dir):
    processor, rng, hits = load_processor(demo_dir), np.random.default_rng(38), []
    while len(hits) < 10:
        scene = random_scene(rng, 224, 224, held_out=True, makers=(placed_scene,))
        asked = [each for each in scene.questions if each[0] == "colour"]
        if len(scene.things) < 2 or not asked:
            continue
        (_, question, answer), image = asked[0], Image.fromarray(draw(scene, rng))
        thing = next(each for each in scene.things if f" {each.kind} is {each.colour}" in answer)
        inputs = prompts_about(processor, [{"image": image, "question": question}])
        queries = recorded(demo_model_f32, inputs, max_new_tokens=20, eos_token_id=processor.tokenizer.eos_token_id)
        word, tokens = word_tokens(processor.tokenizer, queries.tokens)[-1]
        assert word == thing.colour
        (heat,) = image_attention(demo_model_f32, inputs, queries, tokens, [image])
        y, x = peak_of(heat)
        half = thing.size / 2 * 224
        hits.append(abs(x - thing.x * 224) <= half and abs(y - thing.y * 224) <= half)
    assert sum(hits) >= 8


def test_sample_of_the_folder(demo_model_f32, demo_dir):
    """One that the processor resizes, with padding."""
    sample = demo_samples()[10]
    processor = load_processor(demo_dir)
    inputs = prompts_about(processor, [sample])
    (heat,) = image_attention(demo_model_f32, inputs, recorded(demo_model_f32, inputs), [2], [sample["image"]])
    assert heat.shape[1] / heat.shape[0] == pytest.approx(1.5, abs=0.02)
