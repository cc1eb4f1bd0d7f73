"""A request on its way to the worker that is to answer it: its head has come, its body is still coming.

Nobody works on it yet, and it has no slot. But its client waits already, so the time that its body takes is a part of
the time that the client gives to the whole answer. It is no part of any silence: the model has not been asked yet.
"""

from __future__ import annotations

import math

import trio

from ._calls import Request
from .wire import ForwardRequest

__all__ = ["Upload"]


class Upload:
    """A request whose body is still coming in.

    Attributes:
        size: how many bytes of it have come.
    """

    def __init__(self, opened: ForwardRequest) -> None:
        self.size = 0
        self._began = trio.current_time()
        self._opened = opened
        self._pieces: list[bytes] = []

    def add(self, piece: bytes | memoryview) -> None:
        """Add the next bytes of the body."""
        self._pieces.append(bytes(piece))
        self.size += len(piece)

    def request(self) -> Request:
        """Return the request, with what is left of its time; its body has to be complete."""
        opened, spent = self._opened, trio.current_time() - self._began
        return Request(
            endpoint=opened.endpoint,
            kind=opened.kind,  # type: ignore[arg-type]  # an unknown kind matches no model
            model=opened.model,
            body=b"".join(self._pieces),
            content_type=opened.content_type,
            headers=opened.headers,
            request_id=opened.request_id,
            timeout=math.inf if opened.timeout is None else opened.timeout,
            budget=math.inf if opened.budget is None else opened.budget - spent,
        )
