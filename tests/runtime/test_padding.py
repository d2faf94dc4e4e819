"""Empty tiles are computed once where they are alike, and one by one where they are not: the same numbers either way,
and transformers'."""

import numpy as np
import pytest
import torch
from transformers import MllamaForConditionalGeneration

from conftest import CHECKPOINTS, Pair
from demo_model.checkpoint import TILE_EMBEDDINGS, clear_padding_embeddings
from demo_model.train import keep_padding_alike
from ov_mllama.export.convert import padding_tiles_are_alike
from ov_mllama.runtime.ir import VISION_ENCODER_NAME, ir_stamp
from ov_mllama.runtime.vision import image_inputs

GREEDY = dict(do_sample=False, max_new_tokens=8, eos_token_id=None)
SIZES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2)}  # real tiles: (wide, high)


CHECKPOINTS["each-padding-tile"] = dict(CHECKPOINTS["gqa-llama3"], zero_padding=False, seed=4)


@pytest.fixture(scope="module", params=["gqa-llama3", "each-padding-tile"])
def kind(request, tmp_path_factory):
    """A checkpoint of each kind, both of four tiles."""
    if request.param == "gqa-llama3":
        return request.getfixturevalue("pair")
    return Pair(request.param, tmp_path_factory.mktemp("padding"))


@pytest.fixture
def computed(kind, monkeypatch):
    """A model that has seen nothing yet, and `tile_counts` of every image that it encodes."""
    model, counts = kind.ov, []
    model.forget()
    request = model.image_encoder._request

    class Counting:
        def __getattr__(self, name):
            return getattr(request, name)

        def start_async(self, inputs, share_inputs):
            counts.append(inputs["tile_counts"].tolist())
            return request.start_async(inputs, share_inputs=share_inputs)

    monkeypatch.setattr(model.image_encoder, "_request", Counting())
    return model, counts


def is_alike(kind) -> bool:
    return bool(CHECKPOINTS[kind.checkpoint.name].get("zero_padding"))


def inputs_of(kind, text, images):
    return kind.processor(
        text=text, images=images, padding=isinstance(text, list), return_tensors="pt", add_special_tokens=False
    )


def assert_equal(kind, model, inputs):
    with torch.no_grad():
        expected = kind.hf(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], atol=1e-3, rtol=0)
    assert model.generate(**inputs, **GREEDY).tolist() == kind.hf.generate(**inputs, **GREEDY).tolist()


@pytest.mark.parametrize("tiles", SIZES)
@pytest.mark.parametrize("text", ["<|image|>what is it", "words before <|image|>it"])
def test_every_number_of_tiles(kind, computed, tiles, text):
    model, counts = computed
    assert_equal(kind, model, inputs_of(kind, text, [kind.picture(*SIZES[tiles], seed=tiles)]))
    alike = [1] * tiles + [4 - tiles] * (tiles < 4)
    assert counts == [alike if is_alike(kind) else [1, 1, 1, 1]]


def test_images_of_all_sizes_in_a_batch_with_fill_up_images(kind, computed):
    model, counts = computed
    pictures = {tiles: kind.picture(*size, seed=tiles) for tiles, size in SIZES.items()}
    text = ["<|image|>a", "before <|image|>several <|image|>and <|image|>more", "x<|image|><|image|>"]
    inputs = inputs_of(kind, text, [[pictures[1]], [pictures[2], pictures[4], pictures[3]], [pictures[3], pictures[1]]])
    assert (inputs["aspect_ratio_ids"] == 0).any()  # the processor's fill-up images
    assert_equal(kind, model, inputs)
    alike = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 2], [1, 3], [1, 3]]  # four tiles, three, two, one, fill-up
    assert sorted(counts) == (alike if is_alike(kind) else [[1, 1, 1, 1]] * 5)


def test_tokens_that_are_shown_padding_tiles(kind, computed):
    """No processor's mask does that, and yet: each counts as often as it may be seen."""
    model, _ = computed
    inputs = dict(inputs_of(kind, "<|image|>what is it", [kind.picture(1, 1)]))
    mask = inputs["cross_attention_mask"].clone()
    mask[0, 3:, 0] = torch.tensor([1, 1, 0, 1])
    mask[0, 5:, 0] = torch.tensor([0, 1, 1, 1])
    assert_equal(kind, model, inputs | {"cross_attention_mask": mask})


def test_padding_that_is_not_empty_is_computed(kind, computed):
    """Pixels in padding tiles, or a mask that takes tiles of the canvas for padding: none stands for another then."""
    model, counts = computed
    inputs = dict(inputs_of(kind, "<|image|>what is it", [kind.picture(1, 1)]))
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 2] = torch.randn(pixels[0, 0, 2].shape)
    assert_equal(kind, model, inputs | {"pixel_values": pixels})
    wide = dict(inputs_of(kind, "<|image|>what is it", [kind.picture(2, 2)]))
    tile_mask = torch.tensor([[[1, 0, 0, 0]]])
    pixels = wide["pixel_values"].clone()
    pixels[:, :, 1:] = 0
    assert_equal(kind, model, wide | {"pixel_values": pixels, "aspect_ratio_mask": tile_mask})
    assert counts == [[1, 1, 1, 1]] * 2


def test_what_is_kept_of_an_image(kind, computed):
    model, _ = computed
    model(**inputs_of(kind, "<|image|>what is it", [kind.picture(1, 1)]))
    tile = 2 * 2 * 17 * 2 * 8 * 4  # two layers' keys and values, 17 rows, two heads of eight numbers in f32
    assert model.image_encoder.cache.nbytes == tile * (2 if is_alike(kind) else 4)


def test_the_converter_knows_which_kind_a_checkpoint_is(kind):
    assert padding_tiles_are_alike(kind.hf) is is_alike(kind)
    expected = "alike" if is_alike(kind) else "each"
    assert ir_stamp(kind.model_dir / VISION_ENCODER_NAME)["padding_tiles"] == expected


@pytest.mark.parametrize("table", TILE_EMBEDDINGS)
def test_one_number_in_one_padding_embedding_makes_the_difference(kind, table):
    if not is_alike(kind):
        pytest.skip("of the other kind")
    model = MllamaForConditionalGeneration.from_pretrained(kind.checkpoint, dtype=torch.float32)
    assert padding_tiles_are_alike(model)
    weights = model.state_dict()
    name = next(name for name in weights if name.endswith(table))
    with torch.no_grad():
        weights[name][1, -1] = 0.5  # the canvas of one tile, its last padding tile
    assert not padding_tiles_are_alike(model)


def test_counts():
    pixels = np.zeros((4, 3, 2, 2), np.float32)
    for real, expected in ((1, [1, 3]), (2, [1, 1, 2]), (3, [1, 1, 1, 1]), (4, [1, 1, 1, 1])):
        mask = np.arange(4) < real
        inputs = image_inputs(pixels, 1, mask, one_padding_tile=True)
        assert inputs["tile_counts"].tolist() == expected
        assert len(inputs["pixel_values"]) == len(expected)
        assert inputs["real_tiles"] == real
        assert image_inputs(pixels, 1, mask)["tile_counts"].tolist() == [1, 1, 1, 1]


def test_training_leaves_padding_alike(kind):
    """`demo_model.train` keeps the embeddings of padding tiles at zero while all others learn."""
    model = MllamaForConditionalGeneration.from_pretrained(kind.checkpoint, dtype=torch.float32)
    keep_padding_alike(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    for size in SIZES.values():
        inputs = inputs_of(kind, "<|image|>what is it", [kind.picture(*size)])
        model(**inputs).logits.square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    names = [name for name in after if name.endswith(TILE_EMBEDDINGS)]
    assert len(names) == 3
    for name in names:
        padding = torch.ones_like(before[name])
        clear_padding_embeddings({name: padding}, model.config)
        assert not after[name][padding == 0].any(), name
        assert (after[name] != before[name]).any(), name
