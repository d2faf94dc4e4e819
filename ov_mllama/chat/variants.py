"""Event handlers that begin or show another variant of an answer or a question, see `turns.py`."""

import asyncio
import re
import time

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from ov_mllama.chat.answers import GenerationSettings
from ov_mllama.chat.page_input import MAX_QUESTION, bounded_text, checked_settings, images_of, text_of, user_error
from ov_mllama.chat.render import CONTINUE, LOOK_CLOSER, to_gradio, unrender_answer
from ov_mllama.chat.store import Conversation
from ov_mllama.chat.tabs import Tabs
from ov_mllama.chat.turns import EDITED, Turn, begin_variant, flip_variant, take_back
from ov_mllama.runtime.errors import InputError


class Variants(Tabs):
    """Event handlers for one turn of a conversation. Nothing that has an answer is lost: it becomes hidden."""

    async def stop(self, request: gr.Request) -> None:
        """Cancel the answer under way."""
        await self._stopped(request)

    async def _stopped(self, request: gr.Request) -> Conversation:
        """Cancel the answer under way in a page's conversation, and return the conversation."""
        talk = self.page(request).conversation
        await self.chat.stop(talk)
        return talk

    def _begin(self, talk: Conversation, index: int, turn: Turn, settings: GenerationSettings | None = None) -> None:
        """Show a new variant, and have it answered.

        Args:
            settings: of the answer; None if the turn has one.
        """
        try:
            begin_variant(talk.turns, index, turn)
        except InputError as error:
            raise user_error(error) from error
        if settings:
            self.chat.begin(talk, settings)
        else:
            self.chat.save(talk)

    async def retry(self, request: gr.Request, *settings) -> None:
        """Answer the last question again."""
        checked, talk = checked_settings(settings), await self._stopped(request)
        if talk.turns:  # another tab may have removed them
            last, full = talk.turns[-1], checked.detail == "high"
            again = last.again(detail=checked.detail, closer=last.closer and full)
            self._begin(talk, len(talk.turns) - 1, again, checked)

    async def choose_option(self, chosen: gr.SelectData, request: gr.Request, *settings) -> None:
        """Continue the last answer, or answer the last question again at full detail."""
        checked, talk = checked_settings(settings), await self._stopped(request)
        last = talk.turns[-1] if talk.turns else None
        if last and chosen.value == LOOK_CLOSER:
            self._begin(talk, len(talk.turns) - 1, last.again(detail="high", closer=True), checked)
        elif last and chosen.value == CONTINUE and last.can_continue:
            self.chat.begin(talk, checked)

    async def undo(self, message: dict | None, request: gr.Request):
        """Move the last question back into the text box, before what is in it."""
        draft, files = text_of(message), images_of(message)
        talk = await self._stopped(request)
        if not talk.turns:
            return gr.skip()
        turn = take_back(talk.turns)
        self.chat.save(talk)
        pictures = [picture for picture in turn.pictures if picture.is_file()]
        copies = [await asyncio.to_thread(save_file_to_cache, picture, get_upload_folder()) for picture in pictures]
        if not talk.turns:  # it is in no list, so nobody could delete them
            await asyncio.to_thread(self.conversations.delete_pictures, talk)
        text = "\n".join(filter(None, (turn.question, draft)))
        return {"text": text, "files": [*copies, *map(str, files)]}

    async def edit(self, edited: gr.EditData, request: gr.Request, *settings) -> None:
        """Answer a question's new text, with its images; or replace an answer's text."""
        checked, page = checked_settings(settings), self.page(request)
        text = bounded_text(edited.value, MAX_QUESTION, "text")
        index = edited.index[0] if isinstance(edited.index, (list, tuple)) and edited.index else edited.index
        page.version += 1  # the browser has changed the message already
        talk = await self._stopped(request)
        messages = to_gradio(talk.turns)
        if type(index) is not int or not 0 <= index < len(messages) or "metadata" in messages[index]:
            raise user_error("There is no such message any more.")
        number = sum(message["role"] == "user" for message in messages[: index + 1]) - 1
        turn = talk.turns[number]
        if messages[index]["role"] == "user":
            self._begin(talk, number, turn.again(question=text, asked=time.time()), checked)
            return
        answer = unrender_answer(text)
        if not answer.strip():
            raise user_error("An answer needs some text.")
        if answer != unrender_answer(messages[index]["content"]):
            self._begin(talk, number, turn.again(answer=answer, state=EDITED, note="Edited"))

    async def flip(self, choice: str, request: gr.Request) -> None:
        """Show the previous or next variant; an answer under way continues where it is.

        Args:
            choice: value of a button of `render.variant_buttons`.
        """
        talk = self.page(request).conversation
        found = re.fullmatch("([0-9]{1,6}) (-?1)", choice) if isinstance(choice, str) else None
        index, step = map(int, found.groups()) if found else (-1, 0)
        if not 0 <= index < len(talk.turns) or not talk.turns[index].others:
            raise user_error("There is no other answer any more.")
        flip_variant(talk.turns, index, step)
        self.chat.save(talk)
