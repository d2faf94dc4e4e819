"""Who may ask: hosts, keys; and errors, none of which says more than it should."""

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from ov_mllama.serving.protocol import ApiError, failure

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/\\\s]+)(:\d*)?", re.ASCII | re.IGNORECASE)


def error_response(refusal: ApiError) -> JSONResponse:
    """A refusal in OpenAI's form."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


# ---- Hosts ----------------------------------------------------------------------------------------------------------


def host_name(header: str) -> str | None:
    """The name in a Host header, or in a setting: in lower case, without its port, brackets and last dot; None if it is
    none."""
    match = HOST.fullmatch(header.strip())
    return match[1].strip("[]").lower().removesuffix(".") or None if match else None


def is_ip(name: str) -> bool:
    """Whether a host is named by its IP address."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class TrustedHosts:
    """ASGI middleware that refuses requests to other host names. A web page may let its own name point here and make
    its reader's browser ask (DNS rebinding); the browser then says that name. IP addresses cannot be pointed elsewhere,
    and localhost is this machine: they are allowed.

    Args:
        names: that are allowed too, "*" for any.
    """

    def __init__(self, app, names: Sequence[str] = ()):
        self.app, self.any = app, "*" in names
        self.names = {"localhost", *filter(None, map(host_name, names))}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket") and not self._allows(scope["headers"]):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            sentence = "This server is not known by that host name: start it with --trusted-hosts NAME to allow it."
            await error_response(ApiError(403, sentence, "host_not_trusted"))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        return self.any or (name is not None and (name in self.names or is_ip(name)))


# ---- Errors ---------------------------------------------------------------------------------------------------------


class Failures:
    """ASGI middleware that answers unexpected errors with a sentence of no content, see `protocol.failure`."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        started = False

        async def noting(message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            if scope["type"] != "http":
                raise
            refusal = failure(error)
            if started:
                raise  # what is cut must not look whole
            await error_response(refusal)(scope, receive, send)


# ---- Keys -----------------------------------------------------------------------------------------------------------


def keys_match(given: str, key: str) -> bool:
    """Whether a key is right, in a time that does not say how much of it is. An empty one never is."""
    return bool(key) and secrets.compare_digest(given.encode("utf-8", "replace"), key.encode())


def check_key(authorization: str, key: str | None) -> None:
    """Check a request's header, "Bearer KEY".

    Args:
        key: the right one; None asks for none.
    Raises:
        ApiError: another, or none.
    """
    scheme, _, given = authorization.strip().partition(" ")
    given = given.strip().encode("latin-1", "replace").decode("utf-8", "replace")  # as headers are read, and written
    if key is not None and not (scheme.lower() == "bearer" and keys_match(given, key)):
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, "Incorrect API key provided.", "invalid_api_key", headers=headers)


def key_from(key: str | None, file: Path | None) -> str | None:
    """The key of the command line, else of a file, else of OV_MLLAMA_KEY in the environment; None if none is set.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the key is empty or has more than one line.
    """
    source, text = "--key", key
    if text is None and file:
        source, text = f"The file {file}", file.read_text(encoding="utf-8-sig")
    elif text is None:
        source, text = "OV_MLLAMA_KEY", os.environ.get("OV_MLLAMA_KEY")
    if text is None:
        return None
    text = text.strip()
    if not text or len(text.splitlines()) > 1:
        raise ValueError(f"{source} holds no key: give it one line, or leave it out.")
    return text


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def warnings_for(host: str, key: str | None, in_process_list: bool) -> list[str]:
    """Sentences about what others can see or reach.

    Args:
        host: that the server listens at.
        in_process_list: whether the key was given by --key.
    """
    warned = []
    if not key and not is_loopback(host):
        warned.append(f"whoever reaches {host} may ask: set a key with --key-file or OV_MLLAMA_KEY.")
    if in_process_list:
        warned.append("all users of this machine see --key in its list of processes: use --key-file or OV_MLLAMA_KEY.")
    return warned
