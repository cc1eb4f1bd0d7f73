"""The worker's end of a session: announces models, hears calls, answers them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeAlias

from trio_cluster.core.answer import Usage
from trio_cluster.core.model import ModelInfo
from trio_cluster.errors import ApiError

from .errors import ProtocolError
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
    RegisterModel,
    Shutdown,
    UnregisterModel,
)
from .session import MAX_CALLS, CallMessage, CallRecord, Session
from .state import Role, State

__all__ = ["WorkerEvent", "WorkerSession"]

#: What :meth:`WorkerSession.receive` tells.
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
    """The worker's end. See :class:`Session` for what both ends have, and ``state.py`` for the life of a
    call.

    Each call begins with a ``ForwardRequest`` event; ``Data`` events bring its body. The local side answers
    with :meth:`respond`, :meth:`send` and then exactly one :meth:`done` or :meth:`fail`, or with :meth:`fail`
    alone. It owes that end also after a ``Cancel`` event, once its work has really stopped; the master waits
    for it. Nothing is told about a call after its ``Cancel``, nor after its end.
    """

    _role: ClassVar[Role] = Role.WORKER

    def register(self, model: ModelInfo) -> None:
        """Announce a model. The answer is a ``ModelRegistered`` or ``ModelRejected`` event.

        Raises:
            ValueError: something about it cannot be sent, for instance an extra field; the message names it.
        """
        self._post(RegisterModel.of(model))

    def unregister(self, name: str) -> None:
        """Take a model back. Calls for it that are open, or on their way, are not touched."""
        self._post(UnregisterModel(name))

    def respond(
        self, call: int, status: int, content_type: str, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Begin the answer.

        Dropped if the call is being cancelled.

        Raises:
            ValueError: a value that no HTTP response can have; the call can still fail.
            RuntimeError: the answer has begun or ended before.
        """
        if self._unwanted(call):
            return
        following = self._state_after_sending(call, ForwardResponse)
        self._outbox.post(ForwardResponse(call, status, content_type, tuple(headers)))
        self._calls[call].state = following

    def send(self, call: int, data: bytes | memoryview) -> None:
        """Queue bytes of the answer, of any number; they are kept as they are until they have been sent.

        What is given at once and has at most ``PIECE`` bytes arrives in one ``Data``, perhaps with its
        neighbours. Dropped if the call is being cancelled; such bytes never appear in a ``Batch.sent``.

        Args:
            call: as in the ``ForwardRequest``.
            data: bytes, or a memoryview of bytes; must not change afterwards. Empty, it is a sign
                of life of this call, which is sent unless bytes of it wait already.

        Raises:
            RuntimeError: the answer has not begun, or has ended.
        """
        record = self._calls.get(call)
        # In this state, which it does not change, it is said more often than everything else together.
        if record is None or record.state is not State.ANSWERING or self.close_reason is not None:
            if self._unwanted(call):
                return
            self._calls[call].state = self._state_after_sending(call, Data)
        self._outbox.push(call, data)

    def done(self, call: int, usage: Usage | None = None) -> None:
        """End the answer: it is complete, and the work for it has stopped. What is queued is sent before that.

        Args:
            call: as in the ``ForwardRequest``.
            usage: the tokens of the answer; ``None`` if nothing was reported.

        Raises:
            RuntimeError: the answer has not begun (and the call is not being cancelled), or it has ended.
        """
        self._end(call, Done.of(call, usage))

    def fail(self, call: int, error: ApiError, *, retryable: bool = False, timed_out: bool = False) -> None:
        """End the answer with an error; the work has stopped. What is queued is sent before that.

        Args:
            call: as in the ``ForwardRequest``.
            error: can always be sent: what is too long is truncated.
            retryable: this node is at fault, and not the request: the master may ask another replica.
            timed_out: a deadline of the request passed.

        Raises:
            RuntimeError: the answer has ended.
        """
        self._end(call, Failed.of(call, error, retryable=retryable, timed_out=timed_out))

    def _end(self, call: int, message: Done | Failed) -> None:
        if self.close_reason is not None:
            self._calls.pop(call, None)
            return
        self._state_after_sending(call, type(message))
        del self._calls[call]
        self._outbox.finish(call, message)

    def _unwanted(self, call: int) -> bool:
        """Whether nobody would hear what is said of ``call``."""
        return self.close_reason is not None or self.state(call) is State.CANCELLING

    def _receive_for_call(self, message: CallMessage, following: State, events: list[Any]) -> None:
        call = message.call
        if isinstance(message, ForwardRequest):
            # Counted in streams: a call that has ended here is still the master's until all of it has been
            # sent.
            if self._outbox.streams >= MAX_CALLS:
                raise ProtocolError(f"more than {MAX_CALLS} open calls")
            self._highest = call
            self._calls[call] = CallRecord(following, missing=message.size)
            self._outbox.open(call)
            events.append(message)
        elif isinstance(message, Grant):
            self._outbox.credit(call, message.credit)
        elif following is State.ENDED:
            if isinstance(message, Cancel):
                self._outbox.cut(call)
        else:
            record = self._calls[call]
            if isinstance(message, Data):
                self._receive_body(record, message)
                if not record.fits(len(message.data), last=message.last):
                    raise ProtocolError(f"call {call}: the body has not the size that was announced")
                if record.missing > 0:
                    record.missing -= len(message.data)
            elif isinstance(message, Cancel):
                self._outbox.cut(call)
            record.state = following
            events.append(message)
