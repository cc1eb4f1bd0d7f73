"""The decoder for a body in the chunked transfer coding (RFC 9112, section 7.1).

The parser library refuses blanks around a chunk extension (``000A ; x``), which the grammar allows. What could be read
in two ways is refused here too: sizes that are not plain hexadecimal digits, and lines that do not end with CRLF.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["ChunkDecoder", "MalformedChunk"]

_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_CRLF: Final = b"\r\n"


class MalformedChunk(ValueError):
    """The bytes are not a chunked body."""


class ChunkDecoder:
    """Decodes one body. Synchronous.

    Attributes:
        complete: the last chunk and the trailers, which are dropped, have been read.
        surplus: bytes have been fed that come after the body.
    """

    __slots__ = ("_left", "_line", "_trailers", "complete", "surplus")

    def __init__(self) -> None:
        self.complete = False
        self.surplus = False
        # Bytes of the current chunk that are still to come, with the CRLF behind its data; 0 between chunks.
        self._left = 0
        # The beginning of a line whose end has not been fed yet.
        self._line = b""
        self._trailers = False

    def feed(self, data: bytes, pieces: list[bytes]) -> None:
        """Decode the next bytes.

        Args:
            data: what has been received.
            pieces: the data of chunks is appended to it.

        Raises:
            MalformedChunk: they are not a chunked body; ``pieces`` has what came before.
        """
        position, end = 0, len(data)
        while position < end:
            if self.complete:
                self.surplus = True
                return
            position = (
                self._chunk_data(data, position, pieces) if self._left else self._framing_line(data, position)
            )

    def _chunk_data(self, data: bytes, position: int, pieces: list[bytes]) -> int:
        """Take data of the current chunk, or of the CRLF behind it, and return where the rest begins."""
        taken = data[position : position + self._left]
        content = self._left - len(_CRLF)
        if content > 0 and (piece := taken[:content]):
            pieces.append(piece)
        closing = taken[max(content, 0) :]
        if closing and not _CRLF[-min(self._left, len(_CRLF)) :].startswith(closing):
            raise MalformedChunk("a chunk is longer than its size")
        self._left -= len(taken)
        return position + len(taken)

    def _framing_line(self, data: bytes, position: int) -> int:
        """Take a size line or a line of the trailers, and return where the rest begins."""
        end = data.find(b"\n", position)
        if end < 0:
            self._line += data[position:]
            return len(data)
        line, self._line = self._line + data[position : end + 1], b""
        if not line.endswith(_CRLF):
            raise MalformedChunk("a line of the chunk framing does not end with CRLF")
        line = line[:-2]
        if self._trailers:
            self.complete = not line
            return end + 1
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise MalformedChunk("invalid chunk size")
        size = int(match[1], 16)
        self._left = size + len(_CRLF) if size else 0
        self._trailers = not size
        return end + 1
