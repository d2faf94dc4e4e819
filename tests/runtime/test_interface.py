"""transformers' interface, behaviour by behaviour: each is the same as `MllamaForConditionalGeneration`'s; those
that are refused are in test_refusals.py. What `generate` and `forward` promise is collected from transformers' own
tests/generation/test_utils.py and tests/models/mllama/, and from what scripts do with a model."""

import inspect
import warnings

import pytest
import torch
from behaviours import GREEDY, assert_same, forward, generate, of_pair
from transformers import (
    GenerationConfig,
    GenerationMixin,
    MllamaForConditionalGeneration,
    WatermarkingConfig,
)

from conftest import F32
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.speculative import in_vocabulary
from tiny_mllama import make_llama

SAMPLE = dict(do_sample=True, max_new_tokens=10, eos_token_id=None)


def cast(**types):
    return lambda inputs: {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in inputs.items()}


@of_pair
def assistant(pair):
    return make_llama(pair.ov.shapes.vocab_size)


@of_pair
def tokenizer(pair):
    return pair.processor.tokenizer


@of_pair
def stop_string(pair):
    """A character of the answer."""
    inputs = pair.inputs("wide")
    answer = pair.hf.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    return pair.processor.tokenizer.decode(answer[4:5])


@of_pair
def negative_prompt(pair):
    return torch.tensor([[65, 66, 67]])


def by_position(model, pair):
    inputs = pair.inputs("wide")
    names = ["input_ids", "pixel_values", "aspect_ratio_mask", "aspect_ratio_ids", "attention_mask"]
    names += ["cross_attention_mask"]
    with torch.no_grad():
        return model(*(inputs[name] for name in names), None, None, None, None, None, True, 2).logits


def as_a_tuple(model, pair):
    with torch.no_grad():
        logits, past = model(**pair.inputs("wide"), return_dict=False)
        again = model(**pair.inputs("wide"), return_dict=False, use_cache=False)
    assert past.get_seq_length() == logits.shape[1]
    assert len(again) == 1
    return logits


def loss(model, pair):
    inputs = pair.inputs("wide")
    labels = in_vocabulary(inputs["input_ids"], pair.ov.shapes.vocab_size).clone()
    labels[:, :2] = -100
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        logits_only = model(**inputs, labels=None)
    assert logits_only.loss is None
    return [output.loss, output.logits]


def steps(model, pair):
    """A conversation by hand: prompt, then tokens."""
    inputs, logits = pair.inputs("text only"), []
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for token in (70, 71, 72):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
            output = model(torch.tensor([[token]]), attention_mask=mask, past_key_values=output.past_key_values)
            logits.append(output.logits)
    return logits


def steps_with_masks_and_positions(model, pair):
    """The same with what `generate` would pass beside it."""
    inputs, logits = pair.inputs("mixed batch"), []
    seen, mask = inputs["cross_attention_mask"], inputs["attention_mask"]
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    with torch.no_grad():
        output = model(**inputs, position_ids=positions, use_cache=True)
        for token in (70, 71):
            mask, positions = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1), positions[:, -1:] + 1
            output = model(
                torch.full((3, 1), token),
                attention_mask=mask,
                cross_attention_mask=seen[:, -1:],
                position_ids=positions,
                past_key_values=output.past_key_values,
            )
            logits.append(output.logits)
    return logits


def go_on_generating(model, pair):
    """The cache that one call returned, given to the next with the whole text."""
    inputs = pair.inputs("wide")
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[70, 71]])], 1)
    seen = inputs["cross_attention_mask"]
    seen = torch.cat([seen, seen[:, -1:].expand(-1, ids.shape[1] - seen.shape[1], -1, -1)], 1)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cross_attention_mask=seen,
        past_key_values=first.past_key_values,
        **GREEDY,
    )


def rows_of_a_text_cache(model, pair):
    """The same without images."""
    inputs = pair.inputs("padded text only")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        mask = torch.cat([inputs["attention_mask"].flip(0), torch.ones(2, 1, dtype=torch.int64)], 1)
        return model(torch.tensor([[70], [71]]), attention_mask=mask, past_key_values=cache).logits


def rows_of_a_cache(model, pair):
    """Rows repeated and chosen between two steps, as transformers' caches can."""
    inputs, logits = pair.inputs("mixed batch"), []
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        cache = output.past_key_values
        assert len(cache) > 0
        cache.batch_repeat_interleave(2)
        mask = inputs["attention_mask"].repeat_interleave(2, 0)
        seen = inputs["cross_attention_mask"][:, -1:].repeat_interleave(2, 0)
        for rows in (torch.tensor([5, 0, 3]), torch.tensor([1]), torch.tensor([0])):
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
            tokens = torch.arange(70, 70 + len(mask))[:, None]
            options = {"attention_mask": mask, "cross_attention_mask": seen, "past_key_values": cache}
            logits.append(model(tokens, **options).logits)
            cache.batch_select_indices(rows)
            mask, seen = mask[rows], seen[rows]
    return logits


def cast_inputs(model, pair):
    inputs = pair.inputs("wide").to(model.device, model.dtype)
    return model.eval().to("cpu").generate(**inputs, **GREEDY)


def what_a_processor_sees(model, pair):
    """A user's own logits processor gets the ids as they are."""
    seen = []

    def note(input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    model.generate(**pair.inputs("wide"), **GREEDY, logits_processor=[note])
    return seen


def what_a_prefix_function_sees(model, pair):
    seen = []

    def allowed(batch_id, sent):
        seen.append(sent.clone())
        return [70, 71, 72]

    return [model.generate(**pair.inputs("wide"), **GREEDY, prefix_allowed_tokens_fn=allowed), *seen]


def config_says_no_cache(model, pair):
    config, before = model.config.text_config, model.config.text_config.use_cache
    config.use_cache = False
    try:
        with torch.no_grad():
            assert model(**pair.inputs("wide")).past_key_values is None
            assert model(**pair.inputs("wide"), use_cache=True).past_key_values is not None
    finally:
        config.use_cache = before
    return torch.zeros(1)


def its_own_assistant(model, pair):
    return model.generate(**pair.inputs("text only"), **GREEDY, assistant_model=model)


def drafted(**options):
    """Assisted decoding about an image. transformers 5.23 cannot (its drafts are given the image, and its masks do not
    fit them), so the tokens are those of its plain decoding."""

    def behaviour(model, pair):
        if isinstance(model, MllamaForConditionalGeneration):
            return generate()(model, pair)
        ready = {name: model if value is ITSELF else value for name, value in options.items()}
        return generate(**ready)(model, pair)

    return behaviour


ITSELF = object()


def last(count):
    return torch.arange(3), torch.tensor([[0, 2, 5]]), (torch.arange(12) % 3 == 0)[None]


SAME = {
    "greedy": generate(),
    "no new token": generate(max_new_tokens=1),
    "max_length": generate(max_new_tokens=None, max_length=30),
    "min_new_tokens": generate(min_new_tokens=8, eos_token_id=[70, 71]),
    "min_length": generate(min_length=20, eos_token_id=70),
    "a GenerationConfig": generate(generation_config=GenerationConfig(max_new_tokens=5, do_sample=False)),
    "tokenizer alone": generate(tokenizer=tokenizer),
    "stop_strings": generate(tokenizer=tokenizer, stop_strings=stop_string),
    "max_time": generate(max_time=1000.0),
    "guidance_scale": generate(guidance_scale=1.7),
    "guidance_scale, text only": generate("text only", guidance_scale=1.7),
    "guidance_scale with a negative prompt": generate(guidance_scale=1.5, negative_prompt_ids=negative_prompt),
    "guidance_scale without a cache": generate(guidance_scale=1.7, use_cache=False),
    "assistant_model": generate("text only", assistant_model=assistant),
    "assistant_model, image": drafted(assistant_model=assistant),
    "assistant_model, sampling": generate("text only", assistant_model=assistant, do_sample=True),
    "assistant_model is the model": its_own_assistant,
    "assistant_model is the model, image": drafted(assistant_model=ITSELF),
    "prompt_lookup_num_tokens": generate("text only", prompt_lookup_num_tokens=3),
    "prompt_lookup_num_tokens, image": drafted(prompt_lookup_num_tokens=3),
    "prompt lookup with scores": generate(
        "text only", prompt_lookup_num_tokens=3, return_dict_in_generate=True, output_scores=True, output_logits=True
    ),
    "beams": generate(num_beams=3),
    "beams with penalties": generate(num_beams=3, length_penalty=0.3, early_stopping=True, eos_token_id=[70, 75, 80]),
    "beams returned with scores": generate(
        "mixed batch", num_beams=2, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    ),
    "beams, sampling": generate(num_beams=2, do_sample=True),
    "beams without a cache": generate(num_beams=2, use_cache=False, max_new_tokens=4),
    "repetition_penalty, text": generate("text only", repetition_penalty=1.5),
    "encoder_repetition_penalty, text": generate("text only", encoder_repetition_penalty=1.5),
    "no_repeat_ngram_size": generate(no_repeat_ngram_size=2),
    "encoder_no_repeat_ngram_size": generate(encoder_no_repeat_ngram_size=2),
    "bad_words_ids": generate(bad_words_ids=[[70], [71, 72]]),
    "sequence_bias": generate(sequence_bias={(70,): 5.0, (71, 72): -5.0}),
    "suppress_tokens": generate(suppress_tokens=list(range(0, 200))),
    "begin_suppress_tokens": generate(begin_suppress_tokens=list(range(0, 200))),
    "forced_bos_token_id": generate(forced_bos_token_id=70),
    "forced_eos_token_id": generate(forced_eos_token_id=70),
    "exponential_decay_length_penalty": generate(exponential_decay_length_penalty=(3, 1.5), eos_token_id=[70]),
    "remove_invalid_values": generate(remove_invalid_values=True),
    "renormalize_logits": generate(renormalize_logits=True, return_dict_in_generate=True, output_scores=True),
    "watermarking": generate(watermarking_config=WatermarkingConfig(bias=3.0)),
    "temperature, top_k, top_p": generate(do_sample=True, temperature=0.7, top_k=20, top_p=0.8),
    "min_p": generate(do_sample=True, min_p=0.1),
    "typical_p": generate(do_sample=True, typical_p=0.7),
    "epsilon_cutoff": generate(do_sample=True, epsilon_cutoff=0.01),
    "eta_cutoff": generate(do_sample=True, eta_cutoff=0.01),
    "top_h": generate(do_sample=True, top_h=0.5),
    "several answers": generate("mixed batch", do_sample=True, num_return_sequences=3),
    "without a cache": generate(use_cache=False, max_new_tokens=4),
    "cache_implementation=dynamic": generate(cache_implementation="dynamic"),
    "scores and logits": generate(return_dict_in_generate=True, output_scores=True, output_logits=True),
    "chunked prefill": generate("text only", prefill_chunk_size=4),
    "goes on with a cache": go_on_generating,
    "rows of a cache": rows_of_a_cache,
    "rows of a text's cache": rows_of_a_text_cache,
    "a processor's ids": what_a_processor_sees,
    "a prefix function's ids": what_a_prefix_function_sees,
    "inputs cast by .to": cast_inputs,
    "forward": forward(),
    "arguments by position": by_position,
    "return_dict=False": as_a_tuple,
    "output_*=False": forward(output_attentions=False, output_hidden_states=False),
    "labels": loss,
    "config.use_cache=False": config_says_no_cache,
    "use_cache=None": forward(use_cache=None),
    "logits_to_keep=3": forward(logits_to_keep=3),
    "logits_to_keep, more than there are": forward(logits_to_keep=99),
    "logits_to_keep, positions": forward(logits_to_keep=last(3)[0]),
    "logits_to_keep, positions by row": forward(logits_to_keep=last(3)[1]),
    "logits_to_keep, a mask": forward(logits_to_keep=last(3)[2]),
    "masks of other types": forward(
        change=cast(attention_mask=torch.bool, cross_attention_mask=torch.float32, aspect_ratio_mask=torch.int32)
    ),
    "i32 ids": forward(change=cast(input_ids=torch.int32)),
    "positions of one row": forward(position_ids=torch.arange(12)[None]),
    "positions that jump": forward(position_ids=torch.arange(12)[None] * 3),
    "steps": steps,
    "steps with masks and positions": steps_with_masks_and_positions,
    "masks without images": forward(
        "text only", change=lambda i: i | {"cross_attention_mask": torch.ones(*i["input_ids"].shape, 1, 4)}
    ),
}


@pytest.fixture(scope="module")
def model(pair):
    return OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)


@pytest.mark.parametrize("behaviour", SAME)
def test_the_same(pair, model, behaviour):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = SAME[behaviour](pair.hf, pair)
        actual = SAME[behaviour](model, pair)
    assert_same(actual, expected)
    case = pair.inputs("wide")  # and whatever was asked, the next call is right
    with torch.no_grad():
        assert_same(model(**case).logits, pair.hf(**case).logits)


def test_bfloat16_pixels_are_taken_as_they_are(pair, model):
    """transformers casts its weights' type; here pixels are rounded and all else stays f32."""
    inputs = pair.inputs("wide").to(model.device, torch.bfloat16)
    rounded = dict(inputs, pixel_values=inputs["pixel_values"].float())
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert_same(model(**inputs).logits, model(**rounded).logits)


def test_two_bos_are_warned_of(pair, model):
    text = pair.chat()
    images = [pair.picture(2, 1, 2), pair.picture(1, 1, 1)]
    with pytest.warns(UserWarning, match="two BOS.*add_special_tokens=False"):
        model(**pair.processor(text=text, images=images, return_tensors="pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in ("chat", "padded text only", "mixed batch"):
            model(**pair.inputs(case))


# ---- What we override is still there ----

HOOKS = {
    "can_generate",
    "is_remote_code",
    "get_experts_implementation",
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_get_candidate_generator",
    "_get_logits_processor",
    "_is_stateful",
    "generate",
    "main_input_name",
    "base_model_prefix",
    "generation_config",
    "config",
    "device",
    "dtype",
}


def test_the_hooks_that_we_override_exist_in_transformers():
    for name in HOOKS - {"generation_config", "config"}:
        assert hasattr(MllamaForConditionalGeneration, name), name
    for name in ("_prepare_cache_for_generation", "_get_candidate_generator", "_get_logits_processor"):
        assert f"self.{name}(" in inspect.getsource(GenerationMixin), f"nobody calls {name}"
    parameters = inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters
    assert list(parameters)[:3] == ["self", "generation_config", "model_kwargs"]
    assert "encoder_input_ids" in inspect.signature(GenerationMixin._get_logits_processor).parameters
    assert {"model_kwargs", "assistant_model"} <= inspect.signature(
        GenerationMixin._get_candidate_generator
    ).parameters.keys()


def test_no_name_of_ours_is_one_of_theirs_by_accident():
    ours = {name for name in vars(OVMLlamaForConditionalGeneration) if not name.startswith("__")}
    theirs = {name for cls in GenerationMixin.__mro__ for name in vars(cls)}
    assert ours & theirs <= HOOKS


def test_forwards_signature_is_transformers():
    def names(cls):
        return [name for name in inspect.signature(cls.forward).parameters if name != "kwargs"]

    assert names(OVMLlamaForConditionalGeneration) == names(MllamaForConditionalGeneration)
