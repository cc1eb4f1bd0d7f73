"""The master's end of a session: opens calls, sends their bodies, and receives their answers."""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, ClassVar, TypeAlias

import attrs

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
    OtherMasters,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)
from .proof import proof_of_end
from .session import MAX_BACKLOG, MAX_CALLS, CallMessage, CallRecord, Session
from .state import LastData, Role, SessionState, State

__all__ = ["MasterEvent", "MasterSession"]

#: What :meth:`MasterSession.receive` returns.
MasterEvent: TypeAlias = (
    Handshake
    | RegisterModel
    | UnregisterModel
    | Heartbeat
    | OtherMasters
    | Drain
    | ForwardResponse
    | Data
    | Done
    | Failed
)


class MasterSession(Session[MasterEvent]):
    """The master's end. See :class:`Session` for what both ends have, and ``state.py`` for the states of a call.

    For each call that :meth:`open` returned there is exactly one ``Done`` or ``Failed`` event, unless the session is
    closed before. It means that the work has stopped, also for a call that was cancelled; between :meth:`cancel` and
    that event there is no other event of the call.
    """

    _role: ClassVar[Role] = Role.MASTER

    def is_named_by(self, handshake: Handshake) -> bool:
        """Tell whether a handshake on another connection names this session, and can be answered with it.

        The worker must be the same process, and what it has received must be possible. The caller has to compare how
        the connection was admitted, and to stop reading the present one before it calls :meth:`resume`.
        """
        peer, retention = self.peer, self._retention
        return (
            self.close_reason is None
            and peer is not None
            and retention is not None
            and hmac.compare_digest(handshake.session, self.session_id)
            and (handshake.node_id, handshake.instance) == (peer.node_id, peer.instance)
            and retention.knows(handshake.received)
        )

    def is_proven_over(self, proof: str) -> bool:
        """Tell whether this is the proof that the worker's process has ended; see ``proof.py``."""
        if self.close_reason is not None or self.peer is None or not self.session_id:
            return False
        # Text that is not ASCII cannot be compared.
        return hmac.compare_digest(proof.encode(), proof_of_end(self.session_id).encode())

    def announce_proxy(self) -> None:
        """Tell the worker that its connection came through a proxy. To be called before anything was written."""
        self._handshake = attrs.evolve(self._handshake, proxied=True)
        self._outbox.clear()
        self._outbox.post(self._handshake)

    def announce_successor(self, *, coming: bool) -> None:
        """Tell the worker, from this heartbeat on, whether another process takes this master's place.

        The session is not suspended while that is so: the worker would find the other process at the address, which
        does not know the session.
        """
        self._own_heartbeat = attrs.evolve(self._own_heartbeat, replaced=coming)
        if self.peer is not None:
            self.queue_heartbeat()

    def resume(self, handshake: Handshake, now: float, *, proxied: bool = False) -> None:
        """Go on with this session, which is suspended, on the connection on which its worker has named it.

        The next message is the answer; it is followed by what the worker has not received.

        Args:
            handshake: what the worker has sent; :meth:`is_named_by` was true for it.
            now: the time, in seconds.
            proxied: the connection came through a proxy.

        Raises:
            RuntimeError: the session is not suspended.
        """
        if self.session_state is not SessionState.SUSPENDED or self._retention is None:
            raise RuntimeError("only a suspended session can be resumed")
        cancelled = (call for call, record in self._calls.items() if record.state is State.CANCELLING)
        self._handshake = attrs.evolve(
            self._handshake, proxied=proxied, cancelled=tuple(islice(cancelled, bounds.CANCELLED_MAX))
        )
        self._ready.append(self._name_session(self._retention))
        self._on_resumed(handshake.received, now)

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
        weight: float = 1.0,
        priority: int = 0,
        max_tokens: int = 0,
        query: str = "",
        alias: str = "",
    ) -> int:
        """Open a call and return its number. The body has to follow with :meth:`send_body`, even if it is empty.

        Args:
            endpoint, kind, model, content_type, headers, request_id, query, alias: as in ``Request``.
            timeout: the idle timeout, in seconds.
            budget: seconds until the whole answer must be there; negative values count as 0.
            size: bytes that the body will have; -1 if that is not known yet.
            once: the body cannot be sent a second time, to another worker.
            checked: the body was validated; the worker need not do so again.
            principal: the name of the key that the client sent; empty where no key is required.
            weight, priority, max_tokens: as in ``ForwardRequest``.

        Raises:
            InvalidRequest: a value of the request is too large for the protocol, or not valid in it.
            Overloaded: the link has too many calls, or too much to write.
            WorkerLost: the session is closed.
            RuntimeError: the peer's handshake has not been received yet.
        """
        if self.close_reason is not None:
            raise WorkerLost("unknown" if self.peer is None else self.peer.node_id, self.close_reason)
        if self.peer is None:
            raise RuntimeError("no call can be opened before the handshake")
        # The worker is not at fault for what is queued here. So this refuses calls well before the backlog would close
        # the session.
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
                    weight,
                    priority,
                    max_tokens,
                    query,
                    alias,
                )
            )
        except ValueError as exc:
            raise InvalidRequest(f"The request cannot be forwarded: {exc}") from exc
        self._highest = call
        self._calls[call] = CallRecord(State.UPLOADING, missing=size)
        self._outbox.open(call)
        return call

    def send_body(self, call: int, data: bytes | memoryview, *, last: bool = False) -> None:
        """Queue any number of bytes of a call's body; they are not copied before they are sent.

        They are dropped silently if the worker has ended the call, or the call was cancelled.

        Args:
            call: as :meth:`open` returned it.
            data: bytes, or a memoryview of bytes; must not change afterwards.
            last: the body is complete with these bytes.

        Raises:
            RuntimeError: the body was already complete, it does not have the announced size, or the call was never
                opened.
        """
        record = self._record(call)
        if record is None or record.state is State.CANCELLING or not (data or last):
            return
        next_state = self._state_after_sending(call, LastData if last else Data)
        if not record.fits(len(data), last=last):
            raise RuntimeError(f"call {call}: the body does not have the announced size")
        if record.missing > 0:
            record.missing -= len(data)
        record.state = next_state
        self._outbox.push(call, data, last=last)

    def cancel(self, call: int, reason: str, *, complete: bool = False) -> None:
        """Ask the worker to stop. The queued body is dropped, and there are no more events of the answer.

        Idempotent, and without effect on a call that has ended. The call stays open until the worker has really
        stopped: then :meth:`receive` returns its ``Done`` or ``Failed``.

        Args:
            call: its number.
            reason: why it is not wanted any more; clipped.
            complete: the client has the whole answer.

        Raises:
            RuntimeError: the call was never opened.
        """
        record = self._record(call)
        if record is None or record.state is State.CANCELLING:
            return
        record.state = self._state_after_sending(call, Cancel)
        self._outbox.drop(call)
        self._outbox.post(Cancel(call, bounds.clip(reason), complete))

    def model_registered(self, name: str) -> None:
        """Confirm to the worker that its model is registered."""
        self._post(ModelRegistered(name))

    def model_rejected(self, name: str, reason: str) -> None:
        """Tell the worker that its model is not registered, and why; a reason that is too long is truncated."""
        self._post(ModelRejected(name, bounds.clip(reason)))

    def shut_down(self, reason: str) -> None:
        """Ask the worker to finish its calls, close the link and not reconnect. Open calls go on.

        The worker answers with ``Drain``, and later closes the link.
        """
        self._post(Shutdown(bounds.clip(reason)))

    def _receive_all(self, messages: Iterable[Message], events: list[Any]) -> None:
        for message in messages:
            # A master receives more of these than of all other messages together, and in this state they do not change
            # the state. They are processed in place, since a function call for each would double the cost.
            if type(message) is Data and not message.last:
                record, size = self._calls.get(message.call), len(message.data)
                if record is not None and record.state is State.ANSWERING and size <= record.credit:
                    record.credit -= size
                    record.unread += size
                    events.append(message)
                    continue
            self._receive_message(message, events)

    def _receive_for_call(self, message: CallMessage, next_state: State, events: list[Any]) -> None:
        call = message.call
        record = self._calls[call]
        record.state = next_state
        wanted = next_state is not State.CANCELLING
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
