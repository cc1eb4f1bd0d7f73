"""What comes in on a connection: requests, one after the other, and what is wrong with them.

No sockets and no tasks are known here. Bytes are put in with :meth:`RequestParser.feed`, by the reader of the
connection; requests are taken out in their order, by the task that answers them, which may begin before a request is
complete. What is not a request in HTTP/1.1 is kept as an error, since it is answered after everything that came
before it.

Theory of operation
===================

llhttp (through httptools) parses heads, and nothing but heads. It accepts no line end but CRLF, so a head ends at its
first empty line and nowhere else: that is where the bytes are cut, and a head that llhttp believes to end elsewhere
is refused. Each head gets a parser of its own, which costs a microsecond. Where a body ends is decided here, by the
headers that llhttp has checked: after ``content-length`` bytes, or by ``chunks.py``.

So every byte is counted before a parser sees it, whether or not it leads to a callback: a header line, a name or a
trailer that never ends costs as much memory as the limit allows. A request to upgrade the connection, which llhttp
takes for the last thing in HTTP/1.1 on it, is an ordinary request with its body; trailers do not become headers; and
after a refusal nothing is parsed any more, so that a later request cannot be answered in front of it.
"""

from __future__ import annotations

import re
from typing import Final

import httptools

from .chunks import ChunkDecoder, ChunkError
from .framing import RequestState
from .refusal import HttpRefusal

__all__ = ["HEADER_LIMIT", "HEAD_LIMIT", "RequestParser"]

#: Bytes that the head of a request may have.
HEAD_LIMIT: Final = 64 * 1024

#: Headers that a request may have.
HEADER_LIMIT: Final = 128

#: What a request and each of its headers count for beside their bytes, so that a flood of small ones is held back too.
_REQUEST_WEIGHT: Final = 1024
_HEADER_WEIGHT: Final = 128
#: Pieces of a body that are smaller than this are put together.
_SMALL: Final = 1024

#: The method of the preface of HTTP/2.
_HTTP2: Final = b"PRI"
_END_OF_HEAD: Final = b"\r\n\r\n"
#: How the first line of a request ends, by its version.
_PROTOCOLS: Final = {"1.1": b" HTTP/1.1\r\n", "1.0": b" HTTP/1.0\r\n"}
_PROTOCOL_SIZE: Final = len(b" HTTP/1.1\r\n")
#: A host and perhaps a port (RFC 3986, section 3.2): an IPv6 address in brackets, or a name, or an IPv4 address.
_HOST: Final = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)(?::([0-9]{0,5}))?"
)
_MAX_PORT: Final = 65535
#: In the place of the latest request before the first one has begun.
_NONE_YET: Final = RequestState()


class RequestParser:
    """The requests of one connection.

    Attributes:
        requests: those whose heads have come and that have not been taken yet, oldest first.
        latest: the one that is coming, or came last; it may not even have a whole head.
        refused: what is wrong with what came last. Nothing can be fed any more.
        no_more: what follows the latest request is dropped; set by whoever knows that the connection ends with it.
        unread: for how much the requests and bodies count that have been put in and not been taken out.
    """

    __slots__ = (
        "_chunks",
        "_head",
        "_head_ended",
        "_head_size",
        "_host",
        "_in_body",
        "_is_chunked",
        "_left",
        "_line_complete",
        "_line_end",
        "_tail",
        "latest",
        "no_more",
        "refused",
        "requests",
        "unread",
    )

    def __init__(self) -> None:
        self.requests: list[RequestState] = []
        self.latest = _NONE_YET
        self.refused: HttpRefusal | None = None
        self.no_more = False
        self.unread = 0
        # The head that is coming
        self._head: httptools.HttpRequestParser | None = None
        self._head_size = 0
        self._head_ended = False
        self._tail = b""  # the last bytes of what came of it, in which its end may have begun
        self._line_end = b""  # the last bytes of its first line, which has the protocol
        self._line_complete = False
        self._host: bytes | None = None
        # The body that is coming, or the one that the head announces
        self._in_body = False
        self._is_chunked = False
        self._left = 0
        self._chunks: ChunkDecoder | None = None

    def feed(self, data: bytes) -> None:
        """Put in the next bytes; if they make no sense, there is ``refused`` afterwards."""
        at = 0
        while at < len(data) and self.refused is None:
            if self._in_body:
                at = self._feed_body(data, at)
            elif self.no_more:
                return
            else:
                at = self._feed_head(data, at)

    def take_body(self, request: RequestState) -> bytes:
        """Take out what has come of a request's body."""
        body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
        request.body.clear()
        self.unread -= len(body)
        return body

    def discard(self, request: RequestState) -> None:
        """Take out what is left of a request, which has been answered."""
        self.unread -= request.weight
        if request.body:
            self.take_body(request)

    def close(self) -> None:
        """Let go of the parser, which refers to this: without it, it is gone now, and not when the collector comes."""
        self._head = None

    def _feed_head(self, data: bytes, at: int) -> int:
        """Take in what has come of a head; return where it ends in ``data``."""
        head = self._head
        if head is None:
            if data[at] in b"\r\n":
                # Empty lines in front of a request are ignored (RFC 9112, section 2.2), and counted.
                skipped = len(data) - at - len(data[at:].lstrip(b"\r\n"))
                at += skipped
                self._head_size += skipped
                if self._head_size > HEAD_LIMIT:
                    self._refuse_large_head()
                    return at
                if at == len(data):
                    return at
            head = self._head = httptools.HttpRequestParser(self)
            self.latest = RequestState()
        found = data.find(_END_OF_HEAD, at)
        stop = found + len(_END_OF_HEAD) if found >= 0 else 0
        if self._tail:
            begun = (self._tail + data[at : at + 3]).find(_END_OF_HEAD)
            if begun >= 0:
                stop = at + begun + len(_END_OF_HEAD) - len(self._tail)
        ends = stop > 0
        if not ends:
            stop = len(data)
        # What is within the limit is parsed all the same: what is wrong with it must not depend on how it arrives.
        limit = at + HEAD_LIMIT - self._head_size
        too_large = stop > limit
        if too_large:
            ends, stop = False, limit
        self._head_size += stop - at
        piece = data if at == 0 and stop == len(data) else data[at:stop]
        if not self._line_complete:
            newline = piece.find(b"\n") + 1
            self._line_complete = newline > 0
            line = piece[: newline or len(piece)][-_PROTOCOL_SIZE:]
            self._line_end = (self._line_end + line)[-_PROTOCOL_SIZE:] if self._line_end else line
        try:
            head.feed_data(piece)
        except httptools.HttpParserUpgrade:
            # An upgrade that is not taken is an ordinary request. Of what it calls the rest, we know more.
            pass
        except httptools.HttpParserInvalidMethodError:
            self._refuse(501, "The method of this request is not known here")
        except httptools.HttpParserError as error:
            self._refuse_head(str(error))
        if ends is not self._head_ended:
            self._refuse_head("the end of its head is not clear")
        if too_large:
            self._refuse_large_head()
        if not ends:
            self._tail = (self._tail + piece[-3:])[-3:]
        elif self.refused is None:
            self._begin_request()
        return stop

    def _begin_request(self) -> None:
        """Offer the request whose head has come."""
        request = self.latest
        request.weight = _REQUEST_WEIGHT + self._head_size + _HEADER_WEIGHT * len(request.headers)
        self.unread += request.weight
        self.no_more = self.no_more or not request.keep_alive
        if self._is_chunked:
            self._chunks = ChunkDecoder()
        self._in_body = self._is_chunked or self._left > 0
        request.complete = not self._in_body
        self.requests.append(request)
        self._head, self._head_size, self._head_ended, self._tail = None, 0, False, b""
        self._line_end, self._line_complete = b"", False
        self._host, self._is_chunked = None, False

    def _feed_body(self, data: bytes, at: int) -> int:
        """Take in what has come of a body; return where it ends in ``data``."""
        request, chunks = self.latest, self._chunks
        if chunks is None:
            piece = data if at == 0 and len(data) <= self._left else data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            complete = self._left == 0
        else:
            try:
                piece, at = chunks.decode(data, at)
            except ChunkError as error:
                self._refuse(error.status, str(error))
                return at
            complete = chunks.complete
        if piece:
            if request.body and len(request.body[-1]) + len(piece) <= _SMALL:
                request.body[-1] += piece
            else:
                request.body.append(piece)
            self.unread += len(piece)
        if complete:
            request.complete = True
            self._in_body, self._chunks = False, None
        return at

    def _refuse(self, status: int, message: str) -> None:
        if self.refused is None:
            self.refused = HttpRefusal(status, message, tuple(self.latest.headers))

    def _refuse_large_head(self) -> None:
        self._refuse(431, f"The head of the request has more than {HEAD_LIMIT} bytes")

    def _refuse_head(self, reason: str) -> None:
        assert self._head is not None
        if self._head.get_method() == _HTTP2:
            self._refuse(505, "HTTP/2 is not spoken here; use HTTP/1.1")
        self._refuse(400, f"This is not a request in HTTP/1.1: {reason}")

    # The parser's callbacks. What they raise ends the parsing, in the middle of what was fed.

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self.latest.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        name = name.lower()
        request = self.latest
        if value and value[-1] in b" \t":
            value = value.rstrip(b" \t")
        request.headers.append((name, value))
        if name == b"host":
            if self._host is not None:
                self._refuse(400, "The request has more than one Host header")
                raise _Refused
            self._host = value
        elif name == b"content-length":
            # The parser has seen to it that it is a number, that it comes once, and not with a transfer encoding.
            self._left = int(value)
        elif name == b"expect":
            request.expects_continue = request.expects_continue or value.lower() == b"100-continue"
        elif name == b"transfer-encoding":
            request.coded = request.coded or self._is_chunked or value.lower() != b"chunked"
            self._is_chunked = True
        if len(request.headers) > HEADER_LIMIT:
            self._refuse(431, f"The request has more than {HEADER_LIMIT} headers")
            raise _Refused

    def on_headers_complete(self) -> None:
        """See httptools."""
        head, request = self._head, self.latest
        assert head is not None
        self._head_ended = True
        request.method = head.get_method().decode("ascii")
        request.version = head.get_http_version()
        request.keep_alive = head.should_keep_alive()
        if self._line_end != _PROTOCOLS.get(request.version):
            # llhttp also accepts RTSP and ICE, which it reports as HTTP; HTTP/2.0; and HTTP/0.9, in which the line has
            # no version and may end in anything.
            self._refuse(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here")
        elif request.coded:
            self._refuse(501, "The only transfer encoding known here is 'chunked'")
        elif self._host is None and request.version == "1.1":
            self._refuse(400, "The request has no Host header")
        elif self._host is not None and not _is_host(self._host):
            self._refuse(400, "The Host header is not the name or the address of a host")
        if self.refused is not None:
            raise _Refused
        if request.version != "1.1":
            # Clients of HTTP/1.0 do not know 100 Continue. A transfer encoding in HTTP/1.0 is a sign of an intermediary
            # that does not understand it, and may see another end of this request than we do (RFC 9112, section 6.1).
            request.expects_continue = False
            request.keep_alive = request.keep_alive and not self._is_chunked
        if request.method == "CONNECT":
            # What a client sends after this is for somebody else.
            request.keep_alive = False


class _Refused(Exception):
    """Stops the parser; ``RequestParser.refused`` has the reason."""


def _is_host(host: bytes) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and int(match[1] or 0) <= _MAX_PORT
