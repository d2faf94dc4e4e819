"""The notebook as people get it: run from top to bottom on the demo checkpoint, and on one that is nothing like it as a
machine of 16 GB would run the 11B; and read as it is committed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import notebook_utils
from benchmarks.make_checkpoint import VOCABULARY, make_checkpoint
from conftest import ROOT, demo_samples
from ov_mllama.export.samples import photographs
from ov_mllama.runtime.ir import LANGUAGE_MODEL_NAME
from tiny_mllama import make_llama

NOTEBOOK = ROOT / "mllama-3.2.ipynb"


def read(path):
    import nbformat  # takes a second or two

    return nbformat.read(path, as_version=4)


def code_cell(code: str, *tags: str):
    import nbformat

    return nbformat.v4.new_code_cell(code, metadata={"tags": [*tags]} if tags else {})


@pytest.fixture(scope="module")
def committed():
    return read(NOTEBOOK)


def apart(folder):
    """A folder with all that the notebook needs and nothing that it has made; the notebook itself."""
    for path in [*ROOT.glob("*.py"), ROOT / "ov_mllama", ROOT / "demo_model", ROOT / "docs"]:
        (folder / path.name).symlink_to(path)
    return read(NOTEBOOK)


def solutions(notebook) -> list[str]:
    """The code of the exercises' solutions."""
    (exercises,) = (cell.source for cell in notebook.cells if cell.source.startswith("## Exercises"))
    return re.findall(r"```python\n(.*?)```", exercises, re.S)


def with_solutions(notebook):
    """The notebook, and behind its last cell the solutions of its exercises."""
    notebook.cells += [code_cell(code, "solution") for code in solutions(notebook)]
    return notebook


def insert_behind(notebook, text: str, code: str) -> None:
    """Add a cell behind the first one that holds a text."""
    index = notebook.cells.index(cell_with(notebook, text))
    notebook.cells.insert(index + 1, code_cell(code))


THREE = "variants = {name: variants[name] for name in [*variants][::3]}"  # of seven that are asked 20 questions


AS_WITH_16_GB = """import dataclasses

plan = dataclasses.replace(plan, write_16_bit=False, compare_with_pytorch=False)"""


def for_the_demo(folder, times):
    """The notebook and the solutions. The list of prices is made with --torture; tests/export/test_demo_model.py has
    what is measured in it."""
    notebook = with_solutions(apart(folder))
    insert_behind(notebook, '"INT4 AWQ + scales"', THREE)
    if times(True, False):  # a process that loads the model again; tests/serving/test_captions.py has captions
        notebook.cells.remove(cell_with(notebook, '"caption",'))
    return notebook


def for_a_small_machine(folder, times):
    """The notebook on a random checkpoint with the 11B's vocabulary and tiles; one line in it plans as for a model that
    hardly fits. What does not depend on the model, and the solutions, are there with --torture only."""
    notebook = apart(folder)
    make_checkpoint(folder / "random", "small")
    make_llama(VOCABULARY).half().save_pretrained(folder / "guessing")
    shutil.copy(folder / "random/tokenizer.json", folder / "guessing")
    shutil.copy(folder / "random/tokenizer_config.json", folder / "guessing")
    for cell in [cell_with(notebook, text) for text in times(TOYS, ())]:
        cell.source = imports(cell.source)
    if times(False, True):
        with_solutions(notebook)
    insert_behind(notebook, "plan_here(", AS_WITH_16_GB)
    insert_behind(notebook, "photographs()", f"compared = compared[:{times(1, 3)}]")
    insert_behind(notebook, "questions_about(", f"samples = samples[:{times(2, 100)}]")
    settings = {"MODEL_ID": "random", "CALIBRATION_DATA": "photographs", "MAX_NEW_TOKENS": 20, "QUESTIONS": 200}
    settings["DRAFT_MODEL"] = "guessing"
    if times(True, False):
        insert_behind(notebook, "import price_list", IN_THIS_PROCESS)
    insert_behind(notebook, "MODEL_ID = ", "\n".join(f"{name} = {value!r}" for name, value in settings.items()))
    return notebook


# a process for each variant, as `price_list` has it, imports for seconds; tests/export/test_quality.py has that
IN_THIS_PROCESS = """from ov_mllama.export import quality

quality.run_in_process = lambda function, *arguments, on_progress, **_: function(*arguments, on_progress)"""

# texts of cells that show something on a graph of a few nodes
TOYS = ("class Attention(", "convert_model(attention", "MakeStateful(", "request.infer(", "class Block(", "kinds =")


def imports(source: str) -> str:
    """The import statements of a cell."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, nodes))


ANOTHER = """import os
os.chdir({folder!r})
for name in set(globals()) - get_ipython().user_ns_hidden.keys():
    if not name.startswith("_"):
        del globals()[name]
import gc
gc.collect()"""


@pytest.fixture(scope="module")
def both(tmp_path_factory, times):
    """The notebook on the demo and as on a small machine, each in a folder of its own with nothing defined, run one
    after the other in one kernel by the function that `make notebook` calls. Returns the folders and what was
    executed."""
    first, second = tmp_path_factory.mktemp("notebook"), tmp_path_factory.mktemp("small")
    import nbformat

    notebook = for_the_demo(first, times)
    begin = len(notebook.cells)
    notebook.cells.append(code_cell(ANOTHER.format(folder=str(second))))
    notebook.cells += for_a_small_machine(second, times).cells
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbformat.write(notebook, first / NOTEBOOK.name)
    path = notebook_utils.execute(first / NOTEBOOK.name, first / "build", QUESTIONS=times(0, 20))
    done = [read(path), read(path)]
    for number, part in enumerate((slice(0, begin + 1), slice(begin + 2, None))):  # one cell more, of parameters
        done[number].cells = done[number].cells[part]
    return (first, done[0]), (second, done[1])


@pytest.fixture(scope="module")
def executed(both):
    """The notebook on the demo."""
    return both[0][1]


@pytest.fixture(scope="module")
def on_a_small_machine(both):
    """The folder, and the notebook as on a small machine."""
    return both[1]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def cell_with(notebook, text: str):
    return next(cell for cell in code_cells(notebook) if text in cell.source)


# ---- Executed -------------------------------------------------------------------------------------------------------


def test_streamed_answer_is_the_right_one(executed):
    question, answer, *timing = printed(cell_with(executed, "streamer =")).splitlines()
    assert (question, answer) == ("Question: What is unusual on this image?", demo_samples()[0]["answer"])
    assert re.fullmatch(r"Visual encoder time [\d.]+ ms", timing[0])
    assert re.fullmatch(r"First token latency [\d.]+ ms, Second token latency [\d.]+ ms", timing[1])


@pytest.mark.torture
def test_all_samples_are_answered_right(executed):
    count = len(demo_samples())
    assert printed(cell_with(executed, "show_answers(")).strip() == f"{count} of {count} answers are right"


def test_openvino_is_the_same_model(executed):
    cells = (cell_with(executed, f'show_difference("{name}"') for name in ("float32", "default"))
    exact, default = (printed(cell).strip() for cell in cells)
    pattern = r"{}: logits up to ([\d.]+) differ by at most ([\d.e+-]+), same answer: True"
    largest, difference = map(float, re.fullmatch(pattern.format("float32"), exact).groups())
    assert difference < 1e-3 < largest
    assert re.fullmatch(pattern.format("default"), default)


def test_the_cache_grows_and_is_reset(executed):
    *steps, reset = printed(cell_with(executed, "query_state()")).splitlines()
    lengths = [re.findall(r"\[1, (\d), 4\]", line) for line in [*steps, reset]]
    assert lengths == [["1", "1"], ["2", "2"], ["3", "3"], ["0", "0"]]
    expected = printed(cell_with(executed, "class Attention(")).removeprefix("PyTorch: ").strip()
    assert all(line.endswith(expected) for line in steps)


def test_four_bit_weights_move_the_logits_most(executed):
    lines = printed(cell_with(executed, '"smaller language model", small')).splitlines()
    in_16_bit, vision, language = (float(re.search(r"at most ([\d.e+-]+),", line)[1]) for line in lines)
    assert language > max(in_16_bit, vision)


def test_every_solution_says_what_it_found(executed, on_a_small_machine, times):
    for notebook in times([executed], [executed, on_a_small_machine[1]]):
        solved = [printed(cell) for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
        larger, words, sizes, drafts, calibrated, balance = solved
        assert re.search(r"int8_cross_attn.*\{.*'u8'", larger, re.S)
        was, now = (line.split(": ", 1)[1].split() for line in words.splitlines())
        assert was != now
        tiles = re.findall(r"(high|low): \d+ × \d+, (\d) tiles?,", sizes)
        assert [name for name, _ in tiles] == ["high", "low"]
        assert tiles[1][1] == "1"
        accepted = {name: int(right) for name, right in re.findall(r"(\w+): (\d+) of \d+ accepted", drafts)}
        assert accepted.keys() == {"first", "again"}
        assert "openvino_vision_encoder_int8.xml" in calibrated
        here, without_vnni = map(float, re.findall(r"equal at ([\d.]+) tokens", balance))
        assert 0 < without_vnni < 1
        assert here > 0


def test_the_arithmetic_is_the_plans(executed):
    """The cell's own lower bounds, and beside them what the functions of costs.py add to them."""
    lines = printed(cell_with(executed, "token_seconds(eleven")).splitlines()
    token, planned, image, image_planned = (float(line.split()[-2]) for line in lines)
    assert 0.9 * token < planned < 20 * token  # where decompression takes longer than reading
    assert 0.9 * image < image_planned < 3 * image


def test_predicted_stands_beside_measured(executed, on_a_small_machine):
    for notebook in (executed, on_a_small_machine[1]):
        cell = cell_with(notebook, "measured_seconds(")
        (table,) = (output.data["text/html"] for output in cell.outputs if "data" in output)
        rows = [f"{count}-tile picture" for count in (1, 2, 4)] + ["prompt, 128 tokens", "token"]
        assert re.findall(r"<th>(\w[^<]*)</th>", table)[-5:] == rows
        assert table.count(" ms</td>") == 15
        assert re.fullmatch(r"A step of the language model runs \d+ operations, [\d.]+ µs each\.\n", printed(cell))


def test_follow_up_and_text_only(executed):
    lines = printed(cell_with(executed, "Without a picture")).splitlines()
    assert lines[1].removeprefix("assistant: ") == demo_samples()[2]["answer"]
    assert re.fullmatch(r"assistant: There (is one shape|are \w+ shapes)\.", lines[3])
    assert lines[-1] == "Without a picture: I describe shapes, count them and read digits."


def test_any_model_is_asked_about_photographs_and_judged_by_nobody(on_a_small_machine):
    _, notebook = on_a_small_machine
    first = photographs()[0]
    assert printed(cell_with(notebook, "questions_about(")).strip() == first["question"]
    question, answer, *_ = printed(cell_with(notebook, "streamer =")).splitlines()
    assert (question, len(answer.split(" word"))) == (f"Question: {first['question']}", 21)
    assert printed(cell_with(notebook, "show_answers(")) == ""
    assert not re.search(r"\bshapes?\b", "".join(map(printed, code_cells(notebook))))
    for cell in code_cells(notebook):
        assert not any(output.get("name") == "stderr" for output in cell.outputs), cell


def test_where_memory_is_short_nothing_large_is_written_or_loaded(on_a_small_machine):
    folder, notebook = on_a_small_machine
    assert not (folder / "models/random" / LANGUAGE_MODEL_NAME).exists()
    assert "too little memory for it here" in printed(cell_with(notebook, "dtype=torch.float32"))
    assert not printed(cell_with(notebook, 'show_difference("default"'))


@pytest.mark.torture
def test_variants_of_any_model_are_priced_by_divergence(on_a_small_machine):
    _, notebook = on_a_small_machine
    table = cell_with(notebook, "show_price_list(price_list(").outputs[0].data["text/plain"]
    rows = {re.split(r"\s{2,}", line)[0]: line.split()[-3:] for line in table.splitlines()[2:]}
    assert list(rows) == ["PyTorch 16 bit", "both as chosen"]
    assert rows["PyTorch 16 bit"] == ["0.0000", "0.0000", "100.0"]
    assert 0.001 < float(rows["both as chosen"][0]) < 0.5


def test_a_draft_model_given_by_name_guesses(on_a_small_machine):
    folder, notebook = on_a_small_machine
    assert (folder / "models/random/draft/openvino_draft_model.xml").is_file()
    assert "compress the draft model" in cell_with(notebook, "show_plan(").outputs[1].data["text/markdown"]
    assert re.search(r"\d+ of \d+ drafts accepted", printed(cell_with(notebook, "OVDraftModel(")))


def test_html_holds_the_answers(executed, tmp_path):
    """`execute` leaves a copy for browsers beside the .ipynb, and gives parameters to the notebook."""
    import nbformat

    cells = [code_cell("WORD = 'no'", "parameters"), code_cell("print(WORD * 3)", "answer")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "small.ipynb")
    path = notebook_utils.execute(tmp_path / "small.ipynb", tmp_path / "out", WORD="yes")
    assert "yesyesyes" in path.with_suffix(".html").read_text(encoding="utf-8")


# ---- As committed ---------------------------------------------------------------------------------------------------


def test_committed_outputs_are_of_one_run_without_warnings(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            assert not re.search(r"warning|/home/|/root/|/tmp/|site-packages", str(output.get("text", "")), re.I)
    assert "widgets" not in committed.metadata


def test_committed_answers_are_right(committed):
    test_all_samples_are_answered_right(committed)
    test_streamed_answer_is_the_right_one(committed)


def test_no_output_is_longer_than_a_screen(committed):
    for cell in code_cells(committed):
        assert printed(cell).count("\n") <= 40, cell.source


def test_widgets_have_pictures(committed):
    for cell in code_cells(committed):
        for output in cell.outputs:
            if re.match(r"(VBox|Dropdown)\(", output.get("data", {}).get("text/plain", "")):
                assert output.data["text/markdown"] == cell.metadata.picture


def test_six_exercises_have_solutions(committed):
    assert len(solutions(committed)) == 6


def test_notebook_has_at_most_90_cells(committed):
    assert len(committed.cells) <= 90


def test_cells_are_short_and_valid(committed):
    for cell in code_cells(committed):
        assert len(cell.source.splitlines()) <= 20
        ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!"))))


def test_settings_have_the_types_of_their_defaults(committed):
    source = cell_with(committed, "MODEL_ID = ").source
    given = {"MODEL_ID": "12", "MAX_NEW_TOKENS": "7", "COMPARE_WITH_PYTORCH": "False"}
    right = {"MODEL_ID": "12", "MAX_NEW_TOKENS": 7, "COMPARE_WITH_PYTORCH": False}
    assert notebook_utils.settings(source, given) == notebook_utils.settings(source, right) == right
    for name, value, sentence in [
        ("MODEL", "demo_model", "none of the notebook's settings: MODEL_ID, "),
        ("MAX_NEW_TOKENS", "many", "must be like 100"),
        ("COMPARE_WITH_PYTORCH", "0", "must be like True"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            notebook_utils.settings(source, {name: value})


def made(folder: Path, target: str, *words: str) -> list[str]:
    """The arguments of the program that a target of make runs."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    old = [argument for name in (".venv/.run", ".venv/.scale") for argument in ("-o", name)]
    make = ["make", "--no-print-directory", "-s", *old, target, f"BIN={folder}", *words]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    done = subprocess.run(make, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)  # noqa: S603
    return json.loads(done.stdout)


def test_make_passes_any_character(tmp_path, monkeypatch):
    question, folder, out = '-What\'s "this" `id`; & (é) \\ *? $5, $(HOME), $$ #1?', "-my pictures' $x", "my -o.csv"
    given = made(tmp_path, "caption", f"QUESTION={question}", f"PICTURES={folder}", f"OUT={out}", "MODEL_ID=ollama:x'y")
    checkpoint = ["--checkpoint", "ollama:x'y"]
    assert given[2:] == ["caption", *checkpoint, f"--question={question}", f"--out={out}", "--", folder]
    monkeypatch.setenv("QUESTION", question)  # as with QUESTION=... make caption
    assert f"--question={question}" in made(tmp_path, "caption", f"PICTURES={folder}")
    assert made(tmp_path, "chat", "DRAFT=it's")[2:] == ["chat", "--draft", "it's"]
    assert made(tmp_path, "serve", "OLLAMA=1", "KEY_FILE=a b")[2:] == ["serve", "--ollama", "--key-file", "a b"]


def test_make_notebook_passes_every_setting(committed, tmp_path):
    source = cell_with(committed, "MODEL_ID = ").source
    defaults = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    given = defaults | {"CALIBRATION_DATA": "some pictures", "DRAFT_MODEL": "a draft"}
    words = [f"{name}={value}" for name, value in given.items()]
    assert made(tmp_path, "notebook", *words)[-len(words) :] == words


def test_table_of_contents_leads_somewhere(committed):
    headings = {
        line.lstrip("# ").replace(" ", "-")
        for cell in committed.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("##")
    }
    links = set(re.findall(r"\]\(#([^\n]*)\)$", committed.cells[0].source, re.M))
    assert links == headings
