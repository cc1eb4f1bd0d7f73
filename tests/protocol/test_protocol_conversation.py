"""A master and a worker talk over a link that delivers in order and otherwise does as it likes."""

from __future__ import annotations

import random
from typing import Any

import attrs
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from protocol_link import shaken

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
class Told:
    """What the users at the two ends of a call did and were told."""

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
    """Everything that users and a network can do, in any order; checked as it happens, and at the end."""

    @initialize()
    def connect(self) -> None:
        self.link = shaken()
        self.calls: dict[int, Told] = {}
        self.noise = 0

    def some(self, size: int) -> bytes:
        """Return bytes that are not like those before them, so that order shows."""
        self.noise = (self.noise + 7919) % (len(NOISE) // 2)
        return NOISE[self.noise : self.noise + size]

    def pick(self, index: int, **having: Any) -> Told | None:
        fit = [
            told
            for told in self.calls.values()
            if all(getattr(told, name) == value for name, value in having.items())
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
            self.tell_master(event)

    @rule()
    def worker_reads(self) -> None:
        for event in self.link.worker_reads():
            self.tell_worker(event)

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
            session._last_received = self.link.now  # silence has tests of its own
        self.link.now += seconds
        self.link.master.tick(self.link.now)
        self.link.worker.tick(self.link.now)

    # What the users are told

    def tell_master(self, event: Any) -> None:
        if isinstance(event, Heartbeat):
            return
        told = self.calls[event.call]
        assert not told.ends, "told of a call that has ended"
        if isinstance(event, Done | Failed):
            told.ends.append(type(event).__name__)
            assert told.end == told.ends[0]
            if not told.cancelled:
                assert told.received == told.produced
            return
        assert not told.cancelled, "told of a call that was cancelled"
        if isinstance(event, ForwardResponse):
            told.heads += 1
            assert told.heads == 1
        else:
            assert isinstance(event, Data)
            assert told.heads == 1
            told.received += event.data
            told.untaken += len(event.data)
            assert told.produced.startswith(told.received)
            assert told.untaken <= WINDOW

    def tell_worker(self, event: Any) -> None:
        if isinstance(event, Heartbeat):
            return
        told = self.calls[event.call]
        assert not told.end, "told of a call that was ended here"
        assert not told.asked_to_stop, "told of a call after its cancel"
        if isinstance(event, ForwardRequest):
            assert not told.opened
            told.opened = True
            return
        assert told.opened
        if isinstance(event, Cancel):
            told.asked_to_stop = True
            assert told.cancelled
        else:
            assert isinstance(event, Data)
            assert not told.body_complete
            told.body += event.data
            told.body_untaken += len(event.data)
            told.body_complete = event.last
            assert told.sent.startswith(told.body)
            assert told.body_untaken <= WINDOW
            if event.last:
                assert told.complete
                assert told.body == told.sent

    # What the users do

    @precondition(lambda self: len(self.calls) < 6)
    @rule(size=st.none() | SIZES)
    def master_opens(self, size: int | None) -> None:
        body = None if size is None else self.some(size)
        call = self.link.master.open(
            endpoint="e", kind="chat", model="m", size=-1 if body is None else len(body)
        )
        told = self.calls[call] = Told(call)
        if body is not None:
            self.link.master.send_body(call, body, last=True)
            told.sent += body
            told.complete = True

    @rule(index=st.integers(0, 5), size=SIZES, last=st.booleans())
    def master_sends(self, index: int, size: int, last: bool) -> None:
        told = self.pick(index, complete=False)
        if told is not None:
            data = self.some(size)
            self.link.master.send_body(told.call, memoryview(data), last=last)
            told.sent += data
            told.complete = last

    @rule(index=st.integers(0, 5))
    def master_cancels(self, index: int) -> None:
        told = self.pick(index)
        if told is not None:
            self.link.master.cancel(told.call, "no more")
            told.cancelled = told.cancelled or not told.ends

    @rule(index=st.integers(0, 5), part=st.sampled_from([0.3, 1.0]))
    def master_takes(self, index: int, part: float) -> None:
        told = self.pick(index, cancelled=False)
        if told is not None:
            count = int(told.untaken * part)
            told.untaken -= count
            self.link.master.grant(told.call, count if not told.ends else 0)

    @rule(index=st.integers(0, 5), part=st.sampled_from([0.3, 1.0]))
    def worker_takes(self, index: int, part: float) -> None:
        told = self.pick(index, opened=True, end="")
        if told is not None:
            count = int(told.body_untaken * part)
            told.body_untaken -= count
            self.link.worker.grant(told.call, count)

    @rule(index=st.integers(0, 5))
    def worker_begins(self, index: int) -> None:
        told = self.pick(index, opened=True, begun=False, end="")
        if told is not None:
            self.link.worker.respond(told.call, 200, "text/plain")
            told.begun = True

    @rule(index=st.integers(0, 5), size=SIZES)
    def worker_sends(self, index: int, size: int) -> None:
        told = self.pick(index, opened=True, end="")
        if told is not None:
            if not told.begun:
                self.link.worker.respond(told.call, 200, "text/plain")
                told.begun = True
            data = self.some(size)
            self.link.worker.send(told.call, data)
            told.produced += data

    @rule(index=st.integers(0, 5), well=st.booleans())
    def worker_ends(self, index: int, well: bool) -> None:
        told = self.pick(index, opened=True, end="")
        if told is None:
            return
        if well and (told.begun or told.asked_to_stop):
            self.link.worker.done(told.call)
            told.end = "Done"
        else:
            self.link.worker.fail(told.call, ApiError(500, "broke"))
            told.end = "Failed"

    # The end of the link, one way or another

    @invariant()
    def both_ends_agree_on_what_is_open(self) -> None:
        master, worker = self.link.master, self.link.worker
        assert set(master.open_calls) == {told.call for told in self.calls.values() if not told.ends}
        assert set(worker.open_calls) == {
            told.call for told in self.calls.values() if told.opened and not told.end
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
            for told in self.calls.values():
                if not told.complete:
                    link.master.send_body(told.call, b"", last=True)
                    told.complete = True
                if told.opened and not told.end:
                    link.worker.grant(told.call, told.body_untaken)
                    told.body_untaken = 0
                    if told.body_complete or told.asked_to_stop:
                        link.worker.fail(told.call, ApiError(500, "over"))
                        told.end = "Failed"
                if not told.cancelled and not told.ends:
                    link.master.grant(told.call, told.untaken)
                    told.untaken = 0
            to_master, to_worker = link.settle()
            for event in to_worker:
                self.tell_worker(event)
            for event in to_master:
                self.tell_master(event)
            if not to_master and not to_worker and link.master.idle and link.worker.idle:
                break
        assert link.master.idle
        assert link.worker.idle
        for told in self.calls.values():
            assert len(told.ends) == 1
            assert told.ends[0] == told.end
        for spy in (link.master_spy, link.worker_spy):
            cancelled = {message.call for message in spy.messages if isinstance(message, Cancel)}
            assert cancelled <= {told.call for told in self.calls.values() if told.cancelled}


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


# Peers that say what they like

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
def test_whatever_a_peer_says_a_session_raises_nothing_but_protocol_errors(
    role: Role, batches: list[list[Message]], chance: random.Random
) -> None:
    link = shaken()
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
