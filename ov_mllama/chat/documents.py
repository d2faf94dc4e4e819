"""PDFs in the text box: their pages as images to choose from. A chosen page is an upload like any other image."""

import asyncio
import base64
import hashlib
import html
import io
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from ov_mllama.chat.page_input import images_of, uploaded, user_error
from ov_mllama.chat.tabs import Tabs
from ov_mllama.runtime.errors import ImageError
from ov_mllama.runtime.images import load_image
from ov_mllama.runtime.pdf_pages import pdf_pages

MAX_SHOWN = 100  # pages to choose from
PAGES_AT_ONCE = 10  # drawn, before PDFium is free for another PDF
THUMBNAIL_PIXELS = 40_000

# The box's PDFs, and which pages are in the box
IN_BOX = """(box) => {
    const paths = (box?.files ?? []).map(({ path }) => path);
    for (const page of document.querySelectorAll("[data-page]")) page.ariaPressed = paths.includes(page.dataset.path);
    return JSON.stringify(paths.filter((path) => path.toLowerCase().endsWith(".pdf")));
}"""
# Pages in place of their PDFs; the text may have changed while they were drawn
INSERT = """(drawn, box) => {
    const pages = (drawn ?? []).map((page) => ({ ...page, mime_type: "image/png" }));
    const isNew = ({ path }) => !box.files.some((file) => file.path === path);
    const others = box.files.filter(({ path }) => !path.toLowerCase().endsWith(".pdf"));
    if (others.length === box.files.length) return box;  // the question was sent meanwhile
    return { ...box, files: [...others, ...pages.filter(isNew)] };
}"""
# A page that is in the box already leaves it
TOGGLE = """(drawn, box) => {
    const pages = (drawn ?? []).map((page) => ({ ...page, mime_type: "image/png" }));
    const isIn = (files) => ({ path }) => files.some((file) => file.path === path);
    const others = box.files.filter((file) => !isIn(pages)(file));
    return { ...box, files: [...others, ...pages.filter((page) => !isIn(box.files)(page))] };
}"""
CLICKED = """element.addEventListener("click", ({ target }) => {
    const page = target.closest("[data-page]");
    if (page) trigger("click", { pdf: page.dataset.pdf, page: Number(page.dataset.page) });
    else if (target.closest("[data-close]")) props.value = "";
});"""


def create_parts() -> SimpleNamespace:
    """Create the pages to choose from and two hidden components: the box's PDFs, and the pages drawn last."""
    return SimpleNamespace(
        pdfs=gr.Textbox(visible="hidden"),
        drawn=gr.File(file_count="multiple", visible="hidden", interactive=False),
        pages=gr.HTML(js_on_load=CLICKED, elem_classes="pages", apply_default_css=False),
    )


def connect_parts(on: Callable, part: SimpleNamespace, box: gr.MultimodalTextbox, tabs: Tabs, typing: dict) -> None:
    """Connect the components of `create_parts` and the text box.

    Args:
        on: as in `layout.connect`.
        typing: arguments of the box's `change` event, which Gradio does not trigger for its files alone.
    """
    documents = Documents(tabs)
    in_browser = {"fn": None, "api_visibility": "private", "trigger_mode": "multiple"}  # no click is dropped
    mark = {"inputs": [box], "outputs": [part.pdfs], "js": IN_BOX, **in_browser}
    gr.on([box.change, part.pages.change], **mark)
    opened = on(part.pdfs.change, documents.open_pdfs, [box], [part.drawn, part.pages], trigger_mode="multiple")
    chosen = on(part.pages.click, documents.draw_page, None, [part.drawn], trigger_mode="multiple")
    for event, js in ((opened, INSERT), (chosen, TOGGLE)):
        changed = event.success(inputs=[part.drawn, box], outputs=[box], js=js, **in_browser)
        changed.then(**mark).then(**typing, trigger_mode="always_last")
    box.submit(outputs=[part.pages], js="() => ''", **in_browser)


class Documents:
    """Event handlers for the PDFs in a text box.

    Args:
        tabs: the open tabs; others are refused.
    """

    def __init__(self, tabs: Tabs):
        self.tabs = tabs

    async def open_pdfs(self, message: dict, request: gr.Request) -> list:
        """Draw the first page of each PDF in the text box, and all pages small, to choose from."""
        self.tabs.page(request)
        pdfs = pdfs_of(images_of(message))
        if not pdfs:
            return [[], gr.skip()]
        first = [str(await in_thread(draw, pdf, 1)) for pdf in pdfs]
        limit = max(1, MAX_SHOWN // len(pdfs))
        return [first, "".join([await in_thread(render_pages, pdf, limit) for pdf in pdfs])]

    async def draw_page(self, chosen: gr.EventData, request: gr.Request) -> list[str]:
        """Draw a page that was chosen among the thumbnails."""
        self.tabs.page(request)
        try:
            pdf, number = uploaded(chosen.pdf), chosen.page
        except (AttributeError, TypeError) as error:  # the event is not one of the page's
            raise user_error("There is no such page.") from error
        if not pdfs_of([pdf]) or type(number) is not int:
            raise user_error("There is no such page.")
        return [str(await in_thread(draw, pdf, number))]


def pdfs_of(files: Sequence[Path]) -> list[Path]:
    """Return the PDFs among uploads, by their names."""
    return [file for file in files if file.suffix.lower() == ".pdf"]


async def in_thread(function: Callable, *arguments):
    """Call a function that draws pages in a thread.

    Raises:
        gr.Error: for a broken or encrypted PDF, a page that it has not, and if there is too little memory or disk.
    """
    try:
        return await asyncio.to_thread(function, *arguments)
    except ImageError as error:
        raise user_error(error) from error
    except OSError as error:
        raise user_error(f"The page could not be read or stored ({error.strerror}): try again.") from error
    except MemoryError as error:
        raise user_error("There is too little memory to draw the page: close other programs.") from error


def page_file(pdf: Path, number: int) -> Path:
    """Return the path of a page's image, the same one for the same upload."""
    key = hashlib.sha256(f"{pdf.parent.name}/{pdf.name}/{number}".encode(errors="replace")).hexdigest()
    name = re.sub(r"[^\w -]", "", pdf.stem).strip()[:60] or "document"
    return Path(get_upload_folder()).resolve() / key / f"{name} page {number}.png"


def draw(pdf: Path, number: int) -> Path:
    """Draw a page as it is asked about, unless that was done before, and return its file."""
    file = page_file(pdf, number)
    if not file.is_file():
        image = load_image(pdf, page=number)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        part = file.with_name(f"{secrets.token_hex(8)}.part")
        try:
            image.save(part, "PNG", compress_level=1)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    return file


def render_pages(pdf: Path, limit: int) -> str:
    """Return a PDF's thumbnails as HTML: a button for each page, of which the first one is chosen; "" for one page.

    Args:
        limit: pages at most.
    """
    name, total, thumbnails = html.escape(pdf.name), limit, list[str]()
    while len(thumbnails) < min(total, limit):
        count = min(PAGES_AT_ONCE, limit - len(thumbnails))
        images, total = pdf_pages(pdf, pdf.name, len(thumbnails) + 1, count, THUMBNAIL_PIXELS)
        thumbnails += [data_uri(image) for image in images]
    if total == 1:
        return ""
    title = f"{name}: choose from {f'the first {limit} of ' * (total > limit)}{total} pages"
    buttons = [
        f'<button type="button" data-pdf="{html.escape(str(pdf))}" data-page="{number}" aria-label="Page {number}" '
        f'data-path="{html.escape(str(page_file(pdf, number)))}" aria-pressed="{str(number == 1).lower()}">'
        f'<img alt="" src="{uri}"><span>{number}</span></button>'
        for number, uri in enumerate(thumbnails, 1)
    ]
    return (
        f'<section aria-label="Pages of {name}"><header><span>{title}</span>'
        f'<button type="button" data-close aria-label="Close the pages">✕</button></header>'
        f"<div>{''.join(buttons)}</div></section>"
    )


def data_uri(image: Image.Image) -> str:
    """Return a thumbnail as a data URI."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=60)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
