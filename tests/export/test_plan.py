"""Plans against measurements, their decisions, and the machine as they see it."""

import json
import platform
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from openvino.properties.device import Type
from transformers import AutoConfig

from benchmarks.make_checkpoint import SHAPES, make_config, make_llama_config
from benchmarks.predictions import predicted_seconds
from conftest import DEMO, F32, ROOT
from ov_mllama.__main__ import main
from ov_mllama.export import costs
from ov_mllama.export.compress import make_draft_model
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.machine import Machine
from ov_mllama.export.plan import SYSTEM_BYTES, Files, by_memory, plan
from ov_mllama.export.prepare import DRAFT_FOLDER, default_folder, plan_here, prepare
from ov_mllama.export.settings import Settings
from ov_mllama.export.sources.hub import has_weights
from ov_mllama.runtime import devices, ir, memory
from ov_mllama.runtime.checks import check_prompt_fits, image_arrays
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, newest
from ov_mllama.runtime.kv_cache import Prompt
from ov_mllama.runtime.language import PREFILL_TOKENS
from ov_mllama.runtime.measure import FORMATS, Speed
from ov_mllama.runtime.memory import group_memory
from ov_mllama.runtime.model import OVMLlamaForConditionalGeneration
from ov_mllama.runtime.speculative import OVDraftModel
from ov_mllama.runtime.vision import ImageInputs, image_keys
from tiny_mllama import make_checkpoint, make_llama

PLAIN, HERE = Settings(), Settings.here()
GREEDY = dict(do_sample=False, max_new_tokens=4, eos_token_id=None)
MUCH = float("inf")
MEASURED = json.loads((ROOT / "benchmarks/results/11b-without-amx.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def config():
    return make_config(**SHAPES["11b"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(DEMO, tmp_path_factory.mktemp("prepared") / "ov")


# ---- Figures ----


def test_seconds_and_bytes_of_the_11b_are_what_was_measured(config):
    steps = plan(config, Machine(13e9, MUCH), PLAIN).steps
    conversion, variant = MEASURED["conversion"], MEASURED["variants"]["int4-int8-weights"]
    for key, name in (("convert_s", "convert"), ("compress_s", "compress"), ("vision_int8_weights_s", "vision")):
        assert steps[name].cost.seconds == pytest.approx(conversion[key], rel=0.25), name
        assert conversion["peak_anon_gb"][key] < steps[name].cost.memory / 1e9 < 2 * conversion["peak_anon_gb"][key]
    load = variant["load_s"] + variant["first_infer_s"]
    assert steps["load"].cost.seconds == pytest.approx(load, rel=0.1)
    assert variant["anon_gb"] < steps["token"].cost.memory / 1e9 < 1.1 * variant["anon_gb"]
    made = steps["compress"].cost.disk + steps["vision"].cost.disk
    assert made / 1e9 == pytest.approx(variant["disk_gb"], rel=0.02)


def test_memory_of_the_11b_is_what_was_measured():
    """RssAnon at its peak in GB, random weights of the 11B shape; with data 5 and 10 of the 40 layers."""
    for layers, arguments, measured in [
        (40, {}, 6.35),
        (5, {}, 6.1),
        (5, {"awq": True}, 7.3),
        (5, {"awq": True, "dataset_size": 4}, 8.0),
        (10, {"awq": True, "dataset_size": 4}, 9.3),
    ]:
        disk, memory, _ = costs.compression_cost(Settings(**arguments), make_config(layers, 4, 1, 128256))
        assert measured * 0.9 < memory / 1e9 < measured * 1.2
        assert layers < 40 or 5.5 < disk / 1e9 < 5.9


def test_memory_of_quantizing_the_vision_encoder_is_what_was_measured():
    """RssAnon at its peak in GB: the 11B's; with K/V for 5 of its 40 text layers; and 4 + 1 of its 32 + 8 layers."""
    for text_layers, layers, global_layers, measured in [(40, 32, 8, 3.86), (5, 32, 8, 3.5), (5, 4, 1, 2.47)]:
        memory = costs.quantization_memory(make_config(text_layers, layers, global_layers, 128256))
        assert measured * 0.98 < memory / 1e9 < measured * 1.1


def test_the_90bs_widths_cost_what_was_measured():
    """Five of its 100 text layers, converted and compressed as here (benchmarks/README.md)."""
    slice_of_it = make_config(**{**SHAPES["90b"], "text_layers": 5})
    steps = plan(slice_of_it, Machine(20e9, MUCH), PLAIN).steps
    for name, seconds, peak in (("compress", 71.4, 12.08), ("vision", 22.7, 1.48)):
        assert steps[name].cost.seconds == pytest.approx(seconds, rel=0.25)
        assert peak < steps[name].cost.memory / 1e9 < 1.6 * peak
    assert steps["compress"].cost.memory / 1e9 < 1.02 * 12.08


def test_the_whole_90b_needs_a_machine_of_64_gb():
    whole = make_config(**SHAPES["90b"])
    fitting = [
        size
        for size in (16, 24, 32, 64)
        if not plan(whole, Machine(size * 2**30 - SYSTEM_BYTES, MUCH), PLAIN).shortfalls
    ]
    assert fitting == [64]
    assert costs.conversion_cost(whole).disk / 1e9 == pytest.approx(177, abs=2)


def test_disk_of_16_bit_is_what_is_written(tmp_path, caplog):
    caplog.set_level("INFO")
    made = convert_mllama(DEMO, tmp_path / "ov")
    written = sum(
        (made / name).with_suffix(".bin").stat().st_size for name in (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)
    )
    assert costs.conversion_cost(AutoConfig.from_pretrained(made)).disk == pytest.approx(written, rel=0.15)
    said = [int(size) for size in re.findall(r"writing \S+, (\d+) MB", caplog.text)]
    assert sum(said) == pytest.approx(written / 1e6, abs=1)


# ---- Decisions ----


@pytest.mark.parametrize(("size", "write_16_bit", "compare"), [(16, 0, 0), (24, 0, 0), (32, 1, 0), (64, 1, 1)])
def test_a_machine_of_so_much_memory_is_refused_nothing_by_default(config, size, write_16_bit, compare):
    made = plan(config, Machine(size * 2**30 - SYSTEM_BYTES, 60e9), PLAIN)
    assert (made.write_16_bit, made.compare_with_pytorch, made.shortfalls) == (bool(write_16_bit), bool(compare), ())
    assert all(step.cost.memory <= made.machine.memory for step in made.steps.values())
    assert made.disk <= made.machine.disk


def test_a_small_disk_gets_no_16_bit_language_model(config):
    roomy, tight = (plan(config, Machine(60e9, disk), PLAIN) for disk in (30e9, 10e9))
    assert roomy.write_16_bit
    assert (tight.write_16_bit, tight.compare_with_pytorch, tight.shortfalls) == (False, False, ())
    none = plan(config, Machine(60e9, 10e9), PLAIN, downloaded=False)
    assert re.search(r"write 29\.\d GB and 10\.0 GB of disk are free: free disk space", " ".join(none.shortfalls))


def test_downloads_may_go_to_another_disk(config):
    for downloads, lacking in [(30e9, ()), (10e9, ("The download takes 21.2 GB and 10.0 GB are free",))]:
        made = plan(config, Machine(13e9, 10e9, downloads=downloads), PLAIN, downloaded=False)
        assert len(made.shortfalls) == len(lacking)
        assert all(words in sentence for words, sentence in zip(lacking, made.shortfalls, strict=True))


def test_what_is_made_already_is_not_made_again(config):
    done = [VISION_ENCODER_NAME, PLAIN.file_name, "openvino_vision_encoder_int8_wc.xml"]
    made = plan(config, Machine(13e9, 1e6), PLAIN, made=done)
    assert not made.shortfalls
    assert made.disk == 0
    assert [line.split(" | ")[1] for line in str(made).splitlines()[2:5]] == ["done already"] * 3
    first = plan(config, Machine(13e9, MUCH), PLAIN)
    assert made.steps["token"] == first.steps["token"]  # loaded it is as large
    assert made.check_disk() is None
    with pytest.raises(OSError, match=r"All steps write .* free disk space"):
        plan(config, Machine(13e9, 1e6), PLAIN).check_disk()
    half = plan(config, Machine(60e9, MUCH), PLAIN, made=done)
    assert half.steps["convert"].cost.disk == 2 * costs.weights(config).language


def test_one_core_makes_irs_in_twice_the_time_of_two(config, speed):
    one, two, eight = (
        plan(config, Machine(13e9, MUCH, speed=replace(speed, threads=threads)), PLAIN).steps for threads in (1, 2, 8)
    )
    for name in ("convert", "compress", "vision", "load"):
        assert one[name].cost.seconds == 2 * two[name].cost.seconds == 2 * eight[name].cost.seconds
    for name in ("picture", "prompt", "token"):  # whose speed was measured with all threads
        assert one[name] == two[name]


# ---- Seconds of answering, from a speed ----


def slower(speed, *words, times=2):
    """Return a speed with the products slowed down in whose names all of the words are."""
    return replace(
        speed,
        products={
            name: rate / times if all(word in name for word in words) else rate for name, rate in speed.products.items()
        },
    )


def test_seconds_are_products_over_speed(config, speed):
    size, rows = costs.weights(config), 2 * 1601  # an empty tile is computed for all
    products, pairs = rows * size.vision, 2 * rows**2 * 1280 * 40
    expected = products / 1e11 + pairs / 1e11 / costs.ATTENTION_EFFICIENCY
    assert costs.image_seconds(config, speed, 1) == pytest.approx(expected)
    assert costs.image_seconds(config, speed, 3) == costs.image_seconds(config, speed, 4)
    assert costs.image_seconds(config, slower(speed, "vision", "int8"), 1) > expected
    assert costs.image_seconds(config, slower(speed, "language"), 1) == pytest.approx(expected)
    for form in FORMATS:
        once, twice = (costs.prompt_seconds(config, each, form) for each in (speed, slower(speed, form, ", 128")))
        assert twice - once == pytest.approx(128 * size.layers / 1e11 / costs.PROMPT_EFFICIENCY)


def test_token_takes_the_time_of_its_products(config, speed):
    size = costs.weights(config)
    in_16_bit = costs.token_seconds(config, speed, "16 bit")
    assert in_16_bit == pytest.approx(2 * (size.layers + size.head) / 2e10 / costs.READ_EFFICIENCY)
    assert costs.token_seconds(config, slower(speed, "language"), "16 bit") == in_16_bit
    in_8_bit = costs.token_seconds(config, speed, "int8")
    assert in_8_bit == pytest.approx((size.layers + size.head) / 2e10)
    form = "int4_sym, groups of 128"
    layers_slow = costs.token_seconds(config, slower(speed, form, ", 1"), form)
    assert layers_slow == pytest.approx((2 * size.layers + size.head) / 2e10)
    head_slow = costs.token_seconds(config, slower(speed, "int8", ", 1"), form)  # its head is in 8 bit
    assert head_slow == pytest.approx((size.layers + 2 * size.head) / 2e10)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        (Settings(), "int4_asym, groups of 64"),
        (Settings("int4_sym", group_size=128), "int4_sym, groups of 128"),
        (Settings("int4_asym", group_size=128), "int4_asym, groups of 64"),
        (Settings.of(algo="int8_sym"), "int8"),
        (Settings.of(algo="int8_asym"), "int8"),
    ],
)
def test_format_that_was_measured(settings, form):
    assert costs.measured_format(settings) == form
    assert form in FORMATS


def test_own_form_is_predicted_as_it_is_stored(config, speed):
    """Ollama's Q4_K_M, its head too, whatever the settings are."""
    slow = slower(speed, "q4_k_m")
    files = Files(own_form="q4_k_m", own_bytes=8.2e9)
    own, ours = (plan(config, Machine(13e9, MUCH, speed=slow), PLAIN, files=each).steps for each in (files, None))
    assert own["token"].cost.seconds == pytest.approx(2 * ours["token"].cost.seconds)
    assert own["prompt"].cost.seconds == pytest.approx(2 * ours["prompt"].cost.seconds)


def test_plan_predicts_an_image_a_prompt_and_a_token(config, speed):
    made = plan(config, Machine(13e9, MUCH, speed=speed), PLAIN)
    image, prompt, token = (made.steps[name] for name in ("picture", "prompt", "token"))
    assert (image.cost.seconds, image.longest) == tuple(costs.image_seconds(config, speed, tiles) for tiles in (1, 4))
    assert prompt.cost.seconds == costs.prompt_seconds(config, speed, "int4_asym, groups of 64")
    assert token.cost.seconds == costs.token_seconds(config, speed, "int4_asym, groups of 64")
    assert image.cost.memory == prompt.cost.memory == token.cost.memory
    assert "2 threads and 20.0 GB a second from memory, within about 30 %." in str(made)
    without = plan(config, Machine(13e9, MUCH), PLAIN)
    assert [line.split(" | ")[1] for line in str(without).splitlines()[-3:]] == [""] * 3


# (ISA, format, tokens): measured at 46 to 68 ms in four runs (docs/costs.md)
OUTSIDE = {("native", "q4_k_m", 1)}


@pytest.mark.parametrize("isa", ["native", "AVX512_CORE", "AVX2", "AVX2_VNNI"])
def test_predictions_are_what_was_measured(isa):
    """Within the error that the plan states: on the slice, with factors that were fitted to an earlier run."""
    result = json.loads((ROOT / f"benchmarks/results/predictions-{isa.lower()}.json").read_text(encoding="utf-8"))
    config, speed, compared = make_config(5, 4, 1), Speed(**result["speed"]), set()
    for figure in result["figures"]:
        predicted = predicted_seconds(config, speed, figure["stamp"], figure["part"] == "vision").get(figure["count"])
        if predicted and (isa, figure["stamp"]["format"], figure["count"]) not in OUTSIDE:
            compared.add((figure["part"], figure["stamp"]["format"], figure["count"]))
            assert predicted == pytest.approx(figure["measured_s"], rel=costs.PREDICTION_ERROR), figure
    assert len(compared) >= 15


def test_what_does_not_fit_is_said(config):
    (sentence,) = plan(config, Machine(8 * 2**30 - SYSTEM_BYTES, 60e9), PLAIN).shortfalls
    assert re.search(r"takes 11\.\d GB of memory and 4\.6 GB are free: close other programs", sentence)
    assert "too little memory" in by_memory(config, PLAIN, [8])


def test_a_draft_model_is_planned_too(config):
    """Llama-3.2-1B's shape: its INT4 IR has 0.788 GB (`benchmarks.make_checkpoint --shape 1b`, `make_draft_model`)."""
    draft = make_llama_config(**SHAPES["1b"])
    without, made = plan(config, Machine(13e9, MUCH), PLAIN), plan(config, Machine(13e9, MUCH), PLAIN, draft=draft)
    assert "draft" not in without.steps
    assert made.steps["draft"].cost.disk / 1e9 == pytest.approx(0.788, rel=0.02)
    more = made.steps["token"].cost.memory - without.steps["token"].cost.memory
    away = plan(config, Machine(13e9, MUCH), PLAIN, draft=draft, draft_downloaded=False)
    assert away.steps["download"].cost.disk == 2 * costs.weights(draft).language
    assert more == pytest.approx(made.steps["draft"].cost.disk)
    assert not made.shortfalls  # on a machine of 16 GB


@pytest.mark.parametrize("document", ["README.md", "mllama-3.2.ipynb"])
def test_the_table_by_memory_is_the_plans(config, document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for line in by_memory(config, PLAIN).splitlines():
        assert line in text, f"{document} lacks: {line}"


# ---- Carried out ----


def test_no_step_asks_for_memory_that_the_plan_does_not_name(tmp_path, monkeypatch):
    made = plan_here(DEMO, tmp_path / "ov")
    most = max(step.cost.memory for step in made.steps.values())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=most))
    monkeypatch.setattr(memory, "group_memory", lambda: MUCH)
    again = plan_here(DEMO, tmp_path / "ov")
    assert again.machine.memory == most
    assert not again.shortfalls
    folder = prepare(DEMO, tmp_path / "ov")
    assert newest(folder, LANGUAGE_MODEL_NAME) == HERE.file_name
    assert newest(folder, VISION_ENCODER_NAME) == "openvino_vision_encoder_int8_wc.xml"


def test_widths_that_no_group_divides_are_refused_before_anything_is_written(tmp_path):
    folder = make_checkpoint(tmp_path / "narrow")
    with pytest.raises(
        ValueError, match=f"group_size={HERE.group_size} does not divide this model's 64 and 96 channels"
    ):
        prepare(folder, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


def test_what_a_chat_needs_and_no_more_is_made_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    assert plan_here(DEMO, tmp_path).write_16_bit  # the notebook, for which it is compared
    folder = prepare(DEMO, tmp_path / "ov", DEMO / "draft")
    assert not (folder / LANGUAGE_MODEL_NAME).exists()
    assert "convert the vision encoder, 16 bit" in caplog.text
    caplog.clear()
    names = newest(folder, LANGUAGE_MODEL_NAME), newest(folder, VISION_ENCODER_NAME)
    model = OVMLlamaForConditionalGeneration(folder, language_model_name=names[0], image_encoder_name=names[1])
    assert model.shapes.vocab_size == OVDraftModel(folder / DRAFT_FOLDER).vocab_size == 512
    # when all is made the disk is as good as full, and that is no reason to complain
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e3))
    stamps = {name: ir.ir_stamp(folder / name) for name in names}
    assert not plan_here(DEMO, folder, DEMO / "draft", for_chat=True).shortfalls
    with pytest.raises(OSError, match="All steps write .* free disk space"):
        prepare(DEMO, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    prepare(DEMO, folder, DEMO / "draft")
    assert caplog.text.count("done already") == 4
    assert {name: ir.ir_stamp(folder / name) for name in names} == stamps


def test_an_interrupted_download_is_none(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert not has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert has_weights(tmp_path)
    assert has_weights(DEMO)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model-00001-of-00037.safetensors").touch()
    assert not has_weights(other)  # the index may be on its way too


def test_a_draft_model_is_done_if_it_was_made_of_this_checkpoint(tmp_path):
    make_draft_model(DEMO / "draft", tmp_path / "draft")
    assert not any(plan_here(DEMO, tmp_path, DEMO / "draft").steps["draft"].cost)
    other = tmp_path / "other"
    make_llama(512, seed=1).half().save_pretrained(other)
    assert plan_here(DEMO, tmp_path, other).steps["draft"].cost.disk > 0
    make_llama(256).half().save_pretrained(other)
    with pytest.raises(ValueError, match="has a vocabulary of 256 tokens and this model one of 512"):
        plan_here(DEMO, tmp_path, other)


def test_a_checkpoint_is_never_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_folder("meta-llama/Llama-3.2-11B-Vision-Instruct") == Path("models/Llama-3.2-11B-Vision-Instruct")
    assert default_folder("models/mine") == default_folder(tmp_path / "models/mine") == Path("models/mine-ov")
    shutil.copytree(DEMO, "models/mine", ignore=shutil.ignore_patterns("draft", "samples", "*.py", "__pycache__"))
    before = {path: path.read_bytes() for path in Path("models/mine").iterdir()}
    with pytest.raises(ValueError, match="is the checkpoint itself: choose another folder"):
        convert_mllama("models/mine", tmp_path / "models/mine")
    assert {path: path.read_bytes() for path in Path("models/mine").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["chat", "--device", "GPU.7"], "There is no device GPU.7 here: choose one of CPU"),
        (["chat", "--checkpoint", "{}"], "is a converted model: give it as model_dir"),
        (["chat", "--model-dir", "no/where"], "no/where holds no openvino_language_model.xml"),
        (
            ["chat", "--model-dir", "{}", "--language-model", "llm_int4.xml"],
            r"llm_int4.xml is missing: .* choose another: llm_int4_\w+.xml\.",
        ),
    ],
)
def test_the_command_refuses_with_a_sentence(prepared, monkeypatch, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["ov_mllama", *(argument.format(prepared) for argument in arguments)])
    with pytest.raises(SystemExit) as refused:
        main()
    assert re.search(f"^❌ .*{sentence}", str(refused.value))


def test_the_command_says_what_this_machine_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ov_mllama", "plan", str(DEMO), "--model-dir", "no/where"])
    main()
    said = capsys.readouterr().out
    for step in plan_here(DEMO, "no/where", for_chat=True).steps.values():
        assert step.what in said


# ---- While answering ----


def test_where_memory_is_short_what_is_only_kept_goes_before_a_picture_is_encoded(pair, monkeypatch):
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    first, second = pair.inputs("large"), pair.inputs("wide")
    expected = pair.hf.generate(**second, **GREEDY)
    model.generate(**first, **GREEDY)
    images = image_arrays(*(second[name] for name in ImageInputs._fields))
    needed = model.image_encoder.memory_for(images, image_keys(images))
    assert needed == costs.picture_memory(model.shapes, 3)  # two tiles, and one that stands for the empty ones
    kept, held = model.image_encoder.cache, model.sessions
    assert kept.nbytes > 0 < held.held_bytes
    freed = needed - 1 + kept.nbytes

    def free():
        return freed - kept.nbytes

    for module in ("sessions", "vision", "checks"):
        monkeypatch.setattr(f"ov_mllama.runtime.{module}.free_memory", free)
    monkeypatch.setattr("ov_mllama.runtime.sessions.check_prompt_fits", lambda *_: None)
    assert model.generate(**second, **GREEDY).tolist() == expected.tolist()
    assert len(held) == 1
    assert model.image_encoder.memory_for(images, image_keys(images)) == 0  # the new one is kept
    freed = needed - 1e5
    monkeypatch.setattr("ov_mllama.runtime.vision.free_memory", lambda: freed)
    model.forget()  # the session too, or it holds the image's K/V and none is encoded
    with pytest.raises(MemoryError, match=r"Encoding a 2-tile image needs .* are available. Close other programs"):
        model.generate(**second, **GREEDY)


def test_a_long_prompt_takes_the_memory_of_the_tokens_computed_at_once(config, monkeypatch):
    prompt = Prompt(np.zeros((1, 4000), np.int64))
    needed = memory.prompt_memory(config, 1, 4000, PREFILL_TOKENS, 0) + 4000 * 1e4
    monkeypatch.setattr("ov_mllama.runtime.checks.free_memory", lambda: needed)
    check_prompt_fits(config, prompt, 0, 0, 1e4)
    monkeypatch.setattr("ov_mllama.runtime.checks.free_memory", lambda: needed - 1)
    with pytest.raises(MemoryError, match="A prompt of 4000 tokens needs"):
        check_prompt_fits(config, prompt, 0, 0, 1e4)


def test_a_graphics_card_has_memory_of_its_own(pair, monkeypatch):
    kinds = {"GPU.0": Type.INTEGRATED, "GPU.1": Type.DISCRETE}
    stand_in = SimpleNamespace(get_property=lambda device, name: kinds[device])
    monkeypatch.setattr(devices.ov, "Core", lambda: stand_in)
    assert [devices.has_own_memory(device) for device in kinds] == [False, True]
    monkeypatch.undo()
    assert not devices.has_own_memory("CPU")
    assert not devices.has_own_memory("AUTO")
    inputs = pair.inputs("wide")
    monkeypatch.setattr("ov_mllama.runtime.vision.has_own_memory", lambda device: True)
    model = OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    monkeypatch.setattr("ov_mllama.runtime.vision.free_memory", lambda: 0)
    assert model.generate(**inputs, **GREEDY).tolist() == pair.hf.generate(**inputs, **GREEDY).tolist()


# ---- The machine ----


def group(folder, limit, usage, cached, shared):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"other 5\nfile {cached}\nshmem {shared}\n")


def test_memory_is_what_the_control_groups_leave(tmp_path):
    top, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("5:cpu:/elsewhere\n0::/outer/inner\n")
    assert group_memory(top, own) == MUCH
    group(top / "outer", 1000, 700, 300, 50)  # cached files can go, shared memory cannot
    group(top / "outer/inner", "max", 600, 200, 0)
    assert group_memory(top, own) == 1000 - 700 + 250
    group(top / "outer/inner", 650, 600, 0, 0)
    assert group_memory(top, own) == 50
    own.write_text("0::/docker/abc\n")  # in a container the path is the host's
    group(top, 900, 100, 0, 0)
    assert group_memory(top, own) == 800
    assert group_memory(top, tmp_path / "missing") == MUCH


HOARD = """
import numpy as np, psutil
from ov_mllama.runtime.memory import trim_memory

def anonymous():
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared

for _ in range(2):  # what the C library has freed once in pieces of that size it keeps the next time
    pieces = [(np.ones(2_000_000), bytes(200_000)) for _ in range(40)]
    pins = [pin for _, pin in pieces]
    del pieces
hoarded = anonymous()
trim_memory()
print(hoarded - anonymous())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_goes_back_to_the_system(start):
    program = start(HOARD)
    assert program.wait() == 0, program.said()
    assert float(program.said()) > 100e6


def test_the_tighter_of_machine_and_group_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5e9))
    for of_group, free in ((3e9, 3e9), (MUCH, 5e9)):
        monkeypatch.setattr(memory, "group_memory", lambda size=of_group: size)
        assert Machine.here(tmp_path / "not/there/yet").memory == free
