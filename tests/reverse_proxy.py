"""A reverse proxy that serves a program below a path, as nginx does with `proxy_pass http://127.0.0.1:7860/`."""

import contextlib
from collections.abc import Iterator

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from openai_client import served

UNSENT = ("content-length", "transfer-encoding", "connection", "content-encoding")


@contextlib.contextmanager
def proxied(path: str, target: str, strips: bool = True, **headers: str) -> Iterator[str]:
    """The address of the program behind the proxy, while it is there; other paths than this one are missing.

    Args:
        target: the program's address.
        strips: the path from requests.
        headers: sent with each request besides its own.
    """
    client = httpx.AsyncClient(base_url=target, timeout=60, verify=False, trust_env=False)  # noqa: S501

    async def forward(request: Request) -> Response:
        rest = request.url.path.removeprefix(path) if strips else request.url.path
        given = {name: value for name, value in request.headers.items() if name not in UNSENT}
        url = httpx.URL(path=rest or "/", query=request.url.query.encode())
        sent = client.build_request(request.method, url, headers={**given, **headers}, content=await request.body())
        try:
            answer = await client.send(sent, stream=True)
        except httpx.TransportError:
            return PlainTextResponse("gone", 502)
        response = StreamingResponse(answer.aiter_bytes(), answer.status_code)
        response.raw_headers = [pair for pair in answer.headers.raw if pair[0].decode().lower() not in UNSENT]
        return response

    methods = ["GET", "HEAD", "POST", "DELETE"]
    app = Starlette(routes=[Route(path + "{rest:path}", forward, methods=methods)])
    with served(app) as url:
        yield url + path + "/"
