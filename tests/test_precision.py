"""What an IR is computed in: by CPU and stamp, and that OpenVINO is told so."""

import openvino as ov
import pytest
import torch
from openvino.properties import hint as hints

from conftest import F32
from ov_mllama.model import OVMLlamaForConditionalGeneration
from ov_mllama.precision import Cpu, choose, vision_option
from ov_mllama_compression import compress, optimize_vision_encoder, vision_encoder_selection_widget

AMX = Cpu(amx=True, bf16=True, vnni=True)
ZEN = Cpu(bf16=True, vnni=True, amd=True)
INTEL = Cpu(bf16=True, vnni=True)  # without AMX, or in a virtual machine that hides it
OLD = Cpu()
INT4 = {"format": "int4_asym", "group_size": "64"}
GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


@pytest.mark.parametrize(
    ("part", "stamp", "cpu", "precision", "group"),
    [
        ("language", INT4, AMX, "f32", 64),
        ("language", INT4, ZEN, None, 64),
        ("language", INT4, INTEL, None, 64),
        ("language", INT4, OLD, None, None),
        ("language", {**INT4, "group_size": "-1"}, ZEN, None, 128),
        ("language", {"format": "int8_asym", "group_size": "-1"}, INTEL, None, 128),
        ("language", {"format": "int4_sym", "group_size": "128"}, ZEN, None, 128),
        ("language", {"format": "int4_asym"}, ZEN, None, None),  # made before the stamp said it
        ("language", {"format": "16 bit"}, AMX, None, None),
        ("vision", {"format": "16 bit"}, AMX, None, None),
        ("vision", {"format": "16 bit"}, ZEN, None, None),
        ("vision", {"format": "16 bit"}, INTEL, "f32", None),
        ("vision", {"format": "int8"}, INTEL, "f32", None),
        ("vision", {"format": "int8_asym"}, INTEL, "f32", 128),
        ("vision", {"format": "int8_asym"}, ZEN, None, 128),
        ("vision", {"format": "int8_asym"}, OLD, None, None),
    ],
)
def test_by_cpu_and_stamp(part, stamp, cpu, precision, group):
    properties, reason = choose(part, stamp, cpu=cpu)
    expected = ({"INFERENCE_PRECISION_HINT": precision} if precision else {}) | ({GROUP: group} if group else {})
    assert properties == expected
    assert (precision or ("bf16" if cpu.bf16 else "f32")) in reason
    assert (f"{group} numbers" in reason) == bool(group)


def test_what_is_given_goes_before_it():
    given = {GROUP: 32}
    properties, reason = choose("language", INT4, ov_config=given, cpu=AMX)
    assert properties == {"INFERENCE_PRECISION_HINT": "f32", GROUP: 32}
    assert f"{GROUP}=32" in reason
    assert given == {GROUP: 32}
    assert choose("language", INT4, ov_config={hints.inference_precision: ov.Type.bf16}, cpu=AMX).properties == {
        "INFERENCE_PRECISION_HINT": ov.Type.bf16,
        GROUP: 64,
    }
    for accuracy in (F32, {hints.execution_mode: hints.ExecutionMode.ACCURACY}):
        assert choose("language", INT4, ov_config=accuracy, cpu=AMX).properties == accuracy
    fast = {"EXECUTION_MODE_HINT": "PERFORMANCE"}
    assert choose("language", INT4, ov_config=fast, cpu=AMX).properties[GROUP] == 64
    assert choose("language", INT4, "GPU.0", {"A": 1}, AMX).properties == {"A": 1}
    assert choose("language", INT4, "AUTO", cpu=AMX).properties == {}


def test_amx_that_may_not_be_used(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_vnni": True})
    assert Cpu.here().amx
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert not Cpu.here().amx
    assert Cpu.here().vnni


@pytest.mark.parametrize("cpu", [AMX, INTEL])
def test_openvino_is_told(copy, monkeypatch, cpu):
    """The compiled models have what was chosen, none of it OpenVINO's default; exact where asked for."""
    monkeypatch.setattr(Cpu, "here", lambda: cpu)
    names = dict(
        language_model_name=compress(copy, algo="int8_asym").name,
        image_encoder_name=optimize_vision_encoder(copy, "INT8 weights compression").name,
    )
    model = OVMLlamaForConditionalGeneration(copy, **names)
    language, vision = model.language_model, model.image_encoder
    assert language.chosen.properties[GROUP] == vision.chosen.properties[GROUP] == 128
    for part, compiled in ((language, language.compiled), (vision, vision._request.get_compiled_model())):
        for name, value in part.chosen.properties.items():
            got = compiled.get_property(name)
            assert str(getattr(got, "get_type_name", lambda got=got: got)()) == str(value), name
    exact = OVMLlamaForConditionalGeneration(copy, ov_config=F32, **names)
    assert exact.language_model.compiled.get_property(GROUP) == 0
    assert exact.language_model.compiled.get_property("KV_CACHE_PRECISION").get_type_name() == "f32"


def test_the_widget_follows_the_cpu(monkeypatch):
    assert vision_option(cpu=AMX) == "INT8 quantization"
    assert {vision_option(cpu=cpu) for cpu in (ZEN, INTEL, OLD)} == {"INT8 weights compression"}
    monkeypatch.setattr(Cpu, "here", lambda: AMX)
    assert vision_encoder_selection_widget("CPU").value == "INT8 quantization"
    assert vision_encoder_selection_widget("GPU.0").value == "INT8 weights compression"
