"""Images at the URLs of a request, fetched from public addresses only."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterator

import httpx

from ov_mllama.runtime.downloads import fetch
from ov_mllama.runtime.errors import ImageError
from ov_mllama.serving.images import MAX_REQUEST_IMAGES
from ov_mllama.serving.messages import is_image, is_web_url, normalize_image
from ov_mllama.serving.protocol import ApiError

FETCH_TIMEOUT_S = 60.0  # for all images of a request, which occupies the queue meanwhile
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet: not to this machine, a private network or multicast,
    also where an IPv6 address embeds an IPv4 one."""
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
    """Return the IP addresses of a host, an empty list if it has none. Decimal, octal and short forms of addresses are
    resolved as the system does."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # clients must not learn which private names exist
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class PublicTransport(httpx.AsyncHTTPTransport):
    """HTTP transport that connects to public addresses only, checked anew at each redirect.

    The connection goes to the address that was checked, as a second look-up may return another one. The certificate is
    checked for the host name. Proxies of the environment are not used: they would resolve the name themselves.
    """

    def __init__(self):
        # a connection that is reused was checked for another name
        super().__init__(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        addresses = await resolve(host)
        if not addresses or not all(map(is_public, addresses)):
            raise httpx.ConnectError(f"{host} is not a host of the public internet")
        extensions = {**request.extensions, "sni_hostname": host}
        for address in addresses:
            url = request.url.copy_with(host=address)
            checked = httpx.Request(request.method, url, headers=request.headers, extensions=extensions)
            try:
                return await super().handle_async_request(checked)
            except httpx.ConnectError as error:
                failed = error
        raise failed


async def fetch_images(messages: list[dict], reserve: Callable[[int], None]) -> None:
    """Replace each image URL by the bytes at that address.

    Args:
        messages: of a request, not validated yet.
        reserve: called with the bytes fetched so far; may raise.
    Raises:
        ApiError: if one cannot be fetched, or they are too many or take longer than FETCH_TIMEOUT_S.
    """
    images, fetched = list(image_urls(messages)), 0
    param: str | None = None
    if len(images) > MAX_REQUEST_IMAGES:
        raise ApiError(400, f"A request takes at most {MAX_REQUEST_IMAGES} images.", "too_large", images[-1][1])
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            for image, param in images:  # noqa: B007 - errors name the field
                image["url"] = await fetch(image["url"], transport=PublicTransport(), trust_env=False)
                fetched += len(image["url"])
                reserve(fetched)
    except ImageError as error:
        raise ApiError(400, str(error)[:500], "invalid_image", param) from error
    except TimeoutError as error:
        message = f"The images did not arrive within {FETCH_TIMEOUT_S:.0f} seconds: send data URIs."
        raise ApiError(400, message, "invalid_image", param) from error


def image_urls(messages: list[dict]) -> Iterator[tuple[dict, str]]:
    """Yield each image that is given by an http(s) URL, as {"url", ...}, and the path of its field."""
    for i, message in enumerate(messages):
        parts = message.get("content") if message.get("role") == "user" else None
        for j, part in enumerate(parts if isinstance(parts, list) else []):
            if is_image(part):
                image, param = normalize_image(part, f"messages[{i}].content[{j}]")
                if is_web_url(image["url"]):
                    yield image, param
