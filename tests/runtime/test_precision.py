"""Precision of each IR by CPU and stamp, and as OpenVINO receives it."""

import numpy as np
import openvino as ov
import pytest
import torch
from openvino.properties import hint as hints

from conftest import F32
from ov_mllama.runtime.cross_attention import tiles_seen
from ov_mllama.runtime.devices import PRECISION, Cpu, choose
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.language import OVLanguageModel
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.vision import ImageInputs, image_keys
from ov_mllama_compression import compress, optimize_vision_encoder

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
        ("language", INT4, OLD, "f32", 0),
        ("language", {"format": "16 bit"}, OLD, "f32", None),
        ("language", INT4, Cpu(arm=True), None, None),  # OpenVINO's choice: f16 where there is
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
        ("vision", {"format": "int8_asym"}, OLD, "f32", 0),
    ],
)
def test_by_cpu_and_stamp(part, stamp, cpu, precision, group):
    properties, reason, _ = choose(part, stamp, cpu=cpu)
    expected = ({"INFERENCE_PRECISION_HINT": precision} if precision else {}) | (
        {GROUP: group} if group is not None else {}
    )
    assert properties == expected
    assert (precision or ("bf16" if cpu.bf16 else "f32")) in reason
    assert (f"{group} activations" in reason) == bool(group)


def test_what_is_given_goes_before_it():
    given = {GROUP: 32}
    properties, reason, _ = choose("language", INT4, ov_config=given, cpu=AMX)
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


@pytest.mark.parametrize("variable", ["OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("isa", "allowed"),
    [
        ("avx2", ""),
        ("AVX512_CORE", ""),
        ("AVX2_VNNI", "vnni"),
        ("AVX2_VNNI_2", "bf16 vnni"),
        ("AVX512_CORE_VNNI", "vnni"),
        ("AVX512_CORE_BF16", "bf16 vnni"),
        ("AVX512_CORE_FP16", "bf16 vnni"),
        ("avx512_core_amx", "amx bf16 vnni"),
        ("ALL", "amx bf16 vnni"),
        ("DEFAULT", "amx bf16 vnni"),
        ("", "amx bf16 vnni"),
    ],
)
def test_simulated_cpu_is_what_is_detected(monkeypatch, variable, isa, allowed):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_vnni": True})
    answers = {"FULL_DEVICE_NAME": "Intel Xeon", "OPTIMIZATION_CAPABILITIES": ["FP32", "BF16"]}
    monkeypatch.setattr(ov.Core, "get_property", lambda core, device, key: answers[key])
    for name in ("OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, isa)
    cpu = Cpu.here()
    assert [name for name in ("amx", "bf16", "vnni") if getattr(cpu, name)] == allowed.split()


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


@pytest.mark.skipif(not Cpu.here().bf16, reason="this CPU has no bf16")
def test_images_rounded_beforehand_give_the_same_logits(pair):
    """The conversion that the plugin would do at each token (`cross_attention.read_in_bf16`)."""
    inputs = {name: tensor.numpy() for name, tensor in pair.inputs("wide").items()}
    images = ImageInputs(*(inputs[name] for name in ImageInputs._fields))
    encoded = pair.ov.image_encoder.encode(images)
    seen = tiles_seen(images.cross_attention_mask, inputs["input_ids"].shape[1])
    logits = {}
    for beforehand in (True, False):
        model = OVLanguageModel(pair.ov.language_model._ir[0], pair.ov.shapes, ov_config={PRECISION: "bf16"})
        assert model.reads_bf16
        model.reads_bf16 = beforehand
        session = model.session()
        steps = [session.prefill(Prompt(inputs["input_ids"], seen=seen, image_keys=image_keys(images)), encoded)]
        steps += [session.decode(np.array([[token]])) for token in (5, 6, 7)]
        logits[beforehand] = np.concatenate(steps, 1)
        types = {model.compiled.input(name).get_element_type() for name in pair.ov.shapes.cross_kv_names}
        assert types == {ov.Type.bf16 if beforehand else ov.Type.f32}
    differs = np.abs(logits[True] - logits[False]).max() / np.abs(logits[False]).max()
    assert differs <= (2**-7 if Cpu.here().amx else 0)  # with AMX it was not tried: a rounding of bf16 is allowed


def test_only_where_it_is_computed_in_bf16():
    assert choose("language", INT4, cpu=INTEL).bf16
    for cpu, config in ((AMX, {}), (OLD, {}), (OLD, {PRECISION: "bf16"}), (INTEL, {PRECISION: "f32"})):
        assert not choose("language", INT4, ov_config=config, cpu=cpu).bf16
    assert choose("language", INT4, ov_config={PRECISION: ov.Type.bf16}, cpu=AMX).bf16
    assert not choose("language", INT4, ov_config={"EXECUTION_MODE_HINT": "ACCURACY"}, cpu=INTEL).bf16


@pytest.mark.parametrize("name", ["ARM Neoverse-V1", "Apple M4", "ARMv8 Processor"])
def test_arm_cpu_with_bf16_is_not_called_intel(monkeypatch, name):
    """As OpenVINO calls them; bf16 is its own choice for them."""
    answers = {"FULL_DEVICE_NAME": name, "OPTIMIZATION_CAPABILITIES": ["FP32", "BF16"]}
    monkeypatch.setattr(ov.Core, "get_property", lambda core, device, key: answers[key])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    cpu = Cpu.here()
    assert cpu == Cpu(bf16=True, arm=True)
    for part in ("vision", "language"):
        properties, reason, bf16 = choose(part, INT4, cpu=cpu)
        assert PRECISION not in properties
        assert "Intel" not in reason
        assert bf16


def test_cpu_without_a_known_name_is_arm_by_its_architecture(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert Cpu.here().arm
