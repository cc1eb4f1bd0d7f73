"""Every way in which a link can end raises one ``LinkClosed`` with the reason; and what lingers on a busy link."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import trio
import wsproto
from memory_streams import MemoryStream, memory_pair
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.events import BytesMessage, Ping, Request as WebSocketRequest, TextMessage

from trio_cluster.core.model import ModelInfo
from trio_cluster.errors import Overloaded
from trio_cluster.link.demux import FrameDemux
from trio_cluster.link.link import Link, LinkClosed
from trio_cluster.link.websocket import PATH, Refusal, accept, dial
from trio_cluster.net.watchdog import InjectableStream, injectable
from trio_cluster.protocol import (
    MAGIC,
    MAX_MESSAGE,
    PIECE,
    SUBPROTOCOL,
    WINDOW,
    Cancel,
    Data,
    Done,
    Drain,
    Handshake,
    Heartbeat,
    MasterSession,
    RegisterModel,
    WorkerSession,
    encode,
)


def admit_all(path: str, headers: dict[str, str]) -> Refusal | None:
    return None


@attrs.define(eq=False)
class End:
    """One end of a link, run in a task; keeps the events that it receives, and how it ends."""

    link: Link
    session: Any
    opener: Any
    received: list[Any] = attrs.field(factory=list)
    closed: LinkClosed | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> None:
        try:
            await self.link.run(self.opener)
        except LinkClosed as closed:
            self.closed = closed
        finally:
            self.over.set()

    async def why(self) -> str:
        await self.over.wait()
        assert self.closed is not None
        return self.closed.why


def end_of(stream: InjectableStream, session: Any, opener: Any, timeout: float = 30.0) -> End:
    received: list[Any] = []

    def on_events(events: Sequence[Any]) -> None:
        received.extend(events)

    return End(Link(stream, session, on_events=on_events, timeout=timeout), session, opener, received)


def master_end(memory: MemoryStream, admit: Any = admit_all) -> End:
    stream = injectable(memory)
    session = MasterSession("m", "1", trio.current_time(), heartbeat_interval=5, silence_timeout=30)
    return end_of(stream, session, accept(stream, admit))


def worker_end(memory: MemoryStream, **kwargs: Any) -> End:
    stream = injectable(memory)
    session = WorkerSession("w", "1", trio.current_time(), heartbeat_interval=5, silence_timeout=30)
    return end_of(stream, session, dial(stream, "master", **kwargs))


@pytest.fixture
async def ends(nursery: trio.Nursery) -> tuple[End, End]:
    ours, theirs = memory_pair()
    master, worker = master_end(ours), worker_end(theirs)
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    return master, worker


class RawPeer:
    """A websocket client that sends what the test says, well-behaved or not."""

    def __init__(self, stream: MemoryStream) -> None:
        self.stream = stream
        self.protocol = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)

    async def open(self) -> None:
        await self.send(WebSocketRequest(host="m", target=PATH, subprotocols=[SUBPROTOCOL]))
        self.protocol.receive_data(await self.stream.receive_some())
        list(self.protocol.events())

    async def send(self, event: Any) -> None:
        await self.stream.send_all(self.protocol.send(event))


async def test_both_ends_receive_each_others_handshake(ends: tuple[End, End]) -> None:
    master, worker = ends
    assert [event.node_id for event in master.received if isinstance(event, Handshake)] == ["w"]
    assert [event.node_id for event in worker.received if isinstance(event, Handshake)] == ["m"]


async def test_what_a_session_queues_arrives_after_a_wake(ends: tuple[End, End]) -> None:
    master, worker = ends
    worker.session.drain("tired")
    worker.link.wake()
    await wait_all_tasks_blocked()
    assert Drain("tired") in master.received


async def test_closing_when_flushed_sends_what_is_queued_and_then_the_reason(ends: tuple[End, End]) -> None:
    master, worker = ends
    worker.session.drain("tired")
    worker.link.close_when_flushed("going home")
    assert await master.why() == "going home"
    assert master.closed is not None
    assert master.closed.by_peer
    assert Drain("tired") in master.received
    assert await worker.why() == "going home"


async def test_closing_when_flushed_waits_for_what_the_peer_has_not_granted_credit_for(
    ends: tuple[End, End],
) -> None:
    master, worker = ends
    call = master.session.open(endpoint="chat.completions", kind="chat", model="m")
    master.session.send_body(call, b"{}", last=True)
    master.link.wake()
    await wait_all_tasks_blocked()
    worker.session.respond(call, 200, "text/plain")
    worker.session.send(call, bytes(WINDOW + 1))
    worker.session.send(call, b"more")
    worker.session.done(call)
    worker.link.close_when_flushed("going home")
    await wait_all_tasks_blocked()
    assert not worker.over.is_set()
    master.session.grant(call, WINDOW)
    master.link.wake()
    assert await master.why() == "going home"
    body = b"".join(bytes(event.data) for event in master.received if isinstance(event, Data))
    assert body == bytes(WINDOW + 1) + b"more"
    assert isinstance(master.received[-1], Done)


async def test_ending_at_once_sends_the_reason_to_the_peer(ends: tuple[End, End]) -> None:
    master, worker = ends
    master.link.end("enough")
    assert await worker.why() == "enough"
    assert await master.why() == "enough"


async def test_the_first_reason_to_end_counts(ends: tuple[End, End]) -> None:
    master, _ = ends
    master.link.end("first")
    master.link.end("second")
    assert await master.why() == "first"


async def test_a_connection_that_breaks_ends_the_link_at_once(nursery: trio.Nursery) -> None:
    ours, theirs = memory_pair()
    master, worker = master_end(ours), worker_end(theirs)
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    await trio.aclose_forcefully(theirs)
    assert await master.why() == "the connection broke"


async def test_cancelling_a_link_closes_its_stream() -> None:
    ours, theirs = memory_pair()
    master, worker = master_end(ours), worker_end(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(master.run)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert await worker.why() == "the connection broke"
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")


async def test_a_peer_that_falls_silent_is_dropped(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    start = trio.current_time()
    assert "no message from the peer" in await master.why()
    assert 29 <= trio.current_time() - start <= 32


async def swallow(stream: trio.abc.Stream) -> None:
    """Read everything and send nothing, as the kernel of a frozen process does."""
    try:
        async for _ in stream:
            pass
    except trio.BrokenResourceError:
        pass


async def test_links_with_nothing_but_heartbeats_stay_up(
    ends: tuple[End, End], autojump_clock: MockClock
) -> None:
    master, worker = ends
    await trio.sleep(1000)
    assert not master.over.is_set()
    assert not worker.over.is_set()


async def test_a_peer_that_takes_nothing_is_dropped(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = memory_pair()
    # A memory stream takes any number of bytes; this one takes none once the handshake is over.
    session = MasterSession("m", "1", trio.current_time(), heartbeat_interval=5, silence_timeout=1000)
    stream = injectable(ours)
    stuck = end_of(stream, session, accept(stream, admit_all), timeout=10)
    nursery.start_soon(stuck.run)
    peer = RawPeer(theirs)
    await peer.open()
    await wait_all_tasks_blocked()
    ours.held = True
    assert "took nothing for 10 s" in await stuck.why()


async def test_a_peer_that_is_blocked_may_take_nothing_for_as_long_as_it_reports_that(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    await peer.send(BytesMessage(encode([Handshake(MAGIC, 1, 1, "w", "1")])))
    await wait_all_tasks_blocked()
    ours.held = True
    for _ in range(20):
        await peer.send(BytesMessage(encode([Heartbeat(lag=60.0, blocked="handler of 'm'")])))
        await trio.sleep(5)
    assert not master.over.is_set()
    last = trio.current_time() - 5
    for _ in range(6):
        await peer.send(BytesMessage(encode([Heartbeat()])))
        await trio.sleep(5)
    assert "took nothing for 30 s" in await master.why()
    assert trio.current_time() - last <= 36


async def test_time_during_which_this_end_was_blocked_is_not_silence_of_the_peer(
    ends: tuple[End, End], mock_clock: MockClock
) -> None:
    master, worker = ends
    # As after a handler that did not await for so long: everything is due at once, and nothing has been read.
    mock_clock.jump(100)
    await wait_all_tasks_blocked()
    mock_clock.jump(29)
    await wait_all_tasks_blocked()
    assert not master.over.is_set()
    assert not worker.over.is_set()


async def test_a_peer_that_fell_silent_is_dropped_also_by_an_end_that_was_blocked(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    await wait_all_tasks_blocked()
    mock_clock.jump(100)
    await wait_all_tasks_blocked()
    assert not master.over.is_set()
    for _ in range(7):
        mock_clock.jump(5)
        await wait_all_tasks_blocked()
    assert master.closed is not None
    assert "no message from the peer" in master.closed.why


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (BytesMessage(b"rubbish"), "protocol error"),
        (BytesMessage(b""), "protocol error"),
        (TextMessage("hello"), "binary"),
        (BytesMessage(bytes(MAX_MESSAGE + 1)), "message longer than"),
    ],
    ids=["rubbish", "empty", "text", "too large"],
)
async def test_an_invalid_message_ends_the_link_with_a_reason(
    nursery: trio.Nursery, message: Any, why: str
) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    await peer.send(message)
    assert why.lower() in (await master.why()).lower()


async def test_invalid_frames_end_the_link(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    await theirs.send_all(b"\xff" * 64)
    assert await master.why()


async def test_a_ping_is_harmless(nursery: trio.Nursery) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    await peer.send(Ping(b"hello"))
    nursery.start_soon(swallow, theirs)
    await wait_all_tasks_blocked()
    assert not master.over.is_set()


async def test_a_ping_that_crosses_our_close_frame_raises_nothing(nursery: trio.Nursery) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    await wait_all_tasks_blocked()
    master.link.end("enough")
    await peer.send(Ping(b"hello"))
    nursery.start_soon(swallow, theirs)
    assert await master.why() == "enough"


async def test_a_plain_http_request_is_no_link(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = memory_pair()
    master = master_end(ours)
    nursery.start_soon(master.run)
    await theirs.send_all(b"GET / HTTP/1.1\r\nHost: m\r\n\r\n")
    start = trio.current_time()
    assert "no websocket handshake" in await master.why()
    assert trio.current_time() - start < 5


@pytest.mark.parametrize("sent", [b"", b"GET /cluster HTTP/1.1\r\n", b"\x16\x03\x01"])
async def test_a_client_that_does_not_finish_the_handshake_is_dropped(
    nursery: trio.Nursery, autojump_clock: MockClock, sent: bytes
) -> None:
    ours, theirs = memory_pair()
    master = master_end(ours)
    nursery.start_soon(master.run)
    if sent:
        await theirs.send_all(sent)
    assert await master.why()
    assert trio.current_time() < 40


async def test_a_peer_that_closes_before_the_handshake_ends_the_link_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_pair()
    worker = worker_end(ours)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    start = trio.current_time()
    await theirs.aclose()
    assert "no websocket handshake" in await worker.why()
    assert trio.current_time() - start < 1


async def test_a_silent_server_is_dropped(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, _theirs = memory_pair()
    worker = worker_end(ours)
    nursery.start_soon(worker.run)
    assert "no websocket handshake within 30 s" in await worker.why()


async def test_a_refusal_reaches_the_client(nursery: trio.Nursery) -> None:
    def refuse(path: str, headers: dict[str, str]) -> Refusal | None:
        return Refusal(401, "wrong or missing cluster token")

    ours, theirs = memory_pair()
    master, worker = master_end(ours, refuse), worker_end(theirs)
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    assert await worker.why() == "wrong or missing cluster token"
    assert worker.closed is not None
    assert worker.closed.status == 401
    assert "wrong or missing cluster token" in await master.why()


async def test_the_admission_is_given_the_token_and_the_path(nursery: trio.Nursery) -> None:
    seen: list[Any] = []

    def admit(path: str, headers: dict[str, str]) -> Refusal | None:
        seen.append((path, headers.get("authorization")))
        return None

    ours, theirs = memory_pair()
    master, worker = master_end(ours, admit), worker_end(theirs, token="s3cret", path="/x")
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    assert seen == [("/x", "Bearer s3cret")]


async def test_another_subprotocol_is_refused(nursery: trio.Nursery) -> None:
    ours, theirs = memory_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.send(WebSocketRequest(host="m", target=PATH, subprotocols=["trio-cluster.99"]))
    assert SUBPROTOCOL in await master.why()


async def test_a_message_out_of_state_ends_the_link_on_both_sides(ends: tuple[End, End]) -> None:
    master, worker = ends
    # Made to send a second handshake.
    worker.session._outbox.post(Handshake(1, 1, 1, "again", "1"))
    worker.link.wake()
    assert "a second Handshake" in await master.why()
    assert "a second Handshake" in await worker.why()
    assert RegisterModel not in map(type, master.received)


async def test_a_message_out_of_state_ends_the_link_at_once_and_with_a_close_frame(
    ends: tuple[End, End], autojump_clock: MockClock
) -> None:
    master, worker = ends
    worker.session._outbox.post(Handshake(1, 1, 1, "again", "1"))
    worker.link.wake()
    start = trio.current_time()
    await master.over.wait()
    await worker.over.wait()
    assert trio.current_time() - start < 0.01
    assert worker.closed is not None
    assert worker.closed.by_peer


# Lingering

#: Seconds that a token may linger.
WAIT = 0.25
#: Seconds by which computed times may differ.
EXACT = 1e-9


class Busy:
    """A link on which a worker answers three calls, and the messages that each end receives, with their times.

    Attributes:
        received: for each message that the master received: when, and its events.
        worker_received: the same for the worker.
        start: when the last message before the test was sent.
        closed: the reasons with which the links ended.
    """

    def __init__(self, nursery: trio.Nursery, linger: float) -> None:
        ours, theirs = map(injectable, memory_pair())
        self.received: list[tuple[float, list[Any]]] = []
        self.worker_received: list[tuple[float, list[Any]]] = []
        now = trio.current_time()
        self.master = MasterSession("m", "1", now, heartbeat_interval=50, silence_timeout=100)
        self.worker = WorkerSession("w", "1", now, heartbeat_interval=50, silence_timeout=100)
        self.links = [
            Link(
                stream,
                session,
                on_events=lambda events, into=into: into.append((trio.current_time(), list(events))),
                timeout=30,
                linger=linger,
            )
            for stream, session, into in (
                (ours, self.master, self.received),
                (theirs, self.worker, self.worker_received),
            )
        ]
        self.master_link, self.worker_link = self.links
        self.closed: list[str] = []
        nursery.start_soon(self._run, self.master_link, accept(ours, admit_all))
        nursery.start_soon(self._run, self.worker_link, dial(theirs, "m"))

    async def _run(self, link: Link, opener: Any) -> None:
        try:
            await link.run(opener)
        except LinkClosed as closed:
            self.closed.append(closed.why)

    async def begin(self) -> list[int]:
        """Open the calls, and make the link busy from this moment on."""
        await wait_all_tasks_blocked()
        calls = [
            self.master.open(endpoint="chat.completions", kind="chat", model="m", size=0) for _ in range(3)
        ]
        for call in calls:
            self.master.send_body(call, b"", last=True)
        self.master_link.wake()
        await wait_all_tasks_blocked()
        for call in calls:
            self.worker.respond(call, 200, "text/event-stream")
        self.worker_link.wake()
        await trio.sleep(1)
        self.send(calls[0], b"first")
        await wait_all_tasks_blocked()
        self.start = trio.current_time()
        assert self.received[-1] == (self.start, [Data(calls[0], b"first")])
        self.received.clear()
        self.worker_received.clear()
        return calls

    def send(self, call: int, data: bytes) -> None:
        self.worker.send(call, data)
        self.worker_link.wake()


@pytest.fixture
async def busy(nursery: trio.Nursery, autojump_clock: MockClock) -> Busy:
    return Busy(nursery, WAIT)


async def test_on_an_idle_link_a_token_goes_at_once(busy: Busy, autojump_clock: MockClock) -> None:
    call, *_ = await busy.begin()
    for _ in range(3):
        await trio.sleep(WAIT)
        now = trio.current_time()
        busy.send(call, b"token")
        await wait_all_tasks_blocked()
        assert busy.received.pop() == (now, [Data(call, b"token")])


async def test_on_a_busy_link_tokens_linger_and_not_for_long(busy: Busy, autojump_clock: MockClock) -> None:
    one, two, three = await busy.begin()
    await trio.sleep(0.1)
    busy.send(one, b"a")
    await trio.sleep(0.1)
    busy.send(two, b"b")
    busy.send(one, b"c")
    await trio.sleep(0.04)
    busy.send(three, b"d")
    await trio.sleep(0.1)
    ((when, events),) = busy.received
    assert when == pytest.approx(busy.start + WAIT, abs=EXACT)
    # Those of one call are joined, and the order is kept.
    assert events == [Data(one, b"ac"), Data(two, b"b"), Data(three, b"d")]
    # That was a message as well: the next token lingers for as long.
    busy.send(two, b"e")
    await trio.sleep(1)
    when, events = busy.received[-1]
    assert when == pytest.approx(busy.start + 2 * WAIT, abs=EXACT)
    assert events == [Data(two, b"e")]


async def test_tokens_that_linger_do_not_wake_the_writer(busy: Busy, autojump_clock: MockClock) -> None:
    class Steps(trio.abc.Instrument):
        taken = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.taken += task.name.endswith("Link._write")

    call, *_ = await busy.begin()
    busy.send(call, b"x")
    await wait_all_tasks_blocked()
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    try:
        for _ in range(20):
            busy.send(call, b"x")
            await wait_all_tasks_blocked()
        assert steps.taken == 0
        await trio.sleep(2 * WAIT)
        assert steps.taken > 0
    finally:
        trio.lowlevel.remove_instrument(steps)
    assert busy.received == [(busy.start + WAIT, [Data(call, b"x" * 21)])]


WORKER_SENDS: dict[str, Any] = {
    "the head of an answer": lambda busy, call, fresh: busy.worker.respond(fresh, 200, "text/plain"),
    "the end of an answer": lambda busy, call, fresh: busy.worker.done(call),
    "a failure": lambda busy, call, fresh: busy.worker.fail(fresh, Overloaded("full")),
    "a heartbeat": lambda busy, call, fresh: busy.worker.queue_heartbeat(),
    "a drain": lambda busy, call, fresh: busy.worker.drain("tired"),
    "a model": lambda busy, call, fresh: busy.worker.register(ModelInfo("n", "chat")),
    "many bytes": lambda busy, call, fresh: busy.worker.send(call, bytes(8 * 1024)),
    "many small pieces of one answer": lambda busy, call, fresh: [
        busy.worker.send(call, bytes(100)) for _ in range(82)
    ],
}


@pytest.mark.parametrize("what", WORKER_SENDS)
async def test_urgent_data_never_lingers_and_is_sent_together_with_what_does(
    busy: Busy, autojump_clock: MockClock, what: str
) -> None:
    one, two, _ = await busy.begin()
    fresh = busy.master.open(endpoint="chat.completions", kind="chat", model="m", size=0)
    busy.master.send_body(fresh, b"", last=True)
    busy.master_link.wake()
    busy.send(two, b"token")
    await trio.sleep(0.1)
    assert busy.received == []
    WORKER_SENDS[what](busy, one, fresh)
    busy.worker_link.wake()
    await wait_all_tasks_blocked()
    ((when, events),) = busy.received
    assert when == pytest.approx(busy.start + 0.1, abs=EXACT)
    assert len(events) == 2
    assert Data(two, b"token") in events
    await trio.sleep(1)
    assert len(busy.received) == 1


async def test_messages_that_are_ready_together_leave_in_one_write_up_to_a_limit(
    busy: Busy, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[int]] = []
    send = FrameDemux.send_nowait

    def note(demux: FrameDemux, *messages: bytes) -> bool:
        written.append([len(message) for message in messages])
        return send(demux, *messages)

    monkeypatch.setattr(FrameDemux, "send_nowait", note)
    calls = await busy.begin()
    written.clear()
    for call in calls:
        busy.worker.send(call, bytes(3 * PIECE))
    busy.worker_link.wake()
    await wait_all_tasks_blocked()
    assert [len(sizes) for sizes in written] == [4, 4, 1]
    assert {size // PIECE for sizes in written for size in sizes} == {1}
    assert sum(len(event.data) for _, events in busy.received for event in events) == 9 * PIECE


@pytest.mark.parametrize("what", WORKER_SENDS)
async def test_urgent_data_does_not_begin_to_linger(busy: Busy, autojump_clock: MockClock, what: str) -> None:
    one, _, _ = await busy.begin()
    fresh = busy.master.open(endpoint="chat.completions", kind="chat", model="m", size=0)
    busy.master.send_body(fresh, b"", last=True)
    busy.master_link.wake()
    await trio.sleep(0.1)
    WORKER_SENDS[what](busy, one, fresh)
    busy.worker_link.wake()
    await wait_all_tasks_blocked()
    assert [when for when, _ in busy.received] == [pytest.approx(busy.start + 0.1, abs=EXACT)]


async def test_a_cancellation_never_lingers(busy: Busy, autojump_clock: MockClock) -> None:
    one, _, _ = await busy.begin()
    uploading = busy.master.open(endpoint="chat.completions", kind="chat", model="m")
    busy.master_link.wake()
    await wait_all_tasks_blocked()
    busy.worker_received.clear()
    # The master's link is busy, and a piece of a body lingers.
    busy.master.send_body(uploading, b"a piece")
    busy.master_link.wake()
    await trio.sleep(0.1)
    assert busy.worker_received == []
    busy.master.cancel(one, "no more")
    busy.master_link.wake()
    await wait_all_tasks_blocked()
    ((when, events),) = busy.worker_received
    assert when == pytest.approx(busy.start + 0.1, abs=EXACT)
    assert [type(event) for event in events] == [Cancel, Data]


async def test_credit_never_lingers(busy: Busy, autojump_clock: MockClock) -> None:
    one, _, _ = await busy.begin()
    busy.worker.send(one, bytes(WINDOW - len(b"first")))
    busy.worker.send(one, b"more")
    busy.worker_link.wake()
    await wait_all_tasks_blocked()
    busy.received.clear()
    busy.master.grant(one, WINDOW)
    busy.master_link.wake()
    await trio.sleep(1)
    ((when, events),) = busy.received
    # The credit arrived at once; what had waited for it was a few bytes on a busy link.
    assert events == [Data(one, b"more")]
    assert when == pytest.approx(busy.start + WAIT, abs=EXACT)


async def test_closing_when_flushed_never_lingers(busy: Busy, autojump_clock: MockClock) -> None:
    one, _, _ = await busy.begin()
    busy.send(one, b"last words")
    await trio.sleep(0.1)
    busy.worker_link.close_when_flushed("going home")
    await wait_all_tasks_blocked()
    assert busy.received == [(pytest.approx(busy.start + 0.1, abs=EXACT), [Data(one, b"last words")])]
    assert busy.closed == ["going home", "going home"]
    assert trio.current_time() == pytest.approx(busy.start + 0.1, abs=EXACT)


async def test_closing_when_flushed_does_not_begin_to_linger(busy: Busy, autojump_clock: MockClock) -> None:
    one, _, _ = await busy.begin()
    busy.worker.send(one, b"last words")
    busy.worker_link.close_when_flushed("going home")
    await wait_all_tasks_blocked()
    assert busy.received == [(busy.start, [Data(one, b"last words")])]
    assert trio.current_time() == busy.start


async def test_a_link_that_ends_does_not_linger(busy: Busy, autojump_clock: MockClock) -> None:
    one, _, _ = await busy.begin()
    busy.send(one, b"never received")
    await wait_all_tasks_blocked()
    busy.worker_link.end("enough")
    await wait_all_tasks_blocked()
    assert busy.closed == ["enough", "enough"]
    assert busy.received == []
    assert trio.current_time() == busy.start


async def test_with_a_linger_of_zero_nothing_waits(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    busy = Busy(nursery, 0.0)
    call, *_ = await busy.begin()
    sent = []
    for number in range(5):
        sent.append((trio.current_time(), [Data(call, b"%d" % number)]))
        busy.send(call, b"%d" % number)
        await wait_all_tasks_blocked()
        await trio.sleep(1e-6)
    assert busy.received == sent


async def test_what_other_ready_tasks_send_goes_into_the_same_message_without_any_wait(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    busy = Busy(nursery, 0.0)
    calls = await busy.begin()

    async def send(call: int, *, after: int) -> None:
        for _ in range(after):
            await trio.lowlevel.checkpoint()
        busy.send(call, b"token")

    async with trio.open_nursery() as handlers:
        handlers.start_soon(partial(send, calls[0], after=0))
        # These take one step more, and run in any order with the writer, which the first one has woken.
        for _ in range(20):
            handlers.start_soon(partial(send, calls[1], after=1))
    await wait_all_tasks_blocked()
    assert len(busy.received) == 1


@pytest.mark.parametrize("seed", range(5))
async def test_order_is_kept_and_nothing_lingers_too_long(
    busy: Busy, autojump_clock: MockClock, seed: int
) -> None:
    chance = random.Random(seed)
    calls = await busy.begin()
    sent: dict[int, list[tuple[float, bytes]]] = {call: [] for call in calls}
    for number in range(200):
        await trio.sleep(chance.choice([0, 0, 0.001, 0.1, 0.2, 0.3]))
        call, piece = chance.choice(calls), b"<%d>" % number
        sent[call].append((trio.current_time(), piece))
        busy.send(call, piece)
    for call in calls:
        busy.worker.done(call)
    busy.worker_link.wake()
    await trio.sleep(1)
    for call, pieces in sent.items():
        received = [
            (when, event)
            for when, events in busy.received
            for event in events
            if getattr(event, "call", 0) == call
        ]
        assert received.pop()[1] == Done(call)
        assert b"".join(event.data for _, event in received) == b"".join(piece for _, piece in pieces)
        for since, piece in pieces:
            (when,) = [when for when, event in received if piece in event.data]
            assert since <= when <= since + WAIT + EXACT
