"""A network of memory: hosts, connections between them, and everything that can happen to those.

Theory of operation
===================

A connection is two pipes. A pipe is a queue of bytes, each with the time at which it arrives; it has a capacity, like
the kernel's buffers, so that whoever writes to a peer that does not read is held up. An end of file and a reset travel
in the same queue as the bytes, with two differences that TCP makes too: a reset overtakes and destroys what is
under way, and nothing at all arrives while the pipe is *held*.

Holding is how silence is made. A partition holds the pipes between two hosts; freezing a host holds all of its pipes,
which from outside cannot be told from a process that was stopped by a signal: its kernel still takes what fits into
the buffers, and nothing is ever answered. What was held arrives when it is let go.

All times are trio's, so under a mock clock the network is as virtual as everything else.
"""

from __future__ import annotations

import itertools
import math
import socket
from collections import deque
from typing import Any, Final

import attrs
import trio

from .._errors import ClusterPortError
from .._ports import Listeners

__all__ = ["Connection", "Host", "SimulatedListener", "SimulatedNetwork", "SimulatedStream"]

#: Bytes that a pipe takes from somebody whose peer does not read; about what Linux has on loopback.
CAPACITY: Final = 128 * 1024

_EPHEMERAL: Final = 40_000


class _Pipe:
    """One direction of a connection."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.holds = 0
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._end: tuple[float, bool] | None = None
        self._closed_writer = False
        self._closed_reader = False
        self._changed = trio.lowlevel.ParkingLot()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        left = memoryview(data)
        while len(left):
            if self._closed_writer:
                raise trio.ClosedResourceError("this end was closed")
            if self._end is not None or (self._closed_reader and not self.holds):
                raise trio.BrokenResourceError("the connection is over")
            room = CAPACITY - self._size
            if room <= 0:
                await self._changed.park()
                continue
            piece = bytes(left[:room])
            left = left[room:]
            self._chunks.append((trio.current_time() + self.latency, piece))
            self._size += len(piece)
            self._changed.unpark_all()

    async def receive(self, limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed_reader:
                raise trio.ClosedResourceError("this end was closed")
            if self._is_broken():
                raise trio.BrokenResourceError("the connection was reset")
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
        """Let a reset overtake and destroy what was sent."""
        self._chunks.clear()
        self._size = 0
        self._end = (trio.current_time() + self.latency, True)
        self._changed.unpark_all()

    def close_reader(self) -> None:
        """Read no more; whoever goes on sending learns that it is of no use."""
        self._closed_reader = True
        self._changed.unpark_all()

    def hold(self) -> None:
        self.holds += 1

    def let_go(self) -> None:
        self.holds -= 1
        self._changed.unpark_all()

    @property
    def waiting(self) -> int:
        """Bytes that were sent and not received."""
        return self._size

    def _is_broken(self) -> bool:
        return (
            self._end is not None and self._end[1] and not self.holds and self._end[0] <= trio.current_time()
        )

    def _next_arrival(self) -> float:
        if self.holds:
            return math.inf
        if self._chunks:
            return self._chunks[0][0]
        return math.inf if self._end is None else self._end[0]

    def _take(self, limit: int) -> bytes:
        if not self._chunks:
            return b""
        arrival, piece = self._chunks.popleft()
        if len(piece) > limit:
            self._chunks.appendleft((arrival, piece[limit:]))
            piece = piece[:limit]
        self._size -= len(piece)
        self._changed.unpark_all()
        return piece


class _Socket:
    """As much of a socket as hypercorn, the HTTP face and the logs look at."""

    family = socket.AF_INET

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
    """One end of a simulated connection. Behaves like a ``trio.SocketStream``."""

    def __init__(
        self, outgoing: _Pipe, incoming: _Pipe, local: tuple[str, int], remote: tuple[str, int]
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self.socket = _Socket(self, local, remote)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See trio."""
        await self._outgoing.send(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See trio."""
        await trio.lowlevel.checkpoint()
        self._outgoing.close_writer()
        self._outgoing.end()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See trio."""
        return await self._incoming.receive(65536 if max_bytes is None else max_bytes)

    async def aclose(self) -> None:
        """See trio."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self, *, reset: bool = False) -> None:
        """Close at once. The peer sees an end of file, or a reset if asked for."""
        self._outgoing.close_writer()
        if reset:
            self._outgoing.reset()
        else:
            self._outgoing.end()
        self._incoming.close_reader()


@attrs.define(eq=False)
class Connection:
    """A connection between two hosts, and what can be done to it.

    Attributes:
        client: the name of the host that connected.
        server: the name of the host that listened.
        port: the port that was connected to.
    """

    client: str
    server: str
    port: int
    client_stream: SimulatedStream
    server_stream: SimulatedStream
    _pipes: tuple[_Pipe, _Pipe]
    _partitioned: bool = False

    def cut(self) -> None:
        """Close it in both directions, as if both kernels had said so: each end reads an end of file."""
        for pipe in self._pipes:
            pipe.end()

    def reset(self) -> None:
        """Reset it: what is under way is lost, and each end gets an error."""
        for pipe in self._pipes:
            pipe.reset()

    def delay(self, seconds: float) -> None:
        """Let everything that is sent from now on arrive so much later."""
        for pipe in self._pipes:
            pipe.latency = seconds

    def partition(self) -> None:
        """Let nothing arrive any more, in either direction; both ends stay open, and are told nothing."""
        if not self._partitioned:
            self._partitioned = True
            for pipe in self._pipes:
                pipe.hold()

    def heal(self) -> None:
        """End a partition; what was sent meanwhile arrives."""
        if self._partitioned:
            self._partitioned = False
            for pipe in self._pipes:
                pipe.let_go()

    @property
    def waiting_bytes(self) -> int:
        """Bytes under way or unread, in both directions together."""
        return sum(pipe.waiting for pipe in self._pipes)


class SimulatedListener(trio.abc.Listener[SimulatedStream]):
    """A port of a host."""

    def __init__(self, network: SimulatedNetwork, address: tuple[str, int]) -> None:
        self._network = network
        self._address = address
        self._send, self._receive = trio.open_memory_channel[SimulatedStream](math.inf)
        self.socket = _Socket(None, address, address)
        self.socket.close = self.close  # type: ignore[method-assign]

    async def accept(self) -> SimulatedStream:
        """See trio."""
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise trio.ClosedResourceError("the listener was closed") from None

    async def aclose(self) -> None:
        """See trio."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Listen no more; connections that were accepted go on."""
        self._network._listeners.pop(self._address, None)
        self._send.close()


class Host:
    """A machine on the network: what a node on it listens and connects with."""

    def __init__(self, network: SimulatedNetwork, name: str) -> None:
        self.name = name
        self._network = network

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``; which address of the machine is meant makes no difference."""
        await trio.lowlevel.checkpoint()
        return [self._network._listen(self.name, port)]

    async def connect(self, host: str, port: int) -> SimulatedStream:
        """See ``Network``. Waits for as long as there is a partition in between."""
        server = self.name if host in ("127.0.0.1", "localhost", "::1") else host
        return await self._network._connect(self.name, server, port)


class SimulatedNetwork:
    """All hosts and connections.

    Args:
        latency: seconds that everything takes on a new connection.
    """

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.connections: list[Connection] = []
        self._listeners: dict[tuple[str, int], SimulatedListener] = {}
        self._frozen: set[str] = set()
        self._partitions: set[frozenset[str]] = set()
        self._changed = trio.lowlevel.ParkingLot()
        self._ports = itertools.count(_EPHEMERAL)

    def host(self, name: str) -> Host:
        """Return the machine of this name."""
        return Host(self, name)

    def connections_of(self, host: str) -> list[Connection]:
        """Return the connections that ``host`` has or had, the oldest first."""
        return [each for each in self.connections if host in (each.client, each.server)]

    def freeze(self, host: str) -> None:
        """Stop the machine: it neither sends nor receives, and nobody is told."""
        if host not in self._frozen:
            self._frozen.add(host)
            for connection in self.connections_of(host):
                for pipe in connection._pipes:
                    pipe.hold()

    def thaw(self, host: str) -> None:
        """Let the machine go on; what was sent to it and by it meanwhile arrives."""
        if host in self._frozen:
            self._frozen.remove(host)
            for connection in self.connections_of(host):
                for pipe in connection._pipes:
                    pipe.let_go()

    def partition(self, one: str, other: str) -> None:
        """Let nothing pass between two machines, on connections that exist and on new ones."""
        self._partitions.add(frozenset((one, other)))
        for connection in self._between(one, other):
            connection.partition()

    def heal(self, one: str, other: str) -> None:
        """End a partition."""
        self._partitions.discard(frozenset((one, other)))
        for connection in self._between(one, other):
            connection.heal()
        self._changed.unpark_all()

    def unplug(self, host: str) -> None:
        """Close whatever the machine has open, as its kernel does for a process that was killed."""
        for address, listener in list(self._listeners.items()):
            if address[0] == host:
                listener.close()
        for connection in self.connections_of(host):
            if connection.client == host:
                connection.client_stream.close()
            if connection.server == host:
                connection.server_stream.close()

    def _between(self, one: str, other: str) -> list[Connection]:
        return [each for each in self.connections if {each.client, each.server} == {one, other}]

    def _listen(self, host: str, port: int) -> SimulatedListener:
        if port == 0:
            port = next(port for port in self._ports if (host, port) not in self._listeners)
        if (host, port) in self._listeners:
            raise ClusterPortError(port, "in use by another process", taken=True)
        listener = SimulatedListener(self, (host, port))
        self._listeners[host, port] = listener
        return listener

    async def _connect(self, client: str, server: str, port: int) -> SimulatedStream:
        await trio.lowlevel.checkpoint()
        while frozenset((client, server)) in self._partitions:
            await self._changed.park()
        listener = self._listeners.get((server, port))
        if listener is None:
            raise ConnectionRefusedError(111, "Connection refused")
        there, back = _Pipe(self.latency), _Pipe(self.latency)
        near, far = (client, next(self._ports)), (server, port)
        connection = Connection(
            client,
            server,
            port,
            SimulatedStream(there, back, near, far),
            SimulatedStream(back, there, far, near),
            (there, back),
        )
        for _ in {client, server} & self._frozen:
            there.hold()
            back.hold()
        self.connections.append(connection)
        listener._send.send_nowait(connection.server_stream)
        return connection.client_stream
