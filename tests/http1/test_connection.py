"""The connection itself, with an application of a few lines behind it and no gate."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import attrs
import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st
from memory_streams import memory_pair
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.gateway.response import render_refusal
from trio_cluster.http1.connection import UNREAD, Http1Connection
from trio_cluster.http1.parser import HEAD_LIMIT
from trio_cluster.net.idle import IdleTimeout
from trio_cluster.net.readers import Reader, SharedReader, TaskReader, has_epoll
from trio_cluster.net.streams import TcpStream
from trio_cluster.testing import SimulatedNetwork

App = Callable[[Any, Any, Any], Awaitable[None]]

IDLE = 75.0
#: Bytes that the kernel, or what takes its place, keeps of one direction of a connection, at most.
KERNEL = 512 * 1024


async def whole_body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message["body"]
        if not message["more_body"]:
            return body


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what was asked, in one piece."""
    body = await whole_body(receive)
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"x-method", scope["method"].encode())]}
    )
    await send({"type": "http.response.body", "body": scope["path"].encode() + b"|" + body})


async def drip(scope: Any, receive: Any, send: Any) -> None:
    """Answer in three pieces."""
    await whole_body(receive)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in (b"one", b"two"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"three"})


class SocketClient:
    """The client's end of a TCP connection, with what the simulated one has."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.stream = trio.SocketStream(sock)
        self.send_all = self.stream.send_all
        self.send_eof = self.stream.send_eof
        self.receive_some = self.stream.receive_some

    def close(self, *, reset: bool = False) -> None:
        if reset:
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()


async def memory() -> tuple[Any, Any]:
    """Return the two ends of a connection, the client's first."""
    network = SimulatedNetwork()
    (listener,) = await network.host("server").listen("server", 80)
    client = await network.host("client").connect("server", 80)
    return client, await listener.accept()


async def sockets() -> tuple[Any, Any]:
    """Return the two ends of a connection through the kernel, which keeps little."""
    with trio.socket.socket() as listening:
        await listening.bind(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL // 8)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL // 8)
        listening.listen()
        client = trio.socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL // 8)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL // 8)
        await client.connect(listening.getsockname())
        return SocketClient(client), TcpStream(trio.SocketStream((await listening.accept())[0]))


@attrs.frozen
class Way:
    """What a connection is, and how it is read."""

    ends: Callable[[], Awaitable[tuple[Any, Any]]]
    reader: Callable[[trio.Nursery], Reader]

    @asynccontextmanager
    async def __call__(self, app: App) -> AsyncIterator[tuple[Any, Http1Connection]]:
        """Give the client's end of a connection that is being served."""
        client, stream = await self.ends()
        async with trio.open_nursery() as nursery:
            reader, idle = self.reader(nursery), IdleTimeout(IDLE)
            nursery.start_soon(reader.run)
            nursery.start_soon(idle.run)
            connection = Http1Connection(stream, app, {}, reader, idle, render_refusal)
            nursery.start_soon(connection.serve)
            yield client, connection
            nursery.cancel_scope.cancel()
        client.close()


@pytest.fixture(
    params=[
        pytest.param(Way(memory, TaskReader), id="memory"),
        pytest.param(Way(sockets, TaskReader), id="a task for each socket"),
        pytest.param(
            Way(sockets, lambda _: SharedReader()),
            id="one task for all sockets",
            marks=pytest.mark.skipif(not has_epoll(), reason="the system has no epoll"),
        ),
    ]
)
def connected(request: pytest.FixtureRequest) -> Way:
    way: Way = request.param
    return way


async def everything(client: Any) -> bytes:
    data = b""
    with trio.fail_after(1000):
        while piece := await client.receive_some():
            data += piece
    return data


def without_dates(data: bytes) -> list[bytes]:
    return [line for line in data.split(b"\r\n") if not line.startswith(b"date:")]


GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


async def test_requests_that_are_pipelined_are_answered_in_their_order(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(GET + POST + CHUNKED + LAST)
        data = await everything(client)
    assert data.count(b"HTTP/1.1 200 OK\r\n") == 4
    positions = [data.index(part) for part in (b"/a|", b"/p|hello", b"/c|hello", b"/last|")]
    assert positions == sorted(positions)


@given(cuts=st.lists(st.integers(1, 40), max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_how_the_bytes_arrive_makes_no_difference(cuts: list[int], connected: Way) -> None:
    requests = POST + CHUNKED + GET + LAST

    async def ask(pieces: list[bytes]) -> bytes:
        async with connected(echo) as (client, _):
            for piece in pieces:
                await client.send_all(piece)
                await wait_all_tasks_blocked()
            return await everything(client)

    pieces, left = [], requests
    for cut in cuts:
        pieces.append(left[:cut])
        left = left[cut:]
    at_once = trio.run(ask, [requests])
    in_pieces = trio.run(ask, [piece for piece in [*pieces, left] if piece])
    assert without_dates(in_pieces) == without_dates(at_once)


async def test_an_answer_in_one_piece_has_its_length_and_is_one_write(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(GET)
        data = await client.receive_some()
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-length: 3" in head
    assert body == b"/a|"


async def test_an_answer_in_pieces_is_chunked(connected: Way) -> None:
    async with connected(drip) as (client, _):
        await client.send_all(LAST)
        data = await everything(client)
    assert b"transfer-encoding: chunked" in data
    assert data.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n")


async def test_http_1_0_gets_no_chunks_and_the_end_of_the_connection(connected: Way) -> None:
    async with connected(drip) as (client, _):
        await client.send_all(b"GET / HTTP/1.0\r\n\r\n")
        data = await everything(client)
    assert b"chunked" not in data
    assert data.endswith(b"\r\n\r\nonetwothree")


async def test_head_is_answered_without_a_body(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(b"HEAD /h HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = await everything(client)
    assert data.endswith(b"\r\n\r\n")


async def test_an_answer_that_the_application_does_not_end_is_not_ended_here(connected: Way) -> None:
    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async with connected(breaks_off) as (client, _):
        await client.send_all(GET + GET)
        data = await everything(client)
    assert data.endswith(b"4\r\nhalf\r\n")


async def test_a_client_is_told_to_go_on_when_its_body_is_wanted_and_not_before(connected: Way) -> None:
    asked = trio.Event()

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        await asked.wait()
        await echo(scope, receive, send)

    async with connected(patient) as (client, _):
        await client.send_all(
            b"POST /p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
        )
        with trio.move_on_after(0.05) as early:
            await client.receive_some()
        assert early.cancelled_caught
        asked.set()
        assert await client.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send_all(b"ok")
        assert (await everything(client)).endswith(b"/p|ok")


@pytest.mark.parametrize(
    "how", ["close", "half-close", "reset", "close after a stray byte", "close after a pipelined request"]
)
async def test_a_client_that_leaves_is_noticed_at_once_whatever_the_application_does(
    how: str, connected: Way
) -> None:
    cancelled = trio.Event()

    async def hangs(scope: Any, receive: Any, send: Any) -> None:
        await whole_body(receive)
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with connected(hangs) as (client, connection):
        await client.send_all(POST)
        if "stray" in how:
            await client.send_all(b"\r\n")
        if "pipelined" in how:
            await client.send_all(GET)
        await wait_all_tasks_blocked()
        if how == "half-close":
            await client.send_eof()
        else:
            client.close(reset=how == "reset")
        await wait_all_tasks_blocked()
        assert cancelled.is_set()
        assert connection.gone


async def test_a_client_that_does_not_read_holds_up_its_own_writer_only_until_it_leaves(
    connected: Way,
) -> None:
    written = 0

    async def torrent(scope: Any, receive: Any, send: Any) -> None:
        nonlocal written
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(10_000), "more_body": True})
            written += 1

    async with connected(torrent) as (client, connection):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        stuck = written
        assert 0 < stuck < 100
        client.close()
        await wait_all_tasks_blocked()
        assert connection.gone
        assert written == stuck


async def test_an_application_that_does_not_take_a_body_slows_the_client_down(connected: Way) -> None:
    take = trio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await take.wait()
        await echo(scope, receive, send)

    size, sent = 4_000_000, 0
    async with connected(slow) as (client, _), trio.open_nursery() as nursery:
        await client.send_all(
            b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size
        )

        async def upload() -> None:
            nonlocal sent
            for _ in range(size // 1000):
                await client.send_all(bytes(1000))
                sent += 1000

        nursery.start_soon(upload)
        await wait_all_tasks_blocked()
        # What may wait here, one read more, and what the network takes.
        assert sent <= UNREAD + 64 * 1024 + KERNEL + 1000
        take.set()
        assert len((await everything(client)).partition(b"\r\n\r\n")[2]) == size + 2


async def test_an_application_that_ignores_a_body_that_has_come_keeps_the_connection(connected: Way) -> None:
    async def ignores(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async with connected(ignores) as (client, _):
        await client.send_all(POST + LAST)
        assert (await everything(client)).count(b"fine") == 2


@pytest.mark.parametrize(
    ("rubbish", "status"),
    [
        (b"rubbish\r\n\r\n", 501),
        (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ],
)
async def test_what_is_not_http_1_1_is_refused_with_an_envelope_after_what_came_before(
    rubbish: bytes, status: int, connected: Way
) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        await client.send_all(rubbish)
        await wait_all_tasks_blocked()
        data = await client.receive_some()
        await client.send_eof()
        data += await everything(client)
    assert data.startswith(b"HTTP/1.1 200 OK")
    assert b"HTTP/1.1 %d " % status in data
    assert b'{"error":' in data
    assert b"x-request-id:" in data


UPGRADE = b"POST /u HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
    ],
)
async def test_an_upgrade_that_is_not_taken_is_a_request_with_its_body(rest: bytes, connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(UPGRADE + rest[:-3])
        await wait_all_tasks_blocked()
        await client.send_all(rest[-3:] + LAST)
        data = await everything(client)
    assert data.index(b"/u|hello") < data.index(b"/last|")


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (
            b"POST /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            501,
        ),
        (b"GET /x HTTP/1.1\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    ],
)
async def test_after_a_refusal_nothing_is_parsed_any_more(
    refused: bytes, status: int, connected: Way
) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(GET + refused + POST + LAST)
        await wait_all_tasks_blocked()
        data = await client.receive_some()
        await client.send_eof()
        data += await everything(client)
    assert data.startswith(b"HTTP/1.1 200 OK")
    assert data.count(b"HTTP/1.1 ") == 2
    assert data.index(b"/a|") < data.index(b"HTTP/1.1 %d " % status)


async def test_trailers_change_nothing(connected: Way) -> None:
    seen: list[Any] = []

    async def look(scope: Any, receive: Any, send: Any) -> None:
        await echo(scope, receive, send)
        seen.extend(scope["headers"])

    async with connected(look) as (client, _):
        trailers = b"Authorization: Bearer k\r\nX-A: b\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
        await client.send_all(CHUNKED[:-2] + trailers + LAST)
        data = await everything(client)
    assert data.count(b"HTTP/1.1 200 OK") == 2
    assert {name for name, _ in seen} == {b"host", b"transfer-encoding", b"connection"}


async def test_a_byte_behind_a_trailer_does_not_cancel_the_answer(connected: Way) -> None:
    go = trio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await echo(scope, receive, send)

    async with connected(waits) as (client, _):
        await client.send_all(CHUNKED[:-2] + b"Connection: close\r\n\r\nG")
        await wait_all_tasks_blocked()
        go.set()
        assert b"/c|hello" in await client.receive_some()


async def test_http_1_0_is_not_told_to_continue(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(b"POST /p HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        await wait_all_tasks_blocked()
        await client.send_all(b"ok")
        data = await everything(client)
    assert data.startswith(b"HTTP/1.1 200 OK")
    assert data.endswith(b"/p|ok")


async def test_http_1_0_with_chunks_ends_its_connection(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(CHUNKED.replace(b"1.1\r\n", b"1.0\r\nConnection: keep-alive\r\n") + GET)
        data = await everything(client)
    assert data.count(b"HTTP/1.1 200 OK") == 1
    assert b"connection: close" in data


async def test_an_answer_without_content_has_no_length(connected: Way) -> None:
    async def no_content(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": [(b"Content-Length", b"4")]})
        await send({"type": "http.response.body", "body": b"four"})

    async with connected(no_content) as (client, _):
        await client.send_all(LAST)
        data = await everything(client)
    assert b"ontent-length" not in data.lower()
    assert data.endswith(b"\r\n\r\n")


async def test_a_refusal_has_the_request_id_that_the_client_has_sent(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(
            b"POST / HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
        )
        data = await client.receive_some()
    assert data.startswith(b"HTTP/1.1 501 ")
    assert b"x-request-id: mine\r\n" in data


async def test_a_head_that_goes_on_and_on_is_refused(connected: Way) -> None:
    async with connected(echo) as (client, _):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n")
        for number in range(HEAD_LIMIT // 1000 + 2):
            await client.send_all(b"X-%d: %s\r\n" % (number, b"a" * 990))
            await wait_all_tasks_blocked()
        data = await client.receive_some()
    assert data.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: x", GET])
async def test_an_idle_connection_is_closed_in_the_end(
    autojump_clock: MockClock, said: bytes, connected: Way
) -> None:
    async with connected(echo) as (client, _):
        start = trio.current_time()
        if said:
            await client.send_all(said)
        await everything(client)
        assert trio.current_time() - start == pytest.approx(IDLE)


async def test_a_slow_answer_is_not_idle(autojump_clock: MockClock, connected: Way) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(10 * IDLE)
        await echo(scope, receive, send)

    async with connected(slow) as (client, _):
        await client.send_all(LAST)
        assert (await everything(client)).endswith(b"/last|")


async def test_a_request_that_came_early_does_not_make_its_connection_idle(
    autojump_clock: MockClock, connected: Way
) -> None:
    async def slow_at_last(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/last":
            await trio.sleep(10 * IDLE)
        await echo(scope, receive, send)

    async with connected(slow_at_last) as (client, _):
        await client.send_all(GET + LAST)
        assert (await everything(client)).endswith(b"/last|")


async def test_a_connection_that_is_to_close_when_idle_finishes_its_answer_and_takes_no_more(
    connected: Way,
) -> None:
    go = trio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await echo(scope, receive, send)

    async with connected(waits) as (client, connection):
        await client.send_all(GET)
        await wait_all_tasks_blocked()
        connection.close_when_idle()
        await client.send_all(GET)
        # What is still unread when a connection is closed makes a reset of it.
        await wait_all_tasks_blocked()
        go.set()
        data = await everything(client)
    assert data.count(b"HTTP/1.1 200 OK") == 1
    assert b"connection: close" in data


async def test_a_write_that_the_application_cancels_ends_the_connection(connected: Way) -> None:
    async def gives_up(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.move_on_after(0.01):
            while True:
                await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
        await send({"type": "http.response.body", "body": b"the end"})

    async with connected(gives_up) as (client, _):
        await client.send_all(GET + GET)
        await wait_all_tasks_blocked(0.05)
        data = await everything(client)
    assert data.count(b"HTTP/1.1 200 OK") == 1
    assert b"the end" not in data


async def test_a_connection_that_is_closed_while_it_is_not_being_read_ends_quietly(connected: Way) -> None:
    done = trio.Event()

    async def takes_nothing(scope: Any, receive: Any, send: Any) -> None:
        await done.wait()

    async def push(data: bytes) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await client.send_all(data)

    async with connected(takes_nothing) as (client, connection), trio.open_nursery() as nursery:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (8 * UNREAD)
        nursery.start_soon(push, head + bytes(4 * UNREAD))
        with trio.fail_after(5):
            await wait_all_tasks_blocked()
            assert connection._parser.unread > UNREAD
            # As the gateway does with an answer that must not be taken for a complete one.
            connection.reset()
            done.set()
            with suppress(trio.BrokenResourceError):
                assert await client.receive_some() == b""


async def test_a_piece_that_may_be_dropped_is_if_the_client_has_not_read_what_was_sent_before(
    nursery: trio.Nursery,
) -> None:
    client, stream = memory_pair()
    go_on = trio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"two"})

    reader = TaskReader(nursery)
    connection = Http1Connection(stream, app, {}, reader, IdleTimeout(IDLE), render_refusal)
    nursery.start_soon(reader.run)
    nursery.start_soon(connection.serve)
    await client.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    await wait_all_tasks_blocked()
    stream.held = True
    assert connection.send_nowait(b"dropped", droppable=True)
    assert connection.ready
    stream.held = False
    assert connection.send_nowait(b"sent", droppable=True)
    stream.at_once = 3
    # Of a piece that has begun, the rest has to follow.
    assert not connection.send_nowait(b"half", droppable=True)
    assert not connection.ready
    stream.at_once = 1 << 30
    go_on.set()
    await wait_all_tasks_blocked()
    received = client.read_nowait(1 << 16).partition(b"\r\n\r\n")[2]
    assert received == b"".join(
        b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (b"one", b"sent", b"half", b"two", b"")
    )
    nursery.cancel_scope.cancel()
