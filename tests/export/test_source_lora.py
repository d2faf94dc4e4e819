"""LoRA adapters that peft writes, merged as peft's `merge_and_unload` merges them, with the base that they name."""

import json
import re
import shutil
from functools import partial

import pytest
import torch
from fake_hub import Hub, serving
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, BitsAndBytesConfig, MllamaForConditionalGeneration

from conftest import F32
from ov_mllama.export import checkpoint as checkpoints
from ov_mllama.export import prepare as preparing
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.prepare import plan_here, prepare
from ov_mllama.export.settings import Settings
from ov_mllama.export.sources import lora
from ov_mllama.runtime.errors import AccessError, NotFoundError
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint, make_llama

ATTENTION = ["q_proj", "v_proj"]
SETTINGS = {
    "attention": dict(r=4, lora_alpha=12, target_modules=ATTENTION),
    "all-linear, rslora": dict(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear"),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=[*ATTENTION, "gate_proj", "o_proj"],
        rank_pattern={"gate_proj": 6, r"layers\.[12]\.self_attn\.q_proj": 2},
        alpha_pattern={"q_proj": 5, "cross_attn.o_proj": 3},
    ),
    "saved modules": dict(
        r=2, lora_alpha=4, target_modules=ATTENTION, modules_to_save=["lm_head", "multi_modal_projector"]
    ),
    "embedding": dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    "biases, fan_in_fan_out": dict(r=4, lora_alpha=8, target_modules=["fc1", "fc2"], bias="all", fan_in_fan_out=True),
    "regex, vision": dict(r=4, lora_alpha=8, target_modules=r".*vision_model.*\.(q|o)_proj"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny checkpoint in bfloat16."""
    return make_checkpoint(tmp_path_factory.mktemp("lora") / "base")


def load(folder, dtype: torch.dtype = torch.bfloat16):
    return MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def trained(base, folder, dtype: torch.dtype = torch.float32, config=LoraConfig, **settings):
    """Save an adapter as after a training, in this type: no factor is zero, saved modules differ from the base's."""
    model = get_peft_model(load(base), config(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder)
    save(folder, {name: tensor.to(dtype) for name, tensor in weights(folder).items()})
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def save(folder, tensors: dict[str, torch.Tensor]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def set_in(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def merged(base, folder, dtype: torch.dtype = torch.bfloat16):
    return PeftModel.from_pretrained(load(base, dtype), folder).merge_and_unload()


def assert_equal(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    tensors = checkpoint.tensors()
    assert {*tensors} == {*expected}
    for name, tensor in tensors.items():
        read = tensor.read()
        assert (tensor.shape, tensor.dtype) == (tuple(read.shape), read.dtype), name
        assert torch.equal(read, expected[name]), name


@pytest.fixture
def adapter(base, tmp_path):
    return trained(base, tmp_path / "adapter", **SETTINGS["attention"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SETTINGS)
def test_every_tensor_equals_pefts(base, tmp_path, case, dtype, monkeypatch):
    monkeypatch.setattr(lora, "CHUNK_ELEMENTS", 1000)  # several chunks of one matrix
    folder = trained(base, tmp_path / "adapter", dtype, **SETTINGS[case])
    assert_equal(Checkpoint(folder), expected := merged(base, folder).state_dict())
    unchanged = Checkpoint(base).tensors()
    assert not all(torch.equal(unchanged[name].read(), expected[name]) for name in expected)


@pytest.mark.parametrize("case", ["all-linear, rslora", "embedding"])
def test_base_in_another_type_keeps_it(tmp_path, case, monkeypatch):
    monkeypatch.setattr(lora, "CHUNK_ELEMENTS", 1000)  # in float32 every rounding shows
    base = make_checkpoint(tmp_path / "base", dtype=torch.float32)
    folder = trained(base, tmp_path / "adapter", **SETTINGS[case])
    assert_equal(Checkpoint(folder), merged(base, folder, torch.float32).state_dict())


NAMES = {
    "transformers 4": lambda name: (
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision_model.", "model.vision_model.")
        .replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")
        .replace("model.lm_head", "model.language_model.lm_head")
    ),
    "with the adapter's name": lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name),
    "a wrapped model": lambda name: f"module._orig_mod.{name}",
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_other_versions_and_tools_find_their_places(base, tmp_path, case):
    alphas = {r"language_model\.layers\.2\.self_attn\.q_proj": 7}  # a pattern of today's names
    adapter = trained(base, tmp_path / "adapter", alpha_pattern=alphas, **SETTINGS["saved modules"])
    expected = merged(base, adapter).state_dict()
    before = weights(adapter)
    save(adapter, {NAMES[case](name): tensor for name, tensor in before.items()})
    assert {*weights(adapter)} != {*before}
    assert_equal(Checkpoint(adapter), expected)


def test_saved_modules_without_pefts_own_names_find_their_places(base, tmp_path):
    folder = trained(base, tmp_path / "adapter", **SETTINGS["saved modules"])
    expected = merged(base, folder).state_dict()
    raw = {name.replace("lm_head.", "lm_head.modules_to_save.default."): each for name, each in weights(folder).items()}
    save(folder, raw)
    assert_equal(Checkpoint(folder), expected)


def test_converted_adapter_answers_as_the_merged_model(base, adapter, tmp_path, pair):
    converted = OVMLlamaForConditionalGeneration(convert_mllama(adapter, tmp_path / "ov"), ov_config=F32)
    inputs = pair.inputs("wide")
    with torch.no_grad():
        expected = merged(base, adapter).float()(**inputs).logits
    assert (converted(**inputs).logits - expected).abs().max() < 1e-3


# ---- The base -------------------------------------------------------------------------------------------------------


def test_quantised_base_is_dequantised_and_merged_onto(base, adapter, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = MllamaForConditionalGeneration.from_pretrained(base, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "x-bnb-4bit")
    set_in(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "x-bnb-4bit"))
    checkpoint = Checkpoint(adapter)
    assert checkpoint.base.folder == tmp_path / "x-bnb-4bit"
    expected = PeftModel.from_pretrained(model.dequantize(dtype=torch.float32), adapter).merge_and_unload().state_dict()
    for name, tensor in checkpoint.tensors().items():
        assert torch.equal(tensor.read().float(), expected[name].float()), name
    shutil.copytree(base, tmp_path / "x")  # its 16-bit original
    assert Checkpoint(adapter).base.folder == tmp_path / "x"


@pytest.mark.parametrize("written", ["../base", "base", "{absolute}/base", "~/base"])
def test_base_is_found_beside_the_adapter_here_and_at_home(base, adapter, tmp_path, written, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    written = written.format(absolute=tmp_path)
    set_in(adapter / "adapter_config.json", base_model_name_or_path=written)
    assert Checkpoint("adapter").base.folder.resolve() == tmp_path / "base"


HUB = {
    "owner/name": ["owner/name"],
    "owner/name-bnb-4bit": ["owner/name", "owner/name-bnb-4bit"],
    "owner/name-unsloth-bnb-4bit": ["owner/name", "owner/name-unsloth-bnb-4bit"],
    "/root/.cache/hub/models--owner--name/snapshots/1f": [
        "/root/.cache/hub/models--owner--name/snapshots/1f",
        "owner/name",
    ],
}


@pytest.mark.parametrize("written", HUB)
@pytest.mark.parametrize("answering", [0, 1])
def test_base_on_the_hub_is_asked_for_by_its_16_bit_name_first(base, adapter, written, answering, monkeypatch):
    tried = []

    def download(name):
        tried.append(name)
        if len(tried) <= answering:
            raise NotFoundError(name)
        return base

    monkeypatch.setattr(checkpoints, "download", download)
    set_in(adapter / "adapter_config.json", base_model_name_or_path=written)
    if answering < len(HUB[written]):
        Checkpoint(adapter)
    else:
        with pytest.raises(FileNotFoundError, match="--base"):
            Checkpoint(adapter)
    assert tried == HUB[written][: answering + 1]


def test_missing_or_gated_base_is_named_with_the_option(adapter, tmp_path, monkeypatch):
    def gated(name):
        raise AccessError(f"{name} is gated.")

    set_in(adapter / "adapter_config.json", base_model_name_or_path="owner/name")
    monkeypatch.setattr(checkpoints, "download", gated)
    with pytest.raises(PermissionError, match="owner/name is gated.*--base"):
        convert_mllama(adapter, tmp_path / "ov")
    for nothing in (None, str(adapter)):
        set_in(adapter / "adapter_config.json", base_model_name_or_path=nothing)
        with pytest.raises(FileNotFoundError, match="was not found .*--base") as error:
            convert_mllama(adapter, tmp_path / "ov")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()


def test_given_base_is_used_from_plan_to_chat(base, adapter, tmp_path, monkeypatch):
    set_in(adapter / "adapter_config.json", base_model_name_or_path="nowhere/at-all")
    with pytest.raises(ValueError, match="no LoRA adapter: leave the base out"):
        Checkpoint(base, base=base)
    monkeypatch.setattr(preparing.Settings, "here", partial(Settings, group_size=32))  # as the widths of 64 and 96 need
    model_dir = prepare(adapter, tmp_path / "ov", base=base)
    assert "done already" in str(plan_here(adapter, model_dir, for_chat=True, base=base))
    before = {path: path.stat().st_mtime_ns for path in model_dir.glob("*.xml")}
    prepare(adapter, model_dir, base=base)
    assert {path: path.stat().st_mtime_ns for path in model_dir.glob("*.xml")} == before
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        convert_mllama(Checkpoint(adapter, base=base), base)


def test_base_on_the_hub_is_checked_and_not_downloaded_for_a_plan(base, adapter, tmp_path, monkeypatch):
    hub = Hub()
    hub.folders = {"owner/name": base, "owner/adapter": adapter}
    set_in(adapter / "adapter_config.json", base_model_name_or_path="owner/name")
    with serving(hub, monkeypatch, tmp_path / "cache"):
        for name in (adapter, "owner/adapter"):
            assert plan_here(name, tmp_path / "ov").steps["download"].cost.disk > 0
            assert hub.sent[".safetensors"] < sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2
        hub.folders["owner/broken"] = broken = shutil.copytree(base, tmp_path / "broken")
        tensors = load_file(broken / "model.safetensors")
        save_file({name: tensors[name] for name in tensors if "layers.2." not in name}, broken / "model.safetensors")
        with pytest.raises(ValueError, match="owner/broken: .* tensors are missing"):
            plan_here(adapter, tmp_path / "ov", base="owner/broken")


def test_base_of_another_kind_is_named(adapter, tmp_path):
    make_llama(512).save_pretrained(tmp_path / "text")
    set_in(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "text"))
    with pytest.raises(ValueError, match="is a LoRA adapter, its base cannot be used.*'llama' checkpoint"):
        Checkpoint(adapter)


def test_adapter_upon_an_adapter(base, adapter, tmp_path):
    first = merged(base, adapter)
    first.save_pretrained(tmp_path / "first")
    second = trained(tmp_path / "first", tmp_path / "second", **SETTINGS["embedding"])
    expected = merged(tmp_path / "first", second).state_dict()
    set_in(second / "adapter_config.json", base_model_name_or_path=str(adapter))
    assert_equal(Checkpoint(second), expected)


# ---- Files beside ---------------------------------------------------------------------------------------------------


def test_fingerprint_and_companions_are_of_adapter_and_base(base, adapter, tmp_path):
    here = shutil.copytree(base, tmp_path / "base")
    seen = set()

    def look():
        checkpoint = Checkpoint(adapter, base=here)
        seen.add((checkpoint.fingerprint, checkpoint.source_digest))
        return checkpoint

    look()
    save(adapter, {name: 2 * tensor for name, tensor in weights(adapter).items()})
    assert len({fingerprint for fingerprint, _ in [*seen, (look().fingerprint, "")]}) == 2
    set_in(adapter / "adapter_config.json", lora_alpha=13)
    look()
    set_in(here / "generation_config.json", temperature=0.3)
    look()
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    look()
    assert len(seen) == 5
    assert len({fingerprint for fingerprint, _ in seen}) == 3


@pytest.mark.parametrize("place", ["file", "tokenizer_config.json", "none"])
def test_adapters_own_tokenizer_and_template_win(base, adapter, tmp_path, place):
    here = shutil.copytree(base, tmp_path / "base")
    (here / "golden.json").write_text('{"picture": "golden.png"}')
    (here / "golden.png").write_bytes(b"")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|mine|>"])
    tokenizer.save_pretrained(adapter)
    mine = "{{ bos_token }}<|image|>mine"
    if place == "file":
        (adapter / "chat_template.jinja").write_text(mine)
    else:
        (adapter / "chat_template.jinja").unlink(missing_ok=True)
        set_in(adapter / "tokenizer_config.json", chat_template=mine if place != "none" else None)
    model_dir = convert_mllama(Checkpoint(adapter, base=here), tmp_path / "ov")
    processor = AutoProcessor.from_pretrained(model_dir)
    assert len(processor.tokenizer("<|mine|>", add_special_tokens=False)["input_ids"]) == 1
    assert processor.chat_template == (mine if place != "none" else AutoProcessor.from_pretrained(base).chat_template)
    assert not any(model_dir.glob("golden*"))


def test_adapter_beside_a_config_is_an_adapter_beside_weights_is_not(base, adapter, caplog):
    shutil.copy(base / "config.json", adapter)
    assert_equal(Checkpoint(adapter), merged(base, adapter).state_dict())
    shutil.copy(base / "model.safetensors", adapter)
    with caplog.at_level("INFO"):
        assert_equal(Checkpoint(adapter), load(base).state_dict())
    assert "adapter_config.json is not used" in caplog.text


# ---- Refusals -------------------------------------------------------------------------------------------------------

QUERY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


BROKEN = {
    "no A": (without(QUERY.format("A")), "q_proj has no lora_A"),
    "no B": (without(QUERY.format("B")), "q_proj has no lora_B"),
    "no tensors": (lambda tensors: {}, "it holds no tensors"),
    "another model's": (
        lambda tensors: {name.replace("self_attn", "attention"): each for name, each in tensors.items()},
        r"\d+ of \d+ tensors have no place in its base, such as .*attention",
    ),
    "two adapters": (
        lambda tensors: tensors | {QUERY.format("A.second"): tensors[QUERY.format("A")].clone()},
        "is there twice, under the names of two adapters",
    ),
    "unknown part": (
        lambda tensors: tensors | {QUERY.format("E"): torch.zeros(4)},
        r"1 of \d+ tensors have no place in its base, such as .*lora_E",
    ),
    "other rank": (
        lambda tensors: {name: each[:2] if "lora_A" in name else each[:, :2] for name, each in tensors.items()},
        "do not have the rank 4 of adapter_config.json",
    ),
    "other widths": (
        lambda tensors: tensors | {QUERY.format("A"): torch.zeros(4, 65)},
        r"lora_A \[4, 65\] and lora_B \[64, 4\] of .*q_proj do not fit \[64, 64\]",
    ),
    "convolution": (
        lambda tensors: (
            tensors
            | {
                "base_model.model.model.vision_model.patch_embedding.lora_A.weight": torch.zeros(4, 3, 7, 7),
                "base_model.model.model.vision_model.patch_embedding.lora_B.weight": torch.zeros(32, 4, 1, 1),
            }
        ),
        "patch_embedding are no matrices, as of a convolution",
    ),
    "resized vocabulary": (
        lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.zeros(300, 64)},
        r"lm_head.weight is \[300, 64\] instead of \[\d+, 64\], a vocabulary that was resized",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_before_anything_is_written(adapter, tmp_path, case):
    change, message = BROKEN[case]
    save(adapter, change(weights(adapter)))
    with pytest.raises(ValueError, match=message) as error:
        convert_mllama(adapter, tmp_path / "ov")
    assert "merge_and_unload" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        plan_here(adapter, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


UNMERGED = {
    "DoRA": (dict(target_modules=ATTENTION, use_dora=True), r"use_dora: True"),
    "IA3": (dict(config=IA3Config, target_modules=ATTENTION, feedforward_modules=[]), "peft_type IA3"),
    "trainable tokens": (dict(target_modules=ATTENTION, trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "lora_bias": (dict(target_modules=["fc1"], lora_bias=True), "lora_bias: True"),
}


@pytest.mark.parametrize("case", UNMERGED)
def test_adapters_that_are_not_merged_are_refused_by_name(base, tmp_path, case):
    settings, message = UNMERGED[case]
    folder = trained(base, tmp_path / "adapter", **settings)
    (folder / "adapter_model.safetensors").unlink()  # told by the config alone
    with pytest.raises(ValueError, match=f"not merged here .*{message}.*merge_and_unload"):
        convert_mllama(folder, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_adapters_that_changed_the_bases_weights_are_refused(adapter, way):
    set_in(adapter / "adapter_config.json", init_lora_weights=way)
    with pytest.raises(ValueError, match=f"init_lora_weights: {way}, which changes the base's weights too"):
        Checkpoint(adapter)


def test_adapter_without_weights_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapter_model.bin.*peft"):
        Checkpoint(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors: download"):
        Checkpoint(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="no adapter's config"):
        Checkpoint(adapter)


WRONG = (dict(rank_pattern=["q_proj"]), dict(alpha_pattern={"q_(": 4}), dict(alpha_pattern="x"))


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_patterns_that_are_none_are_refused(adapter, settings):
    set_in(adapter / "adapter_config.json", **settings)
    with pytest.raises(ValueError, match="no adapter's config"):
        Checkpoint(adapter)


@pytest.mark.parametrize("alpha", ["8", None, float("nan"), float("inf"), 10**400])
def test_alpha_that_is_no_number_is_refused(adapter, alpha):
    set_in(adapter / "adapter_config.json", lora_alpha=alpha)
    with pytest.raises(ValueError, match="its lora_alpha is .*, no number"):
        Checkpoint(adapter).tensors()


def test_adapters_that_name_each_other_have_no_base(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    set_in(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    set_in(other / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(NotFoundError, match="was not found .*--base"):
        Checkpoint(adapter)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_tokenizer_config_of_an_adapter_is_refused(adapter, text):
    (adapter / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer_config.json cannot be read: download it again, or remove it"):
        Checkpoint(adapter).settings_folder  # noqa: B018
