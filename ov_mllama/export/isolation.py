"""A function in a process of its own: its memory can be measured, and is returned to the system when it ends."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ov_mllama.export.costs import duration
from ov_mllama.runtime.errors import UserError

SILENCE_TIMEOUT_S = 1800  # without progress; a 90B's PyTorch original reads 180 GB for one image


def run_in_process(function: Callable, *arguments: Any, on_progress: Callable[[int], object], preload: str) -> Any:
    """Return `function(*arguments, report)`, run in a new process, where `report(count)` calls `on_progress(count)`.

    Args:
        function: that a new process can import, like its arguments' types.
        preload: module imported once for all processes, where the system can fork.
    Raises:
        UserError: if the process ends without a result, or reports nothing for SILENCE_TIMEOUT_S.
        Exception: as `function`.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([preload])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # the process alone holds it: when it dies, `recv` raises EOFError
    try:
        while receiver.poll(SILENCE_TIMEOUT_S):
            kind, value = receiver.recv()
            if kind == "result":
                return value
            if kind == "error":
                raise value
            on_progress(value)
        raise UserError(
            f"A measurement made no progress for {duration(SILENCE_TIMEOUT_S)}: close other programs and run it again."
        )
    except EOFError as error:
        process.join()
        raise UserError(
            f"A measurement's process ended with exit code {process.exitcode}, perhaps for lack of memory: close other "
            "programs, or measure fewer variants."
        ) from error
    finally:
        process.kill()
        process.join()


def _run(sender: Connection, function: Callable, arguments: tuple) -> None:
    try:
        sender.send(("result", function(*arguments, lambda count: sender.send(("progress", count)))))
    except Exception as error:  # noqa: BLE001, raised in the parent
        sender.send(("error", error))
