"""Ready prompts, answers in JSON, and settings with their presets."""

import asyncio
import json

import gradio as gr
import pytest

from chat_client import Client
from chat_page import WHO, expect, path_of
from conftest import demo_samples
from ov_mllama.chat.answers import Chat
from ov_mllama.chat.decoding import Decoding, GenerationSettings
from ov_mllama.chat.page_input import checked_settings, restored
from ov_mllama.chat.presets import BUILT_IN, MAX_PRESETS, Presets
from ov_mllama.chat.schemas import schema_of
from ov_mllama.chat.settings import PROMPTS
from ov_mllama.chat.store import Conversations
from ov_mllama.chat.turns import ANSWERED, CUT, FAILED, Turn
from ov_mllama.runtime.errors import InputError
from ov_mllama.runtime.inference import Progress

SAMPLE = demo_samples()[0]
DEFAULTS = GenerationSettings()
FIELDS = "shape, sides: integer, round: yes/no, colours: list"


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("a", {"a": "string"}),
        ("a, b: number\nc :list,", {"a": "string", "b": "number", "c": "array"}),
        ('{"type": "object", "properties": {"x": {"type": "null"}}}', {"x": "null"}),
    ],
)
def test_fields_and_schemas_are_read(text, types):
    schema = schema_of(text)
    assert {name: each["type"] for name, each in schema["properties"].items()} == types
    assert schema["additionalProperties"] is False


def test_no_text_is_no_schema():
    assert schema_of(" \n") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: colour", "'a: colour' is no field"),
        (": text", "is no field"),
        ('{"type": ', "not valid JSON"),
        ("[1]", "is a JSON object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_schema_is_named(text, said):
    with pytest.raises(InputError, match=said):
        schema_of(text)
    with pytest.raises(gr.Error, match=said.replace("'", "&#x27;")):
        checked_settings(DEFAULTS._replace(schema=text))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("top_k", (1, 1000), (0, -1, 1001)),
        ("repetition_penalty", (1, 1.5, 2), (0, 0.99, 2.1, float("nan"), float("inf"))),
        ("seed", (0, 2**32 - 1), (-1, 2**32, 10**400)),
    ],
)
def test_settings_have_bounds(name, good, bad):
    for value in (None, *good):
        assert getattr(checked_settings(DEFAULTS._replace(**{name: value})), name) == value
    for value in (*bad, "many", [1]):
        with pytest.raises(gr.Error):
            checked_settings(DEFAULTS._replace(**{name: value}))


@pytest.mark.parametrize(
    ("saved", "changed"),
    [
        (None, {}),
        (["Brief.", 7, 0.5, 0.8], {"system": "Brief.", "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.8}),
        (["", 512, 0, 0.9, "low"], {"detail": "low"}),
        ({"top_k": 3, "unknown": 1}, {"top_k": 3}),
        ({"top_k": "3; DROP"}, {}),
        ({"schema": "{"}, {}),
    ],
)
def test_settings_of_every_version_are_restored(saved, changed):
    assert restored(saved) == DEFAULTS._replace(**changed)


def test_arguments_by_default_are_those_of_before(model, processor):
    arguments, text = Decoding(model, processor, {"assistant_model": 1}).arguments(DEFAULTS)
    greedy = {"do_sample": False, "temperature": None, "top_p": None}
    assert arguments == {"assistant_model": 1, **greedy, "max_new_tokens": 512, "seed": None}
    assert text.completed(text.extended("a", "b")) == "ab"


def test_settings_reach_the_model(model, processor):
    given = DEFAULTS._replace(temperature=0.5, top_k=3, repetition_penalty=1.2, seed=4, schema="a")
    arguments, _ = Decoding(model, processor, {"assistant_model": 1}).arguments(given)
    expected = {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.2, "seed": 4, "assistant_model": None}
    assert arguments.items() >= expected.items()
    assert len(arguments["logits_processor"]) == 1


def answer(model, processor, question: str, **wishes) -> Turn:
    turn = Turn(question)
    asyncio.run(Chat(model, processor, None).answer([turn], Progress(), GenerationSettings(**wishes)))
    return turn


def test_same_seed_gives_the_same_answer(model, processor):
    texts = [
        answer(model, processor, WHO, temperature=9.0, top_p=1.0, seed=seed, max_new_tokens=24).answer
        for seed in (1, 2, 1, 3, None, None)
    ]
    assert texts[0] == texts[2]
    assert len({*texts}) > 3


def test_answer_matches_a_schema_and_is_a_code_block(model, processor):
    schema = {name: {"enum": values} for name, values in (("shape", ["disc", "box"]), ("sides", [1, 2]))}
    schema["round"] = {"type": "boolean"}
    turn = answer(
        model, processor, WHO, schema=json.dumps({"type": "object", "properties": schema, "required": [*schema]})
    )
    assert turn.state == ANSWERED
    first, *middle, last = turn.answer.split("\n")
    assert (first, last) == ("```json", "```")
    found = json.loads("\n".join(middle))
    assert (found["shape"] in ("disc", "box"), found["sides"] in (1, 2), type(found["round"])) == (True, True, bool)
    cut = answer(model, processor, WHO, schema=FIELDS, max_new_tokens=4)
    assert cut.state == CUT
    assert cut.answer.startswith('```json\n{"sh')


def test_schema_that_cannot_be_matched_is_the_answers_error(model, processor):
    turn = answer(model, processor, WHO, schema='{"type": "no such type"}')
    assert (turn.state, turn.answer) == (FAILED, "")
    assert turn.note.startswith("The schema cannot be matched: ")


def test_presets_are_each_owners(tmp_path):
    presets = Presets(Conversations(tmp_path))
    presets.save("user:me", "Mine", DEFAULTS._replace(temperature=0.3, detail="low"))
    presets.save("user:me", "Mine", DEFAULTS._replace(temperature=0.4, detail="low"))
    assert [*presets.of("user:me")] == [*BUILT_IN, "Mine"]
    assert presets.of("user:me")["Mine"]["temperature"] == 0.4
    assert "detail" not in presets.of("user:me")["Mine"]
    presets.delete("user:other", "Mine")
    assert "Mine" in presets.of("user:me")
    assert "Mine" not in presets.of("user:other")
    presets.delete("user:me", "Mine")
    assert presets.of("user:me") == BUILT_IN


def test_presets_are_applied_saved_and_deleted(demo, url):
    client, now = Client(demo, url).open(), [*DEFAULTS._replace(system="Brief.", detail="low")]
    creative = [*DEFAULTS._replace(system="Brief.", detail="low", temperature=0.8, top_p=0.95)]
    assert client.call("apply_preset", "Creative", *now) == creative
    assert client.call("open", "")[2:] == creative
    invalid = [*DEFAULTS._replace(system="Brief.", detail="low", top_k=0)]
    assert client.call("apply_preset", "Creative", *invalid) == creative  # it replaces top-k, and nothing else is lost
    assert "Mine" in json.dumps(client.call("save_preset", " Mine ", *creative))
    assert "Mine" in json.dumps(client.call("list_presets"))
    assert client.call("apply_preset", "Mine", *DEFAULTS) == [
        *DEFAULTS._replace(system="Brief.", temperature=0.8, top_p=0.95)
    ]
    for name in ("", "Precise", "x" * 41, None, 7, {"a": 1}):
        assert client.call("save_preset", name, *now) is None
    assert client.call("delete_preset", "Creative") is None
    assert "Mine" not in json.dumps(Client(demo, url).open().call("list_presets"))  # somebody else
    assert "Mine" not in json.dumps(client.call("delete_preset", "Mine"))
    for number in range(MAX_PRESETS):
        assert client.call("save_preset", f"P{number}", *now)
    assert client.call("save_preset", "one more", *now) is None
    assert client.call("save_preset", "P0", *now)


def test_ready_prompts_are_offered_with_a_picture_and_presets_fill_the_settings(page, model):
    prompts = [page.tab.get_by_role("button", name=name, exact=True) for name in PROMPTS]
    for prompt in prompts:
        expect(prompt).to_be_hidden()
    page.attach(path_of(SAMPLE))
    for prompt in prompts:
        expect(prompt).to_be_visible()
    prompts[1].click()
    expect(page.box).to_have_value(PROMPTS["Describe"])
    page.box.fill("Briefly:")
    prompts[0].click()
    expect(page.box).to_have_value("Briefly:\n" + PROMPTS["Read the text"])
    expect(page.box).to_be_focused()
    expect(page.tab.locator(".thumbnail-item")).to_have_count(1)
    expect(page.user).to_have_count(0)

    page.settings()
    page.tab.get_by_role("button", name="More").click()
    preset = page.tab.get_by_label("Preset")
    preset.click()
    page.tab.get_by_role("option", name="Creative").click()
    expect(page.tab.get_by_label("number input for Temperature")).to_have_value("0.8")
    schema = page.tab.get_by_label("Answer as JSON")
    schema.fill("shape: colour")
    schema.blur()
    expect(page.tab.locator(".block.foot")).to_contain_text("'shape: colour' is no field")
    schema.fill("shape, sides: integer")
    schema.blur()
    page.box.fill(WHO)
    page.send.click()
    expect(page.bot.first.locator("pre code")).to_contain_text('"shape"')
    page.tab.reload()
    page.settings()
    page.tab.get_by_role("button", name="More").click()
    expect(schema).to_have_value("shape, sides: integer")
