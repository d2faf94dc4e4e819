"""Downloads of images by their URL."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx

from .errors import ImageError

MAX_BYTES = 50_000_000  # of a download
SECONDS = 30  # of a download, in total


def download(url: str) -> bytes:
    """Run `fetch` in a thread, as Jupyter's has a running event loop."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, fetch(url)).result()


async def fetch(url: str, **client) -> bytes:
    """Download a file, its certificate checked, of at most MAX_BYTES and within SECONDS.

    Args:
        client: options of `httpx.AsyncClient`, such as a restricted `transport`.
    Raises:
        ImageError: if there is no such file, or it is late, too large, or a web page.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ImageError(f"{url} is no URL of an image: give one that begins with https://, or a path.")
    content = bytearray()
    try:
        async with (
            asyncio.timeout(SECONDS),
            httpx.AsyncClient(follow_redirects=True, timeout=SECONDS, **client) as opened,
            opened.stream("GET", url) as response,
        ):
            response.raise_for_status()
            kind = response.headers.get("content-type", "")
            if kind.startswith("text/"):
                raise ImageError(f"{url} is a page ({kind.split(';')[0]}), no image: give the image's own URL.")
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ImageError(f"{url} has more than {MAX_BYTES // 1_000_000} MB: save it and make it smaller.")
    except ImageError:
        raise
    except TimeoutError as error:
        raise ImageError(f"{url} did not arrive within {SECONDS} seconds: try again, or save it first.") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ImageError(f"{url} could not be fetched ({error or type(error).__name__}).") from error
    return bytes(content)
