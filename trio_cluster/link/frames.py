"""The frames in which a websocket carries messages, as far as this protocol needs them (RFC 6455, section 5).

The library that opens and closes the websocket can do all of this. But a token costs less than the way through a
general implementation: a message would be taken apart into events, put together again, and handed from one task to
another. So whole messages are framed and unframed here, and everything that is not a binary message, which is rare,
is left to the library: pings, pongs, and the frame that says goodbye.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Final

from ..protocol.errors import ProtocolError

__all__ = ["FrameReader", "choose_mask", "frame", "mask_in_python"]

logger = logging.getLogger("trio_cluster.link")

_CONTINUATION, _TEXT, _BINARY, _CONTROL = 0, 1, 2, 8
_FIN: Final = 0x80
_RESERVED: Final = 0x70
_MASKED: Final = 0x80
_KEY_SIZE: Final = 4
# Bytes to check a masking function with.
_SAMPLE: Final = bytes(range(251))


def frame(payload: bytes, *, masked: bool) -> bytes:
    """Return a binary message as one frame.

    Args:
        payload: the message.
        masked: as the one who connected has to send it. The key is drawn anew for each frame, so that no one who
            has a say in what is sent can choose the bytes that are seen on the way.
    """
    head = _head(_FIN | _BINARY, len(payload), masked=masked)
    if not masked:
        return head + payload
    key = secrets.token_bytes(_KEY_SIZE)
    return head + key + _mask(payload, key)


def _head(first: int, size: int, *, masked: bool) -> bytes:
    bit = _MASKED if masked else 0
    if size < 126:
        return b"%c%c" % (first, bit | size)
    if size < 1 << 16:
        return b"%c%c%b" % (first, bit | 126, size.to_bytes(2, "big"))
    return b"%c%c%b" % (first, bit | 127, size.to_bytes(8, "big"))


def mask_in_python(data: bytes, key: bytes) -> bytes:
    """Return ``data`` masked, or unmasked, with a key of 4 bytes, by one XOR of two large integers."""
    size = len(data)
    keys = (key * (size // _KEY_SIZE + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(keys, "little")).to_bytes(size, "little")


def choose_mask() -> Callable[[bytes, bytes], bytes]:
    """Return the fastest function that masks correctly: the compiled one of ``websockets``, or :func:`mask_in_python`.

    The compiled one takes 1.3 µs for 64 KiB, the other 120 to 180 µs, which is two fifths of what a large answer costs
    its worker. But it is not public API and not compiled everywhere, so it is used only if it gives the right answers
    for the arguments that it is called with here. That is checked once, and not left to each frame.
    """
    try:
        from websockets.speedups import apply_mask
    except ImportError:
        return mask_in_python
    try:
        # The example in RFC 6455, section 5.7; and a length at which vector instructions and a remainder are used.
        answers = [apply_mask(b"Hello", b"\x37\xfa\x21\x3d"), apply_mask(_SAMPLE, b"\x01\x02\x03\x04")]
        expected = [b"\x7f\x9f\x4d\x51\x58", mask_in_python(_SAMPLE, b"\x01\x02\x03\x04")]
        if answers == expected and {type(answer) for answer in answers} == {bytes}:
            return apply_mask
        problem = "wrong answer"
    except Exception as error:
        problem = repr(error)
    logger.warning("websockets.speedups.apply_mask cannot be used, masking in Python: %s", problem)
    return mask_in_python


_mask = choose_mask()


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
        # Of a message in several frames, those that have come.
        self._begun: bytearray | None = None

    def feed(self, data: bytes) -> None:
        """Take in what has come."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    def take_remainder(self) -> bytes:
        """Return what has come and is no message yet, for somebody else to go on with."""
        rest, self._data = self._data[self._at :], b""
        self._at = 0
        if self._begun is not None:
            # With a key of zeros, bytes are masked as they are.
            key = bytes(_KEY_SIZE) if self._masked else b""
            rest = _head(_BINARY, len(self._begun), masked=self._masked) + key + self._begun + rest
            self._begun = None
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
                if size < (126 if width == 2 else 1 << 16):
                    raise ProtocolError("a frame that tells its size in more bytes than that needs")
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
            if self._begun is None:
                self._begun = bytearray()
            self._begun += payload
            if first & _FIN:
                whole = bytes(self._begun)
                self._begun = None
                return whole

    def _check(self, first: int, second: int, size: int) -> None:
        """Look at the head of a frame.

        Raises:
            ProtocolError: it cannot be that of one.
        """
        opcode = first & 0x0F
        if first & _RESERVED:
            raise ProtocolError("a frame with a reserved bit; there are no extensions here")
        if bool(second & _MASKED) is not self._masked:
            raise ProtocolError("a frame that is not masked" if self._masked else "a frame that is masked")
        if opcode == _TEXT:
            raise ProtocolError("a text message; this protocol is binary")
        if opcode > _CONTROL + 2 or _BINARY < opcode < _CONTROL:
            raise ProtocolError("a frame of a kind that there is not")
        if opcode >= _CONTROL:
            if size >= 126 or not first & _FIN:
                raise ProtocolError("a control frame that is too large, or in pieces")
            return
        if (opcode == _CONTINUATION) is (self._begun is None):
            raise ProtocolError("a message in the middle of another one, or the rest of none")
        if size + len(self._begun or b"") > self._limit:
            raise ProtocolError(f"a message beyond the maximum message size of {self._limit} bytes")
