"""A buffer that lets server-sent events be sent whole.

A large event arrives in pieces, and the answer may fail in the middle of it. Clients would read an error event that
follows half an event as a part of it. So the beginning of an event is kept until the rest has arrived.
"""

from __future__ import annotations

from typing import Final

__all__ = ["EVENT_LIMIT", "EventBuffer"]

#: Bytes of one event that are kept until it is complete. A larger event is sent as it arrives, and if its answer fails
#: before it is complete, there is no error event.
EVENT_LIMIT: Final = 1 << 20

#: What ends an event. Upstream servers use any of the three line endings that the standard allows.
_BLANK_LINES: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class EventBuffer:
    """Keeps the beginning of an event that is not complete.

    Attributes:
        torn: an event was sent in part, and its end was not.
    """

    __slots__ = ("_rest", "torn")

    def __init__(self) -> None:
        self._rest = b""
        self.torn = False

    def is_whole(self, data: bytes | memoryview) -> bool:
        """Return whether ``data`` ends with the end of an event, and nothing is kept that must be sent before it."""
        end = data if isinstance(data, bytes) else bytes(data[-4:])
        return end.endswith(_BLANK_LINES) and not (self._rest or self.torn)

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
        return data[:size]


def _after_last(data: bytes, mark: bytes) -> int:
    """Return the position behind the last ``mark``; 0 if there is none."""
    found = data.rfind(mark)
    return 0 if found < 0 else found + len(mark)
