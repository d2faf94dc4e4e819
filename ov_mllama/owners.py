"""Owners of conversations: the user or browser behind a request, and the files that it may be served.

A user is known by the login (`auth`), a browser by a random token in a cookie that no script can read. Neither is a
value that a page sends.
"""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from ov_mllama.conversations import Conversations
from ov_mllama.http_headers import SecurityHeaders

COOKIE, FRAMED_COOKIE = "ov_mllama", "ov_mllama_framed"
TOKEN = re.compile("[0-9a-f]{64}")
COOKIE_S = 400 * 24 * 60 * 60  # browsers keep none longer; every load of the page begins anew
# what a browser may show of an upload; all else is downloaded
IMAGE_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
}


def browser_token(cookies: Mapping[str, str]) -> str | None:
    """Return a browser's token; None without a cookie of ours."""
    given = (cookies.get(COOKIE), cookies.get(FRAMED_COOKIE))
    return next((token for token in given if token and TOKEN.fullmatch(token)), None)


def owner_of(username: str | None, cookies: Mapping[str, str], by_name: bool = True) -> str | None:
    """Return the owner, "user:<name>" or "browser:<token>"; None without a login and without a cookie.

    Args:
        username: of the login; None without one.
        cookies: of the request.
        by_name: whether the login's name owns conversations; False: the browser's token does, as where everybody
            logs in with one shared key under any name.
    """
    if username and by_name:
        return f"user:{username}"
    token = browser_token(cookies)
    return f"browser:{token}" if token else None


class OwnerCookie:
    """ASGI middleware that gives each browser its token, with every HTML page.

    The token is in two cookies: one for the page in a tab of its own, one (partitioned, which browsers take from https
    and from this machine only) for the page in the frame of a notebook at another address, such as localhost.

    Args:
        app: the ASGI application.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = browser_token(HTTPConnection(scope).cookies) or secrets.token_hex(32)
        common = f"{token}; Path=/; Max-Age={COOKIE_S}; HttpOnly"
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookies = (
            f"{COOKIE}={common}; SameSite=Lax{secure}",
            f"{FRAMED_COOKIE}={common}; SameSite=None; Secure; Partitioned",
        )

        async def send_with_cookies(message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if dict(headers).get(b"content-type", b"").startswith(b"text/html"):
                    headers += [(b"set-cookie", cookie.encode()) for cookie in cookies]
                    headers.append((b"cache-control", b"no-store"))  # no cache may hand out somebody's token
                    message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_cookies)


class OwnQueue:
    """ASGI middleware that gives a session's answers, which Gradio's queue sends to whoever names the session, to the
    owner alone who asked.

    Args:
        app: the ASGI application.
        by_name: as for `owner_of`.
    """

    def __init__(self, app, by_name: bool):
        self.app, self.by_name = app, by_name

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/gradio_api/queue/data"):
            request = Request(scope)
            session, owner = request.query_params.get("session_hash"), self._owner(login_of(request), request)
            queue = request.app.get_blocks()._queue  # noqa: SLF001
            events = [event for event in queue.event_ids_to_events.values() if event.session_hash == session]
            if any(self._owner(event.username, event.request) != owner for event in events):
                await not_found(request)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _owner(self, username: str | None, request: Request) -> str | None:
        return owner_of(username, request.cookies, self.by_name)


def login_of(request: Request) -> str | None:
    """Return the name that a request to Gradio's app is logged in with, as Gradio finds it; None without a login."""
    app, cookies = request.app, request.cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.tokens.get(cookies.get(names[0]) or cookies.get(names[1]))


class Files:
    """Serves the page's files in place of Gradio: pictures to their conversation's owner, examples, and uploads as
    images or downloads, never as HTML, SVG or XML.

    Args:
        conversations: whose pictures and examples are served.
        uploads: Gradio's folder of uploads and exports.
        by_name: as for `owner_of`.
    """

    def __init__(self, conversations: Conversations, uploads: Path, by_name: bool = True):
        self.conversations, self.uploads, self.by_name = conversations, uploads, by_name

    def app_kwargs(self) -> dict:
        """Arguments of Gradio's app: these routes go before its own."""
        return {
            "routes": [
                Route("/gradio_api/file={path:path}", self.serve),
                Route("/gradio_api/file/{path:path}", self.serve),
                Route("/gradio_api/deep_link", not_found),  # it would publish what any session shows
            ],
            "middleware": [
                Middleware(SecurityHeaders),
                Middleware(OwnerCookie),
                Middleware(OwnQueue, by_name=self.by_name),
            ],
        }

    def serve(self, request: Request) -> Response:
        """Respond with a file; 404 for all that the request's owner may not see."""
        username = login_of(request)
        if request.app.auth is not None and username is None:
            return not_found(request)
        path = self._path(request.path_params["path"], owner_of(username, request.cookies, self.by_name))
        if path is None:
            return not_found(request)
        kind = IMAGE_TYPES.get(path.suffix.lower())
        return FileResponse(
            path,
            media_type=kind or "application/octet-stream",
            filename=path.name,
            content_disposition_type="inline" if kind else "attachment",
            headers={"cache-control": "private, max-age=3600"},
        )

    def _path(self, name: str, owner: str | None) -> Path | None:
        """Return an owner's picture, an example, or an upload or export, whose folder's name nobody can guess."""
        picture = file_within(self.conversations.pictures, name)
        if picture is not None:
            key = picture.relative_to(self.conversations.pictures).parts[0]
            return picture if owner is not None and self.conversations.owner(key) == owner else None
        return file_within(self.conversations.examples, name) or file_within(self.uploads, name)


def file_within(folder: Path, name: object) -> Path | None:
    """Return the path of a regular file in a folder, by its absolute name without links and dots; None for all else.

    Args:
        name: a value that somebody sent.
    """
    if not isinstance(name, str):
        return None
    try:
        path = folder.resolve() / Path(name).relative_to(folder)
        return path if path.is_file() and path == path.resolve(strict=True) else None
    except (OSError, ValueError, RuntimeError):  # missing or outside; a null byte; links in a circle
        return None


def not_found(request: Request) -> Response:
    """Respond that there is no such file, whether or not there is."""
    return PlainTextResponse("Not found", 404)
