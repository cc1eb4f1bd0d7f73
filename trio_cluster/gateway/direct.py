"""The fast path of a token: from where it is put to the client's socket, without waking a task.

Waking a task, and passing one piece of a stream through a queue and the server, costs several times as much as the
kernel needs to send it. So once an answer has begun and nothing of it waits, the call's channel gets a fast path: a
piece is framed and written where it is put, in the task that reads the worker's link or in the task of the local
handler. The fast path takes a piece only if the result is the same as on the slow path: the client keeps up (its socket
takes the whole piece), no piece waits before it, the connection is between two writes, and the piece consists of whole
events. Every other piece waits in the channel and takes the slow path, in order. The fast path is used again when the
slow path has caught up.

The accounting is the same on both paths. A piece counts as consumed when the socket has it; what waits for the slow
path holds the handler back through the channel's window. If the kernel took only a part of a piece, the slow path
writes the rest before anything else. Deadlines, comments, cancellation and the end of the answer are handled by the
slow path alone: the task that sends the answer sleeps meanwhile, and checks when it wakes how long ago the last piece
was written.
"""

from __future__ import annotations

import math
from typing import Protocol

import trio

from ..core.channel import ByteChannel
from .sse_buffer import EventBuffer

__all__ = ["Connection", "DirectWriter"]


class Connection(Protocol):
    """The part of a client's connection that the gateway uses. The HTTP server provides it."""

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected, or the connection was closed here."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it was closed here, and the client had not disconnected before."""
        ...

    @property
    def arrived(self) -> bool:
        """Whether a part of the request's body waits to be received, or the whole body has arrived."""
        ...

    @property
    def ready(self) -> bool:
        """Whether :meth:`send_nowait` can be used now."""
        ...

    def send_nowait(self, body: bytes | memoryview, *, droppable: bool = False) -> bool:
        """Send a piece of the body. Synchronous.

        Args:
            body: the piece.
            droppable: drop the piece if the socket takes nothing of it.

        Returns:
            Whether the socket took all of it, or it was dropped; if not, the connection keeps the rest for the next
            write.

        Raises:
            trio.WouldBlock: the connection is not ready.
        """
        ...

    def reset(self) -> None:
        """Reset the connection, so that the client sees an error and not the end of the answer. Synchronous."""
        ...


class DirectWriter:
    """Writes the pieces of one answer to the client's connection as they are put.

    Args:
        body: the answer's channel; its fast path is set to this writer.
        connection: the connection to which pieces are written.
        events: knows whether a piece may be sent on its own; ``None``: the answer is not a stream of events.

    Attributes:
        last_output: the trio time at which a piece was last put while none waited.
        last_sign_of_life: the same for an empty piece, of which the client gets nothing.
        has_unsent: the socket took only a part of a piece; the slow path must write the rest.
    """

    def __init__(self, body: ByteChannel, connection: Connection, events: EventBuffer | None) -> None:
        self._body = body
        self._connection = connection
        self._events = events
        self.last_output = self.last_sign_of_life = -math.inf
        self.has_unsent = False
        # The bound method costs half of what trio.current_time() does, and is called for each token.
        self._now = trio.lowlevel.current_clock().current_time
        body.set_fast_path(self._try_write)

    def _try_write(self, data: bytes | memoryview) -> bool:
        if not data:
            self.last_sign_of_life = self._now()
            return True
        self.last_output = self._now()
        if self._events is not None and not self._events.is_whole(data):
            return False
        try:
            # A connection that is ready has nothing unsent: a write of the slow path has taken the rest with it.
            self.has_unsent = not self._connection.send_nowait(data)
        except trio.WouldBlock:
            return False
        if self.has_unsent:
            self._body.wake_reader()
        return True
