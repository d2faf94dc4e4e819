"""Images at addresses that clients name, fetched from public hosts only."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import httpx

from ov_mllama.images import PictureError, fetch
from serving.questions import Refusal

NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not of this machine, its networks, or multicast, nor an IPv6 address
    that stands for such an IPv4 one."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if not embedded and (ip in NAT64 or int(ip) < 1 << 32):  # the latter are "IPv4-compatible"
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded:
            return is_public(str(embedded))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(host: str) -> list[str]:
    """The IP addresses of a host; of decimal, octal and short forms too, as the system reads them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(address[0] for *_, address in found))


class PublicTransport(httpx.AsyncHTTPTransport):
    """Connects to public addresses only, at each redirect anew, and to those that were checked: a name that is resolved
    twice may have another address the second time. The certificate is checked for the name. Proxies of the environment
    are not used: they would resolve the name themselves.
    """

    def __init__(self):
        # a connection that is kept was checked for another name
        super().__init__(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        addresses = await resolve(host)
        if not addresses or not all(map(is_public, addresses)):
            raise httpx.ConnectError(f"{host} is not on the public internet")
        extensions = {**request.extensions, "sni_hostname": host}
        for address in addresses:
            url = request.url.copy_with(host=address)
            checked = httpx.Request(request.method, url, headers=request.headers, extensions=extensions)
            try:
                return await super().handle_async_request(checked)
            except httpx.ConnectError as error:
                failed = error
        raise failed


async def fetch_images(messages: list[dict], hold: Callable[[int], None]) -> None:
    """Replaces each address of an image by the bytes that are there.

    Args:
        messages: of a request, not checked yet.
        hold: told the bytes of all that were fetched; raises where those are too many.
    Raises:
        Refusal: if one cannot be fetched.
    """
    fetched = 0
    for i, message in enumerate(messages):
        parts = message.get("content") if message.get("role") == "user" else None
        for j, part in enumerate(parts if isinstance(parts, list) else []):
            given = part.get("image_url") if isinstance(part, dict) and part.get("type") == "image_url" else None
            given = {"url": given} if isinstance(given, str) else given
            url = given.get("url") if isinstance(given, dict) else None
            if not isinstance(url, str) or not url.startswith(("http://", "https://")):
                continue
            where = f"messages[{i}].content[{j}].image_url"
            try:
                content = await fetch(url, transport=PublicTransport(), trust_env=False)
            except PictureError as error:
                raise Refusal(400, str(error)[:500], "invalid_image", where) from error
            part["image_url"] = {**given, "url": content}
            fetched += len(content)
            hold(fetched)
