"""A node for tests of the gateway and the admin application: the HTTP server on loopback, and scripted backends."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx
import openai
import patience
import trio

from trio_cluster.accounts.accounts import open_accounts
from trio_cluster.admin.app import create_app, put_gateway_in_front
from trio_cluster.core.answer import Data, Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.model import ChatModelOptions, Kind, ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.core.status import WorkerStatus
from trio_cluster.errors import ApiError
from trio_cluster.gateway.access_log import RefusedRequests
from trio_cluster.gateway.node_context import NodeContext
from trio_cluster.http1.server import serve_http
from trio_cluster.hypercorn_server.server import serve_http as serve_with_hypercorn
from trio_cluster.net.streams import TcpListener
from trio_cluster.options import ClusterServerOptions, ServerOptions
from trio_cluster.routing.health import Health
from trio_cluster.routing.router import Router

# No proxies, and no tenth of a second for each client to load the certificates of all authorities.
_NO_TLS: dict[str, Any] = {"trust_env": False, "verify": False}

EVENTS = "text/event-stream"
PLAIN = b'{"object": "chat.completion", "choices": []}'
#: The state of some worker.
WORKER = WorkerStatus(
    id="w1",
    instance="abc",
    address="10.0.0.1:5000",
    state="ok",
    draining=False,
    stalled="",
    models=["m"],
    running=1,
    waiting=0,
    capacity=10,
    in_flight=1,
    lag=0.0,
    connected_for=1.5,
    admitted="token",
)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}


class Served:
    """A call as its backend sees it."""

    def __init__(self, request: Request, name: str = "local") -> None:
        self.request = request
        self.cancelled = trio.Event()
        self.taken = 0
        self.call = Call(request, served_by=name, on_cancel=self._on_cancel, on_consumed=self._on_taken)
        self.reason: str | None = None

    def _on_cancel(self, reason: str) -> None:
        self.reason = reason
        self.cancelled.set()
        self.call.release()

    def _on_taken(self, count: int) -> None:
        self.taken += count

    def head(self, content_type: str = "application/json", status: int = 200) -> Served:
        self.call.put(Head(status, content_type))
        return self

    def data(self, data: bytes) -> Served:
        self.call.put(Data(data))
        return self

    def event(self, text: str) -> Served:
        return self.data(b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % text.encode())

    def done(self) -> None:
        self.call.put(Done())
        self.call.release()

    def fail(self, error: ApiError, *, retryable: bool = False) -> None:
        self.call.put(Failed(error, retryable))
        self.call.release()

    async def wait_cancelled(self) -> str | None:
        with patience.fail_after(2):
            await self.cancelled.wait()
        return self.reason


class Backend:
    """A backend that runs ``script`` when a call is opened, synchronously, and passes the calls to the test."""

    def __init__(self, script: Callable[[Served], None] | None = None, name: str = "local") -> None:
        self.script = script
        self.name = name
        self.load = 0.0
        self.health = Health()
        self._send, self._receive = trio.open_memory_channel[Served](10_000)

    def open(self, request: Request) -> Call:
        served = Served(request, self.name)
        self._send.send_nowait(served)
        if self.script is not None:
            self.script(served)
        return served.call

    async def next(self) -> Served:
        """Return the next call that was opened."""
        with patience.fail_after(2):
            return await self._receive.receive()

    def opened(self) -> int:
        return self._receive.statistics().current_buffer_used


def plain(served: Served) -> None:
    served.head().data(PLAIN).done()


@attrs.define
class HttpNode:
    """The node under test."""

    node_context: NodeContext
    port: int
    backend: Backend
    app: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def router(self) -> Router:
        return self.node_context.router

    def add(self, name: str, kind: Kind = "chat", backend: Backend | None = None, **options: Any) -> None:
        info = ModelInfo(name, kind, options=ChatModelOptions(**options))
        self.router.catalog.add(info, backend or self.backend, replicate=True)

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=5, **(_NO_TLS | options))

    def openai(self, key: str = "k") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=f"{self.url}/v1",
            max_retries=0,
            http_client=httpx.AsyncClient(timeout=5, **_NO_TLS),
        )

    @asynccontextmanager
    async def connect(self, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
        sock = trio.socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        stream = trio.SocketStream(sock)
        try:
            yield Wire(stream)
        finally:
            sock.close()

    async def post(self, body: Mapping[str, Any] = CHAT, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post("/v1/chat/completions", json=body, **options)


@attrs.frozen
class Answer:
    """A response as it stood on the wire. A body that was cut off is one that is not ``whole``."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    @property
    def error(self) -> dict[str, Any]:
        whole = json.loads(self.body)
        error: dict[str, Any] = whole["error"]
        if whole.get("type") == "error":
            # That of the Messages API.
            assert set(whole) == {"type", "error", "request_id"}
            error = {"param": None} | error
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Wire:
    """A client's end of a connection, byte by byte."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        with trio.fail_after(5):
            await self.stream.send_all(data)

    async def request(self, method: str, path: str, body: bytes | None = None, *headers: str) -> None:
        await self.send(raw_request(method, path, body, *headers))

    async def receive(self) -> bool:
        with trio.fail_after(5):
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                data = b""
        self._buffer += data
        return bool(data)

    async def until(self, mark: bytes) -> bytes:
        """Return everything up to and including ``mark``; fail if the connection ends before."""
        while mark not in self._buffer:
            assert await self.receive(), f"no {mark!r} in {bytes(self._buffer)!r}"
        end = self._buffer.index(mark) + len(mark)
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        return data

    async def closed(self) -> bool:
        """Wait until the other side closes; whether nothing more came before that."""
        while await self.receive():
            pass
        return not self._buffer

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of one response."""
        lines = (await self.until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {}
        for line in lines[1:-2]:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes | None:
        """Read one chunk; empty for the last one, and ``None`` if the connection ends without it."""
        while b"\r\n" not in self._buffer:
            if not await self.receive():
                return None
        size = int((await self.until(b"\r\n"))[:-2], 16)
        while len(self._buffer) < size + 2:
            assert await self.receive(), "cut in the middle of a chunk"
        chunk = bytes(self._buffer[:size])
        del self._buffer[: size + 2]
        return chunk

    async def answer(self, *, bodiless: bool = False) -> Answer:
        """Read one response."""
        status, headers = await self.head()
        if bodiless:
            return Answer(status, headers, b"", True)
        if "content-length" in headers:
            length = int(headers["content-length"])
            while len(self._buffer) < length:
                assert await self.receive()
            body = bytes(self._buffer[:length])
            del self._buffer[:length]
            return Answer(status, headers, body, True)
        if headers.get("transfer-encoding") == "chunked":
            chunks = []
            while chunk := await self.chunk():
                chunks.append(chunk)
            return Answer(status, headers, b"".join(chunks), chunk is not None)
        while await self.receive():
            pass
        return Answer(status, headers, bytes(self._buffer), True)


def raw_request(method: str, path: str, body: bytes | None = None, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
        lines.append("Content-Type: application/json")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")


class Turns(trio.abc.Instrument):
    """Counts, within a ``with`` block, how often any task has had its turn."""

    def __init__(self) -> None:
        self.now = 0

    def __enter__(self) -> Turns:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.now += 1


def listening_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(100)
    return sock


def listener(sock: socket.socket) -> TcpListener:
    return TcpListener(sock)


@asynccontextmanager
async def open_http_node(
    script: Callable[[Served], None] | None = plain, *, database: str | Path | None = None, **server: Any
) -> AsyncIterator[HttpNode]:
    """Serve a node with one chat model ``m``, whose backend runs ``script`` for each call."""
    node_context = NodeContext(
        Router(), ClusterServerOptions(server=ServerOptions(**server)), "node-1", "standalone"
    )
    async with AsyncExitStack() as stack:
        if database is not None:
            node_context.accounts = await stack.enter_async_context(
                open_accounts(database, node_context.audit, node_context.router.observers, lambda: 90)
            )
        node = await stack.enter_async_context(_open(node_context, script))
        yield node


@asynccontextmanager
async def _open(
    node_context: NodeContext, script: Callable[[Served], None] | None
) -> AsyncIterator[HttpNode]:
    app = put_gateway_in_front(create_app(node_context), node_context)
    sock = listening_socket()
    node = HttpNode(node_context, sock.getsockname()[1], Backend(script), app)
    node.add("m")
    async with trio.open_nursery() as nursery:
        serve: Callable[..., Awaitable[None]] = partial(
            serve_http, render_refusal=RefusedRequests(node_context.options).render
        )
        if node_context.options.server.http == "hypercorn":
            serve = serve_with_hypercorn
        await nursery.start(serve, app, [listener(sock)])
        if node_context.accounts is not None:
            nursery.start_soon(node_context.accounts.run)
        yield node
        nursery.cancel_scope.cancel()
