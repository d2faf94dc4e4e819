"""The checkpoint that is shipped: what it is, that it was tested on what it never saw, and that it answers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM, MllamaForConditionalGeneration

from conftest import DEMO, demo_samples
from demo_model.evaluate import ask, heldout_samples
from demo_model.scenes import TASKS, digit_drawings, draw, random_scene
from demo_model.train import SYSTEM, Batches, random_size, to_tiles
from demo_model.train_draft import conversations, loss_of, make_draft
from notebook_figures import show_price_list
from ov_mllama.export.quality import measure
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME
from ov_mllama.runtime.prompts import prompts_about
from ov_mllama_helper import OVMLlamaForConditionalGeneration


@pytest.fixture(scope="module")
def demo():
    return MllamaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout(times):
    count = times(100, 200)
    follow_ups = heldout_samples(count // 4, seed=2, follow_ups=True)
    return [*heldout_samples(count - count // 4, seed=1), *follow_ups]


@pytest.fixture(scope="module")
def exact_answers(demo_model_f32, processor, heldout):
    """The f32 model's to the held-out questions."""
    return answers_to(demo_model_f32, processor, heldout)


@pytest.fixture(scope="module")
def default_model(demo_dir):
    return OVMLlamaForConditionalGeneration(demo_dir)


def answers_to(model, processor, samples) -> list[str]:
    return [answer for i in range(0, len(samples), 50) for answer in ask(model, processor, samples[i : i + 50])]


# ---- What it is -----------------------------------------------------------------------------------------------------


def test_it_is_a_small_mllama_with_everything_the_real_one_has(demo, processor):
    text = demo.config.text_config
    assert sum(path.stat().st_size for path in DEMO.glob("*.safetensors")) < 10e6
    assert text.num_attention_heads > text.num_key_value_heads > 1
    assert len(text.cross_attention_layers) >= 2
    assert text.rope_parameters["rope_type"] == "llama3"
    assert len(demo.generation_config.eos_token_id) == 3
    assert processor.image_token_id == text.vocab_size == demo.lm_head.out_features
    assert processor.image_processor.max_image_tiles == 4


def test_chat_template_writes_llama_3_2_turns(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? "}]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    start, end, turn = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        f"<|begin_of_text|>{start}system{end}Be brief.{turn}{start}user{end}<|image|>What?{turn}"
        f"{start}assistant{end}That.{turn}{start}user{end}And?{turn}{start}assistant{end}"
    )


# ---- Trained on what users give it, tested on what it never saw -----------------------------------------------------


def test_training_makes_the_tiles_that_the_processor_makes(processor):
    rng, images = np.random.default_rng(0), processor.image_processor
    mean, std = (np.array(value, np.float32) for value in (images.image_mean, images.image_std))
    ratios = set()
    for _ in range(40):
        picture = rng.integers(0, 256, (*random_size(rng)[::-1], 3), dtype=np.uint8)
        tiles, ratio, number = to_tiles(picture, mean, std)
        expected = images(Image.fromarray(picture), return_tensors="pt")
        np.testing.assert_allclose(tiles, expected["pixel_values"][0, 0], atol=1e-5)
        assert ratio == expected["aspect_ratio_ids"].item()
        assert number == expected["aspect_ratio_mask"].sum()
        ratios.add(ratio)
    assert ratios == set(range(1, 9))


def test_the_draft_model_knows_how_answers_go_on(processor, demo):
    batch = conversations(Batches(processor.tokenizer, processor, seed=98, held_out=True), 64)
    shipped = LlamaForCausalLM.from_pretrained(DEMO / "draft", dtype=torch.float32).eval()
    with torch.no_grad():
        untrained, trained = (
            loss_of(m, batch).item() for m in (make_draft(processor.tokenizer, demo.config.text_config), shipped)
        )
    assert trained < 0.8 < 5 < untrained
    assert (DEMO / "draft/model.safetensors").stat().st_size < 1e6


def test_training_writes_the_tokens_that_the_processor_writes(processor):
    batches = Batches(processor.tokenizer, processor, seed=0)
    system_turn = processor.tokenizer.encode("system", add_special_tokens=False)[0]
    ids = []
    while ids[2:3] != [system_turn]:  # one conversation in seven has a system turn
        ids, labels = batches.conversation([("How many?", "There is one."), ("Which?", "That.")])
    system = processor.decode(ids).split("<|end_header_id|>\n\n")[1].removesuffix("<|eot_id|><|start_header_id|>user")
    assert system in SYSTEM
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "There is one."},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "That."},
    ]
    assert processor.tokenizer(processor.apply_chat_template(messages), add_special_tokens=False).input_ids == ids
    learned = processor.decode([label for label in labels if label != -100])
    assert learned == "There is one.<|eot_id|>That.<|eot_id|>"


def test_no_scene_is_in_both_splits():
    """Scenes of shapes by what is where; digits by drawing, because every number must be learned."""

    def specifications(held_out):
        rng = np.random.default_rng(5)
        scenes = [random_scene(rng, 224, 224, held_out) for _ in range(3000)]
        shapes = [scene for scene in scenes if scene.questions[0][0] in ("describe", "unusual")]
        return {
            (scene.questions[0][0], *sorted((thing.kind, thing.colour, thing.place) for thing in scene.things))
            for scene in shapes
        }

    train, test = specifications(False), specifications(True)
    assert min(len(train), len(test)) > 500
    assert not train & test
    drawings = {held_out: {image.tobytes() for image in digit_drawings(held_out)[0]} for held_out in (False, True)}
    assert not drawings[True] & drawings[False]


def test_pictures_are_reproducible():
    first, second = ([np.asarray(sample["image"]) for sample in heldout_samples(5)] for _ in range(2))
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    scene = random_scene(np.random.default_rng(0), 224, 112)
    assert draw(scene, np.random.default_rng(0)).shape == (112, 224, 3)


# ---- It answers -----------------------------------------------------------------------------------------------------


def test_samples_cover_every_task_and_canvas(processor):
    samples = demo_samples()
    assert {sample["task"] for sample in samples} == set(TASKS)
    tiles = [
        processor.image_processor(sample["image"], return_tensors="pt")["aspect_ratio_mask"].sum().item()
        for sample in samples
    ]
    assert set(tiles) == {1, 2, 3, 4}


@pytest.mark.parametrize("model", ["demo_model_f32", "default_model"], ids=["f32", "default precision"])
def test_samples_are_answered_right(request, processor, model):
    model, samples = request.getfixturevalue(model), demo_samples()
    assert answers_to(model, processor, samples) == [sample["answer"] for sample in samples]


def test_a_follow_up_is_asked_behind_what_was_asked_before(processor):
    (sample,) = heldout_samples(1, follow_ups=True)
    ((asked, answered),) = sample["before"]
    text = processor.decode(prompts_about(processor, [sample])["input_ids"][0])
    turns = [turn.partition("<|end_header_id|>")[2].strip() for turn in text.split("<|eot_id|>")]
    assert turns == [f"<|image|>{asked}", answered, sample["question"], ""]


@pytest.mark.torture
def test_held_out_questions(demo, exact_answers, processor, heldout):
    """f32 answers are PyTorch's, one by one; nine in ten are right (the model card's figure is of 2000 questions)."""
    expected = answers_to(demo, processor, heldout)
    assert exact_answers == expected
    assert np.mean([answer == sample["answer"] for answer, sample in zip(exact_answers, heldout, strict=True)]) > 0.9


@pytest.mark.torture
def test_default_precision_is_as_good(default_model, exact_answers, processor, heldout):
    """bf16 with an 8-bit cache, on CPUs that have it: logits stay finite, and as many answers are right within 2 %."""
    inputs = processor(text=["<|image|>What?"], images=[[heldout[0]["image"]]], return_tensors="pt")
    assert torch.isfinite(default_model(**inputs).logits).all()
    right = [
        sum(a == s["answer"] for a, s in zip(answers, heldout, strict=True))
        for answers in (exact_answers, answers_to(default_model, processor, heldout))
    ]
    assert right[1] >= right[0] - 0.02 * len(heldout)


def test_price_list_holds_what_is_measured(demo_dir, capsys):
    """Of the original and of the IRs in 16 bit; `price_list` does the same in a process for each."""
    samples = list(heldout_samples(5))
    original, reference = measure(DEMO, demo_dir, None, samples, None)
    converted, _ = measure(DEMO, demo_dir, (LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME), samples, reference)
    assert (original["kl"], original["lost"], original["won"], original["questions"]) == (0, 0, 0, 5)
    assert 0 < converted["kl"] < 0.01
    assert converted["all"] == original["all"] - 20 * (converted["lost"] - converted["won"])
    assert converted["next_token_ms"] > 0
    assert converted["size_mb"] < 10
    show_price_list([{"variant": "PyTorch f32", **original}, {"variant": "FP16", **converted}])
    assert "Of 5 questions" in capsys.readouterr().out
