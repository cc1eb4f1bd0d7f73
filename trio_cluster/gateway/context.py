"""One request and its answer, from the gate's point of view.

The gate makes an exchange for every request and puts it into the ASGI scope, where routes find it. Whatever a
route starts on behalf of the request is held here, and ends with the exchange at the latest: the gate sees to
that in a ``finally``, which no way of leaving can pass by. That includes a client that leaves between the
moment a route has returned and the moment its body is first asked for, when no code of the route runs any
more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Final, cast

from ..core import randomness
from ..core.call import Call
from .body import RequestBody

__all__ = ["RequestContext", "request_context"]

_KEY: Final = "trio_cluster.exchange"
_MAX_REQUEST_ID: Final = 128


class RequestContext:
    """One request and its answer.

    Args:
        headers: the request's headers as they came, names in lower case.
        client: the address it came from, if that is known.

    Attributes:
        headers, client: as given.
        request_id: the client's own if it sent a sane one, otherwise a new one.
        request_body: the body of the request; the gate's to set.
        began: when it came, on the monotonic clock.
        cut: the answer has failed after it began; the connection must be ended so that nobody takes the
            answer for a complete one.
    """

    __slots__ = ("_calls", "_first", "aborted", "began", "client", "headers", "request_body", "request_id")

    request_body: RequestBody

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], client: str = "") -> None:
        self.headers = list(headers)
        # Of each name the first one, which is put in last.
        self._first = dict(reversed(self.headers))
        self.client = client
        self.request_id = _request_id(self.header(b"x-request-id"))
        self.began = time.monotonic()
        self.aborted = False
        self._calls: list[Call] = []

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of this name (lower case), or ``None``."""
        return self._first.get(name)

    def declared_length(self) -> int | None:
        """Return the length of the body if it is known; the server has checked that it is a number."""
        length = self.header(b"content-length")
        if length is not None:
            return int(length)
        return None if self.header(b"transfer-encoding") else 0

    def attach_to(self, scope: MutableMapping[str, Any]) -> None:
        """Make the exchange findable from an ASGI scope."""
        scope[_KEY] = self

    def add_call(self, call: Call) -> None:
        """Cancel ``call`` when the exchange ends, unless it has ended by then."""
        self._calls.append(call)

    def cancel_calls(self, reason: str) -> None:
        """Cancel everything that is held. Idempotent, and harmless for what has ended."""
        for call in self._calls:
            call.cancel(reason)


def request_context(scope: Mapping[str, Any]) -> RequestContext:
    """Return the exchange that an ASGI scope belongs to.

    Raises:
        KeyError: the request did not come through the gate.
    """
    return cast(RequestContext, scope[_KEY])


def _request_id(offered: bytes | None) -> str:
    if offered and len(offered) <= _MAX_REQUEST_ID and all(0x20 <= byte <= 0x7E for byte in offered):
        return offered.decode("ascii")
    return "req_" + randomness.token(16)
