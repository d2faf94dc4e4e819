"""transformers' interface, behaviour by behaviour: each is the same as `MllamaForConditionalGeneration`'s, or refused
with one sentence that names the fix. What `generate` and `forward` promise is collected from transformers' own
tests/generation/test_utils.py and tests/models/mllama/, and from what scripts do with a model."""

import copy
import inspect
import re
import warnings

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaForConditionalGeneration,
    StaticCache,
    WatermarkingConfig,
)

from conftest import F32
from ov_mllama.drafts import in_vocabulary
from ov_mllama.model import OVMLlamaForConditionalGeneration

GREEDY = dict(do_sample=False, max_new_tokens=10, eos_token_id=None)
SAMPLE = dict(do_sample=True, max_new_tokens=10, eos_token_id=None)


def generate(case="wide", **options):
    """A behaviour: tokens of `generate`; options that are functions are called with the pair."""

    def behaviour(model, pair):
        torch.manual_seed(0)
        ready = {name: make(pair) if getattr(make, "of_pair", False) else make for name, make in options.items()}
        output = model.generate(**pair.inputs(case), **{**GREEDY, **ready})
        if not isinstance(output, torch.Tensor):
            return [tensor for part in output.values() if isinstance(part, tuple) for tensor in part] + [
                output.sequences
            ]
        return output

    return behaviour


def of_pair(make):
    make.of_pair = True
    return make


def forward(case="wide", change=lambda inputs: inputs, **options):
    """A behaviour: logits of a call of the model."""

    def behaviour(model, pair):
        with torch.no_grad():
            return model(**change(dict(pair.inputs(case))), **options).logits

    return behaviour


def cast(**types):
    return lambda inputs: {name: tensor.to(types.get(name, tensor.dtype)) for name, tensor in inputs.items()}


@of_pair
def assistant(pair):
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=pair.ov.shapes.vocab_size, **size)).eval()


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


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if one.dtype.is_floating_point:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
        else:
            assert one.tolist() == other.tolist()


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


# ---- Refused ----


def ask(case="wide", **options):
    return lambda model, pair: model(**{**pair.inputs(case), **options})


def with_changed(**changes):
    def call(model, pair):
        inputs = dict(pair.inputs("wide"))
        for name, change in changes.items():
            inputs[name] = change(inputs[name])
        return model(**inputs)

    return call


def with_cache(**options):
    """After a prompt, one more token with these."""

    def call(model, pair):
        output = model(**pair.inputs("wide"))
        ready = {name: make(pair) if callable(make) else make for name, make in options.items()}
        return model(**{"input_ids": torch.tensor([[70]]), "past_key_values": output.past_key_values, **ready})

    return call


def of_two_prompts(model, pair):
    inputs = dict(pair.inputs("wide"))
    return model(**{**inputs, **{name: inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}})


def a_copied_cache(model, pair):
    return copy.deepcopy(model(**pair.inputs("wide")).past_key_values)


def attribute(name):
    return lambda model, pair: getattr(model, name)


REFUSED = {
    "no input_ids": (lambda model, pair: model(), "input_ids are missing.*processor"),
    "a list of ids": (lambda model, pair: model([[1, 2]]), "give a tensor"),
    "ids of one axis": (lambda model, pair: model(torch.tensor([1, 2])), "batch, tokens"),
    "an id beyond the vocabulary": (with_changed(input_ids=lambda ids: ids + 100), "use the tokenizer"),
    "a negative id": (with_changed(input_ids=lambda ids: ids - 999), "use the tokenizer"),
    "a mask too short": (with_changed(attention_mask=lambda mask: mask[:, 1:]), r"\[1, 12\] is expected"),
    "a mask too long": (with_changed(attention_mask=lambda mask: mask.repeat(1, 2)), r"\[1, 12\] is expected"),
    "a mask of two rows": (with_changed(attention_mask=lambda mask: mask.repeat(2, 1)), r"\[1, 12\] is expected"),
    "a 4D mask": (with_changed(attention_mask=lambda mask: mask[:, None, None]), "4D masks are not taken"),
    "a mask of other numbers": (with_changed(attention_mask=lambda mask: mask * 7), "1 is for tokens"),
    "positions too few": (ask(position_ids=torch.arange(3)[None]), r"\[1, 12\] is expected"),
    "positions of three axes": (ask(position_ids=torch.zeros(3, 1, 12, dtype=torch.int64)), r"\[1, 12\] is expected"),
    "negative positions": (ask(position_ids=torch.arange(12)[None] - 5), "count from 0"),
    "images of three prompts": (with_changed(pixel_values=lambda x: x.repeat(3, 1, 1, 1, 1, 1)), r"\[1, any, 4"),
    "images of one prompt for two": (of_two_prompts, r"pixel_values is \[1, .*where \[2, any"),
    "pixels without an axis": (with_changed(pixel_values=lambda x: x[0]), "use the processor"),
    "three of four tiles": (with_changed(pixel_values=lambda x: x[:, :, :3]), "use the processor"),
    "a tile mask of three": (with_changed(aspect_ratio_mask=lambda mask: mask[..., :3]), r"\[1, 1, 4\] is expected"),
    "no real tile": (with_changed(aspect_ratio_mask=lambda mask: mask * 0), "one at least"),
    "real tiles last": (with_changed(aspect_ratio_mask=lambda mask: mask.flip(-1)), "first of all"),
    "aspect ratio 99": (with_changed(aspect_ratio_ids=lambda ids: ids * 0 + 99), "knows 0 .no image. to 8"),
    "a negative aspect ratio": (with_changed(aspect_ratio_ids=lambda ids: -ids), "knows 0 .no image. to 8"),
    "aspect ratios of two images": (with_changed(aspect_ratio_ids=lambda ids: ids.repeat(1, 2)), r"\[1, 1\] is exp"),
    "cross mask for three tiles": (with_changed(cross_attention_mask=lambda m: m[..., :3]), r"\[1, any, 1, 4\]"),
    "cross mask for two images": (with_changed(cross_attention_mask=lambda m: m.repeat(1, 1, 2, 1)), r"any, 1, 4\]"),
    "cross mask too short": (with_changed(cross_attention_mask=lambda m: m[:, 1:]), "repeat its last column"),
    "cross mask of other numbers": (with_changed(cross_attention_mask=lambda m: m * 2), "1 is for tiles"),
    "a mask of halves": (with_changed(attention_mask=lambda mask: mask * 0.5), "1 is for tokens"),
    "ids that are no integers": (with_changed(input_ids=lambda ids: ids + 0.5), "give integers"),
    "boolean ids": (with_changed(input_ids=lambda ids: ids > 0), "give integers"),
    "no rows": (with_changed(input_ids=lambda ids: ids[:0]), "nothing to compute"),
    "a number for ids": (lambda model, pair: model(torch.tensor(5)), "batch, tokens"),
    "no image": (
        with_changed(
            pixel_values=lambda x: x[:, :0],
            aspect_ratio_ids=lambda x: x[:, :0],
            aspect_ratio_mask=lambda x: x[:, :0],
            cross_attention_mask=lambda x: x[:, :, :0],
        ),
        "leave out all four",
    ),
    "no token beside a cache": (with_cache(input_ids=torch.zeros(1, 0, dtype=torch.int64)), "nothing to compute"),
    "another model's cache": (
        lambda model, pair: model(torch.tensor([[70]]), past_key_values=pair.ov(**pair.inputs("wide")).past_key_values),
        "another model's",
    ),
    "several tokens of which the first see less": (
        with_cache(
            input_ids=torch.full((1, 20), 70),
            cross_attention_mask=lambda pair: (
                pair.inputs("wide")["cross_attention_mask"][:, -1:].repeat(1, 20, 1, 1)
                * (torch.arange(20) > 12)[None, :, None, None]
            ),
        ),
        "give the whole text again",
    ),
    "a cross mask of another length beside a cache": (
        with_cache(
            cross_attention_mask=lambda pair: pair.inputs("wide")["cross_attention_mask"][:, -1:].repeat(1, 4, 1, 1)
        ),
        "give the whole text again",
    ),
    "pixels without masks": (
        lambda model, pair: model(pair.inputs("wide")["input_ids"], pair.inputs("wide")["pixel_values"]),
        "pass all that the processor returns",
    ),
    "one column of mask beside a cache": (with_cache(attention_mask=torch.ones(1, 1)), r"\[1, 13\] is expected"),
    "another batch than the cache's": (with_cache(input_ids=torch.tensor([[70], [71]])), "has 2 rows.*has 1"),
    "other tiles than before": (
        with_cache(cross_attention_mask=lambda pair: pair.inputs("wide")["cross_attention_mask"][:, -1:] * 0),
        "give the whole text again",
    ),
    "images beside a cache": (
        lambda model, pair: model(**pair.inputs("wide"), past_key_values=model(**pair.inputs("wide")).past_key_values),
        "with the prompt",
    ),
    "a DynamicCache": (ask(past_key_values=DynamicCache()), "leave it out at first"),
    "a tuple as cache": (ask(past_key_values=((1, 2),)), "leave it out at first"),
    "a StaticCache in generate": (
        lambda model, pair: model.generate(
            **pair.inputs("wide"),
            **GREEDY,
            past_key_values=StaticCache(config=pair.hf.config.text_config, max_cache_len=50),
        ),
        "leave it out at first",
    ),
    "a copied cache": (a_copied_cache, "call generate again with the whole text"),
    "cache_implementation=static": (generate(cache_implementation="static"), "Leave it out"),
    "cache_implementation=quantized": (generate(cache_implementation="quantized"), "Leave it out"),
    "inputs_embeds": (ask(inputs_embeds=torch.zeros(1, 12, 64)), "give input_ids"),
    "cross_attention_states": (ask(cross_attention_states=torch.zeros(1, 1, 64)), "give pixel_values"),
    "output_attentions": (ask(output_attentions=True), "leave it out"),
    "output_hidden_states": (ask(output_hidden_states=True), "leave it out"),
    "output_attentions in generate": (generate(output_attentions=True, return_dict_in_generate=True), "leave it out"),
    "a misspelt argument": (ask(pixel_value=1), "no argument 'pixel_value'"),
    "a misspelt argument of generate": (generate(max_new_token=3), "max_new_token"),
    ".to(cuda)": (lambda model, pair: model.to("cuda"), "device='GPU'"),
    ".to(bfloat16)": (lambda model, pair: model.to(torch.bfloat16), "INFERENCE_PRECISION_HINT"),
    ".half()": (attribute("half"), "INFERENCE_PRECISION_HINT"),
    ".train()": (attribute("train"), "train the checkpoint with transformers"),
    ".parameters()": (attribute("parameters"), "load the checkpoint with transformers"),
    ".get_input_embeddings()": (attribute("get_input_embeddings"), "load the checkpoint with transformers"),
    ".save_pretrained()": (attribute("save_pretrained"), "copy the folder"),
    ".cuda()": (attribute("cuda"), "device='GPU'"),
    ".from_pretrained()": (lambda model, pair: type(model).from_pretrained("x"), "convert_mllama"),
    "a misspelt attribute": (attribute("generated"), "check its spelling"),
}


@pytest.mark.parametrize("behaviour", REFUSED)
def test_refused_with_a_sentence(pair, model, behaviour, monkeypatch):
    call, sentence = REFUSED[behaviour]
    inferences = []
    infer = model.language_model.infer
    monkeypatch.setattr(model.language_model, "infer", lambda *given: inferences.append(1) or infer(*given))
    with pytest.raises((ValueError, TypeError, AttributeError)) as refusal:
        call(model, pair)
    text = str(refusal.value)
    assert re.search(sentence, text), text
    assert "unexpected keyword" not in text
    assert "Exception from" not in text
    assert len(inferences) <= 1  # that of the prompt before, for the cases with a cache
    case = pair.inputs("wide")
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
