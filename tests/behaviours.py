"""Behaviours of a model, for the tables of test_interface.py and test_refusals.py: functions of a model and of the pair
that it belongs to."""

import torch

GREEDY = dict(do_sample=False, max_new_tokens=10, eos_token_id=None)


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


def assert_same(actual, expected):
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        if one.dtype.is_floating_point:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
        else:
            assert one.tolist() == other.tolist()
