"""Programs that tests start, interrupt and kill. Each is forked from a process that has imported the package with its
page and its server, or only what the package builds on: a start then costs no seconds of imports. Also ports that no
other worker of pytest-xdist uses."""

import http.server
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ROOT

# Reads requests from stdin: a program to start, whose number is answered, or the number of one, whose status is
NURSERY = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
gc.freeze()  # programs then share its memory
gc.enable()
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        pid, status = os.waitpid(asked, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    elif answer := os.fork():
        pass
    else:
        break
    print(json.dumps(answer), file=answers, flush=True)
else:
    os._exit(0)  # as pytest ends
answers.close()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(output, 1)
os.dup2(output, 2)
os.environ.clear()
os.environ.update(asked["environment"])
os.chdir(asked["folder"])
sys.argv = ["program", *asked["arguments"]]
signal.signal(signal.SIGINT, signal.default_int_handler)
exec(asked["code"], {"__name__": "__main__"})
"""
PACKAGE = (
    "gradio, chat_page, ov_mllama.__main__, ov_mllama.chat.layout, ov_mllama.serving.app, "
    "ov_mllama.export.calibration, ov_mllama_compression"
)
# nothing of the package, nor of what running a model must not need
FOUNDATIONS = (
    "torch, openvino, transformers.models.mllama.modeling_mllama, transformers.models.mllama.processing_mllama"
)


class Program:
    """A program under way, as `subprocess.Popen` has it.

    Attributes:
        returncode: None while it runs; negative where a signal ended it.
    """

    def __init__(self, nursery: "Nursery", request: dict):
        self.nursery, self.output, self.returncode = nursery, Path(request["output"]), None
        self.pid = nursery.ask(request)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.nursery.ask(self.pid)
        return self.returncode

    def wait(self, seconds: float = 60) -> int:
        from chat_page import wait_until  # it imports for seconds, and the nursery may start before

        wait_until(lambda: self.poll() is not None, seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def said(self) -> str:
        """Its output so far."""
        return self.output.read_text(encoding="utf-8")


class Nursery:
    """The process that programs are forked from.

    Args:
        imports: modules that it imports, and each program finds imported.
        path: folders besides installed packages that programs import from.
    """

    def __init__(self, imports: str = PACKAGE, path: tuple[Path, ...] = (ROOT, ROOT / "tests")):
        self.environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-c", f"import gc; gc.disable()\nimport {imports}\n{NURSERY}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict | int) -> int | None:
        self.process.stdin.write(f"{json.dumps(request)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder: Path, code: str, *arguments, **environment: str | None) -> Program:
        """Start a program.

        Args:
            folder: for its output.
            code: that it runs.
            environment: variables that differ from those of the tests; None takes one away.
        """
        variables = {**self.environment, **environment}
        output = folder / f"program-{random.randrange(10**9)}.txt"  # noqa: S311
        output.touch()  # read at any time, also before the program opens it
        request = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": {name: value for name, value in variables.items() if value is not None},
            "output": str(output),
            "folder": str(ROOT),
        }
        return Program(self, request)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


ALONE = """
import os, sys
sys.dont_write_bytecode = True
folder, path, code = sys.argv[1:4]
del sys.argv[1:4]
os.chdir(folder)
sys.path.insert(0, path)
exec(code, {"__name__": "__main__"})
"""


def run_alone(nursery: Nursery, output: Path, folder: Path, path: Path, code: str, *arguments, **environment) -> str:
    """Run a program with no environment but `environment`, and return what it printed, standard output last.

    Args:
        output: folder for its output.
        folder: that it runs in.
        path: that it imports from, before installed packages.
    """
    environment = dict.fromkeys(nursery.environment) | {"CI": "true", "PATH": ""} | environment
    program = nursery.start(output, ALONE, folder, path, code, *arguments, **environment)
    assert program.wait(600) == 0, program.said()
    return program.said()


def free_port() -> int:
    """A port below those that the system gives out, so that none is taken before a program listens there; each worker
    of pytest-xdist has its own."""
    first = 20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.sample(range(first, first + 1000), 1000):
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


# ---- Behind a proxy -------------------------------------------------------------------------------------------------

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")


@contextmanager
def refusing_proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that can reach nothing, and the lines of the requests that it got."""
    asked = []

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.requestline)
            self.send_error(503)

        do_POST = do_HEAD = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *given):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", asked
        server.shutdown()


def environment_behind(address: str, home) -> dict[str, str]:
    """The environment of a company's machine: proxies in both spellings, and no `no_proxy`."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    proxies = {spelling: address for name in PROXY_VARIABLES for spelling in (name, name.upper())}
    return {**kept, **proxies, "CI": "true", "XDG_DATA_HOME": str(home)}
