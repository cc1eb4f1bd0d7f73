"""What comes in on a connection: requests, one after the other, and what is wrong with them.

No sockets and no tasks are known here. Bytes are put in with :meth:`Incoming.feed`, by whoever reads the connection;
requests are taken out in their order, by whoever answers them, who may begin before a request is complete. What is not
a request in HTTP/1.1 is kept as an error, for it is to be told after everything that came before it is answered.
"""

from __future__ import annotations

from typing import Final

import httptools

from .framing import RequestState
from .refusal import HttpRefusal

__all__ = ["HEAD_LIMIT", "RequestParser"]

#: Bytes that the head of a request may have.
HEAD_LIMIT: Final = 64 * 1024

#: What a request counts for beside its body, so that a flood of small ones is held back too.
_REQUEST_WEIGHT: Final = 1024
_HTTP2: Final = b"PRI * HTTP/2"
#: In the place of the latest request before the first one has begun.
_NONE_YET: Final = RequestState()


class RequestParser:
    """The requests of one connection.

    Attributes:
        requests: those whose heads have come and that nobody has taken yet, oldest first.
        latest: the one that is coming, or came last; it may not even have a whole head.
        refused: what is wrong with what came last. Nothing can be fed any more.
        no_more: what follows the latest request is nobody's; set by whoever knows that the connection ends with it.
        unread: for how much the requests and bodies count that have been put in and not been taken out.
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
        """Put in the next bytes; if they make no sense, there is ``refused`` afterwards."""
        assert self._parser is not None
        if self._over:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nobody here speaks anything else. The request is answered like any other, and is the last one.
            self.no_more = True
            self.latest.keep_alive = False
        except httptools.HttpParserInvalidMethodError:
            self._refuse(HttpRefusal(501, "The method of this request is not known here"))
        except httptools.HttpParserError as error:
            if data.startswith(_HTTP2):
                self._refuse(HttpRefusal(505, "HTTP/2 is not supported; use HTTP/1.1"))
            elif not self._over:
                self._refuse(HttpRefusal(400, f"This is not a request in HTTP/1.1: {error}"))
        # A head that was read in one piece is done with, whatever its size; this ends one that goes on and on.
        if self._head_size > HEAD_LIMIT:
            limit = f"The head of the request has more than {HEAD_LIMIT} bytes"
            self._refuse(HttpRefusal(431, limit))

    def take_body(self, request: RequestState) -> bytes:
        """Take out what has come of a request's body."""
        body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
        request.body.clear()
        self.unread -= len(body)
        return body

    def discard(self, request: RequestState) -> None:
        """Take out what is left of a request, which has been answered."""
        self.unread -= _REQUEST_WEIGHT
        if request.body:
            self.take_body(request)

    def close(self) -> None:
        """Let go of the parser, which refers to this: without it, it is gone now, and not when the collector comes."""
        self._parser = None

    @property
    def _over(self) -> bool:
        """Whether what comes is nobody's."""
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
            # The parser would take everything up to the end of the connection for the body.
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
