"""A call: one attempt to answer a request, between the backend that produces the answer and the code that consumes it.

Theory of operation
===================

Everything that can answer is a backend (``routing/backend.py``); opening a request there returns a :class:`Call`. A
call has two sides.

*The producer's side* belongs to the backend. It puts a ``Head``, then the pieces of the body into :attr:`Call.body`,
then ``Done`` or ``Failed``. All of that is synchronous; the channel applies the backpressure (see ``channel.py``).

*The consumer's side* belongs to the code that wants the answer: the gateway, or a worker's connection to its master. It
pulls events with :meth:`Call.receive` and :meth:`Call.receive_nowait`, or has them pushed into functions with
:meth:`Call.redirect`. A call may change from the first to the second. A worker's connection has them pushed, because
waking a task costs more than everything else that is done for a token.

The grammar of every answer is ``Head Data* (Done | Failed)``, or ``Failed`` alone. Putting an event that does not fit
is a bug of the producer, and raises ``RuntimeError``.

Opening and cancelling contain no ``await``, so there is no instant at which a cancellation can lose a call.
:meth:`Call.cancel` ends the *answer* at once (the consumer receives ``Failed``) and asks the producer to stop. The
*work* ends later, when the producer calls :meth:`Call.release`; a slot is freed by that, never by the cancellation.

A consumer that has the whole answer does not cancel the call: many clients close their connection at the last event of
a stream, while the producer is still about to end. :meth:`Call.satisfy` asks the producer to stop in the same way, and
ends the answer with ``Done``. What the producer puts after that can only add the usage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Literal, Protocol, TypeAlias

import trio

from ..errors import CallCancelled
from . import clock
from .answer import Data, Done, Event, Failed, Head
from .channel import ByteChannel
from .clock import NEVER
from .model_state import ModelWait
from .request import Request
from .story import NOTES_MAX, AttemptFacts, WorkerTimes

__all__ = ["Call", "Phase", "Tracker"]

logger = logging.getLogger("trio_cluster.calls")

_FIRST_SERVER_ERROR: Final = 500

#: How far a call is: it waits for the request's body; for a slot; for the first output; its answer has begun; its
#: answer has ended, and the work has not stopped yet.
Phase: TypeAlias = Literal["uploading", "queued", "waiting", "streaming", "stopping"]


class Listening(Protocol):
    """Who is told of the steps that a call itself takes; see ``observer.py``."""

    queued: tuple[Callable[..., None], ...]
    overdue: tuple[Callable[..., None], ...]
    first_byte: tuple[Callable[..., None], ...]


class Tracker(Protocol):
    """Who follows a call to learn from it."""

    def first_byte(self) -> None:
        """The head was put. Synchronous; must not raise."""


def _nothing(_: Any) -> None:
    pass


class Call:
    """One attempt to answer a request. See the top of this module.

    Args:
        request: the request that is answered.
        served_by: the name of the backend that answers.
        forwarded: the backend is on another node, and the request was handed to the link to it.
        on_cancel: called once with the reason when the consumer cancels the call before its answer has ended, or is
            satisfied before that. Synchronous; must not raise.
        on_consumed: called with the number of bytes of the body that the consumer has taken since the last time.
            Synchronous; must not raise.

    Attributes:
        request, served_by, forwarded: as given.
        observers: called at each step of the call; set by the router when the call is open.
        tracker: follows the call for a policy that learns from its calls; ``None``: none does.
        body: the pieces of the answer's body. ``body.delivered`` is how many bytes the consumer has taken.
        begun: the head was put, so that an error can no longer become a status.
        status: of the head; 0 before.
        end: the event that ended the answer; ``None`` before.
        retry_after: of a head with a status of 500 or more: when its server wants to be asked again, as it said it.
        overdue: it was cancelled by :meth:`expire`.
        released: the work has stopped.
        satisfied: the consumer had the whole answer before the producer ended it.
        cancelled: the reason of the cancellation; ``None`` if there was none.
        cancelled_by: the operator who has cancelled it; empty if none has.
        model_wait: what the call waits for, while its model is not running; otherwise ``None``.
        ready_since: the trio time at which that wait was over; 0 if there was none.
        queued: the call waits for a slot, as far as this node knows.
        hedged: it is one of two attempts at a request, neither of which is retried.
        superseded: it is one of two attempts at a request, and not the one that has answered.
        why: the reason of the policy that has chosen its replica.
        opened_at, begun_at, cancelled_at, ended_at, released_at: when it was opened, its head was put, it was
            cancelled, its answer ended, and its work stopped. These and the following are times of ``core/clock.py``,
            for display only; ``NEVER``: it has not.
        started_at: when the handler began; set by the pool that runs it.
        queued_at, queued_for, queued_for_model: since when it waits for a slot or did so first, and for how many
            seconds it has waited for one of the process, and one of the model.
        cold_since, cold_for: since when it waits for its model to run, or did so last; and for how many seconds in all.
        worker_times: what the worker that has answered it has measured; empty if none has.
        notes: what else has happened to it, with the times.
        facts: its part of the story of its request, which is completed when the work has stopped; ``None``: the story
            is not recorded, or not yet.
    """

    __slots__ = (
        "_end_taken",
        "_head",
        "_on_cancel",
        "_on_release",
        "_reported",
        "_sink",
        "begun",
        "begun_at",
        "body",
        "cancelled",
        "cancelled_at",
        "cancelled_by",
        "cold_for",
        "cold_since",
        "end",
        "ended_at",
        "facts",
        "forwarded",
        "hedged",
        "model_wait",
        "notes",
        "observers",
        "opened_at",
        "overdue",
        "queued",
        "queued_at",
        "queued_for",
        "queued_for_model",
        "ready_since",
        "released",
        "released_at",
        "request",
        "retry_after",
        "satisfied",
        "served_by",
        "started_at",
        "status",
        "superseded",
        "tracker",
        "why",
        "worker_times",
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
        self.observers: Listening | None = None
        self.tracker: Tracker | None = None
        self.body = ByteChannel(on_consumed=on_consumed, is_open=False, signs_of_life=True)
        self._on_cancel = on_cancel
        self._on_release: list[Callable[[], None]] = []
        # The head, if it was put and not received yet.
        self._head: Head | None = None
        self._end_taken = False
        self._sink: Callable[[Event], None] | None = None
        self._reported = 0
        self.begun = False
        self.status = 0
        self.retry_after = ""
        self.overdue = False
        self.end: Done | Failed | None = None
        self.released = False
        self.satisfied = False
        self.cancelled: str | None = None
        self.cancelled_by = ""
        self.queued = False
        self.model_wait: ModelWait | None = None
        self.ready_since = 0.0
        self.hedged = False
        self.superseded = False
        self.why = ""
        self.opened_at = clock.now()
        self.begun_at = self.cancelled_at = self.ended_at = self.released_at = self.started_at = NEVER
        self.queued_at = self.cold_since = NEVER
        self.queued_for = self.queued_for_model = self.cold_for = 0.0
        self.worker_times: WorkerTimes | None = None
        self.notes: list[tuple[float, str]] | None = None
        self.facts: AttemptFacts | None = None

    # The consumer's side

    async def receive(self) -> Event:
        """Return the next event, and wait for it if necessary. A checkpoint.

        A cancelled ``receive`` loses no event. It does not cancel the call; the caller decides whether to.

        Raises:
            trio.EndOfChannel: ``Done`` or ``Failed`` has been received already.
        """
        if self._head is not None or self.body.pieces or self.end is not None:
            await trio.lowlevel.checkpoint()
        while (event := self._next()) is None:
            if self._end_taken:
                raise trio.EndOfChannel
            await self.body.reader.park()
        return event

    def receive_nowait(self) -> Event:
        """Return the next event if there is one. Synchronous.

        Raises:
            trio.WouldBlock: there is none yet.
            trio.EndOfChannel: ``Done`` or ``Failed`` has been received already.
        """
        event = self._next()
        if event is None:
            raise trio.EndOfChannel if self._end_taken else trio.WouldBlock
        return event

    def redirect(
        self, sink: Callable[[Event], None], piece_sink: Callable[[bytes | memoryview, bool], bool]
    ) -> None:
        """Pass the waiting events and all further ones to functions. Synchronous.

        Both functions are called in the task that puts an event. They must not wait and must not raise.

        Args:
            sink: called with the head and with the end of the answer.
            piece_sink: called with the pieces of the body; see :meth:`ByteChannel.redirect`.
        """
        self._sink = sink
        if self._head is not None:
            head, self._head = self._head, None
            sink(head)
        self.body.redirect(piece_sink)
        if self.end is not None and not self._end_taken:
            self._pass_end(self.end)

    def cancel(self, reason: str, *, final: bool = False, operator: str = "") -> None:
        """Cancel the call. Synchronous, idempotent, without effect after the end; safe in ``finally``.

        Events that were not received are dropped, the next event is ``Failed``, and the producer is asked to stop.

        Args:
            reason: who cancelled the call and why; for logs, and for the client if it is still connected.
            final: the client should not repeat the request.
            operator: the name of the operator who wants that, for the story of the request.
        """
        if self.ended:
            return
        self.cancelled = reason
        self.cancelled_by = operator
        self.cancelled_at = clock.now()
        self._head = None
        self.body.close()
        self._finish(Failed(CallCancelled(reason, final=final)))
        self._on_cancel(reason)

    def satisfy(self, reason: str) -> None:
        """End the answer as complete, since its consumer has all of it and left. Synchronous, idempotent.

        Without effect after the end. Events that were not received are dropped, the next event is ``Done``, and the
        producer is asked to stop. An answer that has not begun is cancelled.

        Args:
            reason: why the consumer needs no more; for logs.
        """
        if self.ended:
            return
        if not self.begun:
            self.cancel(reason)
            return
        self.satisfied = True
        self._head = None
        self.body.close()
        self._finish(Done())
        self._on_cancel(reason)

    def expire(self, reason: str) -> None:
        """Cancel the call, since one of its time limits has passed, and its node has not noticed. Synchronous."""
        if self.ended:
            return
        self.overdue = True
        self.cancel(reason)
        if self.observers is not None:
            for listener in self.observers.overdue:
                listener(self)

    # The producer's side

    def put(self, event: Event) -> None:
        """Add an event to the answer. Synchronous.

        Events after a cancellation are dropped, since the cancellation has ended the answer. After :meth:`satisfy`, a
        ``Done`` with usage takes the place of the one that has ended it.

        Raises:
            RuntimeError: the event does not fit the grammar.
        """
        if isinstance(event, Data):
            self.body.put(event.data)
            return
        if self.cancelled is not None:
            return
        if self.satisfied:
            if isinstance(event, Done) and event.usage is not None:
                self.end = event
            return
        if self.end is not None:
            raise RuntimeError(f"{event!r} after the end of the answer")
        if isinstance(event, Head):
            if self.begun:
                raise RuntimeError("a second Head")
            self.begun = True
            self.begun_at = clock.now()
            if self.model_wait is not None:
                self.set_model_wait(None)
            self.status = event.status
            if event.status >= _FIRST_SERVER_ERROR:
                self.retry_after = next(
                    (value for name, value in event.headers if name.lower() == "retry-after"), ""
                )
            self.body.open()
            if self._sink is not None:
                self._sink(event)
            else:
                self._head = event
                self.body.wake_reader()
            if self.tracker is not None:
                self.tracker.first_byte()
            if self.observers is not None:
                for listener in self.observers.first_byte:
                    listener(self)
        else:
            if isinstance(event, Done) and not self.begun:
                raise RuntimeError("Done before Head")
            self._finish(event)

    def report(self, *, queued: bool, produced: int) -> None:
        """Record what a worker reported about the call. Synchronous.

        Args:
            queued: it waits for a slot there.
            produced: how many bytes of the answer there are on the worker.
        """
        self._reported = produced
        if queued is not self.queued:
            self.set_queued(queued)

    def set_queued(self, queued: bool) -> None:
        """Record whether the call waits for a slot. Synchronous."""
        self.queued = queued
        if queued and self.observers is not None:
            for listener in self.observers.queued:
                listener(self)

    def set_model_wait(self, wait: ModelWait | None) -> None:
        """Record what the call waits for before its model runs; ``None``: the model runs. Synchronous.

        Without effect once the answer has begun or ended: a producer may report a wait before it has noticed that.
        """
        if wait is not None and (self.begun or self.ended):
            return
        was, self.model_wait = self.model_wait, wait
        if was is None and wait is not None:
            self.cold_since = clock.now()
        if wait is None and was is not None:
            self.ready_since = trio.current_time()
            self.cold_for += clock.now() - self.cold_since

    def note(self, text: str) -> None:
        """Record something that has happened to the call, for its story. Synchronous."""
        if self.notes is None:
            self.notes = []
        if len(self.notes) < NOTES_MAX:
            self.notes.append((clock.now(), text))

    def release(self) -> None:
        """Report that the work has really stopped and holds no slot any more. Synchronous, idempotent.

        If the producer has not ended the answer before, the answer ends with ``Failed``.
        """
        if self.released:
            return
        if self.end is None:
            self._finish(Failed(CallCancelled("the work ended without an answer")))
        self.released = True
        self.released_at = clock.now()
        if (facts := self.facts) is not None:
            # The request had ended before. What is known only now is what its work has done until its end.
            facts.queued_for, facts.queued_for_model = self.queued_for, self.queued_for_model
            facts.held_back, facts.cold_for = self.body.held_back, self.cold_for
            facts.released_at, facts.times = self.released_at, self.worker_times or {}
            if isinstance(self.end, Done):
                facts.usage, facts.finish = self.end.usage, self.end.finish
            else:
                facts.usage = None
        callbacks, self._on_release = self._on_release, []
        for callback in callbacks:
            # Each of them frees something: one that fails must not keep the others from it, nor end the task.
            try:
                callback()
            except Exception:
                fields = {"model": self.request.model, "request_id": self.request.request_id}
                logger.exception("the end of a call failed", extra={"fields": fields})

    def on_release(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the work has really stopped; at once if it has. Synchronous; it must not raise."""
        if self.released:
            callback()
        else:
            self._on_release.append(callback)

    @property
    def ended(self) -> bool:
        """Whether the answer has ended; the work may still be stopping."""
        return self.end is not None

    @property
    def phase(self) -> Phase:
        """How far the call is; for display only."""
        if self.ended:
            return "stopping"
        if self.begun:
            return "streaming"
        if self.request.upload is not None and not self.request.upload.complete:
            return "uploading"
        return "queued" if self.queued else "waiting"

    @property
    def produced(self) -> int:
        """How many bytes of the answer its node has produced, as far as this node knows. For display only."""
        return max(self._reported, self.body.delivered + self.body.waiting_bytes)

    def _finish(self, event: Done | Failed) -> None:
        self.end = event
        self.ended_at = clock.now()
        if self.model_wait is not None:
            self.set_model_wait(None)
        if self.request.upload is not None:
            self.request.upload.close()
        self.body.finish()
        if self._sink is not None:
            self._pass_end(event)

    def _pass_end(self, event: Done | Failed) -> None:
        self._end_taken = True
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
        if self.end is None or self._end_taken:
            return None
        self._end_taken = True
        return self.end
