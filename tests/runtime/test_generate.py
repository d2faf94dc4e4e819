"""Options of `generate` and `forward` beyond plain decoding, each against transformers or a stated property."""

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

from conftest import F32
from ov_mllama_helper import OVMLlamaForConditionalGeneration

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)


class Tokens(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


def test_streamer_gets_prompt_and_answer(pair):
    inputs, streamer = pair.inputs("wide"), Tokens()
    output = pair.ov.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.ended
    assert streamer.seen == output[0].tolist()


def test_text_streamer_prints_the_answer(pair, capsys):
    inputs = pair.inputs("one tile")
    streamer = TextStreamer(pair.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = pair.ov.generate(**inputs, **GREEDY, streamer=streamer)
    answer = pair.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == answer.strip() != ""


def test_stopping_criteria_and_logits_processors(pair):
    inputs = pair.inputs("mixed batch")
    kwargs = dict(
        GREEDY, stopping_criteria=[StopAfter(inputs["input_ids"].shape[1] + 5)], logits_processor=[OnlyEven()]
    )
    expected, actual = (model.generate(**inputs, **kwargs) for model in (pair.hf, pair.ov))
    assert actual.tolist() == expected.tolist()
    new = actual[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == 5
    assert (new % 2 == 0).all()


def test_scores_and_logits(pair):
    kwargs = dict(
        GREEDY, min_new_tokens=3, return_dict_in_generate=True, output_scores=True, output_logits=True, use_cache=True
    )
    expected, actual = (model.generate(**pair.inputs("chat"), **kwargs) for model in (pair.hf, pair.ov))
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(actual[name]), torch.stack(expected[name]), atol=1e-3, rtol=0)


def test_eos_list_ends_each_row(pair):
    inputs = pair.inputs("mixed batch")
    length = inputs["input_ids"].shape[1]
    free = pair.hf.generate(**inputs, **GREEDY)[:, length:]
    eos = [free[0, 3].item(), free[1, 5].item(), free[2, 7].item()]
    kwargs = dict(GREEDY, eos_token_id=eos)
    expected, actual = (model.generate(**inputs, **kwargs) for model in (pair.hf, pair.ov))
    assert actual.tolist() == expected.tolist()
    assert actual.shape[1] - length < 12


def test_generation_config_of_the_checkpoint_is_used(pair):
    assert pair.ov.generation_config.eos_token_id == pair.hf.generation_config.eos_token_id
    assert len(pair.ov.generation_config.eos_token_id) == 3


def test_repetition_penalty_with_image_token(pair):
    """`<|image|>` is no column of the logits; transformers' own processor would index past their end."""
    inputs = pair.inputs("one tile")
    assert inputs["input_ids"].max() == pair.ov.shapes.vocab_size
    penalised = pair.ov.generate(**inputs, **dict(GREEDY, max_new_tokens=30), repetition_penalty=100.0)
    new = penalised[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(new)) == len(new)
    assert pair.ov.generate(**inputs, **GREEDY, no_repeat_ngram_size=2).shape[1] > inputs["input_ids"].shape[1]


def test_without_cache(pair):
    inputs = pair.inputs("wide")
    kwargs = dict(GREEDY, max_new_tokens=4)
    cached = pair.ov.generate(**inputs, **kwargs)
    assert pair.ov.generate(**inputs, **kwargs, use_cache=False).tolist() == cached.tolist()


def test_full_lm_head_gives_the_same(pair):
    inputs = pair.inputs("mixed batch")
    full = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, slice_lm_head=False)
    assert full.generate(**inputs, **GREEDY).tolist() == pair.ov.generate(**inputs, **GREEDY).tolist()
    torch.testing.assert_close(full(**inputs, logits_to_keep=2).logits, pair.ov(**inputs).logits[:, -2:])


def test_forward_step_by_step(pair):
    """A prompt fed in two parts, the second continuing the cache, gives the logits of the whole."""
    inputs = pair.inputs("one tile")
    whole = pair.ov(**inputs).logits
    head = {name: value[:, :-3] if name in ("input_ids", "attention_mask") else value for name, value in inputs.items()}
    first = pair.ov(**head)
    second = pair.ov(input_ids=inputs["input_ids"][:, -3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-4, rtol=0)
    assert second.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def test_tokens_after_the_processors_see_what_its_last_did(pair):
    """Continuing an answer by hand: input_ids longer than the processor's cross_attention_mask."""
    inputs = dict(pair.inputs("two images"))
    extra = torch.tensor([[70, 71, 72]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], extra], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected, actual = (model.generate(**inputs, **GREEDY) for model in (pair.hf, pair.ov))
    assert actual.tolist() == expected.tolist()


def test_times_are_the_last_calls(pair):
    pair.ov.generate(**pair.inputs("two images"), **GREEDY)
    assert len(pair.ov.vision_encoder_infer_time) == 2
    assert len(pair.ov.llm_infer_time) == 12
    pair.ov.generate(**pair.inputs("text only"), **dict(GREEDY, max_new_tokens=3))
    assert pair.ov.vision_encoder_infer_time == []
    assert len(pair.ov.llm_infer_time) == 3
    assert all(seconds > 0 for seconds in pair.ov.llm_infer_time)


def test_beams_encode_a_picture_once(pair):
    pair.ov.generate(**pair.inputs("one tile"), **GREEDY, num_beams=4)
    assert len(pair.ov.vision_encoder_infer_time) == 1


def test_decoding_reads_only_visible_rows(pair):
    """The prompt's first token precedes the picture and so reads every row; the answer reads real tiles only."""
    for case, tiles in (("one tile", 1), ("wide", 2), ("large", 4)):
        output = pair.ov(**pair.inputs(case))
        for name, array in output.past_key_values.cross_attention.key_values.items():
            rows = array.shape[3] if name.endswith(".key") else array.shape[2]
            assert rows == tiles * pair.ov.shapes.patches_per_tile
        assert output.past_key_values.cross_attention.bias.size == 1


def test_a_replaced_cache_is_refused(pair):
    first = pair.ov(**pair.inputs("one tile"))
    pair.ov(**pair.inputs("text only"))
    with pytest.raises(ValueError, match="another prompt"):
        pair.ov(input_ids=torch.tensor([[70]]), past_key_values=first.past_key_values)


def test_pictures_without_masks_or_too_late_are_refused(pair):
    inputs = pair.inputs("one tile")
    with pytest.raises(ValueError, match="cross_attention_mask"):
        pair.ov(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    output = pair.ov(**inputs)
    with pytest.raises(ValueError, match="with the prompt"):
        pair.ov(**inputs, past_key_values=output.past_key_values)


@pytest.mark.parametrize(("text", "images"), [("<|image|><|image|>two?", 1), ("<|image|>one?", 2), ("none?", 1)])
def test_image_tokens_and_images_must_agree(pair, text, images):
    """The processor's own sentence; it names both counts."""
    with pytest.raises(ValueError, match="number of .*image.* tokens"):
        pair.processor(text=text, images=[pair.picture(1, 1)] * images, return_tensors="pt")


def test_fewer_images_than_tokens_reaches_no_model(pair):
    with pytest.raises(ValueError, match="image"):
        pair.processor(text="<|image|>?", images=None, return_tensors="pt")


# ---- Pictures kept encoded, warm-up ----


def test_a_picture_is_encoded_once_in_a_conversation(pair):
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    inputs, other = pair.inputs("two images"), pair.inputs("wide")
    fresh = [OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)(**i).logits for i in (inputs, other)]
    runs = count_runs(model)
    for expected, asked in [(fresh[0], inputs), (fresh[1], other), (fresh[0], inputs), (fresh[1], other)]:
        assert torch.equal(model(**asked).logits, expected)
    assert len(runs) == 2  # the wide picture is the first of the two
    assert len(model.vision_encoder_infer_time) == 1


def test_kept_pictures_stay_within_their_room(pair):
    one = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    one(**pair.inputs("one tile"))
    size = one.image_encoder.cache.nbytes
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, image_cache_bytes=3 * size)
    runs = count_runs(model)
    for case in ("one tile", "wide", "tall", "tall", "wide", "one tile"):
        model(**pair.inputs(case))
        assert model.image_encoder.cache.nbytes <= 3 * size  # each of two tiles and one for its padding, or one and one
    assert len(runs) == 4  # tall and wide were still there, one tile had made room
    none = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, image_cache_bytes=0)
    none(**pair.inputs("one tile"))
    assert none.image_encoder.cache.nbytes == 0


def test_what_is_kept_of_a_prompt_is_not_pushed_out_by_its_other_pictures(pair):
    inputs = pair.inputs("two images")
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    pictures = [
        {name: inputs[name][:, i : i + 1] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        for i in range(2)
    ]
    for picture in pictures:
        model.encode_images(**picture)
    model.image_encoder.cache.max_bytes = model.image_encoder.cache.nbytes - 1  # for one of them
    model.image_encoder.forget()
    model.encode_images(**pictures[1])
    runs = count_runs(model)
    model(**inputs)
    assert len(runs) == 1


def count_runs(model) -> list:
    """A list that grows by one with each inference of the vision encoder."""
    request, runs = model.image_encoder._request, []

    class Counted:
        def __getattr__(self, name):
            return getattr(request, name)

        def start_async(self, *args, **kwargs):
            runs.append(1)
            return request.start_async(*args, **kwargs)

    model.image_encoder._request = Counted()
    return runs


def test_warm_up_changes_nothing_but_says_so(pair, caplog, capsys):
    caplog.set_level("INFO", "ov_mllama")
    inputs = pair.inputs("chat")
    cold = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, warm_up=False)
    assert caplog.text == ""
    warm = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    assert "warmed up in" in caplog.text
    assert capsys.readouterr().out == ""
    assert torch.equal(warm(**inputs).logits, cold(**inputs).logits)
    assert len(warm.llm_infer_time) == 1
