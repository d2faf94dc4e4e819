"""Named settings: two that are built in, and those that each owner saves."""

import json

import gradio as gr

from ov_mllama.chat.decoding import GenerationSettings
from ov_mllama.chat.page_input import bounded_text, checked_settings, user_error
from ov_mllama.chat.store import Conversations
from ov_mllama.chat.tabs import Tabs

BUILT_IN: dict[str, dict] = {
    "Precise": {"temperature": 0.0, "top_p": 0.9, "top_k": None, "repetition_penalty": None, "seed": None},
    "Creative": {"temperature": 0.8, "top_p": 0.95, "top_k": None, "repetition_penalty": None, "seed": None},
}
MAX_NAME, MAX_PRESETS = 40, 50  # characters; per owner
APPLIED = tuple(name for name in GenerationSettings._fields if name != "detail")  # the switch below the box stays


class Presets:
    """Store of owners' presets.

    Args:
        conversations: whose database has the table.
    """

    def __init__(self, conversations: Conversations):
        self._database = conversations._database  # noqa: SLF001

    def of(self, owner: str) -> dict[str, dict]:
        """Return an owner's presets and the built-in ones, by name."""
        with self._database() as database:
            rows = database.execute("SELECT name, chosen FROM presets WHERE owner = ? ORDER BY name", [owner])
            return {**BUILT_IN, **{name: json.loads(chosen) for name, chosen in rows}}

    def save(self, owner: str, name: str, settings: GenerationSettings) -> None:
        """Save settings under a name, in place of earlier ones."""
        chosen = {each: value for each, value in settings._asdict().items() if each in APPLIED}
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO presets VALUES (?, ?, ?)", [owner, name, json.dumps(chosen)])

    def delete(self, owner: str, name: str) -> None:
        """Delete a preset, if there is one."""
        with self._database() as database:
            database.execute("DELETE FROM presets WHERE owner = ? AND name = ?", [owner, name])


class PresetEvents:
    """Event handlers of the presets.

    Args:
        tabs: the open tabs.
    """

    def __init__(self, tabs: Tabs):
        self.tabs, self.store = tabs, Presets(tabs.conversations)

    async def _choices(self, owner: str, chosen: str | None):
        names = await self.tabs._read(self.store.of, owner)  # noqa: SLF001
        return gr.Dropdown([*names], value=chosen)

    async def list_presets(self, request: gr.Request):
        """Return the drop-down with an owner's presets."""
        page = self.tabs.find(request)
        return await self._choices(page.owner, None) if page else gr.skip()

    async def apply_preset(self, name: str | None, request: gr.Request, *settings) -> list:
        """Return the settings with a preset's, and save them as the owner's; an unknown name changes nothing."""
        page = self.tabs.page(request)
        presets = await self.tabs._read(self.store.of, page.owner)  # noqa: SLF001
        if not isinstance(name, str) or name not in presets:
            return [gr.skip()] * len(settings)
        chosen = {each: value for each, value in presets[name].items() if each in APPLIED}
        applied = checked_settings(GenerationSettings(*settings)._replace(**chosen))  # it may replace an invalid one
        await self.tabs._read(self.tabs.conversations.save_settings, page.owner, applied._asdict())  # noqa: SLF001
        return [*applied]

    async def save_preset(self, name: str | None, request: gr.Request, *settings):
        """Save the settings under the drop-down's name, and return the drop-down."""
        page, checked = self.tabs.page(request), checked_settings(settings)
        name = bounded_text(name or "", MAX_NAME, "preset's name").strip()
        presets = await self.tabs._read(self.store.of, page.owner)  # noqa: SLF001
        if not name or name in BUILT_IN:
            raise user_error("Type a name of your own for the preset, then save it.")
        if name not in presets and len(presets) >= MAX_PRESETS + len(BUILT_IN):
            raise user_error(f"There are {MAX_PRESETS} presets already: delete one first.")
        await self.tabs._read(self.store.save, page.owner, name, checked)  # noqa: SLF001
        return await self._choices(page.owner, name)

    async def delete_preset(self, name: str | None, request: gr.Request):
        """Delete a preset of the owner's, and return the drop-down."""
        page = self.tabs.page(request)
        name = bounded_text(name or "", MAX_NAME, "preset's name").strip()
        if name in BUILT_IN:
            raise user_error(f"{name} is built in, and stays.")
        await self.tabs._read(self.store.delete, page.owner, name)  # noqa: SLF001
        return await self._choices(page.owner, None)
