"""A buffer that lets server-sent events be sent whole.

A large event arrives in pieces, and the answer may fail in the middle of it. Clients would read an error event that
follows half an event as a part of it. So the beginning of an event is kept until the rest has arrived.

The piece that was sent last is kept too, until another one is sent: an error event may have to continue its numbering,
and is left out if the stream has ended already (see ``openai/failures.py``).
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["EVENT_LIMIT", "EventBuffer"]

#: Bytes of one event that are kept until it is complete. A larger event is sent as it arrives, and if its answer fails
#: before it is complete, there is no error event.
EVENT_LIMIT: Final = 1 << 20

#: What ends an event. Upstream servers use any of the three line endings that the standard allows.
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


#: Bytes of the first event, and of what was sent last, that are kept. A failure is written with the help of them.
KEPT_BYTES: Final = 1 << 16
_HEAD_BYTES: Final = 1 << 10

_COLON: Final = ord(":")


class EventBuffer:
    """Keeps the beginning of an event that is not complete, and what is needed of the events that were sent.

    Args:
        keep_first: keep the first event, too.

    Attributes:
        torn: an event was sent in part, and its end was not.
        first: the first event; empty if it is not kept, or larger than :data:`KEPT_BYTES`.
        last: the piece that was sent last and has an event in it. Of a large piece, only the last event is kept, and of
            a large event its beginning and its end.
    """

    __slots__ = ("_keep_first", "_rest", "first", "last", "torn")

    def __init__(self, *, keep_first: bool = False) -> None:
        self._keep_first = keep_first
        self._rest = b""
        self.first = b""
        self.last: bytes | memoryview = b""
        self.torn = False

    def is_whole(self, data: bytes | memoryview) -> bool:
        """Return whether ``data`` ends with the end of an event, and nothing is kept that must be sent before it."""
        end = data if isinstance(data, bytes) else bytes(data[-4:])
        if self._rest or self.torn or not end.endswith(_BLANK_LINES):
            return False
        if data[0] != _COLON or _has_event(data):
            self.last = data
        return True

    def add(self, data: bytes) -> bytes:
        """Add the next bytes of the stream, and return those that can be sent now."""
        data = self._rest + data
        size = max(_after_last(data, blank_line) for blank_line in _BLANK_LINES)
        if size:
            self.torn = False
        if self.torn or len(data) - size > EVENT_LIMIT:
            self.torn = size < len(data)
            size = len(data)
        self._rest = data[size:]
        data = data[:size]
        if data and not self.torn:
            self._keep(data)
        return data

    def _keep(self, data: bytes) -> None:
        """Keep what is needed of ``data``, which is about to be sent and ends with the end of an event."""
        if self._keep_first:
            self._keep_first = False
            end = min((found for mark in _BLANK_LINES if (found := data.find(mark)) >= 0), default=0)
            if end <= KEPT_BYTES:
                self.first = data[:end]
        if not _has_event(data):
            return
        if len(data) > KEPT_BYTES:
            last = data[max(_after_last(data[:-4], blank_line) for blank_line in _BLANK_LINES) :]
            # The type of an event is at its beginning, and its number may be at its end.
            data = last if len(last) <= KEPT_BYTES else last[:_HEAD_BYTES] + last[_HEAD_BYTES - KEPT_BYTES :]
        self.last = data


def _has_event(data: bytes | memoryview) -> bool:
    """Return whether ``data``, which begins where an event or a comment begins, has an event in it."""
    return data[0] != _COLON or re.search(rb"[\r\n](?:data|event)", data) is not None


def _after_last(data: bytes, mark: bytes) -> int:
    """Return the position behind the last ``mark``; 0 if there is none."""
    found = data.rfind(mark)
    return 0 if found < 0 else found + len(mark)
