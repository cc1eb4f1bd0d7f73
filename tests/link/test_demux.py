"""Messages bypass the websocket library, and everything else passes through it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import trio
import wsproto
from memory_streams import memory_pair
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
)

from trio_cluster.link.demux import FrameDemux
from trio_cluster.link.websocket import PATH, LinkClosed, NurseryShim, accept, dial
from trio_cluster.net.streams import ByteStream, TcpStream
from trio_cluster.net.watchdog import injectable
from trio_cluster.protocol import SUBPROTOCOL, ProtocolError

PLACES = ["memory", "sockets"]
SIDES = ["dialled", "accepted"]


class Peer:
    """The other end of the stream: speaks the protocol by itself, and sends what and when the test says."""

    def __init__(self, stream: trio.abc.Stream, *, is_client: bool) -> None:
        self.stream = stream
        self.protocol = wsproto.WSConnection(
            wsproto.ConnectionType.SERVER if is_client else wsproto.ConnectionType.CLIENT
        )
        self.by_peer: list[Any] = []

    def opening(self) -> bytes:
        """Return this end's half of the opening; of the two, only the one who is dialled has to be asked first."""
        if self.protocol.client:
            return self.protocol.send(Request(host="m", target=PATH, subprotocols=[SUBPROTOCOL]))
        return self.protocol.send(AcceptConnection(subprotocol=SUBPROTOCOL))

    def frames(self, *events: Any) -> bytes:
        """Return events as they are sent, whatever this end has received so far."""
        protocol = wsproto.frame_protocol.FrameProtocol(client=self.protocol.client, extensions=[])
        data = b""
        for event in events:
            if isinstance(event, Ping):
                data += protocol.ping(bytes(event.payload))
            elif isinstance(event, Pong):
                data += protocol.pong(bytes(event.payload))
            elif isinstance(event, CloseConnection):
                data += protocol.close(event.code, event.reason)
            else:
                data += protocol.send_data(event.data, fin=event.message_finished)
        return data

    async def send(self, *events: Any) -> None:
        await self.stream.send_all(self.frames(*events))

    async def hear(self) -> list[Any]:
        """Take in what has come, and return all that it means so far."""
        data = await self.stream.receive_some(1 << 20)
        self.protocol.receive_data(bytes(data) or None)
        self.by_peer += self.protocol.events()
        return self.by_peer

    async def hear_of(self, kind: type) -> list[Any]:
        """Go on until something of this kind has come; return all of it."""
        with trio.fail_after(5):
            while not any(isinstance(each, kind) for each in self.by_peer):
                await self.hear()
        return [each for each in self.by_peer if isinstance(each, kind)]


def joined(place: str) -> tuple[ByteStream, trio.abc.Stream]:
    """Return two ends of a connection; the first is as the cluster uses it."""
    if place == "memory":
        return memory_pair()
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(each)) for each in socket.socketpair())
    return TcpStream(ours), theirs


@attrs.define(eq=False)
class Opening:
    """An attempt to open a websocket on a demultiplexer."""

    guard: NurseryShim
    peer: Peer
    opened: tuple[WebSocketConnection, FrameDemux] | None = None
    error: Exception | None = None
    over: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, opener: Any) -> None:
        try:
            self.opened = await opener(self.guard)
        except (LinkClosed, ConnectionClosed) as error:
            self.error = error
        finally:
            self.over.set()


@asynccontextmanager
async def opening(
    side: str, *, place: str = "memory", stream: Any = None, peer_stream: Any = None
) -> AsyncIterator[Opening]:
    """Begin to open a websocket; the peer has not said anything yet."""
    plain, theirs = (stream, peer_stream) if stream is not None else joined(place)
    ours = injectable(plain)
    async with ours, theirs, trio.open_nursery() as nursery:
        attempt = Opening(NurseryShim(nursery), Peer(theirs, is_client=side == "dialled"))
        opener = dial(ours, "m") if side == "dialled" else accept(ours, lambda path, headers: None)
        nursery.start_soon(attempt.run, opener)
        if side == "dialled":
            await attempt.peer.hear_of(Request)
        yield attempt
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_demux(
    side: str, **arguments: Any
) -> AsyncIterator[tuple[FrameDemux, WebSocketConnection, Peer]]:
    async with opening(side, **arguments) as attempt:
        await attempt.peer.stream.send_all(attempt.peer.opening())
        if side == "accepted":
            await attempt.peer.hear_of(AcceptConnection)
        with trio.fail_after(5):
            await attempt.over.wait()
        assert attempt.opened is not None, attempt.error
        attempt.peer.by_peer.clear()
        websocket, demux = attempt.opened
        yield demux, websocket, attempt.peer


async def send_message(demux: FrameDemux, message: bytes) -> None:
    if not demux.send_nowait(message):
        await demux.flush()


async def next_message(demux: FrameDemux) -> bytes | None:
    with trio.fail_after(5):
        return await demux.receive()


# The opening


@pytest.mark.parametrize("side", SIDES)
async def test_the_opening_may_come_in_any_two_pieces_with_messages_behind_it(side: str) -> None:
    cut = 0
    while True:
        async with opening(side) as attempt:
            peer = attempt.peer
            by_peer = peer.opening()
            end = len(by_peer)
            by_peer += peer.frames(BytesMessage(b"one"), Ping(b"?"), BytesMessage(b"two"))
            if cut > end + 3:
                break
            await peer.stream.send_all(by_peer[:cut])
            await wait_all_tasks_blocked()
            await peer.stream.send_all(by_peer[cut:])
            # On a busy machine, what was sent on a socket may arrive after all tasks were seen to be blocked.
            with trio.move_on_after(5):
                while attempt.opened is None:
                    await wait_all_tasks_blocked(0.001)
            assert attempt.opened is not None, f"cut at {cut}"
            _, demux = attempt.opened
            assert [await next_message(demux), await next_message(demux)] == [b"one", b"two"]
            await wait_all_tasks_blocked()
            # The library has heard of the ping from us, and of nothing else.
            assert len(await peer.hear_of(Pong)) == 1
        cut += 1
    assert cut > 100


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("place", PLACES)
async def test_the_opening_and_what_follows_may_come_byte_by_byte(side: str, place: str) -> None:
    async with opening(side, place=place) as attempt:
        by_peer = attempt.peer.opening() + attempt.peer.frames(Ping(b"?"), BytesMessage(b"hello"))
        for index in range(len(by_peer)):
            await attempt.peer.stream.send_all(by_peer[index : index + 1])
        with trio.fail_after(5):
            await attempt.over.wait()
        assert attempt.opened is not None
        assert await next_message(attempt.opened[1]) == b"hello"
        (pong,) = await attempt.peer.hear_of(Pong)
        assert pong.payload == b"?"


async def test_lines_of_the_opening_may_end_in_bare_newlines() -> None:
    async with opening("accepted") as attempt:
        by_peer = attempt.peer.opening().replace(b"\r\n", b"\n")
        await attempt.peer.stream.send_all(by_peer + attempt.peer.frames(BytesMessage(b"hello")))
        await wait_all_tasks_blocked()
        assert attempt.opened is not None
        assert await next_message(attempt.opened[1]) == b"hello"


async def test_what_is_said_with_a_refusal_reaches_the_library() -> None:
    async with opening("dialled") as attempt:
        protocol = attempt.peer.protocol
        head = protocol.send(RejectConnection(401, headers=[(b"content-length", b"13")], has_body=True))
        body = protocol.send(RejectData(b"no entry here"))
        # In pieces, of which the first has a part of the body already.
        for piece in (head + body[:3], body[3:7], body[7:]):
            await attempt.peer.stream.send_all(piece)
            await wait_all_tasks_blocked()
        assert isinstance(attempt.guard.error, ConnectionRejected)
        assert attempt.guard.error.status_code == 401
        assert attempt.guard.error.body == b"no entry here"


@pytest.mark.parametrize("side", SIDES)
async def test_an_opening_without_end_is_refused(side: str, autojump_clock: MockClock) -> None:
    async with opening(side) as attempt:
        first = b"GET / HTTP/1.1\r\n" if side == "accepted" else b"HTTP/1.1 101 Come in\r\n"
        by_peer, sent = first, 0
        with trio.move_on_after(5):
            while not attempt.guard.ended.is_set():
                try:
                    await attempt.peer.stream.send_all(by_peer)
                except trio.BrokenResourceError:
                    break
                sent += len(by_peer)
                by_peer = b"x-more: " + b"y" * 1000 + b"\r\n"
                await wait_all_tasks_blocked()
                assert sent < 1 << 18
        await attempt.guard.ended.wait()
        assert attempt.opened is None


# Messages and what comes between them


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("place", PLACES)
async def test_messages_go_both_ways(side: str, place: str) -> None:
    async with open_demux(side, place=place) as (demux, _, peer):
        sizes = [0, 1, 125, 126, 70_000, 250_000]

        async def talk() -> None:
            for size in sizes:
                await send_message(demux, b"a" * size)

        async def listen() -> None:
            for size in sizes:
                assert await next_message(demux) == b"b" * size

        async def be_the_peer() -> None:
            while sum(event.message_finished for event in peer.by_peer) < len(sizes):
                await peer.hear()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk)
                nursery.start_soon(listen)
                nursery.start_soon(be_the_peer)
                await peer.send(*[BytesMessage(b"b" * size) for size in sizes])
        assert b"".join(bytes(event.data) for event in peer.by_peer) == b"a" * sum(sizes)


async def test_a_socket_that_has_nothing_to_read_after_all_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def read(descriptor: int, limit: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise BlockingIOError
        return os.read(descriptor, limit)

    async with open_demux("accepted", place="sockets") as (demux, _, peer):
        monkeypatch.setattr("trio_cluster.net.streams.os", SimpleNamespace(read=read, write=os.write))
        await peer.send(BytesMessage(b"hello"))
        assert await next_message(demux) == b"hello"
    assert calls == 2


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("place", PLACES)
async def test_a_ping_is_answered_and_a_pong_ignored(side: str, place: str) -> None:
    async with open_demux(side, place=place) as (demux, _, peer):
        await peer.send(
            Ping(b"there?"),
            BytesMessage(b"in ", message_finished=False),
            Pong(b"unsolicited"),
            BytesMessage(b"pieces"),
        )
        assert await next_message(demux) == b"in pieces"
        (pong,) = await peer.hear_of(Pong)
        assert pong.payload == b"there?"


async def test_pings_that_are_not_answered_yet_do_not_pile_up() -> None:
    async with open_demux("accepted") as (demux, _, peer):
        pings = [Ping(b"%d" % number) for number in range(1000)]
        await peer.send(*pings, *[Pong(b"x") for _ in pings], BytesMessage(b"hello"))
        assert await next_message(demux) == b"hello"
        await wait_all_tasks_blocked()
        pongs = await peer.hear_of(Pong)
        assert len(pongs) < 10
        assert pongs[-1].payload == b"999"


@pytest.mark.parametrize("side", SIDES)
async def test_what_the_library_and_the_link_send_at_the_same_time_is_never_mixed(side: str) -> None:
    slow, theirs = memory_pair()
    async with open_demux(side, stream=slow, peer_stream=theirs) as (demux, _, peer):
        slow.at_once = 1

        async def receive() -> None:
            while await demux.receive() is not None:
                pass

        async def send() -> None:
            for number in range(20):
                await send_message(demux, b"message %d" % number)
                await trio.testing.wait_all_tasks_blocked()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            async with trio.open_nursery() as sending:
                sending.start_soon(send)
                for number in range(20):
                    await peer.send(Ping(b"%d" % number))
                    for _ in range(7):
                        await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        by_peer = await peer.hear()
        messages = [bytes(each.data) for each in by_peer if isinstance(each, BytesMessage)]
        assert b"".join(messages) == b"".join(b"message %d" % number for number in range(20))
        assert [each for each in by_peer if isinstance(each, Pong)][-1].payload == b"19"


# The end


def close_frame() -> CloseConnection:
    return CloseConnection(1000, "that is all")


async def why(websocket: WebSocketConnection) -> tuple[int, str | None]:
    """Return why the library thinks that the websocket is closed."""
    with trio.fail_after(5), pytest.raises(ConnectionClosed) as closed:
        await websocket.get_message()
    assert closed.value.reason is not None
    return closed.value.reason.code, closed.value.reason.reason


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("place", PLACES)
async def test_a_close_frame_is_answered_and_ends_the_messages(side: str, place: str) -> None:
    async with open_demux(side, place=place) as (demux, websocket, peer):
        await peer.send(
            BytesMessage(b"before"),
            BytesMessage(b"half of", message_finished=False),
            close_frame(),
            BytesMessage(b" a message"),
            BytesMessage(b"after"),
        )
        assert await next_message(demux) == b"before"
        assert await next_message(demux) is None
        demux.return_to_library()
        assert await why(websocket) == (1000, "that is all")
        await peer.hear_of(CloseConnection)


@pytest.mark.parametrize("side", SIDES)
async def test_after_a_close_frame_nothing_more_is_sent(side: str) -> None:
    slow, theirs = memory_pair()
    async with open_demux(side, stream=slow, peer_stream=theirs) as (demux, websocket, peer):
        slow.at_once = 1
        refused: list[str] = []

        async def send(message: bytes) -> None:
            try:
                await send_message(demux, message)
            except trio.BrokenResourceError as error:
                refused.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, b"on its way")
            await trio.lowlevel.checkpoint()
            await peer.send(close_frame())
            assert await next_message(demux) is None
            # Both wait for the lock: the answer to the close frame, and a message behind it.
            await trio.lowlevel.checkpoint()
            nursery.start_soon(send, b"too late")
            demux.return_to_library()
            assert await why(websocket) == (1000, "that is all")
        await send(b"much too late")
        assert refused == ["the peer has closed the websocket"] * 2
        data = bytes(await theirs.receive_some())
        peer.protocol.receive_data(data)
        message, answer = peer.protocol.events()
        assert isinstance(message, BytesMessage)
        assert message.data == b"on its way"
        assert isinstance(answer, CloseConnection)
        assert data[-2 - len(b"that is all") - 2 - (4 if side == "dialled" else 0) :][:1] == b"\x88"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("left", [1, 5, 100])
async def test_an_end_in_the_middle_of_a_message_is_no_message(side: str, place: str, left: int) -> None:
    async with open_demux(side, place=place) as (demux, websocket, peer):
        by_peer = peer.frames(BytesMessage(b"whole"), BytesMessage(bytes(1000)))
        await peer.stream.send_all(by_peer[:-left])
        assert await next_message(demux) == b"whole"
        await trio.aclose_forcefully(peer.stream)
        assert await next_message(demux) is None
        demux.return_to_library()
        assert (await why(websocket))[0] == 1006


@pytest.mark.parametrize("side", SIDES)
async def test_a_connection_that_is_reset_is_the_end(side: str) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    theirs = await trio.open_tcp_stream("127.0.0.1", port)
    ours = TcpStream(await listeners[0].accept())
    await listeners[0].aclose()
    async with open_demux(side, stream=ours, peer_stream=theirs) as (demux, websocket, _):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(theirs)
        assert await next_message(demux) is None
        demux.return_to_library()
        assert (await why(websocket))[0] == 1006
        with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
            await send_message(demux, b"hello?")


@pytest.mark.parametrize("side", SIDES)
async def test_a_stream_that_fails_is_the_end(side: str) -> None:
    ours, theirs = memory_pair()
    async with open_demux(side, stream=ours, peer_stream=theirs) as (demux, websocket, peer):
        await peer.send(BytesMessage(b"never heard"))
        ours.fail()
        assert await next_message(demux) is None
        demux.return_to_library()
        assert (await why(websocket))[0] == 1006


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("cut", [1, 3, 9, 700, 1250])
async def test_a_close_frame_is_received_after_the_link_has_stopped_receiving(
    side: str, place: str, pieces: int, cut: int
) -> None:
    async with open_demux(side, place=place) as (demux, websocket, peer):
        if pieces == 1:
            by_peer = peer.frames(BytesMessage(bytes(1500)))
        else:
            by_peer = peer.frames(BytesMessage(bytes(600), message_finished=False), BytesMessage(bytes(900)))
        await peer.stream.send_all(by_peer[:cut])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(demux.receive)
                await wait_all_tasks_blocked()
                scope.cancel()
        demux.return_to_library()
        demux.return_to_library()
        async with trio.open_nursery() as nursery:
            with trio.fail_after(5):
                nursery.start_soon(websocket.aclose, 1000, "enough")
                (close,) = await peer.hear_of(CloseConnection)
                assert close.reason == "enough"
                await peer.stream.send_all(by_peer[cut:] + peer.frames(CloseConnection(1000, "you too")))
        # It was heard, and not just the end of the connection.
        assert websocket.closed is not None
        assert (websocket.closed.code, websocket.closed.reason) == (1000, "you too")


async def test_what_is_not_a_frame_is_an_error_and_the_library_is_not_left_waiting() -> None:
    async with open_demux("accepted") as (demux, websocket, peer):
        await peer.stream.send_all(b"\xff" * 20)
        with pytest.raises(ProtocolError):
            await next_message(demux)
        demux.return_to_library()
        with trio.fail_after(5), pytest.raises(ConnectionClosed):
            await websocket.get_message()
