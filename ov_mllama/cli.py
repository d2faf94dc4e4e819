"""Shared by the commands: errors without a traceback, consoles of any encoding, prompt shutdown."""

import argparse
import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from ov_mllama.runtime.errors import InputError, UserError

logger = logging.getLogger("ov_mllama")

SHUTDOWN_TIMEOUT_S = 1
YES: dict = {
    "action": "store_true",
    "help": "go on where memory or disk is short; default: ask on a terminal, else stop",
}
IMAGE_STORE_MB = 2000  # default; 9 images of four tiles of the 11B
EXTRAS = {  # package -> extra that installs it
    **dict.fromkeys(("gradio", "starlette", "llguidance"), "chat"),
    **dict.fromkeys(("fastapi", "uvicorn", "openai", "ray", "pydantic"), "serve"),
}


def shutdown_promptly(server) -> None:
    """Make a `uvicorn.Server` cancel running requests on exit. By default it waits for open pages and for answers,
    minutes on the 11B. Errors caused by the cancellation are not logged."""
    server.config.timeout_graceful_shutdown = SHUTDOWN_TIMEOUT_S
    logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)


class StdoutHandler(logging.Handler):
    """Log messages as lines of `sys.stdout` as it is at that moment: notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write and flush one line."""
        sys.stdout.write(self.format(record) + "\n")
        sys.stdout.flush()


def show_log(level: int = logging.INFO) -> StdoutHandler:
    """Show the package's log on stdout, and return the handler that does; there is never more than one."""
    handler = next((each for each in logger.handlers if isinstance(each, StdoutHandler)), None) or StdoutHandler()
    logger.addHandler(handler)
    logger.setLevel(level)
    return handler


def configure_console(verbose: bool = False) -> None:
    """Show other packages' log and one-line warnings on stderr, and replace characters that the console's encoding
    lacks, such as a Windows code page."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not verbose:
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    stderr = logging.StreamHandler()
    stderr.addFilter(lambda record: not record.name.startswith(logger.name))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[stderr])


def megabytes(text: str) -> int:
    """Parse a command-line argument that is a size in MB, 0 included."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def root_path(text: str) -> str:
    """Return the path at which a proxy serves this program, "/a/b" or "" for none; one with a scheme and a host, as
    Gradio accepts it, is returned without a trailing slash.

    Raises:
        InputError: if it has other characters than a path.
    """
    text = text.strip().rstrip("/")
    if not re.fullmatch(r"(https?://[\w.:\[\]-]+)?[\w.~%@/-]*", text, re.ASCII):
        raise InputError(f"{text!r} is no path of a proxy: give one such as /proxy/7860.")
    return text if not text or text.startswith(("/", "http://", "https://")) else f"/{text}"


def user_path(text: str) -> Path:
    """Parse a command-line argument that is a path; `~` is expanded within quotes too, as in the Makefile."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text} is in the home folder of an unknown user") from error


def confirm(question: str = "Go on all the same? [y/N] ") -> bool:
    """Return whether the user confirms a question; False without a terminal."""
    if not (sys.stdin and sys.stdin.isatty()):
        return False
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


@contextlib.contextmanager
def exit_on_user_error(verbose: bool = False) -> Iterator[None]:
    """Show the log on stdout. Exit with the message alone after an error that the user can fix, and silently on Ctrl-C.

    Args:
        verbose: log the traceback too.
    """
    configure_console(verbose)
    handler = show_log(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        sys.exit(f'❌ {error.name} is not installed: pip install ".[{extra}]" in the project\'s folder')
    except (UserError, OSError, MemoryError) as error:
        logger.debug("Raised here:", exc_info=True)
        sys.exit(f"❌ {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        logger.removeHandler(handler)
