"""Checkpoints as Meta distributes them, made of the parameters of its own code, and converted with its logits."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from conftest import F32
from meta_reference import INSTALLED, MetaReference, package
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.companion_files import complete_processor
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.sources import meta
from ov_mllama.export.sources.meta_tokenizer import tokenizer_of
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, ir_stamp
from ov_mllama.runtime.reference import META, Reference
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import LLAMA3_ROPE, make_checkpoint

if not INSTALLED and "NOTHING_SKIPPED" not in os.environ:
    pytest.skip("needs Meta's reference: pip install --no-deps llama-models==0.3.0", allow_module_level=True)

ROPE = {**LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_global_layers": 2,
    "attention_heads": 4,
    "patch_size": 7,
    "intermediate_layers_indices": [1, 3, 6],
}
PARAMS = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 2,
    "ffn_dim_multiplier": 0.1,
    "multiple_of": 96,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_chunk_size": 28,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
}
# fairscale's ColumnParallelLinear and VocabParallelEmbedding; RowParallelLinear, whose bias is whole in each process
BY_OUTPUTS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight", "_linear.weight")
BY_OUTPUTS += ("embeddings.weight", "learnable_embedding.weight", "c_fc.weight", "c_fc.bias")
BY_OUTPUTS += ("vision_projection.weight", "vision_projection.bias")
BY_INPUTS = ("wo.weight", "w2.weight", "c_proj.weight")


@pytest.fixture(autouse=True)
def small_tower(monkeypatch):
    monkeypatch.setattr(meta, "VISION", VISION)


def shard(name: str, tensor: torch.Tensor, number: int, count: int) -> torch.Tensor:
    """A process's part of a parameter."""
    if name.endswith((*BY_OUTPUTS, *BY_INPUTS)):
        return tensor.chunk(count, int(name.endswith(BY_INPUTS)))[number].clone()
    return tensor.clone()


def write(folder: Path, source: Path, state: dict[str, torch.Tensor], count: int, **params) -> Path:
    """Write a checkpoint of `count` shards, with the tokenizer of `source`."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    vocabulary = {"vocab_size": len(state["text_model.tok_embeddings.weight"])}
    (folder / "params.json").write_text(json.dumps({**PARAMS, **vocabulary, **params}))
    for number in range(count):
        parts = {name: shard(name, tensor, number, count) for name, tensor in state.items()}
        torch.save(parts, folder / (f"consolidated.{number:02d}.pth" if count > 1 else "consolidated.pth"))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """transformers' checkpoint, Meta's model with its weights, and Meta's checkpoints of one and two shards."""

    folder = tmp_path_factory.mktemp("made")
    source = make_checkpoint(
        folder / "hf", meta=True, spread=0.1, rope=ROPE, cross_layers=(0, 3), vision_layers=8, intermediate=(1, 3, 6)
    )
    reference = MetaReference(source)
    parts = {
        "vision_model.vision_encoder": reference.encoder,
        "vision_model.vision_projection": reference.projector,
        "text_model": reference.language,
    }
    state = {
        f"{prefix}.{name}": tensor.detach().to(torch.bfloat16)
        for prefix, module in parts.items()
        for name, tensor in module.named_parameters()
    }
    state["text_model.rope.freqs"] = torch.zeros(4)
    one, two = (write(folder / str(count), source, state, count) for count in (1, 2))
    return SimpleNamespace(source=source, reference=reference, one=one, two=two)


# ---- Weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_weights_equal_those_of_transformers(made, count):
    checkpoint, expected = Checkpoint(made.one if count == 1 else made.two), Checkpoint(made.source).tensors()
    tensors = checkpoint.tensors()
    assert {*tensors} == {*expected}
    for name, tensor in tensors.items():
        actual = tensor.read()
        assert tensor.shape == actual.shape, name
        assert tensor.dtype == actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected[name].read()), name
    assert tensors["lm_head.weight"].mapped == (count == 1)
    assert not tensors["model.language_model.layers.1.self_attn.q_proj.weight"].mapped


def test_config_equals_that_of_transformers(made):
    actual, expected = Checkpoint(made.one).config, Checkpoint(made.source).config
    assert actual.image_token_index == expected.image_token_index
    without = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype", "initializer_range"}
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(config, part).to_dict() for config in (actual, expected))
        assert {key: ours[key] for key in ours if key not in without} == {
            key: theirs[key] for key in theirs if key not in without
        }


@pytest.mark.parametrize(("size", "hidden", "inner", "layers"), [("11b", 4096, 14336, 40), ("90b", 8192, 28672, 100)])
def test_config_of_published_models(tmp_path, monkeypatch, size, hidden, inner, layers):
    from llama_models.sku_list import llama3_2_instruct_models

    monkeypatch.undo()
    model = next(model for model in llama3_2_instruct_models() if f"{size}_vision" in model.core_model_id.name)
    (tmp_path / "params.json").write_text(json.dumps(model.arch_args))
    (tmp_path / "tokenizer.model").touch()
    config = meta.config_of(tmp_path)
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (hidden, inner, layers)
    assert text.cross_attention_layers == [*range(3, layers, 5)]
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (128000, [128001, 128008, 128009], 128004)
    assert config.image_token_index == 128256
    assert (vision.image_size, vision.hidden_size, vision.vision_output_dim) == (560, 1280, 7680)


def test_logits_of_the_converted_model_equal_metas(made, tmp_path):
    model = OVMLlamaForConditionalGeneration(convert_mllama(made.two, tmp_path / "ov"), ov_config=F32)
    assert Reference.of(ir_stamp(tmp_path / "ov" / LANGUAGE_MODEL_NAME)) == META
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(tmp_path / "ov")
    inputs = processor(text="so: <|image|>what is it", images=[image], return_tensors="pt", add_special_tokens=False)
    expected = made.reference.logits(inputs["input_ids"][0].tolist(), inputs["pixel_values"][0], [(1, 2)])
    assert (model(**inputs).logits[0] - expected).abs().max() < 1e-4


# ---- Tokenizer ------------------------------------------------------------------------------------------------------

TEXTS = ("What's 12345 + 678?\nSay it: ça va. 日本", "  blanks\t\n\n and   tabs", "<|eot_id|>", "ｆｕｌｌ 🙂🙃 ends ")


def test_tokenizer_gives_metas_tokens(tmp_path):
    reference = package("tokenizer")
    shutil.copy(Path(reference.__file__).parent / "tokenizer.model", tmp_path)
    original, tokenizer = reference.Tokenizer.get_instance(), tokenizer_of(tmp_path)
    for text in TEXTS:
        expected = original.encode(text, bos=True, eos=False, allowed_special="all")
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected[1:]) == text
    assert len(tokenizer) == 128257
    assert tokenizer.convert_tokens_to_ids(["<|image|>", "<|eom_id|>"]) == [128256, original.stop_tokens[1]]
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == [original.eot_id, original.pad_id]


def test_processor_has_the_models_tiles(made):
    images = complete_processor(made.one, Checkpoint(made.one).config)[0].image_processor
    assert (images.size["height"], images.size["width"], images.max_image_tiles) == (28, 28, 4)


# ---- Refused --------------------------------------------------------------------------------------------------------


class Code:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def with_params(change):
    """A change of params.json."""

    def apply(folder):
        path = folder / "params.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return apply


def with_shard(change):
    """A change of the second shard's tensors."""

    def apply(folder):
        path = folder / "consolidated.01.pth"
        torch.save(change(torch.load(path)), path)

    return apply


def without(key: str):
    return lambda params: {name: value for name, value in params.items() if name != key}


NORM, QUERY = "text_model.norm.weight", "text_model.layers.0.attention.wq.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
REFUSED = {
    "code": (
        lambda folder: torch.save({"x": Code(folder / "made")}, folder / "consolidated.00.pth"),
        "consolidated.00.pth holds Python objects, which are not loaded",
    ),
    "no dict": (with_shard(lambda tensors: [*tensors.values()]), "consolidated.01.pth holds no state dict of tensors"),
    "truncated": (
        lambda folder: os.truncate(folder / "consolidated.01.pth", 9000),
        "no file of PyTorch weights.*again",
    ),
    "pointer": (lambda folder: (folder / "consolidated.00.pth").write_bytes(POINTER), "LFS pointer.*git lfs pull"),
    "first missing": (
        lambda folder: (folder / "consolidated.00.pth").unlink(),
        "but of the weights consolidated.01.pth: download",
    ),
    "last missing": (lambda folder: (folder / "consolidated.01.pth").unlink(), "have another shape, such as"),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("*.pth")],
        "but of the weights no consolidated",
    ),
    "tensor missing": (with_shard(without(NORM)), f"do not both hold {NORM}"),
    "unknown tensor": (
        lambda folder: [
            torch.save({**torch.load(path), "text_model.more": torch.zeros(1)}, path) for path in folder.glob("*.pth")
        ],
        "1 are unexpected, such as text_model.more",
    ),
    "parts": (with_shard(lambda tensors: {**tensors, QUERY: torch.zeros(5, 7)}), "parts of .*q_proj.* do not match"),
    "no params": (lambda folder: (folder / "params.json").write_text("[]"), "no params.json of Llama 3.2 Vision"),
    "a param missing": (with_params(without("n_heads")), "no params.json of Llama 3.2 Vision .*n_heads"),
    "text": (with_params(without("vision_num_cross_attention_layers")), "a Llama for text, which sees no images"),
    "quantised": (with_params(lambda params: {**params, "quantization_args": {"scheme": "x"}}), "16-bit checkpoint"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.model: copy it from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_before_anything_is_written(made, tmp_path, case):
    change, said = REFUSED[case]
    folder = shutil.copytree(made.two, tmp_path / "changed")
    change(folder)
    with pytest.raises(InputError, match=said) as error:
        convert_mllama(folder, tmp_path / "ov")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ov").exists()
    assert not (folder / "made").exists()


def test_a_broken_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    with pytest.raises(InputError, match="no tokenizer in tiktoken's form but a Git LFS pointer"):
        tokenizer_of(tmp_path)
