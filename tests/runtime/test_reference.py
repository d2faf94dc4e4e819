"""The reference that a conversion follows: chosen by the checkpoint or as asked, stamped, compared with transformers
put right; and what the row mask brings, a beginning that another image does not change."""

import json
import re
import shutil
import sys

import numpy as np
import openvino
import pytest
import torch
from test_parity import ATOL, CASES, GREEDY
from transformers import MllamaForConditionalGeneration

import ov_mllama.__main__ as command_line
from conftest import F32, ROOT, chat_of
from notebook_utils import follow
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.piecewise import quantize_in_pieces, split
from ov_mllama.export.prepare import current_irs, plan_here, prepare
from ov_mllama.export.quality import caption_log_probs, verdict
from ov_mllama.export.settings import DEFAULT_VISION_OPTION
from ov_mllama.runtime.cross_attention import visible_kv
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME, VISION_ENCODER_NAME, check_model_dir, ir_stamp, newest
from ov_mllama.runtime.reference import BEFORE_4_55, META, NAMES, TRANSFORMERS, Reference, reference_of
from ov_mllama.runtime.vision import Encoded
from ov_mllama_compression import compress, optimize_vision_encoder
from ov_mllama_helper import OVMLlamaForConditionalGeneration
from tiny_mllama import make_checkpoint, written_by

BOTH = (VISION_ENCODER_NAME, LANGUAGE_MODEL_NAME)


def followed(folder, names=BOTH) -> set[Reference]:
    return {Reference.of(ir_stamp(folder / name)) for name in names}


# ---- Chosen ----


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("4.45.0.dev0", META),  # Meta's own converter
        ("4.45.0", BEFORE_4_55),
        ("4.45.2", BEFORE_4_55),
        ("4.46.0.dev0", BEFORE_4_55),
        ("4.54.1", BEFORE_4_55),
        ("4.55.0", TRANSFORMERS),
        ("4.55.4", TRANSFORMERS),
        ("4.56.0", TRANSFORMERS),
        ("4.100.0", TRANSFORMERS),
        ("5.0.0.dev0", TRANSFORMERS),
        ("5.23.0", TRANSFORMERS),
        ("main", TRANSFORMERS),
        (None, TRANSFORMERS),
    ],
)
def test_auto_goes_by_the_version_that_wrote_the_config(tmp_path, version, expected):
    (tmp_path / "config.json").write_text("{}")
    assert reference_of(written_by(tmp_path, version))[0] == expected
    for name in NAMES:
        assert reference_of(tmp_path, name)[0] == NAMES[name]


def test_another_reference_is_refused(pair, tmp_path):
    for call in (convert_mllama, plan_here, prepare):
        with pytest.raises(ValueError, match="reference='Meta' is unknown: choose one of auto, meta, transformers"):
            call(pair.checkpoint, tmp_path / "ov", reference="Meta")
    assert not (tmp_path / "ov").exists()


# ---- Compared with transformers ----


class Followed:
    """A checkpoint converted as asked, and transformers' model that follows the same reference."""

    def __init__(self, inputs, checkpoint, folder, reference):
        self.inputs, self.model_dir = inputs, convert_mllama(checkpoint, folder, reference=reference)
        self.ov = OVMLlamaForConditionalGeneration(self.model_dir, ov_config=F32)
        self.hf = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.hf = follow(self.hf, self.ov.reference)


@pytest.fixture(scope="module")
def meta(pair, tmp_path_factory):
    """The override on a checkpoint of transformers 5."""
    return Followed(pair.inputs, pair.checkpoint, tmp_path_factory.mktemp("meta") / "ov", "meta")


@pytest.fixture(scope="module")
def before_4_55(pair, tmp_path_factory):
    """The layers alone: a checkpoint that an older transformers saved."""
    folder = tmp_path_factory.mktemp("before")
    checkpoint = written_by(shutil.copytree(pair.checkpoint, folder / "checkpoint"), "4.54.1")
    return Followed(pair.inputs, checkpoint, folder / "ov", "auto")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["meta", "before_4_55"])
def test_logits_and_tokens_equal_transformers_put_right(request, which, case):
    model = request.getfixturevalue(which)
    assert model.ov.reference == {"meta": META, "before_4_55": BEFORE_4_55}[which]
    inputs = model.inputs(case)
    with torch.no_grad():
        expected = model.hf(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model.ov(**inputs).logits[real], expected[real], atol=ATOL, rtol=0)
    expected = model.hf.generate(**inputs, **GREEDY)
    assert model.ov.generate(**inputs, **GREEDY).tolist() == expected.tolist()


def test_each_switch_is_seen_by_the_comparison(pair, meta, before_4_55):
    """With transformers as it is both fail, and so does each with the other's."""
    inputs = pair.inputs("chat")
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (pair.hf, meta.hf, before_4_55.hf)]
    for index, model in enumerate((pair.ov, meta.ov, before_4_55.ov)):
        differences = [(model(**inputs).logits - other).abs().max() for other in logits]
        assert [difference < ATOL for difference in differences] == [index == other for other in range(3)]


def test_override_to_transformers_on_metas_own_checkpoint(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", meta=True)
    made = convert_mllama(checkpoint, tmp_path / "ov", reference="transformers")
    hf = MllamaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = torch.arange(5)[None] + 60
    with torch.no_grad():
        expected = hf(input_ids=tokens).logits
    ov = OVMLlamaForConditionalGeneration(made, ov_config=F32)
    torch.testing.assert_close(ov(input_ids=tokens).logits, expected, atol=ATOL, rtol=0)
    assert ov.reference == TRANSFORMERS
    convert_mllama(checkpoint, tmp_path / "ov")
    assert followed(tmp_path / "ov") == {META}


def test_index_minus_one_of_outputs_is_the_embedding(tmp_path):
    """It names, in transformers' counting, the input of the first layer, which index 0 names in Meta's."""
    encoded = []
    for name, indices, reference in (("meta", (0, 2), "meta"), ("outputs", (-1, 1), "transformers")):
        checkpoint = make_checkpoint(tmp_path / name, intermediate=indices)
        model = OVMLlamaForConditionalGeneration(
            convert_mllama(checkpoint, tmp_path / f"{name}-ov", reference=reference), ov_config=F32
        )
        pixels, ids = torch.arange(4.0 * 3 * 28 * 28).sin().view(1, 1, 4, 3, 28, 28), torch.tensor([[6]])
        tiles = torch.ones(1, 1, 4, dtype=torch.long)
        tokens = torch.tensor([[model.config.image_token_index, 65, 66]])
        seen = torch.ones(1, 3, 1, 4, dtype=torch.long)
        images = dict(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=tiles, cross_attention_mask=seen)
        encoded.append(model(input_ids=tokens, **images).logits)
    torch.testing.assert_close(*encoded, atol=1e-5, rtol=0)


# ---- Stamped ----


def test_another_reference_is_converted_again_and_said_once(pair, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "ov"
    for name, words in (
        ("meta", "Meta's, the projector reads inputs"),
        ("transformers", "transformers', the projector"),
    ):
        convert_mllama(pair.checkpoint, folder, reference=name)
        assert caplog.text.count(f"Reference: {words}") == 1
        assert followed(folder) == {NAMES[name]}
        convert_mllama(pair.checkpoint, folder, reference=name)
        assert "already holds" in caplog.text
    checkpoint = Checkpoint(pair.checkpoint)
    assert current_irs(checkpoint, folder, "auto")
    assert not current_irs(checkpoint, folder, "meta")


@pytest.fixture(scope="module")
def compressed(pair, tmp_path_factory):
    """As Meta's reference has it, without a language model in 16 bit."""
    folder = convert_mllama(pair.checkpoint, tmp_path_factory.mktemp("compressed"), False, reference="meta")
    compress(folder, checkpoint=pair.checkpoint, group_size=32)
    optimize_vision_encoder(folder, DEFAULT_VISION_OPTION)
    return folder


def test_compressed_models_follow_their_folders_reference(pair, compressed):
    names = {path.name for path in compressed.glob("*.xml")}
    assert len(names) == 3
    assert followed(compressed, names) == {META}
    model = OVMLlamaForConditionalGeneration(compressed, language_model_name=newest(compressed, LANGUAGE_MODEL_NAME))
    assert model.reference == META
    assert model.language_model.row_mask


def test_irs_of_two_references_do_not_load_together(pair, compressed, tmp_path):
    mixed = shutil.copytree(compressed, tmp_path / "mixed")
    convert_mllama(pair.checkpoint, mixed, False, reference="transformers")
    small = next(path.name for path in mixed.glob("llm_*.xml"))
    with pytest.raises(ValueError, match="follow different references: run convert_mllama again"):
        check_model_dir(mixed, (VISION_ENCODER_NAME, small))
    with pytest.raises(FileNotFoundError, match="nor a compressed one"):
        newest(mixed, LANGUAGE_MODEL_NAME)


def test_prepare_and_the_command_line_take_a_reference(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "ov"
    arguments = ["demo_model", "--model-dir", str(folder), "--reference", "meta"]
    monkeypatch.setattr(sys, "argv", ["ov_mllama", "prepare", *arguments])
    command_line.main()
    assert "Reference: Meta's" in capsys.readouterr().out
    assert followed(folder, {path.name for path in folder.glob("*.xml")}) == {META}
    monkeypatch.setattr(sys, "argv", ["ov_mllama", "plan", *arguments])
    command_line.main()
    assert capsys.readouterr().out.count("done already") == 3


def test_golden_question_is_not_asked_of_another_reference(pair, meta, tmp_path, recwarn):
    """Its answer is that of transformers, unless it says otherwise."""
    folder = shutil.copytree(meta.model_dir, tmp_path / "ov")
    pair.picture(1, 1).save(folder / "golden.png")
    golden = {"question": "What?", "picture": "golden.png", "answer": "A wrong one."}
    (folder / "golden.json").write_text(json.dumps(golden))
    OVMLlamaForConditionalGeneration(folder)
    assert not [warning for warning in recwarn if "A wrong one" in str(warning.message)]
    (folder / "golden.json").write_text(json.dumps({**golden, "reference": "meta"}))
    with pytest.warns(UserWarning, match="transformers answers 'A wrong one.'"):
        OVMLlamaForConditionalGeneration(folder)


# ---- A beginning that no image changes ----


LONG = "Answer briefly, in one sentence, and say what you do not know."


def question(pair, picture, text="What is it?", system=LONG, before=()):
    messages = [{"role": "system", "content": system}, *before]
    messages.append({"role": "user", "content": [{"type": "image"}] * bool(picture) + [{"type": "text", "text": text}]})
    images = [part for message in before for part in message.get("pictures", ())] + [picture] * bool(picture)
    return pair.processor(
        text=chat_of(pair.processor, messages), images=images or None, return_tensors="pt", add_special_tokens=False
    )


def fresh(model, inputs):
    """Tokens of an answer, its prompt computed from the first token."""
    model.forget()
    return model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("first", ["a picture", "text"])
@pytest.mark.parametrize("second", ["a picture", "a larger one", "text"])
def test_system_prompt_is_reused_for_another_picture(pair, meta, first, second):
    pictures = {"text": None, "a picture": pair.picture(1, 1, 8), "a larger one": pair.picture(2, 2, 9)}
    begun = question(pair, pictures[first] and pair.picture(2, 1, 7))
    inputs = question(pair, pictures[second], "And this one?")
    expected, logits = fresh(meta.ov, inputs), meta.ov(**inputs).logits
    fresh(meta.ov, begun)
    actual = meta.ov.generate(**inputs, **GREEDY)
    assert meta.ov.stats.reused_tokens >= len(LONG)  # a token a byte
    assert actual.tolist() == expected.tolist()
    meta.ov.forget()
    meta.ov(**begun)
    torch.testing.assert_close(meta.ov(**inputs, logits_to_keep=5).logits, logits[:, -5:], atol=1e-5, rtol=0)
    assert meta.ov.stats.reused_tokens >= len(LONG)


def test_with_the_row_mask_no_padding_tile_is_read(meta):
    """Nor is a bias needed where all that see a picture see the same of it; where none does, nothing is read."""
    shapes = meta.ov.shapes
    rows = 2 * shapes.patches_per_tile
    key_values = {name: np.ones(shapes.cross_kv_shape(name, 1, rows), np.float32) for name in shapes.cross_kv_names}
    stands_for = np.array([[[1, 0, 0, 0], [0, 1, 1, 1]]], bool)  # a tile, and one padding tile for three
    mask = np.zeros((1, 3, 4), bool)
    mask[:, 1:, 0] = True
    encoded = Encoded(key_values, stands_for, [], 0)
    read = {row_mask: visible_kv(encoded, mask, shapes, row_mask) for row_mask in (True, False)}
    counts = {row_mask: view.key_values[shapes.cross_kv_names[1]].shape[2] for row_mask, view in read.items()}
    assert counts == {True: shapes.patches_per_tile, False: rows}
    assert read[True].bias.shape == (1, 1, 1, 1)
    assert read[True].sees_image.ravel().tolist() == [0, 1, 1]
    nothing = visible_kv(encoded, mask[:, :1], shapes, True)
    assert nothing.key_values[shapes.cross_kv_names[1]].shape[2] == 1
    assert not nothing.sees_image.any()


def test_first_turn_is_reused_when_the_second_brings_a_picture(pair, meta):
    picture, other = pair.picture(1, 1, 8), pair.picture(2, 1, 9)
    begun = question(pair, picture)
    before = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            "pictures": [picture],
        },
        {"role": "assistant", "content": "Noise."},
    ]
    inputs = question(pair, other, "And this?", before=before)
    expected = fresh(meta.ov, inputs)
    fresh(meta.ov, begun)
    assert meta.ov.generate(**inputs, **GREEDY).tolist() == expected.tolist()
    assert meta.ov.stats.reused_tokens >= begun["input_ids"].shape[1] - 2


def test_tokens_behind_an_image_are_not_reused_for_another(pair, meta):
    begun, inputs = (question(pair, pair.picture(1, 1, seed), "What is it?" * 9) for seed in (8, 9))
    fresh(meta.ov, begun)
    meta.ov.generate(**inputs, **GREEDY)
    image = (inputs["input_ids"][0] == meta.ov.config.image_token_index).nonzero().item()
    assert meta.ov.stats.reused_tokens in (0, image)  # 0: less than half of what the session holds


@pytest.mark.parametrize("which", ["pair", "before_4_55"])
def test_nothing_is_reused_for_another_picture_without_the_row_mask(request, pair, which):
    model = request.getfixturevalue(which).ov
    fresh(model, question(pair, pair.picture(1, 1, 8)))
    inputs = question(pair, pair.picture(1, 1, 9))
    actual = model.generate(**inputs, **GREEDY)
    assert model.stats.reused_tokens == 0
    assert actual.tolist() == fresh(model, inputs).tolist()


def test_pieces_of_an_encoder_that_reads_the_embedding_are_the_model(meta, tmp_path):
    """No piece computes the embedding again, and joined they are the whole."""
    model = openvino.Core().read_model(meta.model_dir / VISION_ENCODER_NAME)
    for layers in (1, 8):
        convolutions = [
            op for part in split(model, layers) for op in part.get_ops() if op.get_type_name() == "Convolution"
        ]
        assert len(convolutions) == 1
        pixels = torch.arange(2.0 * 3 * 28 * 28).sin().view(2, 3, 28, 28).numpy()
        sample = dict(pixel_values=pixels, aspect_ratio_ids=[2], real_tiles=2, tile_counts=[1, 1])
        sample = {name: np.asarray(array) for name, array in sample.items()}
        joined = quantize_in_pieces(model, [sample], lambda piece, _: piece, tmp_path, layers)
        expected, actual = (
            openvino.Core().compile_model(each, "CPU", F32)(sample).to_tuple() for each in (model, joined)
        )
        for pair in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(*pair)


# ---- Which is better ----


def test_reports_scripts_run_and_show_what_they_say(pair, monkeypatch, capsys):
    """On random weights: each caption twice, and tokens before an image that change with it until they are masked."""
    layers, rows = re.findall(r"```python\n(.*?)```", (ROOT / "docs/upstream.md").read_text(encoding="utf-8"), re.S)
    monkeypatch.setattr(sys, "argv", ["script", str(pair.checkpoint)])
    exec(layers, {})  # noqa: S102, our own
    pairs = re.findall(r"(-[\d.]+) as it is, (-[\d.]+) with the layers' inputs", capsys.readouterr().out)
    assert len(pairs) == 4
    assert all(before != after for before, after in pairs)
    exec(rows, {})  # noqa: S102
    as_it_is, masked = (json.loads(line.split(":")[1]) for line in capsys.readouterr().out.splitlines())
    assert min(as_it_is) > 0.01
    assert set(masked) == {0.0}


def test_verdict_names_the_better_only_where_captions_tell():
    def rows(*gains):
        return [{"meta": -1 + gain, "transformers": -1} for gain in gains]

    assert "3 of 3 captions likelier with meta: Meta's reference is better." in verdict(rows(0.2, 0.21, 0.19))
    assert "0 of 3 captions likelier with meta: transformers' reference is better." in verdict(rows(-0.2, -0.21, -0.19))
    assert verdict(rows(0.5, -0.5, 0.1)).endswith("so few captions cannot tell them apart.")


def test_compare_references_measures_both(pair, tmp_path, monkeypatch, capsys):
    """As each conversion by itself finds the captions."""
    samples = [
        {"image": pair.picture(1, 1), "question": "What?", "answer": "Noise.", "caption": "Noise."} for _ in range(2)
    ]
    monkeypatch.setattr("ov_mllama.export.calibration.questions_about", lambda checkpoint: samples)
    arguments = ["ov_mllama", "compare-references", str(pair.checkpoint), "--out", str(tmp_path / "both")]
    monkeypatch.setattr(sys, "argv", arguments)
    command_line.main()
    printed = capsys.readouterr().out
    for name in NAMES:
        assert followed(tmp_path / "both" / name) == {NAMES[name]}
    found = [caption_log_probs(tmp_path / "both" / name, LANGUAGE_MODEL_NAME, samples)[0] for name in NAMES]
    assert f"| mean | {found[0]:.4f} | {found[1]:.4f} |" in printed
    assert "likelier with meta" in printed
