"""Losses of fine-tunes: chat template, end tokens, padding, image processor, rows of the embeddings. The conversion
completes it, or refuses it before weights are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, MllamaForConditionalGeneration

from conftest import DEMO, F32, demo_samples
from demo_model.checkpoint import CHAT_TEMPLATE as DEMO_TEMPLATE
from ov_mllama.export.checkpoint import Checkpoint
from ov_mllama.export.companion_files import CHAT_TEMPLATE, save_companions
from ov_mllama.export.convert import convert_mllama
from ov_mllama.export.prepare import plan_here
from ov_mllama.runtime.generation import end_tokens, generation_config
from ov_mllama.runtime.prompts import GREEDY, load_processor, prompts_about
from ov_mllama_helper import OVMLlamaForConditionalGeneration

SAMPLES = demo_samples()
END, EOM, EOT, PAD = 505, 509, 510, 506  # ids of the demo's <|end_of_text|>, <|eom_id|>, <|eot_id|>, pad token


def edit(path: Path, **changes) -> None:
    """Change entries of a JSON file; those that become ... are removed."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture
def checkpoint(tmp_path):
    """The demo's checkpoint as a fine-tune of it, to be changed."""
    return fine_tune(tmp_path / "tuned")


def fine_tune(folder: Path) -> Path:
    folder.mkdir()
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors") and "golden" not in path.name:
            shutil.copy(path, folder)
    return folder


def companions_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's companion files."""
    folder = checkpoint.with_name("companions")
    folder.mkdir(exist_ok=True)
    save_companions(Checkpoint(checkpoint), folder)
    return folder


def refused(checkpoint: Path, monkeypatch, match: str) -> None:
    """Assert that plan and conversion refuse a checkpoint before weights are read or anything is written."""
    monkeypatch.setattr(Checkpoint, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    out = checkpoint.with_name("ov")
    for attempt in (plan_here, convert_mllama):
        with pytest.raises(ValueError, match=match) as error:
            attempt(checkpoint, out)
        assert "\n" not in str(error.value)
    assert not out.exists()


# ---- A fine-tune that lost everything -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """The demo's weights, config and tokenizer.json, converted; without anything about turns, ends, padding, images."""
    checkpoint = fine_tune(tmp_path_factory.mktemp("lost") / "tuned")
    for name in ("chat_template.jinja", "generation_config.json", "processor_config.json"):
        (checkpoint / name).unlink()
    (checkpoint / "tokenizer_config.json").write_text('{"padding_side": "right"}')
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit(checkpoint / "config.json", eos_token_id=None, text_config={**text, "eos_token_id": None})
    return convert_mllama(checkpoint, checkpoint.with_name("ov"))


def test_a_fine_tune_that_lost_everything_answers_as_before(lost, demo_model_f32, processor):
    model = OVMLlamaForConditionalGeneration(lost, ov_config=F32)
    for number in (0, 5):
        inputs = prompts_about(load_processor(lost), [SAMPLES[number]])
        before = prompts_about(AutoProcessor.from_pretrained(DEMO, backend="pil"), [SAMPLES[number]])
        assert all(torch.equal(inputs[name], before[name]) for name in before)
        answer = model.generate(**inputs, **GREEDY, max_new_tokens=100)
        assert torch.equal(answer, demo_model_f32.generate(**before, **GREEDY, max_new_tokens=100))
        assert answer[0, -1] == EOT


def test_answers_of_a_batch_equal_those_alone(lost):
    model, processor = OVMLlamaForConditionalGeneration(lost, ov_config=F32), load_processor(lost)
    samples = [SAMPLES[0], {**SAMPLES[1], "question": SAMPLES[1]["question"] + " Please tell me in a few words."}]

    def answers(samples):
        inputs = prompts_about(processor, samples)
        output = model.generate(**inputs, **GREEDY, max_new_tokens=60)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(output, skip_special_tokens=True)

    assert answers(samples) == [answers([sample])[0] for sample in samples]


# ---- Chat template --------------------------------------------------------------------------------------------------

LIST = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": DEMO_TEMPLATE}]
PLACES = {
    "chat_template.json": lambda folder: (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": DEMO_TEMPLATE})
    ),
    "processor_config.json": lambda folder: edit(folder / "processor_config.json", chat_template=DEMO_TEMPLATE),
    "tokenizer_config.json": lambda folder: edit(folder / "tokenizer_config.json", chat_template=DEMO_TEMPLATE),
    "several named ones": lambda folder: edit(folder / "tokenizer_config.json", chat_template=LIST),
    "several in chat_template.json": lambda folder: (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": LIST})
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_chat_template_is_found_wherever_it_is(checkpoint, place, caplog):
    (checkpoint / "chat_template.jinja").unlink()
    PLACES[place](checkpoint)
    folder = companions_of(checkpoint)
    assert load_processor(folder).chat_template == AutoTokenizer.from_pretrained(folder).chat_template == DEMO_TEMPLATE
    assert not caplog.records


def test_without_a_chat_template_llamas_own_is_written_with_a_word(checkpoint, caplog):
    assert load_processor(companions_of(checkpoint)).chat_template == DEMO_TEMPLATE
    assert not caplog.records
    (checkpoint / "chat_template.jinja").unlink()
    assert load_processor(companions_of(checkpoint)).chat_template == CHAT_TEMPLATE
    assert "No chat template" in caplog.text
    assert "right for a fine-tune that lost it; a base model continues text" in caplog.text


TEXT_ALONE = ("{{ message['content'] + '<|eot_id|>' }}", "{{ message['content'] | trim }}", "{{ message.content.x.y }}")


@pytest.mark.parametrize("content", TEXT_ALONE)
def test_a_template_for_text_alone_is_replaced(checkpoint, content, caplog):
    template = "{% for message in messages %}" + content + "{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert load_processor(companions_of(checkpoint)).chat_template == CHAT_TEMPLATE
    assert "is for text alone" in caplog.text


def test_a_template_that_refuses_images_stays(checkpoint, caplog):
    template = "{{ raise_exception('No pictures here.') }}<|eom_id|>"
    (checkpoint / "chat_template.jinja").write_text(template)
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit(checkpoint / "config.json", text_config={**text, "eos_token_id": END})
    edit(checkpoint / "generation_config.json", eos_token_id=END)
    folder = companions_of(checkpoint)
    assert load_processor(folder).chat_template == template
    assert 'refuses a question about an image: "No pictures here."' in caplog.text
    assert EOM in ends_in(folder)


def test_a_template_with_a_syntax_error_is_refused(checkpoint, monkeypatch):
    (checkpoint / "chat_template.jinja").write_text("a\n{% for message in messages %}\n{{ message.role }")
    refused(checkpoint, monkeypatch, r"chat template in .* is no valid Jinja \(line 3: .*\): correct it, or remove it")


def test_a_broken_file_with_a_template_is_refused(checkpoint, monkeypatch):
    (checkpoint / "chat_template.json").write_text('{"chat_template": ')
    refused(checkpoint, monkeypatch, "chat_template.json cannot be read: download it again, or remove it")


def test_a_template_that_is_no_text_is_refused(checkpoint, monkeypatch):
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "chat_template.json").write_text('{"chat_template": 5}')
    refused(checkpoint, monkeypatch, "chat template in .* is no text: correct it, or remove it")


# ---- End tokens -----------------------------------------------------------------------------------------------------


def ends_in(folder: Path) -> list[int]:
    return GenerationConfig.from_pretrained(folder).eos_token_id


OTHER_FORMAT = """{% for message in messages %}{{ message.role }}
{% for part in message.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}
<|python_tag|>{% endfor %}"""
ENDS = {  # eos_token_id of generation_config, config and text_config, eos_token of the tokenizer -> end tokens
    "one": ((END, ..., ..., "<|eot_id|>"), {END, EOT}),
    "lists": (([END], [EOM], [EOT], "<|eot_id|>"), {END, EOM, EOT}),
    "a list and null": ((None, None, [END, EOM], None), {END, EOM, EOT}),
    "the template's alone": ((None, None, None, None), {EOT}),
    "the default, not of this vocabulary": ((..., ..., ..., "<|end_of_text|>"), {END, EOT}),
    "outside the vocabulary": ((128001, 128009, -1, "<|eot_id|>"), {EOT}),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_answer_ends_at_any_of_the_end_tokens(checkpoint, case):
    (generation, top, inner, token), expected = ENDS[case]
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    inner = {key: value for key, value in {**text, "eos_token_id": inner}.items() if value is not ...}
    edit(checkpoint / "config.json", eos_token_id=top, text_config=inner)
    edit(checkpoint / "generation_config.json", eos_token_id=generation)
    edit(checkpoint / "tokenizer_config.json", eos_token=token)
    assert {*ends_in(companions_of(checkpoint))} == expected


def test_the_end_of_a_template_of_another_format_counts(checkpoint):
    edit(checkpoint / "generation_config.json", eos_token_id=None)
    (checkpoint / "chat_template.jinja").write_text(OTHER_FORMAT)
    end = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<|python_tag|>")
    assert end in ends_in(companions_of(checkpoint))


INVALID = ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"max_new_tokens": -3}, {"early_stopping": True})


@pytest.mark.parametrize("settings", INVALID)
def test_invalid_sampling_settings_do_not_stop_the_conversion(checkpoint, settings, caplog):
    edit(checkpoint / "generation_config.json", **settings)
    folder = companions_of(checkpoint)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert {END, EOM, EOT} == {*saved["eos_token_id"]}
    assert not settings.keys() & saved.keys()
    assert "generation_config.json is invalid, only its end tokens are used: " in caplog.text


def test_a_broken_generation_config_does_not_stop_the_conversion(checkpoint, caplog):
    (checkpoint / "generation_config.json").write_text("{")
    assert {*ends_in(companions_of(checkpoint))} == {END, EOM, EOT}
    assert "generation_config.json is invalid" in caplog.text


def test_a_valid_generation_config_stays(checkpoint, caplog):
    edit(checkpoint / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    saved = json.loads((companions_of(checkpoint) / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)
    assert not caplog.records


@pytest.mark.parametrize("ends", [None, [], 128001, ...])
def test_a_folder_converted_earlier_without_end_tokens_has_them(demo_dir, tmp_path, ends):
    folder = shutil.copytree(demo_dir, tmp_path / "ov", ignore=shutil.ignore_patterns("*.bin", "*.xml"))
    edit(folder / "generation_config.json", eos_token_id=ends)
    config = AutoConfig.from_pretrained(folder)
    assert {*end_tokens(generation_config(folder, config))} == {END, EOM, EOT}
    (folder / "generation_config.json").unlink()
    settings = generation_config(folder, config)
    assert {*end_tokens(settings)} == {END, EOM, EOT}
    assert settings.pad_token_id == PAD


def test_edited_end_tokens_stay(demo_dir, tmp_path):
    folder = shutil.copytree(demo_dir, tmp_path / "ov", ignore=shutil.ignore_patterns("*.bin", "*.xml"))
    edit(folder / "generation_config.json", eos_token_id=EOT)
    assert end_tokens(generation_config(folder, AutoConfig.from_pretrained(folder))) == [EOT]


# ---- Tokenizer ------------------------------------------------------------------------------------------------------


def test_padding_is_on_the_left_with_a_token(checkpoint):
    edit(checkpoint / "tokenizer_config.json", padding_side="right", pad_token=None)
    edit(checkpoint / "generation_config.json", pad_token_id=None)
    folder = companions_of(checkpoint)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("left", PAD)
    assert GenerationConfig.from_pretrained(folder).pad_token_id == PAD


def test_padding_of_a_folder_converted_earlier_is_on_the_left(checkpoint):
    edit(checkpoint / "tokenizer_config.json", padding_side="right", pad_token=None)
    tokenizer = load_processor(checkpoint).tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("left", EOT)


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_missing_tokenizer_is_refused_before_weights_are_loaded(checkpoint, names, monkeypatch):
    for name in names:
        (checkpoint / name).unlink()
    said = r"holds no tokenizer \(tokenizer.json\): copy tokenizer.json and tokenizer_config.json from the base model"
    refused(checkpoint, monkeypatch, said)


def test_a_broken_tokenizer_is_refused(checkpoint, monkeypatch):
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"')
    refused(checkpoint, monkeypatch, "tokenizer in .* cannot be read .*: copy tokenizer.json")


def test_a_tokenizer_that_is_a_pointer_is_named(checkpoint, monkeypatch):
    (checkpoint / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(checkpoint, monkeypatch, "tokenizer.json is no tokenizer but a Git LFS pointer .*`git lfs pull`")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"picture": 5}', '{"picture": "none.png"}'])
def test_another_programs_golden_json_is_left_out(checkpoint, text):
    (checkpoint / "golden.json").write_text(text)
    assert not (companions_of(checkpoint) / "golden.json").exists()


def test_another_image_token_is_refused(checkpoint, monkeypatch):
    edit(checkpoint / "config.json", image_token_index=513)
    refused(checkpoint, monkeypatch, r"gives <\|image\|> the id 512; the model's is 513 \(image_token_index in config")
    edit(checkpoint / "config.json", image_token_index=512)
    text = (checkpoint / "tokenizer.json").read_text()
    (checkpoint / "tokenizer.json").write_text(text.replace("<|image|>", "<|picture|>"))
    refused(checkpoint, monkeypatch, r"has no <\|image\|>; the model's is 512 .*: copy tokenizer.json")


# ---- Images ---------------------------------------------------------------------------------------------------------


def images_in(folder: Path) -> dict:
    return json.loads((folder / "processor_config.json").read_text())["image_processor"]


OTHER_SIZE = {**json.loads((DEMO / "processor_config.json").read_text())["image_processor"], "max_image_tiles": 2}


@pytest.mark.parametrize(
    "instead", [None, OTHER_SIZE, {"image_processor_type": "CLIPImageProcessor"}, {**OTHER_SIZE, "size": [1]}]
)
def test_image_processor_is_derived_from_the_config(checkpoint, instead, caplog):
    (checkpoint / "processor_config.json").unlink()
    if instead:
        (checkpoint / "preprocessor_config.json").write_text(json.dumps(instead))
    found = images_in(companions_of(checkpoint))
    assert found == images_in(DEMO)
    assert "its settings are derived from its config, 4 tiles of 112 pixels" in caplog.text


def test_preprocessor_config_of_older_versions_is_read(checkpoint, caplog):
    (checkpoint / "processor_config.json").unlink()
    mean = [0.1, 0.2, 0.3]
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({**images_in(DEMO), "image_mean": mean}))
    assert images_in(companions_of(checkpoint)) == {**images_in(DEMO), "image_mean": mean}
    assert not caplog.records


# ---- Embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [None, 8])
def test_embeddings_that_were_resized_for_new_tokens(pair, tmp_path, multiple):
    """transformers' `resize_token_embeddings` leaves out the 8 rows that its own class then misses."""
    folder = shutil.copytree(pair.checkpoint, tmp_path / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>", "<|yours|>"]})
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="mismatch"):
        MllamaForConditionalGeneration.from_pretrained(folder)
    converted = OVMLlamaForConditionalGeneration(convert_mllama(folder, tmp_path / "ov"), ov_config=F32)
    processor = load_processor(tmp_path / "ov")
    inputs = processor(text="<|image|>what<|mine|> is it<|yours|>", images=[[pair.picture(1, 1)]], return_tensors="pt")
    assert inputs["input_ids"].max() == len(tokenizer) - 1 == 266
    with torch.no_grad():
        expected = model.float().eval()(**inputs).logits
    torch.testing.assert_close(converted(**inputs).logits, expected, atol=1e-3, rtol=0)


def test_embeddings_without_the_images_row_are_refused(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(pair.checkpoint, tmp_path / "tuned")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, name: tensors[name][:-8].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 have another shape, such as .*embed_tokens.weight: \[264, 64\] instead"):
        convert_mllama(folder, tmp_path / "ov")
    assert not (tmp_path / "ov").exists()
