"""Replies: a status, headers, and a body that is complete or still arriving.

The web framework is not used here. Errors become replies in one place, so that a refusal by the gateway, an unknown
path and a model that failed all look the same to a client.
"""

from __future__ import annotations

import math
from typing import Any, Final, Protocol

import attrs
import msgspec

from ..errors import ApiError, InvalidRequest, RateLimited
from ..http1.asgi import Message
from ..http1.refusal import HttpRefusal
from ..openai import OPENAI_ERRORS, ErrorFamily
from .context import RequestContext
from .direct import Connection

__all__ = ["JSON", "Body", "Reply", "error_reply", "json_reply", "render_refusal", "reply_head"]

#: The content type of a JSON body, as a header.
JSON: Final = ("content-type", "application/json")
_UNAUTHORIZED: Final = 401
#: Seconds that a client is told to wait, at most.
_MAX_RETRY_AFTER: Final = 86_400


class Body(Protocol):
    """A body that is still arriving."""

    @property
    def complete(self) -> bool:
        """Whether the piece that was received last is the end of the body, and the answer has not failed."""
        ...

    @property
    def is_satisfying(self) -> bool:
        """Whether the pieces that were received make a whole answer for its client, though it may go on."""
        ...

    async def receive(self) -> bytes:
        """Return the next piece, and wait for it. An empty piece means that the connection has unsent bytes to write.

        Raises:
            trio.EndOfChannel: the body has ended.
        """
        ...

    def enable_direct_write(self, connection: Connection | None) -> None:
        """Let further pieces take the fast path to a connection, if it is possible. Synchronous, idempotent."""
        ...


@attrs.frozen
class Reply:
    """The answer to one HTTP request. Header names are in lower case; the content type is one of the headers."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | Body
    early: bool = False
    """The head is sent before the answer has begun, and nothing in it depends on the answer."""


def json_reply(value: Any, status: int = 200) -> Reply:
    """Return a reply whose body is ``value`` as JSON: a mapping, or an instance of an attrs class."""
    return Reply(status, [JSON], msgspec.json.encode(value))


def error_reply(error: ApiError, errors: ErrorFamily = OPENAI_ERRORS, request_id: str = "") -> Reply:
    """Return the reply for an error, with the headers that tell clients whether and when to try again.

    Args:
        error: the error.
        errors: how the errors of the route look.
        request_id: the id of the request, which some of them have in their body.
    """
    headers = [JSON]
    if error.retry_after is not None:
        headers.append(("retry-after", _retry_after(error.retry_after)))
        if isinstance(error, RateLimited):
            headers.append(("retry-after-ms", str(error.retry_after_ms)))
    if error.status == _UNAUTHORIZED:
        headers.append(("www-authenticate", "Bearer"))
    if error.final:
        headers.append(("x-should-retry", "false"))
    return Reply(errors.status(error), headers, errors.body(error, request_id))


def _retry_after(seconds: float) -> str:
    """Return the value of the header. The number may come from a handler, on any node, and may be any."""
    if not seconds > 1:  # NaN included
        return "1"
    return str(math.ceil(min(seconds, _MAX_RETRY_AFTER)))


def reply_head(reply: Reply, request_id: str) -> Message:
    """Return the ASGI message ``http.response.start`` of a reply."""
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
    if isinstance(reply.body, bytes):
        headers.append((b"content-length", b"%d" % len(reply.body)))
    headers.append((b"x-request-id", request_id.encode("ascii")))
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


def render_refusal(refusal: HttpRefusal) -> tuple[list[tuple[str, str]], bytes]:
    """Return the headers and the body of the answer to bytes that are not a valid HTTP request.

    It looks like any other error. It has the request id that the client has sent, if that had come, or else a new one.
    """
    reply = error_reply(InvalidRequest(refusal.message, status=refusal.status))
    assert isinstance(reply.body, bytes)
    return [*reply.headers, ("x-request-id", RequestContext(refusal.headers).request_id)], reply.body
