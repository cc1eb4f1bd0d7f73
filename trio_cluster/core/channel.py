"""A bounded channel of bytes between one producer and one consumer, which may be on different sides of a link.

Theory of operation
===================

Two bodies flow through a node: that of a request, from the client to whoever answers (``Request.upload``), and that of
an answer, back to the client (``Call.body``). Both are this.

*The producer* puts pieces synchronously, so that a link's reader can hand over what arrived without waiting. A producer
that can be slowed down awaits :meth:`ByteChannel.wait_room` between its puts; one that cannot (a link) relies on
credit, which it extends through ``on_consumed``.

*The consumer* has three ways to take pieces, from the cheapest to the most convenient:

- a *fast path*: a function that tries to pass a piece on at once, in the producer's task. It is tried while nothing
  waits; a piece that it does not take waits as any other;
- a *sink*: a function that is given every piece, and keeps those that cannot go on yet. What it keeps counts as waiting
  until :meth:`ByteChannel.consumed` says that it has gone on;
- pulling: :meth:`ByteChannel.receive`, :meth:`ByteChannel.receive_nowait`.

The first two exist because waking a task costs more than everything else that happens to a token.

*Backpressure*: at most ``window`` bytes wait before the producer is held up. The consumer may want no more at any time
(:meth:`ByteChannel.close`); then the producer is told, waits no longer, and what it still puts is dropped.

A channel has no failure of its own. A failure is an event of the call that the channel belongs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from io import BytesIO

import trio

from .limits import WINDOW

__all__ = ["ByteChannel"]


def _nothing(_: int) -> None:
    pass


class ByteChannel:
    """See the top of this module.

    Args:
        size: how many bytes will be put in all; -1 if that is not known.
        on_consumed: called with the number of bytes that the consumer has taken since the last time.
        is_open: pieces may be put. Otherwise not before :meth:`open`.
        signs_of_life: empty pieces are passed on, to show that the producer works. Otherwise they are dropped.

    Attributes:
        size: as given.
        window: bytes that may wait before the producer is held up. A test makes it smaller right after the channel was
            made.
        received: bytes that were put.
        delivered: bytes that the consumer has taken.
        waiting_bytes: bytes that were put and not taken; those that a sink keeps are among them.
        complete: all bytes were put.
        closed: the consumer wants no more.
        pieces: those that wait, oldest first. To be looked at; :meth:`next_piece` and its like take them out.
        reader: where a consumer parks until something is put, the body ends, or it is woken for another reason.
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
        """Let pieces be put from now on."""
        self._open = True

    def put(self, data: bytes | memoryview, *, last: bool = False) -> None:
        """Add the next bytes. What is put after :meth:`close` is dropped.

        Args:
            data: may be empty.
            last: the body is complete with these.

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
                # One empty piece wakes the consumer as well as several.
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
        """Wait until the consumer has taken enough of what waits, or wants no more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self.waiting_bytes >= self.window and not self.closed:
            self._held = True
            await self._producer.park()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the consumer wants no more of an incomplete body; at once if that is so.

        There is one callback at a time.
        """
        self._on_close = callback
        if self.closed:
            callback()

    def on_consumed(self, callback: Callable[[int], None]) -> None:
        """Call ``callback`` from now on with the number of bytes that were taken. There is one callback at a time."""
        self._on_consumed = callback

    def finish(self) -> None:
        """Put no more, without saying so to the consumer: the call's own end does that. Idempotent.

        A producer that waits for room waits no longer. What waits can still be received.
        """
        self.complete = True
        self._sink = self._fast_path = None
        if self._held:
            self._release_producer()
        if self.reader:
            self.reader.unpark_all()

    # The consumer's side

    def on_complete(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when all bytes were put; at once if they were. There is one callback at a time."""
        self._on_complete = callback
        if self.complete:
            callback()

    async def receive(self) -> bytes:
        """Return what was put since the last time, waiting for it if need be; empty at the end of the body.

        A checkpoint. A cancelled ``receive`` loses nothing.
        """
        await trio.lowlevel.checkpoint()
        while not (self.waiting_bytes or self.complete):
            await self.reader.park()
        return self.receive_nowait()

    def receive_nowait(self) -> bytes:
        """Return what was put since the last time; empty also if there is more to come."""
        pieces = self.pieces
        data = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if data:
            self.consumed(len(data))
        return data

    def next_piece(self) -> bytes | memoryview:
        """Return the next piece as it was put, perhaps an empty one; there must be one in :attr:`pieces`."""
        data = self.pieces.popleft()
        self.consumed(len(data))
        return data

    async def read(self) -> bytes:
        """Return the whole body, when it has come. A checkpoint."""
        # BytesIO.getvalue() shares the buffer that was written to; b"".join() would need twice the memory.
        whole = BytesIO()
        while piece := await self.receive():
            whole.write(piece)
        return whole.getvalue()

    def redirect(self, sink: Callable[[bytes | memoryview, bool], bool]) -> None:
        """Give what is put to ``sink``, as it is put, and first what waits.

        ``sink(data, last)`` is called synchronously in the producer's task and must not raise. It returns whether the
        bytes have gone on; if not, they count as waiting until :meth:`consumed` is called for them.
        """
        self._sink = sink
        data, complete = b"".join(self.pieces), self.complete
        self.pieces.clear()
        if (data or complete) and sink(data, complete):
            self.consumed(len(data))

    def set_fast_path(self, fast_path: Callable[[bytes | memoryview], bool] | None) -> None:
        """Try ``fast_path`` on each piece that is put while nothing waits; it returns whether the piece has gone on.

        It is called synchronously in the producer's task and must not raise. It is dropped at the end of the body.
        """
        self._fast_path = None if self.complete else fast_path

    def consumed(self, count: int) -> None:
        """Say that ``count`` bytes that a sink kept have gone on. Consumers that receive need not call it."""
        if self.closed:
            return
        self.waiting_bytes -= count
        self.delivered += count
        if self._held and self.waiting_bytes < self.window:
            self._release_producer()
        self._on_consumed(count)

    def wake_reader(self) -> None:
        """Let whoever waits for something to read look again."""
        if self.reader:
            self.reader.unpark_all()

    def close(self) -> None:
        """Want no more, and drop what waits. Idempotent."""
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
