"""Removal of what stands before and after a form: the preamble and the epilogue of ``multipart/form-data``.

Both have no meaning (RFC 2046, section 5.1.1), and no client of an API sends them. But a server that does not read the
body of a request, and keeps its connection, takes what it finds there for the next request: a preamble can carry a
whole one. Between the first delimiter and the last, every byte stays as it is.

A declared length has to stay true, and it is sent before the end of a streamed form is known. The epilogue of such a
form is therefore replaced by line breaks, which HTTP servers skip in front of a request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from multipart import parse_options_header  # type: ignore[import-untyped]

from trio_cluster.errors import InvalidRequest

__all__ = ["FormTrimmer", "trim_form", "trim_streamed_form"]

#: Bytes of a preamble that are searched for the first delimiter.
_MAX_PREAMBLE: Final = 64 * 1024


class FormTrimmer:
    """Removes the preamble and the epilogue of a form piece by piece. Synchronous.

    Args:
        content_type: the request's content type, which names the boundary.
        pad: replace the epilogue by line breaks instead of removing it.

    Attributes:
        removed: bytes of the preamble that were removed.
        started: the first delimiter has been found.

    Raises:
        InvalidRequest: the content type has no boundary.
    """

    def __init__(self, content_type: str, *, pad: bool = False) -> None:
        boundary = parse_options_header(content_type)[1].get("boundary", "").encode("latin-1", "replace")
        if not boundary:
            raise InvalidRequest("The content type of the form has no boundary")
        self._delimiter = b"\r\n--" + boundary
        self._last_delimiter = self._delimiter + b"--"
        self._pad = pad
        # What is searched together with the next piece. The line break in front of the first delimiter may be missing.
        self._tail = b"\r\n"
        self._ended = False
        self.removed = 0
        self.started = False

    def feed(self, data: bytes) -> bytes:
        """Return what can be sent on of the next piece; may be empty.

        Raises:
            InvalidRequest: there is no delimiter within the first 64 KiB.
        """
        if not self.started:
            # The tail is the whole preamble so far, behind the two bytes that were put in front of it.
            self._tail += data
            begin = self._tail.find(self._delimiter)
            if begin < 0:
                if len(self._tail) > _MAX_PREAMBLE:
                    raise _no_delimiter()
                return b""
            self.started = True
            self.removed = begin
            data, self._tail = self._tail[begin + 2 :], b"\r\n"
        if self._ended:
            return self._epilogue(data)
        # A delimiter may be in two pieces. Nothing is held back for that: its first half can be sent on.
        searched = self._tail + data
        found = searched.find(self._last_delimiter)
        if found < 0:
            self._tail = searched[-(len(self._last_delimiter) - 1) :]
            return data
        self._ended = True
        end = found + len(self._last_delimiter) - len(self._tail)
        return data[:end] + self._epilogue(data[end:])

    def _epilogue(self, data: bytes) -> bytes:
        if self._pad:
            return (b"\r\n" * (len(data) // 2 + 1))[: len(data)]
        # Most clients end a form with a line break, and some servers wait for it.
        return b"\r\n" if data.startswith(b"\r\n") else b""


def trim_form(body: bytes, content_type: str) -> bytes:
    """Return a form without preamble and epilogue. Synchronous.

    Raises:
        InvalidRequest: the content type has no boundary, or the body no delimiter.
    """
    trimmer = FormTrimmer(content_type)
    trimmed = trimmer.feed(body)
    if not trimmer.started:
        raise _no_delimiter()
    return trimmed


async def trim_streamed_form(
    receive: Callable[[], Awaitable[bytes]], content_type: str, size: int
) -> tuple[Callable[[], Awaitable[bytes]], int]:
    """Trim a form that is still arriving. A checkpoint: waits for the first delimiter.

    Args:
        receive: returns the next piece of the form, and ``b""`` at its end.
        content_type: the request's content type, which names the boundary.
        size: the size of the form in bytes; -1 if it is not known.

    Returns:
        A function like ``receive`` for the trimmed form, and its size; -1 if that is not known.

    Raises:
        InvalidRequest: the content type has no boundary, or there is no delimiter within the first 64 KiB.
    """
    trimmer = FormTrimmer(content_type, pad=size >= 0)
    first = b""
    while not trimmer.started:
        data = await receive()
        if not data:
            raise _no_delimiter()
        first = trimmer.feed(data)

    async def receive_trimmed() -> bytes:
        nonlocal first
        if first:
            piece, first = first, b""
            return piece
        while data := await receive():
            if piece := trimmer.feed(data):
                return piece
        return b""

    return receive_trimmed, size if size < 0 else size - trimmer.removed


def _no_delimiter() -> InvalidRequest:
    return InvalidRequest("The request body is not valid multipart/form-data: it has no delimiter")
