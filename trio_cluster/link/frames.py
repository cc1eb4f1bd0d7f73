"""Websocket frames (RFC 6455, section 5), as far as this protocol needs them.

The library that performs the opening and the closing handshake could do all of this. But a token costs less than its
way through a general implementation, in which a message is split into events, joined again, and passed from one task
to another. So whole binary messages are framed and unframed here. Control frames, which are rare, are left to the
library.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Final

from ..protocol.errors import ProtocolError

__all__ = [
    "FrameReader",
    "FramingError",
    "choose_mask",
    "close_frame",
    "frame",
    "mask_in_python",
    "truncate_reason",
]

logger = logging.getLogger("trio_cluster.link")

# Opcodes. Those of control frames have the highest of the four bits set, and the last one that is defined is pong.
_CONTINUATION, _TEXT, _BINARY, _CONTROL, _LAST_CONTROL = 0x0, 0x1, 0x2, 0x8, 0xA
_CLOSE: Final = 0x8
_PING: Final = 0x9
# Bits of the first byte of a frame, and of the second.
_FIN: Final = 0x80
_RESERVED_BITS: Final = 0x70
_MASK_BIT: Final = 0x80
_KEY_SIZE: Final = 4
_CONTROL_PAYLOAD_MAX: Final = 125
# Close codes (RFC 6455, section 7.4.1).
_PROTOCOL_ERROR, _UNSUPPORTED_DATA, _INVALID_DATA, _TOO_BIG = 1002, 1003, 1007, 1009
# The codes that a close frame may carry: those that are registered, and those of applications. The others are reserved,
# or stand for something that is never sent, such as 1006 for a connection that was lost. 1014 was registered later, and
# the library refuses it.
_SENDABLE_CODES: Final = frozenset({*range(1000, 1004), *range(1007, 1014), *range(3000, 5000)})
#: Bytes of reason that fit into a close frame: 125, less 2 for the code.
_CLOSE_REASON_MAX: Final = 123
# Bytes to check a masking function with.
_SAMPLE: Final = bytes(range(251))


class FramingError(ProtocolError):
    """The peer violated RFC 6455, or sent a frame that this protocol does not use.

    Nothing more can be read of what it sends: where the next frame begins is not known.

    Attributes:
        code: the close code that says so (RFC 6455, section 7.4.1).
    """

    def __init__(self, reason: str, code: int = _PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.code = code


def close_frame(code: int, reason: str, *, masked: bool) -> bytes:
    """Return a close frame with as much of ``reason`` as it holds."""
    return _frame(_FIN | _CLOSE, code.to_bytes(2, "big") + truncate_reason(reason).encode(), masked=masked)


def ping_frame(*, masked: bool) -> bytes:
    """Return a ping without content."""
    return _frame(_FIN | _PING, b"", masked=masked)


def truncate_reason(reason: str) -> str:
    """Return as much of a reason as fits into a close frame."""
    return reason.encode()[:_CLOSE_REASON_MAX].decode(errors="ignore")


def frame(payload: bytes, *, masked: bool) -> bytes:
    """Return a binary message as one frame.

    Args:
        payload: the message.
        masked: whether to mask it, as a client must. Each frame has a new, random key, so that a third party that has
            a say in what is sent cannot choose the bytes that intermediaries see (RFC 6455, section 10.3).
    """
    return _frame(_FIN | _BINARY, payload, masked=masked)


def _frame(first: int, payload: bytes, *, masked: bool) -> bytes:
    head = _head(first, len(payload), masked=masked)
    if not masked:
        return head + payload
    key = secrets.token_bytes(_KEY_SIZE)
    return head + key + _mask(payload, key)


def _head(first: int, size: int, *, masked: bool) -> bytes:
    bit = _MASK_BIT if masked else 0
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

    The compiled one takes 1.3 µs for 64 KiB, the other 175 µs, which is two fifths of what a large answer costs
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
    """Extracts binary messages from a byte stream.

    Args:
        masked: whether the peer is the client, which has to mask its frames.
        limit: bytes that a message may have.
        on_control: called with each control frame, complete and still masked.
    """

    def __init__(self, *, masked: bool, limit: int, on_control: Callable[[bytes], None]) -> None:
        self._masked = masked
        self._limit = limit
        self._on_control = on_control
        self._data = b""
        self._position = 0
        # The fragments of a message that have come in so far, joined; None between two messages.
        self._fragments: bytearray | None = None

    def feed(self, data: bytes) -> None:
        """Add bytes that have come in."""
        self._data = self._data[self._position :] + data if self._position < len(self._data) else data
        self._position = 0

    def take_remainder(self) -> bytes:
        """Return what has come in and has not been returned as a message, so that another reader can go on from there.

        The fragments of an incomplete message are returned as one frame.
        """
        rest, self._data = self._data[self._position :], b""
        self._position = 0
        if self._fragments is not None:
            # A key of zeros leaves the bytes as they are.
            key = bytes(_KEY_SIZE) if self._masked else b""
            rest = _head(_BINARY, len(self._fragments), masked=self._masked) + key + self._fragments + rest
            self._fragments = None
        return rest

    def next_message(self) -> bytes | None:
        """Return the next message, or ``None`` if it is not complete yet.

        Raises:
            FramingError: a frame violates RFC 6455, or is one that this protocol does not use.
        """
        while True:
            data, position = self._data, self._position
            available = len(data) - position
            if available < 2:
                return None
            first, second = data[position], data[position + 1]
            size = second & 0x7F
            start = position + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                if available < 2 + width:
                    return None
                size = int.from_bytes(data[start : start + width], "big")
                start += width
                if size < (126 if width == 2 else 1 << 16):
                    raise FramingError("payload length not encoded in the minimal number of bytes")
            self._check(first, second, size)
            if self._masked:
                start += _KEY_SIZE
            end = start + size
            if len(data) < end:
                return None
            self._position = end
            if first >= _FIN | _CONTROL:
                if first == _FIN | _CLOSE:
                    self._check_close(data[start:end], data[start - _KEY_SIZE : start])
                self._on_control(data[position:end])
                continue
            payload = data[start:end]
            if self._masked:
                payload = _mask(payload, data[start - _KEY_SIZE : start])
            if first == _FIN | _BINARY:
                return payload
            if self._fragments is None:
                self._fragments = bytearray()
            self._fragments += payload
            if first & _FIN:
                whole = bytes(self._fragments)
                self._fragments = None
                return whole

    def _check_close(self, payload: bytes, key: bytes) -> None:
        """Check what a close frame says (RFC 6455, sections 5.5.1 and 7.4).

        Raises:
            FramingError: as :meth:`next_message`.
        """
        if not payload:
            return
        if self._masked:
            payload = _mask(payload, key)
        if len(payload) == 1:
            raise FramingError("close frame with half a close code")
        code = int.from_bytes(payload[:2], "big")
        if code not in _SENDABLE_CODES:
            raise FramingError(f"close frame with close code {code}, which must not be sent")
        try:
            payload[2:].decode()
        except UnicodeDecodeError:
            raise FramingError("close frame with a reason that is not UTF-8", _INVALID_DATA) from None

    def _check(self, first: int, second: int, size: int) -> None:
        """Check the header of a frame: its first two bytes and its payload length.

        Raises:
            FramingError: as :meth:`next_message`.
        """
        opcode = first & 0x0F
        if first & _RESERVED_BITS:
            raise FramingError("reserved bit set, but no extension was negotiated")
        if bool(second & _MASK_BIT) is not self._masked:
            raise FramingError(
                "unmasked frame from the client" if self._masked else "masked frame from the server"
            )
        if opcode == _TEXT:
            raise FramingError("text message; this protocol is binary", _UNSUPPORTED_DATA)
        if opcode > _LAST_CONTROL or _BINARY < opcode < _CONTROL:
            raise FramingError(f"reserved opcode {opcode:#x}")
        if opcode >= _CONTROL:
            if not first & _FIN:
                raise FramingError("fragmented control frame")
            if size > _CONTROL_PAYLOAD_MAX:
                raise FramingError(f"control frame payload longer than {_CONTROL_PAYLOAD_MAX} bytes")
            return
        if opcode == _CONTINUATION and self._fragments is None:
            raise FramingError("unexpected continuation frame")
        if opcode != _CONTINUATION and self._fragments is not None:
            raise FramingError("expected a continuation frame, not the start of another message")
        if size + len(self._fragments or b"") > self._limit:
            raise FramingError(f"message longer than {self._limit} bytes", _TOO_BIG)
