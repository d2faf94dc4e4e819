"""Owners of conversations: the user or browser behind a request, and the files that it may read.

A user is identified by the login (`auth`), a browser by a random token in an HttpOnly cookie. Pages send neither.
"""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from ov_mllama.chat.http_headers import SecurityHeaders
from ov_mllama.chat.store import Conversations

COOKIE, FRAMED_COOKIE = "ov_mllama", "ov_mllama_framed"
TOKEN = re.compile("[0-9a-f]{64}")
MAX_SESSIONS = 10_000  # of Gradio's queue, whose owners are remembered
COOKIE_S = 400 * 24 * 60 * 60  # the longest that browsers accept; renewed by every load of the page
# Gradio's routes that the page does not use: deep links publish any session's content, others fetch, run or write
UNUSED = tuple(
    f"/{name}{rest}"
    for name in (
        *("gradio_api/component_server", "gradio_api/custom_component", "gradio_api/deep_link", "gradio_api/dev"),
        *("gradio_api/process_recording", "gradio_api/profiling", "gradio_api/run-history", "gradio_api/runs"),
        *("gradio_api/stream", "gradio_api/undo-vibe-edit", "gradio_api/vibe-code", "gradio_api/vibe-edit"),
        *("gradio_api/vibe-starter-queries", "monitoring"),
    )
    for rest in ("", "/{path:path}")
) + ("/gradio_api/proxy={path:path}",)
# types of uploads that are served inline; others are attachments
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
    """Return a browser's token; None without a valid cookie."""
    given = (cookies.get(COOKIE), cookies.get(FRAMED_COOKIE))
    return next((token for token in given if token and TOKEN.fullmatch(token)), None)


def owner_of(username: str | None, cookies: Mapping[str, str], by_name: bool = True) -> str | None:
    """Return the owner, "user:<name>" or "browser:<token>"; None without a login and without a cookie.

    Args:
        username: of the login; None without one.
        cookies: of the request.
        by_name: whether the login's name is the owner; False: the browser's token, as with one shared key and any name.
    """
    if username and by_name:
        return f"user:{username}"
    token = browser_token(cookies)
    return f"browser:{token}" if token else None


class OwnerCookie:
    """ASGI middleware that sets each browser's token, with every HTML page.

    Two cookies hold it: one for the page in its own tab, one (partitioned, accepted over https and from this machine
    only) for the page in a notebook's frame at another address, such as localhost.

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
        # of all paths, also behind a proxy: its path may have the port in it, which changes
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
                    headers.append((b"cache-control", b"no-store"))  # caches must not share tokens
                    message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_cookies)


class SameOrigin:
    """ASGI middleware that rejects requests which pages of other origins send with a browser's cookies.

    Cookies ignore ports, so SameSite does not stop another user's page on this machine, and Gradio allows all scripts
    of localhost to read responses. Browsers send the origin of a request; programs send none and pass.

    Args:
        app: the ASGI application.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and is_cross_origin(scope["method"], HTTPConnection(scope).headers):
            response = PlainTextResponse("Cross-origin requests are rejected.", 403)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)


def is_cross_origin(method: str, headers: Mapping[str, str]) -> bool:
    """Return whether a page of another origin has sent a request, other than by a link."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None and method in ("GET", "HEAD"):
        return False
    if site is not None:  # over https and on this machine; valid behind a proxy that changes Host
        return site not in ("same-origin", "none")
    hosts = (headers.get("host"), headers.get("x-forwarded-host"))  # scripts cannot set them
    return origin is not None and origin.partition("://")[2] not in hosts


class OwnQueue:
    """ASGI middleware that restricts a queue session's results to its owner (`record_queue_owners`). Gradio sends them
    to anyone who names the session or one of its events.

    Args:
        app: the ASGI application.
    """

    PATHS = re.compile(r"/gradio_api/(queue/data|call/(?:v2/)?[^/]+/(?P<event>[^/]+))/?$")

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        match = self.PATHS.search(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if match:
            request = Request(scope)
            queue = request.app.get_blocks()._queue  # noqa: SLF001
            session = match["event"] or request.query_params.get("session_hash")
            session = queue.sessions.get(session, session)
            owner = (login_of(request), browser_token(request.cookies))
            if queue.owners.get(session, owner) != owner:
                await not_found(request)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def record_queue_owners(queue) -> None:
    """Make Gradio's queue record the owner of each session, and reject events of others in it.

    The queue gets `owners`, login and browser token by session, and `sessions`, by event; the oldest are dropped.
    """
    queue.owners, queue.sessions, push = {}, {}, queue.push

    async def push_as_owner(body, request: Request, username: str | None):
        owner = (username, browser_token(request.cookies))
        if queue.owners.get(body.session_hash, owner) != owner:
            return False, "This session is another browser's.", "error"
        if body.session_hash:  # before the push, which may send the result at once
            queue.owners[body.session_hash] = owner
        success, event, state = await push(body=body, request=request, username=username)
        if success:
            session = queue.sessions[event] = body.session_hash or event
            queue.owners[session] = owner
        for recorded in (queue.owners, queue.sessions):
            while len(recorded) > MAX_SESSIONS:
                del recorded[next(iter(recorded))]
        return success, event, state

    queue.push = push_as_owner


def login_of(request: Request) -> str | None:
    """Return the user name of a request to Gradio's app; None without a login."""
    app, cookies = request.app, request.cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.tokens.get(cookies.get(names[0]) or cookies.get(names[1]))


class Files:
    """Routes that replace Gradio's for files: images of conversations for their owner only, examples, and uploads as
    images or attachments, never as HTML, SVG or XML.

    Args:
        conversations: store of images and examples.
        uploads: Gradio's folder of uploads and exports.
        by_name: as for `owner_of`.
    """

    def __init__(self, conversations: Conversations, uploads: Path, by_name: bool = True):
        self.conversations, self.uploads, self.by_name = conversations, uploads, by_name

    def app_kwargs(self) -> dict:
        """Return arguments for Gradio's app; these routes precede its own."""
        return {
            "routes": [
                Route("/gradio_api/file={path:path}", self.serve),
                Route("/gradio_api/file/{path:path}", self.serve),
                *(Route(path, not_found, methods=["GET", "POST"]) for path in UNUSED),
            ],
            "middleware": [
                Middleware(SecurityHeaders),
                Middleware(SameOrigin),
                Middleware(OwnerCookie),
                Middleware(OwnQueue),
            ],
        }

    def serve(self, request: Request) -> Response:
        """Respond with a file; 404 if the request's owner may not read it."""
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
        """Return an owner's image, an example, or an upload or export, whose folder's name is a digest."""
        picture = file_within(self.conversations.pictures, name)
        if picture is not None:
            key = picture.relative_to(self.conversations.pictures).parts[0]
            return picture if owner is not None and self.conversations.owner(key) == owner else None
        return file_within(self.conversations.examples, name) or file_within(self.uploads, name)


def file_within(folder: Path, name: object) -> Path | None:
    """Return the path of a regular file in a folder, by its absolute name without links and dots; else None.

    Args:
        name: an untrusted value.
    """
    if not isinstance(name, str):
        return None
    try:
        path = folder.resolve() / Path(name).relative_to(folder)
        return path if path.is_file() and path == path.resolve(strict=True) else None
    except (OSError, ValueError, RuntimeError):  # missing or outside; a null byte; circular links
        return None


def not_found(request: Request) -> Response:
    """Respond with 404, which does not disclose whether a file exists."""
    return PlainTextResponse("Not found", 404)
