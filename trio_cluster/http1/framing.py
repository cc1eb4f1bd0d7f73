"""The state of a request and its answer on an HTTP/1.1 connection, and the framing of the answer's body.

The framing is decided when the body begins. It is the answer's own ``content-length``, if the answer has one; its
actual length, if the body is one piece; chunks; or, for HTTP/1.0, the end of the connection. Answers to HEAD, and those
with status 204 and 304, have no body.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final

__all__ = ["RequestState", "pieces_to_write", "refusal_response", "response_head"]

#: Bytes of a piece of a body above which copying it costs more than another write.
_LARGE: Final = 1024 * 1024

_NO_CONTENT: Final = 204
_BODILESS: Final = frozenset({_NO_CONTENT, 304})
_FRAMING_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class RequestState:
    """A request, as far as it has arrived, and the state of its answer.

    Attributes:
        method, target, version, headers: of the request line and the head; names of headers are in lower case.
        keep_alive: whether the client wants to send another request on this connection.
        expects_continue: whether the client waits for ``100 Continue`` before it sends the body.
        coded: whether the body has a transfer encoding other than chunks.
        body: pieces of the body that have arrived and were not taken.
        complete: whether all of the body has arrived.
        handed_over: whether the application has been given the end of the body.
        start: the ASGI message that began the answer, if it has begun.
        head_sent: whether the head of the answer was written.
        chunked: whether the body of the answer is framed in chunks.
        bodiless: whether the answer has no body.
        answered: whether the answer has ended.
    """

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
        self.coded = False
        self.body: list[bytes] = []
        self.complete = False
        self.handed_over = False
        # What it counts for while it waits, without its body.
        self.weight = 0
        self.start: Any = None
        self.head_sent = False
        self.chunked = False
        self.bodiless = False
        self.answered = False


def response_head(request: RequestState, size: int, more: bool, closing: bool) -> tuple[bytes, bool]:
    """Return the head of an answer whose body begins, and decide the framing.

    Args:
        request: what is answered; its ``start`` is set.
        size: bytes of the body's first piece.
        more: whether another piece follows.
        closing: whether the connection ends with this answer in any case.

    Returns:
        The head, and whether the connection ends with this answer.

    Raises:
        RuntimeError: the application has sent a body before a head.
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
    """Return what is to be written, in order, for one piece of a body. Large pieces are not copied.

    Args:
        head: the head of the answer, if it was not written yet.
        body: the piece; may be empty.
        chunked: whether the body is framed in chunks.
        last: whether the body ends with this piece.
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
    """Return the whole answer to what is not a request. It announces the end of the connection."""
    lines = [_STATUS_LINES[status], b"content-length: %d\r\n" % len(body)]
    lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in (*headers, ("connection", "close"))]
    return b"".join([*lines, _date_line(), b"\r\n", body])


class _Date:
    """The ``date`` header of the current second, which is the same for all answers in it."""

    second = 0
    line = b""


def _date_line() -> bytes:
    second = int(time.time())
    if second != _Date.second:
        _Date.second = second
        _Date.line = f"date: {formatdate(second, usegmt=True)}\r\n".encode()
    return _Date.line
