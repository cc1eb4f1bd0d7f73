"""A server's connections: they come in, are served, and end with the server.

A connection that fails ends no other one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeAlias

import trio

from .acceptor import accept_all
from .handshakes import Handshakes
from .sockets import Listeners
from .streams import ByteStream

__all__ = ["Connection", "OpenConnection", "serve_connections"]

logger = logging.getLogger("trio_cluster.http")


class Connection(Protocol):
    """A connection, as the server that it belongs to sees it."""

    async def serve(self) -> None:
        """Serve the connection until it is over, and close it. An exception is logged."""
        ...

    def close_when_idle(self) -> None:
        """Take no more requests: close now if none is being answered, otherwise after it. Synchronous."""
        ...

    def close_after_next(self) -> None:
        """Announce the end of the connection with the next answer, and close it then. Synchronous, idempotent.

        An idle connection stays open, so that no request that is on its way is lost.
        """
        ...

    def close(self) -> None:
        """Close it now. Synchronous, idempotent. What has been written is still delivered."""
        ...


class Retirement:
    """How a server loses its connections without losing a request: each ends with its next answer.

    Attributes:
        begun: to be set when the server gets no new connections any more, and is to begin with that.
        idle_time_over: to be set when connections without a request are not to be waited for any longer.
        over: set by the server when no connection is left.
    """

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.idle_time_over = trio.Event()
        self.over = trio.Event()


#: Makes a connection of a stream. Synchronous. Raises ``OSError`` if the client has left already.
OpenConnection: TypeAlias = Callable[[ByteStream], Connection]


async def serve_connections(
    listeners: Listeners,
    prepare: Callable[[trio.Nursery], OpenConnection],
    *,
    shutdown_trigger: Callable[[], Awaitable[object]],
    grace: float,
    retirement: Retirement | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections until ``shutdown_trigger`` returns, and then until they have ended.

    From then on no new connection is taken, idle ones are closed, and the others have ``grace`` seconds to finish. What
    is left after that is cancelled, and its connections are closed. Cancelling this function does the same without
    grace.

    Args:
        listeners: where connections come in; closed when no new ones are taken.
        prepare: called once with the nursery that connections are served in, to start in it what all of them need.
        shutdown_trigger: returns when it is time to stop.
        grace: seconds; may be infinite.
        retirement: lets the connections end with their next answers; ``None``: they are never asked to.
        task_status: started when connections are accepted.
    """
    await _Connections(grace, retirement).serve(listeners, prepare, shutdown_trigger, task_status)


class _Connections:
    """All connections of one server."""

    def __init__(self, grace: float, retirement: Retirement | None) -> None:
        self._grace = grace
        self._retirement = retirement
        # Whether it has begun: an attribute, since it is read for each connection.
        self._retiring = False
        self._shaking_hands = 0
        # A dict and not a set: connections end in the order in which they came, and not in one of addresses.
        self._open: dict[Connection, None] = {}
        self._empty = trio.Event()
        self._handshakes = Handshakes(logger)
        self._stopping = False

    async def serve(
        self,
        listeners: Listeners,
        prepare: Callable[[trio.Nursery], OpenConnection],
        shutdown_trigger: Callable[[], Awaitable[object]],
        task_status: trio.TaskStatus[None],
    ) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_when_cancelled)
            nursery.start_soon(self._handshakes.run)
            if self._retirement is not None:
                nursery.start_soon(self._retire, self._retirement)
            admit = partial(self._admit, nursery, prepare(nursery))
            async with trio.open_nursery() as acceptors:
                for listener in listeners:
                    acceptors.start_soon(accept_all, listener, admit)
                task_status.started()
                await shutdown_trigger()
                acceptors.cancel_scope.cancel(reason="the server takes no more connections")
            self._stopping = True
            for connection in list(self._open):
                connection.close_when_idle()
            with trio.move_on_after(self._grace) if math.isfinite(self._grace) else trio.CancelScope():
                while self._open:
                    self._empty = trio.Event()
                    await self._empty.wait()
            nursery.cancel_scope.cancel(reason="the server has stopped")

    def _admit(self, nursery: trio.Nursery, open_connection: OpenConnection, stream: ByteStream) -> None:
        if stream.needs_handshake:
            nursery.start_soon(self._serve_after_handshake, nursery, open_connection, stream)
        else:
            self._open_connection(nursery, open_connection, stream)

    async def _serve_after_handshake(
        self, nursery: trio.Nursery, open_connection: OpenConnection, stream: ByteStream
    ) -> None:
        self._shaking_hands += 1
        try:
            if not await self._handshakes.perform(stream):
                return
            try:
                self._open_connection(nursery, open_connection, stream)
            except Exception:
                logger.exception("a connection could not be served")
                stream.close()
        finally:
            self._shaking_hands -= 1
            if self._retiring:
                self._check_retired()

    def _open_connection(
        self, nursery: trio.Nursery, open_connection: OpenConnection, stream: ByteStream
    ) -> None:
        try:
            connection = open_connection(stream)
        except OSError:
            # The client has left before its address could be read.
            stream.close()
            return
        self._open[connection] = None
        if self._stopping:
            # Its handshake was begun before, and has only ended now.
            connection.close_when_idle()
        elif self._retiring:
            connection.close_after_next()
        nursery.start_soon(self._serve_one, connection)

    async def _serve_one(self, connection: Connection) -> None:
        try:
            await connection.serve()
        except Exception:
            logger.exception("a connection failed")
        finally:
            del self._open[connection]
            if not self._open:
                self._empty.set()
                if self._retiring:
                    self._check_retired()

    async def _retire(self, retirement: Retirement) -> None:
        await retirement.begun.wait()
        self._retiring = True
        for connection in list(self._open):
            connection.close_after_next()
        self._check_retired()
        await retirement.idle_time_over.wait()
        self._stopping = True
        for connection in list(self._open):
            connection.close_when_idle()

    def _check_retired(self) -> None:
        if self._retirement is not None and not (self._open or self._shaking_hands):
            self._retirement.over.set()

    async def _close_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for connection in list(self._open):
                connection.close()
