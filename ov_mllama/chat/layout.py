"""Components of the chat page, and their events. Handlers are in `pages.py`, conversations in `store.py`, and the
answer queue in `answers.py`.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.chat import documents
from ov_mllama.chat.answers import Chat
from ov_mllama.chat.heat_maps import HeatMaps, connect_panel, lay_out_panel
from ov_mllama.chat.owners import Files, record_queue_owners
from ov_mllama.chat.page_input import report_errors
from ov_mllama.chat.pages import POLL_S, Pages
from ov_mllama.chat.presets import PresetEvents
from ov_mllama.chat.proxies import LOOPBACK, bypass_proxy_for_loopback
from ov_mllama.chat.render import LATEX, detail_choices, escape_markup
from ov_mllama.chat.settings import connect_prompts, ready_prompts, settings_panel
from ov_mllama.chat.sidebar import connect_list, lay_out_list, list_outputs
from ov_mllama.chat.store import Conversations
from ov_mllama.cli import root_path, shutdown_promptly
from ov_mllama.runtime.images import SUFFIXES

PARTS = Path(__file__).parent
WELCOME = """## What would you like to know?

Add pictures or PDFs: drop or paste them anywhere. {}"""
# The conversation's id is in the page's URL, for reload, bookmarks and Back
SET_URL = """(key) => {
    const url = new URL(location);
    if ((url.searchParams.get("chat") ?? "") === key) return;
    if (key) url.searchParams.set("chat", key); else url.searchParams.delete("chat");
    history.pushState(null, "", url);
}"""
CONFIRM = "() => confirm('Delete this chat and its pictures for good?') ? 'yes' : ''"
FLIP = "() => document.querySelector('#flip').dataset.choice"  # page.js
DOWNLOAD = "() => document.querySelector('#exported').click()"

# Defaults of `make_demo(...).launch()`: this machine only, no tunnel, no large uploads, no request to other origins
LAUNCH = {
    "server_name": "127.0.0.1",
    "share": False,
    "max_file_size": "50mb",
    "quiet": True,
    "run_history": False,  # stores questions in the browser, and offers to send them to the hub
    "footer_links": [],
    "css_paths": PARTS / "page.css",
    "js": (PARTS / "page.js").read_text(encoding="utf-8"),
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500",  # for contrast
    ),
}


class ChatPage(gr.Blocks):
    """The page as Gradio blocks, launched with LAUNCH.

    Attributes:
        chat, files: set by `make_demo`.
    """

    chat: Chat
    files: Files

    def app_kwargs(self) -> dict:
        """Return arguments for Gradio's app, also for `gr.mount_gradio_app`: cookies and conversations' images need
        them."""
        # Gradio's own copies expire after an hour, or with another chat that shows the same image
        gr.set_static_paths([self.files.conversations.pictures])
        return self.files.app_kwargs()

    def queue(self, *args, **options):
        super().queue(*args, **options)
        record_queue_owners(self._queue)
        return self

    def launch(self, *args, **options):
        host = options.get("server_name") or os.environ.get("GRADIO_SERVER_NAME") or LAUNCH["server_name"]
        host = host.strip("[]")  # of an IPv6 address
        root = options.get("root_path")
        options = {**LAUNCH, **options, "server_name": f"[{host}]" if ":" in host else host}
        options["root_path"] = root_path(os.environ.get("GRADIO_ROOT_PATH", "") if root is None else root)
        options["app_kwargs"] = {**options.get("app_kwargs", {}), **self.app_kwargs()}
        if host not in LOOPBACK and not options.get("auth"):
            warnings.warn(
                f"Everyone who can reach {host} can use this page: set auth=(name, password), or --auth-file.",
                stacklevel=2,
            )
        bypass_proxy_for_loopback(host)  # Gradio requests its own page when it starts
        return super().launch(*args, **options)

    def block_thread(self):
        shutdown_promptly(self.server)  # on Ctrl-C
        super().block_thread()
        self.chat.flush()
        self.chat.conversations.delete_temporary()


def written(examples: Iterable[dict], folder: Path) -> list[dict]:
    """Write the examples' images into a folder, and return the examples for Gradio."""
    rows = [
        {"text": each["question"], "files": [save_pil_to_cache(each["image"], str(folder), format="png")]}
        for each in examples
    ]
    return [*rows, {"text": "What can you do?"}]


def make_demo(
    ov_model, processor, examples: Iterable[dict] = (), folder: Path | None = None, by_name: bool = True, **options
) -> ChatPage:
    """Return the chat page; `make_demo(model, processor).launch()` serves it.

    `launch(auth=("name", "password"))` requires a login; `launch(server_name="0.0.0.0")` serves other machines, as does
    the environment variable GRADIO_SERVER_NAME.

    Args:
        ov_model: an `OVMLlamaForConditionalGeneration`, or anything with its `generate`, `turn`, `config`,
            `generation_config` and `stats`; images are prefetched if it has `encode_images`.
        processor: its processor, with a chat template.
        examples: suggested questions, {"image": PIL image, "question"}, such as
            `calibration.questions_about(checkpoint)[:3]`.
        folder: of conversations, their images, and uploads, unless GRADIO_TEMP_DIR is set (an earlier page sets it);
            default: the user's data folder.
        by_name: whether conversations belong to the login's name, if there is one; False: to the browser, as with one
            shared key and any name.
        options: `generate` arguments for every question, such as `assistant_model=OVDraftModel(folder)`.
    """
    conversations = Conversations(folder)
    conversations.delete_orphans()
    gr.set_static_paths([conversations.examples])  # or Gradio would copy them
    # Gradio's default for uploads and exports, gradio in the system's temporary folder, is readable by all users
    os.environ.setdefault("GRADIO_TEMP_DIR", str(conversations.uploads))
    uploads = Path(get_upload_folder())
    uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
    rows = written(examples, conversations.examples)
    questions = [(row["text"], [Path(file) for file in row.get("files", ())]) for row in rows]
    with ChatPage(
        title="Llama 3.2 Vision",
        fill_height=True,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(600, 3600),  # seconds between deletions, and of an upload's life; all are deleted at the end
    ) as demo:
        demo.chat = Chat(ov_model, processor, conversations, **options)
        demo.files = Files(conversations, uploads, by_name)
        parts = lay_out(getattr(ov_model.config, "about", ""), rows, detail_choices(ov_model))
        connect(demo, parts, Pages(demo.chat, questions, by_name))
    return demo


def lay_out(about: str, examples: list[dict], details: list[tuple[str, str]]) -> SimpleNamespace:
    """Create the page's components, and return them by name.

    Args:
        about: description of the model for an empty conversation.
        examples: as `written` returns them.
        details: as `detail_choices` returns them.
    """
    part = SimpleNamespace()
    # token of earlier versions, replaced by a cookie
    part.former = gr.BrowserState("", storage_key="ov_mllama", secret="none: it hides a random word")  # noqa: S106
    part.pending, part.version, part.key, part.opened = (gr.Textbox(visible="hidden") for _ in range(4))
    with gr.Sidebar(width=300):
        lay_out_list(part)
        settings_panel(part)
    with gr.Row(scale=0, elem_classes="top"):
        part.name = gr.Textbox(
            label="Name of this chat",
            show_label=False,
            container=False,
            interactive=True,
            elem_classes="name",
            max_length=100,
        )
        part.pin = gr.Button("Pin", size="sm", scale=0, min_width=0, elem_classes="quiet")
        part.export = gr.Button("Export", size="sm", scale=0, min_width=0, elem_classes="quiet")
        part.delete = gr.Button("Delete", size="sm", scale=0, min_width=0, elem_classes="quiet")
        part.exported = gr.DownloadButton(visible="hidden", elem_id="exported")
    part.chatbot = gr.Chatbot(
        scale=1,
        show_label=False,
        elem_classes="chat",
        buttons=["copy"],
        editable="all",
        group_consecutive_messages=False,  # editing a message with an image fails otherwise (gradio#10229)
        autoscroll=False,  # it resets the user's scrolling; page.js scrolls
        latex_delimiters=LATEX,
        placeholder=WELCOME.format(escape_markup(about)),
        examples=examples,
    )
    part.documents = documents.create_parts()
    part.looked = lay_out_panel()
    ready_prompts(part)
    part.box = gr.MultimodalTextbox(
        label="Question",
        show_label=False,
        file_types=[*SUFFIXES, ".pdf"],
        file_count="multiple",
        sources=["upload"],
        placeholder="Ask a question or add pictures",
        autofocus=True,
        interactive=True,
    )
    part.detail = detail_switch(details)
    part.settings += [part.detail, *part.advanced]
    part.foot = gr.Markdown(elem_classes="foot")
    part.timer = gr.Timer(POLL_S)
    part.flip = gr.Button(visible="hidden", elem_id="flip")
    part.hidden = [gr.Textbox(visible=False), gr.Textbox(visible=False)]
    return part


def detail_switch(details: list[tuple[str, str]]) -> gr.Radio:
    """Create the switch between a quick and a full look."""
    return gr.Radio(
        details,
        value="high",
        label="How closely pictures are looked at",
        show_label=False,
        container=False,
        interactive=True,
        elem_classes="detail",
    )


def connect(demo: gr.Blocks, part: SimpleNamespace, pages: Pages) -> None:
    """Connect the components' events to their handlers."""
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    in_browser = {"fn": None, "api_visibility": "private"}
    shown = [part.version, part.timer, part.chatbot, part.box, part.pin, part.key, part.name, part.foot]
    shown += [part.detail, *list_outputs(part)]
    poll = (pages.poll, [part.opened, part.key, part.version], [part.pending])

    def on(events, fn, inputs=None, outputs=None, **options):
        event = gr.on(events, report_errors(pages.find, fn), inputs, outputs, **options, **quick)
        event.then(*poll, **quick)
        return event

    part.timer.tick(*poll, **quick)
    part.pending.change(pages.refresh, [part.version], shown, trigger_mode="always_last", **quick)
    part.key.change(inputs=[part.key], js=SET_URL, **in_browser)
    loaded = demo.load(pages.open, [part.former], [part.opened, part.former, *part.settings], **quick)
    loaded.then(*poll, **quick)
    demo.unload(pages.on_close)

    on(part.box.submit, pages.ask, [part.box, *part.settings], [part.box])
    on(part.box.stop, pages.stop)
    typing = {"fn": pages.on_typing, "inputs": [part.box, part.detail], **quick}
    gr.on([part.box.change, part.detail.input], **typing)
    documents.connect_parts(on, part.documents, part.box, pages, typing)
    connect_prompts(part)
    on(part.chatbot.example_select, pages.example, part.settings)
    on(part.chatbot.retry, pages.retry, part.settings)
    connect_panel(part, HeatMaps(pages), on)
    on(part.chatbot.undo, pages.undo, [part.box], [part.box])
    on(part.chatbot.edit, pages.edit, part.settings)
    on(part.flip.click, pages.flip, part.hidden[:1], js=FLIP)
    on(part.new.click, pages.begin_new)
    connect_list(part, pages, on)
    on([part.name.submit, part.name.blur], pages.rename, [part.name, part.key], [part.name])
    on(part.delete.click, pages.delete, part.hidden[:1], js=CONFIRM)
    exported = part.export.click(report_errors(pages.find, pages.export), None, [part.exported], **quick)
    exported.success(js=DOWNLOAD, **in_browser)
    prompt, *sliders = part.settings[:4]
    # `change` also fires when the page opens
    changes = [prompt.blur, part.detail.input, *(slider.release for slider in sliders)]
    changes += [field.blur for field in part.advanced]
    on(changes, pages.choose, [part.opened, *part.settings])
    presets = PresetEvents(pages)
    loaded.then(presets.list_presets, None, [part.preset], **quick)
    on(part.preset.input, presets.apply_preset, [part.preset, *part.settings], part.settings)
    on(part.save_preset.click, presets.save_preset, [part.preset, *part.settings], [part.preset])
    on(part.delete_preset.click, presets.delete_preset, [part.preset], [part.preset])
    # without those whose component is empty: clients would have to give them
    basic = [setting for setting in part.settings if setting not in part.advanced]
    gr.on([], pages.api_chat, [part.box, *basic], part.hidden, api_name="chat")
