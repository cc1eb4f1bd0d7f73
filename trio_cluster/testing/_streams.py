"""One simulated connection: two pipes of bytes that take time to arrive, and the two ends.

Theory of operation
===================

A pipe is a queue of bytes, each with the time at which it arrives. It has a capacity, like the kernel's buffers, so
that a writer waits if its peer does not read. An end of file travels behind the bytes. A reset overtakes the bytes and
destroys those that have not arrived; what has arrived can still be read, as on Linux. While the pipe is *held*, nothing
arrives.

Closing is as for sockets. What is sent to an end that was closed is accepted once, since the sender cannot know yet,
and is an error afterwards. Closing an end that has bytes unread resets the connection. That is how a client that leaves
in the middle of a stream looks to its server, and how a server that closes too early destroys the end of its own
answer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from ..net.streams import Address, ByteStream

__all__ = ["CAPACITY", "Pipe", "SimulatedStream"]

#: Bytes that are received at once, unless the receiver says how many.
_RECEIVE: Final = 64 * 1024

#: Bytes that a pipe accepts while its reader does not read; about what Linux has on loopback.
CAPACITY: Final = 128 * 1024


class Pipe:
    """One direction of a connection.

    Args:
        latency: seconds that bytes take to arrive; may be changed, for what is sent from then on.

    Attributes:
        latency: as given.
        holds: how often :meth:`hold` was called without :meth:`release`.
    """

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.holds = 0
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._end: tuple[float, bool] | None = None
        # The time from which on a writer knows that its bytes are not read any more.
        self._refused_from = math.inf
        self._closed_writer = False
        self._closed_reader = False
        self._changed = trio.lowlevel.ParkingLot()

    def try_send(self, data: bytes | bytearray | memoryview) -> int:
        """Send as much as there is room for, and return how much that was."""
        if self._closed_writer:
            raise trio.ClosedResourceError("this end was closed")
        if self._end is not None or self._is_refused:
            raise trio.BrokenResourceError("the connection is over")
        if self._is_unread:
            if self._refused_from < math.inf:
                # A writer that never stops sending would otherwise not let the time pass until it knows.
                return 0
            # Taken once.
            self._refuse_after(2 * self.latency)
            return len(data)
        piece = bytes(data[: max(0, CAPACITY - self._size)])
        if piece:
            self._chunks.append((trio.current_time() + self.latency, piece))
            self._size += len(piece)
            self._changed.unpark_all()
        return len(piece)

    async def wait_sendable(self) -> None:
        """Wait until :meth:`try_send` takes something, or raises an error. No checkpoint if that is so already."""
        while self._blocks_writer:
            with trio.move_on_at(self._refused_from):
                await self._changed.park()

    @property
    def _is_refused(self) -> bool:
        """Whether a writer knows that its bytes are not read any more."""
        return trio.current_time() >= self._refused_from and not self.holds

    @property
    def _is_unread(self) -> bool:
        """Whether the reader is gone, and what is sent gets as far as that."""
        return self._closed_reader and not self.holds

    @property
    def _blocks_writer(self) -> bool:
        if self._closed_writer or self._end is not None or self._is_refused:
            return False
        return self._refused_from < math.inf if self._is_unread else self._size >= CAPACITY

    async def receive(self, limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.receive_nowait(limit)
            except trio.WouldBlock:
                with trio.move_on_at(self._next_arrival()):
                    await self._changed.park()

    def receive_nowait(self, limit: int) -> bytes:
        if self._closed_reader:
            raise trio.ClosedResourceError("this end was closed")
        if self._next_arrival() > trio.current_time():
            raise trio.WouldBlock
        return self._take(limit)

    def close_writer(self) -> None:
        """Accept nothing more: sending is an error from now on."""
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
        """Let nothing be read any more, which the writer learns when it goes on; return whether anything was unread."""
        unread = bool(self._chunks) and self._has_arrived(self._chunks[0][0])
        self._closed_reader = True
        self._drop_unread()
        self._changed.unpark_all()
        return unread

    def refuse(self) -> None:
        """Let the writer know, when that has arrived, that its bytes are not read."""
        self._refuse_after(self.latency)

    def hold(self) -> None:
        self.holds += 1

    def release(self) -> None:
        self.holds -= 1
        self._drop_unread()
        self._changed.unpark_all()

    @property
    def waiting(self) -> int:
        """Bytes that were sent and not read yet."""
        return self._size

    def _drop_unread(self) -> None:
        """Drop what arrives for a reader that is gone, and let the writer know."""
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


class SimulatedStream(ByteStream, trio.abc.HalfCloseableStream):
    """One end of a simulated connection.

    It is what a node uses (:class:`~trio_cluster.net.streams.ByteStream`), and for tests also a stream of trio, which
    behaves like a ``trio.SocketStream``.

    Args:
        outgoing, incoming: the two directions.
        local, remote: the addresses of this end and of the other one; the name of a machine is its host.
        fast_path: whether a node writes tokens here without waking a task, as it does on real sockets.

    Attributes:
        closed: whether this end was closed here.
    """

    descriptor = None
    pending = False
    injectable = False
    virtual_time = True

    def __init__(
        self, outgoing: Pipe, incoming: Pipe, local: Address, remote: Address, *, fast_path: bool = True
    ) -> None:
        self.closed = False
        self.writes_directly = fast_path
        self._outgoing = outgoing
        self._incoming = incoming
        self._local = local
        self._remote = remote
        self._sending = False
        self._receiving = False
        self._sent_eof = False

    @property
    def local_address(self) -> Address:
        """The name of the machine that this end is on, and the port."""
        return self._local

    @property
    def peer_address(self) -> Address:
        """The name of the machine that the other end is on, and the port."""
        return self._remote

    async def read(self, limit: int) -> bytes:
        """See ``ByteStream``."""
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            return await self._incoming.receive(limit)
        finally:
            self._receiving = False

    def read_nowait(self, limit: int) -> bytes:
        """See ``ByteStream``."""
        return self._incoming.receive_nowait(limit)

    def try_write(self, data: bytes | bytearray | memoryview) -> int:
        """See ``ByteStream``."""
        return self._outgoing.try_send(data)

    async def wait_writable(self) -> None:
        """See ``ByteStream``."""
        await trio.lowlevel.checkpoint()
        await self._outgoing.wait_sendable()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """See ``ByteStream``."""
        with self._sends():
            if self.closed or self._sent_eof:
                raise trio.ClosedResourceError("this end was closed")
            await trio.lowlevel.checkpoint()
            rest = memoryview(data)
            while rest:
                rest = rest[self._outgoing.try_send(rest) :]
                if rest:
                    await self._outgoing.wait_sendable()

    async def write_eof(self) -> None:
        """See ``ByteStream``."""
        with self._sends():
            await trio.lowlevel.checkpoint()
            if self.closed:
                raise trio.ClosedResourceError("this end was closed")
            self._sent_eof = True
            self._outgoing.close_writer()
            self._outgoing.end()

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

    def abort(self) -> None:
        """See ``ByteStream``."""
        self.close(reset=True)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio."""
        await self.write(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self.wait_writable()

    async def send_eof(self) -> None:
        """See trio."""
        await self.write_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be >= 1")
        return await self.read(_RECEIVE if max_bytes is None else max_bytes)

    @contextmanager
    def _sends(self) -> Iterator[None]:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            yield
        finally:
            self._sending = False
