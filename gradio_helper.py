"""The chat page. Its parts, each in a file of its own:

- `ov_mllama/chat/layout.py`: the components and what connects them (`make_demo`).
- `ov_mllama/chat/pages.py`: handlers of the page's events.
- `ov_mllama/chat/shown.py`: conversations as the page shows them.
- `ov_mllama/chat/answers.py`: answers questions one at a time, and encodes images ahead of them.
- `ov_mllama/chat/store.py`: conversations on disk.
"""

from ov_mllama.chat.layout import LAUNCH, ChatPage, connect, lay_out, make_demo, written

__all__ = ["LAUNCH", "ChatPage", "connect", "lay_out", "make_demo", "written"]
