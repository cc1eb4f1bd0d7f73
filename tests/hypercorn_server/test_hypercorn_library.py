"""What the package assumes of hypercorn, held against the installed version; see ``hypercorn_server/library.py``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import h2.exceptions
import pytest
import trio
from http2_client import Http2Client
from memory_streams import MemoryStream, memory_pair
from trio.testing import wait_all_tasks_blocked

from trio_cluster.hypercorn_server.library import (
    Config,
    ConnectionState,
    TCPServer,
    WorkerContext,
    count_streams,
    http2_stream,
)

GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"
App = Callable[..., Awaitable[None]]


class Socket:
    family = 2

    def getpeername(self) -> tuple[str, int]:
        return "client", 1

    def getsockname(self) -> tuple[str, int]:
        return "server", 2


class Stream:
    """A stream that has nothing but what hypercorn is assumed to use."""

    def __init__(self, stream: MemoryStream) -> None:
        self.socket = Socket()
        self.receive_some = stream.read
        self.send_all = stream.write
        self.send_eof = stream.write_eof
        self.aclose = stream.aclose


class Server:
    """hypercorn on one connection in memory, and its client."""

    def __init__(self, nursery: trio.Nursery, app: App) -> None:
        ours, self.client = memory_pair()
        config = Config()
        # With a name, the library would give that logger a handler and a level, for the whole process.
        config.errorlog = logging.getLogger("hypercorn.error")
        self.context = WorkerContext(None)
        self.over = trio.Event()
        self.hypercorn = TCPServer(
            app,  # type: ignore[arg-type]
            config,
            self.context,
            ConnectionState({"a": "state"}),
            Stream(ours),  # type: ignore[arg-type]
        )
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        await self.hypercorn.run()
        self.over.set()

    async def http2(self) -> Http2Client:
        client = Http2Client(self.client, window=65535)  # type: ignore[arg-type]
        await client.send()
        return client


@pytest.fixture
def serve(nursery: trio.Nursery) -> Callable[[App], Server]:
    return partial(Server, nursery)


async def answer(send: Any, body: bytes = b"hello", *, more: bool = False) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def test_a_connection_needs_no_more_of_its_stream_than_is_listed(serve: Any) -> None:
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        scopes.append((scope, len(rest)))
        await answer(send)

    server = serve(app)
    await server.client.write(GET)
    await wait_all_tasks_blocked()
    received = server.client.read_nowait(1 << 16)
    assert received.startswith(b"HTTP/1.1 200")
    assert received.endswith(b"5\r\nhello\r\n0\r\n\r\n")
    ((scope, rest),) = scopes
    assert (scope["http_version"], scope["client"], scope["server"]) == ("1.1", ("client", 1), ("server", 2))
    assert (scope["scheme"], scope["state"], rest) == ("http", {"a": "state"}, 2)
    server.client.close()
    await wait_all_tasks_blocked()
    # It goes on waiting for the end of its idle time, which is why a connection that is over is ended from outside.
    assert not server.over.is_set()
    await server.context.terminated.set()
    with trio.fail_after(5):
        await server.over.wait()


async def test_a_disconnect_is_received_when_the_client_leaves_and_when_the_answer_has_ended(
    serve: Any,
) -> None:
    received: list[str] = []

    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        if scope["path"] == "/answered":
            await answer(send)
        while "http.disconnect" not in received:
            received.append((await receive())["type"])

    for path, leaves in ((b"/x", True), (b"/answered", False)):
        received.clear()
        server = serve(app)
        await server.client.write(GET.replace(b"/x", path))
        await wait_all_tasks_blocked()
        if leaves:
            assert received == ["http.request"]
            server.client.close()
        await wait_all_tasks_blocked()
        assert received == ["http.request", "http.disconnect"]


async def test_idle_connections_close_when_the_context_is_terminated(serve: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        await go.wait()
        await answer(send)

    idle, busy, go = serve(app), serve(app), trio.Event()
    await busy.client.write(GET)
    await wait_all_tasks_blocked()
    for server in (idle, busy):
        await server.context.terminated.set()
    await wait_all_tasks_blocked()
    assert idle.over.is_set()
    assert not busy.over.is_set()
    go.set()
    await wait_all_tasks_blocked()
    assert busy.over.is_set()
    assert b"hello" in busy.client.read_nowait(1 << 16)


class Buffer:
    """A stream's buffer that writes down how it is used."""

    def __init__(self) -> None:
        self.used: list[Any] = []
        self.data = b""
        self.closed = False

    async def push(self, data: bytes) -> None:
        self.used.append(("push", data))
        self.data += data

    async def pop(self, limit: int) -> bytes:
        self.used.append("pop")
        assert limit > 0
        if self.closed:
            raise h2.exceptions.StreamClosedError(0)
        data, self.data = self.data, b""
        return data

    def set_complete(self) -> None:
        self.used.append("set_complete")

    async def drain(self) -> None:
        self.used.append("drain")
        await trio.testing.wait_all_tasks_blocked()

    @property
    def complete(self) -> bool:
        self.used.append("complete")
        return "set_complete" in self.used and not self.data

    async def close(self) -> None:
        self.used.append("close")


async def test_a_stream_of_http2_can_be_given_another_buffer(serve: Any) -> None:
    buffer = Buffer()

    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        protocol, number = http2_stream(send)
        protocol.stream_buffers[number] = buffer
        await answer(send)

    client = await serve(app).http2()
    result = await client.answer(await client.ask("GET", "/"))
    assert (result.body, result.ended) == (b"hello", True)
    used = buffer.used
    assert used[0] == ("push", b"hello")
    assert used.index("set_complete") < used.index("drain")
    # Asked after each piece; the end is written when the answer is yes, and nothing is asked after that.
    assert used[-1] == "complete"
    assert used.count("complete") == used.count("pop") >= 1
    assert set(map(str, used[1:])) <= {"pop", "complete", "set_complete", "drain"}


async def test_a_stream_whose_buffer_is_closed_is_forgotten_by_the_writer(serve: Any) -> None:
    made: list[Any] = []
    buffer = Buffer()

    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        protocol, number = http2_stream(send)
        made.append((protocol, number))
        protocol.stream_buffers[number] = buffer
        await answer(send, more=True)
        await trio.sleep_forever()

    client = await serve(app).http2()
    number = await client.ask("GET", "/")
    await client.until(number, b"hello")
    await wait_all_tasks_blocked()
    ((protocol, number),) = made
    buffer.closed = True
    protocol.priority.unblock(number)
    await protocol.has_data.set()
    await wait_all_tasks_blocked()
    assert buffer.used[-2:] == ["pop", "close"]
    assert protocol.stream_buffers == {}


async def test_why_another_buffer_is_needed(serve: Any) -> None:
    """When this fails, hypercorn has backpressure of its own, and ours may go."""
    pushed = 0

    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        nonlocal pushed
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
            pushed += 100_000

    client = Http2Client(serve(app).client, window=1000)
    await client.send()
    client.grants = False
    await client.ask("GET", "/")
    with trio.move_on_after(1):
        await wait_all_tasks_blocked()
    assert pushed == 10_000_000


async def test_streams_are_counted_before_their_tasks_begin(serve: Any) -> None:
    counts: list[tuple[int, int]] = []
    may_end = trio.Event()

    async def app(scope: Any, receive: Any, send: Any, *rest: Any) -> None:
        counts.append((len(counts) + 1, count_streams(server.hypercorn)))
        await may_end.wait()
        await answer(send)

    server = serve(app)
    assert count_streams(server.hypercorn) == 0
    client = await server.http2()
    numbers = [await client.ask("GET", "/") for _ in range(3)]
    await wait_all_tasks_blocked()
    assert len(counts) == count_streams(server.hypercorn) == 3
    assert all(begun <= counted for begun, counted in counts)
    may_end.set()
    for number in numbers:
        assert (await client.answer(number)).ended
    assert count_streams(server.hypercorn) == 3


def test_the_methods_that_a_buffer_must_have() -> None:
    from hypercorn.protocol.h2 import StreamBuffer

    from trio_cluster.hypercorn_server.http2 import BoundedBuffer

    public = {name for name, _ in inspect.getmembers(StreamBuffer) if not name.startswith("_")}
    assert public <= {name for name, _ in inspect.getmembers(BoundedBuffer)}
