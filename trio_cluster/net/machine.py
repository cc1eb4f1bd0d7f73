"""What happens to this machine that makes its connections doubtful: it was suspended, or its addresses have changed.

Theory of operation
===================

Neither is reported on a connection. A laptop that wakes has connections that the other ends, and the routers between,
may have forgotten; one that has changed its network has connections from an address that it does not have any more.
Both would only be noticed by silence.

*Suspended*: one clock stands still while the machine is suspended, and another one does not, so the difference between
the two grows. On Linux these are ``CLOCK_MONOTONIC`` and ``CLOCK_BOOTTIME``. Elsewhere the second one is the wall
clock, which can also be set; so a difference there is only a reason to look. :class:`SuspensionClock` has no timer. It
is read whenever a heartbeat is due.

*Addresses*: Linux reports each change on a netlink socket. It also reports what is no change, such as a longer lifetime
of an address that is there, whenever a router advertises it. So :class:`AddressBook` knows all addresses, and compares.
Not in it are addresses of one network card only (``fe80::``), which come and go with each container, and those that may
not be used yet. On other systems, and where a sandbox allows no such socket, nothing is reported.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import trio

__all__ = ["AddressBook", "Machine", "SuspensionClock", "ThisMachine"]

logger = logging.getLogger("trio_cluster.client")

#: A growth of the difference that counts, in seconds. Less is no suspension, but the time between two readings.
_SUSPENDED: Final = 1.0
_BOOTTIME: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)

# From linux/netlink.h, linux/rtnetlink.h and linux/if_addr.h.
_NETLINK_ROUTE = 0
_RTMGRP_ADDRESSES: Final = 0x10 | 0x100
_NEWADDR, _DELADDR, _GETADDR, _DONE, _ERROR = 20, 21, 22, 3, 2
_REQUEST_ALL: Final = 0x301
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_UNUSABLE: Final = 0x40 | 0x08
_SCOPE_LINK: Final = 253
_HEADER: Final = struct.Struct("=IHHII")
_ADDRESS: Final = struct.Struct("=BBBBI")
_ATTRIBUTE: Final = struct.Struct("=HH")
_RECEIVE: Final = 64 * 1024


class Machine(Protocol):
    """What a worker needs to know of its machine."""

    def suspended_for(self) -> float:
        """Return for how many seconds the machine was suspended since the last call; 0 if it was not. Synchronous."""
        ...

    async def watch_addresses(self, on_changed: Callable[[], None]) -> None:
        """Call ``on_changed`` whenever the addresses of the machine have changed, until cancelled. A checkpoint.

        Returns if changes are not reported here.
        """
        ...


def _always() -> float:
    """Return the time by a clock that also runs while the machine is suspended."""
    return time.time() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)


class SuspensionClock:
    """Finds out by two clocks for how long the machine was suspended.

    Args:
        awake: a clock that stands still meanwhile, in seconds.
        always: a clock that does not.
    """

    def __init__(
        self, awake: Callable[[], float] = time.monotonic, always: Callable[[], float] = _always
    ) -> None:
        self._awake = awake
        self._always = always
        self._difference = always() - awake()

    def suspended_for(self) -> float:
        """See ``Machine``."""
        before, self._difference = self._difference, self._always() - self._awake()
        gap = self._difference - before
        return gap if gap >= _SUSPENDED else 0.0


class AddressBook:
    """The addresses of a machine, by what a netlink socket says. Without IO.

    Its first answer is expected to be that to :meth:`request_all`; what is in that is no change.
    """

    def __init__(self) -> None:
        self._known: set[tuple[int, bytes]] = set()
        self._complete = False

    @staticmethod
    def request_all() -> bytes:
        """Return the request for all addresses."""
        return _HEADER.pack(_HEADER.size + _ADDRESS.size, _GETADDR, _REQUEST_ALL, 1, 0) + bytes(_ADDRESS.size)

    def forget(self) -> None:
        """Begin anew: something was missed, and all addresses are asked for once more."""
        self._known.clear()
        self._complete = False

    def receive(self, data: bytes) -> bool:
        """Take note of what has come, and return whether the addresses are others than before.

        Args:
            data: a datagram.
        """
        changed = False
        for kind, body in _messages(data):
            if kind in (_DONE, _ERROR):
                self._complete = True
            elif kind in (_NEWADDR, _DELADDR):
                changed |= self._note(kind, body) and self._complete
        return changed

    def _note(self, kind: int, body: bytes) -> bool:
        if len(body) < _ADDRESS.size:
            return False
        _, _, flags, scope, index = _ADDRESS.unpack_from(body)
        attributes = dict(_attributes(body[_ADDRESS.size :]))
        if len(attributes.get(_IFA_FLAGS, b"")) == 4:
            flags = int.from_bytes(attributes[_IFA_FLAGS], sys.byteorder)
        # The other end's, if there are two.
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
        if address is None or scope >= _SCOPE_LINK:
            return False
        entry = index, address
        before = entry in self._known
        if kind == _DELADDR or flags & _UNUSABLE:
            self._known.discard(entry)
            return before
        self._known.add(entry)
        return not before


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and the content of each message of a datagram."""
    while len(data) >= _HEADER.size:
        size, kind, *_ = _HEADER.unpack_from(data)
        if size < _HEADER.size:
            return
        yield kind, data[_HEADER.size : size]
        data = data[_aligned(size) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and the content of each attribute of a message."""
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        if size < _ATTRIBUTE.size:
            return
        yield kind, data[_ATTRIBUTE.size : size]
        data = data[_aligned(size) :]


def _aligned(size: int) -> int:
    return (size + 3) & ~3


class ThisMachine:
    """The real one. See ``Machine``."""

    def __init__(self) -> None:
        self._clock = SuspensionClock()

    def suspended_for(self) -> float:
        """See ``Machine``."""
        return self._clock.suspended_for()

    async def watch_addresses(self, on_changed: Callable[[], None]) -> None:
        """See ``Machine``."""
        if sys.platform != "linux":
            return
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as plain:
                plain.bind((0, _RTMGRP_ADDRESSES))
                plain.setblocking(False)
                await self._watch(trio.socket.from_stdlib_socket(plain), on_changed)
        except OSError as error:
            logger.info("changes of this machine's addresses are not noticed: %s", error)

    async def _watch(self, sock: trio.socket.SocketType, on_changed: Callable[[], None]) -> None:
        book = AddressBook()
        await sock.send(book.request_all())
        while True:
            try:
                data = await sock.recv(_RECEIVE)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Changes came faster than they were read, and some are lost.
                book.forget()
                await sock.send(book.request_all())
                on_changed()
            else:
                if book.receive(data):
                    on_changed()
