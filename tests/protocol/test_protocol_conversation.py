"""A master and a worker on a link that delivers in order, and otherwise at any time."""

from __future__ import annotations

import random
from typing import Any

import attrs
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from protocol_link import open_link

from trio_cluster.errors import ApiError
from trio_cluster.protocol import (
    PIECE,
    WINDOW,
    Cancel,
    Data,
    Done,
    Drain,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Heartbeat,
    Message,
    ModelRegistered,
    ModelRejected,
    ProtocolError,
    RegisterModel,
    Role,
    Shutdown,
    UnregisterModel,
    encode,
)

NOISE = random.Random(1).randbytes(4 * WINDOW)
SIZES = st.sampled_from([0, 1, 200, 5000, PIECE - 1, PIECE, PIECE + 1, 100_000, WINDOW, WINDOW + 7])


@attrs.define(eq=False)
class Record:
    """What was done at the two ends of a call, and which events there were."""

    call: int
    # At the master
    sent: bytearray = attrs.field(factory=bytearray)
    complete: bool = False
    cancelled: bool = False
    heads: int = 0
    received: bytearray = attrs.field(factory=bytearray)
    untaken: int = 0
    ends: list[str] = attrs.field(factory=list)
    # At the worker
    opened: bool = False
    body: bytearray = attrs.field(factory=bytearray)
    body_complete: bool = False
    body_untaken: int = 0
    asked_to_stop: bool = False
    begun: bool = False
    produced: bytearray = attrs.field(factory=bytearray)
    end: str = ""


class Conversation(RuleBasedStateMachine):
    """Everything that both ends and the network can do, in any order; checked at each step and at the end."""

    @initialize()
    def connect(self) -> None:
        self.link = open_link()
        self.calls: dict[int, Record] = {}
        self.noise = 0

    def some(self, size: int) -> bytes:
        """Return bytes that differ from those before them, so that a wrong order is found."""
        self.noise = (self.noise + 7919) % (len(NOISE) // 2)
        return NOISE[self.noise : self.noise + size]

    def pick(self, index: int, **having: Any) -> Record | None:
        fit = [
            record
            for record in self.calls.values()
            if all(getattr(record, name) == value for name, value in having.items())
        ]
        return fit[index % len(fit)] if fit else None

    # The network

    @rule(limit=st.sampled_from([1, 300, PIECE]))
    def master_writes(self, limit: int) -> None:
        self.link.master_writes(limit)

    @rule(limit=st.sampled_from([1, 300, PIECE]))
    def worker_writes(self, limit: int) -> None:
        self.link.worker_writes(limit)

    @rule()
    def master_reads(self) -> None:
        for event in self.link.master_reads():
            self.on_master_event(event)

    @rule()
    def worker_reads(self) -> None:
        for event in self.link.worker_reads():
            self.on_worker_event(event)

    @rule()
    def the_worker_catches_up(self) -> None:
        while self.link.master_writes() is not None:
            pass
        while self.link.to_worker:
            self.worker_reads()

    @rule()
    def the_master_catches_up(self) -> None:
        while self.link.worker_writes() is not None:
            pass
        while self.link.to_master:
            self.master_reads()

    @rule(seconds=st.sampled_from([0.5, 5.0]))
    def time_passes(self, seconds: float) -> None:
        for session in (self.link.master, self.link.worker):
            session._last_received = self.link.now  # other tests are for silence
        self.link.now += seconds
        self.link.master.tick(self.link.now)
        self.link.worker.tick(self.link.now)

    # Events

    def on_master_event(self, event: Any) -> None:
        if isinstance(event, Heartbeat):
            return
        record = self.calls[event.call]
        assert not record.ends, "an event of a call that has ended"
        if isinstance(event, Done | Failed):
            record.ends.append(type(event).__name__)
            assert record.end == record.ends[0]
            if not record.cancelled:
                assert record.received == record.produced
            return
        assert not record.cancelled, "an event of a call that was cancelled"
        if isinstance(event, ForwardResponse):
            record.heads += 1
            assert record.heads == 1
        else:
            assert isinstance(event, Data)
            assert record.heads == 1
            record.received += event.data
            record.untaken += len(event.data)
            assert record.produced.startswith(record.received)
            assert record.untaken <= WINDOW

    def on_worker_event(self, event: Any) -> None:
        if isinstance(event, Heartbeat):
            return
        record = self.calls[event.call]
        assert not record.end, "an event of a call that was ended here"
        assert not record.asked_to_stop, "an event of a call after its cancel"
        if isinstance(event, ForwardRequest):
            assert not record.opened
            record.opened = True
            return
        assert record.opened
        if isinstance(event, Cancel):
            record.asked_to_stop = True
            assert record.cancelled
        else:
            assert isinstance(event, Data)
            assert not record.body_complete
            record.body += event.data
            record.body_untaken += len(event.data)
            record.body_complete = event.last
            assert record.sent.startswith(record.body)
            assert record.body_untaken <= WINDOW
            if event.last:
                assert record.complete
                assert record.body == record.sent

    # Actions

    @precondition(lambda self: len(self.calls) < 6)
    @rule(size=st.none() | SIZES)
    def master_opens(self, size: int | None) -> None:
        body = None if size is None else self.some(size)
        call = self.link.master.open(
            endpoint="e", kind="chat", model="m", size=-1 if body is None else len(body)
        )
        record = self.calls[call] = Record(call)
        if body is not None:
            self.link.master.send_body(call, body, last=True)
            record.sent += body
            record.complete = True

    @rule(index=st.integers(0, 5), size=SIZES, last=st.booleans())
    def master_sends(self, index: int, size: int, last: bool) -> None:
        record = self.pick(index, complete=False)
        if record is not None:
            data = self.some(size)
            self.link.master.send_body(record.call, memoryview(data), last=last)
            record.sent += data
            record.complete = last

    @rule(index=st.integers(0, 5))
    def master_cancels(self, index: int) -> None:
        record = self.pick(index)
        if record is not None:
            self.link.master.cancel(record.call, "no more")
            record.cancelled = record.cancelled or not record.ends

    @rule(index=st.integers(0, 5), part=st.sampled_from([0.3, 1.0]))
    def master_takes(self, index: int, part: float) -> None:
        record = self.pick(index, cancelled=False)
        if record is not None:
            count = int(record.untaken * part)
            record.untaken -= count
            self.link.master.grant(record.call, count if not record.ends else 0)

    @rule(index=st.integers(0, 5), part=st.sampled_from([0.3, 1.0]))
    def worker_takes(self, index: int, part: float) -> None:
        record = self.pick(index, opened=True, end="")
        if record is not None:
            count = int(record.body_untaken * part)
            record.body_untaken -= count
            self.link.worker.grant(record.call, count)

    @rule(index=st.integers(0, 5))
    def worker_begins(self, index: int) -> None:
        record = self.pick(index, opened=True, begun=False, end="")
        if record is not None:
            self.link.worker.respond(record.call, 200, "text/plain")
            record.begun = True

    @rule(index=st.integers(0, 5), size=SIZES)
    def worker_sends(self, index: int, size: int) -> None:
        record = self.pick(index, opened=True, end="")
        if record is not None:
            if not record.begun:
                self.link.worker.respond(record.call, 200, "text/plain")
                record.begun = True
            data = self.some(size)
            self.link.worker.send(record.call, data)
            record.produced += data

    @rule(index=st.integers(0, 5), well=st.booleans())
    def worker_ends(self, index: int, well: bool) -> None:
        record = self.pick(index, opened=True, end="")
        if record is None:
            return
        if well and (record.begun or record.asked_to_stop):
            self.link.worker.done(record.call)
            record.end = "Done"
        else:
            self.link.worker.fail(record.call, ApiError(500, "broke"))
            record.end = "Failed"

    # The end of the link, one way or another

    @invariant()
    def both_ends_agree_on_what_is_open(self) -> None:
        master, worker = self.link.master, self.link.worker
        assert set(master.open_calls) == {record.call for record in self.calls.values() if not record.ends}
        assert set(worker.open_calls) == {
            record.call for record in self.calls.values() if record.opened and not record.end
        }

    def teardown(self) -> None:
        if hasattr(self, "link") and self.link.master.close_reason is None:
            self.finish_quietly()

    @rule(chance=st.integers(0, 15))
    def the_link_is_cut(self, chance: int) -> None:
        if chance != 15:
            return
        link = self.link
        for session in (link.master, link.worker):
            session.close("cut")
            assert session.next_message() is None
        self.both_ends_agree_on_what_is_open()
        for call in link.worker.open_calls:
            link.worker.fail(call, ApiError(500, "cut"))
        assert link.worker.idle
        self.connect()

    def finish_quietly(self) -> None:
        link = self.link
        for _ in range(200):
            for record in self.calls.values():
                if not record.complete:
                    link.master.send_body(record.call, b"", last=True)
                    record.complete = True
                if record.opened and not record.end:
                    link.worker.grant(record.call, record.body_untaken)
                    record.body_untaken = 0
                    if record.body_complete or record.asked_to_stop:
                        link.worker.fail(record.call, ApiError(500, "over"))
                        record.end = "Failed"
                if not record.cancelled and not record.ends:
                    link.master.grant(record.call, record.untaken)
                    record.untaken = 0
            to_master, to_worker = link.settle()
            for event in to_worker:
                self.on_worker_event(event)
            for event in to_master:
                self.on_master_event(event)
            if not to_master and not to_worker and link.master.idle and link.worker.idle:
                break
        assert link.master.idle
        assert link.worker.idle
        for record in self.calls.values():
            assert len(record.ends) == 1
            assert record.ends[0] == record.end
        for spy in (link.master_spy, link.worker_spy):
            cancelled = {message.call for message in spy.messages if isinstance(message, Cancel)}
            assert cancelled <= {record.call for record in self.calls.values() if record.cancelled}


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


# Peers that send anything

CALLS = st.integers(1, 4)
ANY_MESSAGE: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        lambda call, size: ForwardRequest(call, "e", "chat", "m", "", {}, "", None, None, size),
        CALLS,
        st.integers(-1, 5),
    ),
    st.builds(ForwardResponse, CALLS, st.just(200), st.just("text/plain")),
    st.builds(Data, CALLS, st.sampled_from([b"", b"12345", bytes(PIECE)]), st.booleans()),
    st.builds(Done, CALLS),
    st.builds(lambda call: Failed.of(call, ApiError(500, "broke")), CALLS),
    st.builds(Cancel, CALLS, st.just("enough")),
    st.builds(Grant, CALLS, st.sampled_from([1, WINDOW])),
    st.sampled_from(
        [
            Heartbeat(),
            Drain("soon"),
            RegisterModel("m", "chat", "o", 0),
            UnregisterModel("m"),
            ModelRegistered("m"),
            ModelRejected("m", "no"),
            Shutdown("now"),
        ]
    ),
)


@given(
    st.sampled_from(Role), st.lists(st.lists(ANY_MESSAGE, min_size=1, max_size=4), max_size=12), st.randoms()
)
@settings(deadline=None, max_examples=150)
def test_a_session_raises_nothing_but_protocol_errors_whatever_the_peer_sends(
    role: Role, batches: list[list[Message]], chance: random.Random
) -> None:
    link = open_link()
    session: Any = link.master if role is Role.MASTER else link.worker
    if role is Role.MASTER:
        for body in (None, b"", bytes(2 * WINDOW)):
            link.open(body)
    known = set(session.open_calls)
    for batch in batches:
        try:
            events = session.receive(encode(batch), 0.0)
        except ProtocolError:
            assert session.close_reason is not None
            break
        for event in events:
            if isinstance(event, ForwardRequest):
                known.add(event.call)
            elif isinstance(event, Done | Failed):
                known.remove(event.call)
            elif isinstance(event, Data):
                session.grant(event.call, len(event.data))
        call = chance.choice(sorted(known) or [0])
        if role is Role.MASTER and known and chance.random() < 0.3:
            session.cancel(call, "enough")
        if role is Role.WORKER and known and chance.random() < 0.3:
            session.fail(call, ApiError(500, "broke"))
            known.remove(call)
        while chance.random() < 0.7:
            session.next_message()
    assert set(session.open_calls) == known
