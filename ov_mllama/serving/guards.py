"""Access control: host names and keys; and responses to errors, without details of the inside."""

import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Scope

from ov_mllama.runtime.errors import InputError
from ov_mllama.serving.protocol import ApiError, internal_error

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/\\\s]+)(:\d*)?", re.ASCII | re.IGNORECASE)


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """Return an error in the format of the API that a request is for: Ollama's below /api/, else OpenAI's."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    body = {"error": str(error)} if path.startswith("/api/") else error.body
    return JSONResponse(body, error.status, error.headers)


# ---- Hosts ----------------------------------------------------------------------------------------------------------


def host_name(header: str) -> str | None:
    """Return the name in a Host header or setting, in lower case, without port, brackets and final dot; None if it is
    invalid."""
    match = HOST.fullmatch(header.strip())
    return match[1].strip("[]").lower().removesuffix(".") or None if match else None


def is_ip(name: str) -> bool:
    """Return whether a host name is an IP address."""
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class TrustedHosts:
    """ASGI middleware that rejects requests to other host names.

    A web page can point its own name at this server and make its reader's browser send requests (DNS rebinding), which
    then carry that name. IP addresses and localhost cannot be pointed elsewhere: they are allowed.

    Args:
        names: other names that are allowed, "*" for any.
    """

    def __init__(self, app, names: Sequence[str] = ()):
        self.app, self.any = app, "*" in names
        self.names = {"localhost", *filter(None, map(host_name, names))}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket") and not self._allows(scope["headers"]):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            message = "This host name is not trusted: start the server with --trusted-hosts NAME to allow it."
            await error_response(ApiError(403, message, "host_not_trusted"), scope)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        return self.any or (name is not None and (name in self.names or is_ip(name)))


# ---- Errors ---------------------------------------------------------------------------------------------------------


class InternalErrors:
    """ASGI middleware that responds to unexpected errors, see `protocol.internal_error`."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        started = False

        async def send_and_note(message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            pass
        except Exception as error:
            if scope["type"] != "http":
                raise
            api_error = internal_error(error)
            if started:
                raise  # closes the connection: a truncated response must not look complete
            await error_response(api_error, scope)(scope, receive, send)


# ---- Keys -----------------------------------------------------------------------------------------------------------


def keys_match(given: str, key: str) -> bool:
    """Return whether two keys are equal, in a time that does not depend on where they differ. Empty keys never are."""
    return bool(key) and secrets.compare_digest(given.encode("utf-8", "replace"), key.encode())


def check_key(authorization: str, key: str | None) -> None:
    """Check a request's Authorization header, "Bearer KEY".

    Args:
        key: the server's; None allows all requests.
    Raises:
        ApiError: if the key is wrong or missing.
    """
    scheme, _, given = authorization.strip().partition(" ")
    given = given.strip().encode("latin-1", "replace").decode("utf-8", "replace")  # headers are read as latin-1
    if key is not None and not (scheme.lower() == "bearer" and keys_match(given, key)):
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, "Incorrect API key provided.", "invalid_api_key", headers=headers)


def key_from(key: str | None, file: Path | None) -> str | None:
    """Return the key of the command line, else of a file, else of the environment variable OV_MLLAMA_KEY, else None.

    Raises:
        OSError: if the file cannot be read.
        InputError: if the key is empty or has more than one line.
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
        raise InputError(f"{source} holds no key: give it one line, or leave it out.")
    return text


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def warnings_for(host: str, key: str | None, in_process_list: bool) -> list[str]:
    """Return warnings about what others can see or reach.

    Args:
        host: address that the server listens at.
        in_process_list: whether the key was given by --key.
    """
    warnings = []
    if not key and not is_loopback(host):
        warnings.append(f"Everyone who reaches {host} can send requests: set a key with --key-file or OV_MLLAMA_KEY.")
    if in_process_list:
        warnings.append("All users of this machine see --key in the process list: use --key-file or OV_MLLAMA_KEY.")
    return warnings
