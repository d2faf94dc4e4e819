"""The converted model against Meta's own code (`llama-models`), which no library of ours has a part in.

Features within 1e-5, logits within 1e-4, in f32 and with weights carried over to Meta's modules.
"""

import functools
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, MllamaImageProcessor, MllamaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from conftest import F32, chat_of
from demo_model.checkpoint import CHAT_TEMPLATE as DEMO_TEMPLATE
from meta_reference import INSTALLED, MetaReference, package
from ov_mllama.export.checkpoint import load_checkpoint
from ov_mllama.export.companion_files import CHAT_TEMPLATE
from ov_mllama.export.graphs import LanguageModel, VisionEncoder
from ov_mllama.runtime.reference import META, TRANSFORMERS
from ov_mllama.runtime.vision import image_inputs
from ov_mllama_helper import OVMLlamaForConditionalGeneration, convert_mllama
from tiny_mllama import LLAMA3_ROPE, make_checkpoint

if not INSTALLED and "NOTHING_SKIPPED" not in os.environ:
    pytest.skip("needs Meta's reference: pip install --no-deps llama-models==0.3.0", allow_module_level=True)

ROPE = {
    **LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "original_max_position_embeddings": 8192,
}  # the only one Meta's code knows
CHECKPOINTS = {
    "eight layers": dict(vision_layers=8, intermediate=(1, 3, 6), rope=ROPE),
    "the embedding, no grouped heads": dict(heads=4, kv_heads=4, rope=None, seed=1),
    "one key head, large tiles": dict(
        heads=4,
        kv_heads=1,
        image_size=49,
        cross_layers=(3,),
        rope=ROPE,
        vision_layers=5,
        intermediate=(0, 1, 4),
        seed=2,
    ),
}
CANVASES = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]  # high, wide


class Pair:
    """A checkpoint in Meta's code and, converted, in OpenVINO."""

    def __init__(self, name, folder):
        settings = CHECKPOINTS[name]
        self.checkpoint = make_checkpoint(folder / "checkpoint", meta=True, spread=0.1, **settings)
        self.model_dir = convert_mllama(self.checkpoint, folder / "ov")
        self.meta = MetaReference(self.checkpoint)
        self.ov = OVMLlamaForConditionalGeneration(self.model_dir, ov_config=F32)
        self.processor = AutoProcessor.from_pretrained(self.model_dir)
        self.tile = settings.get("image_size", 28)

    def picture(self, high, wide, seed=0) -> Image.Image:
        size = high * self.tile, wide * self.tile, 3
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))

    def inputs(self, text, canvases):
        pictures = [self.picture(*canvas, seed) for seed, canvas in enumerate(canvases)]
        return self.processor(text=text, images=pictures or None, return_tensors="pt", add_special_tokens=False)

    def expected(self, inputs, canvases, tokens=None, prompt=None):
        """Meta's logits for the processor's inputs."""
        pixels = inputs["pixel_values"][0] if canvases else None
        return self.meta.logits(tokens or inputs["input_ids"][0].tolist(), pixels, canvases, prompt)


@pytest.fixture(scope="module")
def meta_pairs(tmp_path_factory):
    """`meta_pairs(name)`: one of `CHECKPOINTS`, made once."""
    return functools.cache(lambda name: Pair(name, tmp_path_factory.mktemp("meta")))


@pytest.fixture(scope="module", params=tuple(CHECKPOINTS))
def meta_pair(request, meta_pairs):
    return meta_pairs(request.param)


@pytest.fixture(scope="module")
def one_pair(meta_pairs):
    return meta_pairs("eight layers")


# ---- The picture ----


def features(checkpoint, reference, images):
    """Features that the projector reads of images, given as inputs by port name: f32 [rows, channels] of each."""
    encoder, read = VisionEncoder(load_checkpoint(checkpoint).float(), reference), []
    encoder.projector.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0][0]))
    with torch.no_grad():
        for image in images:
            encoder(**{name: torch.from_numpy(array) for name, array in image.items()})
    return read


def all_canvases(pair):
    """For each canvas what Meta's projector reads of an image that fills it, and the image, as our inputs: f32
    [tiles * patches, channels] and twice a dict, with each padding tile and with one for all."""
    for ratio, canvas in enumerate(CANVASES, 1):
        inputs = pair.inputs("<|image|>", [canvas])
        pixels, mask = inputs["pixel_values"][0], inputs["aspect_ratio_mask"][0, 0].numpy()
        assert inputs["aspect_ratio_ids"].item() == ratio
        each, one = (image_inputs(pixels[0].numpy(), ratio, mask, alike) for alike in (False, True))
        yield pair.meta.features(pixels, [canvas])[0].flatten(0, 1), each, one


def test_features_equal_metas_on_all_canvases(meta_pair):
    expected, each, one = zip(*all_canvases(meta_pair), strict=True)
    for canvas, right, every, alike in zip(
        CANVASES,
        expected,
        features(meta_pair.checkpoint, META, each),
        features(meta_pair.checkpoint, META, one),
        strict=True,
    ):
        torch.testing.assert_close(every, right, atol=1e-5, rtol=0, msg=lambda text, canvas=canvas: f"{canvas}: {text}")
        torch.testing.assert_close(alike, right[: len(alike)], atol=1e-5, rtol=0)


def test_features_of_transformers_differ_in_the_intermediate_states_only(meta_pair):
    expected, each, _ = zip(*all_canvases(meta_pair), strict=True)
    for right, every in zip(expected, features(meta_pair.checkpoint, TRANSFORMERS, each), strict=True):
        width = meta_pair.meta.vision.hidden_size
        torch.testing.assert_close(every[:, :width], right[:, :width], atol=1e-5, rtol=0)
        assert (every[:, width:] - right[:, width:]).norm() > 0.2 * right[:, width:].norm()


def test_keys_and_values_of_the_ir_equal_metas_on_all_canvases(meta_pair):
    shapes, text = meta_pair.ov.shapes, meta_pair.meta.text
    for canvas in CANVASES:
        inputs = meta_pair.inputs("<|image|>", [canvas])
        right = meta_pair.meta.key_values(inputs["pixel_values"][0], [canvas])
        right = right[:, :, :, :: text.num_attention_heads // text.num_key_value_heads]  # Meta repeats heads
        part = [inputs[name][0, 0].numpy() for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
        actual = meta_pair.ov.image_encoder._infer(image_inputs(part[0], int(part[1]), part[2]), None).key_values
        for index, layer in enumerate(shapes.cross_layers):
            key, value = (actual[f"cross_attn_key_values.{layer}.{name}"] for name in ("key", "value"))
            expected_key = right[index, 0].transpose(-1, -2) * shapes.head_dim**-0.5
            np.testing.assert_allclose(key, expected_key, atol=2e-5, err_msg=str(canvas))
            np.testing.assert_allclose(value, right[index, 1], atol=2e-5, err_msg=str(canvas))


# ---- The text ----


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
PROMPTS = {  # text or messages, and the canvases that its pictures fill
    **{f"picture first, canvas {high} x {wide}": ("<|image|>what is it", [(high, wide)]) for high, wide in CANVASES},
    "text first": ("first some words, <|image|>then a picture", [(1, 2)]),
    "a chat": ([QUESTION], [(2, 1)]),
    "a system prompt": ([SYSTEM, QUESTION], [(2, 2)]),
    "text only": ("no picture here", []),
    "a system prompt, text only": ([SYSTEM, {"role": "user", "content": "Well?"}], []),
}
SEVERAL = {
    "two pictures": ("<|image|>one <|image|>two, and?", [(1, 2), (1, 1)]),
    "two side by side": ("<|image|><|image|>both", [(1, 1), (2, 2)]),
    "two behind text": ("look: <|image|>one <|image|>two, and?", [(1, 1), (1, 3)]),
    "three turns": (
        [SYSTEM, QUESTION, {"role": "assistant", "content": "Noise."}, QUESTION, SYSTEM, QUESTION],
        [(1, 1), (1, 2), (1, 1)],
    ),
}


def prompt(pair, text, canvases):
    text = text if isinstance(text, str) else chat_of(pair.processor, text)
    return pair.inputs(text, canvases)


@pytest.mark.parametrize("case", [*PROMPTS, *SEVERAL])
def test_logits_of_a_prompt_equal_metas(meta_pair, case):
    text, canvases = {**PROMPTS, **SEVERAL}[case]
    inputs = prompt(meta_pair, text, canvases)
    actual = meta_pair.ov(**inputs).logits[0]
    torch.testing.assert_close(actual, meta_pair.expected(inputs, canvases), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", PROMPTS)
def test_generated_tokens_and_their_logits_equal_metas(meta_pair, case):
    """Greedy, twelve tokens; of prompts with one picture or none: behind several, Meta's mask ends with the prompt."""
    text, canvases = PROMPTS[case]
    inputs = prompt(meta_pair, text, canvases)
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    output = meta_pair.ov.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    tokens, length = output.sequences[0].tolist(), inputs["input_ids"].shape[1]
    expected = meta_pair.expected(inputs, canvases, tokens, length)[length - 1 : -1]
    torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-4, rtol=0)
    assert tokens[length:] == expected.argmax(-1).tolist()


# ---- The comparison itself ----


def test_transformers_convention_fails_this_comparison(one_pair, tmp_path):
    """Prompts with and without text before the image: the layers alone."""
    other = convert_mllama(one_pair.checkpoint, tmp_path / "ov", reference="transformers")
    model = OVMLlamaForConditionalGeneration(other, ov_config=F32)
    for text in ("<|image|>what is it", "some words, <|image|>then a picture"):
        inputs = one_pair.inputs(text, [(1, 2)])
        assert (model(**inputs).logits[0] - one_pair.expected(inputs, [(1, 2)])).abs().max() > 0.1


def test_the_row_mask_alone_makes_a_difference(one_pair):
    """In the language model, beside pictures that are right, behind text only."""
    model = load_checkpoint(one_pair.checkpoint).float()
    shapes, encoder = one_pair.ov.shapes, VisionEncoder(model, META)
    inputs = one_pair.inputs("words, <|image|>what is it", [(1, 2)])
    ids, mask = inputs["input_ids"], inputs["aspect_ratio_mask"][0, 0].numpy()
    image = image_inputs(inputs["pixel_values"][0, 0].numpy(), 2, mask)
    sees = inputs["cross_attention_mask"][0, :, 0].float()  # [tokens, tiles]
    real = (sees + (sees.sum(-1, keepdim=True) == 0)).repeat_interleave(shapes.patches_per_tile, -1)
    empty = torch.zeros(1, shapes.num_kv_heads, 0, shapes.head_dim)
    step = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1])[None],
        "logits_to_keep": torch.tensor(ids.shape[1]),
        "past_key_values": [(empty, empty)] * len(shapes.self_layers),
        "cross_attention_bias": torch.where(real > 0, 0.0, -1e9)[None, None],
        "sees_image": (sees.sum(-1) > 0).float()[None, :, None],
    }
    with torch.no_grad():
        kv = encoder(**{name: torch.from_numpy(array) for name, array in image.items()})
        step["cross_attn_key_values"] = list(zip(kv[::2], kv[1::2], strict=True))
        on, off = (LanguageModel(model, reference)(**step)[0][0] for reference in (META, TRANSFORMERS))
    right = one_pair.expected(inputs, [(1, 2)])
    torch.testing.assert_close(on, right, atol=1e-4, rtol=0)
    assert (off - right).abs().amax(-1).min() > 0.01  # at every position


# ---- What goes in ----


IMAGES = dict(max_image_tiles=4, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)  # as Meta's checkpoints


def test_pixels_of_the_pil_processor_are_metas():
    """Bit for bit, at the 11B's tile size and the tests'."""
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    rng = np.random.default_rng(0)
    for tile, count in ((560, 8), (28, 60)):
        processor = MllamaImageProcessorPil(size={"height": tile, "width": tile}, **IMAGES)
        transform = package("multimodal.image_transform").VariableSizeImageTransform(tile)
        for _ in range(count):
            size = rng.integers(max(tile // 20, 2), 4 * tile, 2)
            image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            expected, canvas = transform(image, max_num_chunks=4)
            actual = processor(image, return_tensors="pt")
            tiles = int(actual["aspect_ratio_mask"].sum())
            assert CANVASES[actual["aspect_ratio_ids"].item() - 1] == tuple(canvas)
            assert torch.equal(actual["pixel_values"][0, 0, :tiles], expected), size


def test_pixels_of_the_default_processor_are_nearly_metas():
    """Two values of 255 at most: torchvision rounds what it resizes otherwise."""
    rng = np.random.default_rng(0)
    processor = MllamaImageProcessor(size={"height": 28, "width": 28}, **IMAGES)
    transform = package("multimodal.image_transform").VariableSizeImageTransform(28)
    for _ in range(60):
        image = Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 112, 2), 3), dtype=np.uint8))
        expected, canvas = transform(image, max_num_chunks=4)
        actual = processor(image, return_tensors="pt")
        tiles = int(actual["aspect_ratio_mask"].sum())
        assert CANVASES[actual["aspect_ratio_ids"].item() - 1] == tuple(canvas)
        assert (actual["pixel_values"][0, 0, :tiles] - expected).abs().max() < 2 / 255 / 0.26


@pytest.fixture(scope="module")
def llama_processor():
    """Meta's tokenizer, out of the wheel, as transformers has it, with the demo's chat template."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    meta = package("tokenizer")
    original = meta.Tokenizer.get_instance()
    special = [token for token, _ in sorted(original.special_tokens.items(), key=lambda item: item[1])]
    special[special.index("<|image|>")] = "<|reserved_special_token_247|>"  # 128256 in the model, behind all others
    vocabulary = str(package("tokenizer").Path(meta.__file__).parent / "tokenizer.model")
    converter = TikTokenConverter(vocabulary, pattern=original.pat_str, extra_special_tokens=[*special, "<|image|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token="<|begin_of_text|>")
    tokenizer.image_token, tokenizer.image_token_id = "<|image|>", tokenizer.convert_tokens_to_ids("<|image|>")
    return MllamaProcessor(MllamaImageProcessor(max_image_tiles=4), tokenizer, chat_template=DEMO_TEMPLATE)


def test_special_tokens_have_metas_ids(llama_processor):
    tokenizer, meta = llama_processor.tokenizer, package("tokenizer").Tokenizer.get_instance()
    assert len(tokenizer) == meta.n_words + 1 == 128257
    assert tokenizer.convert_tokens_to_ids("<|image|>") == 128256
    assert meta.stop_tokens == [128001, 128008, 128009]
    assert meta.pad_id == 128004
    for token in ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"):
        assert tokenizer.convert_tokens_to_ids(token) == meta.special_tokens[token]


PICTURE = {"type": "image"}
DIALOGS = {
    "text": [{"role": "user", "content": "What's 12345 + 678?\nSay it, in one word: ça va. 日本"}],
    "picture": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What is it?"}]}],
    "two pictures": [{"role": "user", "content": [PICTURE, PICTURE, {"type": "text", "text": "Which?"}]}],
    "system": [SYSTEM, QUESTION],
    "several turns": [
        SYSTEM,
        QUESTION,
        {"role": "assistant", "content": "A dog. It's 3 years old."},
        {"role": "user", "content": [{"type": "text", "text": "And\n\nthis one?"}, PICTURE]},
        {"role": "assistant", "content": [{"type": "text", "text": "Another."}]},
        {"role": "user", "content": "Sure?"},
    ],
}


@pytest.mark.parametrize("template", [DEMO_TEMPLATE, CHAT_TEMPLATE], ids=["demo", "for models without one"])
@pytest.mark.parametrize("case", DIALOGS)
def test_chat_template_gives_metas_tokens(llama_processor, case, template):
    """But for blanks around a text, which the templates strip, as that of Meta's on the hub does."""
    llama_processor.chat_template = template
    datatypes = import_datatypes()
    data = io.BytesIO()
    Image.new("RGB", (30, 20)).save(data, "PNG")

    def content(parts):
        if isinstance(parts, str):
            return parts
        return [
            datatypes.RawMediaItem(data=data.getvalue())
            if part["type"] == "image"
            else datatypes.RawTextItem(text=part["text"])
            for part in parts
        ]

    messages = [
        datatypes.RawMessage(role=message["role"], content=content(message["content"])) for message in DIALOGS[case]
    ]
    chat_format = package("chat_format").ChatFormat(package("tokenizer").Tokenizer.get_instance())
    expected = chat_format.encode_dialog_prompt(messages)
    text = chat_of(llama_processor, DIALOGS[case])
    assert llama_processor.tokenizer(text, add_special_tokens=False)["input_ids"] == expected.tokens
    if expected.vision:
        inputs = llama_processor(
            text=text, images=expected.vision.images, add_special_tokens=False, return_tensors="pt"
        )
        seen = inputs["cross_attention_mask"][0].any(-1).T  # [images, tokens]
        right = torch.zeros_like(seen)
        for image, (start, stop) in enumerate(expected.vision.mask):
            right[image, start : None if stop == -1 else stop] = True
        assert torch.equal(seen, right)


def test_template_for_models_without_one_strips_blanks_and_knows_tools(llama_processor):
    llama_processor.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "\n Sum? "},
        {"role": "tool", "content": [{"type": "text", "text": " 3\n"}]},
    ]
    text = chat_of(llama_processor, messages)
    assert "user<|end_header_id|>\n\nSum?<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>" in text


def import_datatypes():
    from llama_models import datatypes

    return datatypes
