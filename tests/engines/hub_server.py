"""A server that speaks as much of the protocol of the model hub as a download needs, with scripted interruptions."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["COMMIT", "HubServer", "serve_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """What the hub has, what it was asked, and what it does wrong.

    Attributes:
        url: what ``HF_ENDPOINT`` is to be.
        files: the content of each file, by its repository and its path there.
        requests: method, path and ``Range`` of each request.
        keys: the ``Authorization`` of each request.
        break_after: a download breaks off after so many bytes; ``None``: it does not.
        hold_after: a download stands still after so many bytes, until ``released`` is set.
        status: what every request is answered with, if not what is right.
        error_code: the hub's own code of such an answer.
        wrong: what the hub says about a file is not its content.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.keys: list[str | None] = []
        self.break_after: int | None = None
        self.hold_after: int | None = None
        self.held, self.released = threading.Event(), threading.Event()
        self.status = 200
        self.error_code = ""
        self.wrong = False

    @property
    def ranges(self) -> list[str | None]:
        """The ranges of all downloads."""
        return [found for method, path, found in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.keys.append(self.headers.get("Authorization"))
        if hub.status != 200:
            self.send(hub.status, b"", {"X-Error-Code": hub.error_code, "X-Error-Message": "no"})
        elif path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.describe(repo, revision)
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            self.give(repo, revision, file)

    def describe(self, repo: str, revision: str) -> None:
        if repo not in self.hub.files:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": name} for name in self.hub.files[repo]]
            found: dict[str, Any] = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def give(self, repo: str, revision: str, file: str) -> None:
        hub, content = self.hub, self.hub.files.get(repo, {}).get(file)
        if content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        etag = hashlib.sha256(content + b"!" * hub.wrong).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        first = 0
        if (wanted := self.headers.get("Range")) is not None:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.send(206 if first else 200, content[first:], headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        hub = self.hub
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if "/resolve/" in self.path and hub.hold_after is not None:
            self.wfile.write(body[: hub.hold_after])
            self.wfile.flush()
            hub.held.set()
            hub.released.wait(30)
            body = body[hub.hold_after :]
        if "/resolve/" in self.path and hub.break_after is not None:
            body = body[: hub.break_after]
            self.close_connection = True
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Serve a hub without models, on a port of this machine."""
    handler = type("Handler", (_Handler,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.hub = hub = HubServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            server.shutdown()
            thread.join()
