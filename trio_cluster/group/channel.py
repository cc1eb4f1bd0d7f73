"""One end of the socket between the supervisor and a member. Posting does not wait; a task writes."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

import trio

from ..net.handover import HandoverChannel
from .messages import Link, Message, Start, decode, encode

__all__ = ["GroupChannel"]

#: Messages that may wait for a process that does not read. With so many it is stuck, and further ones are dropped.
_MOST_WAITING: Final = 1000


class GroupChannel:
    """Sends and receives messages, and sockets with them; see the top of this module.

    Args:
        sock: one end of a socket pair; closed with this.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._channel = HandoverChannel(trio.socket.from_stdlib_socket(sock))
        self._queue: deque[tuple[bytes, Sequence[socket.socket], bool]] = deque()
        self._posted = trio.lowlevel.ParkingLot()
        # Sockets that have come, and whose message has not been returned yet, in the order of the messages.
        self._sockets: deque[socket.socket] = deque()

    def post(self, message: Message, sockets: Sequence[socket.socket] = (), *, keep: bool = False) -> None:
        """Send a message soon. Synchronous.

        Args:
            message: what to send.
            sockets: go with it; closed afterwards.
            keep: leave them open instead.
        """
        if len(self._queue) >= _MOST_WAITING:
            if not keep:
                _close(sockets)
            return
        self._queue.append((encode(message), sockets, keep))
        self._posted.unpark_all()

    async def write(self) -> None:
        """Write what is posted, until cancelled or the connection is over. A checkpoint."""
        while True:
            while not self._queue:
                await self._posted.park()
            line, sockets, keep = self._queue.popleft()
            try:
                await self._channel.send(line, sockets)
            except (OSError, trio.ClosedResourceError):
                return
            finally:
                if not keep:
                    _close(sockets)

    async def receive(self) -> tuple[Message, list[socket.socket]] | None:
        """Return the next message, and the sockets that belong to it; ``None`` at the end. A checkpoint.

        Raises:
            ValueError: what has come is no message.
        """
        try:
            received = await self._channel.receive()
        except (OSError, trio.ClosedResourceError):
            return None
        if received is None:
            return None
        line, sockets = received
        self._sockets.extend(sockets)
        message = decode(line)
        match message:
            case Start(clients=count):
                pass
            case Link():
                count = 1
            case _:
                count = 0
        return message, [self._sockets.popleft() for _ in range(min(count, len(self._sockets)))]

    def close(self) -> None:
        """Close this end, and everything that was not sent or not returned. Synchronous, idempotent."""
        self._channel.close()
        for _, sockets, keep in self._queue:
            if not keep:
                _close(sockets)
        self._queue.clear()
        _close(self._sockets)
        self._sockets.clear()


def _close(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()
