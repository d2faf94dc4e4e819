"""The chat: a page in the browser on top of an `OVMLlamaForConditionalGeneration`.

Components and the events that connect them. Handlers are in `pages.py`, conversations in `store.py`, and `answers.py`
answers.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.chat.answers import Chat
from ov_mllama.chat.owners import Files, record_queue_owners
from ov_mllama.chat.page_input import showing_refusal
from ov_mllama.chat.pages import POLL_S, Pages
from ov_mllama.chat.proxies import LOOPBACK, bypass_proxy_for_loopback
from ov_mllama.chat.shown import LATEX, as_typed
from ov_mllama.chat.store import Conversations
from ov_mllama.cli import shutdown_promptly
from ov_mllama.runtime.images import SUFFIXES

PARTS = Path(__file__).parent
WELCOME = """## What would you like to know?

Add pictures, or drop them anywhere. {}"""
# The conversation that a page shows is in its address, so that reload, bookmarks and Back find it
ADDRESS = """(key) => {
    const url = new URL(location);
    if ((url.searchParams.get("chat") ?? "") === key) return;
    if (key) url.searchParams.set("chat", key); else url.searchParams.delete("chat");
    history.pushState(null, "", url);
}"""
SURE = "() => confirm('Delete this chat and its pictures for good?') ? 'yes' : ''"
DOWNLOAD = "() => document.querySelector('#exported').click()"

# What `make_demo(...).launch()` does unless told otherwise: this machine only, no tunnel, no large uploads, nothing
# loaded from elsewhere.
LAUNCH = {
    "server_name": "127.0.0.1",
    "share": False,
    "max_file_size": "20mb",
    "quiet": True,
    "run_history": False,  # it would keep what is asked in the browser, and offers to send it to the hub
    "footer_links": [],
    "css_paths": PARTS / "page.css",
    "js": (PARTS / "page.js").read_text(encoding="utf-8"),
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500",  # or they cannot be read
    ),
}


class ChatPage(gr.Blocks):
    """A page that is launched as LAUNCH says.

    Attributes:
        chat, files: of the page; set by `make_demo`.
    """

    chat: Chat
    files: Files

    def app_kwargs(self) -> dict:
        """Arguments of Gradio's app, for `gr.mount_gradio_app` too: without them a page knows no browser, and shows no
        conversation's pictures."""
        # Gradio's own copies live an hour, or until the end of another chat that shows the same
        gr.set_static_paths([self.files.conversations.pictures])
        return self.files.app_kwargs()

    def queue(self, *args, **options):
        super().queue(*args, **options)
        record_queue_owners(self._queue)
        return self

    def launch(self, *args, **options):
        options = {**LAUNCH, **options}
        options["app_kwargs"] = {**options.get("app_kwargs", {}), **self.app_kwargs()}
        host = options["server_name"]
        if host not in LOOPBACK and not options.get("auth"):
            warnings.warn(f"Whoever reaches {host} may use this page: set auth=(name, password).", stacklevel=2)
        bypass_proxy_for_loopback(host)  # Gradio asks its own page when it starts
        return super().launch(*args, **options)

    def block_thread(self):
        shutdown_promptly(self.server)  # on Ctrl-C
        super().block_thread()
        self.chat.flush()


def written(examples: Iterable[dict], folder: Path) -> list[dict]:
    """Examples as Gradio takes them: their pictures are files, in a folder that it serves as it is."""
    shown = [
        {"text": each["question"], "files": [save_pil_to_cache(each["image"], str(folder), format="png")]}
        for each in examples
    ]
    return [*shown, {"text": "What can you do?"}]


def make_demo(
    ov_model, processor, examples: Iterable[dict] = (), folder: Path | None = None, by_name: bool = True, **options
) -> ChatPage:
    """The chat page; `make_demo(model, processor).launch()` opens it.

    To ask for a name and a password, add `auth=("name", "password")`; to be reached from other machines,
    `server_name="0.0.0.0"`.

    Args:
        ov_model: an `OVMLlamaForConditionalGeneration`, or anything with its `generate`, `turn`, `config`,
            `generation_config` and `stats`; pictures are encoded ahead if it has `encode_images`.
        processor: its processor, with a chat template.
        examples: what to ask to begin with, {"image": PIL picture, "question"}, such as
            `calibration.questions_about(checkpoint)[:3]`.
        folder: where conversations are kept, with their pictures, and, unless GRADIO_TEMP_DIR of the environment
            names another place or an earlier page has set it, uploads; default: the user's data folder.
        by_name: whether conversations belong to the name of the login, where there is one; False: to the browser, as
            where all log in with one key and any name.
        options: of `generate`, for every question, such as `assistant_model=OVDraftModel(folder)`.
    """
    conversations = Conversations(folder)
    conversations.delete_orphans()
    gr.set_static_paths([conversations.examples])  # or Gradio would copy them
    # its place for uploads and exports, /tmp/gradio, can be read by everybody, and is of use only to who made it
    os.environ.setdefault("GRADIO_TEMP_DIR", str(conversations.uploads))
    uploads = Path(get_upload_folder())
    uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
    shown = written(examples, conversations.examples)
    asked = [(each["text"], [Path(file) for file in each.get("files", ())]) for each in shown]
    with ChatPage(
        title="Llama 3.2 Vision",
        fill_height=True,
        fill_width=True,
        analytics_enabled=False,
        delete_cache=(600, 3600),  # every ten minutes, uploads older than an hour; all of them when the server ends
    ) as demo:
        demo.chat = Chat(ov_model, processor, conversations, **options)
        demo.files = Files(conversations, uploads, by_name)
        parts = lay_out(getattr(ov_model.config, "about", ""), shown)
        connect(demo, parts, Pages(demo.chat, asked, by_name))
    return demo


def lay_out(about: str, examples: list[dict]) -> SimpleNamespace:
    """The page's components, by name.

    Args:
        about: what is to be said of the model before anything is asked.
        examples: as Gradio takes them.
    """
    part = SimpleNamespace()
    # a token of earlier versions, which a cookie takes the place of
    part.former = gr.BrowserState("", storage_key="ov_mllama", secret="none: it hides a random word")  # noqa: S106
    part.news, part.version, part.address, part.opened = (gr.Textbox(visible="hidden") for _ in range(4))
    with gr.Sidebar(width=300):
        part.new = gr.Button("New chat")
        part.history = gr.Radio(
            [], label="Earlier chats", show_label=False, container=False, interactive=True, elem_classes="history"
        )
        with gr.Accordion("Settings", open=False):
            part.wishes = [
                gr.Textbox("", label="System prompt", lines=2, interactive=True),
                gr.Slider(1, 2048, 512, step=1, label="Longest answer, tokens", interactive=True),
                gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest token)", interactive=True),
                gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p (only with a temperature)", interactive=True),
            ]
    with gr.Row(scale=0, elem_classes="top"):
        part.name = gr.Textbox(
            label="Name of this chat",
            show_label=False,
            container=False,
            interactive=True,
            elem_classes="name",
            max_length=100,
        )
        part.export = gr.Button("Export", size="sm", scale=0, min_width=0, elem_classes="quiet")
        part.delete = gr.Button("Delete", size="sm", scale=0, min_width=0, elem_classes="quiet")
        part.exported = gr.DownloadButton(visible="hidden", elem_id="exported")
    part.chatbot = gr.Chatbot(
        scale=1,
        show_label=False,
        elem_classes="chat",
        buttons=["copy"],
        editable="user",
        group_consecutive_messages=False,  # or its own edit fails where a bubble holds a picture (gradio#10229)
        autoscroll=False,  # it pulls back whoever scrolls up; page.js follows
        latex_delimiters=LATEX,
        placeholder=WELCOME.format(as_typed(about)),
        examples=examples,
    )
    part.box = gr.MultimodalTextbox(
        label="Question",
        show_label=False,
        file_types=[*SUFFIXES],
        file_count="multiple",
        sources=["upload"],
        placeholder="Ask a question or add pictures",
        autofocus=True,
        interactive=True,
    )
    part.foot = gr.Markdown(elem_classes="foot")
    part.timer = gr.Timer(POLL_S)
    part.hidden = [gr.Textbox(visible=False), gr.Textbox(visible=False)]
    return part


def connect(demo: gr.Blocks, part: SimpleNamespace, pages: Pages) -> None:
    """What happens when something is done on the page."""
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    on_the_page = {"fn": None, "api_visibility": "private"}
    shown = [part.version, part.timer, part.chatbot, part.box, part.history, part.address, part.name, part.foot]
    ask_for_news = (pages.poll, [part.opened, part.address, part.version], [part.news])

    def does(events, fn, inputs=None, outputs=None, **options):
        event = gr.on(events, showing_refusal(pages.find, fn), inputs, outputs, **options, **quick)
        return event.then(*ask_for_news, **quick)

    part.timer.tick(*ask_for_news, **quick)
    part.news.change(pages.refresh, [part.version], shown, trigger_mode="always_last", **quick)
    part.address.change(inputs=[part.address], js=ADDRESS, **on_the_page)
    loaded = demo.load(pages.open, [part.former], [part.opened, part.former, *part.wishes], **quick)
    loaded.then(*ask_for_news, **quick)
    demo.unload(pages.on_close)

    does(part.box.submit, pages.ask, [part.box, *part.wishes], [part.box])
    does(part.box.stop, pages.stop)
    part.box.change(pages.being_written, [part.box], **quick)
    does(part.chatbot.example_select, pages.example, part.wishes)
    does(part.chatbot.option_select, pages.continue_answer, part.wishes)
    does(part.chatbot.retry, pages.retry, part.wishes)
    does(part.chatbot.undo, pages.undo, None, [part.box])
    does(part.chatbot.edit, pages.edit, part.wishes)
    does(part.new.click, pages.begin_new)
    does(part.history.input, pages.reopen, [part.history])
    does([part.name.submit, part.name.blur], pages.rename, [part.name], [part.name])
    does(part.delete.click, pages.delete, part.hidden[:1], js=SURE)
    exported = part.export.click(showing_refusal(pages.find, pages.export), None, [part.exported], **quick)
    exported.success(js=DOWNLOAD, **on_the_page)
    prompt, *sliders = part.wishes
    chosen = [prompt.blur, *(slider.release for slider in sliders)]  # changes are also what a page does when it opens
    does(chosen, pages.choose, [part.opened, *part.wishes])
    gr.on([], pages.api_chat, [part.box, *part.wishes], part.hidden, api_name="chat")
