"""In a quiescent cluster nothing is left of any request; what is left is found, and its node is named."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.testing import (
    FakeModel,
    OrphansLeft,
    SimulatedCluster,
    assert_no_orphans,
    assert_stats_balance,
    open_cluster,
    settle,
    worker,
)


@pytest.fixture
async def quick(autojump_clock: MockClock) -> AsyncIterator[SimulatedCluster]:
    """A cluster with short timeouts, which a test may leave in any state."""
    async with open_cluster(worker_timeout=2.0, heartbeat_interval=0.5) as cluster:
        yield cluster


async def start(cluster: SimulatedCluster, model: FakeModel) -> None:
    server = worker("w1", worker_timeout=2.0, heartbeat_interval=0.5)
    server.register_chat("m", model)
    await cluster.start_worker(server)


async def test_a_cluster_is_quiescent_before_and_after_its_requests(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    assert_no_orphans(quick)
    await start(quick, FakeModel())
    await quick.client().chat("m")
    await settle(quick)
    assert_no_orphans(quick)
    assert trio.current_time() < 1


async def test_a_running_request_is_found_on_both_of_its_nodes(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    await start(quick, FakeModel(stall_at=1))
    async with quick.client().open_chat("m", headers={"x-request-id": "r1"}) as response:
        await response.receive_until(b"t0")
        assert_stats_balance(quick)
        with pytest.raises(OrphansLeft) as caught:
            assert_no_orphans(quick)
        assert caught.value.orphans == [
            "master: call r1 of 'm' on w1, streaming, 0 bytes waiting",
            "master: 1 calls forwarded to w1",
            "master: calls (1,) open on the link with w1",
            "w1: call r1 of 'm' here, streaming, 0 bytes waiting",
            "w1: 1 slots taken",
            "w1: 1 tasks of calls",
            "w1: 1 calls from its masters",
            "w1: calls (1,) open on the link with a master",
            "master: 1 tasks of HTTP requests",
        ]
        assert all(line in str(caught.value) for line in caught.value.orphans)
    await settle(quick)


async def test_settle_waits_for_work_that_winds_down(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    model = FakeModel(stall_at=1, hang_in_cleanup=30)
    await start(quick, model)
    async with quick.client().open_chat("m") as response:
        await response.receive_until(b"t0")
    await settle(quick)
    assert model.cleaned_up == 1
    assert trio.current_time() == pytest.approx(30, abs=1.1)


async def test_settle_stops_waiting_and_reports_what_is_left(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    await start(quick, FakeModel(stall_at=1, hang_in_cleanup=30))
    async with quick.client().open_chat("m") as response:
        await response.receive_until(b"t0")
    with pytest.raises(OrphansLeft, match=r"w1: 1 slots taken"):
        await settle(quick, within=10)
    assert trio.current_time() == pytest.approx(10, abs=0.1)


async def test_a_call_that_waits_for_a_slot_is_found(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    await start(quick, FakeModel(stall_at=0))
    quick.workers["w1"].server.set_max_concurrency(1)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(quick.client().chat, "m")
        await wait_all_tasks_blocked()
        with pytest.raises(OrphansLeft, match=r"w1: 1 calls waiting for a slot"):
            assert_no_orphans(quick)
        nursery.cancel_scope.cancel()


async def test_a_killed_node_is_checked_too(quick: SimulatedCluster, autojump_clock: MockClock) -> None:
    model = FakeModel(stall_at=1, ignore_cancellation_for=5)
    await start(quick, model)
    async with quick.client().open_chat("m") as response:
        await response.receive_until(b"t0")
        quick.workers["w1"].kill()
        await response.finish()
    await start(quick, FakeModel())
    with pytest.raises(OrphansLeft, match="w1: 1 slots taken"):
        assert_no_orphans(quick)
    await settle(quick)
    assert model.cleaned_up == 1


async def test_a_link_that_only_one_end_has_closed_is_found(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    await start(quick, FakeModel())
    quick.workers["w1"].link.client_stream.close()
    with pytest.raises(OrphansLeft, match="master: a connection to port 9080 that w1 has closed"):
        assert_no_orphans(quick)
    await settle(quick)


async def test_an_idle_connection_of_a_client_is_no_orphan(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    stream = await quick.network.host("client").connect("master", 8080)
    await stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b"200" in await stream.receive_some()
    await settle(quick)
    assert len(quick.network.connections) == 1
    stream.close()
    await settle(quick)


@pytest.mark.parametrize("port", [8080, 9080], ids=["of a client", "of a worker"])
async def test_a_task_of_a_connection_that_is_gone_is_found(
    port: int, quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    await start(quick, FakeModel())
    stream = await quick.network.host("client").connect("master", 8080)
    await stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    await settle(quick)
    (connection,) = [each for each in quick.network.connections if each.port == port]
    quick.network.connections.remove(connection)
    with pytest.raises(OrphansLeft) as caught:
        assert_no_orphans(quick)
    assert caught.value.orphans == ["master: 2 tasks of connections, of which 1 are open"]
    stream.close()


async def test_a_connection_ends_with_its_client_and_not_after_an_idle_timeout(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    for _ in range(3):
        await quick.client().get("/health")
    await settle(quick)
    assert trio.current_time() < 1


async def test_stats_that_do_not_balance_are_found(
    quick: SimulatedCluster, autojump_clock: MockClock
) -> None:
    await start(quick, FakeModel())
    await quick.client().chat("m")
    quick.master.server.router.stats.completed += 1
    with pytest.raises(OrphansLeft, match=r"master: CallStats\(admitted=1, completed=2"):
        assert_stats_balance(quick)
    with pytest.raises(OrphansLeft, match="do not balance"):
        assert_no_orphans(quick)


async def test_unsent_messages_are_found(quick: SimulatedCluster, autojump_clock: MockClock) -> None:
    await start(quick, FakeModel())
    quick.workers["w1"].link.partition()
    (session,) = quick.master.server.worker_manager.sessions  # type: ignore[union-attr]
    session.drain("x")
    with pytest.raises(OrphansLeft, match="master: unsent messages on the link with w1"):
        assert_no_orphans(quick)
