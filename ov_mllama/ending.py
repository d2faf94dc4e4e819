"""How programs end."""

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger(__name__)

END_WITHIN_S = 1  # what was under way is cancelled then, and ends within a token


def end_soon(server) -> None:
    """Makes a `uvicorn.Server`, once told to exit, cut off what is under way: it would wait for every open page and for
    every answer to its end, minutes on the 11B. What is cut off so is nobody's fault, and not logged."""
    server.config.timeout_graceful_shutdown = END_WITHIN_S
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)


@contextlib.contextmanager
def said_plainly() -> Iterator[None]:
    """Ends the program with a sentence that names the fix where something is refused, and in silence at Ctrl-C."""
    try:
        yield
    except (OSError, ValueError, MemoryError) as refusal:
        logger.debug("Refused, or gone wrong, here:", exc_info=True)
        sys.exit(f"❌ {refusal}")
    except KeyboardInterrupt:
        sys.exit(130)
