"""Sessions that outlive their connections: cut at every byte, they do what a session does that was never cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from trio_cluster.core.model import ModelInfo
from trio_cluster.errors import ApiError
from trio_cluster.link.frames import FrameReader, frame
from trio_cluster.protocol import (
    MAGIC,
    PIECE,
    SESSION_TRANSITIONS,
    WINDOW,
    Ack,
    Cancel,
    Data,
    Failed,
    ForwardRequest,
    Handshake,
    Heartbeat,
    MasterSession,
    ProtocolError,
    ResumptionRefused,
    SessionState,
    State,
    WorkerSession,
    decode,
    encode,
)
from trio_cluster.protocol.bounds import CANCELLED_MAX
from trio_cluster.protocol.codec import decode_handshake
from trio_cluster.protocol.retention import ACK_ALONE, ACK_ALONG, MAX_RETAINED, Retention
from trio_cluster.protocol.state import SessionEvent

SESSION: Final = "0123456789abcdef" * 2
WINDOW_SECONDS: Final = 15.0


class Cable:
    """A master, a worker, and the bytes between them, which can be cut at any of them, again and again.

    Attributes:
        cuts: the numbers of the bytes before which the connection is cut, counted in both directions together.
        moved: how many bytes have arrived.
        events: what the master and the worker have received.
    """

    def __init__(
        self, cuts: tuple[int, ...] = (), *, master: float = WINDOW_SECONDS, worker: float = 60.0
    ) -> None:
        self.now = 100.0
        self.master = MasterSession(
            "m", "1", self.now, resume_window=master, session_id=SESSION if master else ""
        )
        self.worker = WorkerSession("w", "1", self.now, instance="i", resume_window=worker)
        self.cuts = sorted(set(cuts))
        self.moved = 0
        self.events: dict[str, list[Any]] = {"master": [], "worker": []}
        self._resuming = False
        self._connect()

    def _connect(self) -> None:
        self._flying = {"master": b"", "worker": b""}
        self._readers = {
            "master": FrameReader(masked=True, limit=1 << 20, on_control=lambda _: None),
            "worker": FrameReader(masked=False, limit=1 << 20, on_control=lambda _: None),
        }

    def _write(self) -> None:
        while (batch := self.worker.next_message()) is not None:
            self._flying["master"] += frame(batch.data, masked=True)
        if not self._resuming:
            while (batch := self.master.next_message()) is not None:
                self._flying["worker"] += frame(batch.data, masked=False)

    def settle(self) -> None:
        """Move everything that can move, over any number of connections."""
        self._write()
        while any(self._flying.values()):
            end = "master" if self._flying["master"] else "worker"
            data, self._flying[end] = self._flying[end], b""
            cut = bool(self.cuts) and self.cuts[0] < self.moved + len(data)
            if cut:
                data = data[: max(0, self.cuts.pop(0) - self.moved)]
            self.moved += len(data)
            self._readers[end].feed(data)
            while (message := self._readers[end].next_message()) is not None:
                self._receive(end, message)
            if cut:
                self.cut()
                self.reconnect()
            self._write()

    def cut(self) -> None:
        assert self.worker.suspend(self.now)
        if not self.master.suspended:
            assert self.master.suspend(self.now)
        self._connect()

    def reconnect(self) -> None:
        self.worker.resume()
        self._resuming = True

    def _receive(self, end: str, message: bytes) -> None:
        if end == "master" and self._resuming:
            handshake, _ = decode_handshake(message)
            assert self.master.is_named_by(handshake)
            self.master.resume(handshake, self.now)
            self._resuming = False
            return
        session: Any = self.master if end == "master" else self.worker
        for event in session.receive(message, self.now):
            if not isinstance(event, Handshake | Heartbeat):
                self.events[end].append(event)
            if isinstance(event, Data):
                session.grant(event.call, len(event.data))

    def outcome(self) -> Any:
        """Return everything by which a cut link could differ from another one."""
        ends = (self.master, self.worker)
        return (
            by_call(self.events["master"]),
            by_call(self.events["worker"]),
            [
                (end.open_calls, [end.queued(call) for call in end.open_calls], end.close_reason)
                for end in ends
            ],
            [[end.state(call) for call in range(8)] for end in ends],
        )


def by_call(events: list[Any]) -> dict[int, list[Any]]:
    """Return the events of each call, with the pieces of a body joined.

    The order of different calls, and how a body is cut into pieces, may depend on when something was written.
    """
    found: dict[int, list[Any]] = {}
    bodies: dict[int, bytearray] = {}
    for event in events:
        of_call = found.setdefault(getattr(event, "call", 0), [])
        if not isinstance(event, Data):
            of_call.append(event)
            continue
        if event.call not in bodies:
            bodies[event.call] = bytearray()
            of_call.append(bodies[event.call])
        bodies[event.call] += event.data
        if event.last:
            of_call.append("last")
    return found


def opened(cuts: tuple[int, ...] = (), **windows: float) -> Cable:
    cable = Cable(**windows)
    cable.settle()
    cable.moved = 0
    cable.cuts = sorted(set(cuts))
    return cable


def conversation(cable: Cable) -> Iterator[None]:
    """Do a bit of everything; whoever iterates moves the bytes."""
    master, worker = cable.master, cable.worker
    worker.register(ModelInfo("m", "chat", created=7))
    yield
    master.model_registered("m")
    first = master.open(endpoint="e", kind="chat", model="m", size=-1)
    master.send_body(first, b"up")
    second = master.open(endpoint="e", kind="chat", model="m", size=3)
    master.send_body(second, b"abc", last=True)
    yield
    worker.respond(first, 200, "text/plain")
    worker.send(first, b"early")
    worker.respond(second, 200, "text/plain", [("x-a", "1")])
    worker.send(second, b"one")
    master.tick(cable.now + 5)
    yield
    worker.send(second, b"two")
    master.send_body(first, b"loaded", last=True)
    third = master.open(endpoint="e", kind="chat", model="m")
    master.send_body(third, b"", last=True)
    yield
    master.cancel(second, "gone")
    worker.fail(third, ApiError(500, "broken"))
    worker.tick(cable.now + 5)
    worker.done(first)
    yield
    worker.done(second)
    worker.drain("tired")
    yield


def play(cable: Cable) -> Any:
    for _ in conversation(cable):
        cable.settle()
    return cable.outcome()


# Nothing is lost, nothing comes twice


def test_a_link_that_is_cut_at_any_byte_does_what_one_does_that_was_never_cut() -> None:
    uncut = opened()
    expected = play(uncut)
    assert uncut.moved > 500
    for position in range(uncut.moved):
        cable = opened((position,))
        assert play(cable) == expected, position
        assert cable.master.resumptions == cable.worker.resumptions == 1, position


@given(st.lists(st.integers(0, 1200), max_size=12))
@settings(deadline=None, max_examples=200)
def test_cut_again_and_again_in_the_middle_of_resuming_too(cuts: list[int]) -> None:
    assert play(opened(tuple(cuts))) == play(opened())


def test_a_link_on_which_each_batch_acknowledges_may_be_cut_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trio_cluster.protocol.session.ACK_ALONG", 1)
    uncut = opened()
    expected = play(uncut)
    for position in range(0, uncut.moved, 3):
        assert play(opened((position, position + 200))) == expected, position


def test_an_acknowledgement_that_is_repeated_is_older_than_the_handshake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trio_cluster.protocol.session.ACK_ALONG", 1)
    cable = opened()
    call = stream(cable)
    cable.worker.send(call, b"one ")
    cable.settle()
    cable.master.cancel(call, "gone")
    lost = cable.master.next_message()
    assert lost is not None
    (acknowledged,) = [message.received for message in decode(lost.data) if isinstance(message, Ack)]
    cable.worker.send(call, b"two ")
    batch = cable.worker.next_message()
    assert batch is not None
    cable.master.receive(batch.data, cable.now)
    cable.cut()
    cable.reconnect()
    cable.settle()
    retention = cable.worker._retention
    assert retention is not None
    assert retention.acknowledged > acknowledged
    assert [event for event in cable.events["worker"] if isinstance(event, Cancel)] == [Cancel(call, "gone")]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["up", "down"]), st.integers(0, 2), st.sampled_from([1, 300, PIECE, WINDOW])
        ),
        max_size=12,
    ),
    st.lists(st.integers(0, 3 * WINDOW), max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_bodies_of_any_size_arrive_whole_within_their_windows(
    steps: list[tuple[str, int, int]], cuts: list[int]
) -> None:
    outcomes = []
    for positions in ((), tuple(cuts)):
        cable = opened(positions)
        calls = [cable.master.open(endpoint="e", kind="chat", model="m") for _ in range(3)]
        cable.settle()
        for call in calls:
            cable.worker.respond(call, 200, "text/plain")
        for number, (way, which, size) in enumerate(steps):
            session: Any = cable.master if way == "up" else cable.worker
            send = cable.master.send_body if way == "up" else cable.worker.send
            send(calls[which], bytes([number + 1]) * size)
            cable.settle()
            # More than a window has gone through by now: credit that was lost or given twice would show.
            assert session.queued(calls[which]) == 0
        outcomes.append(cable.outcome())
    assert outcomes[0] == outcomes[1]


# The planted bugs


def acknowledge_nothing(self: Retention, count: int) -> None:
    pass


def write_twice(self: Any, received: int, now: float, resume: Any = MasterSession._on_resumed) -> None:
    resume(self, received, now)
    self._ready.extend(self._retention.batches)


def write_nothing_again(
    self: Any, received: int, now: float, resume: Any = MasterSession._on_resumed
) -> None:
    answer = list(self._ready)
    resume(self, received, now)
    self._ready.clear()
    self._ready.extend(answer)


def count_what_was_not_received(
    self: Any, retention: Retention, name: Any = MasterSession._name_session
) -> bytes:
    retention.received += 1
    return bytes(name(self, retention))


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("_on_resumed", write_twice),
        ("_on_resumed", write_nothing_again),
        ("_name_session", count_what_was_not_received),
    ],
)
def test_a_planted_bug_is_found(name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = play(opened())
    for session in (MasterSession, WorkerSession):
        monkeypatch.setattr(session, name, bug)

    def is_found(position: int) -> bool:
        try:
            return bool(play(opened((position,))) != expected)
        except (ProtocolError, AssertionError):
            return True

    assert any(is_found(position) for position in range(0, 700, 5))


def test_acknowledgements_that_are_lost_for_ever_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retention, "acknowledge", acknowledge_nothing)
    with pytest.raises(AssertionError):
        test_what_is_kept_is_bounded_while_tokens_flow()


def test_credit_that_a_resumption_gives_away_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def resume_with_a_new_window(
        self: Any, received: int, now: float, resume: Any = MasterSession._on_resumed
    ) -> None:
        resume(self, received, now)
        for each in self._outbox._streams.values():
            each.credit = WINDOW

    def send_much() -> None:
        cable = opened()
        call = stream(cable)
        cable.worker.send(call, bytes(3 * WINDOW))
        # Lost on its way, so that nothing of it has been consumed.
        while cable.worker.next_message() is not None:
            pass
        cable.cut()
        cable.reconnect()
        cable.settle()
        assert cable.worker.queued(call) == 0

    send_much()
    monkeypatch.setattr(WorkerSession, "_on_resumed", resume_with_a_new_window)
    with pytest.raises(ProtocolError, match="credit"):
        send_much()


def test_a_master_that_takes_any_session_for_its_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_cluster.protocol.master.hmac.compare_digest", lambda one, other: True)
    with pytest.raises(AssertionError):
        test_a_session_is_named_by_its_id_its_process_and_what_is_possible()


def test_a_window_that_is_not_a_whole_one_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def suspend(self: Any, now: float, suspend: Any = MasterSession.suspend) -> bool:
        until, waits = self._resume_until, bool(suspend(self, now))
        self._resume_until = min(until, self._resume_until) if self.resumptions == 0 else now + 5
        return waits

    for session in (MasterSession, WorkerSession):
        monkeypatch.setattr(session, "suspend", suspend)
    with pytest.raises(AssertionError):
        test_every_session_that_is_resumed_has_a_whole_window_again()


# Acknowledgements


def retained(session: Any) -> int:
    return int(session._retention.size)


def stream(cable: Cable) -> int:
    call = cable.master.open(endpoint="e", kind="chat", model="m")
    cable.master.send_body(call, b"", last=True)
    cable.settle()
    cable.worker.respond(call, 200, "text/event-stream")
    cable.settle()
    return call


def test_what_is_kept_is_bounded_while_tokens_flow() -> None:
    cable = opened()
    call = stream(cable)
    most = 0
    for _ in range(20_000):
        cable.worker.send(call, b"x" * 200)
        cable.settle()
        most = max(most, retained(cable.worker))
    # The credit that the master grants takes the acknowledgement along.
    assert most < 2 * ACK_ALONG
    assert retained(cable.master) < ACK_ALONG


def test_what_is_kept_is_bounded_if_the_other_end_has_nothing_to_send() -> None:
    cable = opened()
    calls = [stream(cable) for _ in range(60)]
    most = 0
    for number in range(20_000):
        # No call gets as far as a grant.
        cable.worker.send(calls[number % len(calls)], b"x" * 180)
        before = cable.master._retention.sent  # type: ignore[union-attr]
        cable.settle()
        assert cable.master._retention.sent == before  # type: ignore[union-attr]
        most = max(most, retained(cable.worker))
    assert ACK_ALONE - 1000 < most <= ACK_ALONE + 1000


def test_an_acknowledgement_goes_along_with_what_is_sent_and_costs_no_message_of_its_own() -> None:
    cable = opened()
    call = stream(cable)
    for _ in range(600):
        cable.worker.send(call, b"x" * 40)
        cable.settle()
    assert retained(cable.worker) > ACK_ALONG
    cable.master.cancel(call, "gone")
    batch = cable.master.next_message()
    assert batch is not None
    assert [type(message).__name__ for message in decode(batch.data)] == ["Cancel", "Ack"]
    cable.worker.receive(batch.data, cable.now)
    assert retained(cable.worker) < 1000
    assert cable.master.next_message() is None


def test_every_heartbeat_acknowledges_and_neither_is_counted() -> None:
    cable = opened()
    stream(cable)
    assert retained(cable.worker) > 0
    for end in (cable.master, cable.worker):
        end.tick(cable.now + 5)
    cable.settle()
    assert retained(cable.worker) == retained(cable.master) == 0
    before = cable.master._retention.received, cable.worker._retention.received  # type: ignore[union-attr]
    for seconds in (10, 15, 20):
        for end in (cable.master, cable.worker):
            end.tick(cable.now + seconds)
        cable.settle()
    after = cable.master._retention.received, cable.worker._retention.received  # type: ignore[union-attr]
    assert before == after


def test_a_heartbeat_of_the_watchdog_which_bypasses_the_session_is_not_counted() -> None:
    cable = opened()
    call = stream(cable)
    cable.master.receive(cable.worker.heartbeat_while_blocked(3.0, "a handler"), cable.now)
    assert cable.master.peer_blocked
    cable.worker.send(call, b"after")
    cable.cut()
    cable.reconnect()
    cable.settle()
    assert by_call(cable.events["master"])[call][-1] == b"after"
    # What was said before the cut does not hold for the new connection.
    assert cable.master.peer_blocked == ""


@pytest.mark.parametrize("count", [-1, 1])
def test_an_acknowledgement_of_what_was_not_sent_ends_the_session(count: int) -> None:
    cable = opened()
    stream(cable)
    cable.worker.tick(cable.now + 5)
    cable.settle()
    retention = cable.master._retention
    assert retention is not None
    number = retention.acknowledged - 1 if count < 0 else retention.sent + 1
    with pytest.raises(ProtocolError, match="an acknowledgement of"):
        cable.master.receive(encode([Ack(number)]), cable.now)


def test_an_old_acknowledgement_in_a_batch_that_is_written_again_is_none() -> None:
    cable = opened()
    call = stream(cable)
    # Of neither body so much that credit would be granted for it.
    for _ in range(2):
        waiting = cable.master.open(endpoint="e", kind="chat", model="m")
        cable.master.send_body(waiting, b"x" * 40_000)
        cable.settle()
    assert cable.worker._retention is not None
    assert cable.worker._retention.unacknowledged > ACK_ALONG
    cable.worker.send(call, b"token")
    lost = cable.worker.next_message()
    assert lost is not None
    assert [type(message).__name__ for message in decode(lost.data)] == ["Data", "Ack"]
    # This still arrives, so that the worker has more when it names the session.
    cable.master.send_body(waiting, b"more")
    batch = cable.master.next_message()
    assert batch is not None
    cable.worker.receive(batch.data, cable.now)
    cable.cut()
    cable.reconnect()
    cable.settle()
    assert by_call(cable.events["master"])[call][-1] == b"token"
    assert cable.master.close_reason is cable.worker.close_reason is None


def test_a_peer_that_never_acknowledges_costs_a_bounded_amount_and_resumption() -> None:
    cable = opened()
    call = stream(cable)
    assert cable.worker.resumable
    for _ in range(MAX_RETAINED // PIECE + 1):
        cable.worker.send(call, bytes(PIECE))
        while cable.worker.next_message() is not None:
            pass
        cable.worker._outbox.credit(call, PIECE)
    assert not cable.worker.resumable
    assert not cable.worker.suspend(cable.now)
    # What the peer still acknowledges is not missed.
    cable.worker.receive(encode([Ack(1)]), cable.now)


# Who may resume what


def named(cable: Cable, **changes: Any) -> Handshake:
    cable.worker.resume()
    batch = cable.worker.next_message()
    assert batch is not None
    handshake = decode_handshake(batch.data)[0]
    return attrs.evolve(handshake, **changes)


def test_a_session_is_named_by_its_id_its_process_and_what_is_possible() -> None:
    cable = opened()
    stream(cable)
    cable.cut()
    handshake = named(cable)
    assert cable.master.is_named_by(handshake)
    for changes in (
        {"session": "f" * 32},
        {"session": ""},
        {"node_id": "other"},
        {"instance": "j"},
        {"received": 1 << 40},
    ):
        assert not cable.master.is_named_by(attrs.evolve(handshake, **changes)), changes


def test_a_worker_cannot_go_back_behind_what_it_has_acknowledged() -> None:
    cable = opened()
    stream(cable)
    cable.worker.tick(cable.now + 5)
    cable.settle()
    cable.cut()
    handshake = named(cable)
    assert handshake.received > 0
    assert not cable.master.is_named_by(attrs.evolve(handshake, received=handshake.received - 1))


def test_a_session_that_is_over_or_not_agreed_on_is_not_named_by_anything() -> None:
    cable = opened()
    cable.cut()
    handshake = named(cable)
    cable.master.close("over")
    assert not cable.master.is_named_by(handshake)
    fresh = MasterSession("m", "1", 0.0, resume_window=15.0, session_id=SESSION)
    assert not fresh.is_named_by(handshake)


@pytest.mark.parametrize("answer", ["", "f" * 32])
def test_a_master_that_answers_with_another_session_ends_this_one(answer: str) -> None:
    cable = opened()
    stream(cable)
    cable.cut()
    cable.worker.resume()
    with pytest.raises(ResumptionRefused):
        cable.worker.receive(encode([Handshake(MAGIC, 1, 1, "m", "1", "", 15.0, answer)]), cable.now)
    assert cable.worker.session_state is SessionState.CLOSED
    # It is known which calls were lost.
    assert cable.worker.open_calls


def test_anything_but_one_handshake_is_no_answer() -> None:
    for answer in (
        [Heartbeat()],
        [Handshake(MAGIC, 1, 1, "m", "1", "", 15.0, SESSION), Heartbeat()],
        [Handshake(MAGIC, 1, 1, "m", "1", "", 15.0, SESSION, 1 << 40)],
    ):
        cable = opened()
        cable.cut()
        cable.worker.resume()
        with pytest.raises(ProtocolError):
            cable.worker.receive(encode(answer), cable.now)
        assert cable.worker.close_reason


# Peers that do not resume


@pytest.mark.parametrize(("master", "worker"), [(0.0, 0.0), (0.0, 15.0), (15.0, 0.0)])
def test_without_a_window_at_both_ends_nothing_is_kept_and_nothing_new_is_sent(
    master: float, worker: float
) -> None:
    cable = opened(master=master, worker=worker)
    play(cable)
    for end in (cable.master, cable.worker):
        assert not end.resumable
        assert not end.suspend(cable.now)
        assert end._retention is None
        assert not end.close_reason


def test_an_older_peer_which_sends_none_of_the_fields_is_spoken_to_as_before() -> None:
    for session in (
        MasterSession("m", "1", 0.0, resume_window=15.0, session_id=SESSION),
        WorkerSession("w", "1", 0.0, resume_window=15.0),
    ):
        session.receive(encode([Handshake(MAGIC, 1, 1, "old", "0.1")]), 0.0)
        session.next_message()
        session.tick(5.0)
        batch = session.next_message()
        assert batch is not None
        assert [type(message) for message in decode(batch.data)] == [Heartbeat]
        assert not session.resumable


def test_the_smaller_window_holds() -> None:
    cable = opened(master=15.0, worker=4.0)
    cable.cut()
    assert cable.master.deadline() == cable.worker.deadline() == cable.now + 4.0


# Time and states


def test_a_suspended_session_ends_when_its_window_has_passed() -> None:
    cable = opened()
    cable.cut()
    for end in (cable.master, cable.worker):
        assert end.deadline() == cable.now + WINDOW_SECONDS
        end.tick(cable.now + WINDOW_SECONDS - 0.001)
        assert end.suspended
        with pytest.raises(ResumptionRefused, match="not resumed within 15 s"):
            end.tick(cable.now + WINDOW_SECONDS)
        assert end.close_reason
        assert not end.suspended


def test_a_connection_that_fails_before_the_answer_does_not_extend_the_window() -> None:
    cable = opened()
    cable.cut()
    cable.worker.resume()
    assert cable.worker.session_state is SessionState.RESUMING
    assert cable.worker.suspend(cable.now + 10)
    assert cable.worker.deadline() == cable.now + WINDOW_SECONDS


def test_every_session_that_is_resumed_has_a_whole_window_again() -> None:
    cable = opened()
    cable.cut()
    cable.now += 10
    cable.reconnect()
    cable.settle()
    assert cable.master.deadline() < cable.now + WINDOW_SECONDS
    cable.cut()
    assert cable.master.deadline() == cable.now + WINDOW_SECONDS


def test_a_suspended_session_keeps_what_it_is_given_and_writes_nothing() -> None:
    cable = opened()
    call = stream(cable)
    cable.cut()
    cable.worker.send(call, b"later")
    cable.master.cancel(call, "gone")
    for end in (cable.master, cable.worker):
        assert end.next_message() is None
        assert not end.sendable
        assert end.unsent
        with pytest.raises(RuntimeError, match="suspended"):
            end.receive(encode([Heartbeat()]), cable.now)
    assert cable.master.state(call) is State.CANCELLING
    cable.reconnect()
    cable.settle()
    assert cable.worker.state(call) is State.CANCELLING


def test_a_call_that_was_lost_on_its_way_and_cancelled_is_never_begun() -> None:
    cable = opened()
    begun = cable.master.open(endpoint="e", kind="chat", model="m", size=1)
    cable.settle()
    lost = cable.master.open(endpoint="e", kind="chat", model="m", size=3)
    cable.master.send_body(lost, b"abc", last=True)
    while cable.master.next_message() is not None:
        pass
    cable.cut()
    for call in (begun, lost):
        cable.master.cancel(call, "opened elsewhere")
    cable.reconnect()
    cable.settle()
    assert [type(event) for event in cable.events["worker"]] == [ForwardRequest, Cancel]
    assert {event.call for event in cable.events["worker"]} == {begun}
    # The master has its end, and the numbers of calls go on behind it.
    assert [(type(event), event.call) for event in cable.events["master"]] == [(Failed, lost)]
    assert (cable.master.open_calls, cable.worker.open_calls) == ((begun,), (begun,))
    following = cable.master.open(endpoint="e", kind="chat", model="m")
    cable.settle()
    assert cable.worker.state(following) is State.UPLOADING


def test_more_cancelled_calls_than_a_handshake_lists_are_begun_and_stopped() -> None:
    cable = opened()
    calls = [cable.master.open(endpoint="e", kind="chat", model="m") for _ in range(CANCELLED_MAX + 1)]
    while cable.master.next_message() is not None:
        pass
    cable.cut()
    for call in calls:
        cable.master.cancel(call, "gone")
    cable.reconnect()
    cable.settle()
    assert [(type(event), event.call) for event in cable.events["worker"]] == [
        (ForwardRequest, calls[-1]),
        (Cancel, calls[-1]),
    ]
    assert cable.master.open_calls == (calls[-1],)


def test_only_a_suspended_session_can_be_resumed() -> None:
    cable = opened()
    with pytest.raises(RuntimeError, match="only a suspended"):
        cable.worker.resume()
    with pytest.raises(RuntimeError, match="only a suspended"):
        cable.master.resume(Handshake(MAGIC, 1, 1, "w", "1"), cable.now)


def test_a_session_that_was_never_open_is_not_suspended() -> None:
    assert not WorkerSession("w", "1", 0.0, resume_window=15.0).suspend(0.0)


def test_the_table_leads_from_every_state_to_the_end() -> None:
    drive: dict[SessionEvent, Callable[[Cable], object]] = {
        SessionEvent.CUT: lambda cable: cable.worker.suspend(cable.now),
        SessionEvent.DIALLED: lambda cable: cable.worker.resume(),
        SessionEvent.RESUMED: lambda cable: cable.worker.receive(
            encode([Handshake(MAGIC, 1, 1, "m", "1", "", 15.0, SESSION)]), cable.now
        ),
        SessionEvent.OVER: lambda cable: cable.worker.close("over"),
    }
    ways: dict[SessionState, list[SessionEvent]] = {
        SessionState.OPEN: [],
        SessionState.SUSPENDED: [SessionEvent.CUT],
        SessionState.RESUMING: [SessionEvent.CUT, SessionEvent.DIALLED],
    }
    for (state, event), after in SESSION_TRANSITIONS.items():
        if state not in ways or (state, event) == (SessionState.SUSPENDED, SessionEvent.RESUMED):
            continue
        cable = opened()
        for step in ways[state]:
            drive[step](cable)
        assert cable.worker.session_state is state
        drive[event](cable)
        assert cable.worker.session_state is after
