"""Connections in memory, which do at once whatever a test says."""

from __future__ import annotations

import trio

from trio_cluster.net.streams import Address, ByteStream

__all__ = ["MemoryStream", "memory_pair"]


class MemoryStream(ByteStream, trio.abc.HalfCloseableStream):
    """One end of a connection that keeps any number of bytes; for tests also a stream of trio.

    Attributes:
        held: nothing more is taken, as by a socket whose buffer is full.
        at_once: bytes that are taken in one go.
    """

    descriptor = None
    pending = False
    writes_directly = True
    injectable = False
    virtual_time = True
    peer: MemoryStream

    def __init__(self) -> None:
        self.held = False
        self.at_once = 1 << 30
        self._arrived = bytearray()
        self._ended = self._broken = self._closed = False
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def local_address(self) -> Address:
        return "memory", 0

    @property
    def peer_address(self) -> Address:
        return "memory", 0

    def read_nowait(self, limit: int) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError
        if self._broken:
            raise trio.BrokenResourceError
        if not (self._arrived or self._ended):
            raise trio.WouldBlock
        data = bytes(self._arrived[:limit])
        del self._arrived[:limit]
        return data

    async def read(self, limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            try:
                return self.read_nowait(limit)
            except trio.WouldBlock:
                await self._changed.park()

    def try_write(self, data: bytes | bytearray | memoryview) -> int:
        if self._closed:
            raise trio.ClosedResourceError
        if self.peer._closed:
            raise trio.BrokenResourceError
        if self.held:
            return 0
        piece = bytes(data[: self.at_once])
        self.peer._arrived += piece
        self.peer._changed.unpark_all()
        return len(piece)

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while self.held and not self._closed:
            await self._changed.park()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        await trio.lowlevel.checkpoint()
        while rest:
            rest = rest[self.try_write(rest) :]
            if rest:
                await self.wait_writable()

    async def write_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self.end()

    def end(self) -> None:
        """Let the peer read an end of file."""
        self.peer._ended = True
        self.peer._changed.unpark_all()

    def fail(self) -> None:
        """Let every read of this end fail from now on."""
        self._broken = True
        self._changed.unpark_all()

    def release(self) -> None:
        """Take again what is written."""
        self.held = False
        self._changed.unpark_all()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.end()
            self._changed.unpark_all()

    def abort(self) -> None:
        if not self._closed:
            self.close()
            self.peer.fail()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.write(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.wait_writable()

    async def send_eof(self) -> None:
        await self.write_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.read(max_bytes or 1 << 16)


def memory_pair() -> tuple[MemoryStream, MemoryStream]:
    """Return the two ends of a connection."""
    one, other = MemoryStream(), MemoryStream()
    one.peer, other.peer = other, one
    return one, other
