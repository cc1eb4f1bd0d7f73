"""The protocol's state on one link, as a value: bytes in, events out; decisions in, bytes out.

Theory of operation
===================

A session does no IO, never waits and has no clock. The owner of the link does three things with it:

- It passes every websocket message that arrives to ``receive``, which returns what it means as a list of events. Events
  are messages (see ``messages.py``), except for those that concern only the session itself.
- Whenever something has happened (``receive``, ``tick``, or a method by which the local side sends something),
  ``next_message`` may return something to write. The owner calls it until it returns ``None``.
- At ``deadline()``, it calls ``tick``.

All methods are synchronous, and take effect completely or not at all. An error of the peer raises ``ProtocolError`` and
closes the session; an error of the local caller raises ``ValueError`` or ``RuntimeError`` and changes nothing. A closed
session writes nothing and ignores what is still sent with it, because handlers go on for a moment after their link has
gone.

A session may outlive its connection, if both ends want that: :meth:`Session.suspend` says that the connection is gone,
and the two ends have a method each to go on with another one. What has not been acknowledged is written again. See
``retention.py``, and ``docs/resumption.md``.

Memory is bounded: by the window for each direction of each call, by ``MAX_CALLS`` calls, and by ``MAX_BACKLOG`` bytes
of control messages for a peer that sends and does not read. What the local side has sent of a body is bounded by the
local side, which learns from ``Batch.sent`` how much of it has been written.

This module has what both ends share; the two ends are in ``master.py`` and ``worker.py``.
"""

from __future__ import annotations

import abc
import math
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

import attrs

from .bounds import NAME_MAX, ON_DEMAND_MAX, ON_DEMAND_TEXT_MAX, PROGRESS_MAX, clip
from .codec import MAX_MESSAGE, decode, decode_handshake, encode, pack
from .errors import HandshakeError, PeerSilent, ProtocolError, ResumptionRefused
from .messages import (
    MAGIC,
    PIECE,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    WINDOW,
    Ack,
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
)
from .outbox import Batch, Outbox
from .retention import ACK_ALONE, ACK_ALONG, MAX_RETAINED, OVERHEAD, Retention
from .state import (
    LINK_MESSAGES,
    RECEIVE_TRANSITIONS,
    SEND_TRANSITIONS,
    SESSION_TRANSITIONS,
    LastData,
    MessageKind,
    Role,
    SessionEvent,
    SessionState,
    State,
)

__all__ = ["MAX_BACKLOG", "MAX_CALLS", "Session"]

#: Calls that may be open on one link at a time.
MAX_CALLS: Final = 10_000
#: Bytes of control messages that may be queued for a peer that goes on sending and does not read.
MAX_BACKLOG: Final = 16 * 1024 * 1024

# Bytes that the consumer must have taken before a Grant is sent for them.
_GRANT_AT: Final = WINDOW // 4

_CALL_MESSAGES: Final = (Data, Grant, ForwardRequest, ForwardResponse, Done, Failed, Cancel)
CallMessage: TypeAlias = ForwardRequest | ForwardResponse | Data | Done | Failed | Cancel | Grant

EventT = TypeVar("EventT")


@attrs.define(eq=False)
class CallRecord:
    """What a session knows of an open call: its state, and the flow control of the body that it receives."""

    state: State
    credit: int = WINDOW
    """Bytes that the peer may still send."""
    unread: int = 0
    """Bytes that were received and that the local consumer has not taken."""
    ungranted: int = 0
    """Bytes that the consumer has taken and for which no credit has been granted yet."""
    missing: int = -1
    """Bytes that are missing of the announced size of the request's body; -1 if no size was announced."""

    def fits(self, size: int, *, last: bool) -> bool:
        """Return whether ``size`` more bytes of the request's body agree with the announced size."""
        return self.missing < 0 or (size == self.missing if last else size <= self.missing)


class Session(abc.ABC, Generic[EventT]):
    """What the two ends of a link have in common. Use :class:`MasterSession` or :class:`WorkerSession`.

    Args:
        node_id: the name of this node, sent to the peer.
        version: the version of the package, sent to the peer for information.
        now: the time, in seconds on the same clock as in all later calls; only differences matter.
        instance: tells this process from another one of the same name.
        heartbeat_interval: seconds between heartbeats.
        silence_timeout: seconds without any message from the peer after which it counts as lost. This also limits the
            wait for its handshake.
        admit: given the peer's handshake, returns whether anything else of this peer is wanted. If not, its handshake
            is still returned as an event, and nothing that follows it is decoded. Synchronous, and must not raise.
        resume_window: seconds for which the session waits for another connection when one is cut; 0: it does not.
        session_id: of a master's session that can be resumed: 128 random bits, as hexadecimal digits.
        proxied: the way to the peer goes through a proxy.
        process, processes: of a master: which of how many processes this is.

    Attributes:
        peer: the peer's handshake, once it has been received.
        protocol: the version in use, once it has been negotiated.
        peer_blocked: what blocks the peer's event loop, by its last heartbeat; empty if nothing does.
        lag: the ``lag`` of the next heartbeat, in seconds.
        close_reason: why the session is over; ``None`` while it is not.
        session_state: see ``SessionState``.
        session_id: what names the session on another connection; empty if it cannot be resumed.
        resumptions: how often it was resumed.
    """

    _role: ClassVar[Role]

    def __init__(
        self,
        node_id: str,
        version: str,
        now: float,
        *,
        instance: str = "",
        heartbeat_interval: float = 5.0,
        silence_timeout: float = 30.0,
        admit: Callable[[Handshake], bool] = lambda _: True,
        resume_window: float = 0.0,
        session_id: str = "",
        proxied: bool = False,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.peer: Handshake | None = None
        self.protocol: int | None = None
        self.peer_blocked = ""
        self.lag = 0.0
        self.close_reason: str | None = None
        self._admit = admit
        self._refused = False
        self._own_heartbeat = Heartbeat()
        self._heartbeat_interval = heartbeat_interval
        self._silence_timeout = silence_timeout
        self._last_received = now
        self._last_heartbeat = now
        self._heartbeat_due = False
        self._calls: dict[int, CallRecord] = {}
        self._highest = 0
        self._outbox = Outbox()
        self.session_state = SessionState.OPENING
        self.session_id = session_id
        self.resumptions = 0
        self._resume_window = resume_window
        self._resume_until = math.inf
        # From the beginning, since messages may be sent before it is known whether the peer wants it, too.
        self._retention = Retention() if resume_window > 0 else None
        # The first batch, which has the handshake, is neither counted nor kept.
        self._first_sent = False
        # Suspended or resuming: nothing of the session is written.
        self._paused = False
        # What is to be written before anything else: the handshake on another connection, and what is repeated there.
        self._ready: deque[bytes] = deque()
        self._ack_due = False
        self._handshake = Handshake(
            MAGIC,
            PROTOCOL_MIN,
            PROTOCOL_MAX,
            node_id,
            version,
            instance,
            resume_window,
            session_id,
            proxied=proxied,
            process=process,
            processes=processes,
        )
        self._outbox.post(self._handshake)

    # For the owner of the link

    def receive(self, data: bytes, now: float) -> list[EventT]:
        """Process one websocket message and return its events, in order.

        Args:
            data: the content of the message.
            now: the time at which it arrived, in seconds.

        Raises:
            ProtocolError: the peer violated the protocol, or the session was closed before. The events of this message
                are lost, but not the calls: afterwards ``open_calls`` has exactly those whose beginning was returned
                as an event, and whose end was not.
            RuntimeError: the session is suspended.
        """
        if self.close_reason is not None:
            raise ProtocolError(self.close_reason)
        self._last_received = now
        events: list[Any] = []
        if self._refused:
            return events
        try:
            if self._outbox.backlog > MAX_BACKLOG:
                raise ProtocolError("the peer sends but does not read")
            if self.peer is None:
                self._receive_first(data, events)
            elif self._paused:
                self._receive_answer(data, now, events)
            else:
                messages = decode(data)
                self._receive_all(messages, events)
                retention, kind = self._retention, type(messages[0])
                if retention is not None and kind is not Heartbeat and kind is not Ack:
                    retention.received += 1
                    retention.unacknowledged += len(data) + OVERHEAD
                    if retention.unacknowledged >= ACK_ALONE:
                        self._ack_due = True
        except ProtocolError as exc:
            for event in events:
                if isinstance(event, ForwardRequest):
                    self._calls.pop(event.call, None)
                elif isinstance(event, Done | Failed):
                    self._calls[event.call] = CallRecord(State.ENDED)
            self.close(exc.reason)
            raise
        return events

    def next_message(self, limit: int = PIECE) -> Batch | None:
        """Return what to write now as one binary websocket message, or ``None`` if there is nothing.

        What is returned counts as sent: it must be written, or the link must be closed.

        Args:
            limit: bytes after which nothing more is added: the result has about that many, and exceeds them at most by
                the message that was added last. Values above 64 KiB count as 64 KiB.
        """
        if self.close_reason is not None:
            return None
        if self._ready:
            return Batch(self._ready.popleft(), ())
        if self._paused:
            return None
        # The message that is added last may be the largest possible one, which has half of MAX_MESSAGE.
        limit = max(1, min(limit, MAX_MESSAGE // 4))
        retention = self._retention
        if retention is None or not self._first_sent:
            if self._heartbeat_due:
                self._outbox.post(attrs.evolve(self._own_heartbeat, lag=self.lag))
                self._heartbeat_due = False
            self._first_sent = True
            return self._outbox.next_batch(limit)
        if self._heartbeat_due or self._ack_due:
            return self._uncounted_batch(retention)
        ack = (
            pack(Ack(retention.received))
            if retention.unacknowledged >= ACK_ALONG and self.resumable
            else None
        )
        batch = self._outbox.next_batch(limit, ack)
        if batch is not None:
            if ack is not None:
                retention.unacknowledged = 0
            retention.batches.append(batch.data)
            retention.size += len(batch.data) + OVERHEAD
            if retention.size > MAX_RETAINED:
                self._retention = None
                self._ack_due = False
        return batch

    def deadline(self) -> float:
        """Return the time at which :meth:`tick` must be called next; infinite once the session is closed."""
        if self.close_reason is not None:
            return math.inf
        if self._paused:
            return self._resume_until
        return min(
            self._last_heartbeat + self._heartbeat_interval, self._last_received + self._silence_timeout
        )

    def tick(self, now: float) -> None:
        """Queue a heartbeat if one is due, or find that the peer is lost. Calling it too early does nothing.

        Args:
            now: the time, in seconds.

        Raises:
            PeerSilent: nothing was received for ``silence_timeout``; the session is closed.
            ResumptionRefused: it was not resumed in time; the session is closed.
        """
        if self.close_reason is not None:
            return
        if self._paused:
            if now >= self._resume_until:
                late = ResumptionRefused(f"not resumed within {self._resume_window:g} s")
                self.close(late.reason)
                raise late
            return
        if now >= self._last_received + self._silence_timeout:
            silent = PeerSilent(f"no message from the peer for {self.silence(now):.1f} s")
            self.close(silent.reason)
            raise silent
        if now >= self._last_heartbeat + self._heartbeat_interval:
            self._last_heartbeat = now
            # A flag and not a message: if it cannot be written for long, it is still only one heartbeat.
            self._heartbeat_due = True

    def queue_heartbeat(self) -> None:
        """Send a heartbeat with the next message, before it is due."""
        self._heartbeat_due = self.close_reason is None

    def heartbeat_while_blocked(self, lag: float, blocked: str) -> bytes:
        """Return a heartbeat to write at once as one binary websocket message, ahead of everything that is queued.

        It must not be the first message that is written. The method changes nothing in the session: it is the only one
        that another thread may call.

        Args:
            lag: seconds for which the event loop of this end has been blocked.
            blocked: what blocks it, for people; truncated if it is too long.
        """
        return encode([attrs.evolve(self._own_heartbeat, lag=lag, blocked=clip(blocked, NAME_MAX))])

    def silence(self, now: float) -> float:
        """Return for how many seconds nothing has been received from the peer."""
        return now - self._last_received

    def extend_silence_deadline(self, seconds: float, now: float) -> None:
        """Give the peer more time: for some seconds it was this end that did not read.

        Args:
            seconds: for how long this end did not read.
            now: the time, in seconds.
        """
        self._last_received = min(now, self._last_received + seconds)

    def close(self, reason: str) -> None:
        """End the session: the link is gone, or is about to be. Idempotent; the first reason counts.

        Nothing is sent to the peer. ``open_calls`` stays as it is, so that the caller can end what depends on it.
        """
        if self.close_reason is None:
            self.close_reason = reason
            self.session_state = SESSION_TRANSITIONS[self.session_state, SessionEvent.OVER]
            self._outbox.clear()
            self._ready.clear()
            self._retention = None
            self._heartbeat_due = self._ack_due = self._paused = False

    @property
    def resumable(self) -> bool:
        """Whether the session goes on with another connection if this one is cut. Both ends have agreed on that."""
        return self._retention is not None and self.peer is not None

    @property
    def resume_window(self) -> float:
        """Seconds for which the session waits for another connection; the smaller value of both, once it is known."""
        return self._resume_window

    @property
    def retained(self) -> int:
        """About how many bytes are kept, since they were written and the peer has not acknowledged them."""
        return 0 if self._retention is None else self._retention.size

    @property
    def suspended(self) -> bool:
        """Whether the session has no connection, or one on which it has not been resumed yet."""
        return self._paused

    def suspend(self, now: float) -> bool:
        """Record that the connection is gone: write nothing until the session is resumed on another one.

        Everything else goes on. What is sent meanwhile is queued, within the bounds that hold anyway. :meth:`tick` ends
        the session when the window has passed since the first cut.

        Args:
            now: the time, in seconds.

        Returns:
            Whether the session waits; if not, nothing has changed, and the caller has to close it.
        """
        # A worker would find another process at the address of a master that is replaced.
        if self.close_reason is not None or not self.resumable or self._own_heartbeat.replaced:
            return False
        self.session_state = SESSION_TRANSITIONS[self.session_state, SessionEvent.CUT]
        if not self._paused:
            self._resume_until = now + self._resume_window
        self._paused = True
        self._ready.clear()
        return True

    # Common to both ends

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between heartbeats."""
        return self._heartbeat_interval

    @property
    def load(self) -> tuple[int, int, int]:
        """Running calls, waiting calls, and the capacity, for the next heartbeat. A master leaves them at zero.

        Setting it raises ``ValueError`` if a number is negative.
        """
        return (self._own_heartbeat.running, self._own_heartbeat.waiting, self._own_heartbeat.capacity)

    @load.setter
    def load(self, load: tuple[int, int, int]) -> None:
        running, waiting, capacity = load
        self._own_heartbeat = attrs.evolve(
            self._own_heartbeat, running=running, waiting=waiting, capacity=capacity
        )

    def report_progress(self, calls: Iterable[tuple[int, int]]) -> None:
        """Set the progress of calls that the next heartbeats report.

        Args:
            calls: for each its number and the bytes of its answer, or -1 while it waits for a slot. If there are very
                many, only the first ones are reported.
        """
        self._own_heartbeat = attrs.evolve(self._own_heartbeat, progress=tuple(islice(calls, PROGRESS_MAX)))

    def report_on_demand(
        self, models: Iterable[tuple[str, str, float]], calls: Iterable[tuple[int, str, float]]
    ) -> None:
        """Set what the next heartbeats report of the models that run on demand, and of the calls that wait for them.

        Args:
            models: for each its name, its state, and the seconds until it can answer.
            calls: for each its number, what it waits for, and the seconds until that is over, or -1. Of both, only the
                first ones are reported if there are very many.
        """
        self._own_heartbeat = attrs.evolve(
            self._own_heartbeat, on_demand=_first(models, 0), starts=_first(calls, 1)
        )

    @property
    def open_calls(self) -> tuple[int, ...]:
        """The calls that have been opened, and whose end has neither been sent nor received."""
        return tuple(self._calls)

    @property
    def idle(self) -> bool:
        """Whether no call is open and nothing is queued."""
        return not (self._calls or self._outbox or self._heartbeat_due or self._ready or self._ack_due)

    @property
    def sendable(self) -> bool:
        """Whether :meth:`next_message` would return something now."""
        if self._paused or self._ready:
            return bool(self._ready)
        return self._heartbeat_due or self._ack_due or self._outbox.sendable

    @property
    def urgent(self) -> bool:
        """Whether something of that should not linger: it is more than a few bytes of bodies."""
        return self._heartbeat_due or bool(self._ready) or self._outbox.urgent

    @property
    def unsent(self) -> bool:
        """Whether anything is queued, including what waits for credit; never once the session is closed.

        Of a suspended session, what has been written and not acknowledged counts as well: it may have been lost.
        """
        if self._paused and self._retention is not None and self._retention.batches:
            return True
        return bool(self._ready) or self._outbox.unsent

    def state(self, call: int) -> State:
        """Return the state of a call; see ``state.py``."""
        record = self._calls.get(call)
        if record is not None:
            return record.state
        return State.ENDED if 0 < call <= self._highest else State.IDLE

    def queued(self, call: int) -> int:
        """Return how many body bytes of ``call`` are queued."""
        return self._outbox.queued(call)

    def drain(self, reason: str) -> None:
        """Tell the peer that this node is about to stop. Open calls go on."""
        self._post(Drain(clip(reason)))

    def grant(self, call: int, count: int) -> bool:
        """Record that the local consumer has taken ``count`` bytes of the body that is received for ``call``.

        Credit is granted to the peer in steps of a quarter of the window, and not at all when it has nothing more to
        send. Does nothing for calls that have ended or are being cancelled.

        Returns:
            Whether there is something to write now because of it.

        Raises:
            RuntimeError: more was taken than was received, or the call was never opened.
        """
        record = self._calls.get(call)
        if record is None or self.close_reason is not None:
            record = self._record(call)
        if record is None:
            return False
        if not 0 <= count <= record.unread:
            raise RuntimeError(f"call {call}: {count} bytes taken of {record.unread} received")
        record.unread -= count
        record.ungranted += count
        if record.ungranted < _GRANT_AT or (record.state, Grant) not in SEND_TRANSITIONS[self._role]:
            return False
        self._post(Grant(call, record.ungranted))
        record.credit += record.ungranted
        record.ungranted = 0
        return True

    # For the subclasses

    def _post(self, message: Message) -> None:
        if self.close_reason is None:
            self._outbox.post(message)

    def _record(self, call: int) -> CallRecord | None:
        """Return the record of ``call``; ``None`` if the call has ended, or the session has.

        Raises:
            RuntimeError: the call was never opened.
        """
        if self.close_reason is not None:
            return None
        record = self._calls.get(call)
        if record is None and self.state(call) is State.IDLE:
            raise RuntimeError(f"call {call} was never opened")
        return record

    def _state_after_sending(self, call: int, kind: MessageKind) -> State:
        """Return the state of ``call`` after a message of this kind is sent.

        Raises:
            RuntimeError: it must not be sent in the present state.
        """
        state = self.state(call)
        try:
            return SEND_TRANSITIONS[self._role][state, kind]
        except KeyError:
            raise RuntimeError(
                f"{kind.__name__} cannot be sent for call {call}, which is {state.value}"
            ) from None

    def _receive_all(self, messages: Iterable[Message], events: list[Any]) -> None:
        for message in messages:
            self._receive_message(message, events)

    def _receive_first(self, data: bytes, events: list[Any]) -> None:
        """Process the first batch: only its handshake, unless the peer is admitted."""
        handshake, more = decode_handshake(data)
        self._on_handshake(handshake)
        events.append(handshake)
        if not self._admit(handshake):
            self._refused = True
        elif more:
            self._receive_all(decode(data)[1:], events)

    def _receive_message(self, message: Message, events: list[Any]) -> None:
        if isinstance(message, _CALL_MESSAGES):
            state = self.state(message.call)
            kind: MessageKind = LastData if type(message) is Data and message.last else type(message)
            next_state = RECEIVE_TRANSITIONS[self._role].get((state, kind))
            if next_state is None:
                raise ProtocolError(f"{kind.__name__} for call {message.call}, which is {state.value}")
            self._receive_for_call(message, next_state, events)
        elif type(message) is Ack:
            # None if this end has stopped to keep what it sends, which the peer does not know.
            if (retention := self._retention) is not None:
                # In a batch that is written again, it is what the peer had received when it wrote that first. The
                # handshake of the new connection has said more.
                is_old = self.resumptions > 0 and message.received < retention.acknowledged
                if not is_old:
                    retention.acknowledge(message.received)
        elif type(message) in LINK_MESSAGES[self._role]:
            if isinstance(message, Heartbeat):
                self.peer_blocked = message.blocked
            events.append(message)
        else:
            problem = "a second" if isinstance(message, Handshake) else "the wrong end sent"
            raise ProtocolError(f"{problem} {type(message).__name__}")

    def _on_handshake(self, peer: Handshake) -> None:
        if peer.magic != MAGIC:
            raise HandshakeError("the peer is not a trio_cluster node: it sent another magic number")
        version = min(PROTOCOL_MAX, peer.protocol_max)
        if version < max(PROTOCOL_MIN, peer.protocol_min):
            raise HandshakeError(
                f"no common protocol version: {peer.node_id!r} (trio_cluster {peer.version}) supports "
                f"{peer.protocol_min} to {peer.protocol_max}, this node {PROTOCOL_MIN} to {PROTOCOL_MAX}"
            )
        self.peer = peer
        self.protocol = version
        self.session_state = SESSION_TRANSITIONS[self.session_state, SessionEvent.HANDSHAKE]
        self._agree_on_resumption(peer)

    def _agree_on_resumption(self, peer: Handshake) -> None:
        """Find out from the first handshake whether both ends can resume the session, and for how long they wait."""
        if self._role is Role.WORKER:
            self.session_id = peer.session
        self._resume_window = min(self._resume_window, peer.resume_window)
        if not (self._resume_window > 0 and self.session_id):
            self._retention = None
            self._ack_due = False

    def _uncounted_batch(self, retention: Retention) -> Batch:
        """Return a batch of a heartbeat, if one is due, and an acknowledgement."""
        messages: list[Message] = []
        if self._heartbeat_due:
            messages.append(attrs.evolve(self._own_heartbeat, lag=self.lag))
        if self.resumable:
            messages.append(Ack(retention.received))
            retention.unacknowledged = 0
        self._heartbeat_due = self._ack_due = False
        return Batch(encode(messages), ())

    def _name_session(self, retention: Retention) -> bytes:
        """Return the first batch on another connection."""
        return encode([attrs.evolve(self._handshake, session=self.session_id, received=retention.received)])

    def _on_resumed(self, received: int, now: float) -> None:
        """Go on after the ``received`` batches that the peer has.

        Raises:
            ProtocolError: it cannot have so many.
        """
        assert self._retention is not None
        self._retention.acknowledge(received)
        self.session_state = SESSION_TRANSITIONS[self.session_state, SessionEvent.RESUMED]
        self.resumptions += 1
        self._paused = False
        self._resume_until = math.inf
        self._ready.extend(self._retention.batches)
        # The last heartbeats before the cut say nothing any more, and the peer is to have a new one at once.
        self.peer_blocked = ""
        self._last_received = self._last_heartbeat = now
        self._heartbeat_due = True

    def _receive_answer(self, data: bytes, now: float, events: list[Any]) -> None:
        """Process the first batch on another connection of the same session."""
        raise RuntimeError("the session is suspended")

    def _receive_body(self, record: CallRecord, piece: Data) -> None:
        """Charge a received piece against the credit of its call."""
        size = len(piece.data)
        if size > record.credit:
            raise ProtocolError(f"call {piece.call}: {size} bytes of data, but credit for {record.credit}")
        record.credit -= size
        record.unread += size

    @abc.abstractmethod
    def _receive_for_call(self, message: CallMessage, next_state: State, events: list[Any]) -> None:
        """Process a message of an open call that the table allows, and which leads to ``next_state``."""


_Report = TypeVar("_Report", bound=tuple[Any, ...])


def _first(reports: Iterable[_Report], text: int) -> tuple[_Report, ...]:
    """Return as many reports as a heartbeat takes; ``text`` is the index of what is long in them."""
    found: list[_Report] = []
    room = ON_DEMAND_TEXT_MAX
    for report in islice(reports, ON_DEMAND_MAX):
        room -= len(report[text])
        if room < 0:
            break
        found.append(report)
    return tuple(found)
