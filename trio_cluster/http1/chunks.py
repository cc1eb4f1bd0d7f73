"""The chunked transfer coding of a request's body (RFC 9112, section 7.1), decoded.

The decoder is written here, and not left to the parser of heads, because of what stands between the pieces of a body:
chunk extensions and trailers. That parser counts neither, and treats a trailer like a header: ``Connection: close`` in
one ends the connection. Here both are checked for their syntax, counted, and dropped.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["FRAMING_LIMIT", "TRAILER_LIMIT", "ChunkDecoder", "ChunkError"]

#: Bytes of extensions and trailers that a body may have, beyond what its chunks justify: 16 for each chunk, and two for
#: each byte of the body.
FRAMING_LIMIT: Final = 16 * 1024

#: Trailers that a body may have.
TRAILER_LIMIT: Final = 128

_PER_CHUNK: Final = 16
#: Blanks are allowed before an extension, and nowhere else.
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n")
_CRLF: Final = b"\r\n"
_HEX: Final = frozenset(b"0123456789abcdefABCDEF")

# What the next line is.
_SIZE, _END_OF_CHUNK, _TRAILER = range(3)


class ChunkError(Exception):
    """The body makes no sense, or has too much besides its data.

    Attributes:
        status: the HTTP status of the refusal.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ChunkDecoder:
    """Decodes one body.

    Attributes:
        complete: the last chunk and its trailers have come; what follows is the next request.
    """

    __slots__ = ("_excess", "_left", "_line", "_next", "_trailers", "complete")

    def __init__(self) -> None:
        self.complete = False
        self._next = _SIZE
        self._left = 0  # bytes of the current chunk that are still to come
        self._line = b""
        self._excess = 0
        self._trailers = 0

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        """Take in what has come.

        Args:
            data: the bytes of the connection.
            at: where in them the body goes on.

        Returns:
            The body's data in it, in one piece; and where the body ends in ``data``, or the length of ``data``.

        Raises:
            ChunkError: nothing more can be decoded.
        """
        pieces, size = [], len(data)
        while at < size and not self.complete:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                self._excess = max(0, self._excess - 2 * len(piece))
                continue
            end = data.find(b"\n", at) + 1
            stop = end or size
            self._excess += stop - at
            if self._excess > FRAMING_LIMIT:
                raise ChunkError(
                    431, f"The body has more than {FRAMING_LIMIT} bytes of chunk extensions and trailers"
                )
            self._line += data[at:stop]
            at = stop
            if end:
                line, self._line = self._line, b""
                self._on_line(line)
            elif self._next == _END_OF_CHUNK or (self._next == _SIZE and self._line[0] not in _HEX):
                # It cannot become a line of the kind that is due, so it is not waited for.
                self._check(_CRLF.startswith(self._line) and self._next == _END_OF_CHUNK)
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), at

    def _on_line(self, line: bytes) -> None:
        if self._next == _SIZE:
            match = _SIZE_LINE.fullmatch(line)
            self._check(match is not None)
            assert match is not None
            self._left = int(match[1], 16)
            self._next = _END_OF_CHUNK if self._left else _TRAILER
            self._excess = max(0, self._excess - _PER_CHUNK)
        elif self._next == _END_OF_CHUNK:
            self._check(line == _CRLF)
            self._next = _SIZE
        elif line == _CRLF:
            self.complete = True
        else:
            self._check(_TRAILER_LINE.fullmatch(line) is not None)
            self._trailers += 1
            if self._trailers > TRAILER_LIMIT:
                raise ChunkError(431, f"The body has more than {TRAILER_LIMIT} trailers")

    def _check(self, valid: bool) -> None:
        if not valid:
            where = {_SIZE: "size", _END_OF_CHUNK: "end", _TRAILER: "trailer"}[self._next]
            raise ChunkError(400, f"This is not a body in HTTP/1.1: invalid chunk {where}")
