"""How a request and its answer stand on an HTTP/1.1 connection, and how an answer's body is framed.

The framing is decided when the body begins: the answer's own ``content-length`` if it has one; its actual length if
it comes in one piece; chunks; or, for HTTP/1.0, the end of the connection. HEAD, 204 and 304 have no body at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final

__all__ = ["RequestState", "pieces_to_write", "refusal_response", "response_head"]

#: Bytes of a body from which copying them costs more than another write.
_LARGE: Final = 1024 * 1024

_NO_CONTENT: Final = 204
_BODILESS: Final = frozenset({_NO_CONTENT, 304})
_FRAMING_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class RequestState:
    """A request as it comes in, and where its answer stands."""

    __slots__ = (
        "answered",
        "bodiless",
        "body",
        "chunked",
        "coded",
        "complete",
        "expects_continue",
        "handed_over",
        "head_sent",
        "headers",
        "keep_alive",
        "method",
        "start",
        "target",
        "version",
        "weight",
    )

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.version = "1.1"
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = True
        self.expects_continue = False
        # In another way than in chunks.
        self.coded = False
        self.body: list[bytes] = []
        self.complete = False
        self.handed_over = False
        # What it counts for while it waits, without its body.
        self.weight = 0
        # The answer
        self.start: Any = None
        self.head_sent = False
        self.chunked = False
        self.bodiless = False
        self.answered = False


def response_head(request: RequestState, size: int, more: bool, closing: bool) -> tuple[bytes, bool]:
    """Return the head of the answer, now that it is known how its body begins, and decide the framing.

    Args:
        request: what is answered; its ``start`` is the message that began the answer.
        size: bytes of the body's first piece.
        more: whether another one follows.
        closing: the connection is to end with this answer anyway.

    Returns:
        The head, and whether the connection ends with this answer.
    """
    if request.start is None:
        raise RuntimeError("a body before the head of an answer")
    request.head_sent = True
    status = request.start["status"]
    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    framed = said = False
    for name, value in request.start.get("headers", ()):
        lowered = name.lower()
        if status == _NO_CONTENT and lowered in _FRAMING_HEADERS:
            # Such an answer ends with its head (RFC 9110, section 8.6); a client that believed this would wait.
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
        framed = framed or lowered == b"content-length"
        said = said or (lowered == b"connection" and value.lower() == b"close")
    closing = closing or said or not request.keep_alive
    request.bodiless = request.method == "HEAD" or status in _BODILESS
    if not framed and not request.bodiless:
        if not more:
            lines.append(b"content-length: %d\r\n" % size)
        elif request.version == "1.1":
            request.chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            closing = True
    if closing and not said:
        lines.append(b"connection: close\r\n")
    elif request.version == "1.0" and not closing:
        lines.append(b"connection: keep-alive\r\n")
    lines += [_date_line(), b"\r\n"]
    return b"".join(lines), closing


def pieces_to_write(head: bytes, body: bytes, *, chunked: bool, last: bool) -> list[bytes]:
    """Return what is to be written, in order, for a piece of a body; of a large one no copy is made.

    Args:
        head: what goes before it.
        body: may be empty.
        chunked: the body is framed in chunks.
        last: the body ends with it.
    """
    before, after = head, b""
    if chunked:
        if body:
            before, after = b"%b%x\r\n" % (head, len(body)), b"\r\n"
        if last:
            after += b"0\r\n\r\n"
    if len(body) < _LARGE:
        return [before + body + after]
    return [before, body, after]


def refusal_response(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    """Return a whole answer to something that never became a request; it ends the connection."""
    lines = [_STATUS_LINES[status], b"content-length: %d\r\n" % len(body)]
    lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in (*headers, ("connection", "close"))]
    return b"".join([*lines, _date_line(), b"\r\n", body])


class _Date:
    """The date header of this second."""

    second = 0
    line = b""


def _date_line() -> bytes:
    second = int(time.time())
    if second != _Date.second:
        _Date.second = second
        _Date.line = f"date: {formatdate(second, usegmt=True)}\r\n".encode()
    return _Date.line
