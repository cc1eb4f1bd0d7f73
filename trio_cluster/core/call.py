"""What flows through a node: a request, the events of its answer, and the call that joins the two.

Theory of operation
===================

Everything that can answer is a :class:`Backend`; asking it gives a :class:`Call`. A call has two faces.

*The producer's face* belongs to the backend. :meth:`Call.put` is synchronous: a link's reader can hand over what
just came in without waiting for anybody. :meth:`Call.put_data` does the same for a piece of the body, which is what
nearly everything is that is put, and makes no event of it where none is needed. A producer that can be slowed down
(a local handler) awaits :meth:`Call.wait_room` between its puts; one that cannot (a link) relies on credit, which it
learns to extend through ``on_taken``.

*The consumer's face* belongs to whoever wants the answer. There are two ways to consume, and a call may change
from the first to the second: pull, with :meth:`Call.receive` and :meth:`Call.receive_nowait`; or push, with
:meth:`Call.redirect`, after which every piece of the body and every other event goes straight into a function. Push
exists because waking a task costs more than everything else that happens to a token.

The grammar of every answer is ``Head Data* (Done | Failed)``, or ``Failed`` alone. Whoever puts an event that does
not fit has a bug, and gets ``RuntimeError``.

Opening and cancelling have no await in them, so there is no instant at which a cancellation can lose a call.
:meth:`Call.cancel` ends the *answer* at once (the consumer sees ``Failed``) and asks the producer to stop. The
*work* ends later, when the producer says so with :meth:`Call.release`; slots are freed by that, never by the asking.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeAlias

import attrs
import trio

from ..errors import ApiError, CallCancelled
from .model import Kind
from .upload import WINDOW, Upload

__all__ = ["WINDOW", "Backend", "Call", "Data", "Done", "Event", "Failed", "Head", "Phase", "Request"]


@attrs.frozen(eq=False)
class Request:
    """One request for one model, ready to be answered here or anywhere else.

    ``body`` is what the client sent, byte for byte, and ``content_type`` says how to read it; nothing between the
    client and the handler rewrites them. A body that is still coming is ``upload``, and ``body`` is empty then.
    ``parsed`` is a cache of the reading, which does not travel.
    """

    endpoint: str
    """The name of the route in the table of endpoints, for instance ``chat.completions``; of a route that is not in
    the table, its path."""
    kind: Kind
    """The kind of model that can answer."""
    model: str
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = attrs.field(factory=dict)
    """The client's headers that a handler may want, names in lower case."""
    request_id: str = ""
    timeout: float = math.inf
    """The longest silence in seconds: to the first output, and between outputs."""
    budget: float = math.inf
    """Seconds from opening until the whole answer must be there."""
    parsed: Any = None
    client: str = ""
    """The address it came from, for people; it does not travel."""
    upload: Upload | None = None
    """The body, if it was not complete when the request was made."""

    @property
    def size(self) -> int:
        """How many bytes the body has or will have; -1 if that is not known."""
        return len(self.body) if self.upload is None else self.upload.size

    @property
    def replayable(self) -> bool:
        """Whether it can be asked once more; a body that has passed through is gone."""
        return self.upload is None


@attrs.frozen
class Head:
    """The beginning of an answer: everything is well so far, and this is what it will be."""

    status: int = 200
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@attrs.frozen
class Data:
    """A piece of the answer's body, ready to be sent to the client as it is."""

    data: bytes | memoryview


@attrs.frozen
class Done:
    """The answer is complete."""


@attrs.frozen
class Failed:
    """There will be no more, and the answer is not complete."""

    error: ApiError


Event: TypeAlias = Head | Data | Done | Failed

#: For the body; for a slot; for the first output; the answer has begun; it is over, and the work is not.
Phase: TypeAlias = Literal["uploading", "queued", "waiting", "streaming", "stopping"]


class Backend(Protocol):
    """Whatever can answer requests: a handler in this process, or a worker far away."""

    @property
    def name(self) -> str:
        """The node that does the work: a worker's id, or ``"local"``."""
        ...

    @property
    def load(self) -> float:
        """How busy it is: calls it has, as a share of those it can run at once. May exceed 1."""
        ...

    @property
    def available(self) -> bool:
        """Whether it takes new calls; one that drains does not."""
        ...

    def open(self, request: Request) -> Call:
        """Begin to answer ``request``. Synchronous: on return the call exists and can be cancelled.

        Raises:
            ApiError: it cannot be begun here; nothing was started.
        """
        ...


def _nothing(_: Any) -> None:
    pass


class Call:
    """One answer in the making. See the top of this module for the theory.

    Args:
        request: what is being answered.
        on_cancel: called once with the reason when the consumer gives the call up before it ended.
        on_taken: called with the number of body bytes that the consumer has taken since the last time.

    Attributes:
        request: as given.
        begun: the head has been put; an error can no longer become a status.
        end: the event that ended the answer, ``None`` before.
        served_by: the name of the backend that answers; set by the registry.
        delivered: how many body bytes the consumer has taken. A call may be opened again elsewhere while it has
            not taken any and not seen the head.
        cancelled: the reason it was cancelled with, or ``None``.
        cancelled_at: when that was, on the monotonic clock. For people, as ``opened_at``.
        opened_at: when it was opened, on the monotonic clock. For people: nothing is decided by it.
        queued: it waits for a slot; set by a backend that has slots.
        window: bytes that may wait before the producer is held up. Somebody who wants to see it held up, such as a
            test, makes it smaller when the call has just been opened.
        reported: how many bytes of its answer there are on the node that makes it, as that has told last.
    """

    __slots__ = (
        "_events",
        "_held",
        "_on_cancel",
        "_on_release",
        "_on_taken",
        "_piece_sink",
        "_readers",
        "_sink",
        "_waiting_bytes",
        "_writers",
        "begun",
        "cancelled",
        "cancelled_at",
        "delivered",
        "end",
        "opened_at",
        "queued",
        "released",
        "reported",
        "request",
        "served_by",
        "window",
    )

    def __init__(
        self,
        request: Request,
        *,
        on_cancel: Callable[[str], None] = _nothing,
        on_taken: Callable[[int], None] = _nothing,
    ) -> None:
        self.request = request
        self._on_cancel = on_cancel
        self._on_taken = on_taken
        self._on_release: list[Callable[[], None]] = []
        self._events: deque[Event] = deque()
        self._waiting_bytes = 0
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()
        # Somebody is parked there.
        self._held = False
        self._sink: Callable[[Event], None] | None = None
        self._piece_sink: Callable[[bytes | memoryview], bool] | None = None
        self.begun = False
        self.end: Done | Failed | None = None
        self.released = False
        self.served_by = ""
        self.delivered = 0
        self.cancelled: str | None = None
        self.cancelled_at = 0.0
        self.opened_at = time.monotonic()
        self.queued = False
        self.window = WINDOW
        self.reported = 0

    # The consumer's face

    async def receive(self) -> Event:
        """Return the next event, waiting for it if need be.

        After ``Done`` or ``Failed`` there is nothing more to wait for; asking again raises ``trio.EndOfChannel``.
        A cancelled ``receive`` loses nothing. It does not cancel the call: that is for the caller to decide.
        """
        if self._events or self.ended:
            await trio.lowlevel.checkpoint()
        while not self._events:
            if self.ended:
                raise trio.EndOfChannel
            await self._readers.park()
        return self._pop()

    def receive_nowait(self) -> Event:
        """Return the next event if there is one.

        Raises:
            trio.WouldBlock: there is none yet.
            trio.EndOfChannel: there will be none.
        """
        if not self._events:
            raise trio.EndOfChannel if self.ended else trio.WouldBlock
        return self._pop()

    def redirect(
        self, sink: Callable[[Event], None], piece_sink: Callable[[bytes | memoryview], bool]
    ) -> None:
        """Give all further events to functions as they are put, and first those that are waiting.

        Both are called synchronously, in whatever task puts, and must not raise.

        Args:
            sink: is given what begins and ends the answer.
            piece_sink: is given the bytes of each ``Data``. It returns whether they have gone on; if not, they count as
                waiting until :meth:`taken` says that they have.
        """
        self._sink = sink
        self._piece_sink = piece_sink
        while self._events:
            event = self._events.popleft()
            if not isinstance(event, Data):
                sink(event)
            elif piece_sink(event.data):
                self.taken(len(event.data))

    def taken(self, count: int) -> None:
        """Say that ``count`` bytes that wait have gone on. Consumers that receive need not."""
        if self.cancelled is not None:
            return
        self.delivered += count
        self._waiting_bytes -= count
        if self._held and self._waiting_bytes < self.window:
            self._held = False
            self._writers.unpark_all()
        self._on_taken(count)

    def cancel(self, reason: str, *, final: bool = False) -> None:
        """Give the call up. Idempotent; harmless after the end; safe in ``finally``.

        What was waiting is dropped, the next event is ``Failed``, and the producer is asked to stop.

        Args:
            reason: who gave it up and why, for logs and for the client if that is still there.
            final: the client should not try again.
        """
        if self.ended:
            return
        self.cancelled = reason
        self.cancelled_at = time.monotonic()
        self._waiting_bytes = 0
        self._events.clear()
        self._finish(Failed(CallCancelled(reason, final=final)))
        self._on_cancel(reason)

    # The producer's face

    def put(self, event: Event) -> None:
        """Add an event to the answer. Events after a cancel vanish: the consumer has already seen the end.

        Raises:
            RuntimeError: the event does not fit the grammar.
        """
        if isinstance(event, Data):
            self.put_data(event.data)
            return
        if self.cancelled is not None:
            return
        if self.end is not None:
            raise RuntimeError(f"{event!r} after the end of the answer")
        if isinstance(event, Head):
            if self.begun:
                raise RuntimeError("a second Head")
            self.begun = True
        else:
            if isinstance(event, Done) and not self.begun:
                raise RuntimeError("Done before Head")
            self._finish(event)
            return
        self._hand_over(event)

    def put_data(self, data: bytes | memoryview) -> None:
        """Add ``Data(data)`` to the answer, as :meth:`put` does."""
        if self.cancelled is not None:
            return
        if self.end is not None or not self.begun:
            raise RuntimeError(f"Data {'before Head' if self.end is None else 'after the end of the answer'}")
        size = len(data)
        if self._piece_sink is None:
            self._waiting_bytes += size
            self._hand_over(Data(data))
        elif self._piece_sink(data):
            self.delivered += size
            self._on_taken(size)
        else:
            self._waiting_bytes += size

    async def wait_room(self) -> None:
        """Wait until the consumer has taken enough of what waits, or has given up."""
        await trio.lowlevel.checkpoint()
        while self._waiting_bytes >= self.window and not self.ended:
            self._held = True
            await self._writers.park()

    def release(self) -> None:
        """Say that the work has really stopped and holds nothing any more. Idempotent.

        A producer that releases without having ended the answer has lost it; that is reported as ``Failed``.
        """
        if self.released:
            return
        if not self.ended:
            self._finish(Failed(CallCancelled("the work ended without an answer")))
        self.released = True
        for callback in self._on_release:
            callback()
        self._on_release.clear()

    def on_release(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the work has really stopped; at once if it already has."""
        if self.released:
            callback()
        else:
            self._on_release.append(callback)

    @property
    def ended(self) -> bool:
        """Whether the answer is over; the work may still be winding down."""
        return self.end is not None

    @property
    def phase(self) -> Phase:
        """How far it is, for people: what it waits for, or whether its answer has begun, or is over."""
        if self.ended:
            return "stopping"
        if self.begun:
            return "streaming"
        if self.request.upload is not None and not self.request.upload.complete:
            return "uploading"
        return "queued" if self.queued else "waiting"

    @property
    def produced(self) -> int:
        """How many body bytes there are by now, for people: on the node that makes them, as far as it is known here."""
        return max(self.reported, self.delivered + self._waiting_bytes)

    @property
    def waiting_bytes(self) -> int:
        """How many body bytes have been put and not been taken."""
        return self._waiting_bytes

    def _finish(self, event: Done | Failed) -> None:
        self.end = event
        if self.request.upload is not None:
            self.request.upload.close()
        self._hand_over(event)
        self._sink = self._piece_sink = None
        if self._readers:
            self._readers.unpark_all()
        if self._writers:
            self._writers.unpark_all()

    def _hand_over(self, event: Event) -> None:
        if self._sink is not None:
            self._sink(event)
            return
        self._events.append(event)
        if self._readers:
            self._readers.unpark()

    def _pop(self) -> Event:
        event = self._events.popleft()
        if isinstance(event, Data):
            self.taken(len(event.data))
        return event
