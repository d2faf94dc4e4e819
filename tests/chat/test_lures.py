"""Text that would have a browser fetch something, and text that is shown as it was typed."""

import http.server
import re
import secrets
import threading
import zipfile

import pytest

from chat_page import expect, wait_until


@pytest.fixture
def elsewhere():
    """Another server: its address, and the paths that it was asked for."""
    asked_for = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked_for.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked_for
    server.shutdown()


def lures(address: str) -> str:
    """Text that would have a browser fetch something from an address."""
    return "\n\n".join(
        line.replace("@", address)
        for line in (
            "![a](@/1?q=secret)",
            "![b][r] ![r]\n\n[r]: @/2",
            "<img src=@/3>",
            "<video poster='@/4' src=@/5></video><audio src=@/6></audio>",
            "<div style=\"background:url('@/7')\">x</div>",
            "<link rel=stylesheet href=@/8><style>@import '@/9'</style>",
            "<svg><image href='@/10'/></svg><input type=image src=@/11>",
            "<object data=@/12></object><embed src=@/13><iframe src=@/14></iframe>",
            "`code` \\`<img src=@/15>\\` ``<img src=@/16>`",
            "$<img src=@/17>$ $$<img src=@/18>$$ \\(![x](@/19)\\) $\\includegraphics{@/20}$",
            "```mermaid\nflowchart TD\n  A@{ img: '@/21', label: 'x' }\n```",
            "<picture><source srcset=@/22><img src=@/23 srcset='@/24 2x'></picture>",
            "[![c](@/25)](@/26) <table background=@/27><tr><td background=@/28>",
            "<details open><summary><img src=@/29></summary></details> <meta http-equiv=refresh content='0;url=@/30'>",
            "<!-- ![x](@/31) --> ![multi\nline](@/32) ![](<@/33>)",
        )
    )


def test_no_text_makes_the_browser_fetch_anything(page, says, elsewhere, monkeypatch):
    address, asked_for = elsewhere
    says.text = f"{lures(address)}\n\nThe end"
    page.ask(lures(address))
    page.expect_answers("The end", "1 s")
    name = page.tab.get_by_label("Name of this chat")
    name.fill(f"![t]({address}/title) <img src={address}/title>")
    name.press("Tab")
    expect(page.history.first).to_contain_text("title")

    async def fails(*_, **__):
        raise ValueError(lures(address))
        yield

    monkeypatch.setattr("ov_mllama.chat.answers.stream_words", fails)
    page.ask("And a note?")
    expect(page.bot.last).to_contain_text("No answer: ")
    page.tab.reload()
    expect(page.bot.last).to_contain_text("No answer: ")
    page.tab.wait_for_timeout(1000)
    assert asked_for == []
    assert not [request for request in page.requests if request.startswith(address)], "only the policy stopped it"
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="Export").click()
    with zipfile.ZipFile(download.value.path()) as exported:
        text = exported.read("chat.md").decode()
    assert not re.search(r"(?<!\\)!\[[^\]]*\]\(<?http|(?<!\\)!\[[^\]]*\]\[|(?<!\\)<[a-z!]+(?<!<sub)[ >]", text)
    assert text.startswith("# \\!\\[t\\]")


@pytest.mark.returning
def test_policy_stops_what_the_text_rules_miss(page, says, elsewhere, monkeypatch):
    address, asked_for = elsewhere
    monkeypatch.setattr("ov_mllama.chat.render.block_loading", lambda text: text)
    says.text = f"{lures(address)}\n\n{secrets.token_hex(4)} The end"
    page.ask("What?")
    page.expect_answers("The end", "1 s")
    page.tab.wait_for_timeout(1000)
    assert asked_for == []


@pytest.mark.returning
def test_links_open_only_when_clicked_and_know_nothing_of_the_page(page, says, elsewhere):
    address, asked_for = elsewhere
    says.text = f"[a]({address}/a) and {address}/b"
    page.ask("Links?")
    page.expect_answers("and", "1 s")
    links = page.bot.first.locator("a")
    expect(links).to_have_count(2)
    for i in range(2):
        assert links.nth(i).get_attribute("target") == "_blank"
        assert {"noopener", "noreferrer"} <= set(links.nth(i).get_attribute("rel").split())
    assert asked_for == []
    with page.context.expect_page():
        links.first.click()
    wait_until(lambda: "/a" in asked_for)


TYPED = "1. a *b* <i>c</i>\n# d\n\n    e `f` $x^2$ \\(y\\) [g](h) ![i](j) & &amp; a_b_c https://k.org m@n.de %%%"


@pytest.mark.returning
def test_question_is_shown_as_typed_and_edited_and_copied_so(page, says):
    says.text = "As <b>asked</b> ![x](y)"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.ask(TYPED)
    page.expect_answers("asked", "1 s")
    assert page.user.locator("p").inner_text() == TYPED
    expect(page.user.locator("a, em, i, code, li, h1, img, .katex")).to_have_count(0)
    page.press("Edit", "-right")
    expect(page.tab.locator(".edit-textarea")).to_have_value(TYPED)
    page.tab.locator(".edit-textarea").fill(f"{TYPED} *again*")
    page.tab.get_by_label("Submit").first.click()
    expect(page.user.locator("p")).to_contain_text("*again*")
    page.expect_answers("asked", "1 s")
    copy = page.tab.locator("[aria-label='Copy message']:visible")
    copy.first.click()
    page.tab.wait_for_timeout(200)
    assert page.tab.evaluate("navigator.clipboard.readText()") == f"{TYPED} *again*"
    copy.last.click()
    page.tab.wait_for_timeout(200)
    assert page.tab.evaluate("navigator.clipboard.readText()") == says.text


@pytest.mark.returning
def test_code_and_formulas_with_markup_look_as_before(page, says):
    says.text = "`<b>a</b>` and `![x](y)` and $a<b$\n\n```html\n<img src=x>\n```\n"
    page.ask("Code?")
    page.expect_answers("and", "1 s")
    visible = [text.replace("\u2060", "") for text in page.bot.first.locator("code").all_inner_texts()]
    assert [text.strip() for text in visible] == ["<b>a</b>", "![x](y)", "<img src=x>"]
    expect(page.bot.first.locator(".katex annotation")).to_have_text(["a<b"])
    expect(page.bot.first.locator(".katex-error")).to_have_count(0)
    assert page.console == []
