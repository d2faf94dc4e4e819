"""The chat: a page in the browser on top of an `OVMLlamaForConditionalGeneration`.

    page's history -> messages and pictures -> chat template, processor -> generate -> answer, word by word

This file knows Gradio's messages and the processor's. It knows nothing of how the model computes.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.ahead import PicturesAhead
from ov_mllama.conversation import Line, or_silence, plain, prompt_tensors, sampling, stream_words
from ov_mllama.progress import Progress

logger = logging.getLogger(__name__)

SIGN_EVERY_S = 0.5  # how often an answer without words says what it waits for
SAID_PLAINLY = (ValueError, MemoryError, FloatingPointError)  # the model's refusals are sentences already

CSS = """
/* remarks are plain lines, without a bubble, arrow or copy button */
.message:has(.thought-group), .thought-group {
    border: 0 !important; padding: 0; background: none !important; box-shadow: none }
.thought-group .arrow, .message-row:has(.thought-group) + .message-buttons [aria-label="Copy message"] { display: none }
.message-row:has(.thought-group) + .message-buttons:not(:has([aria-label="Retry"])) { display: none }
/* nothing below a picture; and never a button that would upload it to the Hugging Face hub */
.message-row:has(.message.component) + .message-buttons, [aria-label="Share"] { display: none }
/* an edited question has room to be read */
.edit-textarea { min-width: 24em }
"""

# What `make_demo(...).launch()` does unless told otherwise: this machine only, no tunnel, no large uploads, nothing
# loaded from elsewhere.
LAUNCH = {
    "server_name": "127.0.0.1",
    "share": False,
    "max_file_size": "20mb",
    "quiet": True,
    "footer_links": [],
    "css": CSS,
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
}


# ---- The page's history -> messages and pictures --------------------------------------------------------------------


def answered(history: Iterable[dict]) -> list[dict]:
    """What was said in a conversation: no remarks (they have a title) and no questions that got no answer."""
    said, question = [], None
    for entry in history:
        if (entry.get("metadata") or {}).get("title"):
            continue
        if entry["role"] == "user":
            question = entry
        else:
            said += [question, entry] if question else []
            question = None
    return said


def picture_path(file) -> Path:
    """Of a picture as Gradio gives it: a path, or a dict that holds one."""
    return Path((file.get("path") or file["file"]["path"]) if isinstance(file, dict) else file)


def parts(content) -> list[str | Path]:
    """A message's content as Gradio gives it, in order: texts, and pictures as paths."""
    items = []
    for item in content if isinstance(content, list) else [content]:
        if isinstance(item, str):
            items.append(item)
        elif "text" in item:
            items.append(item["text"] or "")
        else:
            items.append(picture_path(item))
    return items


def to_messages(message: dict, history: Iterable[dict], system: str = "") -> tuple[list[dict], list[Path]]:
    """A conversation for the chat template, and its pictures in the template's order.

    Args:
        message: the question, {"text": str, "files": [path, ...]}; of Retry, files are dicts with a "path".
        history: Gradio's messages before it, {"role", "content", "metadata"}.
        system: system prompt; may be empty.
    Raises:
        ValueError: there is no question.
    """
    question = [*map(picture_path, message.get("files") or []), (message.get("text") or "").strip()]
    if question == [""]:
        raise ValueError("There is no question yet: write one, or add a picture.")
    turns = [("system", [system])] if system.strip() else []
    turns += [(entry["role"], parts(entry["content"])) for entry in answered(history)]
    messages, pictures = [], []
    for role, items in [*turns, ("user", question)]:
        content = []
        for item in items:
            if isinstance(item, Path):
                pictures.append(item)
            content.append({"type": "image"} if isinstance(item, Path) else {"type": "text", "text": plain(item)})
        messages.append({"role": role, "content": content})
    return messages, pictures


def remark(title: str, **metadata) -> dict:
    """A message about the conversation that is no part of it: `answered` goes by the title.

    Args:
        metadata: Gradio's others; with status="pending" it stands where words will be.
    """
    return {"role": "assistant", "content": "", "metadata": {"title": title, **metadata}}


# ---- Messages and pictures -> answer --------------------------------------------------------------------------------


class Chat:
    """A model that answers one question at a time, whoever asks: the others stand in line.

    Args:
        options: of `generate`, for every question.

    Attributes:
        line: of the questions.
        ahead: pictures that are encoded while questions about them are written.
    """

    def __init__(self, model, processor, **options):
        self.model, self.processor, self.options = model, processor, options
        self.ahead = PicturesAhead(model, processor)
        self.line = Line()

    async def respond(
        self,
        message: dict,
        history: list[dict],
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.9,
    ) -> AsyncIterator[str | list | dict]:
        """What the page shows: what the answer waits for, then the answer as it grows; at its end with a remark on
        time, or on what went wrong.

        Closing it stops the generation within a token.

        Args:
            message, history, system: as for `to_messages`.
            max_new_tokens: the answer's limit.
            temperature, top_p: of sampling; a temperature of 0 takes the likeliest token (greedy).
        """
        text, remarks, progress = "", [], Progress()
        try:
            messages, pictures = to_messages(message, history, system)
            arguments = {**self.options, **sampling(temperature, top_p), "max_new_tokens": int(max_new_tokens)}
            words = self._words(messages, pictures, progress, remarks, arguments)
            async with contextlib.aclosing(or_silence(words, SIGN_EVERY_S)) as pieces:
                async for piece in pieces:
                    text += piece or ""
                    if piece or not text:
                        yield text or remark(str(progress), status="pending")
            yield [text, *map(remark, remarks)]
        except SAID_PLAINLY as error:
            yield [*([text] if text else []), remark(f"No answer: {error}")]
        except Exception as error:  # whatever it is, the page says it and stays usable; the log has the rest
            logger.exception("A question could not be answered")
            yield [*([text] if text else []), remark(f"No answer: {type(error).__name__}: {error}")]

    async def _words(
        self, messages: list[dict], pictures: list[Path], progress: Progress, remarks: list[str], arguments: dict
    ) -> AsyncGenerator[str]:
        """A question's answer when it is its turn, piece by piece; what is to be said of it is added to `remarks`."""
        limit = arguments["max_new_tokens"]

        def note(stats, cut: bool) -> None:
            remarks.extend([f"Cut at {limit} tokens: write “go on” to continue."] * cut)
            remarks.append(" · ".join(map(str, [stats, *said])))

        with self.ahead.holding(pictures):
            async with self.line.turn(progress):
                progress.enter("Opening the question’s pictures" if pictures else "Preparing the question")
                inputs, said = await asyncio.to_thread(
                    prompt_tensors, self.model, self.processor, messages, pictures, limit
                )
                asked = {**inputs, **arguments}
                async for piece in stream_words(self.model, self.processor, note, progress, **asked):
                    yield piece

    def being_written(self, message: dict | None, request: gr.Request) -> None:
        """What a page's text box holds now: its pictures are encoded ahead."""
        self.ahead.want(request.session_hash, [picture_path(file) for file in (message or {}).get("files") or []])

    def page_left(self, request: gr.Request) -> None:
        """A page was closed: nothing of it is wanted any more."""
        self.ahead.want(request.session_hash, [])


# ---- The page -------------------------------------------------------------------------------------------------------


def edited(history: list[dict], edit: gr.EditData) -> tuple[list[dict], list[dict], dict]:
    """The conversation up to an edited question, twice, and that question for the text box: new text, old pictures."""
    index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
    pictures = [str(part) for part in parts(history[index]["content"]) if isinstance(part, Path)]
    return history[:index], history[:index], {"text": edit.value, "files": pictures}


def said_to_be_stopped(history: list[dict]):
    """A conversation twice, with the remark that its answer was stopped; nothing where a remark ends it already."""
    last = (history[-1].get("metadata") or {}) if history else {"title": "nothing was asked"}
    waits = last.get("status") == "pending"
    if last.get("title") and not waits:
        return gr.skip(), gr.skip()
    history = [*(history[:-1] if waits else history), remark("Stopped.")]
    return history, history


# Presses the page's send button as soon as the edited question is in the text box
SEND = """() => {
    const send = (tries) => {
        const button = document.querySelector("button.submit-button");
        if (button && !button.disabled) button.click();
        else if (tries > 0) setTimeout(send, 50, tries - 1);
    };
    setTimeout(send, 50, 40);
}"""


# Waits until the page has done what it does after an answer, and takes the next question
SETTLED = """async () => {
    const busy = () => document.querySelector("textarea[data-testid=textbox]:disabled");
    for (let tries = 0; busy() && tries < 200; tries++) await new Promise((done) => setTimeout(done, 25));
}"""


class EditableChat(gr.ChatInterface):
    """A `ChatInterface` in which questions with pictures can be edited and answers that were stopped say so, and which
    is launched as LAUNCH says.

    Gradio 6.31's own edit never learned to (gradio#10229): its page throws where a bubble holds more than text, so
    `group_consecutive_messages` must be off, and it gives back the text alone, so the pictures are added here.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with self:
            self.chatbot.edit(
                edited,
                [self.chatbot_state],
                [self.chatbot, self.chatbot_state, self.textbox],
                api_visibility="private",
                queue=False,
            ).then(None, js=SEND, api_visibility="private")
            # Stop closes the generator, which then cannot say so itself
            self.textbox.stop(None, js=SETTLED, api_visibility="private").then(
                said_to_be_stopped,
                [self.chatbot],
                [self.chatbot, self.chatbot_state],
                api_visibility="private",
                queue=False,
                show_progress="hidden",
            ).then(
                self._save_conversation,
                [self.conversation_id, self.chatbot_state, self.saved_conversations],
                [self.conversation_id, self.saved_conversations],
                api_visibility="private",
                queue=False,
            )

    def launch(self, *args, **options):
        return super().launch(*args, **{**LAUNCH, **options})


def written(examples: Iterable[dict]) -> list[list[dict]]:
    """Examples as Gradio takes them: their pictures are files, in the folder that it serves.

    Args:
        examples: as for `make_demo`.
    """
    shown = [
        {"text": each["question"], "files": [save_pil_to_cache(each["image"], get_upload_folder(), format="png")]}
        for each in examples
    ]
    return [[example] for example in [*shown, {"text": "What can you do?", "files": []}]]


def make_demo(ov_model, processor, examples: Iterable[dict] = (), **options) -> gr.ChatInterface:
    """The chat page; `make_demo(model, processor).launch()` opens it.

    To ask for a name and a password, add `auth=("name", "password")`; to be reached from other machines,
    `server_name="0.0.0.0"`.

    Args:
        ov_model: an `OVMLlamaForConditionalGeneration`, or anything with its `generate`, `turn`, `config`,
            `generation_config` and `stats`; pictures are encoded ahead if it has `encode_images`.
        processor: its processor, with a chat template.
        examples: what to ask to begin with, {"image": PIL picture, "question"}, such as
            `data_preprocessing.questions_about(checkpoint)[:3]`.
        options: of `generate`, for every question, such as `assistant_model=OVDraftModel(folder)`.
    """
    chat = Chat(ov_model, processor, **options)
    demo = EditableChat(
        chat.respond,
        multimodal=True,
        title="Llama 3.2 Vision on OpenVINO",
        description="Ask about pictures, or just ask. Everything stays on the machine that serves this page. "
        "It answers one question at a time; others wait for their turn.",
        chatbot=gr.Chatbot(
            scale=1, show_label=False, buttons=["copy"], editable="user", group_consecutive_messages=False
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask a question, with or without pictures",
            submit_btn=True,
            stop_btn=True,
            autofocus=True,
        ),
        additional_inputs=[
            gr.Textbox("", label="System prompt", lines=2),
            gr.Slider(1, 2048, 512, step=1, label="Longest answer, tokens"),
            gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the likeliest token)"),
            gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p (only with a temperature)"),
        ],
        additional_inputs_accordion=gr.Accordion("Settings", open=False),
        examples=written(examples),
        save_history=True,
        flagging_mode="never",
        analytics_enabled=False,
        concurrency_limit=None,  # they stand in line in `Chat`, which says so
        delete_cache=(600, 3600),  # every ten minutes, uploads older than an hour; all of them when the server ends
        api_name="chat",
    )
    with demo:
        demo.textbox.change(
            chat.being_written, [demo.textbox], None, api_visibility="private", queue=False, show_progress="hidden"
        )
        demo.unload(chat.page_left)
    return demo
