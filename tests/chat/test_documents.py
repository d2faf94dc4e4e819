"""PDFs whose pages are chosen, screenshots that are pasted, and regions of pictures: what is drawn, added and asked."""

import re
import secrets
from pathlib import Path
from urllib.parse import unquote

import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from chat_client import META, Client, png
from chat_page import drop, expect, path_of, wait_until
from conftest import demo_samples
from ov_mllama.chat import documents
from ov_mllama.runtime.images import load_image

SAMPLE = demo_samples()[0]
COLOURS = ["red", "lime", "blue"]


def pdf_of(path: Path, pages: int = 3) -> bytes:
    """A PDF whose pages have different colours, written to `path`."""
    first, *more = [Image.new("RGB", (310, 438), COLOURS[i % 3]) for i in range(pages)]
    first.save(path, save_all=True, append_images=more, resolution=150)
    return path.read_bytes()


def encrypted_pdf() -> bytes:
    return (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
        b"3 0 obj<</Filter/Standard/V 1/R 2/O(" + b"a" * 32 + b")/U(" + b"b" * 32 + b")/P -4>>endobj\n"
        b"trailer<</Root 1 0 R/Encrypt 3 0 R/ID[(a)(b)]>>\n%%EOF"
    )


def are_same(path: Path, image: Image.Image) -> bool:
    shown = Image.open(path)
    return (shown.mode, shown.size) == (image.mode, image.size) and shown.tobytes() == image.tobytes()


def message(*files: str) -> dict:
    return {"text": "", "files": [{"path": file, "meta": META} for file in files]}


@pytest.fixture
def client(demo, url):
    return Client(demo, url).open()


@pytest.fixture
def pdf(tmp_path):
    pdf_of(tmp_path / "a <b> report.pdf")
    return tmp_path / "a <b> report.pdf"


# ---- Pages of a PDF -------------------------------------------------------------------------------------------------


def test_first_page_is_drawn_and_all_are_offered(client, pdf):
    upload = client.upload(pdf.name, pdf.read_bytes())
    (drawn,), pages = client.call("open_pdfs", message(upload, client.upload("a.png", png())))
    assert drawn["orig_name"].endswith("report page 1.png")
    assert are_same(Path(drawn["path"]), load_image(pdf, page=1))
    assert re.findall(r'data-page="(\d+)".*?aria-pressed="(\w+)"', pages) == [
        ("1", "true"),
        ("2", "false"),
        ("3", "false"),
    ]
    assert pages.count("data:image/webp;base64,") == 3
    assert f'data-path="{drawn["path"]}"' in pages
    assert "choose from 3 pages" in pages
    assert "a &lt;b&gt; report" in documents.render_pages(pdf, 3)  # whatever Gradio makes of an upload's name
    nothing = client.call("open_pdfs", message(client.upload("a.png", png())))
    assert nothing[0] in (None, [])
    assert nothing[1]["__type__"] == "update"


def test_chosen_page_is_drawn_once_as_it_would_be_loaded(client, pdf, monkeypatch):
    upload = client.upload(pdf.name, pdf.read_bytes())
    chosen = {"pdf": upload, "page": 3}
    ((drawn,),) = client.call("draw_page", event=chosen)
    assert are_same(Path(drawn["path"]), load_image(pdf, page=3))
    monkeypatch.setattr(documents, "load_image", lambda *_, **__: pytest.fail("drawn again"))
    assert client.call("draw_page", event=chosen) == [[drawn]]


def test_one_page_is_no_choice_and_many_are_bounded(client, tmp_path, monkeypatch):
    one = client.upload("one.pdf", pdf_of(tmp_path / "one.pdf", 1))
    (drawn,), pages = client.call("open_pdfs", message(one))
    assert (drawn["orig_name"], pages) == ("one page 1.png", "")
    monkeypatch.setattr(documents, "MAX_SHOWN", 12)
    pages = client.call("open_pdfs", message(client.upload("many.pdf", pdf_of(tmp_path / "many.pdf", 14))))[1]
    assert pages.count("data-page") == 12
    assert "choose from the first 12 of 14 pages" in pages


@pytest.mark.parametrize("kind", ["broken", "encrypted"])
def test_pdf_that_cannot_be_drawn_is_an_error_below_the_box(client, kind):
    content = b"%PDF-1.7 broken" if kind == "broken" else encrypted_pdf()
    assert client.call("open_pdfs", message(client.upload(f"{kind}.pdf", content))) is None
    advice = "is a broken PDF: save it anew" if kind == "broken" else "is encrypted: save it without a password"
    assert f"{kind}.pdf {advice}" in client.shown()


@pytest.mark.parametrize("page", [0, -1, 4, 10**12, "1", 1.0, True, None, [1]], ids=repr)
def test_page_that_does_not_exist_is_refused(client, pdf, page):
    upload = client.upload(pdf.name, pdf.read_bytes())
    assert client.call("draw_page", event={"pdf": upload, "page": page}) is None
    assert "no such page" in client.shown() or "is none of them" in client.shown()


def test_only_uploaded_pdfs_of_open_pages_are_drawn(demo, url, client, pdf, secret):
    upload = client.upload(pdf.name, pdf.read_bytes())
    link = Path(get_upload_folder()) / f"{secrets.token_hex(4)}.pdf"
    link.symlink_to(pdf)
    others = [str(pdf), str(link), str(secret), f"{upload}\0", None, {"path": str(pdf)}, client.upload("a.png", png())]
    for name in others:
        assert client.call("draw_page", event={"pdf": name, "page": 1}) is None
    for event in (None, "page", [upload, 1], {}):
        assert client.call("draw_page", event=event) is None
        assert "no such page" in client.shown()
    assert client.call("open_pdfs", message(str(pdf))) is None
    stranger = Client(demo, url)  # whose page was never opened
    assert stranger.call("open_pdfs", message(upload)) is None
    assert stranger.call("draw_page", event={"pdf": upload, "page": 1}) is None


def test_pages_are_not_prefetched_before_they_are_chosen(client, slow_demo, pdf, demo):
    slow_demo.as_new()
    upload = client.upload(pdf.name, pdf.read_bytes())
    client.call("on_typing", message(upload), "low")
    assert not slow_demo.looks
    ((drawn,),) = client.call("draw_page", event={"pdf": upload, "page": 2})
    client.call("on_typing", message(drawn["path"]), "low")
    wait_until(lambda: "Picture: known" in client.shown())
    assert len(slow_demo.looks) == 1


# ---- In the browser -------------------------------------------------------------------------------------------------


def test_pages_of_a_dropped_pdf_are_chosen_and_asked_about(page, pdf, says):
    says.text = "Colours."
    page.box.fill("Which")
    drop_file(page, pdf, ".sidebar", "drop")
    added, pages = page.tab.locator(".thumbnail-item img"), page.tab.locator("[data-page]")
    expect(pages).to_have_count(3)
    expect(added).to_have_count(1)
    before = page.tab.viewport_size
    page.tab.set_viewport_size({"width": 390, "height": 780})
    expect(page.send).to_be_in_viewport(ratio=1)
    page.tab.set_viewport_size(before)
    page.tab.get_by_role("button", name="Page 3").focus()
    page.tab.keyboard.press("Enter")
    page.box.press_sequentially(" colours?")
    expect(added).to_have_count(2)
    page.tab.get_by_role("button", name="Page 1").click()  # not this one after all
    expect(added).to_have_count(1)
    expect(pages.nth(0)).to_have_attribute("aria-pressed", "false")
    expect(pages.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(page.tab.locator(".block.foot")).to_contain_text("Picture: known")  # without a word typed
    page.tab.get_by_role("button", name="Page 2").click()
    expect(pages.nth(1)).to_have_attribute("aria-pressed", "true")
    page.tab.get_by_label("Remove file").last.click()
    expect(pages.nth(1)).to_have_attribute("aria-pressed", "false")
    expect(page.box).to_have_value("Which colours?")
    page.send.click()
    page.expect_answers("Colours.", "1 s")
    expect(pages).to_have_count(0)
    (shown,) = page.tab.locator(".message.component img").all()
    assert colour_of(shown) == pytest.approx([0, 0, 255], abs=3)  # a JPEG in the PDF
    assert not [url for url in page.requests if not url.startswith(("data:", page.tab.url.partition("?")[0]))]


def test_files_are_pasted_anywhere_once(page, pdf):
    added = page.tab.locator(".thumbnail-item img")
    accepted = page.tab.locator(".multimodal-textbox input").get_attribute("accept")
    assert accepted.startswith("image/*, .jpg")  # else phones do not offer their camera
    assert ".pdf" in accepted
    for count, target in enumerate(("body", "[role=log]", ".name textarea", ".multimodal-textbox textarea"), 1):
        drop(page, {f"{count}.png": "image/png"}, target, "paste")
        expect(added).to_have_count(count)
    drop_file(page, pdf, ".multimodal-textbox textarea", "paste")
    drop(page, {"6.png": "image/png"}, "body")  # at once
    expect(page.tab.locator("[data-page]")).to_have_count(3)
    expect(added).to_have_count(6)


def test_region_of_a_picture_is_added_in_its_own_pixels(page, says):
    says.text = "Small print."
    page.attach(path_of(SAMPLE))
    added, dialog = page.tab.locator(".thumbnail-item img"), page.tab.locator("dialog.picture")
    shown = added.bounding_box()
    page.tab.mouse.click(shown["x"] + shown["width"] / 2, shown["y"] + shown["height"] / 2)
    expect(dialog).to_be_visible()
    page.tab.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(added).to_have_count(1)
    added.focus()
    page.tab.keyboard.press("Enter")
    picture, region = page.tab.locator("dialog.picture img"), page.tab.locator("dialog.picture .region")
    width, height = SAMPLE["image"].size
    page.tab.get_by_role("button", name="Ask about a region").click()
    shown = picture.bounding_box()
    assert shown["width"] / shown["height"] == pytest.approx(width / height, rel=0.01)
    page.tab.mouse.move(shown["x"] + 0.2 * shown["width"], shown["y"] + 0.9 * shown["height"])
    page.tab.mouse.down()
    page.tab.mouse.move(shown["x"] + 0.7 * shown["width"], shown["y"] + 0.4 * shown["height"])
    page.tab.mouse.up()
    region.focus()
    for key in ("ArrowLeft", "ArrowDown", "Shift+ArrowRight", "Shift+ArrowUp"):
        page.tab.keyboard.press(key)
    numbers = [float(x) / 100 for x in re.findall(r"[\d.]+(?=%)", region.get_attribute("style"))]
    left, top, across, down = numbers
    assert numbers == pytest.approx([0.18, 0.42, 0.52, 0.48], abs=0.01)
    page.tab.get_by_role("button", name="Use region").click()
    expect(page.tab.locator(".thumbnail-item img")).to_have_count(2)
    page.tab.get_by_label("Remove file").first.click()
    page.ask("What is this?")
    page.expect_answers("Small print.", "1 s")
    corners = [left * width, top * height, (left + across) * width, (top + down) * height]
    expected = SAMPLE["image"].convert("RGB").crop([round(each) for each in corners])
    shown = page.tab.locator(".message.component img")
    path = Path(unquote(shown.get_attribute("src")).partition("file=")[2])
    assert are_same(path, expected)


def drop_file(page, file: Path, target: str, event: str) -> None:
    """Drops, or pastes, a file on a part of the page."""
    page.tab.evaluate(
        """([bytes, name, target, kind]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "application/pdf" }));
            const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
            const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
            document.querySelector(target).dispatchEvent(event);
        }""",
        [list(file.read_bytes()), file.name, target, event],
    )


def colour_of(picture) -> list[int]:
    """The colour in the middle of a picture of the page."""
    return picture.evaluate(
        """async (picture) => {
            await picture.decode();
            const brush = new OffscreenCanvas(1, 1).getContext("2d");
            brush.drawImage(picture, -picture.naturalWidth / 2, -picture.naturalHeight / 2);
            return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
        }"""
    )
