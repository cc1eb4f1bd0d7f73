"""The body of a request that is still coming in, on its way to whoever is to answer it.

Theory of operation
===================

An upload runs against the direction of its call: the client produces, the backend consumes. It has one producer and
one consumer, which may be tasks, or a link's reader and writer that never wait.

*The producer* puts pieces synchronously, and says when the body is complete. Where it can be slowed down, it awaits
:meth:`Upload.wait_room` between them; where it cannot, it relies on credit, which it extends through ``on_taken``.

*The consumer* pulls with :meth:`Upload.receive`, or has pieces pushed into a function with :meth:`Upload.redirect`
and says with :meth:`Upload.taken` how many bytes have gone on. It may want no more at any time: that is what the end
of a call means for its upload, and whoever produces is told.

An upload has no failure of its own. A client that leaves in the middle of it cancels its call, and with it whoever
waits here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from io import BytesIO
from typing import Final

import trio

__all__ = ["WINDOW", "Upload"]

#: Bytes of a body, be it of a request or of an answer, that may wait for their consumer on each node that it passes;
#: also the wire's credit window.
WINDOW: Final = 256 * 1024


def _nothing(_: int) -> None:
    pass


class Upload:
    """A body that is coming in. See the top of this module for the theory.

    Args:
        size: how many bytes it will have; -1 if that is not known.
        on_taken: called with the number of bytes that the consumer has taken since the last time.

    Attributes:
        size: as given.
        received: how many bytes have come.
        complete: all of them have.
        closed: nobody wants what is still to come.
        taken_at: when something of it was taken last, in trio's time.
    """

    __slots__ = (
        "_on_close",
        "_on_complete",
        "_on_taken",
        "_pieces",
        "_producer",
        "_reader",
        "_sink",
        "_waiting_bytes",
        "closed",
        "complete",
        "received",
        "size",
        "taken_at",
    )

    def __init__(self, size: int = -1, *, on_taken: Callable[[int], None] = _nothing) -> None:
        self.size = size
        self.received = 0
        self.complete = False
        self.closed = False
        self.taken_at = -math.inf
        self._on_taken = on_taken
        self._on_close: Callable[[], None] | None = None
        self._on_complete: Callable[[], None] | None = None
        self._pieces: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._reader = trio.lowlevel.ParkingLot()
        self._producer = trio.lowlevel.ParkingLot()
        self._sink: Callable[[bytes, bool], None] | None = None

    @property
    def waiting_bytes(self) -> int:
        """How many bytes have come and not been taken."""
        return self._waiting_bytes

    # The producer's face

    def put(self, data: bytes, *, last: bool = False) -> None:
        """Add the next bytes. What comes after :meth:`close` vanishes.

        Args:
            data: may be empty.
            last: the body is complete with these.

        Raises:
            RuntimeError: it was complete already.
        """
        if self.complete:
            raise RuntimeError("more of a body that is complete")
        self.complete = last
        self.received += len(data)
        if self.closed or not (data or last):
            return
        if last and self._on_complete is not None:
            self._on_complete()
        self._waiting_bytes += len(data)
        if self._sink is not None:
            self._sink(data, last)
            return
        if data:
            self._pieces.append(data)
        self._reader.unpark_all()

    async def wait_room(self) -> None:
        """Wait until the consumer has taken enough of what waits, or wants no more."""
        await trio.lowlevel.checkpoint()
        while self._waiting_bytes >= WINDOW and not self.closed:
            await self._producer.park()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when nobody wants what is still to come; at once if that is so. There is one at a time."""
        self._on_close = callback
        if self.closed:
            callback()

    # The consumer's face

    def on_complete(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when all of it has come; at once if it has. There is one at a time."""
        self._on_complete = callback
        if self.complete:
            callback()

    async def receive(self) -> bytes:
        """Return what has come of the body since the last time, waiting for it if need be; empty at its end.

        A cancelled ``receive`` loses nothing.
        """
        await trio.lowlevel.checkpoint()
        while not self._pieces and not self.complete:
            await self._reader.park()
        return self.receive_nowait()

    def receive_nowait(self) -> bytes:
        """Return what has come of the body since the last time; empty also if there is more to come."""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        if data:
            self.taken(len(data))
        return data

    async def read(self) -> bytes:
        """Return the whole body, when it has come."""
        # Such a file gives away what is in it; of pieces that are joined there would be two copies for a moment.
        whole = BytesIO()
        while piece := await self.receive():
            whole.write(piece)
        return whole.getvalue()

    def redirect(self, sink: Callable[[bytes, bool], None]) -> None:
        """Give what comes to ``sink`` as it is put, and first what is waiting.

        ``sink(data, last)`` is called synchronously and must not raise. The bytes it is given count as waiting until
        :meth:`taken` says that they have gone on.
        """
        self._sink = sink
        data = b"".join(self._pieces)
        self._pieces.clear()
        if data or self.complete:
            sink(data, self.complete)

    def taken(self, count: int) -> None:
        """Say that ``count`` bytes given to a sink have gone on. Consumers that receive need not."""
        self._waiting_bytes -= count
        self.taken_at = trio.current_time()
        if self._producer and self._waiting_bytes < WINDOW:
            self._producer.unpark_all()
        if not self.closed:
            self._on_taken(count)

    def close(self) -> None:
        """Want no more, and drop what waits. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._pieces.clear()
        self._producer.unpark_all()
        if self._on_close is not None and not self.complete:
            self._on_close()
