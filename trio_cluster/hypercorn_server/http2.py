"""What hypercorn lacks for one HTTP/2 stream: backpressure, and a reset of a stream whose answer has no end.

Theory of operation
===================

hypercorn keeps what an application sends on an HTTP/2 stream in a buffer, from which one task for the whole connection
writes as much as the client's flow control allows. It has three gaps, which are closed here:

- *The buffer has no bound.* An attempt to write, which happens after each piece, lets the application go on even if
  nothing was written. So the stream is given another buffer, :class:`BoundedBuffer`, before anything is sent.
- *An answer that is not ended looks like one that goes on.* hypercorn forgets the stream, and the client waits for
  ever. So such a stream is reset.
- *An answer to a request whose body is still coming ends the connection*: what comes for a stream that hypercorn has
  forgotten is an error there. So such a stream is reset after its end, which tells the client to stop (RFC 9113, 8.1);
  the protocol's library then ignores what is still under way.

A client that takes nothing for as long as the kernel would wait for it on HTTP/1.1 is dropped as well: the kernel knows
nothing of the flow control of HTTP/2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import h2.exceptions
import trio
from h2.errors import ErrorCodes

from ..http1.asgi import Send
from ..http1.server import UNREAD_TIME
from .library import BufferCompleteError, RawData, http2_stream

__all__ = ["BoundedBuffer", "Http2Stream"]

#: Bytes that wait in a stream's buffer before its application has to wait.
_HIGH_WATER: Final = 64 * 1024


class Http2Stream:
    """One stream of an HTTP/2 connection. To be made before anything is sent on it.

    Args:
        send: the ASGI callable that hypercorn gave for the request.
        on_stuck: called once if the client takes nothing for too long. Synchronous.
    """

    def __init__(self, send: Send, on_stuck: Callable[[str], None]) -> None:
        self._protocol, self._id = http2_stream(send)
        self._buffer = BoundedBuffer(on_stuck)
        self._protocol.stream_buffers[self._id] = self._buffer  # type: ignore[assignment]

    @property
    def ended(self) -> bool:
        """Whether the end of the answer was written."""
        return self._buffer.ended

    def close(self) -> None:
        """Send nothing more of what was not sent, and let no task wait for that. Synchronous, idempotent."""
        self._buffer.close_now()

    async def abort(self) -> None:
        """Reset the stream when what was sent on it has been written. A checkpoint; not to be cancelled."""
        await self._buffer.wait_empty()
        await self._reset(ErrorCodes.INTERNAL_ERROR)

    async def end_early(self) -> None:
        """End the answer, and the request, of which not everything has come. A checkpoint; not to be cancelled."""
        await self._buffer.wait_empty()
        if self._buffer.closed:
            # What was dropped is missing in the answer.
            return
        self._buffer.ended = True
        with suppress(h2.exceptions.ProtocolError):
            self._protocol.connection.end_stream(self._id)
        await self._reset(ErrorCodes.NO_ERROR)

    async def _reset(self, code: ErrorCodes) -> None:
        # The client may have reset the stream before, or closed the connection.
        with suppress(h2.exceptions.ProtocolError):
            self._protocol.connection.reset_stream(self._id, code)
        data = self._protocol.connection.data_to_send()
        if data:
            await self._protocol.send(RawData(data))
        # The task that writes finds the buffer closed, and forgets the stream.
        self._buffer.close_now()
        if self._id in self._protocol.stream_buffers:
            self._protocol.priority.unblock(self._id)
        await self._protocol.has_data.set()


class BoundedBuffer:
    """What waits to be written on a stream: hypercorn's ``StreamBuffer``, with a bound.

    Args:
        on_stuck: called once if nothing was taken for too long. Synchronous.

    Attributes:
        buffer: what waits.
        ended: the end of the stream was written.
        closed: what waits was dropped, and nothing more is taken.
    """

    def __init__(self, on_stuck: Callable[[str], None]) -> None:
        self.buffer = bytearray()
        self.ended = False
        self._on_stuck = on_stuck
        self._complete = self.closed = False
        self._changed = trio.lowlevel.ParkingLot()

    # What the application's side does

    async def push(self, data: bytes) -> None:
        """Add to what waits, and wait until there is room for more. A checkpoint if there is none."""
        if self._complete or self.closed:
            raise BufferCompleteError
        self.buffer += data
        while len(self.buffer) >= _HIGH_WATER and not self.closed:
            await self._wait()

    def set_complete(self) -> None:
        """Let the end of the stream follow what waits."""
        self._complete = True

    async def drain(self) -> None:
        """Wait until the end of the stream is written. A checkpoint if it is not."""
        while not (self.ended or self.closed):
            await self._wait()

    async def wait_empty(self) -> None:
        """Wait until all that waits is written. A checkpoint if anything does."""
        while self.buffer and not self.closed:
            await self._wait()

    # What the writer's side does

    async def pop(self, max_length: int) -> bytes:
        """Take at most so many bytes out.

        Raises:
            h2.exceptions.StreamClosedError: the buffer is closed; the writer forgets the stream.
        """
        if self.closed:
            raise h2.exceptions.StreamClosedError(0)
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if data:
            self._changed.unpark_all()
        return data

    @property
    def complete(self) -> bool:
        """Whether the end is to be written now; the writer does that if it is told so."""
        # Not if it is closed: what was dropped is missing in the answer, and it must not look complete.
        if not self._complete or self.buffer or self.closed:
            return False
        self.ended = True
        self._changed.unpark_all()
        return True

    async def close(self) -> None:
        """See :meth:`close_now`."""
        self.close_now()

    def close_now(self) -> None:
        """Drop what waits, and let no task wait. Synchronous, idempotent."""
        self.closed = True
        self.buffer.clear()
        self._changed.unpark_all()

    async def _wait(self) -> None:
        with trio.move_on_after(UNREAD_TIME) as waited:
            await self._changed.park()
        if waited.cancelled_caught:
            self.close_now()
            self._on_stuck("the client takes nothing of its answer")
