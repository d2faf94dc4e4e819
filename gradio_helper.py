"""The chat page. Its modules:

- `ov_mllama/chat/layout.py`: components and their events (`make_demo`).
- `ov_mllama/chat/pages.py`: event handlers; `ov_mllama/chat/tabs.py`: open tabs.
- `ov_mllama/chat/render.py`: conversations as Gradio messages and Markdown.
- `ov_mllama/chat/answers.py`: answer queue and image prefetching.
- `ov_mllama/chat/store.py`: conversations on disk.
"""

from ov_mllama.chat.layout import LAUNCH, ChatPage, connect, lay_out, make_demo, written

__all__ = ["LAUNCH", "ChatPage", "connect", "lay_out", "make_demo", "written"]
