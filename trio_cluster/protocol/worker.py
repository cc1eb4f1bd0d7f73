"""The worker's end of a session: registers models, receives calls, and answers them."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar, TypeAlias

import attrs

from trio_cluster.core.answer import Usage
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.story import WorkerTimes
from trio_cluster.errors import ApiError, CallCancelled

from .bounds import NAMES_MAX
from .codec import decode_handshake
from .errors import ProtocolError, ResumptionRefused
from .messages import (
    Cancel,
    Data,
    Done,
    Drain,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Handshake,
    Heartbeat,
    ModelRegistered,
    ModelRejected,
    OtherMasters,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)
from .session import MAX_CALLS, CallMessage, CallRecord, Session
from .state import SESSION_TRANSITIONS, Role, SessionEvent, SessionState, State

__all__ = ["WorkerEvent", "WorkerSession"]

#: What :meth:`WorkerSession.receive` returns.
WorkerEvent: TypeAlias = (
    Handshake
    | ModelRegistered
    | ModelRejected
    | Heartbeat
    | Drain
    | Shutdown
    | ForwardRequest
    | Data
    | Cancel
)


class WorkerSession(Session[WorkerEvent]):
    """The worker's end. See :class:`Session` for what both ends have, and ``state.py`` for the states of a call.

    Each call begins with a ``ForwardRequest`` event; ``Data`` events bring its body. The local side answers with
    :meth:`respond`, :meth:`send` and then exactly one :meth:`done` or :meth:`fail`, or with :meth:`fail` alone. That
    end is due also after a ``Cancel`` event, once the work has really stopped; the master waits for it. There are no
    events of a call after its ``Cancel``, nor after its end. A call that was on its way when the link was cut, and was
    cancelled before the session was resumed, has no event at all.
    """

    _role: ClassVar[Role] = Role.WORKER
    #: Calls that were lost on their way when the link was cut, and that the master has cancelled since then.
    _not_begun: frozenset[int] = frozenset()

    def resume(self) -> None:
        """Ask the master, on a new connection, to go on with this session, which is suspended.

        The next message names it; nothing more is written before the master has answered. If it goes on, its handshake
        is returned as an event, and what it has not received is written again. If not, :meth:`receive` raises
        ``ResumptionRefused``.

        Raises:
            RuntimeError: the session is not suspended.
        """
        if self.session_state is not SessionState.SUSPENDED or self._retention is None:
            raise RuntimeError("only a suspended session can be resumed")
        self.session_state = SESSION_TRANSITIONS[self.session_state, SessionEvent.DIALLED]
        self._ready.append(self._name_session(self._retention))

    def _receive_answer(self, data: bytes, now: float, events: list[Any]) -> None:
        if self.session_state is not SessionState.RESUMING:
            raise RuntimeError("the session is suspended")
        handshake, more = decode_handshake(data)
        if not hmac.compare_digest(handshake.session, self.session_id):
            raise ResumptionRefused("the master does not know the session any more")
        if more:
            raise ProtocolError("something behind the handshake that resumes a session")
        self._on_resumed(handshake.received, now)
        # Those that have begun are stopped by their Cancel, which follows.
        self._not_begun = frozenset(call for call in handshake.cancelled if call > self._highest)
        events.append(handshake)

    def register(self, model: ModelInfo) -> None:
        """Register a model. The answer is a ``ModelRegistered`` or ``ModelRejected`` event.

        Raises:
            ValueError: a field of it cannot be sent, for instance one in ``extra_fields``; the message names it.
        """
        self._post(RegisterModel.of(model))

    def unregister(self, name: str) -> None:
        """Unregister a model. Calls for it that are open, or on their way, go on."""
        self._post(UnregisterModel(name))

    def announce_links(self, instances: Iterable[str]) -> None:
        """Tell the master which masters this worker has a link to. To be called before anything was written.

        Args:
            instances: from their handshakes; empty ones are left out.
        """
        linked = tuple(islice(filter(None, instances), NAMES_MAX))
        if linked:
            self._handshake = attrs.evolve(self._handshake, linked=linked)
            self._outbox.clear()
            self._outbox.post(self._handshake)

    def report_other_masters(self, calls: int, masters: tuple[tuple[str, str], ...]) -> None:
        """Tell the master, which knows ``OtherMasters``, what the others do here; see there."""
        self._post(OtherMasters(calls, masters))

    def respond(
        self, call: int, status: int, content_type: str, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Begin the answer.

        Dropped if the call is being cancelled.

        Raises:
            ValueError: a value that no HTTP response can have. :meth:`fail` may still be called.
            RuntimeError: the answer has already begun, or has ended.
        """
        if self._is_dropped(call):
            return
        next_state = self._state_after_sending(call, ForwardResponse)
        self._outbox.post(ForwardResponse(call, status, content_type, tuple(headers)))
        self._calls[call].state = next_state

    def send(self, call: int, data: bytes | memoryview) -> None:
        """Queue any number of bytes of the answer; they are not copied before they are sent.

        What is passed in one call and has at most ``PIECE`` bytes arrives in one ``Data``, perhaps joined with its
        neighbours. Dropped if the call is being cancelled; such bytes never appear in a ``Batch.sent``.

        Args:
            call: as in the ``ForwardRequest``.
            data: bytes, or a memoryview of bytes; must not change afterwards. Empty, it is a sign of life of this call,
                which is sent unless bytes of it are queued already.

        Raises:
            RuntimeError: the answer has not begun, or has ended.
        """
        record = self._calls.get(call)
        # The fast path: a worker sends more of these than of all other messages together, and in this state they do not
        # change the state.
        if record is None or record.state is not State.ANSWERING or self.close_reason is not None:
            if self._is_dropped(call):
                return
            self._calls[call].state = self._state_after_sending(call, Data)
        self._outbox.push(call, data)

    def done(
        self, call: int, usage: Usage | None = None, times: WorkerTimes | None = None, finish: str = ""
    ) -> None:
        """End the answer: it is complete, and the work has stopped. What is queued of it is sent first.

        Args:
            call: as in the ``ForwardRequest``.
            usage: the tokens of the answer; ``None`` if none were reported.
            times: what was measured of the call; see ``Done``.
            finish: why the choices of a text ended; see ``Done``.

        Raises:
            RuntimeError: the answer has not begun (and the call is not being cancelled), or has ended.
        """
        self._end(call, Done.of(call, usage, {} if times is None else times, finish))

    def fail(
        self,
        call: int,
        error: ApiError,
        *,
        retryable: bool = False,
        timed_out: bool = False,
        over_capacity: bool = False,
        times: WorkerTimes | None = None,
    ) -> None:
        """End the answer with an error; the work has stopped. What is queued of it is sent first.

        Args:
            call: as in the ``ForwardRequest``.
            error: can always be sent, since what is too long is truncated.
            retryable: this node is at fault and not the request, so the master may try another replica.
            timed_out: a deadline of the request has passed.
            over_capacity: this node had no room for the call, and did not begin it.
            times: what was measured of the call; see ``Done``.

        Raises:
            RuntimeError: the answer has ended.
        """
        failed = Failed.of(
            call, error, retryable=retryable, timed_out=timed_out, over_capacity=over_capacity, times=times
        )
        self._end(call, failed)

    def _end(self, call: int, message: Done | Failed) -> None:
        if self.close_reason is not None:
            self._calls.pop(call, None)
            return
        self._state_after_sending(call, type(message))
        del self._calls[call]
        self._outbox.finish(call, message)

    def _is_dropped(self, call: int) -> bool:
        """Return whether what is sent of the answer of ``call`` is dropped, since it is not wanted any more."""
        return self.close_reason is not None or self.state(call) is State.CANCELLING

    def _receive_for_call(self, message: CallMessage, next_state: State, events: list[Any]) -> None:
        call = message.call
        if isinstance(message, ForwardRequest):
            # Streams are counted, not calls: for the master, a call is open until all of its answer has been sent.
            if self._outbox.streams >= MAX_CALLS:
                raise ProtocolError(f"more than {MAX_CALLS} open calls")
            self._highest = call
            if call in self._not_begun:
                self._outbox.post(Failed.of(call, CallCancelled("cancelled while its link was cut")))
                return
            self._calls[call] = CallRecord(next_state, missing=message.size)
            self._outbox.open(call)
            events.append(message)
        elif isinstance(message, Grant):
            self._outbox.credit(call, message.credit)
        elif next_state is State.ENDED:
            if isinstance(message, Cancel):
                self._outbox.drop_body(call)
        else:
            record = self._calls[call]
            if isinstance(message, Data):
                self._receive_body(record, message)
                if not record.fits(len(message.data), last=message.last):
                    raise ProtocolError(f"call {call}: the body does not have the announced size")
                if record.missing > 0:
                    record.missing -= len(message.data)
            elif isinstance(message, Cancel):
                self._outbox.drop_body(call)
            record.state = next_state
            events.append(message)
