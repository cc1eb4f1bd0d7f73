"""What a worker does when its master goes away, comes back, or refuses it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, echo, everything, forever
from memory_streams import MemoryStream
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster import check_is_cluster_server
from trio_cluster.core import randomness
from trio_cluster.core.answer import Done, Head
from trio_cluster.openai import ChatRequest


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery)


async def test_a_worker_cancels_its_handlers_when_the_link_is_gone(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    stopped = trio.Event()

    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        try:
            yield "begun"
            await trio.sleep_forever()
        finally:
            stopped.set()

    worker = await cluster.start("w1", waits)
    call = cluster.router.open(chat_request("waits"))
    assert isinstance(await call.receive(), Head)
    start = trio.current_time()
    worker.cut()
    await stopped.wait()
    assert trio.current_time() == start
    await worker.router.wait_idle()
    assert worker.pool.running == 0


async def test_a_worker_reconnects_to_a_master_that_was_restarted(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", echo)
    cluster.kill_master()
    await trio.sleep(20)
    assert not worker.client.connected
    assert worker.dials > 2
    cluster.restart()
    await trio.sleep(40)
    assert worker.client.connected
    assert isinstance((await everything(cluster.router.open(chat_request("echo"))))[-1], Done)


async def test_a_worker_waits_for_a_master_that_is_not_there_yet(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    cluster.refusing = True
    worker = Worker(cluster, "w1")
    worker.serve("echo", echo)
    cluster.nursery.start_soon(worker.run)
    await trio.sleep(100)
    assert not worker.registered.is_set()
    cluster.refusing = False
    await worker.registered.wait()
    assert cluster.router.catalog.names() == ["echo"]


async def test_the_waits_between_attempts_double_up_to_a_bound_with_full_jitter(
    cluster: MemoryCluster, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[float] = []

    def uniform(low: float, high: float) -> float:
        assert low == 0
        bounds.append(high)
        return high

    monkeypatch.setattr(randomness, "uniform", uniform)
    cluster.refusing = True
    worker = Worker(cluster, "w1")
    cluster.nursery.start_soon(worker.run)
    await trio.sleep(120)
    assert bounds[:8] == [0.5, 1, 2, 4, 4.5, 4.5, 4.5, 4.5]
    cluster.refusing = False
    await worker.registered.wait()
    bounds.clear()
    worker.cut()
    await trio.sleep(0.1)
    assert bounds == [0.5]


async def test_an_attempt_that_has_taken_long_is_followed_by_the_next_one_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dials: list[float] = []

    async def silence() -> MemoryStream:
        dials.append(trio.current_time())
        await trio.sleep_forever()
        raise AssertionError

    worker = Worker(cluster, "w1", worker_timeout=10)
    monkeypatch.setattr(worker, "_connect", silence)
    began = trio.current_time()
    cluster.nursery.start_soon(worker.run)
    await trio.sleep(55)
    assert [dial - began for dial in dials] == [0, 10, 20, 30, 40, 50]


async def test_closing_sends_what_is_queued_and_returns(cluster: MemoryCluster) -> None:
    worker = await cluster.start("w1", echo)
    worker.client.drain("going home")
    worker.client.close("going home")
    await worker.over.wait()
    assert worker.error is None
    await wait_all_tasks_blocked()
    assert cluster.manager.workers == {}


async def test_a_worker_that_drains_does_not_reconnect_when_its_link_breaks(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.start("w1", forever)
    cluster.router.open(chat_request("forever"))
    await wait_all_tasks_blocked()
    worker.client.drain("going home")
    await wait_all_tasks_blocked()
    worker.cut()
    await trio.sleep(100)
    assert worker.dials == 1
    assert not worker.over.is_set()
    assert "lost the master while draining" in caplog.text
    worker.client.close("going home")
    await worker.over.wait()
    assert worker.error is None


async def test_a_worker_that_drains_without_a_link_does_not_dial_again(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", echo)
    cluster.refusing = True
    worker.cut()
    await trio.sleep(20)
    dials = worker.dials
    assert dials > 1
    worker.client.drain("going home")
    cluster.refusing = False
    await trio.sleep(100)
    assert worker.dials == dials
    assert cluster.manager.workers == {}
    worker.client.close("going home")
    await worker.over.wait()


async def test_a_worker_that_drains_while_it_dials_registers_no_models(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = Worker(cluster, "w1")
    worker.serve("echo", echo)
    cluster.nursery.start_soon(worker.run)
    while not worker.dials:
        await trio.lowlevel.checkpoint()
    worker.client.drain("going home")
    await trio.sleep(100)
    assert worker.dials == 1
    assert cluster.router.catalog.names() == []
    assert cluster.manager.workers == {}
    assert not worker.registered.is_set()
    worker.client.close("going home")
    await worker.over.wait()


async def test_a_silent_master_is_dropped_and_dialled_again(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever, resume_window=0.0)
    worker.black_hole()
    await trio.sleep(25)
    assert worker.dials == 1
    await trio.sleep(120)
    assert worker.dials > 1
    assert worker.client.connected
    assert cluster.router.catalog.served_by("forever") == ["w1"]


async def test_a_call_for_a_model_that_has_just_gone_gets_its_503(cluster: MemoryCluster) -> None:
    worker = await cluster.start("w1", echo)
    backend = worker.router.catalog.replicas("echo")[0]
    worker.router.catalog.remove("echo", backend)
    call = cluster.router.open(chat_request("echo"))
    last = (await everything(call))[-1]
    assert not isinstance(last, Done)
    assert last.error.code == "model_unavailable"  # type: ignore[union-attr]


async def test_the_probe_says_no_where_nothing_listens() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    assert not await check_is_cluster_server("127.0.0.1", port)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"\x00" * 100])
async def test_the_probe_says_no_to_other_servers(nursery: trio.Nursery, answer: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        if answer:
            await stream.receive_some()
            await stream.send_all(answer)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    port = listener.socket.getsockname()[1]
    assert not await check_is_cluster_server("127.0.0.1", port)


async def test_the_probe_of_a_silent_server_times_out(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, silent, [listener])
    port = listener.socket.getsockname()[1]
    start = trio.current_time()
    assert not await check_is_cluster_server("127.0.0.1", port, timeout=1.5)
    assert trio.current_time() - start == pytest.approx(1.5)
