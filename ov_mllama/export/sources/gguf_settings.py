"""Settings of Llama 3.2 Vision from the metadata of Ollama's GGUF files: config, tokenizer, chat template and image
processor, with the hub's values.

Keys are those of Ollama's converters (convert/convert_mllama.go, convert/tokenizer.go); the metadata are untrusted.
"""

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AddedToken, MllamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

from ov_mllama.export.sources.meta import ROPE
from ov_mllama.export.sources.meta_tokenizer import BOS, PAD, STOPS, with_special_tokens
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.shapes import EXTRA_EMBEDDINGS

ARCHITECTURE = "mllama"
FIX = "download it again (`ollama pull llama3.2-vision`)."
VERSION = "4.45.0.dev0"  # of transformers, in Meta's checkpoints on the hub, whose convention these weights follow
# keys behind "mllama." and "mllama.vision.", transformers' names, and the largest values that are read
MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_TOKENS, MAX_PIXELS, MAX_TILES = 1000, 1024, 1 << 20, 1 << 24, 1 << 14, 64
TEXT = (
    ("block_count", "num_hidden_layers", MAX_LAYERS),
    ("context_length", "max_position_embeddings", MAX_TOKENS),
    ("embedding_length", "hidden_size", MAX_WIDTH),
    ("feed_forward_length", "intermediate_size", MAX_WIDTH),
    ("attention.head_count", "num_attention_heads", MAX_HEADS),
    ("attention.head_count_kv", "num_key_value_heads", MAX_HEADS),
    ("vocab_size", "vocab_size", MAX_TOKENS),
)
VISION = (
    ("block_count", "num_hidden_layers", MAX_LAYERS),
    ("global.block_count", "num_global_layers", MAX_LAYERS),
    ("embedding_length", "hidden_size", MAX_WIDTH),
    ("feed_forward_length", "intermediate_size", MAX_WIDTH),
    ("attention.head_count", "attention_heads", MAX_HEADS),
    ("image_size", "image_size", MAX_PIXELS),
    ("patch_size", "patch_size", MAX_PIXELS),
    ("max_num_tiles", "max_num_tiles", MAX_TILES),
)
RGB = 3  # channels, which files of two parts do not name
MULTIPLES = (  # key of a number, and of one that divides it
    ("embedding_length", "attention.head_count"),
    ("attention.head_count", "attention.head_count_kv"),
    ("vision.embedding_length", "vision.attention.head_count"),
    ("vision.image_size", "vision.patch_size"),
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's types of tokens
SPLITS = ("llama-bpe", "smaug-bpe")  # llama.cpp's names of Llama 3's rule for splitting text
IMAGE = "image"


@dataclass(frozen=True)
class Metadata:
    """Typed and bounded values of a GGUF file's metadata.

    Attributes:
        values: by key.
        label: file's name, for errors.
    """

    values: dict[str, Any]
    label: str

    def error(self, problem: str) -> InputError:
        """Return the error for a broken file."""
        return InputError(f"{self.label} {problem}: {FIX}")

    def get(self, key: str) -> Any:
        """Return the value of a key; InputError if it is missing."""
        if key not in self.values:
            raise self.error(f"has no {key}")
        return self.values[key]

    def wrong(self, key: str, expected: str) -> InputError:
        """Return the error for a value that cannot be used."""
        return self.error(f"has {key} = {reprlib.repr(self.values[key])}, not {expected}")

    def integer(self, key: str, most: int) -> int:
        """Return an integer of 1 to `most`."""
        value = self.get(key)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(key, f"a number of 1 to {most:,}")
        return value

    def number(self, key: str) -> float:
        """Return a positive number, stored in 32 bit, by its shortest decimals: 1e-5, not 9.99999974e-06."""
        value = self.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise self.wrong(key, "a positive number")
        return float(f"{value:.7g}")

    def layers(self, key: str, count: int) -> list[int]:
        """Return ascending indices among `count` layers, at least one."""
        value = self.get(key)
        valid = isinstance(value, list) and value and all(type(index) is int for index in value)
        if not valid or value != sorted(set(value)) or value[0] < 0 or value[-1] >= count:
            raise self.wrong(key, f"ascending indices of {count} layers")
        return value

    def text(self, key: str) -> str:
        """Return a text."""
        value = self.get(key)
        if not isinstance(value, str) or not encodable([value]):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts."""
        value = self.get(key)
        if not isinstance(value, list) or not encodable(value):
            raise self.wrong(key, "a list of texts")
        return value


def encodable(values: list) -> bool:
    """Return whether all values are texts without lone surrogates."""
    try:
        "".join(values).encode()
    except (TypeError, UnicodeEncodeError):
        return False
    return True


# ---- Config ---------------------------------------------------------------------------------------------------------


def config_of(metadata: dict[str, Any], label: str) -> MllamaConfig:
    """Return the config of a model in GGUF files.

    Args:
        metadata: values by key, of one file or merged of two.
        label: file's name, for errors.
    Raises:
        InputError: for another architecture, a model without its vision tower, or values that cannot be used.
    """
    return MllamaConfig.from_dict(settings_of(Metadata(metadata, label)))


def settings_of(metadata: Metadata) -> dict[str, Any]:
    """Return config.json; InputError as `config_of`."""
    check_architecture(metadata)
    vision = vision_config(metadata)
    text: dict[str, Any] = {name: metadata.integer(f"{ARCHITECTURE}.{key}", most) for key, name, most in TEXT}
    for product, factor in MULTIPLES:
        whole, part = metadata.get(f"{ARCHITECTURE}.{product}"), metadata.get(f"{ARCHITECTURE}.{factor}")
        if whole % part:
            raise metadata.error(f"has {ARCHITECTURE}.{product} = {whole}, no multiple of {factor} = {part}")
    ids = special_ids(metadata, text["vocab_size"])
    theta = metadata.number(f"{ARCHITECTURE}.rope.freq_base")
    text |= {
        "model_type": "mllama_text_model",
        "rms_norm_eps": metadata.number(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "llama3", "rope_theta": theta, **ROPE},
        "cross_attention_layers": metadata.layers(
            f"{ARCHITECTURE}.attention.cross_attention_layers", text["num_hidden_layers"]
        ),
        "tie_word_embeddings": False,
        "bos_token_id": ids[BOS],
        "eos_token_id": [ids[name] for name in STOPS],
        "pad_token_id": ids[PAD],
    }
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": ids[IMAGE],
        "model_type": "mllama",
        "text_config": text,
        "transformers_version": VERSION,
        "vision_config": vision,
    }


def check_architecture(metadata: Metadata) -> None:
    """Raise an InputError for what is no Llama 3.2 Vision, or only a part of it."""
    label, name = metadata.label, metadata.text("general.architecture")
    if name == "clip":
        raise InputError(
            f"{label} is a projector of llama.cpp ('clip'), a vision tower without its language model: take Ollama's "
            "llama3.2-vision, or the two files of a 'mllama' model."
        )
    if name != ARCHITECTURE:
        raise InputError(
            f"{label} is a {reprlib.repr(name)} model, not Llama 3.2 Vision ('{ARCHITECTURE}'): take llama3.2-vision."
        )
    vision = any(key.startswith(f"{ARCHITECTURE}.vision.") for key in metadata.values)
    if not vision or f"{ARCHITECTURE}.block_count" not in metadata.values:
        half, other = ("vision tower", "language model") if vision else ("language model", "vision tower")
        raise InputError(
            f"{label} holds the {half} alone: give the file with its {other} too (Ollama's layer of type "
            f"{'model' if vision else 'projector'}), or take the one file of today's llama3.2-vision."
        )


def vision_config(metadata: Metadata) -> dict[str, Any]:
    """Return the `vision_config`; indices of intermediate layers are Meta's, the inputs of layers."""
    prefix = f"{ARCHITECTURE}.vision."
    vision: dict[str, Any] = {name: metadata.integer(prefix + key, most) for key, name, most in VISION}
    channels = prefix + "num_channels"
    if channels in metadata.values and metadata.values[channels] != RGB:
        raise metadata.wrong(channels, f"{RGB}")
    layers = metadata.layers(prefix + "intermediate_layers_indices", vision["num_hidden_layers"])
    return vision | {
        "model_type": "mllama_vision_model",
        "num_channels": RGB,
        "norm_eps": metadata.number(prefix + "attention.layer_norm_epsilon"),
        "intermediate_layers_indices": layers,
        "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(vision["max_num_tiles"])],
        "vision_output_dim": vision["hidden_size"] * (1 + len(layers)),
    }


# ---- Tokenizer ------------------------------------------------------------------------------------------------------


class Converter(TikTokenConverter):
    """transformers' converter of Llama 3's tokenizer, with vocabulary and merges at hand."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        super().__init__()
        self.parts = vocabulary, merges

    def extract_vocab_merges_from_model(self, tiktoken_url: str | None) -> tuple:
        """Return vocabulary and merges."""
        return self.parts


def special_ids(metadata: Metadata, vocab_size: int) -> dict[str, int]:
    """Return the ids of special tokens by name.

    Raises:
        InputError: if the tokens are not the model's, or one is missing or twice there.
    """
    key = "tokenizer.ggml.tokens"
    tokens = metadata.texts(key)
    if not vocab_size <= len(tokens) <= vocab_size + EXTRA_EMBEDDINGS:
        raise metadata.error(f"has {len(tokens):,} tokens, its model {vocab_size:,} ({ARCHITECTURE}.vocab_size)")
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens) or "" in ids:
        raise metadata.error(f"has a token twice, or an empty one, in {key}")
    try:
        return {name: ids[f"<|{name}|>"] for name in (BOS, PAD, IMAGE, *STOPS)}
    except KeyError as error:
        raise metadata.error(f"has no {error.args[0]} in {key}") from error


def tokenizer_of(metadata: Metadata) -> PreTrainedTokenizerFast:
    """Return the tokenizer: byte-level BPE, then the tokens that are never split.

    Raises:
        InputError: if tokens, their types or merges do not fit each other.
    """
    for key, known in (("tokenizer.ggml.model", ("gpt2",)), ("tokenizer.ggml.pre", SPLITS)):
        if metadata.text(key) not in known:
            raise metadata.wrong(key, f"{' or '.join(known)}, Llama 3's")
    tokens, types = metadata.texts("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise metadata.wrong("tokenizer.ggml.token_type", f"the types of {len(tokens):,} tokens")
    first = next((index for index, kind in enumerate(types) if kind != NORMAL), len(types))
    if not all(kind in (CONTROL, USER_DEFINED) for kind in types[first:]):
        raise metadata.error("has other tokens than special ones (tokenizer.ggml.token_type) at the vocabulary's end")
    vocabulary = {token: index for index, token in enumerate(tokens[:first])}
    tokenizer = Converter(vocabulary, merges_of(metadata, vocabulary)).converted()
    kinds = zip(tokens[first:], types[first:], strict=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in kinds])
    return with_special_tokens(tokenizer)


def merges_of(metadata: Metadata, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that are merged, none if the file has none.

    Raises:
        InputError: if a merge names or gives what is no token, or the tokens are not all bytes and what merges give.
    """
    key, alphabet = "tokenizer.ggml.merges", set(bytes_to_unicode().values())
    merges = []
    for merge in metadata.texts(key) if key in metadata.values else []:
        left, _, right = merge.partition(" ")
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise metadata.error(f"has the merge {reprlib.repr(merge)} ({key}), which joins no two tokens to one")
        merges.append((left, right))
    if other := vocabulary.keys() ^ {*alphabet, *(left + right for left, right in merges)}:
        found = f"{len(other):,}, such as {reprlib.repr(min(other))}"
        raise metadata.error(f"has tokens that no merge gives, or bytes without a token ({found})")
    return merges


# ---- Files ----------------------------------------------------------------------------------------------------------


def write_settings(metadata: dict[str, Any], folder: Path, label: str) -> None:
    """Write the settings of a checkpoint into an existing folder; the same metadata give the same bytes.

    Args:
        metadata: as for `config_of`.
        label: file's name, for errors.
    Raises:
        InputError: as `config_of`, or for a tokenizer that cannot be used; nothing is written then.
    """
    read = Metadata(metadata, label)
    config = settings_of(read)
    text, vision = config["text_config"], config["vision_config"]
    tokenizer = tokenizer_of(read)
    template = read.text("tokenizer.chat_template") if "tokenizer.chat_template" in metadata else ""
    tokenizer.save_pretrained(folder)
    files = {
        "config.json": config,
        "generation_config.json": generation_config(text),
        "preprocessor_config.json": preprocessor_config(vision),
    }
    for name, settings in files.items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")
    if template:
        (folder / "chat_template.jinja").write_bytes(template.encode())


def generation_config(text: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json; the hub's sampling is Ollama's too."""
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": VERSION}


def preprocessor_config(vision: dict[str, Any]) -> dict[str, Any]:
    """Return preprocessor_config.json."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_processor_type": "MllamaImageProcessor",
        "image_std": OPENAI_CLIP_STD,
        "max_image_tiles": vision["max_num_tiles"],
        "resample": 2,  # bilinear
        "rescale_factor": 1 / 255,
        "size": {"height": vision["image_size"], "width": vision["image_size"]},
    }
