"""One simulated connection: two pipes of bytes with a time of arrival, and the ends that look like sockets.

Theory of operation
===================

A pipe is a queue of bytes, each with the time at which it arrives; it has a capacity, like the kernel's buffers, so
that whoever writes to a peer that does not read is held up. An end of file travels behind the bytes. A reset overtakes
them and destroys what is under way; what has arrived can still be read, as on Linux. Nothing at all arrives while the
pipe is *held*.

Closing is what it is for sockets. What is sent to an end that was closed is taken once, since nobody knows yet, and is
an error afterwards; and closing an end that has bytes unread resets the connection, which is how a client that leaves
in the middle of a stream looks to its server, and how a server that hangs up too early loses its own last words.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio

__all__ = ["CAPACITY", "Pipe", "SimulatedStream", "Socket"]

#: Bytes that a pipe takes from somebody whose peer does not read; about what Linux has on loopback.
CAPACITY: Final = 128 * 1024


class Pipe:
    """One direction of a connection."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.holds = 0
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._end: tuple[float, bool] | None = None
        # From when on a writer knows that nobody reads any more.
        self._refused_from = math.inf
        self._closed_writer = False
        self._closed_reader = False
        self._changed = trio.lowlevel.ParkingLot()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        left = memoryview(data)
        while len(left):
            if self._closed_writer:
                raise trio.ClosedResourceError("this end was closed")
            if self._end is not None or (trio.current_time() >= self._refused_from and not self.holds):
                raise trio.BrokenResourceError("the connection is over")
            if self._closed_reader and not self.holds:
                if self._refused_from == math.inf:
                    self._refuse_after(2 * self.latency)
                    return
                # Taken once. Somebody who never stops sending would otherwise not let the time pass until he knows.
                with trio.move_on_at(self._refused_from):
                    await self._changed.park()
                continue
            room = CAPACITY - self._size
            if room <= 0:
                with trio.move_on_at(self._refused_from):
                    await self._changed.park()
                continue
            piece = bytes(left[:room])
            left = left[room:]
            self._chunks.append((trio.current_time() + self.latency, piece))
            self._size += len(piece)
            self._changed.unpark_all()

    def send_nowait(self, data: bytes) -> int:
        """Send as much as there is room for, as a socket that does not block does."""
        if self._closed_writer or self._closed_reader or self._end is not None:
            # Whoever meets this goes the way on which it is told what has happened.
            raise BlockingIOError
        piece = data[: max(0, CAPACITY - self._size)]
        if not piece:
            raise BlockingIOError
        self._chunks.append((trio.current_time() + self.latency, piece))
        self._size += len(piece)
        self._changed.unpark_all()
        return len(piece)

    async def receive(self, limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed_reader:
                raise trio.ClosedResourceError("this end was closed")
            arrives = self._next_arrival()
            if arrives <= trio.current_time():
                return self._take(limit)
            with trio.move_on_at(arrives):
                await self._changed.park()

    def close_writer(self) -> None:
        """Send no more; whoever still wants to gets an error."""
        self._closed_writer = True
        self._changed.unpark_all()

    def end(self) -> None:
        """Let an end of file follow what was sent."""
        if self._end is None:
            self._end = (trio.current_time() + self.latency, False)
        self._changed.unpark_all()

    def reset(self) -> None:
        """Let a reset overtake and destroy what is under way."""
        if self._end is not None and self._has_arrived(self._end[0]):
            return
        while self._chunks and not self._has_arrived(self._chunks[-1][0]):
            self._size -= len(self._chunks.pop()[1])
        self._end = (trio.current_time() + self.latency, True)
        self._changed.unpark_all()

    def close_reader(self) -> bool:
        """Read no more; whoever goes on sending learns that it is of no use. Return whether anything is unread."""
        unread = bool(self._chunks) and self._has_arrived(self._chunks[0][0])
        self._closed_reader = True
        self._drop_unread()
        self._changed.unpark_all()
        return unread

    def refuse(self) -> None:
        """Let whoever writes know that nobody reads."""
        self._refuse_after(self.latency)

    def add_call(self) -> None:
        self.holds += 1

    def let_go(self) -> None:
        self.holds -= 1
        self._drop_unread()
        self._changed.unpark_all()

    @property
    def waiting(self) -> int:
        """Bytes that were sent and not received."""
        return self._size

    def _drop_unread(self) -> None:
        """Answer what comes in for a reader that is gone with a reset."""
        if self._closed_reader and self._chunks and not self.holds:
            self._chunks.clear()
            self._size = 0
            self.refuse()

    def _refuse_after(self, seconds: float) -> None:
        self._refused_from = min(self._refused_from, trio.current_time() + seconds)
        self._changed.unpark_all()

    def _has_arrived(self, arrival: float) -> bool:
        return not self.holds and arrival <= trio.current_time()

    def _next_arrival(self) -> float:
        if self.holds:
            return math.inf
        if self._chunks:
            return self._chunks[0][0]
        return math.inf if self._end is None else self._end[0]

    def _take(self, limit: int) -> bytes:
        if not self._chunks:
            assert self._end is not None
            if self._end[1]:
                raise trio.BrokenResourceError("the connection was reset")
            return b""
        arrival, piece = self._chunks.popleft()
        if len(piece) > limit:
            self._chunks.appendleft((arrival, piece[limit:]))
            piece = piece[:limit]
        self._size -= len(piece)
        self._changed.unpark_all()
        return piece


class Socket:
    """As much of a socket as hypercorn, the HTTP face and the logs look at."""

    family = socket.AF_INET
    #: Writes without waiting; what the HTTP face looks for on streams that are not sockets.
    send_nowait: Callable[[bytes], int]

    def __init__(
        self, stream: SimulatedStream | None, local: tuple[str, int], remote: tuple[str, int]
    ) -> None:
        self._stream = stream
        self._local = local
        self._remote = remote
        self._resets = False

    def getsockname(self) -> tuple[str, int]:
        return self._local

    def getpeername(self) -> tuple[str, int]:
        return self._remote

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        # The one option that changes anything here: closing with no time to linger is a reset.
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self._resets = True

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close(reset=self._resets)


class SimulatedStream(trio.abc.HalfCloseableStream):
    """One end of a simulated connection. Behaves like a ``trio.SocketStream``.

    Args:
        short_way: let the HTTP face write here without waiting, as it does on plain sockets.

    Attributes:
        closed: whether this end was closed here.
    """

    def __init__(
        self,
        outgoing: Pipe,
        incoming: Pipe,
        local: tuple[str, int],
        remote: tuple[str, int],
        *,
        short_way: bool = True,
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._sending = False
        self._receiving = False
        self._sent_eof = False
        self.closed = False
        self.socket = Socket(self, local, remote)
        if short_way:
            self.socket.send_nowait = self.send_nowait

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio."""
        with self._sends():
            if self.closed or self._sent_eof:
                raise trio.ClosedResourceError("this end was closed")
            await self._outgoing.send(data)

    def send_nowait(self, data: bytes) -> int:
        """Send what there is room for, and return how much that was.

        Raises:
            BlockingIOError: there is none.
        """
        return self._outgoing.send_nowait(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See trio."""
        with self._sends():
            await trio.lowlevel.checkpoint()
            if self.closed:
                raise trio.ClosedResourceError("this end was closed")
            self._sent_eof = True
            self._outgoing.close_writer()
            self._outgoing.end()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be >= 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            return await self._incoming.receive(65536 if max_bytes is None else max_bytes)
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        """See trio."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self, *, reset: bool = False) -> None:
        """Close at once. The peer sees an end of file; a reset if asked for, or if anything was left unread."""
        if self.closed:
            return
        self.closed = True
        unread = self._incoming.close_reader()
        self._outgoing.close_writer()
        if reset or unread:
            self._outgoing.reset()
            self._incoming.refuse()
        else:
            self._outgoing.end()

    @contextmanager
    def _sends(self) -> Iterator[None]:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            yield
        finally:
            self._sending = False
