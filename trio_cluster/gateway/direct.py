"""The short way of a token: from where it comes in to the client's socket, without waking anybody.

Waking a task, and going through a queue and the server for one piece of a stream, costs several times what the kernel
takes to send it. So once an answer has begun and has caught up, its call is redirected: a piece is framed and written
where it is put, in the task that reads the worker's link or in the handler's own. That is done only while it changes
nothing: the client keeps up (its socket takes all of it), nothing waits before it, the connection is idle between two
writes, and the piece is whole events. Whatever is not so goes the ordinary way, in order, and the short way is open
again when that has caught up.

The short way keeps the same accounts. A piece counts as taken when the socket has it; what the ordinary way has still
to take counts as waiting, and holds the handler back through the call's window as ever. What the kernel took a part of
is finished by the ordinary way before anything else. Deadlines, comments, cancellation and the end of the answer are
the ordinary way's business alone: the task that sends it sleeps meanwhile, and looks when it wakes how long ago the
last piece went.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from ..core.call import Call, Data, Event

__all__ = ["Connection", "DirectWriter"]


class Connection(Protocol):
    """The connection that an answer is sent on."""

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        ...

    @property
    def arrived(self) -> bool:
        """Whether something of the request's body has come and not been given to the application, or all has."""
        ...

    @property
    def ready(self) -> bool:
        """Whether :meth:`send_nowait` would do something."""
        ...

    def send_nowait(self, body: bytes | memoryview) -> bool:
        """Send a piece of the body now; return whether all of it has gone.

        Raises:
            trio.WouldBlock: the connection is not ready.
        """
        ...

    def reset(self) -> None:
        """Break it, so that the peer sees an error and not an end."""
        ...


class DirectWriter:
    """The consumer of a call whose pieces go straight to a connection; receives what does not, as a call does.

    Args:
        call: redirected to this from now on.
        connection: where the pieces go.
        is_whole: tells whether a piece may be sent on its own.

    Attributes:
        last: when something was last heard of the call, in trio's time.
        has_unsent: the connection has taken a part of a piece, and needs an ordinary write for the rest.
    """

    def __init__(
        self, call: Call, connection: Connection, is_whole: Callable[[bytes | memoryview], bool]
    ) -> None:
        self._call = call
        self._connection = connection
        self._is_whole = is_whole
        self._waiting: deque[Event] = deque()
        self._reader = trio.lowlevel.ParkingLot()
        self.last = -math.inf
        self.has_unsent = False
        # Half as much as to look for the clock each time.
        self._now = trio.lowlevel.current_clock().current_time
        call.redirect(self._put, self._put_piece)

    async def receive(self) -> Event | None:
        """Return the next event that did not go the short way, or ``None`` if only something is left over."""
        if self._waiting or self.has_unsent:
            await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self.has_unsent:
                return None
            await self._reader.park()
        return self.receive_nowait()

    def receive_nowait(self) -> Event:
        """Return such an event if there is one; raises as the call's own method does."""
        if not self._waiting:
            raise trio.EndOfChannel if self._call.ended else trio.WouldBlock
        event = self._waiting.popleft()
        if isinstance(event, Data):
            self._call.taken(len(event.data))
        return event

    def _put_piece(self, data: bytes | memoryview) -> bool:
        self.last = self._now()
        if not data:
            return False
        if not self._waiting and self._is_whole(data):
            try:
                # An ordinary write, which takes along what was left over, has been done if it is ready again.
                self.has_unsent = not self._connection.send_nowait(data)
            except trio.WouldBlock:
                pass
            else:
                if self.has_unsent:
                    self._reader.unpark()
                return True
        self._waiting.append(Data(data))
        self._reader.unpark()
        return False

    def _put(self, event: Event) -> None:
        self._waiting.append(event)
        self._reader.unpark()
        if self._call.ended:
            # What refers to each other would be there until the garbage collector comes.
            self._is_whole = _never


def _never(_: bytes | memoryview) -> bool:
    return False
