"""A node for the commands that ask one: it answers everything with what a test has set."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["ScriptedNode", "serve_scripted"]


class ScriptedNode(http.server.BaseHTTPRequestHandler):
    """Sends one response to all requests, and records them.

    Attributes:
        requests: method, path, ``Authorization`` and JSON of each request.
    """

    status = 200
    body = b""
    requests: list[tuple[str, str, str | None, Any]] = []  # noqa: RUF012

    def respond(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.requests.append((self.command, self.path, self.headers.get("Authorization"), body))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST = do_PATCH = do_DELETE = respond  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve_scripted(content: Any) -> Iterator[tuple[type[ScriptedNode], int]]:
    """Serve a node that answers with this JSON; yields its class, for more, and its port."""
    scripted = type("ThisNode", (ScriptedNode,), {"requests": [], "body": json.dumps(content).encode()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), scripted) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield scripted, server.server_port
        server.shutdown()
        thread.join()
