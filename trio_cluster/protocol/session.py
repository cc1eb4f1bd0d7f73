"""One link's conversation as a value: bytes in, events out; decisions in, bytes out.

Theory of operation
===================

A session never does IO, never waits and has no clock. Whoever owns the link does three things with it:

- every websocket message that arrives goes into ``receive``, which returns what it means as a list of events.
  Events are messages (see ``messages.py``), less those that only the session itself needs;
- whenever anything has happened (``receive``, ``tick``, or any method by which the local side says
  something), ``next_message`` may have something to write, and is asked until it has not;
- at ``deadline()``, ``tick`` is called.

All methods are synchronous and take effect completely or not at all. What the peer does wrong raises
``ProtocolError`` and closes the session; what the local user does wrong raises ``ValueError`` or
``RuntimeError`` and changes nothing. A closed session writes nothing and swallows whatever is still said to
it, because handlers go on saying things for a moment after their link has gone.

Memory is bounded: by the window for each direction of each call, ``MAX_CALLS`` calls, and ``MAX_BACKLOG``
bytes of control messages for a peer that sends and does not read. What the local side says of a body is
bounded by the local side, which learns from ``Batch.sent`` how much of it has gone.

This module has what both ends share; the ends themselves are in ``master.py`` and ``worker.py``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

import attrs

from .bounds import NAME_MAX, PROGRESS_MAX, clip
from .codec import MAX_MESSAGE, decode, encode
from .errors import HandshakeError, PeerSilent, ProtocolError
from .messages import (
    MAGIC,
    PIECE,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    WINDOW,
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
from .state import (
    LINK_MESSAGES,
    RECEIVE_TRANSITIONS,
    SEND_TRANSITIONS,
    LastData,
    MessageKind,
    Role,
    State,
)

__all__ = ["MAX_BACKLOG", "MAX_CALLS", "Session"]

#: Calls that may be open on one link at a time.
MAX_CALLS: Final = 10_000
#: Bytes of control messages that may wait for a peer which goes on sending and does not read what it gets.
MAX_BACKLOG: Final = 16 * 1024 * 1024

# The part of the window that a consumer must have taken before it is worth a Grant.
_GRANT_AT: Final = WINDOW // 4

_CALL_MESSAGES: Final = (Data, Grant, ForwardRequest, ForwardResponse, Done, Failed, Cancel)
CallMessage: TypeAlias = ForwardRequest | ForwardResponse | Data | Done | Failed | Cancel | Grant

EventT = TypeVar("EventT")


@attrs.define(eq=False)
class CallRecord:
    """What a session remembers of an open call: its state, and the account of the body that it hears."""

    state: State
    credit: int = WINDOW
    """Bytes that the peer may still send."""
    unread: int = 0
    """Bytes that have come and that the local consumer has not taken."""
    taken: int = 0
    """Bytes that it has taken and for which no credit has been given back yet."""
    missing: int = -1
    """Bytes until the request's body has the size that was announced; -1: none was."""

    def fits(self, size: int, *, last: bool) -> bool:
        """Return whether ``size`` more bytes of the request's body agree with the announced size."""
        return self.missing < 0 or (size == self.missing if last else size <= self.missing)


class Session(abc.ABC, Generic[EventT]):
    """What both ends of a link do alike. Use :class:`MasterSession` or :class:`WorkerSession`.

    Args:
        node_id: the name of this node, told to the peer.
        version: the version of the package, told to the peer for information.
        now: the time, in seconds on the same clock as in all later calls; only differences matter.
        instance: tells the peer this process from another one of the same name.
        heartbeat_interval: seconds between heartbeats.
        silence_timeout: seconds without any message from the peer after which it counts as gone. This also
            bounds the wait for its handshake.

    Attributes:
        peer: the peer's handshake, once it has come.
        protocol: the version that both ends speak, once that is settled.
        peer_blocked: what keeps the peer from reading, as its last heartbeat says; empty if nothing does.
        lag: seconds, for the next heartbeat to tell.
        close_reason: why the session is over; ``None`` while it is not.
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
    ) -> None:
        self.peer: Handshake | None = None
        self.protocol: int | None = None
        self.peer_blocked = ""
        self.lag = 0.0
        self.close_reason: str | None = None
        self._own_heartbeat = Heartbeat()
        self._heartbeat_interval = heartbeat_interval
        self._silence_timeout = silence_timeout
        self._last_received = now
        self._last_heartbeat = now
        self._heartbeat_due = False
        self._calls: dict[int, CallRecord] = {}
        self._highest = 0
        self._outbox = Outbox()
        self._outbox.post(Handshake(MAGIC, PROTOCOL_MIN, PROTOCOL_MAX, node_id, version, instance))

    # The link's face

    def receive(self, data: bytes, now: float) -> list[EventT]:
        """Take in one websocket message and return what it means to the user of this session, in order.

        Raises:
            ProtocolError: the peer broke the protocol, or the session was closed before. The events of this
                message are lost, but not the calls: afterwards ``open_calls`` has exactly those that the user
                was told of and whose end the user was not told.
        """
        if self.close_reason is not None:
            raise ProtocolError(self.close_reason)
        self._last_received = now
        events: list[Any] = []
        try:
            if self._outbox.backlog > MAX_BACKLOG:
                raise ProtocolError("the peer sends, but does not read what it is sent")
            self._receive_all(decode(data), events)
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

        What it returns counts as sent: it must be written, or the link given up.

        Args:
            limit: bytes after which nothing more is added, so that the result has about so many: it may
                exceed them by the one message that was added last. 64 KiB are the most that counts.
        """
        if self.close_reason is not None:
            return None
        if self._heartbeat_due:
            self._outbox.post(attrs.evolve(self._own_heartbeat, lag=self.lag))
            self._heartbeat_due = False
        # What is added last may be the largest message that there is, which has half of MAX_MESSAGE.
        return self._outbox.next_batch(max(1, min(limit, MAX_MESSAGE // 4)))

    def deadline(self) -> float:
        """Return the time at which :meth:`tick` must be called next; endless once the session is closed."""
        if self.close_reason is not None:
            return math.inf
        return min(
            self._last_heartbeat + self._heartbeat_interval, self._last_received + self._silence_timeout
        )

    def tick(self, now: float) -> None:
        """Do what time demands: queue a heartbeat, or notice that the peer has gone.

        Calling it early is harmless.

        Raises:
            PeerSilent: nothing was received for ``silence_timeout``; the session is closed.
        """
        if self.close_reason is not None:
            return
        if now >= self._last_received + self._silence_timeout:
            silent = PeerSilent(f"nothing was heard from the peer for {self.silence(now):.1f} s")
            self.close(silent.reason)
            raise silent
        if now >= self._last_heartbeat + self._heartbeat_interval:
            self._last_heartbeat = now
            # A mark and not a message: one that cannot be written now is not joined by others.
            self._heartbeat_due = True

    def queue_heartbeat(self) -> None:
        """Give a sign of life with the next message, without waiting for the time to come."""
        self._heartbeat_due = self.close_reason is None

    def heartbeat_while_blocked(self, lag: float, blocked: str) -> bytes:
        """Return a heartbeat to write at once as one binary websocket message, past everything that waits.

        It must not be the first message that is written. This reads what other methods write and changes nothing:
        it is the one method that another thread may call.

        Args:
            lag: seconds for which this end has been doing nothing but one thing.
            blocked: what that is, for people; cut if it is too long.
        """
        return encode([attrs.evolve(self._own_heartbeat, lag=lag, blocked=clip(blocked, NAME_MAX))])

    def silence(self, now: float) -> float:
        """Return for how many seconds nothing has been heard from the peer."""
        return now - self._last_received

    def extend_silence_deadline(self, seconds: float, now: float) -> None:
        """Take so much off the peer's silence: for so long it was this end that did not listen."""
        self._last_received = min(now, self._last_received + seconds)

    def close(self, reason: str) -> None:
        """End the session: the link is gone, or is about to be. Idempotent; the first reason stays.

        Nothing is told to the peer. ``open_calls`` stays as it is, for the user to end what hangs on it.
        """
        if self.close_reason is None:
            self.close_reason = reason
            self._outbox.clear()
            self._heartbeat_due = False

    # Common to both ends

    @property
    def heartbeat_interval(self) -> float:
        """Seconds between heartbeats."""
        return self._heartbeat_interval

    @property
    def load(self) -> tuple[int, int, int]:
        """Calls running, calls waiting, and capacity, as the next heartbeat will say. A master leaves it at
        zeros.

        Setting it to numbers that are negative raises ``ValueError``.
        """
        return (self._own_heartbeat.running, self._own_heartbeat.waiting, self._own_heartbeat.capacity)

    @load.setter
    def load(self, load: tuple[int, int, int]) -> None:
        running, waiting, capacity = load
        self._own_heartbeat = attrs.evolve(
            self._own_heartbeat, running=running, waiting=waiting, capacity=capacity
        )

    def report_progress(self, calls: Iterable[tuple[int, int]]) -> None:
        """Let the next heartbeats say how far calls are.

        Args:
            calls: for each its number and the bytes of its answer, or -1 while it waits for a slot. If there are
                very many, only the first ones are told of.
        """
        self._own_heartbeat = attrs.evolve(self._own_heartbeat, progress=tuple(islice(calls, PROGRESS_MAX)))

    @property
    def open_calls(self) -> tuple[int, ...]:
        """The calls that have been opened and whose end has not been said or heard here."""
        return tuple(self._calls)

    @property
    def idle(self) -> bool:
        """Whether no call is open and nothing waits to be sent."""
        return not (self._calls or self._outbox or self._heartbeat_due)

    @property
    def sendable(self) -> bool:
        """Whether :meth:`next_message` has something to write now."""
        return self._heartbeat_due or self._outbox.sendable

    @property
    def urgent(self) -> bool:
        """Whether some of it is more than a few bytes of a body, and should not wait for company."""
        return self._heartbeat_due or self._outbox.urgent

    @property
    def unsent(self) -> bool:
        """Whether anything waits to be sent, be it for credit; never once the session is closed."""
        return self._outbox.unsent

    def state(self, call: int) -> State:
        """Return the state of a call; see ``state.py``."""
        record = self._calls.get(call)
        if record is not None:
            return record.state
        return State.ENDED if 0 < call <= self._highest else State.IDLE

    def queued(self, call: int) -> int:
        """Return how many body bytes of ``call`` wait to be sent."""
        return self._outbox.queued(call)

    def drain(self, reason: str) -> None:
        """Tell the peer that this node is about to stop. Open calls are not touched."""
        self._post(Drain(clip(reason)))

    def grant(self, call: int, count: int) -> bool:
        """Say that the local consumer has taken ``count`` bytes of the body that comes in for ``call``.

        The peer is told when a quarter of the window has come together, and not at all when it has nothing
        more to send. Harmless for calls that have ended or are being cancelled.

        Returns:
            Whether there is something to write now because of it.

        Raises:
            RuntimeError: more was taken than has come, or the call was never opened.
        """
        record = self._calls.get(call)
        if record is None or self.close_reason is not None:
            record = self._record(call)
        if record is None:
            return False
        if not 0 <= count <= record.unread:
            raise RuntimeError(f"call {call}: {count} bytes taken of {record.unread} that had come")
        record.unread -= count
        record.taken += count
        if record.taken < _GRANT_AT or (record.state, Grant) not in SEND_TRANSITIONS[self._role]:
            return False
        self._post(Grant(call, record.taken))
        record.credit += record.taken
        record.taken = 0
        return True

    # For the two ends

    def _post(self, message: Message) -> None:
        if self.close_reason is None:
            self._outbox.post(message)

    def _record(self, call: int) -> CallRecord | None:
        """Return what is remembered of ``call``; ``None`` if it has ended, or the session has.

        Raises:
            RuntimeError: the call was never opened.
        """
        if self.close_reason is not None:
            return None
        record = self._calls.get(call)
        if record is None and self.state(call) is State.IDLE:
            raise RuntimeError(f"call {call} was never opened")
        return record

    def _state_after_sending(self, call: int, word: MessageKind) -> State:
        """Return the state that saying ``word`` leads to.

        Raises:
            RuntimeError: it may not be said now.
        """
        state = self.state(call)
        try:
            return SEND_TRANSITIONS[self._role][state, word]
        except KeyError:
            raise RuntimeError(
                f"{word.__name__} cannot be said of call {call}, which is {state.value}"
            ) from None

    def _receive_all(self, messages: Iterable[Message], events: list[Any]) -> None:
        for message in messages:
            self._receive_message(message, events)

    def _receive_message(self, message: Message, events: list[Any]) -> None:
        if self.peer is None:
            if not isinstance(message, Handshake):
                raise ProtocolError(f"the first message must be Handshake, not {type(message).__name__}")
            self._on_handshake(message)
            events.append(message)
        elif isinstance(message, _CALL_MESSAGES):
            state = self.state(message.call)
            word: MessageKind = LastData if type(message) is Data and message.last else type(message)
            following = RECEIVE_TRANSITIONS[self._role].get((state, word))
            if following is None:
                raise ProtocolError(f"{word.__name__} for call {message.call}, which is {state.value}")
            self._receive_for_call(message, following, events)
        elif type(message) in LINK_MESSAGES[self._role]:
            if isinstance(message, Heartbeat):
                self.peer_blocked = message.blocked
            events.append(message)
        else:
            again = "a second" if isinstance(message, Handshake) else "a misdirected"
            raise ProtocolError(f"{again} {type(message).__name__}")

    def _on_handshake(self, peer: Handshake) -> None:
        if peer.magic != MAGIC:
            raise HandshakeError("the peer is not a trio_cluster node: its magic number is another")
        version = min(PROTOCOL_MAX, peer.protocol_max)
        if version < max(PROTOCOL_MIN, peer.protocol_min):
            raise HandshakeError(
                f"no common protocol version: {peer.node_id!r} (trio_cluster {peer.version}) speaks "
                f"{peer.protocol_min} to {peer.protocol_max}, this node {PROTOCOL_MIN} to {PROTOCOL_MAX}"
            )
        self.peer = peer
        self.protocol = version

    def _receive_body(self, record: CallRecord, piece: Data) -> None:
        """Put a piece that came in on the account of its call."""
        size = len(piece.data)
        if size > record.credit:
            raise ProtocolError(f"call {piece.call}: {size} bytes of data, with credit for {record.credit}")
        record.credit -= size
        record.unread += size

    @abc.abstractmethod
    def _receive_for_call(self, message: CallMessage, following: State, events: list[Any]) -> None:
        """Take in a message that the table allows, and which leads to the state ``following``."""
