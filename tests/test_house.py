"""The layout: imports go one way, files stay small, what docstrings point to exists, and the engine stands alone."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest

from conftest import HELPERS, ROOT, demo_samples

PACKAGE = ROOT / "ov_mllama"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Who may import whom, in order: each may import those before it. The command line wires everything together.
ORDER = (
    *("shapes", "reference", "settings", "stats", "progress", "images", "likeness", "machine", "photographs"),
    *("costs", "checkpoint", "companions", "files", "graphs", "inference", "kept", "precision", "tracing"),
    *("vision", "cross_attention"),
    *("cache", "convert", "device", "language", "checks", "sessions"),
    *("pieces", "compress", "draft_model", "drafts", "golden", "plan", "prepare"),
    "model",
    *("conversation", "ahead", "quality", "conversations", "http_headers", "owners", "shown", "chat"),
    *("page_input", "pages", "ending", "proxies", "__main__"),
)
# What running a converted model must not need
NOT_FOR_INFERENCE = {"nncf", "gradio", "datasets", "ipywidgets", "convert", "compress", "graphs", "tracing"}
INFERENCE = (
    "shapes",
    "reference",
    "stats",
    "progress",
    "images",
    "settings",
    "machine",
    "costs",
    "companions",
    "files",
    "inference",
    "kept",
    "precision",
    "vision",
    "cross_attention",
    "cache",
    "device",
    "language",
    "checks",
    "sessions",
    "likeness",
    "draft_model",
    "drafts",
    "golden",
    "model",
)


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            if node.module == "ov_mllama":
                names |= {f"ov_mllama.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    """The packages that a file imports from."""
    return {name.split(".")[0] for name in imported(path)}


def siblings(module: str) -> set[str]:
    return {name.split(".")[1] for name in imported(PACKAGE / f"{module}.py") if name.startswith("ov_mllama.")}


def test_imports_go_one_way():
    assert sorted(ORDER) == MODULES, "say where a new module stands"
    for module in MODULES:
        for other in siblings(module):
            assert ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"


def test_the_engine_imports_no_helper():
    for module in MODULES:
        if module != "__main__":
            assert not tops(PACKAGE / f"{module}.py") & {*HELPERS, "benchmarks", "demo_model"}, module


def test_benchmarks_are_imported_by_nothing():
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for path in [*ROOT.glob("*.py"), *PACKAGE.glob("*.py"), *(ROOT / "demo_model").glob("*.py")]:
        assert not tops(path) & {"benchmarks", *tests}, path
    assert "benchmarks" not in (ROOT / "mllama-3.2.ipynb").read_text(encoding="utf-8")


def test_inference_knows_nothing_of_making_irs():
    for module in INFERENCE:
        assert not (tops(PACKAGE / f"{module}.py") | siblings(module)) & NOT_FOR_INFERENCE, module


def test_only_data_preprocessing_imports_datasets():
    files = [*ROOT.glob("*.py"), *PACKAGE.glob("*.py")]
    assert [path.name for path in files if "datasets" in tops(path)] == ["data_preprocessing.py"]


def length(node) -> int:
    """Lines of a definition without its docstrings."""
    inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    docs = [n.body[0] for n in inner if ast.get_docstring(n)]
    return node.end_lineno - node.lineno + 1 - sum(doc.end_lineno - doc.lineno + 1 for doc in docs)


@pytest.mark.parametrize(
    "path", [*sorted(PACKAGE.glob("*.py")), *sorted(ROOT.glob("*.py"))], ids=lambda path: path.name
)
def test_nothing_is_too_long_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert length(node) <= 200, node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node) <= 60, node.name


# ---- What docstrings and comments point to ----


CITING = (ROOT, PACKAGE, ROOT / "benchmarks", ROOT / "tests", ROOT / "demo_model", ROOT / "docs")


@pytest.mark.parametrize("folder", CITING, ids=lambda folder: folder.name)
def test_what_is_pointed_to_exists(folder):
    """Files and names of the package's modules in backticks, and cited headings of documents."""
    known = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    for path in [*folder.glob("*.py"), *folder.glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        for cited in re.findall(r"`([\w/]+\.(?:py|md|ipynb))`", text):
            assert (ROOT / cited).is_file() or ("/" not in cited and cited in known), f"{path.name}: {cited}"
        for package, module, name in re.findall(r"`(?:(\w+)\.)?(\w+)\.(\w+)", text):
            code = ROOT / (package or "ov_mllama") / f"{module}.py"
            if name not in ("py", "md") and code.is_file() and package in ("", "ov_mllama", "benchmarks", "demo_model"):
                definition = rf"\b(?:def|class) {name}\b|^ *{name}\b.* ="
                assert re.search(definition, code.read_text(encoding="utf-8"), re.M), f"{path.name}: {module}.{name}"
            assert package not in ("benchmarks", "demo_model") or code.is_file(), f"{path.name}: {package}.{module}"


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
    cells = nbformat.read(document, as_version=4).cells
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(texts + [output.get("data", {}).get("text/markdown", "") for output in outputs])


def anchors(document: Path) -> set[str]:
    """What links may name of a document: its headings, as GitHub writes them, or Jupyter."""
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
        outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
        shown = [output.data for output in outputs if "data" in output]
        assert not any(kind.startswith("image/") for data in shown for kind in data), "use show_picture"
        for tag in re.findall(r"<img[^>]{,3000}", "".join(data.get("text/html", "") for data in shown)):
            assert re.match(r'<img alt="[^"]{12,}"', tag), tag[:200]


def test_the_documents_code_runs_as_it_stands(tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/engine.md").read_text(encoding="utf-8"), re.S)[0]
    shutil.copytree(ROOT / "demo_model", tmp_path / "demo_model", ignore=shutil.ignore_patterns("__pycache__", ".run"))
    environment = {"PYTHONPATH": str(ROOT), "CI": "true", "PATH": ""}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == demo_samples()[0]["answer"]


# ---- The engine alone ----

ASK = """
import sys
from transformers import AutoProcessor
from ov_mllama.model import OVMLlamaForConditionalGeneration

model_dir, picture = sys.argv[1:]
model = OVMLlamaForConditionalGeneration(model_dir, check_golden=False)
processor = AutoProcessor.from_pretrained(model_dir)
from ov_mllama.images import open_picture
inputs = processor(text="<|image|>What?", images=[open_picture(picture)], return_tensors="pt")
print(model.generate(**inputs, do_sample=False, max_new_tokens=4, eos_token_id=None).tolist())
loaded = {name.split(".")[0] for name in sys.modules} & {"nncf", "gradio", "datasets", "ipywidgets", "IPython"}
assert not loaded, loaded
assert "ov_mllama.convert" not in sys.modules
"""


def ask(pair, tmp_path, folder, *options) -> str:
    """What the engine in `folder` answers, run from another one."""
    picture = tmp_path / "picture.png"
    pair.picture(1, 1).save(picture)
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(  # noqa: S603
        [sys.executable, *options, "-c", ASK, str(pair.model_dir), str(picture)],
        cwd=tmp_path / "elsewhere",
        env={"PYTHONPATH": str(folder), "CI": "true", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_alone_is_enough_for_inference(pair, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "copied" / "ov_mllama", ignore=shutil.ignore_patterns("__pycache__"))
    assert ask(pair, tmp_path, tmp_path / "copied").startswith("[[")


def test_the_installed_package_needs_no_working_directory(pair, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "ov_mllama", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*command, str(tmp_path / "installed"), str(source)], check=True, capture_output=True)  # noqa: S603
    assert ask(pair, tmp_path, tmp_path / "installed").startswith("[[")


def test_the_packages_pins_are_the_projects():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(wanted) <= {line.split("#")[0].strip() for line in lines}


def test_wheel_requires_every_package_that_it_imports(tmp_path):
    """By its metadata, not by what happens to be installed."""
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "ov_mllama", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*command, str(tmp_path), str(source)], check=True, capture_output=True)  # noqa: S603
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "wheel")
    [metadata] = (tmp_path / "wheel").glob("*.dist-info/METADATA")
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata.read_text(encoding="utf-8"), re.M)
    modules = list((tmp_path / "wheel" / "ov_mllama").rglob("*.py"))
    assert len(modules) == len(list(PACKAGE.glob("*.py")))
    used = {name for path in modules for name in tops(path)} - {"ov_mllama", *HELPERS, *sys.stdlib_module_names}
    brought_by = packages_distributions()
    unbrought = {name for name in used if not {*map(canonical, brought_by[name])} & {*map(canonical, required)}}
    assert not unbrought
    assert {"gradio", "platformdirs"} <= used


def canonical(name: str) -> str:
    """The name of a distribution as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
