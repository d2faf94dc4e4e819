"""Components of the list of chats, and their events; handlers are in `listing.py`."""

from collections.abc import Callable
from types import SimpleNamespace

import gradio as gr

from ov_mllama.chat.listing import ListTabs
from ov_mllama.chat.search import MAX_GROUPS, MAX_QUERY

CONFIRM_SEVERAL = """(keys) => [keys, keys.length && confirm(
    `Delete ${keys.length} chat${keys.length > 1 ? "s" : ""} and their pictures for good?`) ? "yes" : ""]"""


def lay_out_list(part: SimpleNamespace) -> None:
    """Create the buttons that begin chats, the search, and the list: a group of radio buttons for each heading, so that
    each is one stop of the Tab key."""
    quiet: dict = {"size": "sm", "min_width": 0, "elem_classes": "quiet"}
    with gr.Column(scale=0, elem_classes="begin"):
        part.new = gr.Button("New chat")
        part.temporary = gr.Button("Temporary chat", **quiet)
    part.search = gr.Textbox(
        label="Search chats",
        placeholder="Search chats",
        show_label=False,
        container=False,
        max_length=MAX_QUERY,
        elem_classes="search",
    )
    with gr.Column(elem_classes="chats"):
        part.groups = [
            gr.Radio([], container=False, interactive=True, visible=False, elem_classes="history")
            for _ in range(MAX_GROUPS)
        ]
        part.selected = gr.CheckboxGroup(
            [], label="Chats", show_select_all=True, container=False, visible=False, elem_classes="selected-chats"
        )
        part.nothing = gr.Markdown("No chat has all these words.", visible=False, elem_classes="nothing")
        part.more = gr.Button("Show more", visible=False, **quiet)
    with gr.Row(elem_classes="tools"):
        part.delete_selected = gr.Button("Delete selected", visible=False, **quiet)
        part.select = gr.Button("Select", visible=False, **quiet)
        part.load = gr.UploadButton("Import", file_types=[".zip"], **quiet)


def list_outputs(part: SimpleNamespace) -> list:
    """Return the components that `ChatList.updates` updates."""
    return [*part.groups, part.more, part.nothing, part.selected, part.delete_selected, part.select]


def connect_list(part: SimpleNamespace, pages: ListTabs, on: Callable) -> None:
    """Connect the list's events to their handlers.

    Args:
        on: as in `layout.connect`.
    """
    on(part.temporary.click, pages.begin_temporary)
    # `input` misses what is pasted; one search at a time, while more is typed
    on(part.search.change, pages.search, [part.search], trigger_mode="always_last")
    on(part.more.click, pages.show_more)
    on(part.select.click, pages.select)
    on(part.delete_selected.click, pages.delete_selected, [part.selected, part.hidden[0]], js=CONFIRM_SEVERAL)
    # without a poll, whose answer might overtake the next tick
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    part.selected.input(pages.tick, [part.selected], trigger_mode="always_last", **quiet)
    on(part.pin.click, pages.pin)
    on(part.load.upload, pages.import_chat, [part.load])
    for group in part.groups:
        on(group.input, pages.reopen, [group])
