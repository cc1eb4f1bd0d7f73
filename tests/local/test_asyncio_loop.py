"""The loop of asyncio handlers: when it runs, its hooks, and what it says when it is blocked."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
from handler_bench import Bench
from memory_cluster import everything
from thread_shortage import no_threads

from trio_cluster import AsyncioLoop, ClusterError, ClusterServer, from_asyncio
from trio_cluster.core.answer import Done
from trio_cluster.local.asyncio_loop import AsyncioLoops, live_runs
from trio_cluster.net.sockets import Sockets
from trio_cluster.testing import check_handler, open_cluster, worker
from trio_cluster.testing._clock import threads_hold_clock

PATIENCE = 20


def threads() -> int:
    return sum(thread.name == "trio_cluster asyncio" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
async def _no_loop_is_left() -> AsyncIterator[None]:
    yield
    assert live_runs() == []
    assert threads() == 0


async def until(happened: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE):
        while not happened():  # noqa: ASYNC110
            await trio.sleep(0.001)


class Hooks:
    """Hooks that note what happens, and in which task."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.tasks: set[int] = set()
        self.fails: str | None = None

    async def start(self) -> None:
        await asyncio.sleep(0)
        self._note("start")

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self._note("stop")

    def _note(self, word: str) -> None:
        self.log.append(word)
        self.tasks.add(id(asyncio.current_task()))
        if word == self.fails:
            raise OSError("no such engine")

    async def handler(self, request: Any) -> str:
        self.log.append("handles")
        return str(request.last_text)


@pytest.fixture
def hooks() -> Hooks:
    return Hooks()


def standalone() -> ClusterServer:
    server = ClusterServer()
    server.options.server.host = "127.0.0.1"
    return server


async def test_a_server_runs_the_loop_from_its_start_to_its_end(hooks: Hooks) -> None:
    loop = AsyncioLoop(hooks.start, hooks.stop)
    server = standalone()
    server.register_chat("one", from_asyncio(hooks.handler, loop))
    server.register_embedding("two", from_asyncio(hooks.handler, loop))
    for _ in range(2):
        assert loop.running is None
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run_as_standalone, 0)
            assert hooks.log == ["start"]
            assert (loop.running is not None, threads()) == (True, 1)
            server.stop()
        assert hooks.log == ["start", "stop"]
        assert len(hooks.tasks) == 1
        hooks.log.clear()
        hooks.tasks.clear()


async def test_a_loop_whose_model_was_registered_while_the_server_runs_is_started_then(hooks: Hooks) -> None:
    server = standalone()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone, 0)
        loop = AsyncioLoop(hooks.start, hooks.stop)
        server.register_chat("late", from_asyncio(hooks.handler, loop))
        await until(lambda: loop.running is not None and loop.running.started)
        server.stop()
    assert hooks.log == ["start", "stop"]


async def test_a_worker_starts_its_loop_before_its_models_are_announced(
    hooks: Hooks, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_cluster() as cluster:
        back = worker("w")
        back.register_chat("m", from_asyncio(hooks.handler, AsyncioLoop(hooks.start, hooks.stop)))
        await cluster.start_worker(back)
        response = await cluster.client().chat("m", "hello")
        assert response.report().text == "hello"
        assert hooks.log == ["start", "handles"]
        cluster.workers["w"].stop()
        await trio.sleep(60)
        assert hooks.log == ["start", "handles", "stop"]


async def test_a_cancelled_server_ends_its_loop(hooks: Hooks) -> None:
    server = standalone()
    server.register_chat("m", from_asyncio(hooks.handler, AsyncioLoop(hooks.start, hooks.stop)))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone, 0)
        nursery.cancel_scope.cancel()
    assert hooks.log == ["start", "stop"]


async def test_a_server_whose_hook_fails_does_not_start_and_says_why(hooks: Hooks) -> None:
    hooks.fails = "start"
    server = standalone()
    server.register_chat("m", from_asyncio(hooks.handler, AsyncioLoop(hooks.start, hooks.stop)))
    for run in (server.run_as_standalone, server.run_as_master):
        with pytest.raises(ClusterError, match="on_start of an asyncio loop failed: OSError: no such engine"):
            await run(0)
    with pytest.raises(ClusterError, match="no such engine"):
        await server.run_as_worker("127.0.0.1", 1)
    assert hooks.log == ["start"] * 3


async def test_a_server_without_a_thread_for_its_loop_does_not_start(hooks: Hooks) -> None:
    server = standalone()
    server.register_chat("m", from_asyncio(hooks.handler))
    with no_threads(), pytest.raises(ClusterError, match="can start no more threads"):
        await server.run_as_standalone(0)


async def test_a_hook_that_fails_for_a_model_that_came_later_does_not_end_the_server(
    hooks: Hooks, caplog: pytest.LogCaptureFixture
) -> None:
    hooks.fails = "start"
    server = standalone()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone, 0)
        server.register_chat("m", from_asyncio(hooks.handler, AsyncioLoop(hooks.start, hooks.stop)))
        await until(lambda: "no such engine" in caplog.text)
        assert server.is_running
        server.stop()


async def test_what_the_last_hook_raises_is_logged(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    hooks.fails = "stop"
    loop = AsyncioLoop(hooks.start, hooks.stop)
    await loop.release(await loop.acquire())
    assert "the hook on_stop of the asyncio loop failed" in caplog.text


async def test_a_start_that_nobody_waits_for_any_more_is_cancelled(hooks: Hooks) -> None:
    began = trio.Event()
    token = trio.lowlevel.current_trio_token()

    async def start() -> None:
        token.run_sync_soon(began.set)
        try:
            await asyncio.Event().wait()
        finally:
            hooks.log.append("cancelled")

    loop = AsyncioLoop(start, hooks.stop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.acquire)
        await began.wait()
        nursery.cancel_scope.cancel()
    assert hooks.log == ["cancelled"]


async def test_servers_share_a_loop_and_the_last_one_ends_it(hooks: Hooks) -> None:
    loop = AsyncioLoop(hooks.start, hooks.stop)
    servers = [standalone(), standalone()]
    async with trio.open_nursery() as nursery:
        for server in servers:
            server.register_chat("m", from_asyncio(hooks.handler, loop))
            await nursery.start(server.run_as_standalone, 0)
        servers[0].stop()
        await until(lambda: not servers[0].is_running)
        assert hooks.log == ["start"]
        servers[1].stop()
    assert hooks.log == ["start", "stop"]


async def test_a_loop_may_be_used_from_several_runs_of_trio_at_once() -> None:
    loop = AsyncioLoop()
    results: list[object] = []

    class Keep:
        async def push(self, chunk: object) -> None:
            results.append(chunk)

        def end(self) -> None: ...

    async def handler(request: int) -> int:
        await asyncio.sleep(0)
        return request

    async def run(base: int) -> None:
        for number in range(50):
            await from_asyncio(handler, loop)(base + number, Keep())

    async with trio.open_nursery() as nursery:
        for base in (0, 100, 200):
            nursery.start_soon(trio.to_thread.run_sync, trio.run, run, base)
    assert sorted(results) == [base + number for base in (0, 100, 200) for number in range(50)]  # type: ignore[type-var]


async def test_tasks_that_a_handler_left_are_cancelled_and_awaited(hooks: Hooks) -> None:
    async def left() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            hooks.log.append("left task has ended")

    tasks: list[asyncio.Task[None]] = []

    async def handler(request: Any) -> str:
        tasks.append(asyncio.create_task(left()))
        await asyncio.sleep(0)
        return ""

    class Drop:
        async def push(self, chunk: object) -> None: ...

        def end(self) -> None: ...

    loop = AsyncioLoop(hooks.start, hooks.stop)
    await from_asyncio(handler, loop)("", Drop())
    assert hooks.log == ["start", "stop", "left task has ended"]


async def test_a_call_outside_of_a_server_runs_the_loop_for_itself(bench: Bench, hooks: Hooks) -> None:
    handler = from_asyncio(hooks.handler, AsyncioLoop(hooks.start, hooks.stop))
    assert isinstance((await everything(bench.open(handler)))[-1], Done)
    await until(lambda: not live_runs())
    assert hooks.log == ["start", "handles", "stop"]


async def test_another_loop_may_be_given(hooks: Hooks) -> None:
    class Other(asyncio.SelectorEventLoop):
        pass

    kinds: list[type] = []

    async def start() -> None:
        kinds.append(type(asyncio.get_running_loop()))

    loop = AsyncioLoop(start, loop_factory=Other)
    await loop.release(await loop.acquire())
    assert kinds == [Other]


async def test_hooks_are_functions() -> None:
    with pytest.raises(TypeError, match="a hook must be a function, not 'text'"):
        AsyncioLoop("text")  # type: ignore[arg-type]


async def test_a_mock_clock_waits_for_short_timers_of_the_loop_and_not_for_long_ones(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def wait(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "awake"

    class Drop:
        async def push(self, chunk: object) -> None: ...

        def end(self) -> None: ...

    loop = AsyncioLoop()
    run = await loop.acquire()
    handler = from_asyncio(wait, loop)
    with threads_hold_clock():
        with trio.fail_after(0.001):
            await handler(0.05, Drop())
        with trio.move_on_after(0.001) as limit:
            await handler(1000, Drop())
    assert limit.cancelled_caught
    await loop.release(run)


@pytest.mark.parametrize("virtual", [False, True])
async def test_a_handler_keeps_the_contract_of_handlers(
    virtual: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(request: Any) -> AsyncIterator[str]:
        for word in 50 * request.last_text.split():
            await asyncio.sleep(0.002)
            yield word

    autojump_clock.autojump_threshold = 0.0 if virtual else math.inf
    autojump_clock.rate = 0.0 if virtual else 1.0
    report = await check_handler(from_asyncio(handler))
    assert report.replayable
    assert report.not_reached == ()


# Blocks


async def until_logged(caplog: pytest.LogCaptureFixture, words: str) -> str:
    await until(lambda: words in caplog.text)
    return next(record.getMessage() for record in caplog.records if words in record.getMessage())


async def test_a_handler_that_blocks_the_loop_is_named_in_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    go_on = threading.Event()

    async def blocks(request: Any) -> str:
        go_on.wait(PATIENCE)
        return ""

    loop, loops = AsyncioLoop(), AsyncioLoops()
    loops.add(loop)
    async with loops.opened(), trio.open_nursery() as nursery:
        nursery.start_soon(loops.watch, 0.05)
        call = bench.open(from_asyncio(blocks, loop))
        line = await until_logged(caplog, "the asyncio loop is blocked")
        assert "handler of 'm' (test_asyncio_loop.py:" in line
        assert line.endswith("in blocks)")
        go_on.set()
        assert isinstance((await everything(call))[-1], Done)
        await until_logged(caplog, "the asyncio loop runs again")
        nursery.cancel_scope.cancel()
    assert len(caplog.records) == 2


async def test_a_loop_that_waits_is_not_blocked(caplog: pytest.LogCaptureFixture) -> None:
    loop, loops = AsyncioLoop(), AsyncioLoops()
    loops.add(loop)
    async with loops.opened():
        with trio.move_on_after(0.3):
            await loops.watch(0.02)
    assert caplog.records == []


async def test_the_node_watches_its_loops(caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()

    async def start() -> None: ...

    loop = AsyncioLoop(start)
    server = standalone()
    assert isinstance(server.network, Sockets)
    server.options.heartbeat_interval = 0.05
    server.register_chat("m", from_asyncio(any_handler(), loop))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone, 0)
        run = loop.running
        assert run is not None
        run.post(go_on.wait, PATIENCE)
        await until_logged(caplog, "the asyncio loop is blocked")
        go_on.set()
        await until_logged(caplog, "the asyncio loop runs again")
        server.stop()


def any_handler() -> Callable[[Any], Any]:
    async def handler(request: Any) -> str:
        return str(time.monotonic())

    return handler
