"""Settings written from the metadata of Ollama's GGUF files: config, tokenizer, chat template, image processor."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.image_utils import OPENAI_CLIP_MEAN

from meta_reference import INSTALLED, package
from ov_mllama.export.companion_files import CHAT_TEMPLATE, QUESTION, complete_processor
from ov_mllama.export.sources import meta
from ov_mllama.export.sources.gguf_settings import config_of, write_settings
from ov_mllama.export.sources.meta_tokenizer import tokenizer_of
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.reference import META, reference_of
from tiny_mllama import byte_tokenizer

LABEL = "model.gguf"
F32_EPSILON = 9.999999747378752e-06  # 1e-5 in 32 bit, as files store it
EXAMPLES = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHAPES_11B = {
    "general.architecture": "mllama",
    "mllama.block_count": 40,
    "mllama.context_length": 131072,
    "mllama.embedding_length": 4096,
    "mllama.feed_forward_length": 14336,
    "mllama.attention.head_count": 32,
    "mllama.attention.head_count_kv": 8,
    "mllama.attention.layer_norm_rms_epsilon": F32_EPSILON,
    "mllama.attention.cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "mllama.rope.freq_base": 500000.0,
    "mllama.rope.dimension_count": 128,
    "mllama.vocab_size": 128256,
    "mllama.vision.block_count": 32,
    "mllama.vision.global.block_count": 8,
    "mllama.vision.embedding_length": 1280,
    "mllama.vision.feed_forward_length": 5120,
    "mllama.vision.attention.head_count": 16,
    "mllama.vision.attention.layer_norm_epsilon": F32_EPSILON,
    "mllama.vision.image_size": 560,
    "mllama.vision.patch_size": 14,
    "mllama.vision.max_num_tiles": 4,
    "mllama.vision.num_channels": 3,
    "mllama.vision.intermediate_layers_indices": [3, 7, 15, 23, 30],
}
SHAPES_90B = SHAPES_11B | {
    "mllama.block_count": 100,
    "mllama.embedding_length": 8192,
    "mllama.feed_forward_length": 28672,
    "mllama.attention.head_count": 64,
    "mllama.attention.cross_attention_layers": [*range(3, 100, 5)],
}
TINY = SHAPES_11B | {
    "mllama.block_count": 5,
    "mllama.embedding_length": 64,
    "mllama.feed_forward_length": 96,
    "mllama.attention.head_count": 8,
    "mllama.attention.head_count_kv": 2,
    "mllama.attention.cross_attention_layers": [1, 3],
    "mllama.vision.block_count": 3,
    "mllama.vision.global.block_count": 2,
    "mllama.vision.embedding_length": 32,
    "mllama.vision.feed_forward_length": 64,
    "mllama.vision.attention.head_count": 4,
    "mllama.vision.image_size": 28,
    "mllama.vision.patch_size": 7,
    "mllama.vision.max_num_tiles": 2,
    "mllama.vision.intermediate_layers_indices": [0, 2],
}


def with_tokenizer(shapes: dict, tokenizer, **others) -> dict:
    """Metadata with a tokenizer as Ollama's converter stores it: special tokens have type 3."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special, merges = (
        tokenizer.added_tokens_decoder,
        json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"],
    )
    stored = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": [3 if index in special else 1 for index in range(len(tokens))],
        "merges": [" ".join(pair) for pair in merges],
        "add_bos_token": False,  # as Ollama stores it for a tokenizer whose template writes it
        **others,
    }
    return shapes | {f"tokenizer.ggml.{key}": value for key, value in stored.items()}


@pytest.fixture(scope="module")
def tiny():
    """Metadata of a tiny model whose tokens are bytes, two merged pairs and special ones."""
    tokenizer = byte_tokenizer()
    found = with_tokenizer(TINY | {"tokenizer.chat_template": CHAT_TEMPLATE}, tokenizer)
    tokens, types = ["is", "Ġis"], [1, 1]
    return found | {
        "mllama.vocab_size": len(tokenizer) + 1,
        "tokenizer.ggml.tokens": [
            *found["tokenizer.ggml.tokens"][:256],
            *tokens,
            *found["tokenizer.ggml.tokens"][256:],
        ],
        "tokenizer.ggml.token_type": types + found["tokenizer.ggml.token_type"],
        "tokenizer.ggml.merges": ["i s", "Ġ is"],
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Meta's tokenizer: original, in metadata of the 11B, and read from the files that are written of them."""
    if not INSTALLED and "NOTHING_SKIPPED" not in os.environ:
        pytest.skip("needs Meta's reference: pip install --no-deps llama-models==0.3.0")
    reference, folder = package("tokenizer"), tmp_path_factory.mktemp("llama")
    shutil.copy(Path(reference.__file__).parent / "tokenizer.model", folder)
    metadata = with_tokenizer(SHAPES_11B | {"tokenizer.chat_template": CHAT_TEMPLATE}, tokenizer_of(folder))
    written = folder / "written"
    written.mkdir()
    write_settings(metadata, written, LABEL)
    original = reference.Tokenizer.get_instance()
    return SimpleNamespace(
        metadata=metadata, folder=written, tokenizer=AutoTokenizer.from_pretrained(written), original=original
    )


# ---- Config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["11b", "90b"])
def test_config_equals_that_of_metas_checkpoint(llama, tmp_path, size):
    from llama_models.sku_list import llama3_2_instruct_models

    model = next(model for model in llama3_2_instruct_models() if f"{size}_vision" in model.core_model_id.name)
    (tmp_path / "params.json").write_text(json.dumps(model.arch_args))
    (tmp_path / "tokenizer.model").touch()
    expected = meta.config_of(tmp_path).to_dict()
    actual = config_of(llama.metadata | (SHAPES_11B if size == "11b" else SHAPES_90B), LABEL).to_dict()
    differ = {key for key in expected | actual if expected.get(key) != actual.get(key)}
    assert differ <= {"architectures", "transformers_version"}


def test_config_of_a_tiny_model(tiny):
    config = config_of(tiny, LABEL)
    text, vision, tokens = config.text_config, config.vision_config, tiny["tokenizer.ggml.tokens"]
    assert (text.hidden_size, text.num_hidden_layers, text.cross_attention_layers) == (64, 5, [1, 3])
    assert (text.rms_norm_eps, vision.norm_eps) == (1e-5, 1e-5)
    assert text.rope_parameters["rope_type"] == "llama3"
    assert not text.tie_word_embeddings
    assert [tokens[token] for token in text.eos_token_id] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert tokens[text.bos_token_id] == "<|begin_of_text|>"
    assert tokens[text.pad_token_id] == "<|finetune_right_pad_id|>"
    assert config.image_token_index == text.vocab_size == len(tokens) - 1
    assert vision.supported_aspect_ratios == [[1, 1], [1, 2], [2, 1]]
    assert vision.vision_output_dim == 3 * 32
    assert vision.intermediate_layers_indices == [0, 2]


def test_channels_are_rgb_where_a_file_does_not_name_them(tiny):
    metadata = {key: value for key, value in tiny.items() if not key.endswith("num_channels")}
    assert config_of(metadata, LABEL).vision_config.num_channels == 3


# ---- Files ----------------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_written_files_are_read_as_the_hubs(tiny, tmp_path):
    write_settings(tiny, tmp_path, LABEL)
    config = AutoConfig.from_pretrained(tmp_path)
    config._name_or_path = ""  # the folder
    assert config.to_dict() == config_of(tiny, LABEL).to_dict()
    processor, notes = complete_processor(tmp_path, config)
    assert notes == []
    images = processor.image_processor
    assert (images.size["height"], images.max_image_tiles, list(images.image_mean)) == (28, 2, OPENAI_CLIP_MEAN)
    assert processor.chat_template == CHAT_TEMPLATE
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == config.text_config.eos_token_id
    generation.validate(strict=True)
    assert reference_of(tmp_path)[0] == META


def test_same_metadata_give_the_same_bytes(tiny, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_settings(dict(reversed(tiny.items())) if name == "second" else tiny, tmp_path / name, LABEL)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    assert len(digests(tmp_path / "first")) == 6


def test_a_model_without_template_gets_none(tiny, tmp_path):
    write_settings({key: value for key, value in tiny.items() if "chat_template" not in key}, tmp_path, LABEL)
    assert not (tmp_path / "chat_template.jinja").exists()


# ---- Tokenizer ------------------------------------------------------------------------------------------------------

TEXTS = (
    "",
    "What's 12345 + 678? It'S, WE'LL, 'ſ 'K",
    "Ça va? Où est l'œuvre naïve; Łódź, İstanbul, Việt Nam",
    "Straßenbahnhaltestelle, Größe: 3,5 m² – „ja“ ½",
    "Ἐν ἀρχῇ ἦν ὁ λόγος, καλημέρα κόσμε",
    "Съешь же ещё этих мягких французских булок; їжак",
    "السلام عليكم ١٢٣٤٥ وَقْتٌ",
    "שָׁלוֹם עולם",
    "नमस्ते दुनिया, क्षेत्र १२३",
    "สวัสดีชาวโลก น้ำ",
    "你好，世界！今天天气怎么样？𠮷野家",
    "カタカナとひらがな、漢字。ｆｕｌｌ width １２３",
    "안녕하세요 세계 한글",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 1️⃣ 🙂🙃",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # done\n\n\n",
    "#include <map>\r\nint main() { return a->b != NULL; }\r\n\r\n  x",
    "3.14159265358979323846 1,000,000 0x1F 123456789012345678901234567890",
    "  blanks\t\n\n and   tabs \t\t x     \u00a0\u3000\u2003y   ",
    "\n\r\n\r\r\n \n",
    "e\u0301\u0327a\u0308o\u0302 Z\u0351\u034b\u0343a\u0321l\u0353g\u033bo",
    "\u0000\u0001\u007f\u200b\ufeff\ufffd\U0010ffff",
    "a" * 3000 + "ab" * 1000 + "ﷺ" * 300,
    " " * 700 + "x" + "\n" * 500 + "?!" * 400,
    "<|eot_id|>", "x<|begin_of_text|> <|end_of_text|>\n<|reserved_special_token_0|><|eom_id|><|python_tag|>",
    "<|start_header_id|>user<|end_header_id|>\n\nhi <|not_one|> <|eot_id",
)  # fmt: skip


def check_ids(llama, text: str) -> None:
    expected = llama.original.model.encode(text, allowed_special="all")
    actual = llama.tokenizer.encode(text)
    assert actual == [128000, *expected], text
    assert llama.tokenizer.encode(text, add_special_tokens=False) == expected
    assert llama.tokenizer.decode(expected) == text


def test_ids_equal_metas_in_many_scripts(llama):
    for text in TEXTS:
        check_ids(llama, text)


def test_ids_equal_metas_on_any_text(llama, times):
    @settings(max_examples=times(300, 20000), **EXAMPLES)
    @given(
        st.lists(
            st.text(st.characters(codec="utf-8"), max_size=30)
            | st.text(st.sampled_from(" \t\r\n'sStlLK1²a.é\u0301"), max_size=30)
            | st.sampled_from(TEXTS),
            max_size=5,
        )
    )
    def check(parts):
        check_ids(llama, "".join(parts))

    check()


def test_special_tokens_have_metas_ids(llama):
    tokenizer, original = llama.tokenizer, llama.original
    assert len(tokenizer) == 128257
    assert tokenizer.convert_tokens_to_ids("<|image|>") == 128256
    assert tokenizer.encode("<|image|>", add_special_tokens=False) == [128256]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [original.bos_id, original.eot_id]
    assert tokenizer.pad_token_id == original.pad_id
    assert GenerationConfig.from_pretrained(llama.folder).eos_token_id == original.stop_tokens
    assert tokenizer.decode([128000, 9906, 128009], skip_special_tokens=True) == "Hello"


def test_chat_template_gives_metas_tokens_with_an_image(llama):
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem

    data = io.BytesIO()
    Image.new("RGB", (30, 20)).save(data, "PNG")
    content = [RawMediaItem(data=data.getvalue()), RawTextItem(text=QUESTION[0]["content"][1]["text"])]
    expected = (
        package("chat_format")
        .ChatFormat(llama.original)
        .encode_dialog_prompt([RawMessage(role="user", content=content)])
    )
    actual = llama.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert actual == expected.tokens
    assert actual.count(128256) == 1


def test_merged_tokens_of_a_tiny_model(tiny, tmp_path):
    write_settings(tiny, tmp_path, LABEL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("this is<|image|>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["t", "h", "is", "Ġis", "<|image|>"]


def test_bytes_alone_need_no_merges(tmp_path):
    metadata = with_tokenizer(TINY, byte_tokenizer())
    metadata["mllama.vocab_size"] = len(metadata["tokenizer.ggml.tokens"]) - 1
    del metadata["tokenizer.ggml.merges"]
    write_settings(metadata, tmp_path, LABEL)
    text = "Grüße, 世界\n<|eot_id|>"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == byte_tokenizer().encode(text)


def test_user_defined_tokens_are_not_split_and_not_special(tiny, tmp_path):
    tokens, types = tiny["tokenizer.ggml.tokens"], tiny["tokenizer.ggml.token_type"]
    more = {"tokenizer.ggml.tokens": [*tokens, "<think>"], "tokenizer.ggml.token_type": [*types, 4]}
    write_settings(tiny | more, tmp_path, LABEL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("a<think>", add_special_tokens=False)
    assert ids[1:] == [len(tokens)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


# ---- Refused --------------------------------------------------------------------------------------------------------

DELETED = object()
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
REFUSED = {
    "another architecture": ({"general.architecture": "qwen2vl"}, "'qwen2vl' model, not Llama 3.2 Vision"),
    "projector": ({"general.architecture": "clip"}, "projector of llama.cpp"),
    "no architecture": ({"general.architecture": DELETED}, "has no general.architecture"),
    "missing": ({"mllama.vision.patch_size": DELETED}, "has no mllama.vision.patch_size: download it again"),
    "negative": ({"mllama.embedding_length": -4096}, "embedding_length = -4096, not a number of 1 to"),
    "absurd": ({"mllama.vision.block_count": 1 << 60}, "block_count = 1152921504606846976, not"),
    "tiles": ({"mllama.vision.max_num_tiles": 1 << 30}, "max_num_tiles = 1073741824"),
    "list": ({"mllama.attention.head_count_kv": [2] * 5}, r"head_count_kv = \[2, 2, 2, 2, 2\], not"),
    "bool": ({"mllama.block_count": True}, "block_count = True"),
    "not a number": ({"mllama.rope.freq_base": float("nan")}, "freq_base = nan, not a positive number"),
    "heads": ({"mllama.attention.head_count": 7}, "embedding_length = 64, no multiple of attention.head_count = 7"),
    "beyond": ({"mllama.attention.cross_attention_layers": [1, 5]}, r"\[1, 5\], not ascending indices of 5 layers"),
    "descending": ({"mllama.vision.intermediate_layers_indices": [2, 0]}, r"\[2, 0\], not ascending indices of 3"),
    "channels": ({"mllama.vision.num_channels": 4}, "num_channels = 4, not 3"),
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, "model = 'llama', not gpt2"),
    "split": ({"tokenizer.ggml.pre": "qwen2"}, "pre = 'qwen2', not llama-bpe or smaug-bpe"),
    "template": ({"tokenizer.chat_template": 5}, "chat_template = 5, not a text"),
    "surrogate": ({"tokenizer.chat_template": "\udc80"}, "chat_template = .*, not a text"),
    "few tokens": ({TOKENS: ["a", "b"]}, "has 2 tokens, its model 266"),
    "many tokens": ({"mllama.vocab_size": 200}, "tokens, its model 200"),
    "types": ({TYPES: [1, 3]}, r"token_type = \[1, 3\], not the types of 267 tokens"),
    "no merges": ({MERGES: DELETED}, r"tokens that no merge gives, .* \(2, such as 'is'\)"),
    "a merge missing": ({MERGES: ["i s"]}, r"tokens that no merge gives, .* \(1, such as 'Ġis'\)"),
    "one token": ({MERGES: ["i s", "is"]}, "the merge 'is' .*, which joins no two tokens to one"),
    "three tokens": ({MERGES: ["i s s"]}, "the merge 'i s s'"),
    "unknown token": ({MERGES: ["is Ġis"]}, "the merge 'is Ġis'"),
    "merge of numbers": ({MERGES: [5]}, r"merges = \[5\], not a list of texts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_metadata_are_refused(tiny, tmp_path, case):
    change, message = REFUSED[case]
    refused(without_deleted(tiny | change), tmp_path, message)


CHANGED_TOKENS = {
    "twice": (-3, "is", 3, "a token twice, or an empty one"),
    "empty": (-3, "", 3, "a token twice, or an empty one"),
    "no byte": (0, "日", 1, r"bytes without a token \(2, such as '!'\)"),
    "unused": (-2, "<|x|>", 5, "other tokens than special ones"),
    "plain behind special": (-2, "abc", 1, "other tokens than special ones"),
    "stop missing": (-3, "abc", 3, r"has no <\|eot_id\|>"),
    "image plain": (-1, "<|image|>", 1, "other tokens than special ones"),
}


@pytest.mark.parametrize("case", CHANGED_TOKENS)
def test_odd_tokens_are_refused(tiny, tmp_path, case):
    index, token, kind, message = CHANGED_TOKENS[case]
    tokens, types = [*tiny[TOKENS]], [*tiny[TYPES]]
    tokens[index], types[index] = token, kind
    refused(tiny | {TOKENS: tokens, TYPES: types}, tmp_path, message)


@pytest.mark.parametrize(
    ("half", "message"),
    [
        ("vision", "holds the vision tower alone: .* layer of type model"),
        ("text", "language model alone: .* projector"),
    ],
)
def test_one_of_two_files_is_refused(tiny, tmp_path, half, message):
    other = "mllama.vision." if half == "text" else "mllama."
    keys = [key for key in tiny if not key.startswith(other) or (half == "vision" and ".vision." in key)]
    refused({key: tiny[key] for key in keys}, tmp_path, message)


def without_deleted(metadata: dict) -> dict:
    return {key: value for key, value in metadata.items() if value is not DELETED}


def refused(metadata: dict, folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        write_settings(metadata, folder, LABEL)
    assert str(error.value).startswith(LABEL)
    assert "\n" not in str(error.value)
    assert not any(folder.iterdir())


def values():
    """Any value that a GGUF file can hold, and small edits of valid ones."""
    texts = st.text(st.characters(), max_size=8)
    scalars = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-2, 40) | st.floats() | st.booleans() | texts
    return scalars | st.lists(scalars, max_size=6) | st.lists(st.lists(scalars, max_size=2), max_size=2)


def test_any_value_is_read_or_refused(tiny, tmp_path, times):
    keys = sorted(tiny)

    @settings(max_examples=times(400, 20000), **EXAMPLES)
    @given(st.data())
    def check(data):
        metadata = dict(tiny)
        for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True)):
            value = tiny[key]
            if isinstance(value, list) and data.draw(st.booleans()):
                index = data.draw(st.integers(0, len(value) - 1))
                value = [*value[:index], data.draw(values()), *value[index + data.draw(st.integers(0, 1)) :]]
            else:
                value = data.draw(values() | st.just(DELETED))
            metadata[key] = value
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        try:
            write_settings(without_deleted(metadata), tmp_path, LABEL)
        except InputError as error:
            message = str(error)
        else:
            AutoConfig.from_pretrained(tmp_path)
            AutoTokenizer.from_pretrained(tmp_path)
            return
        assert "\n" not in message
        assert not any(tmp_path.iterdir())

    check()
