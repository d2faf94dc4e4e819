"""Heat maps of an answer's cross-attention over its pictures, for a word that the user chooses.

answers.py -> recorded_queries.py -> a panel below the chat: the answer's words, and the pictures
"""

import asyncio
import base64
import html
import io
import re
from collections.abc import Sequence
from types import SimpleNamespace

import gradio as gr
import numpy as np
from PIL import Image

from ov_mllama.chat.messages import details_of, to_messages
from ov_mllama.chat.page_input import user_error
from ov_mllama.chat.recorded_queries import key_of
from ov_mllama.chat.render import WHERE_IT_LOOKED
from ov_mllama.chat.turns import Turn
from ov_mllama.runtime.attention_maps import AnswerQueries, image_attention, peak_of, word_tokens
from ov_mllama.runtime.checks import check_gives_queries
from ov_mllama.runtime.errors import UserError
from ov_mllama.runtime.images import at_detail, load_image
from ov_mllama.runtime.prompts import prompt_tensors

MAX_EDGE = 640  # pixels of a picture in the panel
NOT_RECORDED = "Where it looked is known of the last answers as they came, until a restart: press Retry to get another."
INFERNO = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # colours from cold to hot
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


class HeatMaps:
    """Event handlers of the panel.

    Args:
        pages: the open tabs, `Pages`.
    """

    def __init__(self, pages):
        self.pages, self.chat = pages, pages.chat

    async def choose_option(self, chosen: gr.SelectData, request: gr.Request, *settings) -> list:
        """Show the panel with the last answer's words, if that is the option; else act as `Pages`, and hide it."""
        if chosen.value != WHERE_IT_LOOKED:
            await self.pages.choose_option(chosen, request, *settings)
            return [gr.Column(visible=False), gr.skip(), gr.skip()]
        turns = self._turns(request)
        found = await asyncio.to_thread(self._words, turns)
        words = [(word, f"{key_of(turns)} {index}") for index, (word, _) in enumerate(found)]
        return [gr.Column(visible=True), gr.Radio(words, value=None), ""]

    async def show(self, choice: str, request: gr.Request) -> str:
        """Return the pictures with the heat map of a word.

        Args:
            choice: of the panel's words: key of the answer, and index among its words.
        """
        turns = self._turns(request)
        found = re.fullmatch("([0-9a-f]{64}) ([0-9]{1,6})", choice) if isinstance(choice, str) else None
        words = await asyncio.to_thread(self._words, turns) if found and found[1] == key_of(turns) else []
        if not found or int(found[2]) >= len(words):
            raise user_error("The answer that is shown has no such word: press Where it looked again.")
        word, tokens = words[int(found[2])]
        try:
            return await asyncio.to_thread(self._html, turns, word, tokens)
        except (UserError, OSError) as error:  # such as a picture that is missing
            raise user_error(error) from error

    def _turns(self, request: gr.Request) -> list[Turn]:
        """Return the turns of a page's conversation, whose last answer is complete."""
        talk = self.pages.page(request).conversation
        if not talk.turns:
            raise user_error("There is no answer yet.")
        if self.chat.answering(talk):
            raise user_error("Wait until the answer is complete.")
        return [*talk.turns]

    def _queries(self, turns: Sequence[Turn]) -> AnswerQueries:
        """Return the queries of the last turn's answer."""
        queries = self.chat.recorded.get(turns)
        if queries is None:
            try:
                check_gives_queries(self.chat.model.language_model)
            except UserError as error:
                raise user_error(error) from error
            raise user_error(NOT_RECORDED)
        return queries

    def _words(self, turns: Sequence[Turn]) -> list[tuple[str, list[int]]]:
        """Return the words of the last turn's answer, and their tokens."""
        queries = self._queries(turns)
        return word_tokens(self.chat.processor.tokenizer, queries.tokens)

    def _html(self, turns: Sequence[Turn], word: str, tokens: list[int]) -> str:
        """Return the pictures that the answer sees, with a word's heat map, as HTML that holds them."""
        queries, (messages, pictures), details = self._queries(turns), to_messages(turns), details_of(turns)
        model, processor = self.chat.model, self.chat.processor
        inputs, _ = prompt_tensors(model, processor, messages, pictures, 1, details)
        tile = model.config.vision_config.image_size
        images = [at_detail(load_image(path), detail, tile) for path, detail in zip(pictures, details, strict=True)]
        maps = image_attention(model, inputs, queries, tokens, images)
        seen = [(image, heat) for image, heat in zip(images, maps, strict=True) if heat is not None]
        highest = max((float(heat.max()) for _, heat in seen), default=0)
        return "".join(figure(image, heat, word, highest) for image, heat in seen)


def figure(image: Image.Image, heat: np.ndarray, word: str, highest: float) -> str:
    """Return an image with a heat map as HTML: the image is a data URL, so there is no file that others could read.

    Args:
        highest: of all images' maps, which share their colours.
    """
    file = io.BytesIO()
    overlaid(image, heat, highest).save(file, "JPEG", quality=85)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    more = "most" if heat.max() >= highest else "less than at another picture, most"
    text = html.escape(f"For “{word}” it looked {more} at the {place_of_peak(heat)} of the picture.")
    return f'<figure><img src="{source}" alt="Heat map. {text}"><figcaption>{text}</figcaption></figure>'


def overlaid(image: Image.Image, heat: np.ndarray, highest: float) -> Image.Image:
    """Return an image, of MAX_EDGE at most, in grey below a heat map's colours, from 0 to `highest`."""
    small = image.convert("RGB")
    small.thumbnail((MAX_EDGE, MAX_EDGE))
    relative = Image.fromarray(heat / max(highest, 1e-9)).resize(small.size, Image.Resampling.BILINEAR)
    level = np.clip(np.asarray(relative), 0, 1)
    stops = np.linspace(0, 1, len(INFERNO))
    colours = np.stack([np.interp(level, stops, part) for part in zip(*INFERNO, strict=True)], axis=-1)
    grey = np.asarray(small.convert("L"), np.float32)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * colours).round().astype(np.uint8))


def place_of_peak(heat: np.ndarray) -> str:
    """Return the ninth of an image that its peak is in, such as "top left"."""
    y, x = peak_of(heat)
    row, column = ROWS[3 * y // heat.shape[0]], COLUMNS[3 * x // heat.shape[1]]
    return "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"


def lay_out_panel() -> SimpleNamespace:
    """Create the panel's components, hidden, and return them by name."""
    part = SimpleNamespace()
    with gr.Column(visible=False, elem_classes="looked") as part.panel:
        with gr.Row(elem_classes="looked-head"):
            gr.Markdown("**Where it looked.** Choose a word of the answer.")
            part.close = gr.Button("Close", size="sm", scale=0, min_width=0, elem_classes="quiet")
        part.words = gr.Radio(
            [], label="Words of the answer", show_label=False, container=False, interactive=True, elem_classes="words"
        )
        part.view = gr.HTML(elem_classes="heat", padding=False)
    return part


def connect_panel(page: SimpleNamespace, maps: HeatMaps, on) -> None:
    """Connect the panel's events to their handlers.

    Args:
        page: the page's components, the panel's as `looked`.
        on: connects events, as in `layout.connect`.
    """
    part = page.looked
    on(page.chatbot.option_select, maps.choose_option, page.settings, [part.panel, part.words, part.view])
    on(part.words.input, maps.show, [part.words], [part.view])
    chatbot = page.chatbot
    changes = [page.box.submit, page.new.click, page.temporary.click, page.flip.click]
    changes += [page.delete.click, page.delete_selected.click, page.load.upload, chatbot.example_select]
    changes += [chatbot.retry, chatbot.undo, chatbot.edit, *(group.input for group in page.groups)]
    # not through `on`, which would clear the error of the same event's other handler
    options = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gr.on([part.close.click, *changes], lambda: gr.Column(visible=False), None, [part.panel], **options)
