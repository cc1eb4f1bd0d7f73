"""Server-sent events are sent whole.

A large event travels in pieces, and its answer may fail after half of them. An error event behind half an event would be
a part of it to every client. So the beginning of an event is kept until the rest is there.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EVENT_LIMIT", "EventBuffer"]

#: Bytes of one event that are kept until it is complete. A larger event is sent as it arrives, and if its answer fails
#: before it is complete, there is no error event.
EVENT_LIMIT: Final = 1 << 20

#: What ends an event; servers elsewhere end their lines in any of the three ways that the standard allows.
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventBuffer:
    """What was received of an event that is not complete.

    Attributes:
        torn: a part of an event was sent, and not its end.
    """

    __slots__ = ("_rest", "torn")

    def __init__(self) -> None:
        self._rest = b""
        self.torn = False

    def is_whole(self, data: bytes | memoryview) -> bool:
        """Return whether ``data`` ends with the end of an event and may be sent without anything before it."""
        end = data if isinstance(data, bytes) else bytes(data[-4:])
        return end.endswith(_BLANK_LINES) and not (self._rest or self.torn)

    def add(self, data: bytes) -> bytes:
        """Take in the next bytes, and return those that can be sent."""
        data = self._rest + data
        size = max(_after_last(data, blank_line) for blank_line in _BLANK_LINES)
        if size:
            self.torn = False
        if self.torn or len(data) - size > EVENT_LIMIT:
            self.torn = size < len(data)
            size = len(data)
        self._rest = data[size:]
        return data[:size]


def _after_last(data: bytes, mark: bytes) -> int:
    """Return where what follows the last ``mark`` begins; 0 if there is none."""
    found = data.rfind(mark)
    return 0 if found < 0 else found + len(mark)
