"""The layout: imports go one way, files stay small, what docstrings point to exists, and the engine stands alone."""

import ast
import graphlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from conftest import HELPERS, ROOT, demo_samples
from programs import run_alone

PACKAGE = ROOT / "ov_mllama"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [PACKAGE / room for room in ("runtime", "export/sources", "export", "chat", "serving")]

# Floors of the package, and what may be imported on each of them: the floor's own modules and these
FLOORS = {
    "runtime": {"runtime"},
    "sources": {"runtime", "sources"},
    "export": {"runtime", "sources", "export"},
    "chat": {"runtime", "chat", "cli"},
    "serving": {"runtime", "export", "chat", "serving", "cli"},
    "cli": {"runtime"},
    "__main__": {"runtime", "export", "chat", "serving", "cli"},
    "__init__": {"deprecated"},
    "deprecated": set(),
}
# What running a converted model must not need
NOT_FOR_INFERENCE = {"nncf", "gradio", "datasets", "ipywidgets", "platformdirs", "starlette", "fastapi", "ray"}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = ".".join(path.relative_to(ROOT).parts[: -node.level])
            names |= {f"{package}.{node.module}"} if node.module else {f"{package}.{a.name}" for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = node.module.count(".") < 2 and node.module.startswith("ov_mllama")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if modules else {node.module}
    return names


def tops(path: Path) -> set[str]:
    """Top-level packages that a file imports from."""
    return {name.split(".")[0] for name in imported(path)}


def floor_of(path: Path) -> str:
    return path.stem if path.parent == PACKAGE else path.parent.name


def floor_of_import(name: str) -> str:
    """The floor of a dotted name of the package."""
    _, room, *rest = name.split(".")
    return "sources" if rest[:1] == ["sources"] else room


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path):
    floors = {floor_of_import(name) for name in imported(path) if name.startswith("ov_mllama.")}
    assert floors <= FLOORS[floor_of(path)]
    assert not tops(path) & {*HELPERS, "benchmarks", "demo_model"}
    assert floor_of(path) != "runtime" or not tops(path) & NOT_FOR_INFERENCE


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_imports_within_a_room_have_no_circle(room):
    sorter = graphlib.TopologicalSorter()
    for path in room.glob("*.py"):
        own = ".".join(room.relative_to(ROOT).parts) + "."
        siblings = {name.removeprefix(own).split(".")[0] for name in imported(path) if name.startswith(own)}
        sorter.add(path.stem, *siblings)
    sorter.prepare()  # raises CycleError


def test_no_room_holds_a_third_of_the_lines():
    """Of the package, the root modules, the demo model and the benchmarks; tests are not counted."""
    others = [*ROOT.glob("*.py"), *(ROOT / "demo_model").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    lines = Counter()
    for path in [*FILES, *others]:
        room = floor_of(path) if path in FILES else path.parent.name
        lines[room] += path.read_text(encoding="utf-8").count("\n")
    assert max(lines.values()) <= 0.3 * lines.total(), lines


def test_benchmarks_are_imported_by_nothing():
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    for path in [*ROOT.glob("*.py"), *FILES, *(ROOT / "demo_model").glob("*.py")]:
        assert not tops(path) & {"benchmarks", *tests}, path
    assert "benchmarks" not in (ROOT / "mllama-3.2.ipynb").read_text(encoding="utf-8")


def test_only_calibration_imports_datasets():
    files = [*ROOT.glob("*.py"), *FILES]
    assert [path.name for path in files if "datasets" in tops(path)] == ["calibration.py"]


def length(node) -> int:
    """Lines of a definition without its docstrings."""
    inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    docs = [n.body[0] for n in inner if ast.get_docstring(n)]
    return node.end_lineno - node.lineno + 1 - sum(doc.end_lineno - doc.lineno + 1 for doc in docs)


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert length(node) <= 200, node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node) <= 60, node.name


# ---- What docstrings and comments point to ----


TESTS = [ROOT / "tests", *(ROOT / "tests" / room for room in ("runtime", "export", "chat", "serving"))]
CITING = (ROOT, PACKAGE, *ROOMS, ROOT / "benchmarks", *TESTS, ROOT / "demo_model", ROOT / "docs")


@pytest.mark.parametrize("folder", CITING, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_what_is_pointed_to_exists(folder):
    """Files and names of the package's modules in backticks, and cited headings of documents."""
    known = {path.name for each in CITING for path in each.iterdir()}
    for path in [*folder.glob("*.py"), *folder.glob("*.md")]:
        if path.name == "CHANGELOG.md":  # it tells of files that are gone
            continue
        text = path.read_text(encoding="utf-8")
        for cited in re.findall(r"`([\w/]+\.(?:py|md|ipynb))`", text):
            assert (ROOT / cited).is_file() or ("/" not in cited and cited in known), f"{path.name}: {cited}"
        for cited in re.findall(r"`((?:\w+\.)+\w+)", text):
            *packages, module, name = cited.split(".")
            package = packages[0] if packages else "ov_mllama"
            files = [*(ROOT / package).glob(f"**/{module}.py")]
            if name not in ("py", "md") and files:
                definition = rf"\b(?:def|class) {name}\b|^ *{name}\b.* ="
                text_of = "\n".join(file.read_text(encoding="utf-8") for file in files)
                assert re.search(definition, text_of, re.M), f"{path.name}: {module}.{name}"
            assert package not in ("benchmarks", "demo_model") or files, f"{path.name}: {package}.{module}"


DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "demo_model")
    for path in folder.glob("*.md")
)
NOTEBOOK = "mllama-3.2.ipynb"


def written(document: Path) -> str:
    """The Markdown of a document; of a notebook its text cells and what its outputs show as Markdown."""
    if document.suffix != ".ipynb":
        return document.read_text(encoding="utf-8")
    cells = json.loads(document.read_text(encoding="utf-8"))["cells"]
    texts = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    texts += [data["text/markdown"] for data in shown_by(document) if "text/markdown" in data]
    return "\n".join(map("".join, texts))


def shown_by(notebook: Path) -> list[dict]:
    """Return the outputs of a notebook's cells, by type."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]


def anchors(document: Path) -> set[str]:
    """Anchors that links may name: a document's headings, as GitHub writes them, or Jupyter."""
    headings = re.findall(r"^#+ (.*)$", written(document), re.M)
    if document.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, NOTEBOOK])
def test_links_lead_somewhere(document):
    path = ROOT / document
    for link in re.findall(r"\]\(([^)\s]+)\)", written(path)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        leads_to = path.parent / target if target else path
        assert leads_to.exists(), link
        assert not anchor or leads_to.suffix not in (".md", ".ipynb") or anchor in anchors(leads_to), link


@pytest.mark.parametrize("document", [*DOCUMENTS, NOTEBOOK])
def test_pictures_have_words_for_those_who_cannot_see_them(document):
    path = ROOT / document
    for words, source in re.findall(r"!\[(.*?)\]\((.*?)\)", written(path), re.S):
        assert len(words.split()) >= 3, source
    if path.suffix == ".ipynb":
        shown = shown_by(path)
        assert not any(kind.startswith("image/") for data in shown for kind in data), "use show_picture"
        for tag in re.findall(r"<img[^>]{,3000}", "".join("".join(data.get("text/html", "")) for data in shown)):
            assert re.match(r'<img alt="[^"]{12,}"', tag), tag[:200]


def test_the_documents_code_runs_as_it_stands(bare_nursery, tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.S)[0]
    shutil.copytree(ROOT / "demo_model", tmp_path / "demo_model", ignore=shutil.ignore_patterns("__pycache__", ".run"))
    printed = run_alone(bare_nursery, tmp_path, tmp_path, ROOT, code)
    assert printed.splitlines()[-1] == demo_samples()[0]["answer"]


REFUSING = """
import socket, openvino
def refuse(*args, **kwargs): raise AssertionError("side effect")
socket.socket.connect = socket.getaddrinfo = openvino.Core.__init__ = refuse
"""


# What only the environments of developers have cannot be imported, nor what transformers has imported of it
WITHOUT_DEV_PACKAGES = """
import sys
packages = ["torchvision", "llama_models", "tiktoken", "peft", "bitsandbytes", "compressed_tensors", "auto_round"]
packages += ["accelerate", "hypothesis", "playwright", "ollama", "pytest"]
for name in [*packages, *sys.modules]:
    if name.split(".")[0] in packages:
        sys.modules[name] = None
    elif name.startswith("transformers.models.mllama."):
        del sys.modules[name]
"""


def test_importing_does_nothing(bare_nursery, tmp_path):
    """No network, no OpenVINO core, no output; and it needs no package of the tests."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.parent != PACKAGE]
    code = f"{REFUSING}{WITHOUT_DEV_PACKAGES}import {', '.join([*HELPERS, *modules])}"
    assert run_alone(bare_nursery, tmp_path, ROOT, ROOT, code) == ""


# ---- The engine alone ----

ASK = """
import sys
from transformers import AutoProcessor
from {package}.model import OVMLlamaForConditionalGeneration

model_dir, picture = sys.argv[1:]
model = OVMLlamaForConditionalGeneration(model_dir, check_golden=False)
processor = AutoProcessor.from_pretrained(model_dir)
from {package}.images import load_image
inputs = processor(text="<|image|>What?", images=[load_image(picture)], return_tensors="pt")
print(model.generate(**inputs, do_sample=False, max_new_tokens=4, eos_token_id=None).tolist())
loaded = {{name.split(".")[0] for name in sys.modules}} & {{"nncf", "gradio", "datasets", "ipywidgets", "IPython"}}
assert not loaded, loaded
assert "ov_mllama.export" not in sys.modules
"""


def ask(nursery, pair, tmp_path, folder, package) -> str:
    """The answer of a package in `folder`, run from another one."""
    picture = tmp_path / "picture.png"
    pair.picture(1, 1).save(picture)
    (tmp_path / "elsewhere").mkdir()
    code = ASK.format(package=package)
    return run_alone(nursery, tmp_path, tmp_path / "elsewhere", folder, code, pair.model_dir, picture).splitlines()[-1]


def test_runtime_copied_alone_answers_a_question(bare_nursery, pair, tmp_path):
    """Under any name: its own imports are relative."""
    shutil.copytree(PACKAGE / "runtime", tmp_path / "copied" / "mllama", ignore=shutil.ignore_patterns("__pycache__"))
    assert ask(bare_nursery, pair, tmp_path, tmp_path / "copied", "mllama").startswith("[[")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, folder / "source" / "ov_mllama", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"  # as pip does it
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, capture_output=True)  # noqa: S603
    [file] = folder.glob("*.whl")
    with zipfile.ZipFile(file) as files:
        files.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    files = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file() and ".dist-info" not in str(path)}
    assert files == {path.relative_to(ROOT) for path in [*FILES, *PACKAGE.rglob("page.*")]}


def test_installed_wheel_answers_a_question(bare_nursery, wheel, pair, tmp_path):
    assert ask(bare_nursery, pair, tmp_path, wheel, "ov_mllama.runtime").startswith("[[")


HIDING = """
import sys
hidden = set(sys.argv[1].split(","))
assert not hidden & sys.modules.keys()
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ImportError(f"{name} is hidden")
sys.meta_path.insert(0, Hide())
sys.argv[:2] = ["ov-mllama"]
from ov_mllama.__main__ import main
main()
"""


def test_installed_wheel_plans_without_the_extras_packages(bare_nursery, wheel, tmp_path):
    """As in an environment where `pip install .` was all: what only the extras bring cannot be imported."""
    extras = "gradio,starlette,fastapi,uvicorn,ray,openai,llguidance,pypdfium2,IPython,ipywidgets"
    extras += ",matplotlib,pandas"
    shutil.copytree(ROOT / "demo_model", tmp_path / "demo_model", ignore=shutil.ignore_patterns("__pycache__", ".run"))
    command = HIDING, extras, "plan", "demo_model"
    printed = run_alone(bare_nursery, tmp_path, tmp_path, wheel, *command, HOME=str(tmp_path))
    assert "GB" in printed or "MB" in printed


def test_installed_wheel_captions_without_the_extras_packages(bare_nursery, wheel, demo_dir, tmp_path):
    extras = "gradio,starlette,fastapi,uvicorn,ray,openai,llguidance,IPython,ipywidgets,matplotlib,pandas"
    arguments = (ROOT / "demo_model" / "samples", "--limit", "1", "--model-dir", demo_dir, "--out", "captions.jsonl")
    run_alone(bare_nursery, tmp_path, tmp_path, wheel, HIDING, extras, "caption", *arguments, HOME=str(tmp_path))
    [row] = (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["answer"]


def requirements(file: str) -> set[str]:
    """Pins of a requirements file, without those of the files that it includes."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {pin for line in lines if (pin := line.split("#")[0].strip()) and not pin.startswith("-r")}


def test_requirements_files_have_the_pins_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        name: {pin for pin in pins if "ov-mllama" not in pin} for name, pins in project["optional-dependencies"].items()
    }
    notebook = {*extras["chat"], *extras["pdf"], *extras["notebook"]}
    assert requirements("requirements.txt") == {*project["dependencies"], *notebook}
    assert requirements("requirements-scale.txt") == extras["serve"]
    assert requirements("requirements-dev.txt") == extras["dev"]


NEEDS = {
    "runtime": ["pdf"],  # imported once there is a PDF
    "sources": [],
    "export": [],
    "cli": [],
    "__main__": [],
    "__init__": [],
    "deprecated": [],
    "chat": ["chat"],
    "serving": ["serve", "chat"],
}


@pytest.fixture(scope="module")
def brought_by():
    """Names of the distributions that bring each package; finding them takes half a second."""
    return packages_distributions()


@pytest.mark.parametrize("floor", FLOORS)
def test_each_floor_imports_what_its_extra_installs(floor, brought_by):
    """By the metadata, not by what happens to be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = [*project["dependencies"], *(pin for name in NEEDS[floor] for pin in project["optional-dependencies"][name])]
    installed = {canonical(re.match(r"[\w.-]+", pin)[0]) for pin in pins}
    used = {name for path in FILES if floor_of(path) == floor for name in tops(path)}
    used -= {"ov_mllama", *sys.stdlib_module_names}
    assert not {name for name in used if not {*map(canonical, brought_by[name])} & installed}


def canonical(name: str) -> str:
    """The name of a distribution as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
