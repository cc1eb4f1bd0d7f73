"""The parser for the responses on one HTTP/1.1 client connection. No I/O: bytes go in, the state is read off.

Theory of operation
===================

A :class:`ResponseReader` belongs to one connection and parses its responses one after the other. It is fed what comes
off the socket, removes the framing (``Content-Length``, or the chunked coding, see ``_chunked.py``), and leaves the
body as it is, whatever its content coding. All body bytes of one ``feed`` come out as one piece, because each piece
costs the consumer a write.

What matters most is to tell a complete response from one that was cut off. A ``Content-Length`` or the last chunk
says where the body ends. A response with neither is *close-delimited* (RFC 9112, section 6.3): its body ends with the
connection, and a complete body looks the same as a truncated one. :attr:`ResponseReader.close_delimited` tells the
caller so, which may know from the content whether the body is complete.
"""

from __future__ import annotations

from typing import Final

import httptools

from ._chunked import ChunkDecoder, MalformedChunk

__all__ = ["FRAMING_LIMIT", "HttpError", "IncompleteResponse", "MalformedResponse", "ResponseReader"]

#: Bytes that may come in a row without being part of a body: a head, trailers, or chunk headers with extensions.
FRAMING_LIMIT: Final = 64 * 1024

_END_OF_HEAD: Final = b"\r\n\r\n"
_LOWEST_STATUS: Final = 100
_FRAMING_FIELDS: Final = frozenset({"content-length", "transfer-encoding"})
_BODILESS_STATUSES: Final = frozenset({204, 304})


class HttpError(Exception):
    """A request to a server has failed. The message gives the reason and does not name the server."""


class IncompleteResponse(HttpError):
    """The connection ended before the response was complete."""


class MalformedResponse(HttpError):
    """The bytes received are not an HTTP/1.1 response, or one that uses a feature not supported here."""


class ResponseReader:
    """Parses the responses on one connection. Everything here is synchronous.

    Attributes:
        status: the status code; 0 until the head is complete. Interim (1xx) responses are skipped.
        headers: (name, value) pairs in the order received; names in lower case.
        started: at least one byte of this response has been received.
        complete: the whole response has been received; if :attr:`close_delimited`, the connection has ended.
        close_delimited: the response has neither a length nor chunks, so that its body ends with the connection.
            Meaningful once :attr:`status` is set.
        keep_alive: the connection can be used for another request once the response is complete.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: ChunkDecoder | None = None
        self.start_next()

    def start_next(self) -> None:
        """Reset the state for the response to the next request."""
        if self._chunks is not None:
            # The parser has not seen the body of the last response.
            self._parser = httptools.HttpResponseParser(self)
            self._chunks = None
        # The last bytes of a head whose end has not been received.
        self._head_tail = b""
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.started = False
        self.complete = False
        self.close_delimited = False
        self.keep_alive = False
        self._body: list[bytes] = []
        self._framing_bytes = 0
        self._fields: list[tuple[str, str]] = []
        # What is wrong with the head, though the parser accepts it.
        self._problem = ""
        self._is_chunked = False

    def feed(self, data: bytes) -> None:
        """Parse bytes from the socket.

        Raises:
            MalformedResponse: they are not a response that can be parsed. Body bytes before that can still be taken.
        """
        self.started = True
        self._framing_bytes += len(data)
        if self._chunks is None and not self.status:
            data = self._feed_head(data)
        if self._problem:
            # Before the body is parsed: nothing of it can be taken, however much of it came with the head.
            raise MalformedResponse(self._problem)
        if self._chunks is not None:
            self._feed_chunks(self._chunks, data)
        elif data:
            self._feed_parser(data)
        if self._framing_bytes > FRAMING_LIMIT and not self.complete:
            raise MalformedResponse(
                f"the head or the chunk framing of the response exceeds {FRAMING_LIMIT} bytes"
            )

    def _feed_head(self, data: bytes) -> bytes:
        """Parse heads, up to the end of the final one, and return the bytes behind it."""
        while not (self.status or self._problem):
            seen = len(self._head_tail)
            end = (self._head_tail + data).find(_END_OF_HEAD)
            if end < 0:
                self._head_tail = (self._head_tail + data)[-(len(_END_OF_HEAD) - 1) :]
                self._feed_parser(data)
                return b""
            end += len(_END_OF_HEAD) - seen
            self._head_tail = b""
            self._feed_parser(data[:end])
            data = data[end:]
            if not data:
                break
        if self.status and self._is_chunked:
            self._framing_bytes = len(data)
            self._chunks = ChunkDecoder()
        return data

    def _feed_chunks(self, chunks: ChunkDecoder, data: bytes) -> None:
        before = len(self._body)
        try:
            chunks.feed(data, self._body)
        except MalformedChunk as error:
            raise MalformedResponse(f"the response is not HTTP/1.1: {error}") from None
        if len(self._body) > before:
            self._framing_bytes = 0
        if chunks.complete:
            self.complete = True
        if chunks.surplus:
            # The connection is out of step and cannot be used again.
            self.keep_alive = False

    def _feed_parser(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise MalformedResponse("the server switched to another protocol") from None
        except httptools.HttpParserError as error:
            # Garbage after a complete response does not spoil it; `on_message_begin` has cleared `keep_alive`.
            if not self.complete:
                raise MalformedResponse(f"the response is not HTTP/1.1: {error}") from None

    def take(self) -> bytes:
        """Return the body bytes received since the last call; empty if there are none."""
        body = self._body
        if not body:
            return b""
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        return data

    def feed_eof(self) -> None:
        """Process the end of the connection.

        Raises:
            IncompleteResponse: the response is not complete.
        """
        self.keep_alive = False
        if self.complete:
            return
        if not self.status:
            raise IncompleteResponse("the connection was closed before the response began")
        if not self.close_delimited:
            raise IncompleteResponse("the connection was closed in the middle of the response")
        self.complete = True

    # Callbacks of httptools

    def on_message_begin(self) -> None:
        """See httptools."""
        # A second response, without a request for it: the connection is out of step and cannot be used again.
        if self.complete:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Called for trailers too, which are dropped."""
        self._fields.append((name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")))

    def on_headers_complete(self) -> None:
        """See httptools."""
        status = self._parser.get_status_code()
        if self.complete:
            return
        fields, self._fields = self._fields, []
        if status < _LOWEST_STATUS:
            self._problem = f"the response has the status {status}"
            return
        if status < 200:
            # An interim response; the final one follows. It has no body (RFC 9110, section 15.2). The parser would read
            # one all the same, and what it read would become part of the next response's.
            if any(name in _FRAMING_FIELDS and value.strip("0") for name, value in fields):
                self._problem = f"the interim response {status} announces a body"
            return
        self.status = status
        self.headers = fields
        codings = [value.strip().lower() for name, value in fields if name == "transfer-encoding"]
        self.close_delimited = (
            not codings
            and status not in _BODILESS_STATUSES
            and all(name != "content-length" for name, _ in fields)
        )
        if codings and codings != ["chunked"]:
            # `feed` raises for this: httptools would wrap an exception of a callback.
            self._problem = "the response has a transfer coding other than 'chunked'"
        self._is_chunked = codings == ["chunked"] and status not in _BODILESS_STATUSES
        self.keep_alive = self._parser.should_keep_alive()
        self._framing_bytes = 0

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        if not self.complete:
            self._body.append(body)
            self._framing_bytes = 0

    def on_message_complete(self) -> None:
        """See httptools."""
        if self.status:
            self.complete = True
