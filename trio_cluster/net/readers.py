"""How connections are read: many by one task, or each by a task of its own.

Theory of operation
===================

A connection has to be read all the time, for that is how it is known that its client has left; and nearly always there
is nothing to read. A task that waits for that is a task, a nursery, two cancel scopes and, for each read, two turns of
the scheduler and two changes to what the event loop waits for: half of what a stream costs.

So where the system has *epoll*, one task reads all connections of a server. They are in an epoll of its own, to which
each is added once. An epoll is itself something that can be waited for, so that is all that trio is asked to do; then
it tells which connections have something, and each of them is read once and given what there was, synchronously.

A callback, in a house that is made of tasks? What is called is a parser, which changes the state of one connection and
wakes its task. It waits for nothing, so there is nothing in it that could be cancelled, or that would need a task. What
can be held up, a client's answer, is where it was, in a task.

*Nobody is starved.* At most :data:`_AT_ONCE` connections are read, at most :data:`_RECEIVE` bytes of each, before all
other tasks have their turn; and the kernel puts those that it has told of at the end of its list.

*A descriptor that was closed is never read.* Whoever closes a connection has to say :meth:`Reading.end` first, and then
it is neither in the epoll nor in the table here. Nothing is accepted while the connections of one round are read, so
a number in that round is still who it was, or in the table no more. The epoll is told in so many words, since it would
not notice by itself as long as some child process has the connection too.

*An exception is its connection's own.* It is handed to the connection, whose task then raises it.

*Cancellation.* The task that reads can only be cancelled while it waits. Connections that are left then are not read
any more; they are to be cancelled by the same scope.

Where there is no epoll, and for streams that are no sockets, each connection has a task, which does the same.
"""

from __future__ import annotations

import os
import select
from typing import Any, Final, Protocol

import trio

__all__ = ["Reader", "Reading", "Receiver", "SharedReader", "TaskReader", "has_epoll"]

#: Connections that are read in one turn.
_AT_ONCE: Final = 64
#: Bytes that are read of each.
_RECEIVE: Final = 64 * 1024


class Receiver(Protocol):
    """A connection, as whoever reads it sees it. Its methods must not wait, and may pause or end the reading."""

    def data_received(self, data: bytes) -> None:
        """Take what has come; nothing means that there will be no more, and that the reading has ended."""
        ...

    def read_failed(self, error: Exception) -> None:
        """Take note of what :meth:`data_received` has raised; the reading has ended."""
        ...


class Reading(Protocol):
    """The reading of one connection. None of these methods waits."""

    def begin(self) -> None:
        """Read from now on, and perhaps give the listener something at once. To be called once.

        Raises:
            OSError: the system can watch no more connections.
        """
        ...

    def pause(self) -> None:
        """Read no more until :meth:`resume`. It is not noticed then that the client leaves."""
        ...

    def resume(self) -> None:
        """Read again. Harmless if it was not paused, or has ended; raises as :meth:`begin` does."""
        ...

    def end(self) -> None:
        """Read no more. To be called before the connection is closed; idempotent."""
        ...


class Reader(Protocol):
    """Reads the connections of a server."""

    def reading(self, stream: Any, receiver: Receiver) -> Reading:
        """Return what reads ``stream`` for ``receiver``, once that has begun.

        It refers to the listener until the reading ends.
        """
        ...

    async def run(self) -> None:
        """Read until cancelled."""
        ...


def has_epoll() -> bool:
    """Return whether one task can read many sockets here."""
    return hasattr(select, "epoll")


class SharedReader:
    """One task that reads all connections, which have to be sockets. See the top of this module."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._read: dict[int, _Shared] = {}

    def reading(self, stream: trio.SocketStream, receiver: Receiver) -> Reading:
        """See ``Reader``."""
        return _Shared(stream.socket.fileno(), receiver, self._epoll, self._read)

    async def run(self) -> None:
        """See ``Reader``."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for descriptor, _ in self._epoll.poll(0, _AT_ONCE):
                    reading = self._read.get(descriptor)
                    if reading is not None:
                        reading.read_once()
        finally:
            self._read.clear()
            self._epoll.close()


class _Shared:
    """One connection of a :class:`SharedReader`."""

    __slots__ = ("_descriptor", "_epoll", "_paused", "_read", "_receiver")

    def __init__(
        self, descriptor: int, receiver: Receiver, epoll: select.epoll, read: dict[int, _Shared]
    ) -> None:
        self._descriptor = descriptor
        self._receiver: Receiver | None = receiver
        self._epoll = epoll
        self._read = read
        self._paused = True

    def begin(self) -> None:
        self.resume()
        # Mostly a client asks as soon as it is connected.
        self.read_once()

    def resume(self) -> None:
        if self._paused and self._receiver is not None and not self._epoll.closed:
            self._epoll.register(self._descriptor, select.EPOLLIN)
            self._read[self._descriptor] = self
            self._paused = False

    def pause(self) -> None:
        # Whoever has left is reported whatever is asked for, so it is not enough to ask for nothing.
        if not self._paused:
            self._paused = True
            # There is nothing in the table when the reader has come to its end.
            if self._read.pop(self._descriptor, None) is not None:
                self._epoll.unregister(self._descriptor)

    def end(self) -> None:
        self.pause()
        self._receiver = None

    def read_once(self) -> None:
        receiver = self._receiver
        if receiver is None:
            return
        try:
            data = os.read(self._descriptor, _RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        _hand_over(data, receiver, self)


class TaskReader:
    """A task for each connection, whatever sort of stream that is.

    Args:
        nursery: where the tasks are.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def reading(self, stream: trio.abc.ReceiveStream, receiver: Receiver) -> Reading:
        """See ``Reader``."""
        return _Own(stream, receiver, self._nursery)

    async def run(self) -> None:
        """See ``Reader``."""
        await trio.sleep_forever()


class _Own:
    """One connection of a :class:`TaskReader`."""

    def __init__(self, stream: trio.abc.ReceiveStream, receiver: Receiver, nursery: trio.Nursery) -> None:
        self._stream = stream
        self._receiver: Receiver | None = receiver
        self._nursery = nursery
        self._scope = trio.CancelScope()
        self._paused = False
        self._resumed = trio.lowlevel.ParkingLot()

    def begin(self) -> None:
        self._nursery.start_soon(self._run)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._resumed.unpark_all()

    def end(self) -> None:
        self._receiver = None
        self._scope.cancel(reason="the connection is not read any more")

    async def _run(self) -> None:
        with self._scope:
            while (receiver := self._receiver) is not None:
                try:
                    data = bytes(await self._stream.receive_some(_RECEIVE))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
                _hand_over(data, receiver, self)
                while self._paused:
                    await self._resumed.park()


def _hand_over(data: bytes, receiver: Receiver, reading: Reading) -> None:
    """Give a connection what has come. That there is nothing ends its reading, and so does an error."""
    if not data:
        reading.end()
    try:
        receiver.data_received(data)
    except Exception as error:
        reading.end()
        receiver.read_failed(error)
