"""A call: one answer in the making, between the backend that makes it and whoever wants it.

Theory of operation
===================

Everything that can answer is a backend (``routing/backend.py``); opening a request there gives a :class:`Call`. A call has
two sides.

*The producer's side* belongs to the backend. It puts a ``Head``, then the pieces of the body into :attr:`Call.body`, then
``Done`` or ``Failed``. All of that is synchronous; backpressure is the channel's (see ``channel.py``).

*The consumer's side* belongs to whoever wants the answer. It pulls events with :meth:`Call.receive` and
:meth:`Call.receive_nowait`, or has everything pushed into functions with :meth:`Call.redirect`. A call may change from the
first to the second. A worker's link pushes, because waking a task costs more than everything else that happens to a token.

The grammar of every answer is ``Head Data* (Done | Failed)``, or ``Failed`` alone. A producer that puts an event which
does not fit has a bug, and gets ``RuntimeError``.

Opening and cancelling have no await in them, so there is no instant at which a cancellation can lose a call.
:meth:`Call.cancel` ends the *answer* at once (the consumer sees ``Failed``) and asks the producer to stop. The *work* ends
later, when the producer says so with :meth:`Call.release`; a slot is freed by that, never by the cancellation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import trio

from ..errors import CallCancelled
from .answer import Data, Done, Event, Failed, Head
from .channel import ByteChannel
from .observer import Observers
from .request import Request

__all__ = ["Call", "Phase"]

logger = logging.getLogger("trio_cluster.calls")

#: For the body; for a slot; for the first output; the answer has begun; it is over, and the work is not.
Phase: TypeAlias = Literal["uploading", "queued", "waiting", "streaming", "stopping"]


def _nothing(_: Any) -> None:
    pass


class Call:
    """One answer in the making. See the top of this module for the theory.

    Args:
        request: what is being answered.
        served_by: the name of the backend that answers.
        forwarded: the backend is on another node, and the request was handed to the link to it.
        on_cancel: called once with the reason when the consumer cancels the call before it ended.
        on_consumed: called with the number of body bytes that the consumer has taken since the last time.

    Attributes:
        request, served_by, forwarded: as given.
        observers: are told of the steps of the call; set by the router when the call is open.
        body: the pieces of the answer's body. ``body.delivered`` tells how much of the answer the consumer has taken.
        begun: the head was put; an error can no longer become a status.
        end: the event that ended the answer, ``None`` before.
        released: the work has stopped.
        cancelled: the reason it was cancelled with, or ``None``.
        cancelled_at: when that was, on the monotonic clock. For people, as ``opened_at``.
        opened_at: when it was opened, on the monotonic clock. For people: nothing is decided by it.
        queued: it waits for a slot, as far as this node knows.
    """

    __slots__ = (
        "_head",
        "_on_cancel",
        "_on_release",
        "_reported",
        "_sink",
        "_told_end",
        "begun",
        "body",
        "cancelled",
        "cancelled_at",
        "end",
        "forwarded",
        "observers",
        "opened_at",
        "queued",
        "released",
        "request",
        "served_by",
    )

    def __init__(
        self,
        request: Request,
        *,
        served_by: str = "",
        forwarded: bool = False,
        on_cancel: Callable[[str], None] = _nothing,
        on_consumed: Callable[[int], None] = _nothing,
    ) -> None:
        self.request = request
        self.served_by = served_by
        self.forwarded = forwarded
        self.observers: Observers | None = None
        self.body = ByteChannel(on_consumed=on_consumed, is_open=False, signs_of_life=True)
        self._on_cancel = on_cancel
        self._on_release: list[Callable[[], None]] = []
        # Put, and not received.
        self._head: Head | None = None
        self._told_end = False
        self._sink: Callable[[Event], None] | None = None
        self._reported = 0
        self.begun = False
        self.end: Done | Failed | None = None
        self.released = False
        self.cancelled: str | None = None
        self.cancelled_at = 0.0
        self.opened_at = time.monotonic()
        self.queued = False

    # The consumer's side

    async def receive(self) -> Event:
        """Return the next event, waiting for it if need be. A checkpoint.

        A cancelled ``receive`` loses nothing. It does not cancel the call: that is for the caller to decide.

        Raises:
            trio.EndOfChannel: ``Done`` or ``Failed`` was received before.
        """
        if self._head is not None or self.body.pieces or self.end is not None:
            await trio.lowlevel.checkpoint()
        while (event := self._next()) is None:
            if self._told_end:
                raise trio.EndOfChannel
            await self.body.reader.park()
        return event

    def receive_nowait(self) -> Event:
        """Return the next event if there is one.

        Raises:
            trio.WouldBlock: there is none yet.
            trio.EndOfChannel: there will be none.
        """
        event = self._next()
        if event is None:
            raise trio.EndOfChannel if self._told_end else trio.WouldBlock
        return event

    def redirect(
        self, sink: Callable[[Event], None], piece_sink: Callable[[bytes | memoryview, bool], bool]
    ) -> None:
        """Give all further events to functions as they are put, and first those that wait.

        Both are called synchronously, in the task that puts, and must not raise.

        Args:
            sink: is given what begins and ends the answer.
            piece_sink: is given the pieces of the body; see :meth:`ByteChannel.redirect`.
        """
        self._sink = sink
        if self._head is not None:
            head, self._head = self._head, None
            sink(head)
        self.body.redirect(piece_sink)
        if self.end is not None and not self._told_end:
            self._tell_end(self.end)

    def cancel(self, reason: str, *, final: bool = False) -> None:
        """Cancel the call. Synchronous, idempotent, harmless after the end, safe in ``finally``.

        What waits is dropped, the next event is ``Failed``, and the producer is asked to stop.

        Args:
            reason: who cancelled it and why, for logs and for the client if that is still there.
            final: the client should not try again.
        """
        if self.ended:
            return
        self.cancelled = reason
        self.cancelled_at = time.monotonic()
        self._head = None
        self.body.close()
        self._finish(Failed(CallCancelled(reason, final=final)))
        self._on_cancel(reason)

    # The producer's side

    def put(self, event: Event) -> None:
        """Add an event to the answer. Events after a cancellation are dropped: the consumer has seen the end.

        Raises:
            RuntimeError: the event does not fit the grammar.
        """
        if isinstance(event, Data):
            self.body.put(event.data)
            return
        if self.cancelled is not None:
            return
        if self.end is not None:
            raise RuntimeError(f"{event!r} after the end of the answer")
        if isinstance(event, Head):
            if self.begun:
                raise RuntimeError("a second Head")
            self.begun = True
            self.body.open()
            if self._sink is not None:
                self._sink(event)
            else:
                self._head = event
                self.body.wake_reader()
            if self.observers is not None:
                for listener in self.observers.first_byte:
                    listener(self)
        else:
            if isinstance(event, Done) and not self.begun:
                raise RuntimeError("Done before Head")
            self._finish(event)

    def report(self, *, queued: bool, produced: int) -> None:
        """Take note of what the node that does the work says of the call: whether it waits for a slot, and how many
        bytes of the answer there are.
        """
        self._reported = produced
        if queued is not self.queued:
            self.set_queued(queued)

    def set_queued(self, queued: bool) -> None:
        """Take note that the call waits for a slot, or waits no longer."""
        self.queued = queued
        if queued and self.observers is not None:
            for listener in self.observers.queued:
                listener(self)

    def release(self) -> None:
        """Say that the work has really stopped and holds nothing any more. Idempotent.

        A producer that releases without having ended the answer has lost it; that is reported as ``Failed``.
        """
        if self.released:
            return
        if self.end is None:
            self._finish(Failed(CallCancelled("the work ended without an answer")))
        self.released = True
        callbacks, self._on_release = self._on_release, []
        for callback in callbacks:
            # Each of them frees something: one that fails must not keep the others from it, nor end the task.
            try:
                callback()
            except Exception:
                fields = {"model": self.request.model, "request_id": self.request.request_id}
                logger.exception("the end of a call failed", extra={"fields": fields})

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
        """How many bytes of the answer there are on the node that makes it, as far as that is known here. For people."""
        return max(self._reported, self.body.delivered + self.body.waiting_bytes)

    def _finish(self, event: Done | Failed) -> None:
        self.end = event
        if self.request.upload is not None:
            self.request.upload.close()
        self.body.finish()
        if self._sink is not None:
            self._tell_end(event)

    def _tell_end(self, event: Done | Failed) -> None:
        self._told_end = True
        sink, self._sink = self._sink, None
        assert sink is not None
        sink(event)

    def _next(self) -> Event | None:
        """Take out the next event, if there is one."""
        if self._head is not None:
            head, self._head = self._head, None
            return head
        if self.body.pieces:
            return Data(self.body.next_piece())
        if self.end is None or self._told_end:
            return None
        self._told_end = True
        return self.end
