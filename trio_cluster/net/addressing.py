"""Which process of a master a connection of a worker is for.

A master may be several processes behind one port (``group/``). A worker has a link to each, so a connection has to say
which of them it is for. It does so at its very beginning, where a process that only passes connections on can see it
without taking anything from the connection: in a header of the opening handshake (:data:`PROCESS_HEADER`), and with TLS
in the ClientHello, as the name of an application protocol (ALPN, RFC 7301) that stands before ``http/1.1``. A server
that does not know such names, or a proxy that ends TLS, chooses ``http/1.1``.

Nothing here reads from a connection: what it has sent so far is passed, and the answer is a number, that there is none,
or that more is needed.
"""

from __future__ import annotations

import re
from typing import Final

from ..core.limits import PROCESSES_MAX

__all__ = ["HEAD_MAX", "PROCESS_HEADER", "Incomplete", "addressed_process", "protocol_for"]

#: The header that names the process, by its number.
PROCESS_HEADER: Final = "x-trio-cluster-process"
#: Bytes that are looked at. What is longer names no process.
HEAD_MAX: Final = 16 * 1024

#: The beginning of the name of an application protocol; the number follows.
_PROTOCOL: Final = b"trio-cluster-process-"
#: The first bytes of a TLS record with a handshake message, and of that message.
_HANDSHAKE_RECORD: Final = 0x16
_CLIENT_HELLO: Final = 0x01
#: The number of the extension.
_ALPN: Final = 16
_NAMED: Final = re.compile(
    rb"\r?\n" + PROCESS_HEADER.encode() + rb":[ \t]*([0-9]{1,2})[ \t]*\r?\n", re.IGNORECASE
)
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")


class Incomplete(Exception):
    """The connection has to send more before it can be told."""


def protocol_for(process: int) -> str:
    """Return the application protocol that names a process."""
    return f"{_PROTOCOL.decode()}{process}"


def addressed_process(data: bytes) -> int | None:
    """Return the process that a connection is for; ``None`` if it names none, be it that it speaks something else.

    Args:
        data: what the connection has sent so far.

    Raises:
        Incomplete: more is needed.
    """
    if not data:
        raise Incomplete
    if data[0] == _HANDSHAKE_RECORD:
        return _named_in_hello(data)
    end = _HEAD_END.search(data)
    if end is None:
        if len(data) >= HEAD_MAX:
            return None
        raise Incomplete
    named = _NAMED.search(data, 0, end.start() + 2)
    return None if named is None else _number(named[1])


def _number(digits: bytes) -> int | None:
    if not digits.isdigit() or len(digits) > 2:
        return None
    number = int(digits)
    return number if number < PROCESSES_MAX else None


def _named_in_hello(data: bytes) -> int | None:
    hello = _Reader(_client_hello(data))
    try:
        # Version and random; session id; cipher suites; compression methods.
        hello.take(34)
        hello.take_vector(1)
        hello.take_vector(2)
        hello.take_vector(1)
        extensions = _Reader(hello.take_vector(2))
        while extensions:
            kind, content = extensions.take_number(2), extensions.take_vector(2)
            if kind == _ALPN:
                names = _Reader(_Reader(content).take_vector(2))
                while names:
                    name = names.take_vector(1)
                    if name.startswith(_PROTOCOL):
                        return _number(name.removeprefix(_PROTOCOL))
    except ValueError:
        # No ClientHello; whoever serves the connection finds out what is wrong.
        pass
    return None


def _client_hello(data: bytes) -> bytes:
    """Return the content of the first handshake message, which may be spread over several records.

    It is empty if that is no ClientHello.

    Raises:
        Incomplete: its end is missing.
    """
    records, message = _Reader(data), b""
    while True:
        try:
            kind, _, content = records.take_number(1), records.take(2), records.take_vector(2)
        except ValueError:
            if len(data) >= HEAD_MAX:
                return b""
            raise Incomplete from None
        if kind != _HANDSHAKE_RECORD or not content:
            return b""
        message += content
        if message[0] != _CLIENT_HELLO:
            return b""
        if len(message) >= 4:
            size = int.from_bytes(message[1:4], "big")
            if len(message) >= 4 + size:
                return message[4 : 4 + size]


class _Reader:
    """Takes fields of TLS from bytes; ``ValueError`` if there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError("too short")
        found, self._at = self._data[self._at : end], end
        return found

    def take_number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def take_vector(self, size: int) -> bytes:
        """Take a length of so many bytes, and what it is the length of."""
        return self.take(self.take_number(size))
