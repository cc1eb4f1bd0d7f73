"""Clients that stream an answer while a test looks at the page."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

__all__ = ["StreamingClient", "streaming"]


class StreamingClient:
    """A client that reads a chat's answer in a thread until it ends.

    Attributes:
        request_id: of its request.
        received: all that has come, as text.
        over: set when the answer has ended or the connection was closed.
    """

    def __init__(self, url: str, model: str, request_id: str, **headers: str) -> None:
        self.request_id = request_id
        self.received = ""
        self.over = threading.Event()
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        body = {
            "model": model,
            "stream": True,
            "messages": [{"role": "user", "content": f"{request_id} says something"}],
        }
        sent = {"content-type": "application/json", "x-request-id": request_id} | headers
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), sent)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            response = self._connection.getresponse()
            while piece := response.read1(65536):
                self.received += piece.decode()
        self.over.set()

    def leave(self) -> None:
        """Close the connection, and wait for the thread."""
        if (sock := self._connection.sock) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(2)
        self._thread.join(20)
        self._connection.close()


@contextlib.contextmanager
def streaming(
    url: str, *request_ids: str, model: str = "slow", **headers: str
) -> Iterator[list[StreamingClient]]:
    """Have clients stream, each with a request of the id that is given."""
    clients = [StreamingClient(url, model, request_id, **headers) for request_id in request_ids]
    try:
        yield clients
    finally:
        for client in clients:
            client.leave()
