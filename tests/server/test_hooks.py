"""Start-up and shut-down hooks: their order, what is served meanwhile, and what becomes of their failures."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster import ChatRequest, ClusterServer, ClusterServerOptions, ServerOptions
from trio_cluster.errors import ClusterError
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


async def answer(request: ChatRequest) -> str:
    return "yes"


def alone() -> ClusterServer:
    return ClusterServer(ClusterServerOptions(server=ServerOptions(host="127.0.0.1", port=0)))


async def run_and_stop(server: ClusterServer) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone, 0)
        server.stop()


async def test_hooks_run_in_order_and_are_left_in_the_reverse_order() -> None:
    server, seen = alone(), []
    main = threading.current_thread()

    @server.on_start
    async def first() -> None:
        await trio.lowlevel.checkpoint()
        seen.append("first")

    @server.on_start
    async def second() -> AsyncIterator[None]:
        seen.append("second")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            yield
            nursery.cancel_scope.cancel()
        seen.append("second left")

    @server.on_start
    def third() -> None:
        seen.append(f"third in {'its own' if threading.current_thread() is not main else 'the main'} thread")

    @server.on_start
    @asynccontextmanager
    async def fourth() -> AsyncIterator[None]:
        seen.append("fourth")
        yield
        seen.append("fourth left")

    @server.on_stop
    def fifth() -> None:
        seen.append("fifth")

    @server.on_stop
    async def sixth() -> None:
        assert server.is_running
        seen.append("sixth")

    once = [
        *("first", "second", "third in its own thread", "fourth"),
        *("sixth", "fifth", "fourth left", "second left"),
    ]
    await run_and_stop(server)
    assert seen == once
    # The server can be run again.
    await run_and_stop(server)
    assert seen == once * 2


async def test_the_last_request_ends_before_the_first_hook_is_left(autojump_clock: MockClock) -> None:
    seen = []
    server = worker("w")

    @server.chat("m")
    async def slow(request: ChatRequest) -> str:
        await trio.sleep(5)
        seen.append("answered")
        return "yes"

    server.on_stop(lambda: seen.append("stopped"))
    async with open_cluster() as cluster:
        node = await cluster.start_worker(server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.client().post, PATH, CHAT)
            await trio.sleep(1)
            node.server.stop()
        await trio.sleep(10)
        assert seen == ["answered", "stopped"]


@pytest.fixture
async def cluster(autojump_clock: MockClock) -> AsyncIterator[SimulatedCluster]:
    async with open_cluster() as opened:
        yield opened
        await settle(opened)


async def status(cluster: SimulatedCluster, path: str) -> int:
    return (await cluster.client().get(path)).status


async def test_a_worker_registers_when_its_hooks_are_done(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    server = worker("w")
    server.register_chat("m", answer)

    @server.on_start
    async def load() -> None:
        await trio.sleep(30)
        server.register_chat("loaded", answer)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.start_worker, server)
        await trio.sleep(29)
        assert cluster.master.server.list_models() == []
        await trio.sleep(2)
        assert cluster.master.server.list_models() == ["loaded", "m"]
    assert (await cluster.client().post(PATH, CHAT)).status == 200


async def test_a_master_that_starts_serves_what_its_workers_have(autojump_clock: MockClock) -> None:
    master = ClusterServer(ClusterServerOptions(on_conflict="replicate", batch_wait=0.0))
    master.register_chat("m", answer)
    master.register_chat("own", answer)

    @master.on_start
    async def load() -> None:
        await trio.sleep(30)
        master.register_chat("early", answer)
        await trio.sleep(30)

    async with open_cluster() as cluster:
        cluster.master.kill()
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.start_master, master)
            await trio.sleep(1)
            assert [await status(cluster, path) for path in ("/health", "/ready")] == [200, 503]
            ready = await cluster.client().get("/ready")
            assert b'"starting"' in ready.body
            refused = await cluster.client().post(PATH, CHAT)
            assert (refused.status, "retry-after" in refused.headers) == (503, True)
            far = worker("w", on_conflict="replicate")
            far.register_chat("m", answer)
            await cluster.start_worker(far)
            assert (await cluster.client().post(PATH, CHAT)).status == 200
            assert [await status(cluster, f"/ready?model={name}") for name in ("m", "own")] == [200, 503]
            await trio.sleep(30)
            assert (await cluster.client().post(PATH, CHAT | {"model": "early"})).status == 200
            assert (await cluster.client().post(PATH, CHAT | {"model": "own"})).status == 503
            await trio.sleep(30)
            assert (await cluster.client().post(PATH, CHAT | {"model": "own"})).status == 200
            assert await status(cluster, "/ready") == 200


def broken_at_once() -> Any:
    raise OSError("no such weights")


async def broken_later() -> AsyncIterator[None]:
    async def fail() -> None:
        await trio.sleep(0.01)
        raise OSError("no such weights")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        yield


async def broken_at_the_end() -> AsyncIterator[None]:
    yield
    raise OSError("no such weights")


@pytest.mark.parametrize("hook", [broken_at_once, broken_later, broken_at_the_end])
async def test_a_hook_that_fails_ends_the_server_with_one_line(
    hook: Callable[[], Any], nursery: trio.Nursery
) -> None:
    server, seen = alone(), []
    server.on_stop(lambda: seen.append("before"))
    server.on_start(hook)
    server.on_stop(lambda: seen.append("after"))
    if hook is broken_at_the_end:
        nursery.start_soon(stop_soon, server)
    with pytest.raises(ClusterError) as caught:
        await server.run_as_standalone(0)
    assert str(caught.value).startswith(
        f"the start-up hook '{hook.__name__}' failed: OSError: no such weights (test_hooks.py, line "
    )
    assert seen == (["before"] if hook is broken_at_once else ["after", "before"])
    assert not server.is_running


async def stop_soon(server: ClusterServer) -> None:
    await trio.sleep(0.1)
    server.stop()


async def test_a_stop_hook_that_fails_keeps_no_other_from_running(nursery: trio.Nursery) -> None:
    server, seen = alone(), []
    server.on_stop(lambda: seen.append("ran"))

    @server.on_start
    async def resource() -> AsyncIterator[None]:
        yield
        seen.append("left")

    @server.on_stop
    async def broken() -> None:
        raise ValueError

    nursery.start_soon(stop_soon, server)
    with pytest.raises(ClusterError, match="the shut-down hook 'broken' failed: ValueError"):
        await server.run_as_standalone(0)
    assert seen == ["left", "ran"]


@pytest.mark.parametrize("how", ["stopped", "cancelled"])
@pytest.mark.parametrize("mode", ["standalone", "worker"])
async def test_a_server_that_ends_while_it_starts_cancels_its_hooks(how: str, mode: str) -> None:
    server, seen, begun = alone(), [], trio.Event()
    server.on_stop(lambda: seen.append("stopped"))

    @server.on_start
    async def load() -> AsyncIterator[None]:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            seen.append("left")
        yield

    @server.on_start
    async def never() -> None:
        seen.append("never")

    server.on_stop(never)  # Not reached either.

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            if mode == "worker":
                nursery.start_soon(server.run_as_worker, "127.0.0.1", 1)
            else:
                nursery.start_soon(server.run_as_standalone, 0)
            await begun.wait()
            await wait_all_tasks_blocked(0.05)
            if how == "stopped":
                server.stop()
            else:
                nursery.cancel_scope.cancel()
    assert (seen, server.is_running) == (["left", "stopped"], False)


async def test_a_server_that_is_cancelled_ends_its_requests_before_its_hooks(
    autojump_clock: MockClock,
) -> None:
    server, seen = worker("w"), []

    @server.chat("m")
    async def slow(request: ChatRequest) -> str:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            seen.append("answered")
        return "never"

    @server.on_start
    async def resource() -> AsyncIterator[None]:
        try:
            yield
        finally:
            seen.append("left")

    async with open_cluster() as cluster:
        await cluster.start_worker(server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.client().post, PATH, CHAT)
            await trio.sleep(1)
            cluster.workers["w"].kill()
            await trio.sleep(5)
        assert seen == ["answered", "left"]


async def test_what_is_no_hook_is_refused_where_it_is_registered() -> None:
    server = alone()

    def generator() -> Any:
        yield

    async def asynchronous() -> AsyncIterator[None]:
        yield

    for register in (server.on_start, server.on_stop):
        for wrong in (3, lambda argument: None, generator):
            with pytest.raises(TypeError):
                register(wrong)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="only a start-up hook may"):
        server.on_stop(asynchronous)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run_as_standalone, 0)
        with pytest.raises(RuntimeError, match="before the server runs"):
            server.on_start(asynchronous)
        nursery.cancel_scope.cancel()
