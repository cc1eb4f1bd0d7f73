"""A master and its workers in one process, joined by memory streams: time and the network belong to the test."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio
from memory_streams import MemoryStream, memory_pair
from trio.testing import wait_all_tasks_blocked

from trio_cluster.cluster.master import WorkerManager
from trio_cluster.cluster.masters import ListedMasters
from trio_cluster.cluster.worker import WorkerClient
from trio_cluster.core.answer import Data, Done, Event, Failed
from trio_cluster.core.call import Call
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.local.handler import HandlerBackend, HandlerPool
from trio_cluster.openai import ChatRequest
from trio_cluster.options import ClusterServerOptions, ServerOptions
from trio_cluster.routing.router import Router


async def echo(request: ChatRequest) -> AsyncIterator[str]:
    for word in request.last_text.split():
        yield word + " "


async def forever(request: ChatRequest) -> AsyncIterator[str]:
    yield "begun"
    await trio.sleep_forever()


def chat_request(model: str = "m", *, stream: bool = True, content: str = "a b c", **fields: Any) -> Request:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "stream": stream}
    return Request(
        endpoint="chat.completions", kind="chat", model=model, body=json.dumps(body).encode(), **fields
    )


class FakeDialer:
    """What a worker dials a master with.

    Args:
        connect: returns a new connection.
        host: what people call the master.
    """

    trust = None
    process: int | None = None

    def __init__(self, connect: Callable[[], Awaitable[Any]], host: str = "master") -> None:
        self.connect = connect
        self.host = self.label = host

    async def run(self) -> None:
        await trio.sleep_forever()


class FakeMachine:
    """The machine of a worker.

    Attributes:
        slept: for how many seconds it was suspended, and has not said so yet.
        looks: how often it was asked for that.
    """

    def __init__(self) -> None:
        self.slept = 0.0
        self.looks = 0
        self._on_changed: Callable[[], None] = lambda: None

    def suspended_for(self) -> float:
        self.looks += 1
        slept, self.slept = self.slept, 0.0
        return slept

    async def watch_addresses(self, on_changed: Callable[[], None]) -> None:
        self._on_changed = on_changed
        await trio.sleep_forever()

    def change_addresses(self) -> None:
        self._on_changed()


class Worker:
    """A worker process, as far as a task can be one."""

    def __init__(self, cluster: MemoryCluster, name: str, **options: Any) -> None:
        self.cluster = cluster
        self.options = ClusterServerOptions(server=ServerOptions(worker_id=name), **options)
        self.router = Router()
        self.pool = HandlerPool(self.options)
        self.shutdown_requests: list[str] = []
        self.machine = FakeMachine()
        self.client = WorkerClient(
            self.router, self.pool, self.options, name, self.shutdown_requests.append, self.machine
        )
        self.registered = trio.Event()
        self.scope = trio.CancelScope()
        self.error: Exception | None = None
        self.over = trio.Event()
        self.streams: list[MemoryStream] = []
        self.dials = 0
        self.way_lost = False
        # How many further connections are reset as soon as they are made.
        self.resets = 0

    def serve(self, name: str, handler: Any) -> None:
        backend = HandlerBackend(ModelInfo(name, "chat"), handler, self.pool)
        self.router.catalog.add(backend.info, backend)

    async def run(self) -> None:
        """Run the process: its handlers and its links."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.pool.serve)
                    try:
                        await self.client.run(ListedMasters([self._dialer()]), self.registered.set)
                    except Exception as error:
                        self.error = error
                    nursery.cancel_scope.cancel()
        finally:
            self.over.set()

    def _dialer(self) -> Any:
        async def connect() -> Any:
            return await self._connect()

        return FakeDialer(connect)

    async def _connect(self) -> MemoryStream:
        self.dials += 1
        ours, theirs = self.cluster.connect()
        self.streams = [ours, theirs]
        if self.way_lost:
            self.black_hole()
        if self.resets:
            self.resets -= 1
            self.reset()
        return ours

    def cut(self) -> None:
        """Break the connection, as a killed process or a reset does."""
        for stream in self.streams:
            stream.close()

    def reset(self) -> None:
        """Reset the connection: both ends read an error."""
        for stream in self.streams:
            stream.fail()

    def lose_way(self) -> None:
        """Drop everything in both directions, on this connection and on all later ones."""
        self.way_lost = True
        self.black_hole()

    def find_way(self) -> None:
        """Undo :meth:`lose_way`; what was on its way on the last connection arrives."""
        self.way_lost = False
        for stream in self.streams:
            stream.release()

    def black_hole(self) -> None:
        """Drop everything in both directions on this connection, while both ends stay open."""
        for stream in self.streams:
            stream.held = True


class MemoryCluster:
    """A master, and workers that find it."""

    def __init__(self, nursery: trio.Nursery, **options: Any) -> None:
        self.nursery = nursery
        self.options = ClusterServerOptions(**options)
        self.restart()

    def restart(self) -> None:
        """Start a new master, which knows nothing of the one before."""
        self.router = Router()
        self.manager = WorkerManager(self.router.catalog, self.options, "master")
        # One for each connection of this master.
        self.scopes: list[trio.CancelScope] = []
        self.refusing = self.unreachable = False
        # How many connections are taken before all others are refused; None: any number.
        self.last_connections: int | None = None

    def connect(self) -> tuple[MemoryStream, MemoryStream]:
        if self.refusing:
            raise ConnectionRefusedError(111, "Connection refused")
        if self.last_connections is not None:
            self.last_connections -= 1
            self.refusing = not self.last_connections
        if self.unreachable:
            raise OSError(101, "Network is unreachable")
        worker_end, master_end = memory_pair()
        self.nursery.start_soon(self._serve, self.manager, master_end, self.scopes)
        return worker_end, master_end

    async def _serve(self, manager: WorkerManager, stream: Any, scopes: list[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await manager.serve_stream(stream)

    def kill_master(self) -> None:
        """End the master and all its connections, and refuse new ones."""
        self.refusing = True
        for scope in self.scopes:
            scope.cancel(reason="the master was killed")

    async def start(self, name: str, *handlers: Any, **options: Any) -> Worker:
        """Start a worker that serves each handler under the handler's own name, and wait until it is registered."""
        worker = Worker(self, name, **options)
        for handler in handlers:
            worker.serve(handler.__name__, handler)
        self.nursery.start_soon(worker.run)
        await worker.registered.wait()
        await wait_all_tasks_blocked()
        return worker


async def everything(call: Call) -> list[Event]:
    events: list[Event] = []
    while True:
        event = await call.receive()
        events.append(event)
        if isinstance(event, Done | Failed):
            return events


def text(events: list[Event]) -> str:
    return b"".join(bytes(event.data) for event in events if isinstance(event, Data)).decode()
