"""Shared by the commands: errors without a traceback, consoles of any encoding, prompt shutdown."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

logger = logging.getLogger("ov_mllama")

SHUTDOWN_TIMEOUT_S = 1
EXTRAS = {  # package -> extra that installs it
    **dict.fromkeys(("gradio", "starlette", "platformdirs"), "chat"),
    **dict.fromkeys(("fastapi", "uvicorn", "openai", "llguidance", "ray", "pydantic", "pyarrow"), "serve"),
}


def shutdown_promptly(server) -> None:
    """Make a `uvicorn.Server` cancel running requests on exit. By default it waits for open pages and for answers,
    minutes on the 11B. Errors caused by the cancellation are not logged."""
    server.config.timeout_graceful_shutdown = SHUTDOWN_TIMEOUT_S
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)


def configure_console(verbose: bool = False) -> None:
    """Set up logging and one-line warnings on stderr, and replace characters that the console's encoding lacks, such as
    a Windows code page."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not verbose:
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)


@contextlib.contextmanager
def exit_on_user_error(verbose: bool = False) -> Iterator[None]:
    """Exit with the message alone after an error that the user can fix, and silently on Ctrl-C.

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
    except (OSError, ValueError, MemoryError) as error:
        logger.debug("Raised here:", exc_info=True)
        sys.exit(f"❌ {error}")
    except KeyboardInterrupt:
        sys.exit(130)
