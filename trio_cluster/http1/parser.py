"""Parses what arrives on a connection into requests. No sockets, no tasks.

The connection's reader puts bytes in with :meth:`RequestParser.feed`. The connection's task takes requests out in their
order, and may begin with one before its body is complete. What is not a request in HTTP/1.1 is kept as a refusal, which
is to be sent after everything that arrived before it has been answered.
"""

from __future__ import annotations

from typing import Final

import httptools

from .framing import RequestState
from .refusal import HttpRefusal

__all__ = ["HEAD_LIMIT", "RequestParser"]

#: Bytes that the head of a request may have.
HEAD_LIMIT: Final = 64 * 1024

#: Bytes that each request counts for in addition to its body, so that a flood of small ones is held back, too.
_REQUEST_WEIGHT: Final = 1024
_HTTP2: Final = b"PRI * HTTP/2"
#: Stands for the latest request until the first one has begun.
_NONE_YET: Final = RequestState()


class RequestParser:
    """The requests of one connection.

    Attributes:
        requests: those whose heads are complete and that were not taken out yet, oldest first.
        latest: the request that is arriving, or arrived last; its head may be incomplete.
        refused: why what arrived last is not a request; ``None`` if it may be one. Nothing is fed after that.
        no_more: whether what follows the latest request is to be ignored; may be set from outside, if the connection
            ends with that request.
        unread: bytes for which the requests and bodies count that were put in and not taken out.
    """

    __slots__ = ("_head_size", "_ignoring", "_parser", "latest", "no_more", "refused", "requests", "unread")

    def __init__(self) -> None:
        self.requests: list[RequestState] = []
        self.latest = _NONE_YET
        self.refused: HttpRefusal | None = None
        self.no_more = False
        self.unread = 0
        self._head_size = 0
        self._ignoring = False
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        """Put in the next bytes. Afterwards, ``refused`` is set if they are not part of a request."""
        assert self._parser is not None
        if self._over:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No other protocol is supported. The request is answered like any other, and is the last one.
            self.no_more = True
            self.latest.keep_alive = False
        except httptools.HttpParserInvalidMethodError:
            self._refuse(HttpRefusal(501, "The method of this request is not known here"))
        except httptools.HttpParserError as error:
            if data.startswith(_HTTP2):
                self._refuse(HttpRefusal(505, "HTTP/2 is not supported; use HTTP/1.1"))
            elif not self._over:
                self._refuse(HttpRefusal(400, f"This is not a request in HTTP/1.1: {error}"))
        # A head that arrived in one piece is accepted, whatever its size; this stops one that goes on and on.
        if self._head_size > HEAD_LIMIT:
            limit = f"The head of the request has more than {HEAD_LIMIT} bytes"
            self._refuse(HttpRefusal(431, limit))

    def take_body(self, request: RequestState) -> bytes:
        """Take out what has arrived of a request's body, and return it."""
        body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
        request.body.clear()
        self.unread -= len(body)
        return body

    def discard(self, request: RequestState) -> None:
        """Take out what is left of a request that has been answered."""
        self.unread -= _REQUEST_WEIGHT
        if request.body:
            self.take_body(request)

    def close(self) -> None:
        """Break the cycle of references with httptools' parser, so that this is freed now and not by the collector."""
        self._parser = None

    @property
    def _over(self) -> bool:
        """Whether what arrives is ignored."""
        return self._ignoring or (self.no_more and self.latest.complete)

    def _refuse(self, refusal: HttpRefusal) -> None:
        if self.refused is None:
            self.refused = refusal

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """See httptools."""
        self.latest = RequestState()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self.latest.target += url
        self._head_size += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        name = name.lower()
        request = self.latest
        request.headers.append((name, value))
        self._head_size += len(name) + len(value)
        if name == b"expect":
            request.expects_continue = request.expects_continue or value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            request.coded = request.coded or value.lower() != b"chunked"

    def on_headers_complete(self) -> None:
        """See httptools."""
        assert self._parser is not None
        request = self.latest
        request.method = self._parser.get_method().decode("ascii")
        request.version = self._parser.get_http_version()
        request.keep_alive = self._parser.should_keep_alive()
        self._head_size = 0
        if self.no_more:
            self._ignoring = True
            return
        if request.coded:
            # httptools would take everything up to the end of the connection for the body.
            self._refuse(HttpRefusal(501, "The only transfer encoding known here is 'chunked'"))
            return
        self.no_more = not request.keep_alive
        self.unread += _REQUEST_WEIGHT
        self.requests.append(request)

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        if not self._ignoring:
            self.latest.body.append(body)
            self.unread += len(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self.latest.complete = True
