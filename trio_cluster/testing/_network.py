"""A network in memory: hosts, connections between them, and what can happen to connections.

Silence is made by *holding* the pipes of connections. A partition holds those between two hosts. Freezing a host holds
all of its own; from outside, that cannot be told from a process that was stopped by a signal: its kernel still accepts
what fits into the buffers, and nothing is ever answered. What was held arrives when it is released.

All times are trio's, so under a mock clock the network is as virtual as everything else.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs
import trio

from ..errors import ClusterPortError
from ..net.handover import Channel, Handle, Waiting
from ..net.sockets import Listeners
from ..net.streams import Address, Listener
from ._deprecation import warn_renamed
from ._streams import Pipe, SimulatedStream

__all__ = ["Connection", "Host", "SimulatedListener", "SimulatedNetwork"]

_EPHEMERAL: Final = 40_000


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
    _pipes: tuple[Pipe, Pipe]
    _partitioned: bool = False

    def cut(self) -> None:
        """Close it in both directions, as if both kernels had said so: each end reads an end of file."""
        for pipe in self._pipes:
            pipe.end()

    def reset(self) -> None:
        """Reset it: what is under way is lost, and each end gets an error when it has read what had arrived."""
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
            self.hold()

    def heal(self) -> None:
        """End a partition; what was sent meanwhile arrives."""
        if self._partitioned:
            self._partitioned = False
            self.release()

    def hold(self) -> None:
        """Let nothing arrive until :meth:`release` has been called as often."""
        for pipe in self._pipes:
            pipe.hold()

    def release(self) -> None:
        """Undo one :meth:`hold`; when that was the last one, what was sent meanwhile arrives."""
        for pipe in self._pipes:
            pipe.release()

    @property
    def waiting_bytes(self) -> int:
        """Bytes under way or unread, in both directions together."""
        return sum(pipe.waiting for pipe in self._pipes)

    @property
    def held(self) -> bool:
        """Whether it is partitioned, or one of its hosts frozen."""
        return any(pipe.holds for pipe in self._pipes)

    @property
    def open_ends(self) -> int:
        """How many of its two ends have not been closed."""
        return [self.client_stream.closed, self.server_stream.closed].count(False)


class _Port:
    """A port of a machine, which one or several of its processes have. Its queue of connections is one.

    Attributes:
        send: where connections come in.
        receive: where they are accepted; each process has a clone of it.
        holders: the listeners of these processes that have not been closed.
    """

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[SimulatedStream](math.inf)
        self.holders: set[SimulatedListener] = set()


class SimulatedListener(Listener):
    """A port of a host, as one process has it. Several may have the same port, with one queue of connections.

    Attributes:
        local_address: the name of the host, and the port.
    """

    shares_descriptors = False

    def __init__(
        self,
        local_address: Address,
        on_close: Callable[[SimulatedListener], None],
        shared: _Port | None = None,
    ) -> None:
        self.local_address = local_address
        self._on_close = on_close
        self._port = _Port() if shared is None else shared
        self._port.holders.add(self)
        self._receive = self._port.receive.clone()

    def share(self) -> SimulatedListener:
        """Return the same port for another process. Connections come to either, and end only with the last one."""
        return SimulatedListener(self.local_address, self._on_close, self._port)

    async def accept(self) -> SimulatedStream:
        """See trio."""
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise trio.ClosedResourceError("the listener was closed") from None

    def accept_nowait(self) -> SimulatedStream:
        """See ``Listener``."""
        try:
            return self._receive.receive_nowait()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise trio.ClosedResourceError("the listener was closed") from None

    def limit_unread_time(self, seconds: float) -> None:
        """See ``Listener``; a simulated connection has no such limit."""

    def connect(self, stream: SimulatedStream) -> None:
        """Let a connection come in.

        Args:
            stream: this end of it.
        """
        self._port.send.send_nowait(stream)

    def is_shared_with(self, other: SimulatedListener) -> bool:
        """Tell whether the other one has the same queue of connections."""
        return other in self._port.holders

    def close_all(self) -> None:
        """Close the port for all processes that have it. Synchronous."""
        for each in list(self._port.holders):
            each.close()

    def close(self) -> None:
        """Listen no more. Connections that were accepted go on, and those that were not are reset."""
        if self not in self._port.holders:
            return
        if len(self._port.holders) == 1:
            # Otherwise the connections that have come in are those of the others, too.
            self._on_close(self)
            self._port.send.close()
            with suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                while True:
                    self._receive.receive_nowait().abort()
            self._port.receive.close()
        self._receive.close()
        self._port.holders.discard(self)


class _ChannelEnd:
    """One end of a connection between two processes of a machine. See ``Channel`` in ``net/handover.py``."""

    def __init__(
        self,
        send: trio.MemorySendChannel[tuple[bytes, list[SimulatedListener]]],
        receive: trio.MemoryReceiveChannel[tuple[bytes, list[SimulatedListener]]],
    ) -> None:
        self._send, self._receive = send, receive

    async def send(self, line: bytes, handles: Sequence[SimulatedListener] = ()) -> None:
        try:
            await self._send.send((line, [each.share() for each in handles]))
        except trio.BrokenResourceError:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None

    async def receive(self) -> tuple[bytes, Sequence[Handle]] | None:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            return None

    def close(self) -> None:
        self._send.close()
        self._receive.close()


class _Waiting:
    """See ``Waiting`` in ``net/handover.py``."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[_ChannelEnd](math.inf)

    async def accept(self) -> Channel:
        return await self._receive.receive()

    def close(self) -> None:
        self._send.close()
        self._receive.close()

    def connect(self) -> _ChannelEnd:
        """Return the end of the process that connects.

        Raises:
            ConnectionRefusedError: no process waits any more.
        """
        there = trio.open_memory_channel[tuple[bytes, list[SimulatedListener]]](math.inf)
        back = trio.open_memory_channel[tuple[bytes, list[SimulatedListener]]](math.inf)
        try:
            self._send.send_nowait(_ChannelEnd(back[0], there[1]))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise _refused() from None
        return _ChannelEnd(there[0], back[1])


class _Handovers:
    """How the processes of one machine hand over their ports. See ``Handovers`` in ``net/handover.py``."""

    #: There is nothing there; the path is only a name.
    directory: Path | None = Path("/simulated")
    #: Real ones would be others each time.
    pid = 1

    def __init__(self, network: SimulatedNetwork, host: str) -> None:
        self._waiting = network.waiting
        self._host = host

    def listen(self, path: Path) -> Waiting:
        waiting = self._waiting[self._host] = _Waiting()
        return waiting

    async def connect(self, path: Path) -> Channel:
        await trio.lowlevel.checkpoint()
        if self._host not in self._waiting:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._waiting[self._host].connect()

    def handles_of(self, listeners: Sequence[Listener]) -> Sequence[SimulatedListener]:
        return [each for each in listeners if isinstance(each, SimulatedListener)]

    def listeners_of(self, handles: Sequence[SimulatedListener]) -> Sequence[Listener]:
        return list(handles)


class Host:
    """A machine on the network: what a node on it listens and connects with.

    Attributes:
        name: of the machine.
        handovers: how a process on it hands over its ports to another one.
    """

    def __init__(self, network: SimulatedNetwork, name: str) -> None:
        self.name = name
        self.handovers = _Handovers(network, name)
        self._network = network

    async def listen(self, host: str, port: int) -> Listeners:
        """See ``Network``; which address of the machine is meant makes no difference."""
        await trio.lowlevel.checkpoint()
        return [self._network.listen(self.name, port)]

    async def connect(self, host: str, port: int) -> SimulatedStream:
        """See ``Network``. Takes a round trip, and waits for as long as there is a partition in between."""
        server = self.name if host in ("127.0.0.1", "localhost", "::1") else host
        return await self._network.connect(self.name, server, port)


class SimulatedNetwork:
    """All hosts and connections.

    Args:
        latency: seconds that everything takes on a new connection, one way.
        fast_path: whether its connections can be written to without waiting, as plain sockets can. Without it,
            responses take the slow path through a queue and a task, as they do on any other stream.
        short_way: deprecated, the former name of ``fast_path``.

    Attributes:
        latency: as given; may be changed.
        connections: all there are and were, the oldest first.
        waiting: for each machine, what waits there for a process that takes over its ports.
    """

    def __init__(
        self, latency: float = 0.0, *, fast_path: bool = True, short_way: bool | None = None
    ) -> None:
        if short_way is not None:
            warn_renamed("SimulatedNetwork(short_way=...)", "fast_path=")
            fast_path = short_way
        self.latency = latency
        self._fast_path = fast_path
        self.connections: list[Connection] = []
        self.waiting: dict[str, _Waiting] = {}
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
        """Stop the machine: it neither sends nor receives, and no other machine is told."""
        if host not in self._frozen:
            self._frozen.add(host)
            for connection in self.connections_of(host):
                connection.hold()

    def thaw(self, host: str) -> None:
        """Let the machine go on; what was sent to it and by it meanwhile arrives."""
        if host in self._frozen:
            self._frozen.remove(host)
            for connection in self.connections_of(host):
                connection.release()

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
        """Close all listeners and connections of the machine, as its kernel does for a process that was killed."""
        for address, listener in list(self._listeners.items()):
            if address[0] == host:
                listener.close_all()
        for connection in self.connections_of(host):
            if connection.client == host:
                connection.client_stream.close()
            if connection.server == host:
                connection.server_stream.close()

    def _between(self, one: str, other: str) -> list[Connection]:
        return [each for each in self.connections if {each.client, each.server} == {one, other}]

    def listen(self, host: str, port: int) -> SimulatedListener:
        """Listen on a port of a machine; see :meth:`Host.listen`."""
        if port == 0:
            port = next(port for port in self._ports if (host, port) not in self._listeners)
        if (host, port) in self._listeners:
            raise ClusterPortError(port, "in use by another process", taken=True)
        listener = SimulatedListener((host, port), self._forget)
        self._listeners[host, port] = listener
        return listener

    def _forget(self, listener: SimulatedListener) -> None:
        current = self._listeners.get(listener.local_address)
        if current is not None and current.is_shared_with(listener):
            del self._listeners[listener.local_address]

    async def connect(self, client: str, server: str, port: int) -> SimulatedStream:
        """Connect one machine to another; see :meth:`Host.connect`."""
        await trio.sleep(2 * self.latency)
        while frozenset((client, server)) in self._partitions:
            await self._changed.park()
        listener = self._listeners.get((server, port))
        if listener is None:
            raise _refused()
        there, back = Pipe(self.latency), Pipe(self.latency)
        near, far = (client, next(self._ports)), (server, port)
        connection = Connection(
            client,
            server,
            port,
            SimulatedStream(there, back, near, far, fast_path=self._fast_path),
            SimulatedStream(back, there, far, near, fast_path=self._fast_path),
            (there, back),
        )
        for _ in {client, server} & self._frozen:
            connection.hold()
        self.connections.append(connection)
        listener.connect(connection.server_stream)
        return connection.client_stream


def _refused() -> ConnectionRefusedError:
    return ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
