"""Every way in which a link can end comes out as one ``LinkClosed`` that says why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import trio
import wsproto
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked
from wsproto.events import BytesMessage, Ping, Request as WebSocketRequest, TextMessage

from trio_cluster._link import PATH, Link, LinkClosed, Refusal, accept, dial
from trio_cluster.wire import (
    MAGIC,
    MAX_MESSAGE,
    SUBPROTOCOL,
    WINDOW,
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


def let_in(path: str, headers: dict[str, str]) -> Refusal | None:
    return None


@attrs.define(eq=False)
class End:
    """One end of a link, run in a task; keeps what it hears and how it ends."""

    link: Link
    session: Any
    opener: Any
    heard: list[Any] = attrs.field(factory=list)
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


def end_of(stream: trio.abc.Stream, session: Any, opener: Any, timeout: float = 30.0) -> End:
    heard: list[Any] = []

    def hear(events: Sequence[Any]) -> None:
        heard.extend(events)

    return End(Link(stream, session, on_events=hear, timeout=timeout), session, opener, heard)


def master_end(stream: trio.abc.Stream, admit: Any = let_in) -> End:
    session = MasterSession("m", "1", trio.current_time(), heartbeat_interval=5, silence_timeout=30)
    return end_of(stream, session, accept(stream, admit))


def worker_end(stream: trio.abc.Stream, **kwargs: Any) -> End:
    session = WorkerSession("w", "1", trio.current_time(), heartbeat_interval=5, silence_timeout=30)
    return end_of(stream, session, dial(stream, "master", **kwargs))


@pytest.fixture
async def ends(nursery: trio.Nursery) -> tuple[End, End]:
    ours, theirs = memory_stream_pair()
    master, worker = master_end(ours), worker_end(theirs)
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    return master, worker


class RawPeer:
    """A websocket client that says what it is told to, well-behaved or not."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.protocol = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)

    async def open(self) -> None:
        await self.send(WebSocketRequest(host="m", target=PATH, subprotocols=[SUBPROTOCOL]))
        self.protocol.receive_data(await self.stream.receive_some())
        list(self.protocol.events())

    async def send(self, event: Any) -> None:
        await self.stream.send_all(self.protocol.send(event))


async def test_both_ends_hear_each_others_handshake(ends: tuple[End, End]) -> None:
    master, worker = ends
    assert [event.node_id for event in master.heard if isinstance(event, Handshake)] == ["w"]
    assert [event.node_id for event in worker.heard if isinstance(event, Handshake)] == ["m"]


async def test_what_a_session_queues_arrives_after_a_wake(ends: tuple[End, End]) -> None:
    master, worker = ends
    worker.session.drain("tired")
    worker.link.wake()
    await wait_all_tasks_blocked()
    assert Drain("tired") in master.heard


async def test_hanging_up_sends_what_is_queued_and_tells_the_other_end_why(ends: tuple[End, End]) -> None:
    master, worker = ends
    worker.session.drain("tired")
    worker.link.hang_up("going home")
    assert await master.why() == "going home"
    assert master.closed is not None
    assert master.closed.said
    assert Drain("tired") in master.heard
    assert await worker.why() == "going home"


async def test_hanging_up_waits_for_what_the_other_end_has_not_given_credit_for(
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
    worker.link.hang_up("going home")
    await wait_all_tasks_blocked()
    assert not worker.over.is_set()
    master.session.grant(call, WINDOW)
    master.link.wake()
    assert await master.why() == "going home"
    body = b"".join(bytes(event.data) for event in master.heard if isinstance(event, Data))
    assert body == bytes(WINDOW + 1) + b"more"
    assert isinstance(master.heard[-1], Done)


async def test_ending_at_once_tells_the_other_end_why(ends: tuple[End, End]) -> None:
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
    ours, theirs = memory_stream_pair()
    master, worker = master_end(ours), worker_end(theirs)
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    await trio.aclose_forcefully(theirs)
    assert await master.why() == "the connection broke"


async def test_cancelling_a_link_closes_its_stream() -> None:
    ours, theirs = memory_stream_pair()
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


async def test_a_peer_that_falls_silent_is_given_up(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    start = trio.current_time()
    assert "nothing was heard" in await master.why()
    assert 29 <= trio.current_time() - start <= 32


async def swallow(stream: trio.abc.Stream) -> None:
    """Read whatever comes, as a frozen process's kernel does, and say nothing."""
    try:
        async for _ in stream:
            pass
    except trio.BrokenResourceError:
        pass


async def test_links_that_only_beat_stay_up(ends: tuple[End, End], autojump_clock: MockClock) -> None:
    master, worker = ends
    await trio.sleep(1000)
    assert not master.over.is_set()
    assert not worker.over.is_set()


async def test_a_peer_that_takes_nothing_is_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
    # A memory stream has no end of room; this one has none at all once the handshake is over.
    session = MasterSession("m", "1", trio.current_time(), heartbeat_interval=5, silence_timeout=1000)
    stuck = end_of(ours, session, accept(ours, let_in), timeout=10)
    nursery.start_soon(stuck.run)
    peer = RawPeer(theirs)
    await peer.open()
    await wait_all_tasks_blocked()

    async def hang() -> None:
        await trio.sleep_forever()

    ours.send_stream.send_all_hook = hang
    assert "took nothing for 10 s" in await stuck.why()


async def test_a_peer_that_is_blocked_may_take_nothing_for_as_long_as_it_says_so(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    await peer.send(BytesMessage(encode([Handshake(MAGIC, 1, 1, "w", "1")])))
    await wait_all_tasks_blocked()
    ours.send_stream.send_all_hook = trio.sleep_forever
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


async def test_the_time_that_this_end_slept_through_is_not_the_peers_silence(
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


async def test_a_peer_that_fell_silent_is_given_up_also_by_one_who_slept(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
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
    assert "nothing was heard" in master.closed.why


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (BytesMessage(b"rubbish"), "protocol error"),
        (BytesMessage(b""), "protocol error"),
        (TextMessage("hello"), "binary"),
        (BytesMessage(bytes(MAX_MESSAGE + 1)), "maximum message size"),
    ],
    ids=["rubbish", "empty", "text", "too large"],
)
async def test_a_peer_that_talks_rubbish_is_told_so(nursery: trio.Nursery, message: Any, why: str) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    await peer.send(message)
    assert why.lower() in (await master.why()).lower()


async def test_frames_that_are_no_frames_end_the_link(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    nursery.start_soon(swallow, theirs)
    await theirs.send_all(b"\xff" * 64)
    assert await master.why()


async def test_a_ping_is_harmless(nursery: trio.Nursery) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    await peer.send(Ping(b"hello"))
    nursery.start_soon(swallow, theirs)
    await wait_all_tasks_blocked()
    assert not master.over.is_set()


async def test_a_ping_that_crosses_our_close_does_not_blow_up(nursery: trio.Nursery) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.open()
    await wait_all_tasks_blocked()
    master.link.end("enough")
    await peer.send(Ping(b"hello"))
    nursery.start_soon(swallow, theirs)
    assert await master.why() == "enough"


async def test_a_plain_http_request_is_no_link(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, theirs = memory_stream_pair()
    master = master_end(ours)
    nursery.start_soon(master.run)
    await theirs.send_all(b"GET / HTTP/1.1\r\nHost: m\r\n\r\n")
    start = trio.current_time()
    assert "no websocket handshake" in await master.why()
    assert trio.current_time() - start < 5


@pytest.mark.parametrize("said", [b"", b"GET /cluster HTTP/1.1\r\n", b"\x16\x03\x01"])
async def test_who_does_not_finish_the_handshake_is_given_up(
    nursery: trio.Nursery, autojump_clock: MockClock, said: bytes
) -> None:
    ours, theirs = memory_stream_pair()
    master = master_end(ours)
    nursery.start_soon(master.run)
    if said:
        await theirs.send_all(said)
    assert await master.why()
    assert trio.current_time() < 40


async def test_who_hangs_up_before_the_handshake_is_let_go_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    ours, theirs = memory_stream_pair()
    worker = worker_end(ours)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    start = trio.current_time()
    await theirs.aclose()
    assert "no websocket handshake" in await worker.why()
    assert trio.current_time() - start < 1


async def test_a_silent_server_is_given_up(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    ours, _theirs = memory_stream_pair()
    worker = worker_end(ours)
    nursery.start_soon(worker.run)
    assert "no websocket handshake within 30 s" in await worker.why()


async def test_a_refusal_reaches_the_one_who_dialled(nursery: trio.Nursery) -> None:
    def refuse(path: str, headers: dict[str, str]) -> Refusal | None:
        return Refusal(401, "wrong or missing cluster token")

    ours, theirs = memory_stream_pair()
    master, worker = master_end(ours, refuse), worker_end(theirs)
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    assert await worker.why() == "wrong or missing cluster token"
    assert worker.closed is not None
    assert worker.closed.status == 401
    assert "wrong or missing cluster token" in await master.why()


async def test_the_token_and_the_path_are_shown_to_whoever_admits(nursery: trio.Nursery) -> None:
    seen: list[Any] = []

    def look(path: str, headers: dict[str, str]) -> Refusal | None:
        seen.append((path, headers.get("authorization")))
        return None

    ours, theirs = memory_stream_pair()
    master, worker = master_end(ours, look), worker_end(theirs, token="s3cret", path="/x")
    nursery.start_soon(master.run)
    nursery.start_soon(worker.run)
    await wait_all_tasks_blocked()
    assert seen == [("/x", "Bearer s3cret")]


async def test_another_subprotocol_is_refused(nursery: trio.Nursery) -> None:
    ours, theirs = memory_stream_pair()
    master, peer = master_end(ours), RawPeer(theirs)
    nursery.start_soon(master.run)
    await peer.send(WebSocketRequest(host="m", target=PATH, subprotocols=["trio-cluster.99"]))
    assert SUBPROTOCOL in await master.why()


async def test_a_message_out_of_state_ends_the_link_on_both_sides(ends: tuple[End, End]) -> None:
    master, worker = ends
    # The worker's end, made to say something that only a master may say.
    worker.session._outbox.post(Handshake(1, 1, 1, "again", "1"))
    worker.link.wake()
    assert "a second Handshake" in await master.why()
    assert "a second Handshake" in await worker.why()
    assert RegisterModel not in map(type, master.heard)
