"""The answer on an HTTP/1.1 connection, as it comes in: no sockets, no waiting.

Theory of operation
===================

A :class:`ResponseReader` belongs to one connection and reads its answers one after the other. It is fed what comes off
the socket, takes the framing away and leaves the rest alone: the bytes of the body are kept as they are, whatever they
are encoded in. All that one feeding brings is given out in one piece, since each piece costs whoever takes it a write.

What matters most here is to tell an answer that is complete from one that was cut off. A length or chunks say where
the body ends; an answer with neither ends with its connection, and then nobody can tell the two apart.
:attr:`ResponseReader.framed` says which it is, so that those who know more about the content can look for its end.
"""

from __future__ import annotations

from typing import Final

import httptools

__all__ = ["FRAMING_LIMIT", "AnswerCut", "HttpError", "MalformedAnswer", "ResponseReader"]

#: Bytes that may come in a row without being part of a body: a head, or trailers, or what stands between chunks.
FRAMING_LIMIT: Final = 64 * 1024

_BODILESS: Final = frozenset({204, 304})


class HttpError(Exception):
    """An exchange with a server has failed. The message says why, and does not name the server."""


class AnswerCut(HttpError):
    """The connection ended before the answer was complete."""


class MalformedAnswer(HttpError):
    """What came back is not HTTP/1.1."""


class ResponseReader:
    """Reads the answers on one connection.

    Attributes:
        status: of the answer; 0 until its head is there.
        headers: names in lower case, in the order in which they came.
        heard: something of the answer has come.
        complete: the answer is complete, or has ended with its connection, see :attr:`framed`.
        framed: the answer itself says where it ends.
        keep_alive: the connection may be used again once the answer is complete.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.begin()

    def begin(self) -> None:
        """Get ready for the answer to the next request."""
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.heard = False
        self.complete = False
        self.framed = False
        self.keep_alive = False
        self._body: list[bytes] = []
        self._framing = 0
        self._head: list[tuple[str, str]] = []
        self._foreign = False

    def feed(self, data: bytes) -> None:
        """Take what has come off the socket.

        Raises:
            MalformedAnswer: it makes no sense. What came before it can still be taken.
        """
        self.heard = True
        self._framing += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise MalformedAnswer("the server speaks another protocol from here on") from None
        except httptools.HttpParserError as error:
            # What follows the end is nobody's; `on_message_begin` has seen that the connection is not used again.
            if not self.complete:
                raise MalformedAnswer(f"the answer is not HTTP/1.1: {error}") from None
        if self._foreign:
            raise MalformedAnswer("the only transfer encoding known here is 'chunked'")
        if self._framing > FRAMING_LIMIT and not self.complete:
            raise MalformedAnswer(f"the head of the answer has more than {FRAMING_LIMIT} bytes")

    def take(self) -> bytes:
        """Return what has come of the body and was not taken yet."""
        body = self._body
        if not body:
            return b""
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        return data

    def end(self) -> None:
        """Take note that the connection has ended.

        Raises:
            AnswerCut: the answer is not complete.
        """
        self.keep_alive = False
        if self.complete:
            return
        if not self.status:
            raise AnswerCut("the connection ended before there was an answer")
        if self.framed:
            raise AnswerCut("the connection ended in the middle of the answer")
        self.complete = True

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """See httptools."""
        # An answer to a question that nobody has asked.
        if self.complete:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        # Trailers get here, too, and nobody looks at them.
        self._head.append((name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")))

    def on_headers_complete(self) -> None:
        """See httptools."""
        status = self._parser.get_status_code()
        if self.complete:
            return
        head, self._head = self._head, []
        if status < 200:
            # Only says that there will be an answer.
            return
        self.status = status
        self.headers = head
        codings = [value.strip().lower() for name, value in head if name == "transfer-encoding"]
        self.framed = (
            bool(codings) or status in _BODILESS or any(name == "content-length" for name, _ in head)
        )
        # An error that a callback raises would not come out of the parser as itself.
        self._foreign = bool(codings) and codings != ["chunked"]
        self.keep_alive = self._parser.should_keep_alive()
        self._framing = 0

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        if not self.complete:
            self._body.append(body)
            self._framing = 0

    def on_message_complete(self) -> None:
        """See httptools."""
        if self.status:
            self.complete = True
