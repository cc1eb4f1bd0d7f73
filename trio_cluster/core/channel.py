"""A bounded channel of bytes, from one producer to one consumer.

Theory of operation
===================

Two bodies flow through a node: the body of a request, from the client to the backend (``Request.upload``), and the body
of an answer, back to the client (``Call.body``). Both are channels. If the body crosses a link, each node that it
passes has a channel for it.

*The producer* puts pieces synchronously, so that the reader of a link can hand over what arrived without waiting. A
producer that can be slowed down awaits :meth:`ByteChannel.wait_room` between its puts; one that cannot (the reader of a
link) relies on credit, which the peer is granted through ``on_consumed``.

*The consumer* has three ways to take pieces, from the cheapest to the most convenient:

- a *fast path*: a function that tries to pass a piece on at once, in the producer's task. It is tried only while no
  piece is waiting; a piece that it does not take waits like any other;
- a *sink*: a function that is called with every piece, and keeps those that it cannot pass on yet. The bytes that it
  keeps count as waiting until the consumer calls :meth:`ByteChannel.consumed` for them;
- pulling: :meth:`ByteChannel.receive`, :meth:`ByteChannel.receive_nowait`.

The first two exist because waking a task costs more than everything else that is done for a token.

*Backpressure*: when ``window`` bytes are waiting, :meth:`ByteChannel.wait_room` holds the producer up. The consumer may
close the channel at any time (:meth:`ByteChannel.close`); then the producer is notified, no longer held up, and what it
still puts is dropped.

A channel carries no errors. A failure is an event of the call that the channel belongs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from io import BytesIO

import trio

from . import clock
from .limits import WINDOW

__all__ = ["ByteChannel"]


def _nothing(_: int) -> None:
    pass


class ByteChannel:
    """A bounded channel of bytes. See the top of this module.

    Args:
        size: how many bytes will be put in total; -1 if that is not known.
        on_consumed: called with the number of bytes that the consumer has taken since the last time.
        is_open: pieces may be put at once; otherwise after :meth:`open`.
        signs_of_life: empty pieces are passed on, to show that the producer is working; otherwise they are dropped.

    All callbacks, sinks and fast paths are called synchronously, and must not raise.

    Attributes:
        size: as given.
        window: how many bytes may wait before the producer is held up. Tests set it right after making the channel.
        received: how many bytes were put.
        delivered: how many bytes the consumer has taken.
        waiting_bytes: how many bytes were put and not taken, including those that a sink keeps.
        held_back: for how many seconds the producer was held up. For display only.
        complete: all bytes were put.
        closed: the consumer has closed the channel.
        pieces: the pieces that wait, oldest first. For reading only; :meth:`next_piece` and the other methods remove
            them.
        reader: where a consumer parks until something is put, the body ends, or :meth:`wake_reader` is called.
    """

    __slots__ = (
        "_fast_path",
        "_held",
        "_on_close",
        "_on_complete",
        "_on_consumed",
        "_open",
        "_producer",
        "_signs_of_life",
        "_sink",
        "closed",
        "complete",
        "delivered",
        "held_back",
        "pieces",
        "reader",
        "received",
        "size",
        "waiting_bytes",
        "window",
    )

    def __init__(
        self,
        size: int = -1,
        *,
        on_consumed: Callable[[int], None] = _nothing,
        is_open: bool = True,
        signs_of_life: bool = False,
    ) -> None:
        self.size = size
        self.window = WINDOW
        self.received = 0
        self.delivered = 0
        self.waiting_bytes = 0
        self.held_back = 0.0
        self.complete = False
        self.closed = False
        self._open = is_open
        self._signs_of_life = signs_of_life
        self._on_consumed = on_consumed
        self._on_close: Callable[[], None] | None = None
        self._on_complete: Callable[[], None] | None = None
        self.pieces: deque[bytes | memoryview] = deque()
        self.reader = trio.lowlevel.ParkingLot()
        self._producer = trio.lowlevel.ParkingLot()
        # A producer is parked.
        self._held = False
        self._sink: Callable[[bytes | memoryview, bool], bool] | None = None
        self._fast_path: Callable[[bytes | memoryview], bool] | None = None

    # The producer's side

    def open(self) -> None:
        """Allow pieces to be put. Synchronous."""
        self._open = True

    def put(self, data: bytes | memoryview, *, last: bool = False) -> None:
        """Add the next bytes. Synchronous. What is put after :meth:`close` is dropped.

        Args:
            data: may be empty.
            last: the body is complete with these bytes.

        Raises:
            RuntimeError: the channel is not open yet, or was complete already.
        """
        size = len(data)
        if self.closed:
            self.received += size
            return
        if self.complete or not self._open:
            raise RuntimeError(f"data {'after the end of the body' if self.complete else 'before the head'}")
        self.received += size
        if last:
            self.complete = True
            if self._on_complete is not None:
                self._on_complete()
        elif not (size or self._signs_of_life):
            return
        sink = self._sink
        if sink is None:
            fast_path = self._fast_path
            if fast_path is None or self.pieces or not fast_path(data):
                self.waiting_bytes += size
                # A single empty piece in the queue is enough to wake the consumer.
                if size or not self.pieces:
                    self.pieces.append(data)
                if self.reader:
                    self.reader.unpark()
                return
        elif not sink(data, last):
            self.waiting_bytes += size
            return
        self.delivered += size
        self._on_consumed(size)

    async def wait_room(self) -> None:
        """Wait until less than a window is waiting, or the consumer has closed the channel. A checkpoint."""
        await trio.lowlevel.checkpoint()
        if self.waiting_bytes < self.window or self.closed:
            return
        since = clock.now()
        try:
            while self.waiting_bytes >= self.window and not self.closed:
                self._held = True
                await self._producer.park()
        finally:
            self.held_back += clock.now() - since

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the consumer closes the channel before the body is complete; at once if it has.

        A second callback replaces the first one.
        """
        self._on_close = callback
        if self.closed:
            callback()

    def on_consumed(self, callback: Callable[[int], None]) -> None:
        """Call ``callback`` with the number of bytes each time some were taken. It replaces an earlier one."""
        self._on_consumed = callback

    def finish(self) -> None:
        """End the body without passing the end to a sink, since the end of the call does that. Synchronous, idempotent.

        A producer that waits for room is released. Bytes that wait can still be received.
        """
        self.complete = True
        self._sink = self._fast_path = None
        if self._held:
            self._release_producer()
        if self.reader:
            self.reader.unpark_all()

    # The consumer's side

    def on_complete(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when all bytes were put; at once if they were. It replaces an earlier one."""
        self._on_complete = callback
        if self.complete:
            callback()

    async def receive(self) -> bytes:
        """Return the bytes that were put since the last time, and wait for some if necessary; empty at the end.

        A checkpoint. A cancelled ``receive`` loses no bytes.
        """
        await trio.lowlevel.checkpoint()
        while not (self.waiting_bytes or self.complete):
            await self.reader.park()
        return self.receive_nowait()

    def receive_nowait(self) -> bytes:
        """Return the bytes that were put since the last time; empty if there are none yet, too. Synchronous."""
        pieces = self.pieces
        data = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if data:
            self.consumed(len(data))
        return data

    def next_piece(self) -> bytes | memoryview:
        """Return the next piece as it was put; it may be empty. Synchronous. There must be one in :attr:`pieces`."""
        data = self.pieces.popleft()
        self.consumed(len(data))
        return data

    async def read(self) -> bytes:
        """Return the whole body, when all of it has arrived. A checkpoint."""
        # BytesIO.getvalue() shares the buffer that was written to; b"".join() would need twice the memory.
        whole = BytesIO()
        while piece := await self.receive():
            whole.write(piece)
        return whole.getvalue()

    def redirect(self, sink: Callable[[bytes | memoryview, bool], bool]) -> None:
        """Pass what waits, and then everything that is put, to a function. Synchronous.

        Args:
            sink: ``sink(data, last)`` is called in the producer's task. It returns ``True`` if it has passed the bytes
                on. Otherwise it keeps them, and they count as waiting until :meth:`consumed` is called for them.
        """
        self._sink = sink
        data, complete = b"".join(self.pieces), self.complete
        self.pieces.clear()
        if (data or complete) and sink(data, complete):
            self.consumed(len(data))

    def set_fast_path(self, fast_path: Callable[[bytes | memoryview], bool] | None) -> None:
        """Try a function on each piece that is put while no other piece waits. Synchronous.

        Args:
            fast_path: ``fast_path(data)`` is called in the producer's task. It returns ``True`` if it has passed the
                piece on; otherwise the piece waits. It is dropped at the end of the body. ``None``: use none.
        """
        self._fast_path = None if self.complete else fast_path

    def consumed(self, count: int) -> None:
        """Record that ``count`` bytes that a sink kept were passed on. Synchronous. For sinks only."""
        if self.closed:
            return
        self.waiting_bytes -= count
        self.delivered += count
        if self._held and self.waiting_bytes < self.window:
            self._release_producer()
        self._on_consumed(count)

    def wake_reader(self) -> None:
        """Wake the tasks that are parked at :attr:`reader`, so that they look again. Synchronous."""
        if self.reader:
            self.reader.unpark_all()

    def close(self) -> None:
        """Take no more bytes, and drop those that wait. Synchronous, idempotent."""
        if self.closed:
            return
        self.closed = True
        self.waiting_bytes = 0
        self.pieces.clear()
        self._fast_path = None
        if self._held:
            self._release_producer()
        if self._on_close is not None and not self.complete:
            self._on_close()

    def _release_producer(self) -> None:
        self._held = False
        self._producer.unpark_all()
