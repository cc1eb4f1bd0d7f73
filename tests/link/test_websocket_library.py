"""The installed trio-websocket does what ``trio_cluster/link/websocket.py`` assumes without its being documented.

Each test is one item of the list in that module's docstring, and tests the library alone, against a peer made of
wsproto. What breaks here after an upgrade names the library, its version and the assumption.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import Any

import attrs
import pytest
import trio
import wsproto
from trio.testing import memory_stream_pair, wait_all_tasks_blocked
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    wrap_client_stream,
    wrap_server_stream,
)
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Pong,
    RejectConnection,
    RejectData,
    Request,
)
from wsproto.frame_protocol import FrameDecoder, FrameProtocol

#: Seconds that the library may take for anything it is tested for.
SOON = 5
SIDES = ["client", "server"]


@contextmanager
def assumption(number: int, text: str) -> Iterator[None]:
    """Let whatever goes wrong inside fail the test with a message that names the library and the assumption."""
    try:
        yield
    except Exception as error:
        library = f"trio-websocket {version('trio-websocket')} (on wsproto {version('wsproto')})"
        pytest.fail(
            f"{library} breaks assumption {number} of trio_cluster/link/websocket.py: {text}: {error!r}"
        )


class Nursery:
    """Has ``start_soon`` and nothing else; keeps what was started and how it ended."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.ended = trio.Event()
        self.error: Exception | None = None
        self._nursery = nursery

    def start_soon(self, *args: Any, **kwargs: Any) -> None:
        assert kwargs == {}
        self.started.append(args)
        self._nursery.start_soon(self._run, args[0], args[1:])

    async def _run(self, function: Any, args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        except Exception as error:
            self.error = error
        finally:
            self.ended.set()


class Stream:
    """Has the three methods that are used of a stream and nothing else; keeps what they were given and who called."""

    def __init__(self, stream: Any) -> None:
        self.sent: list[bytes] = []
        self.readers: set[trio.lowlevel.Task] = set()
        self.asked: set[int | None] = set()
        self._stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.readers.add(trio.lowlevel.current_task())
        self.asked.add(max_bytes)
        # All that there is, whatever the limit.
        return bytes(await self._stream.receive_some())

    async def send_all(self, data: bytes) -> None:
        self.sent.append(bytes(data))
        await self._stream.send_all(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


@attrs.define(eq=False)
class Session:
    """The library at one end of a connection, and a peer at the other."""

    nursery: Nursery
    stream: Stream
    peer: trio.abc.Stream
    protocol: wsproto.WSConnection
    connection: WebSocketConnection | None = None
    opened: trio.Event = attrs.field(factory=trio.Event)

    @property
    def websocket(self) -> WebSocketConnection:
        assert self.connection is not None
        return self.connection

    async def open(self) -> None:
        """Perform the library's half of the opening handshake."""
        shim: Any = self.nursery
        stream: Any = self.stream
        if self.protocol.client:
            request = await wrap_server_stream(shim, stream)
            self.connection = await request.accept(subprotocol="p")
        else:
            self.connection = await wrap_client_stream(shim, stream, "host", "/path", subprotocols=["p"])
        self.opened.set()

    def head(self) -> bytes:
        """Return the peer's half of the opening handshake."""
        if self.protocol.client:
            return self.protocol.send(Request(host="host", target="/path", subprotocols=["p"]))
        return self.protocol.send(AcceptConnection(subprotocol="p"))

    def frames(self) -> FrameProtocol:
        """Return an encoder of the peer's frames."""
        return FrameProtocol(client=self.protocol.client, extensions=[])

    async def send(self, *data: bytes | bytearray) -> None:
        await self.peer.send_all(b"".join(data))

    async def events(self, kind: type) -> list[Any]:
        """Return what the peer receives up to an event of this kind."""
        events: list[Any] = []
        while not any(isinstance(event, kind) for event in events):
            self.protocol.receive_data(bytes(await self.peer.receive_some()) or None)
            events += self.protocol.events()
        return events


@asynccontextmanager
async def opening(side: str) -> AsyncIterator[Session]:
    """Begin an opening handshake; the peer has sent nothing yet."""
    ours, theirs = memory_stream_pair()
    kind = wsproto.ConnectionType.SERVER if side == "client" else wsproto.ConnectionType.CLIENT
    failure: Exception | None = None
    async with ours, theirs, trio.open_nursery() as nursery:
        session = Session(Nursery(nursery), Stream(ours), theirs, wsproto.WSConnection(kind))
        nursery.start_soon(session.open)
        try:
            with trio.fail_after(SOON):
                if side == "client":
                    await session.events(Request)
                yield session
        except Exception as error:
            # Raised outside of the nursery, which would put a group around it.
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def opened(side: str) -> AsyncIterator[Session]:
    """Complete an opening handshake."""
    async with opening(side) as session:
        await session.send(session.head())
        if side == "server":
            await session.events(AcceptConnection)
        await session.opened.wait()
        yield session


async def closed_with(session: Session) -> tuple[int, str | None]:
    """Return the code and the reason that ``get_message`` raises."""
    with pytest.raises(ConnectionClosed) as raised:
        await session.websocket.get_message()
    reason = raised.value.reason
    assert reason is not None
    return reason.code, reason.reason


@pytest.mark.parametrize("side", SIDES)
async def test_1_the_nursery_starts_the_reader_and_nothing_else(side: str) -> None:
    with assumption(
        1, "wrap_*_stream call nursery.start_soon(reader) once and use nothing else of the nursery"
    ):
        async with opened(side) as session:
            await session.send(session.frames().ping(b"?"))
            await session.events(Pong)
            await session.send(session.frames().close(1000, "enough"))
            # A client goes on reading until the server has closed the connection.
            await session.peer.aclose()
            await session.nursery.ended.wait()
        ((reader,),) = session.nursery.started
        assert callable(reader)
        assert session.nursery.error is None


@pytest.mark.parametrize("side", SIDES)
async def test_2_the_stream_is_used_through_three_methods(side: str) -> None:
    text = "only receive_some (by the reader), send_all (whole heads and frames) and aclose are used of the stream"
    with assumption(2, text):
        async with opened(side) as session:
            await session.send(session.frames().ping(b"?"))
            await session.events(Pong)
            await session.websocket.send_message(b"x" * 100_000)
            await session.send(session.frames().close(1000, "enough"))
            # A client goes on reading until the server has closed the connection.
            await session.peer.aclose()
            await session.nursery.ended.wait()
            await session.websocket.aclose()
        assert len(session.stream.readers) == 1
        head, *frames = session.stream.sent
        assert head.index(b"\r\n\r\n") == len(head) - 4
        # A pong, a message, and the answer to the close frame.
        assert [opcode(data) for data in frames] == [10, 2, 8]
        for data in frames:
            decoder = FrameDecoder(client=side == "server")
            decoder.receive_bytes(data)
            size = 0
            while (piece := decoder.process_buffer()) is not None:
                size += len(piece.payload)
            assert size == payload_size(data)


def opcode(data: bytes) -> int:
    return data[0] & 15


def payload_size(data: bytes) -> int:
    """Return the size of the payload of the one frame that ``data`` is."""
    short = data[1] & 0x7F
    width = {126: 2, 127: 8}.get(short, 0)
    size = int.from_bytes(data[2 : 2 + width], "big") if width else short
    assert len(data) == 2 + width + (4 if data[1] & 0x80 else 0) + size
    return size


@pytest.mark.parametrize("side", SIDES)
async def test_3_more_bytes_may_be_returned_than_were_asked_for(side: str) -> None:
    with assumption(3, "receive_some may return more bytes than it was asked for"):
        async with opening(side) as session:
            head = session.head()[:-2] + b"x-more: " + b"y" * 12_000 + b"\r\n\r\n"
            await session.send(head)
            await session.opened.wait()
            await session.send(session.frames().send_data(b"z" * 100_000))
            assert await session.websocket.get_message() == b"z" * 100_000
        assert all(asked is not None and asked < 12_000 for asked in session.stream.asked), (
            "nothing was tested"
        )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("newline", [b"\r\n", b"\n"], ids=["CRLF", "LF"])
async def test_4_the_opening_handshake_ends_with_the_first_empty_line(side: str, newline: bytes) -> None:
    with assumption(
        4, "the handshake is complete with the first empty line, after CRLF or LF, without another byte"
    ):
        async with opening(side) as session:
            head = session.head().replace(b"\r\n", newline)
            await session.send(head[:-1])
            await wait_all_tasks_blocked()
            assert not session.opened.is_set()
            await session.send(head[-1:])
            await session.opened.wait()


@pytest.mark.parametrize("side", SIDES)
async def test_5_control_frames_are_answered_without_the_messages_between_them(side: str) -> None:
    with assumption(5, "the reader answers pings and close frames by itself"):
        async with opened(side) as session:
            for payload in (b"one", b"two"):
                await session.send(session.frames().ping(payload))
                (pong,) = await session.events(Pong)
                assert pong.payload == payload
            await session.send(session.frames().close(1001, "going away"))
            (close,) = await session.events(CloseConnection)
            assert close.code == 1001
            await session.peer.aclose()
            await session.nursery.ended.wait()
            assert session.nursery.error is None


async def close(session: Session) -> None:
    await session.send(session.frames().close(1001, "going away"))


async def close_without_reason(session: Session) -> None:
    await session.send(session.frames().close(1000))


async def end_connection(session: Session) -> None:
    await session.peer.aclose()


async def close_stream(session: Session) -> None:
    await session.stream.aclose()


#: How a websocket may end, and what the library has to tell of it.
ENDINGS: list[tuple[Callable[[Session], Awaitable[None]], tuple[int, str | None]]] = [
    (close, (1001, "going away")),
    (close_without_reason, (1000, None)),
    (end_connection, (1006, None)),
    (close_stream, (1006, None)),
]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("end", "expected"), ENDINGS)
async def test_6_waiting_for_a_message_is_waiting_for_the_end(
    side: str, end: Callable[[Session], Awaitable[None]], expected: tuple[int, str | None]
) -> None:
    with assumption(
        6, "get_message waits until the websocket is closed, and raises ConnectionClosed with the reason"
    ):
        async with opened(side) as session:
            await session.send(session.frames().ping(b"?"), session.frames().pong(b"!"))
            with trio.move_on_after(0.05) as waiting:
                await session.websocket.get_message()
            assert waiting.cancelled_caught
            await end(session)
            assert await closed_with(session) == expected


@pytest.mark.parametrize("side", SIDES)
async def test_7_a_message_may_go_on_with_another_key(side: str) -> None:
    with assumption(7, "the frames of a message may have different masking keys, and a key may be zero"):
        async with opened(side) as session:
            if side == "server":
                begun, rest = b"\x02\x83\0\0\0\0one", b"\x80\x83\1\2\3\4" + bytes((116 ^ 1, 119 ^ 2, 111 ^ 3))
            else:
                begun, rest = b"\x02\x03one", b"\x80\x03two"
            await session.send(begun, rest)
            assert await session.websocket.get_message() == b"onetwo"


@pytest.mark.parametrize("side", SIDES)
async def test_8_messages_that_come_while_this_end_closes_are_discarded(side: str) -> None:
    with assumption(
        8, "after aclose has sent its close frame, messages are discarded up to the peer's close frame"
    ):
        async with opened(side) as session, trio.open_nursery() as nursery:
            nursery.start_soon(session.websocket.aclose, 1000, "enough")
            (close,) = await session.events(CloseConnection)
            assert (close.code, close.reason) == (1000, "enough")
            frames = session.frames()
            await session.send(*[frames.send_data(b"crossed it") for _ in range(5)])
            await wait_all_tasks_blocked()
            await session.send(frames.close(1000, "you too"))
        closed = session.websocket.closed
        assert closed is not None
        assert (closed.code, closed.reason) == (1000, "you too")


@pytest.mark.parametrize("side", SIDES)
async def test_9_the_reader_ends_with_a_failed_opening_handshake(side: str) -> None:
    with assumption(9, "the reader task ends when the opening handshake fails"):
        async with opening(side) as session:
            await session.peer.aclose()
            await session.nursery.ended.wait()
            assert session.nursery.error is None
            assert session.connection is None


async def test_9_a_rejected_handshake_is_raised_by_the_reader_with_its_status_and_body() -> None:
    with assumption(9, "the reader raises ConnectionRejected with the status and the complete body"):
        async with opening("client") as session:
            size = [(b"content-length", b"13")]
            protocol = session.protocol
            await session.send(protocol.send(RejectConnection(401, headers=size, has_body=True)))
            await session.send(protocol.send(RejectData(b"no entry", body_finished=False)))
            await wait_all_tasks_blocked()
            assert not session.nursery.ended.is_set()
            await session.send(protocol.send(RejectData(b" here")))
            await session.nursery.ended.wait()
            error = session.nursery.error
            assert isinstance(error, ConnectionRejected)
            assert (error.status_code, error.body) == (401, b"no entry here")
