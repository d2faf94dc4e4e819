"""Parts of transformers' interface that raise an error with the fix, before anything is computed. What
is the same is in test_interface.py."""

import copy
import re

import pytest
import torch
from behaviours import GREEDY, assert_same, generate
from transformers import DynamicCache, StaticCache

from conftest import F32
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration


@pytest.fixture(scope="module")
def model(pair):
    return OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)


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
    "a 4D mask": (with_changed(attention_mask=lambda mask: mask[:, None, None]), "4D masks are not supported"),
    "a mask of other numbers": (with_changed(attention_mask=lambda mask: mask * 7), "1 is for tokens"),
    "positions too few": (ask(position_ids=torch.arange(3)[None]), r"\[1, 12\] is expected"),
    "positions of three axes": (ask(position_ids=torch.zeros(3, 1, 12, dtype=torch.int64)), r"\[1, 12\] is expected"),
    "negative positions": (ask(position_ids=torch.arange(12)[None] - 5), "count from 0"),
    "images of three prompts": (with_changed(pixel_values=lambda x: x.repeat(3, 1, 1, 1, 1, 1)), r"\[1, any, 4"),
    "images of one prompt for two": (of_two_prompts, r"pixel_values is \[1, .*where \[2, any"),
    "pixels without an axis": (with_changed(pixel_values=lambda x: x[0]), "use the processor"),
    "three of four tiles": (with_changed(pixel_values=lambda x: x[:, :, :3]), "use the processor"),
    "a tile mask of three": (with_changed(aspect_ratio_mask=lambda mask: mask[..., :3]), r"\[1, 1, 4\] is expected"),
    "no real tile": (with_changed(aspect_ratio_mask=lambda mask: mask * 0), "at least the first"),
    "real tiles last": (with_changed(aspect_ratio_mask=lambda mask: mask.flip(-1)), "at least the first"),
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
        "give the complete text again",
    ),
    "a cross mask of another length beside a cache": (
        with_cache(
            cross_attention_mask=lambda pair: pair.inputs("wide")["cross_attention_mask"][:, -1:].repeat(1, 4, 1, 1)
        ),
        "give the complete text again",
    ),
    "pixels without masks": (
        lambda model, pair: model(pair.inputs("wide")["input_ids"], pair.inputs("wide")["pixel_values"]),
        "pass all that the processor returns",
    ),
    "one column of mask beside a cache": (with_cache(attention_mask=torch.ones(1, 1)), r"\[1, 13\] is expected"),
    "another batch than the cache's": (with_cache(input_ids=torch.tensor([[70], [71]])), "has 2 rows.*has 1"),
    "other tiles than before": (
        with_cache(cross_attention_mask=lambda pair: pair.inputs("wide")["cross_attention_mask"][:, -1:] * 0),
        "give the complete text again",
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
    "a copied cache": (a_copied_cache, "call generate again with the complete text"),
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
