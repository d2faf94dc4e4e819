"""A server that plays the Hugging Face hub for folders on this disk: model info, file trees, files and their parts."""

import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The hub's state.

    Attributes:
        folders: by repository's name.
        gated: names of repositories whose files are refused.
        sent: bytes of files sent, by suffix.
        parts: whether files are sent in parts.
    """

    def __init__(self):
        self.folders: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.sent: Counter = Counter()
        self.parts = True

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict, bytes]:
        """Return status, headers and body of a GET."""
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?(/tree/\w+)?", path):
            name, _, tree = match.groups()
            if name not in self.folders:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps(self.tree(name) if tree else info(name)).encode(),
            )
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(?:main|" + COMMIT + r")/(.+)", path)
        name, file = match.groups() if match else ("", "")
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": COMMIT}, b""
        if not (name in self.folders and (self.folders[name] / file).is_file()):
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        data = (self.folders[name] / file).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if wanted and self.parts:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            return 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}, data[start : end + 1]
        return 200, headers, data

    def tree(self, name: str) -> list[dict]:
        """Return the listing of a repository's files."""
        files = sorted(path for path in self.folders[name].rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(self.folders[name]).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),  # noqa: S324
            }
            for path in files
        ]


def info(name: str) -> dict:
    """Return what the hub tells of a repository."""
    return {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": []}


@contextmanager
def serving(hub: Hub, monkeypatch, cache: Path):
    """Serve a hub on this machine, and have huggingface_hub request it, with an empty cache."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):  # noqa: N802
            path = self.path.split("?")[0]
            status, headers, body = hub.answer(path, self.headers.get("Range"))
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                if "/resolve/" in path:
                    hub.sent[Path(path).suffix] += len(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("ov_mllama.export.prepare.HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
