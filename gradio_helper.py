"""The chat: a page in the browser on top of an `OVMLlamaForConditionalGeneration`.

    page's history -> messages and pictures -> chat template, processor -> generate -> answer, word by word

This file knows Gradio's messages and the processor's. It knows nothing of how the model computes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.conversation import plain, prompt_tensors, sampling, stream_words

logger = logging.getLogger(__name__)

SAID_PLAINLY = (ValueError, MemoryError, FloatingPointError)  # the model's refusals are sentences already

CSS = """
/* remarks are plain lines, without a bubble, arrow or copy button */
.message:has(.thought-group), .thought-group {
    border: 0 !important; padding: 0; background: none !important; box-shadow: none }
.thought-group .arrow, .message-row:has(.thought-group) + .message-buttons [aria-label="Copy message"] { display: none }
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


def remark(title: str) -> dict:
    """A message about the conversation that is no part of it: `answered` goes by the title."""
    return {"role": "assistant", "content": "", "metadata": {"title": title}}


# ---- Messages and pictures -> answer --------------------------------------------------------------------------------


class Chat:
    """A model that answers one question at a time, whoever asks: the others wait for its `turn`.

    Args:
        options: of `generate`, for every question.
    """

    def __init__(self, model, processor, **options):
        self.model, self.processor, self.options = model, processor, options

    async def respond(
        self,
        message: dict,
        history: list[dict],
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.9,
    ) -> AsyncIterator[str | list]:
        """What the page shows as the answer grows; at its end with a remark on time, or on what went wrong.

        Closing it stops the generation within a token.

        Args:
            message, history, system: as for `to_messages`.
            max_new_tokens: the answer's limit.
            temperature, top_p: of sampling; a temperature of 0 takes the likeliest token (greedy).
        """
        text, limit = "", int(max_new_tokens)
        try:
            messages, pictures = to_messages(message, history, system)
            inputs, remarks = await asyncio.to_thread(
                prompt_tensors, self.model, self.processor, messages, pictures, limit
            )
            arguments = {**inputs, **self.options, **sampling(temperature, top_p), "max_new_tokens": limit}
            costs: list = []
            async for piece in stream_words(self.model, self.processor, costs.append, **arguments):
                text += piece
                yield text
            yield [text, remark(" · ".join(map(str, [*costs, *remarks])))]
        except SAID_PLAINLY as error:
            yield [*([text] if text else []), remark(f"No answer: {error}")]
        except Exception as error:  # whatever it is, the page says it and stays usable; the log has the rest
            logger.exception("A question could not be answered")
            yield [*([text] if text else []), remark(f"No answer: {type(error).__name__}: {error}")]


# ---- The page -------------------------------------------------------------------------------------------------------


def edited(history: list[dict], edit: gr.EditData) -> tuple[list[dict], list[dict], dict]:
    """The conversation up to an edited question, twice, and that question for the text box: new text, old pictures."""
    index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
    pictures = [str(part) for part in parts(history[index]["content"]) if isinstance(part, Path)]
    return history[:index], history[:index], {"text": edit.value, "files": pictures}


# Presses the page's send button as soon as the edited question is in the text box
SEND = """() => {
    const send = (tries) => {
        const button = document.querySelector("button.submit-button");
        if (button && !button.disabled) button.click();
        else if (tries > 0) setTimeout(send, 50, tries - 1);
    };
    setTimeout(send, 50, 40);
}"""


class EditableChat(gr.ChatInterface):
    """A `ChatInterface` in which questions with pictures can be edited, and which is launched as LAUNCH says.

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
        ov_model: an `OVMLlamaForConditionalGeneration`, or anything with its `generate`, `turn`, `config` and `stats`.
        processor: its processor, with a chat template.
        examples: what to ask to begin with, {"image": PIL picture, "question"}, such as
            `data_preprocessing.questions_about(checkpoint)[:3]`.
        options: of `generate`, for every question, such as `assistant_model=OVDraftModel(folder)`.
    """
    chat = Chat(ov_model, processor, **options)
    return EditableChat(
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
        concurrency_limit=1,
        delete_cache=(600, 3600),  # every ten minutes, uploads older than an hour; all of them when the server ends
        api_name="chat",
    )
