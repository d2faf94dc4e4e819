"""Compressed IRs hold what the settings say, both routes give the same file, and what NNCF refuses is refused first."""

import errno
import itertools
import shutil
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import nncf
import numpy as np
import openvino as ov
import psutil
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor

import ov_mllama.export.compress
from conftest import DEMO, F32, demo_samples
from data_preprocessing import HUB_SET, PACKAGED, load_samples, prepare_dataset_llm, prepare_dataset_vision
from demo_model import SAMPLES
from ov_mllama.export import calibration, costs
from ov_mllama.export.compress import nncf_arguments
from ov_mllama.export.samples import calibration_samples
from ov_mllama.export.settings import DEFAULT_SOURCES, GROUP_SIZES, INT4, INT8, Settings, vision_options
from ov_mllama.runtime.devices import Cpu
from ov_mllama.runtime.ir import VISION_ENCODER_NAME, check_model_dir, ir_stamp
from ov_mllama.runtime.vision import OVImageEncoder
from ov_mllama_compression import (
    compress,
    compression_widgets_helper,
    optimize_vision_encoder,
    vision_encoder_selection_widget,
)
from ov_mllama_helper import OVMLlamaForConditionalGeneration

PLAIN = dict(group_size=64)  # for Settings: INT4, data-free


@pytest.fixture(scope="module")
def model_dir(demo_dir, tmp_path_factory):
    """A copy that is compressed in many ways, each once."""
    return shutil.copytree(demo_dir, tmp_path_factory.mktemp("compression") / "ov")


@pytest.fixture(scope="module")
def vision_dir(demo_dir, tmp_path_factory):
    """The demo without a language model in 16 bit."""
    ignored = shutil.ignore_patterns("openvino_language_model.*")
    return shutil.copytree(demo_dir, tmp_path_factory.mktemp("vision") / "ov", ignore=ignored)


@pytest.fixture(scope="module")
def processor(model_dir):
    return AutoProcessor.from_pretrained(model_dir)


def constant_types(path) -> Counter:
    """Number of weight matrices (constants of two or three axes that are large) an IR has in each type."""
    model = ov.Core().read_model(path)
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return Counter(
        op.get_element_type().get_type_name()
        for op in constants
        if len(op.get_output_shape(0)) >= 2 and np.prod(op.get_output_shape(0)) > 10_000
    )


# ---- Weights of the language model ----------------------------------------------------------------------------------


def layers(model_dir) -> int:
    """Linear layers inside the language model: 7 for self-attention, 5 for cross-attention without K and V."""
    text = AutoConfig.from_pretrained(model_dir).text_config
    cross = len(text.cross_attention_layers)
    return 7 * (text.num_hidden_layers - cross) + 5 * cross


def test_int8_compresses_every_matrix(model_dir):
    path = compress(model_dir, algo="int8_asym")
    assert path.name == "llm_int8_asym.xml"
    assert constant_types(path) == {"u8": layers(model_dir) + 2}  # with embedding and head


@pytest.mark.parametrize(("algo", "kind"), [("int4_asym", "u4"), ("int4_sym", "i4")])
@pytest.mark.parametrize("all_layers", [False, True])
def test_int4_leaves_embedding_and_head_in_8_bit(model_dir, algo, kind, all_layers):
    types = constant_types(compress(model_dir, algo=algo, all_layers=all_layers))
    count = layers(model_dir)
    assert types == ({kind: count + 2} if all_layers else {kind: count, "u8": 2})


def test_ratio_and_int8_layers_keep_layers_in_8_bit(model_dir):
    count = layers(model_dir)
    half = constant_types(compress(model_dir, ratio=0.5))
    assert half["u4"] + half["u8"] == count + 2
    assert 0 < half["u4"] < count
    kept = constant_types(compress(model_dir, int8_layers=("cross_attn.o_proj",)))
    assert kept == {"u4": count - 2, "u8": 4}


@pytest.mark.parametrize("names", ["cross_attn.o_proj", ["cross_attn.o_proj"], ("cross_attn.o_proj",)])
def test_one_name_of_int8_layers_may_be_plain_text(model_dir, names):
    settings = Settings.of(int8_layers=names)
    assert settings == Settings(int8_layers=names) == Settings(int8_layers=("cross_attn.o_proj",))
    assert settings.file_name == "llm_int4_asym_r10_gs64_int8_cross_attn.o_proj.xml"
    assert constant_types(compress(model_dir, int8_layers=names)) == {"u4": layers(model_dir) - 2, "u8": 4}


@pytest.mark.parametrize("names", [(1,), ("",), ("a/b",), ("o_proj(",), "o proj"])
def test_int8_layers_that_are_no_names_are_refused(names):
    with pytest.raises(ValueError, match="give names of layers"):
        Settings.of(int8_layers=names)
    with pytest.raises(ValueError, match="give names of layers"):
        Settings(int8_layers=names)


def test_plain_name_where_names_are_expected(model_dir):
    assert Settings.of(int8_layers=None) == Settings.of()
    assert set(check_model_dir(model_dir, VISION_ENCODER_NAME)) == {VISION_ENCODER_NAME}


def test_file_name_is_the_seeds():
    settings = dict(PLAIN, sm="max_activation_variance", awq=True, scale_estimation=True, all_layers=True)
    assert Settings(**settings).file_name == "llm_int4_asym_r10_gs64_max_activation_variance_awq_scale_all_layers.xml"


def test_existing_file_is_reused_and_force_rebuilds_it(model_dir, caplog):
    caplog.set_level("INFO")
    path = compress(model_dir)
    written = path.stat().st_mtime_ns
    assert compress(model_dir) == path
    assert path.stat().st_mtime_ns == written
    assert "already exists" in caplog.text
    compress(model_dir, force=True)
    assert path.stat().st_mtime_ns > written
    path.with_suffix(".bin").write_bytes(b"")  # as a full disk might leave it
    compress(model_dir)
    assert path.with_suffix(".bin").stat().st_size > 1e6


@pytest.mark.torture
def test_straight_from_the_checkpoint_is_the_same_file(model_dir, vision_dir, times):
    short = [{}, {"dataset_size": 4, "awq": True}]
    for arguments in times(short, [*short, {"algo": "int8_asym"}, {"awq": True}, {"dataset_size": 4}]):
        expected = compress(model_dir, source=SAMPLES, **arguments)
        actual = compress(vision_dir, source=SAMPLES, checkpoint=DEMO, **arguments)
        assert not (vision_dir / "openvino_language_model.xml").exists()
        assert actual.name == expected.name
        ours, theirs = (np.frombuffer(path.with_suffix(".bin").read_bytes(), np.uint8) for path in (actual, expected))
        # AWQ fits scales to statistics in NumPy: where arrays lie in memory may move one of them by its last bit (seen
        # on an AMD EPYC: one of 1536)
        assert np.mean(ours != theirs) <= (1e-5 if len(arguments) == 2 else 0), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"dataset_size": 4, "awq": True},
        {"dataset_size": 4, "gptq": True},
        {"dataset_size": 4, "lora": True},
        {"dataset_size": 100, "ratio": 0.7, "sm": "hessian_input_activation"},  # there are 13
    ],
)
def test_data_aware_variants_still_answer(model_dir, processor, arguments):
    path = compress(model_dir, source=SAMPLES, **arguments)
    model = OVMLlamaForConditionalGeneration(model_dir, language_model_name=path.name, ov_config=F32)
    assert model.language_model.gives_queries
    inputs = processor(text="<|image|>What?", images=[demo_samples()[0]["image"]], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


# ---- What goes together ---------------------------------------------------------------------------------------------


def matmul_model() -> ov.Model:
    from openvino import opset13 as ops

    parameter = ops.parameter([-1, 128], ov.Type.f32, name="x")
    weights = [np.random.default_rng(i).normal(size=(128, 128)).astype(np.float32) for i in range(3)]
    node = parameter
    for weight in weights:
        node = ops.matmul(node, ops.constant(weight), False, True)
    return ov.Model([node], [parameter])


def every_combination():
    flags = itertools.product([False, True], repeat=4)
    for algo, (awq, scale, lora, gptq), size in itertools.product(INT4[:1] + INT8[:1], flags, (0, 1)):
        for sm, ratio in ((None, 1.0), ("max_activation_variance", 0.5), ("weight_quantization_error", 0.5)):
            yield dict(
                PLAIN,
                algo=algo,
                awq=awq,
                scale_estimation=scale,
                lora=lora,
                gptq=gptq,
                dataset_size=size,
                sm=sm,
                ratio=ratio if algo in INT4 else 1.0,
                group_size=64 if algo in INT4 else -1,
            )


@pytest.mark.torture
def test_what_nncf_refuses_is_refused_first_and_nothing_else(model_dir, times):
    """INT8 modes ignore what they have no use for in some NNCF backends; here they never come with it."""
    config, refused = AutoConfig.from_pretrained(model_dir), 0
    sample = [{"x": np.random.default_rng(9).normal(size=(8, 128)).astype(np.float32)}]
    for arguments in [*every_combination()][:: times(5, 1)]:  # coprime to how many values each setting has
        settings = Settings(**arguments)
        try:
            settings.check(config)
        except ValueError as error:
            assert any(word in str(error) for word in ("leave", "set ", "use ", "choose"))  # noqa: PT017
            refused += 1
            ours = True
        else:
            ours = False
        dataset = nncf.Dataset(sample) if arguments["dataset_size"] else None
        options = nncf_arguments(settings)
        if arguments["algo"] in INT8:
            options |= {
                name: True if value is True else value
                for name, value in {
                    "awq": settings.awq or None,
                    "scale_estimation": settings.scale_estimation or None,
                    "gptq": settings.gptq or None,
                    "lora_correction": settings.lora or None,
                    "sensitivity_metric": settings.sm and nncf.SensitivityMetric(settings.sm),
                }.items()
                if value
            }
        try:
            nncf.compress_weights(matmul_model(), dataset=dataset, **options)
        except (nncf.ParameterNotSupportedError, nncf.ValidationError):
            assert ours, arguments
        else:
            assert not ours, arguments
    assert refused > times(8, 20)


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        ({"group_size": 100}, "32, 64, 128, -1"),
        ({"ratio": 1.5}, "use 0"),
        ({"algo": "int5"}, "int4_asym"),
        ({"algo": "int8_sym", "group_size": 64}, "group_size"),
        ({"dataset_size": -1}, "use 0"),
        ({"scale_estimation": True}, "dataset_size=32"),
    ],
)
def test_refusals_name_the_fix(model_dir, arguments, fix):
    with pytest.raises(ValueError, match=fix):
        compress(model_dir, **arguments)


@pytest.mark.parametrize(
    ("arguments", "fix"), [({"dataset_size": 32, "awq": True}, "dataset_size=0"), ({"awq": True}, "awq=False")]
)
def test_too_little_memory_points_to_the_way_that_needs_less(model_dir, monkeypatch, arguments, fix):
    needed = costs.compression_cost(Settings(**dict(PLAIN, **arguments)), AutoConfig.from_pretrained(model_dir))[1]
    memory = SimpleNamespace(available=needed - 1e6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError, match=f"only .* GB are available: .*{fix}"):
        compress(model_dir, force=True, source=SAMPLES, **arguments)


def test_disk_is_what_is_written(model_dir):
    config = AutoConfig.from_pretrained(model_dir)
    for arguments in ({}, {"algo": "int8_asym", "group_size": -1}, {"all_layers": True}):
        written = compress(model_dir, **arguments).with_suffix(".bin").stat().st_size
        cost = costs.compression_cost(Settings(**dict(PLAIN, **arguments)), config)
        assert written == pytest.approx(cost[0], rel=0.1)


def test_nothing_to_compress(vision_dir, tmp_path):
    empty = shutil.copytree(vision_dir, tmp_path / "ov", ignore=shutil.ignore_patterns("llm_*"))
    with pytest.raises(FileNotFoundError, match="convert_mllama"):
        compress(empty)


def test_widgets_always_hold_settings_that_go_together(model_dir):
    box, widgets = compression_widgets_helper()
    route, config = box.children[0], AutoConfig.from_pretrained(model_dir)
    for chosen, algo in itertools.product(route.options * 2, (*INT4, *INT8)):
        route.value, widgets["algo"].value = chosen, algo
        values = {name: widget.value for name, widget in widgets.items()}
        Settings(**values).check(config)
        assert bool(values["dataset_size"]) == (chosen == "data-aware" and algo in INT4)
    assert widgets["group_size"].options == GROUP_SIZES


# ---- Calibration samples --------------------------------------------------------------------------------------------


def test_vision_samples_are_the_pictures_own(processor):
    """Each sample's tiles and masks are what the processor makes of that very picture."""
    pictures = {sample["answer"]: sample["image"] for sample in demo_samples()}
    samples = list(load_samples(SAMPLES, 13))
    assert {sample["answer"] for sample in samples} == set(pictures)
    for sample, inputs in zip(samples, prepare_dataset_vision(processor, 13, SAMPLES), strict=True):
        expected = processor.image_processor(pictures[sample["answer"]].convert("RGB"), return_tensors="np")
        np.testing.assert_array_equal(inputs["pixel_values"], expected["pixel_values"][0, 0])
        assert inputs["real_tiles"] == expected["aspect_ratio_mask"][0, 0].sum()
        assert inputs["tile_counts"].tolist() == [1, 1, 1, 1]
        assert inputs["aspect_ratio_ids"] == expected["aspect_ratio_ids"][0, 0]


def test_language_samples_differ_and_see_only_real_tiles(model_dir, processor):
    model = OVMLlamaForConditionalGeneration(model_dir, ov_config=F32)
    encoder = OVImageEncoder(model_dir / VISION_ENCODER_NAME, model.shapes, ov_config=F32)
    dataset = prepare_dataset_llm(processor, encoder, 13, SAMPLES)
    first, again = list(dataset), list(dataset)
    name = model.shapes.cross_kv_names[0]
    for inputs, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(inputs[name], same[name])
    assert len({inputs[name].tobytes() for inputs in first}) == 13
    assert len({inputs["input_ids"].tobytes() for inputs in first}) == 13
    for sample, inputs in zip(load_samples(SAMPLES, 13), first, strict=True):
        tiles = processor.image_processor(sample["image"], return_tensors="np")["aspect_ratio_mask"].sum()
        visible = (inputs["cross_attention_bias"] == 0).any((0, 1, 2))
        rows = inputs[name].shape[-1]
        # the tokens before the picture look at all rows (transformers#39379), those after it at its own tiles
        after = inputs["cross_attention_bias"][0, 0, -1] if visible.size > 1 else np.zeros(rows)
        assert (after == 0).sum() == tiles * model.shapes.patches_per_tile


def test_broken_pictures_are_skipped_and_counted(tmp_path, caplog):
    for i in range(4):
        Image.new("RGB", (60, 60), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    captions = ["a", "b", "", "d"]
    (tmp_path / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{i}.png", "caption": "{caption}"}}\n' for i, caption in enumerate(captions))
    )
    assert sorted(sample["answer"] for sample in load_samples(tmp_path, 10)) == ["a", "d"]
    assert "1 × no caption" in caplog.text
    assert "1 × unreadable image" in caplog.text


@pytest.fixture
def read_only(monkeypatch):
    """NNCF reads its calibration samples, and changes nothing; the number of each data set."""
    counts = []

    def read(model, samples):
        counts.append(sum(1 for _ in samples))
        return model

    def compress_weights(model, settings, dataset=None):
        return read(model, dataset.get_inference_data()) if dataset else model

    monkeypatch.setattr(
        ov_mllama.export.compress, "quantize_in_pieces", lambda model, samples, *_: read(model, samples)
    )
    monkeypatch.setattr(ov_mllama.export.compress, "compress_weights", compress_weights)
    return counts


@pytest.mark.torture
@pytest.mark.parametrize("source", ["folder", "photographs", DEFAULT_SOURCES[1]])
def test_fewer_samples_than_asked_are_said_and_stamped(model_dir, source, caplog, request, times):
    """NNCF gets them with --torture; those of a folder also in `test_vision_encoder_options` and
    `test_data_aware_variants_still_answer`."""
    counts = times(lambda: request.getfixturevalue("read_only"), lambda: None)()
    source = SAMPLES if source == "folder" else source
    available = 13 if source == SAMPLES else len(calibration_samples())
    said = f"{source} has {available} samples, 100 were requested"
    makers = (
        partial(compress, model_dir, dataset_size=100, source=source, group_size=128),
        partial(optimize_vision_encoder, model_dir, "INT8 quantization", dataset_size=100, source=source),
    )
    chosen = {"photographs": makers[:1], DEFAULT_SOURCES[1]: makers[1:]}.get(
        source, makers
    )  # both are the same pictures
    makers = times(chosen, makers)
    for make in makers:
        made = make()
        assert said in caplog.text
        caplog.clear()
        assert ir_stamp(made)["samples"] == f"{available} of {source}"
        written = made.stat().st_mtime_ns
        assert make().stat().st_mtime_ns == written
        made.unlink()
    assert counts in (None, [available] * len(makers))


def test_broken_pictures_do_not_count_as_samples(model_dir, tmp_path, read_only):
    for i in range(3):
        Image.effect_noise((60, 60), 9 + i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    lines = [f'{{"file_name": "{i}.png", "caption": "a"}}\n' for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="has 2 usable samples and 3 were requested"):
        optimize_vision_encoder(model_dir, "INT8 quantization", dataset_size=3, source=tmp_path, force=True)
    made = optimize_vision_encoder(model_dir, "INT8 quantization", dataset_size=2, source=tmp_path)
    assert ir_stamp(made)["samples"] == f"2 of {tmp_path}"
    assert read_only == [2]
    made.unlink()


def test_stamp_names_the_default_photographs_that_were_used(model_dir, monkeypatch, read_only):
    reached, opened = [PACKAGED], []
    monkeypatch.setattr(calibration, "default_source", lambda seed=0: opened.append(1) or reached[0])
    make = partial(optimize_vision_encoder, model_dir, "INT8 quantization", dataset_size=2)
    path = make(force=True)
    assert ir_stamp(path)["samples"] == f"2 of {PACKAGED}"
    written = path.stat().st_mtime_ns
    reached[0] = HUB_SET  # the network is back: what is there stays, and nothing is asked of the hub
    assert make().stat().st_mtime_ns == written
    assert len(opened) == 1
    monkeypatch.setattr(calibration, "open_dataset", lambda source, seed: calibration.open_photographs(0))
    assert ir_stamp(make(force=True))["samples"] == f"2 of {HUB_SET}"
    path.unlink()
    assert read_only == [2, 2]
    compress(model_dir, group_size=128).unlink()  # without data nobody is asked
    assert len(opened) == 2


def test_disk_that_fails_is_no_unreadable_picture(monkeypatch):
    def failing(picture):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(calibration, "load_image", failing)
    with pytest.raises(OSError, match="Input/output error"):
        list(load_samples(SAMPLES, 1))


def test_sources_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client tries five times, 20 s in all
    Image.new("RGB", (60, 60)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="caption"):
        list(load_samples(tmp_path, 1))
    with pytest.raises(FileNotFoundError, match="'photographs'"):
        list(load_samples("no-such/data-set", 1))


# ---- Vision encoder -------------------------------------------------------------------------------------------------


def test_vision_encoder_options(model_dir, monkeypatch):
    assert optimize_vision_encoder(model_dir, "FP16").name == VISION_ENCODER_NAME
    stored = optimize_vision_encoder(model_dir, "INT8 weights compression")
    # of samples there are 13
    quantized = optimize_vision_encoder(model_dir, "INT8 quantization", dataset_size=100, source=SAMPLES)
    vision = AutoConfig.from_pretrained(model_dir).vision_config
    linear = 6 * (vision.num_hidden_layers + vision.num_global_layers)
    assert stored.name == "openvino_vision_encoder_int8_wc.xml"
    assert constant_types(stored)["u8"] >= linear
    assert quantized.name == "openvino_vision_encoder_int8.xml"
    assert constant_types(quantized)["i8"] >= linear
    fake = [op for op in ov.Core().read_model(quantized).get_ops() if op.get_type_name() == "FakeQuantize"]
    assert len(fake) > vision.num_hidden_layers + vision.num_global_layers

    monkeypatch.setattr(ov_mllama.export.compress.nncf, "quantize", lambda *_, **__: pytest.fail("not reused"))
    assert optimize_vision_encoder(model_dir, "INT8 quantization", dataset_size=100, source=SAMPLES) == quantized
    with pytest.raises(ValueError, match="FP16"):
        optimize_vision_encoder(model_dir, "INT2")
    with pytest.raises(ValueError, match="INT8 quantization needs images: give samples"):
        ov_mllama.export.compress.make_vision_encoder(model_dir, "INT8 quantization", force=True)


@pytest.mark.parametrize(
    ("cpu", "algo", "group_size"),
    [
        (Cpu(), "int4_sym", 128),  # AVX2 or AVX-512 alone
        (Cpu(amd=True), "int4_sym", 128),
        (Cpu(vnni=True), "int4_asym", 64),
        (Cpu(bf16=True, vnni=True, amd=True), "int4_asym", 64),
        (Cpu(amx=True, bf16=True, vnni=True), "int4_asym", 64),
        (Cpu(arm=True), "int4_asym", 64),
    ],
)
def test_defaults_by_cpu(cpu, algo, group_size, monkeypatch):
    assert Settings.here(cpu) == Settings(algo, group_size=group_size)
    monkeypatch.setattr(Cpu, "here", lambda: cpu)
    assert Settings.of() == Settings.here(cpu)
    assert Settings.of(algo="int4_asym") == Settings()  # what is given goes with its own defaults
    assert Settings.of(algo="int8_asym").group_size == -1
    widgets = compression_widgets_helper()[1]
    assert (widgets["algo"].value, widgets["group_size"].value) == (algo, group_size)
    calibrated = "INT8 quantization"
    assert (calibrated in vision_encoder_selection_widget().options) == (calibrated in vision_options(cpu))
    assert (calibrated in vision_options(cpu)) == cpu.in_8_bit
    assert calibrated in vision_encoder_selection_widget("GPU").options
