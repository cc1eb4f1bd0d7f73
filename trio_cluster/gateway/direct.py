"""The fast path of a token: from where it arrives to the client's socket, without waking a task.

Waking a task, and going through a queue and the server for one piece of a stream, costs several times what the kernel
takes to send it. So once an answer has begun and has caught up, the call's channel is given a fast path: a piece is
framed and written where it is put, in the task that reads the worker's link or in the handler's own. That is done only
while it changes nothing: the client keeps up (its socket takes the whole piece), nothing waits before it, the connection
is between two writes, and the piece consists of whole events. Every other piece waits in the channel and takes the slow
path, in order; the fast path is open again when the slow path has caught up.

Accounting is the same on both paths. A piece counts as consumed when the socket has it; what waits for the slow path
holds the handler back through the channel's window. A piece that the kernel took in part is finished by the slow path
before anything else. Deadlines, comments, cancellation and the end of the answer are handled by the slow path alone: the
task that sends the answer sleeps meanwhile, and looks when it wakes how long ago the last piece was written.
"""

from __future__ import annotations

import math
from typing import Protocol

import trio

from ..core.channel import ByteChannel
from .sse_buffer import EventBuffer

__all__ = ["Connection", "DirectWriter"]


class Connection(Protocol):
    """The client's connection, as far as the gateway may see it."""

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        ...

    @property
    def arrived(self) -> bool:
        """Whether something of the request's body waits to be received, or all of it has arrived."""
        ...

    @property
    def ready(self) -> bool:
        """Whether :meth:`send_nowait` would do something."""
        ...

    def send_nowait(self, body: bytes | memoryview) -> bool:
        """Send a piece of the body now; return whether all of it was sent.

        Raises:
            trio.WouldBlock: the connection is not ready.
        """
        ...

    def reset(self) -> None:
        """Break the connection, so that the peer sees an error and not an end."""
        ...


class DirectWriter:
    """Writes the pieces of one answer to the client's connection as they are put.

    Args:
        body: the answer's channel, whose fast path this is from now on.
        connection: where pieces are written.
        events: tells whether a piece may be sent on its own; ``None`` if the answer has no events.

    Attributes:
        last_activity: when something was last put while nothing waited, in trio's time.
        has_unsent: the connection took a part of a piece; the slow path has to write the rest.
    """

    def __init__(self, body: ByteChannel, connection: Connection, events: EventBuffer | None) -> None:
        self._body = body
        self._connection = connection
        self._events = events
        self.last_activity = -math.inf
        self.has_unsent = False
        # The bound method costs half of what trio.current_time() does, and is called for each token.
        self._now = trio.lowlevel.current_clock().current_time
        body.set_fast_path(self._try_write)

    def _try_write(self, data: bytes | memoryview) -> bool:
        self.last_activity = self._now()
        if not data:
            # A sign of life; there is nothing to write.
            return True
        if self._events is not None and not self._events.is_whole(data):
            return False
        try:
            # If the connection is ready again, a slow write has taken along what was unsent.
            self.has_unsent = not self._connection.send_nowait(data)
        except trio.WouldBlock:
            return False
        if self.has_unsent:
            self._body.wake_reader()
        return True
