"""How connections are read: many by one task, or each by a task of its own.

Theory of operation
===================

A connection has to be read all the time, for that is how the server learns that its client has left; and nearly always
there is nothing to read. A task that waits for that is a task, a nursery, two cancel scopes and, for each read, two
turns of the scheduler and two changes to what the event loop waits for: half of what a stream costs.

So where the system has *epoll*, one task reads all connections of a server. They are in an epoll of its own, to which
each is added once. An epoll can itself be waited for, so that is all that trio is asked to do; then it tells which
connections have something, and each of them is read once and its receiver is given what there was, synchronously.

Why a callback, in a program that is made of tasks? What is called is a parser, which changes the state of one
connection and wakes its task. It waits for nothing, so there is nothing in it that could be cancelled, or that would
need a task. What can be held up, the answer to a client, is in a task as before.

*No connection is starved.* At most :data:`_AT_ONCE` connections are read, at most :data:`_RECEIVE` bytes of each,
before all other tasks have their turn; and the kernel puts those that it has reported at the end of its list. What a
stream has read ahead (``pending``) is taken at once, as the kernel would never report it; that is less than one read
more.

*A descriptor that was closed is never read.* The owner of a connection calls :meth:`Reading.end` before closing it, and
then it is neither in the epoll nor in the table here. No connection is accepted while the connections of one round are
read, so a number in that round still belongs to the same connection, or is not in the table any more. The connection is
taken out of the epoll explicitly, since the epoll would not notice by itself as long as some child process has the
connection too.

*An exception belongs to its connection.* It is handed to the connection, whose task then raises it.

*Cancellation.* The task that reads can only be cancelled while it waits. Connections that are left then are not read
any more; they are to be cancelled by the same scope.

Where there is no epoll, and for streams without a descriptor, each connection has a task, which does the same.
"""

from __future__ import annotations

import logging
import select
from typing import Final, Protocol

import trio

from .streams import ByteStream

__all__ = ["Reader", "Reading", "Receiver", "SharedReader", "TaskReader", "has_epoll"]

logger = logging.getLogger("trio_cluster.http")

#: Connections that are read in one turn.
_AT_ONCE: Final = 64
#: Bytes that are read of each.
_RECEIVE: Final = 64 * 1024


class Receiver(Protocol):
    """A connection, as its reader sees it. Its methods are synchronous, and may pause or end the reading."""

    def data_received(self, data: bytes) -> None:
        """Take what has come; nothing means that there will be no more, and that the reading has ended."""
        ...

    def read_failed(self, error: Exception) -> None:
        """Take note of what :meth:`data_received` has raised; the reading has ended."""
        ...


class Reading(Protocol):
    """The reading of one connection. All of its methods are synchronous."""

    def begin(self) -> None:
        """Read from now on, and perhaps give the receiver something at once. To be called once.

        Raises:
            OSError: the system can watch no more connections.
        """
        ...

    def pause(self) -> None:
        """Read no more until :meth:`resume`. It is not noticed then that the client leaves."""
        ...

    def resume(self) -> None:
        """Read again, and perhaps give the receiver something at once. Harmless if it was not paused, or has ended.

        Raises:
            OSError: as :meth:`begin`.
        """
        ...

    def end(self) -> None:
        """Read no more. To be called before the connection is closed; idempotent."""
        ...


class Reader(Protocol):
    """Reads the connections of a server."""

    def reading(self, stream: ByteStream, receiver: Receiver) -> Reading:
        """Return what reads ``stream`` for ``receiver``, once that has begun.

        It refers to the receiver until the reading ends.
        """
        ...

    async def run(self) -> None:
        """Read until cancelled."""
        ...


def has_epoll() -> bool:
    """Return whether one task can read many connections here."""
    return hasattr(select, "epoll")


class SharedReader:
    """One task that reads all connections, which must have descriptors. See the top of this module."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readings: dict[int, _SharedReading] = {}

    def reading(self, stream: ByteStream, receiver: Receiver) -> Reading:
        """See ``Reader``."""
        return _SharedReading(stream, receiver, self._epoll, self._readings)

    async def run(self) -> None:
        """See ``Reader``."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for descriptor, _ in self._epoll.poll(0, _AT_ONCE):
                    reading = self._readings.get(descriptor)
                    if reading is not None:
                        reading.read_safely()
        finally:
            self._readings.clear()
            self._epoll.close()


class _SharedReading:
    """One connection of a :class:`SharedReader`."""

    __slots__ = ("_descriptor", "_epoll", "_paused", "_readings", "_receiver", "_stream")

    def __init__(
        self,
        stream: ByteStream,
        receiver: Receiver,
        epoll: select.epoll,
        readings: dict[int, _SharedReading],
    ) -> None:
        assert stream.descriptor is not None
        self._stream = stream
        self._descriptor = stream.descriptor
        self._receiver: Receiver | None = receiver
        self._epoll = epoll
        self._readings = readings
        self._paused = True

    def begin(self) -> None:
        self._watch()
        # Mostly a client asks as soon as it is connected.
        self.read_once()

    def resume(self) -> None:
        if self._paused:
            self._watch()
            if self._stream.pending:
                self.read_once()

    def pause(self) -> None:
        # A client that has left is reported whatever is asked for, so it is not enough to ask for nothing.
        if not self._paused:
            self._paused = True
            # There is nothing in the table when the reader has come to its end.
            if self._readings.pop(self._descriptor, None) is not None:
                self._epoll.unregister(self._descriptor)

    def end(self) -> None:
        self.pause()
        self._receiver = None

    def _watch(self) -> None:
        if self._receiver is not None and not self._epoll.closed:
            self._epoll.register(self._descriptor, select.EPOLLIN)
            self._readings[self._descriptor] = self
            self._paused = False

    def read_safely(self) -> None:
        """Do what :meth:`read_once` does, for a task that reads other connections too: an exception ends it."""
        try:
            self.read_once()
        except Exception as error:
            _fail(error, self._receiver, self)

    def read_once(self) -> None:
        """Take what there is, if anything; also what the stream has read ahead."""
        while (receiver := self._receiver) is not None:
            try:
                data = self._stream.read_nowait(_RECEIVE)
            except trio.WouldBlock:
                return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            _hand_over(data, receiver, self)
            if self._paused or not self._stream.pending:
                return


class TaskReader:
    """A task for each connection, whatever sort of stream that is.

    Args:
        nursery: where the tasks are.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def reading(self, stream: ByteStream, receiver: Receiver) -> Reading:
        """See ``Reader``."""
        return _TaskReading(stream, receiver, self._nursery)

    async def run(self) -> None:
        """See ``Reader``."""
        await trio.sleep_forever()


class _TaskReading:
    """One connection of a :class:`TaskReader`."""

    def __init__(self, stream: ByteStream, receiver: Receiver, nursery: trio.Nursery) -> None:
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
                    data = await self._stream.read(_RECEIVE)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    data = b""
                except Exception as error:
                    _fail(error, receiver, self)
                    return
                _hand_over(data, receiver, self)
                while self._paused:
                    await self._resumed.park()


def _hand_over(data: bytes, receiver: Receiver, reading: Reading) -> None:
    """Give a connection what has come. Nothing ends its reading, and so does an error."""
    if not data:
        reading.end()
    try:
        receiver.data_received(data)
    except Exception as error:
        _fail(error, receiver, reading)


def _fail(error: Exception, receiver: Receiver | None, reading: Reading) -> None:
    """End a reading that has raised something. It is the connection's, whose task then raises it."""
    try:
        reading.end()
        if receiver is not None:
            receiver.read_failed(error)
    except Exception:
        logger.exception("the reading of a connection failed")
