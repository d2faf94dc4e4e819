"""Differences by device, as far as they can be tested without the device: the K/V's way through a GPU's memory, with a
stand-in for its context, and the golden answer."""

import json
import shutil
import warnings

import openvino as ov
import pytest

from conftest import F32
from ov_mllama.runtime.language import OVLanguageModel
from ov_mllama_helper import OVMLlamaForConditionalGeneration

GREEDY = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)


class HostContext:
    """Gives out memory as a GPU's context does, only that it is the host's; counts what is allocated."""

    def __init__(self):
        self.allocated = []

    def create_tensor(self, element_type, shape, properties):
        self.allocated.append(tuple(shape))
        return ov.Tensor(element_type, shape)


@pytest.fixture
def model(pair):
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, kv_cache_bytes=0)  # one session at a time
    model.language_model.context = HostContext()  # every session from now on
    return model


def test_the_tokens_are_the_same_through_device_memory(pair, model):
    for case in ("wide", "two images", "text before image", "mixed batch", "text only", "wide", "chat", "tall"):
        expected = pair.hf.generate(**pair.inputs(case), **GREEDY)
        assert model.generate(**pair.inputs(case), **GREEDY).tolist() == expected.tolist(), case


def test_device_memory_is_allocated_once_per_shape(pair, model):
    context = model.language_model.context
    names = len(model.shapes.cross_kv_names)
    for case in ("one tile", "one tile", "chat", "one tile"):  # the rows of one tile, and those of both pictures
        model.generate(**pair.inputs(case), **GREEDY)
    assert len(context.allocated) == 2 * names
    assert len(set(context.allocated)) == 4


def test_the_language_model_reads_device_memory(pair, model):
    model.generate(**pair.inputs("wide"), **GREEDY)
    session = model.sessions._sessions[-1]
    tensors = session.cache.cross_attention.key_values
    assert all(isinstance(tensor, ov.Tensor) for tensor in tensors.values())
    name, tensor = next(iter(tensors.items()))
    assert session.request.get_tensor(name).data.ctypes.data == tensor.data.ctypes.data


def test_device_memory_is_used_where_asked_for_and_there(pair, monkeypatch):
    def context(**options):
        return OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32, **options).language_model.context

    assert context() is None
    assert context(use_remote_tensors=True) is None  # a CPU's memory is the host's
    compiled = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32).language_model.compiled
    stand_in = HostContext()

    class GPU:
        """The CPU's compiled model, with a context of its own."""

        def __getattr__(self, name):
            return getattr(compiled, name)

        def get_context(self):
            return stand_in

    monkeypatch.setattr(ov.Core, "compile_model", lambda *_: GPU())
    for device, expected in (("GPU", stand_in), ("GPU.1", stand_in), ("AUTO", None)):
        model = OVLanguageModel("an.xml", pair.ov.shapes, device, device_memory=True)
        assert model.context is expected
        assert OVLanguageModel("an.xml", pair.ov.shapes, device).context is None


def test_golden_answer(demo_dir, tmp_path):
    folder = shutil.copytree(demo_dir, tmp_path / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = OVMLlamaForConditionalGeneration(folder)
    assert model.stats.prompt_tokens == 0
    assert not model.llm_infer_time
    assert not model.vision_encoder_infer_time
    assert model.image_encoder.cache.nbytes == 0

    golden = json.loads((folder / "golden.json").read_text())
    (folder / "golden.json").write_text(json.dumps(golden | {"answer": "!!!!"}))
    with pytest.warns(UserWarning, match="On CPU this model answers 'A green square.*transformers answers '!!!!'"):
        OVMLlamaForConditionalGeneration(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OVMLlamaForConditionalGeneration(folder, check_golden=False)
        (folder / "golden.json").unlink()
        OVMLlamaForConditionalGeneration(folder)
