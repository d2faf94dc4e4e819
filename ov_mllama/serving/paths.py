"""Paths of the APIs as clients write them, and hints for paths that this server does not have."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

OPENAI_PATHS = ("chat/completions", "completions", "responses", "models")  # below /v1/
API_PATH = re.compile(r"/(v1|api)/.+|/(health|metrics)")
WITHOUT_V1 = re.compile(rf"/({'|'.join(OPENAI_PATHS)})|/models/.+")
ENDPOINTS = "POST /v1/chat/completions, /v1/responses, /v1/completions, GET /v1/models, POST /api/chat (Ollama's)"
# Pattern of paths of other APIs -> what to do instead
HINTS = {
    r".*/messages(/.*)?": "Anthropic's API is not spoken here, use POST /v1/chat/completions",
    r".*/embeddings": "this model computes no embeddings, use another server for them",
    r".*/(audio|images|videos)/.*": "this model reads text and images and writes text, use another server",
    r".*/(moderations|rerank|score|fine_tuning/.*|assistants.*|threads.*|batches.*|files.*)": "use another server",
    r".*:generateContent": "Google's API is not spoken here, use POST /v1/chat/completions",
}


def canonical_path(path: str) -> str:
    """Return an API's path without doubled and trailing slashes, with one /v1 where OpenAI's API has it. Other paths,
    such as the chat page's, are returned unchanged."""
    short = re.sub("/+", "/", path)
    short = re.sub(r"^(/v1)+(?=/(v1|api)/)", "", short.rstrip("/"))
    if WITHOUT_V1.fullmatch(short):
        return f"/v1{short}"
    return short if API_PATH.fullmatch(short) else path


def hint(method: str, path: str, status: int, allowed: str | None) -> str:
    """Return the message for a path or method that this server does not have.

    Args:
        allowed: methods of the path (the header Allow), with status 405.
    """
    if status == 405:
        return f"{method} {path}: Method Not Allowed, use {allowed}." if allowed else f"{method} {path}: not allowed."
    for pattern, advice in HINTS.items():
        if re.fullmatch(pattern, path):
            return f"{method} {path}: Not Found; {advice}."
    return f"{method} {path}: Not Found; this server has {ENDPOINTS}."


class CanonicalPaths:
    """ASGI middleware that applies `canonical_path`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root = scope.get("root_path", "")
            path = scope["path"]
            if path.startswith(root):
                scope = {**scope, "path": root + canonical_path(path[len(root) :])}
        await self.app(scope, receive, send)


class ProxiedPath:
    """ASGI middleware for a server to which a proxy sends the requests of one path, with or without that path.

    Args:
        root: the path, such as "/llama"; "" for none.
    """

    def __init__(self, app: ASGIApp, root: str):
        self.app, self.root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.root and scope["type"] in ("http", "websocket"):
            path = scope["path"]
            inside = path == self.root or path.startswith(f"{self.root}/")
            scope = {**scope, "root_path": self.root, "path": path if inside else self.root + path}
        await self.app(scope, receive, send)
