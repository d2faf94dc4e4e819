"""The published notebook's code on these modules: it gets results, or a sentence that says what to write instead."""

import warnings

import nncf
import openvino as ov
import psutil
import pytest
import torch

from conftest import F32
from data_preprocessing import prepare_dataset_vision
from demo_model import SAMPLES
from gradio_helper import make_demo
from ov_mllama_compression import compress, compression_widgets_helper, vision_encoder_selection_widget
from ov_mllama_helper import IMAGE_ENCODER, LANGUAGE_MODEL, OVMLlamaForConditionalGeneration

GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)


def test_names_and_defaults(pair):
    assert (pair.model_dir / LANGUAGE_MODEL).is_file()
    assert (pair.model_dir / IMAGE_ENCODER).is_file()
    for device in ((), ("CPU",), ("GPU.0",)):
        assert vision_encoder_selection_widget(*device).value == "INT8 weights compression"
    model = OVMLlamaForConditionalGeneration(
        pair.model_dir, "CPU", F32, language_model_name=None, image_encoder_name=None, dynamic_shape=False
    )
    inputs = pair.inputs("wide")
    assert model.generate(**inputs, **GREEDY).tolist() == pair.ov.generate(**inputs, **GREEDY).tolist()


def test_both_ways_to_choose_settings_have_the_same_metric():
    box, widgets = compression_widgets_helper()
    box.children[0].value = "data-aware"
    assert widgets["sm"].value == "max_activation_variance"


def test_samples_without_a_processor():
    with pytest.raises(TypeError, match=r"prepare_dataset_vision\(AutoProcessor"):
        prepare_dataset_vision(100)


def test_an_unknown_setting(copy):
    with pytest.raises(TypeError, match="no setting ratios: there are algo, ratio"):
        compress(copy, ratios=1)


def quantized(pair, copy):
    """The seed's cells."""
    model = ov.Core().read_model(copy / IMAGE_ENCODER)
    samples = nncf.Dataset(prepare_dataset_vision(pair.processor, 2, SAMPLES))
    parameters = nncf.AdvancedQuantizationParameters(smooth_quant_alpha=0.6)
    model = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER, advanced_parameters=parameters)
    ov.save_model(model, copy / "openvino_vision_encoder_int8.xml")
    return {"image_encoder_name": "openvino_vision_encoder_int8.xml"}


def compressed_vision(pair, copy):
    model = nncf.compress_weights(ov.Core().read_model(copy / IMAGE_ENCODER))
    ov.save_model(model, copy / "openvino_vision_encoder_int8_wc.xml")
    return {"image_encoder_name": "openvino_vision_encoder_int8_wc.xml"}


def compressed_language(pair, copy):
    model = ov.Core().read_model(copy / LANGUAGE_MODEL)
    ov.save_model(nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM), copy / "mine.xml")
    return {"language_model_name": "mine.xml"}


@pytest.mark.parametrize("make", [quantized, compressed_vision, compressed_language])
def test_an_ir_of_ones_own_is_loaded_with_a_warning(pair, copy, make):
    names = make(pair, copy)
    with pytest.warns(UserWarning, match="its provenance and integrity are unknown"):
        model = OVMLlamaForConditionalGeneration(copy, ov_config=F32, **names)
    logits = model(**pair.inputs("wide")).logits
    exact = pair.ov(**pair.inputs("wide")).logits
    assert torch.isfinite(logits).all()
    assert (logits - exact).abs().mean() < 0.5 * exact.std()

    path = (copy / next(iter(names.values()))).with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="incomplete"):
        OVMLlamaForConditionalGeneration(copy, **names)


def test_the_chat_is_safe_as_it_stands(pair):
    demo = make_demo(pair.ov, pair.processor)
    _, url, share = demo.launch(prevent_thread_lock=True)
    try:
        port = int(url.rstrip("/").rpartition(":")[2])
        connections = psutil.Process().net_connections()
        assert {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port} == {"127.0.0.1"}
        assert not share
        assert demo.max_file_size in (50_000_000, 50 * 1024**2)
        assert ".edit-textarea" in demo.css
    finally:
        demo.close()


def test_what_is_ours_is_loaded_without_a_word(pair, copy):
    name = compress(copy, group_size=32).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OVMLlamaForConditionalGeneration(copy, language_model_name=name)
