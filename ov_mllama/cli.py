"""Errors without a traceback, a console of any encoding, prompt shutdown: what the commands share."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from ov_mllama.runtime.errors import UserError

logger = logging.getLogger("ov_mllama")

SHUTDOWN_TIMEOUT_S = 1
EXTRAS = {  # packages that an extra of `pip install` brings
    **dict.fromkeys(("gradio", "starlette", "platformdirs"), "chat"),
    **dict.fromkeys(("fastapi", "uvicorn", "openai", "llguidance", "ray", "pydantic", "pyarrow"), "serve"),
}


def shutdown_promptly(server) -> None:
    """Make a `uvicorn.Server` cancel what is running once it is told to exit. By default it waits for every open page
    and for every answer to end, minutes on the 11B. Errors that come of the cancellation are not logged."""
    server.config.timeout_graceful_shutdown = SHUTDOWN_TIMEOUT_S
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)


def configure_console(verbose: bool = False) -> None:
    """Show the package's log on stderr, and replace characters that the console's encoding lacks, such as a Windows
    code page's, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


@contextlib.contextmanager
def exit_on_user_error(verbose: bool = False) -> Iterator[None]:
    """Exit with the error's message alone if a command fails for a reason that its user can mend, and silently on
    Ctrl-C.

    Args:
        verbose: log the traceback too.
    """
    configure_console(verbose)
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        sys.exit(f"❌ {error.name} is not installed: pip install 'ov-mllama[{extra}]'")
    except (UserError, OSError) as error:
        logger.debug("Raised here:", exc_info=True)
        sys.exit(f"❌ {error}")
    except KeyboardInterrupt:
        sys.exit(130)
