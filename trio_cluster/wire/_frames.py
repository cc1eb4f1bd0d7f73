"""The frames in which a websocket carries messages, as far as this protocol needs them (RFC 6455, section 5).

The library that opens and closes the websocket can do all of this. But a token costs less than the way through a
general implementation: a message would be taken apart into events, put together again, and handed from one task to
another. So whole messages are framed and unframed here, and everything that is not a binary message, which is rare,
is left to the library: pings, pongs, and the frame that says goodbye.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from ._errors import ProtocolError

__all__ = ["FrameReader", "frame"]

_CONTINUATION, _TEXT, _BINARY, _CONTROL = 0, 1, 2, 8
_FIN: Final = 0x80
_RESERVED: Final = 0x70
_MASKED: Final = 0x80
_KEY_SIZE: Final = 4


def frame(payload: bytes, *, masked: bool) -> bytes:
    """Return a binary message as one frame.

    Args:
        payload: the message.
        masked: as the one who connected has to send it. The key is drawn anew for each frame, so that no one who
            has a say in what is sent can choose the bytes that are seen on the way.
    """
    size = len(payload)
    bit = _MASKED if masked else 0
    if size < 126:
        head = bytes((_FIN | _BINARY, bit | size))
    elif size < 1 << 16:
        head = b"%c%c%b" % (_FIN | _BINARY, bit | 126, size.to_bytes(2, "big"))
    else:
        head = b"%c%c%b" % (_FIN | _BINARY, bit | 127, size.to_bytes(8, "big"))
    if not masked:
        return head + payload
    key = secrets.token_bytes(_KEY_SIZE)
    return head + key + _mask(payload, key)


def _mask(data: bytes, key: bytes) -> bytes:
    """Return ``data`` masked, or unmasked, with a key: as two large numbers, which is as fast as Python gets."""
    size = len(data)
    keys = (key * (size // _KEY_SIZE + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(keys, "little")).to_bytes(size, "little")


class FrameReader:
    """Finds the binary messages in what comes in.

    Args:
        masked: whether the peer has to mask what it sends, as the one who connected has to.
        limit: bytes that a message may have.
        on_control: given each control frame, whole and as it came.
    """

    def __init__(self, *, masked: bool, limit: int, on_control: Callable[[bytes], None]) -> None:
        self._masked = masked
        self._limit = limit
        self._on_control = on_control
        self._data = b""
        self._at = 0
        self._fragments: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Take in what has come."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    def take_rest(self) -> bytes:
        """Return what has come and is no message yet, for somebody else to go on with."""
        rest, self._data = self._data[self._at :], b""
        self._at = 0
        return rest

    def next_message(self) -> bytes | None:
        """Return the next message, or ``None`` if more has to come first.

        Raises:
            ProtocolError: this is nothing that a peer of ours may send.
        """
        while True:
            data, at = self._data, self._at
            there = len(data) - at
            if there < 2:
                return None
            first, second = data[at], data[at + 1]
            size = second & 0x7F
            begin = at + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                if there < 2 + width:
                    return None
                size = int.from_bytes(data[begin : begin + width], "big")
                begin += width
            self._check(first, second, size)
            if self._masked:
                begin += _KEY_SIZE
            end = begin + size
            if len(data) < end:
                return None
            self._at = end
            if first >= _FIN | _CONTROL:
                self._on_control(data[at:end])
                continue
            payload = data[begin:end]
            if self._masked:
                payload = _mask(payload, data[begin - _KEY_SIZE : begin])
            if first == _FIN | _BINARY:
                return payload
            self._fragments.append(payload)
            if first & _FIN:
                whole = b"".join(self._fragments)
                self._fragments = []
                return whole

    def _check(self, first: int, second: int, size: int) -> None:
        """Look at the head of a frame.

        Raises:
            ProtocolError: it cannot be that of one.
        """
        opcode = first & 0x0F
        if bool(second & _MASKED) is not self._masked or first & _RESERVED:
            raise ProtocolError(
                "a frame that is none, or that is masked when it must not be, or is not when it must"
            )
        if opcode == _TEXT:
            raise ProtocolError("a text message; this protocol is binary")
        if opcode > _CONTROL + 2 or _BINARY < opcode < _CONTROL:
            raise ProtocolError("a frame of a kind that there is not")
        if opcode >= _CONTROL:
            if size >= 126 or not first & _FIN:
                raise ProtocolError("a control frame that is too large, or in pieces")
            return
        if (opcode == _CONTINUATION) is not bool(self._fragments):
            raise ProtocolError("a message in the middle of another one, or the rest of none")
        if size + sum(map(len, self._fragments)) > self._limit:
            raise ProtocolError(f"a message beyond the maximum message size of {self._limit} bytes")
