"""A chat page with many stored conversations: python -m benchmarks.chats [--chats 2000]

Keys of the JSON: characters and file_mb of the conversations, their index included; open_s, the seconds until the page
shows its list, with an empty database and with all, one load after the other; find_ms by query, the least of five in
Python; search_ms, until the page's list has changed. The model is a stand-in: nothing is asked. Needs Debian's chromium
and playwright.
"""

import argparse
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.benchmark import provenance, report
from ov_mllama.chat.layout import make_demo
from ov_mllama.chat.owners import COOKIE
from ov_mllama.chat.search import MAX_LISTED
from ov_mllama.chat.store import Conversation, Conversations
from ov_mllama.chat.turns import ANSWERED, Turn

TOKEN = "a" * 64  # of the browser whose conversations they are
QUERIES = ("", "the", "quantis", "image cache", "no such word")
ROOT = Path(__file__).parents[1]


def fill(store: Conversations, chats: int) -> int:
    """Store conversations of random words, one every five hours, and return the number of their characters."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/costs.md"))
    words, chosen, characters = re.findall(r"\w+", text), random.Random(1), 0  # noqa: S311 - no secret
    for number in range(chats):
        turns = [
            Turn(
                " ".join(chosen.choices(words, k=chosen.randrange(5, 40))),
                answer=" ".join(chosen.choices(words, k=chosen.randrange(40, 500))),
                state=ANSWERED,
                asked=time.time() - 18_000 * number,
            )
            for _ in range(chosen.randrange(1, 8))
        ]
        characters += sum(len(turn.question) + len(turn.answer) for turn in turns)
        store.save(Conversation(f"browser:{TOKEN}", turns=turns))
    return characters


def least_ms(function: Callable, *arguments) -> float:
    """Return the least milliseconds of five calls."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function(*arguments)
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


def open_page(browser: Browser, url: str, rows: int) -> tuple[Page, list[float]]:
    """Open the page three times in a new browser, and return it with the seconds until its list has so many rows."""
    context, seconds = browser.new_context(), []
    context.add_cookies([{"name": COOKIE, "value": TOKEN, "url": url}])
    page = context.new_page()
    for _ in range(3):
        began = time.perf_counter()
        page.goto(url)
        page.get_by_text("Everything stays").wait_for()
        page.wait_for_function(f"document.querySelectorAll('.history label').length == {rows}", polling=10)
        seconds.append(time.perf_counter() - began)
    return page, seconds


def search_ms(page: Page, query: str) -> float:
    """Return the milliseconds from a search's input to the last change of the list."""
    page.evaluate(
        """() => new MutationObserver(() => { window.changed = performance.now(); })
            .observe(document.querySelector(".chats"), { childList: true, subtree: true, characterData: true })"""
    )
    began = page.evaluate("performance.now()")
    page.get_by_placeholder("Search chats").fill(query)
    page.wait_for_timeout(1500)
    return page.evaluate("window.changed") - began


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stats = SimpleNamespace(tokens_per_s=None)
    model = SimpleNamespace(stats=stats, config=SimpleNamespace(about=""), about="none", generation_config=None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        demo, store = make_demo(model, None, [], Path(folder)), Conversations(Path(folder))
        _, url, _ = demo.launch(prevent_thread_lock=True)
        _, empty_s = open_page(browser, url, 0)
        characters = fill(store, options.chats)
        page, open_s = open_page(browser, url, min(options.chats, MAX_LISTED))
        result = {
            **provenance("benchmarks.chats"),
            "characters": characters,
            "file_mb": (Path(folder) / "chat.sqlite3").stat().st_size / 1e6,
            "open_empty_s": empty_s,
            "open_s": open_s,
            "find_ms": {query: least_ms(store.find, f"browser:{TOKEN}", query, MAX_LISTED + 1) for query in QUERIES},
            "search_ms": {query: search_ms(page, query) for query in QUERIES[1:]},
        }
        browser.close()
        demo.close()
    report(result, options.json)


if __name__ == "__main__":
    main()
