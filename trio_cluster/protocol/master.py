"""The master's end of a session: opens calls, sends their bodies, hears their answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

from trio_cluster.errors import InvalidRequest, Overloaded, WorkerLost

from . import bounds
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
    Message,
    ModelRegistered,
    ModelRejected,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)
from .session import MAX_BACKLOG, MAX_CALLS, CallMessage, CallRecord, Session
from .state import LastData, Role, State

__all__ = ["MasterEvent", "MasterSession"]

#: What :meth:`MasterSession.receive` tells.
MasterEvent: TypeAlias = (
    Handshake | RegisterModel | UnregisterModel | Heartbeat | Drain | ForwardResponse | Data | Done | Failed
)


class MasterSession(Session[MasterEvent]):
    """The master's end. See :class:`Session` for what both ends have, and ``state.py`` for the life of a
    call.

    For each call that :meth:`open` gave a number there is exactly one ``Done`` or ``Failed`` event, unless
    the session closes before. It means that the work has stopped, also for a call that was cancelled; between
    the ``cancel`` and that event nothing else is told about the call.
    """

    _role: ClassVar[Role] = Role.MASTER

    def open(
        self,
        *,
        endpoint: str,
        kind: str,
        model: str,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        request_id: str = "",
        timeout: float = math.inf,
        budget: float = math.inf,
        size: int = -1,
        once: bool = False,
        checked: bool = False,
        principal: str = "",
    ) -> int:
        """Open a call and return its number. The body is to follow with :meth:`send_body`, even if it is
        empty.

        Args:
            endpoint, kind, model, content_type, headers, request_id: as in ``Request``.
            timeout: the longest silence in seconds.
            budget: seconds until the whole answer must be there; less than nothing counts as nothing.
            size: bytes that the body will have; -1 if that is not known.
            once: the body cannot be sent a second time, to another worker.
            checked: the body was validated; the worker need not do so again.
            principal: the name of the key that the client showed; empty where none is required.

        Raises:
            InvalidRequest: something about the request is too large for the wire, or has no place on it.
            Overloaded: the link has as many calls, or as much to write, as it can bear.
            WorkerLost: the session is closed.
            RuntimeError: the peer's handshake has not come yet.
        """
        if self.close_reason is not None:
            raise WorkerLost("unknown" if self.peer is None else self.peer.node_id, self.close_reason)
        if self.peer is None:
            raise RuntimeError("no call can be opened before the handshake")
        # The worker is not to be blamed for what piles up here, so this stops well before a session is closed
        # for it.
        if len(self._calls) >= MAX_CALLS or self._outbox.backlog > MAX_BACKLOG // 4:
            raise Overloaded(f"The link to worker '{self.peer.node_id}' is full")
        call = self._highest + 1
        try:
            self._outbox.post(
                ForwardRequest(
                    call,
                    endpoint,
                    kind,
                    model,
                    content_type,
                    dict(headers or {}),
                    request_id,
                    None if timeout == math.inf else max(0.0, timeout),
                    None if budget == math.inf else max(0.0, budget),
                    size,
                    once,
                    checked,
                    principal,
                )
            )
        except ValueError as exc:
            raise InvalidRequest(f"The request cannot be forwarded: {exc}") from exc
        self._highest = call
        self._calls[call] = CallRecord(State.UPLOADING, missing=size)
        self._outbox.open(call)
        return call

    def send_body(self, call: int, data: bytes | memoryview, *, last: bool = False) -> None:
        """Queue bytes of a call's body, of any number; they are kept as they are until they have been sent.

        Dropped without a word where nobody wants them any more: the worker has ended the call, or it was
            cancelled.

        Args:
            call: as :meth:`open` returned it.
            data: bytes, or a memoryview of bytes; must not change afterwards.
            last: the body is complete with these.

        Raises:
            RuntimeError: the body was complete, has another size than was announced, or the call was never
                opened.
        """
        record = self._record(call)
        if record is None or record.state is State.CANCELLING or not (data or last):
            return
        following = self._state_after_sending(call, LastData if last else Data)
        if not record.fits(len(data), last=last):
            raise RuntimeError(f"call {call}: the body has not the size that was announced")
        if record.missing > 0:
            record.missing -= len(data)
        record.state = following
        self._outbox.push(call, data, last=last)

    def cancel(self, call: int, reason: str) -> None:
        """Ask the worker to stop. What waits of the body is dropped, and of the answer nothing more is told.

        Idempotent, and harmless for a call that has ended. The call stays open until the worker has really
        stopped: ``receive`` tells it with ``Done`` or ``Failed``.

        Raises:
            RuntimeError: the call was never opened.
        """
        record = self._record(call)
        if record is None or record.state is State.CANCELLING:
            return
        record.state = self._state_after_sending(call, Cancel)
        self._outbox.drop(call)
        self._outbox.post(Cancel(call, bounds.clip(reason)))

    def model_registered(self, name: str) -> None:
        """Tell the worker that its model is now offered."""
        self._post(ModelRegistered(name))

    def model_rejected(self, name: str, reason: str) -> None:
        """Tell the worker that its model is not offered, and why; a reason that is too long is cut."""
        self._post(ModelRejected(name, bounds.clip(reason)))

    def shut_down(self, reason: str) -> None:
        """Ask the worker to stop: to finish its calls, say goodbye and not come back. Open calls are not touched.

        It answers with a ``Drain`` event, and later with the end of the link.
        """
        self._post(Shutdown(bounds.clip(reason)))

    def _receive_all(self, messages: Iterable[Message], events: list[Any]) -> None:
        for message in messages:
            # What a master hears more often than everything else together, in the state in which it changes nothing; a
            # call for each of them would cost as much as the rest of this.
            if type(message) is Data and not message.last:
                record, size = self._calls.get(message.call), len(message.data)
                if record is not None and record.state is State.ANSWERING and size <= record.credit:
                    record.credit -= size
                    record.unread += size
                    events.append(message)
                    continue
            self._receive_message(message, events)

    def _receive_for_call(self, message: CallMessage, following: State, events: list[Any]) -> None:
        call = message.call
        record = self._calls[call]
        record.state = following
        wanted = following is not State.CANCELLING
        if isinstance(message, Done | Failed):
            del self._calls[call]
            self._outbox.drop(call)
        elif isinstance(message, Grant):
            self._outbox.credit(call, message.credit)
            wanted = False
        elif isinstance(message, Data):
            self._receive_body(record, message)
        if wanted:
            events.append(message)
