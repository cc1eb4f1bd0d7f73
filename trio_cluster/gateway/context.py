"""The context of one request: what the stages of the gateway find out about it, and the calls that it opened.

The gateway makes a context for every request, hands it from stage to stage, and puts it into the ASGI scope, where the
views of the admin application find it. Calls that are opened for the request belong to the context and are cancelled when
it ends, in a ``finally`` of the gateway. That includes a client that leaves after a view has returned and before the first
byte of its answer is asked for, when no code of the view runs any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, cast

from ..core import randomness
from ..core.call import Call
from ..core.principal import ANONYMOUS
from ..core.request import Request
from ..openai import Endpoint, FormPeek
from .body import RequestBody, SpooledBody
from .deadlines import ResponseDeadlines

__all__ = ["RequestContext", "request_context"]

_KEY: Final = "trio_cluster.request_context"
_MAX_REQUEST_ID: Final = 128


class RequestContext:
    """One request and its answer.

    Args:
        headers: the request's headers as they came, names in lower case.
        client: the address that the request came from, if that is known.
        path: what is asked for, normalized: it begins with one slash.

    Attributes:
        headers, client, path: as given.
        header: a function that returns the first header of a name (lower case), or ``None``.
        request_id: the client's own if it sent a usable one, otherwise a new one.
        request_body: the body of the request; set by the gateway.
        principal: who asks; set by the authenticate stage.
        endpoint: what a model is asked for; set by the gateway, ``None`` for what the admin application answers.
        spool: what arrived of the body of a large form; set by the parse stage, and closed with the context.
        form_peek: looks at the rest of that form, which may not name another model; set by the parse stage.
        request: the request as models see it; set by the parse stage.
        deadlines: how long the client waits; set by the route stage.
        call: the call that answers the request; set by the route stage, and replaced by a retry.
        began: when the request arrived, on the monotonic clock.
        aborted: the answer failed after it began; the connection must be broken off, so that the client does not take
            the answer for a complete one.
    """

    __slots__ = (
        "_calls",
        "aborted",
        "began",
        "call",
        "client",
        "deadlines",
        "endpoint",
        "form_peek",
        "header",
        "headers",
        "path",
        "principal",
        "request",
        "request_body",
        "request_id",
        "spool",
    )

    request_body: RequestBody
    request: Request
    deadlines: ResponseDeadlines
    call: Call

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], client: str = "", path: str = "") -> None:
        self.headers = list(headers)
        # The first of several headers of one name wins: it is put in last. The method of the dictionary serves as ours,
        # since it is called many times for each request.
        self.header: Callable[[bytes], bytes | None] = dict(reversed(self.headers)).get
        self.client = client
        self.path = path
        self.principal = ANONYMOUS
        self.endpoint: Endpoint | None = None
        self.spool: SpooledBody | None = None
        self.form_peek: FormPeek | None = None
        self.request_id = _request_id(self.header(b"x-request-id"))
        self.began = time.monotonic()
        self.aborted = False
        self._calls: list[Call] = []

    def declared_length(self) -> int | None:
        """Return the length of the body if it is known; the server has checked that it is a number."""
        length = self.header(b"content-length")
        if length is not None:
            return int(length)
        return None if self.header(b"transfer-encoding") else 0

    def attach_to(self, scope: MutableMapping[str, Any]) -> None:
        """Make the context findable from an ASGI scope."""
        scope[_KEY] = self

    def add_call(self, call: Call) -> None:
        """Make ``call`` the one that answers the request; it is cancelled when the context ends, if it has not ended."""
        self.call = call
        self._calls.append(call)

    def cancel_calls(self, reason: str) -> None:
        """Cancel all calls that have not ended. Synchronous, idempotent."""
        for call in self._calls:
            call.cancel(reason)


def request_context(scope: Mapping[str, Any]) -> RequestContext:
    """Return the context of the request that an ASGI scope belongs to.

    Raises:
        KeyError: the request did not come through the gateway.
    """
    return cast(RequestContext, scope[_KEY])


def _request_id(offered: bytes | None) -> str:
    if offered and len(offered) <= _MAX_REQUEST_ID and all(0x20 <= byte <= 0x7E for byte in offered):
        return offered.decode("ascii")
    return "req_" + randomness.token(16)
