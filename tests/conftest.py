"""Shared fixtures: tiny random checkpoints beside their conversions, and the inputs that both sides get.

What takes seconds to import is imported in fixtures: the process that starts pytest-xdist's workers needs none of it.
"""

import functools
import gc
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp()  # conversations of the chat are no user's
os.environ["LOCALAPPDATA"] = tempfile.mkdtemp()  # nor is the cache of measured speeds
os.environ["CI"] = "true"  # OpenVINO then reports nothing to Google Analytics, and does not wait for it

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo_model"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# modules beside the package, that people copy or import
HELPERS = (
    "data_preprocessing",
    "gradio_helper",
    "notebook_figures",
    "notebook_utils",
    "ov_mllama_compression",
    "ov_mllama_helper",
)
F32 = {"EXECUTION_MODE_HINT": "ACCURACY"}  # f32 throughout, KV cache included

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# what Mllama checkpoints differ in: attention heads, tiles, rotary embedding, picture size, padding tiles
CHECKPOINTS = {
    "gqa-llama3": dict(heads=8, kv_heads=2, tiles=4, rope=LLAMA3_ROPE, zero_padding=True),
    "mha-two-tiles": dict(heads=4, kv_heads=4, tiles=2, rope=None, seed=1),
    "mqa-large-image": dict(heads=4, kv_heads=1, tiles=4, rope=None, image_size=49, cross_layers=(2, 4), seed=2),
    "gqa-two-tiles": dict(
        heads=8, kv_heads=4, tiles=2, rope=LLAMA3_ROPE, image_size=42, cross_layers=(3,), seed=3, zero_padding=True
    ),
}


class Pair:
    """One checkpoint in transformers (f32) and, converted, in OpenVINO (f32), with its processor."""

    def __init__(self, name: str, folder: Path):
        import torch
        from transformers import AutoProcessor, MllamaForConditionalGeneration

        from ov_mllama_helper import OVMLlamaForConditionalGeneration, convert_mllama
        from tiny_mllama import make_checkpoint

        self.checkpoint = make_checkpoint(folder / name, **CHECKPOINTS[name])
        self.model_dir = convert_mllama(self.checkpoint, folder / f"{name}-ov")
        self.processor = AutoProcessor.from_pretrained(self.model_dir)
        self.hf = MllamaForConditionalGeneration.from_pretrained(self.checkpoint, dtype=torch.float32).eval()
        self.ov = OVMLlamaForConditionalGeneration(self.model_dir, ov_config=F32)
        self.tile = CHECKPOINTS[name].get("image_size", 28)

    def picture(self, tiles_wide: float, tiles_high: float, seed: int = 0) -> Image.Image:
        """Seeded noise, sized in tiles."""
        size = round(tiles_high * self.tile), round(tiles_wide * self.tile), 3
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))

    def inputs(self, case: str):
        """The processor's output for a named case; `CASES` lists them."""
        small, wide, tall = self.picture(1, 1, 1), self.picture(2, 1, 2), self.picture(0.9, 2, 3)
        large = self.picture(2, 2, 4)
        text, images = {
            "one tile": ("<|image|>what is it", [small]),
            "wide": ("<|image|>what is it", [wide]),
            "tall": ("<|image|>what is it", [tall]),
            "large": ("<|image|>what is it", [large]),
            "two images": ("<|image|>one <|image|>two, and?", [wide, small]),
            "images side by side": ("<|image|><|image|>both", [[small, tall]]),
            "text before image": ("first some words, <|image|>then a picture", [small]),
            "text only": ("no picture here", None),
            "padded text only": (["short", "a rather longer prompt"], None),
            "mixed batch": (
                ["<|image|>a", "<|image|>several words <|image|>and more", "x<|image|>"],
                [[small], [wide, large], [tall]],
            ),
            "chat": (self.chat(), [wide, small]),
        }[case]
        return self.processor(
            text=text, images=images, padding=isinstance(text, list), return_tensors="pt", add_special_tokens=False
        )

    def chat(self) -> str:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        ]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)


def chat_of(processor, messages: list[dict]) -> str:
    """The chat template's text, ready for an answer."""
    return processor.apply_chat_template(messages, add_generation_prompt=True)


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the pair's converted model, for tests that change it."""
    return shutil.copytree(pair.model_dir, tmp_path / "copy")


TRIED, WRONG = Counter(), {}


def pytest_configure():
    """Gives each of several xdist workers a core of its own: two with two threads each are slower than one. Stops the
    garbage collector, which would take a quarter of the time until all tests are imported."""
    gc.disable()
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and os.environ["PYTEST_XDIST_WORKER_COUNT"] != "1" and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_finish():
    """Has the garbage collector never look through what all tests have imported."""
    gc.freeze()
    gc.enable()


# Files that take a worker 5 s or more, the slowest first: begun late, one would let the other worker wait at the end
SLOW = (
    "scale notebook compression faults history checkpoints reference house waiting proxies plan source_lora parity "
    "ending meta draft_model copied reuse convert page preview newest pieces chat image_addresses demo_model "
    "page_errors lures chunks source_gptq ollama clients source_gguf owners ahead quality properties published "
    "gguf_settings gguf_faults finetunes deprecated images precision device padding loading"
)
SLOW = [f"test_{name}.py" for name in SLOW.split()]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Order of files for `--dist loadfile --no-loadscope-reorder`: slow ones, then those of most tests."""
    count = Counter(item.path for item in items)
    items.sort(
        key=lambda item: (SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW), -count[item.path])
    )


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="the long form of the tests marked torture")


@pytest.fixture(scope="session")
def times(request):
    """`times(short, long)`: how often to try, or what, without and with --torture."""
    return lambda short, long: long if request.config.getoption("--torture") else short


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    """A CPU's speed in place of a measurement, where plans are made: 100 G products, 20 GB a second."""
    measure = sys.modules.get("ov_mllama.runtime.measure")
    if not measure:
        return None
    products = {measure.name_of(*product): 1e11 if product[2] > 1 else 2e10 for product in measure.PRODUCTS}
    here = measure.Speed(2, 2e10, products)
    if "ov_mllama.export.machine" in sys.modules:
        monkeypatch.setattr("ov_mllama.export.machine.speed_here", lambda: here)
    return here


@pytest.fixture
def tally():
    """`tally(kind, tried, wrong)`: counts what was tried, for the line at the end, and fails if any went wrong."""

    def count(kind: str, tried: int, wrong: list = ()):
        TRIED[kind] += tried
        WRONG.setdefault(kind, []).extend(wrong)
        assert not wrong, f"{len(wrong)} of {tried} {kind} went wrong: {wrong[:5]}"

    return count


def pytest_terminal_summary(terminalreporter):
    for kind, tried in TRIED.items():
        terminalreporter.write_line(f"{tried} {kind}: {len(WRONG[kind]) or 'none'} went wrong")


CASES = [
    "one tile",
    "wide",
    "tall",
    "large",
    "two images",
    "images side by side",
    "text before image",
    "text only",
    "padded text only",
    "mixed batch",
    "chat",
]


def demo_samples() -> list[dict]:
    """The demo checkpoint's sample pictures as {"image", "question", "answer", "task"}."""
    lines = (DEMO / "samples" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    return [{**sample, "image": Image.open(DEMO / "samples" / sample["file_name"])} for sample in samples]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def pairs(tiny_folder):
    """`pairs(name)`: one of `CHECKPOINTS`, made once per worker; pytest itself forgets one parameter for the next."""
    return functools.cache(lambda name: Pair(name, tiny_folder))


@pytest.fixture(scope="session", params=tuple(CHECKPOINTS))
def any_pair(request, pairs):
    return request.getfixturevalue("pair") if request.param == "gqa-llama3" else pairs(request.param)


@pytest.fixture(scope="session")
def pair(tiny_folder):
    """The checkpoint most like the real ones, for what does not depend on the architecture."""
    from ov_mllama.export.checkpoint import checkpoint_fingerprint

    made = Pair("gqa-llama3", tiny_folder)
    before = checkpoint_fingerprint(made.checkpoint)
    yield made
    assert checkpoint_fingerprint(made.checkpoint) == before, "a test has changed the checkpoint that all share"


@pytest.fixture(scope="session")
def idle_models():
    """Models of `pair` that are as new."""
    return []


@pytest.fixture
def fresh_model(pair, idle_models):
    """A model of `pair` that has seen nothing yet. One serves many tests: it is loaded anew after a test that has set
    something on it, or broken it."""
    from ov_mllama_helper import OVMLlamaForConditionalGeneration

    model = idle_models.pop() if idle_models else OVMLlamaForConditionalGeneration(pair.model_dir, ov_config=F32)
    before = attributes(model)
    yield model
    if attributes(model) == before:
        model.forget()
        model.stats = type(model.stats)()
        idle_models.append(model)


def attributes(model) -> list[dict]:
    """Return what a model and its parts hold, but for what each call sets."""
    parts = model, model.sessions, model.language_model, model.image_encoder, model.image_encoder.cache
    each_call = ("stats", "_watched")
    return [{name: value for name, value in vars(part).items() if name not in each_call} for part in parts]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this run, the same one in all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def demo_dir(shared_folder):
    """The demo checkpoint, converted once per run. Nothing may be written into it: a test that breaks, compresses or
    adds files takes a copy, or converts for itself."""
    from ov_mllama_helper import convert_mllama

    folder = shared_folder / "demo-ov"
    with FileLock(shared_folder / "demo-ov.lock"):
        if not (shared_folder / "demo-ov.done").exists():
            convert_mllama(DEMO, folder)
            (shared_folder / "demo-ov.done").touch()
    files = files_in(folder)
    yield folder
    assert files_in(folder) == files, "a test wrote into the demo model that all tests share"


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of every file below a folder, without locks."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.name != ".lock"}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats.items())}


@pytest.fixture(scope="session")
def demo_model_f32(demo_dir):
    """The demo model in f32, loaded once per worker. A test that counts what is computed, or that must not find what
    another test has cached, calls `forget()` first; a test that changes the model's attributes takes `monkeypatch`."""
    from ov_mllama_helper import OVMLlamaForConditionalGeneration

    return OVMLlamaForConditionalGeneration(demo_dir, ov_config=F32)


@pytest.fixture(scope="session")
def processor():
    """The demo checkpoint's."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(DEMO)


@pytest.fixture(scope="module")  # while it is there, asyncio.run cannot be called
def browser():
    """Debian's chromium, without a window where that is installed: it takes four fifths of the time."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Debian's chromium: apt-get install chromium-headless-shell")
    flags = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--in-process-gpu", "--process-per-site"]  # tabs of one profile share compiled scripts
    # else each profile loads two pages for an address bar that nobody sees
    flags += ["--disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", *flags])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def profile(browser):
    """A browser's profile: what it has loaded of the page it need not load again."""
    return browser.new_context(viewport={"width": 1100, "height": 900})


@pytest.fixture(scope="module")
def idle_tabs():
    """Tabs of `profile` that no test uses."""
    return []


@pytest.fixture
def page(request, profile, url, model, idle_tabs):
    """A tab with the chat of a test file's `url`, answered by its `model`, of somebody who was never here; for a test
    marked `returning`, of somebody who may have chats already: a new one is shown without a load of the page."""
    from chat_page import Tab  # it imports from here

    page, new = idle_tabs.pop() if idle_tabs else None, not request.node.get_closest_marker("returning")
    if page and page.shown and new:
        page.leave(url)
    if page is None:
        profile.clear_cookies()
        page = Tab(profile, url)
    elif page.shown:
        page.new_chat()
    else:
        page.load(url)
    yield page
    errors = [*page.errors]
    for tab in profile.pages:
        if tab is not page.tab:
            tab.close()
    if not page.tab.is_closed():
        if new:
            page.leave(url)
        page.forget()
        idle_tabs.append(page)
    assert not errors


@pytest.fixture
def says(monkeypatch):
    """An answer of the test's own words, in place of the model's."""
    from chat_page import Says  # it imports from here

    says = Says()
    monkeypatch.setattr("ov_mllama.chat.answers.stream_words", says.words)
    yield says
    says.over = True


@pytest.fixture(scope="session")
def one_slow_demo(demo_dir):
    """`slow_demo`, loaded once per worker."""
    from chat_page import Slow

    return Slow(demo_dir, ov_config=F32)


@pytest.fixture(scope="module")
def slow_demo(one_slow_demo):
    """The demo model in f32, which can be made as slow as the 11B; as new at the start of each file, and where a test
    calls `as_new()`."""
    one_slow_demo.as_new()
    return one_slow_demo


@pytest.fixture(scope="module")
def scheduler(slow_demo, processor):
    """The scheduler behind `server`."""
    from ov_mllama.serving.scheduler import Scheduler

    return Scheduler(slow_demo, processor, max_batch=4, max_queue=6)


@pytest.fixture(scope="module")
def server(scheduler):
    """The address of the OpenAI-compatible server, answered by `slow_demo`."""
    from openai_client import KEY, served
    from ov_mllama.serving.app import create_app

    with served(create_app(scheduler, "demo", KEY, max_bytes=2_000_000)) as url:
        yield url


@pytest.fixture
def client(server, slow_demo):
    """OpenAI's, of `server`, whose model is as new."""
    from openai_client import openai_client

    slow_demo.as_new()
    return openai_client(server)


# ---- TESTS-B: programs ----------------------------------------------------------------------------------------------


@functools.cache
def the_nursery():
    from programs import Nursery

    return Nursery()


def pytest_sessionstart():
    """Start the nursery beside the only worker: it imports for seconds on the other core while tests are collected."""
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT") == "1":
        the_nursery()


@pytest.fixture(scope="session")
def nursery():
    """The process that programs of tests are forked from."""
    yield the_nursery()
    the_nursery().close()


@pytest.fixture(scope="session")
def bare_nursery():
    """The process that programs are forked from which must not find the package imported, nor what it needs not."""
    from programs import FOUNDATIONS, Nursery

    nursery = Nursery(FOUNDATIONS, ())
    yield nursery
    nursery.close()


@pytest.fixture
def start(nursery, tmp_path):
    """`start(code, *arguments, **environment)`: a program, killed at the end of the test."""
    programs = []

    def start(code: str, *arguments, **environment):
        programs.append(nursery.start(tmp_path, code, *arguments, **environment))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


# ---- TESTS-B: a page of the chat, and programs that send it something -----------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the conversations of a file's page."""
    return tmp_path_factory.mktemp("conversations")


@pytest.fixture(scope="module")
def make(slow_demo, processor, folder):
    """`make()`: a page of `slow_demo`, with two examples."""
    from data_preprocessing import questions_about
    from gradio_helper import make_demo

    examples = questions_about(DEMO)[:2]
    return lambda: make_demo(slow_demo, processor, examples, folder)


@pytest.fixture(scope="module")
def demo(make):
    return make()


@pytest.fixture(scope="module")
def url(demo):
    """The address of `demo`."""
    from chat_client import launched

    with launched(demo) as url:
        yield url


@pytest.fixture
def model(slow_demo):
    """The model behind the page, as new."""
    slow_demo.as_new()
    return slow_demo


@pytest.fixture
def secret(tmp_path):
    """A picture of the user's that nobody has uploaded."""
    from chat_client import SECRET

    SECRET.save(tmp_path / "secret.png")
    return tmp_path / "secret.png"
