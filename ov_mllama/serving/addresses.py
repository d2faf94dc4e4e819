"""Images at addresses that clients name, fetched from public hosts only."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterator

import httpx

from ov_mllama.runtime.images import PictureError, fetch
from ov_mllama.serving.protocol import MAX_IMAGES, ApiError

FETCH_S = 60.0  # for all images of a request, which holds a place
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not of this machine, its networks, or multicast, nor an IPv6
    address that stands for such an IPv4 one."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if not embedded and (ip in NAT64 or int(ip) < 1 << 32):  # the latter are "IPv4-compatible"
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded:
            return is_public(str(embedded))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(host: str) -> list[str]:
    """The IP addresses of a host, none if it has none; of decimal, octal and short forms too, as the system reads
    them."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # a client need not know which names there are here
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


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
            raise httpx.ConnectError(f"{host} is no host of the public internet")
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
        ApiError: if one cannot be fetched, they are too many, or take longer than FETCH_S.
    """
    found, fetched, where = list(addressed(messages)), 0, None
    if len(found) > MAX_IMAGES:
        raise ApiError(400, f"A request has at most {MAX_IMAGES} pictures.", "too_large", found[-1][1])
    try:
        async with asyncio.timeout(FETCH_S):
            for image, field in found:
                where = field
                image["url"] = await fetch(image["url"], transport=PublicTransport(), trust_env=False)
                fetched += len(image["url"])
                hold(fetched)
    except PictureError as error:
        raise ApiError(400, str(error)[:500], "invalid_image", where) from error
    except TimeoutError as error:
        sentence = f"The pictures did not arrive within {FETCH_S:.0f} seconds: send data URIs."
        raise ApiError(400, sentence, "invalid_image", where) from error


def addressed(messages: list[dict]) -> Iterator[tuple[dict, str]]:
    """Each image that is given by an address, as {"url", ...}, and the field that holds it."""
    for i, message in enumerate(messages):
        parts = message.get("content") if message.get("role") == "user" else None
        for j, part in enumerate(parts if isinstance(parts, list) else []):
            if not isinstance(part, dict) or part.get("type") != "image_url":
                continue
            if isinstance(part.get("image_url"), str):
                part["image_url"] = {"url": part["image_url"]}
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else None
            if isinstance(image, dict) and isinstance(url, str) and url.startswith(("http://", "https://")):
                yield image, f"messages[{i}].content[{j}].image_url"
