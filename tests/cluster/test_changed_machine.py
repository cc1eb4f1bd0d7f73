"""A worker does not wait for its timers when its machine was suspended, or its addresses have changed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, everything, forever
from test_resuming import Counting, begin, state_of, suspended, words_of
from trio.testing import MockClock, wait_all_tasks_blocked

HEARTBEAT = 5.0


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery, on_conflict="replicate")


async def resumptions_of(worker: Worker) -> int:
    """Return how often the session of a worker was resumed."""
    await wait_all_tasks_blocked()
    session = worker.client.session
    assert session is not None
    return session.resumptions


async def test_a_connection_that_is_lost_with_the_addresses_is_left_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    worker.black_hole()
    before = trio.current_time()
    with caplog.at_level(logging.INFO, "trio_cluster"):
        worker.machine.change_addresses()
        assert await resumptions_of(worker) == 1
    assert trio.current_time() - before < 0.1
    assert "the addresses of this machine have changed; links are tried anew" in caplog.text
    events += await everything(call)
    assert words_of(events) == model.whole
    assert (model.begun, model.completed, worker.dials) == (1, 1, 2)


async def test_a_connection_that_is_lost_while_the_machine_was_suspended_is_left_with_the_next_heartbeat(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    worker.black_hole()
    worker.machine.slept = 300.0
    await trio.sleep(HEARTBEAT + 0.1)
    assert await resumptions_of(worker) == 1
    assert worker.dials == 2
    # It is looked at with each heartbeat, and with nothing else.
    looks = worker.machine.looks
    await trio.sleep(100)
    assert worker.machine.looks - looks == 100 / HEARTBEAT


def wake(worker: Worker) -> None:
    worker.machine.slept = 10.0


def move(worker: Worker) -> None:
    worker.machine.change_addresses()


@pytest.mark.parametrize("change", [wake, move])
async def test_a_connection_that_still_works_is_kept(
    cluster: MemoryCluster,
    autojump_clock: MockClock,
    change: Callable[[Worker], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = await cluster.start("w1", forever)
    worker.machine.change_addresses()
    await wait_all_tasks_blocked()
    # The one that is not needed is closed at once.
    assert (worker.dials, len(cluster.manager.sessions)) == (2, 1)
    with caplog.at_level(logging.WARNING, "trio_cluster"):
        for _ in range(3):
            change(worker)
            await trio.sleep(60)
    assert await resumptions_of(worker) == 0
    assert worker.dials == 5
    assert state_of(cluster) == "ok"
    # All that the master sees is a connection that it did not need.
    assert {record.getMessage() for record in caplog.records} == {
        "connection refused: this connection is not needed"
    }


async def test_what_arrived_before_the_change_is_no_sign_of_life(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    # Heartbeats go on to come from the master, and nothing of the worker reaches it.
    worker.streams[0].held = True
    await trio.sleep(HEARTBEAT / 2)
    worker.machine.change_addresses()
    assert await resumptions_of(worker) == 1


async def test_the_way_may_come_back_later_than_the_addresses(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    worker.black_hole()
    cluster.unreachable = True
    worker.machine.change_addresses()
    await trio.sleep(4)
    assert worker.dials > 2
    cluster.unreachable = False
    await trio.sleep(HEARTBEAT / 2)
    assert await resumptions_of(worker) == 1
    events += await everything(call)
    assert words_of(events) == model.whole


async def test_of_several_changes_in_a_row_the_last_one_counts(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    worker.black_hole()
    for _ in range(3):
        cluster.unreachable = True
        worker.machine.change_addresses()
        await wait_all_tasks_blocked()
    cluster.unreachable = False
    worker.machine.change_addresses()
    assert await resumptions_of(worker) == 1
    dials = worker.dials
    await trio.sleep(60)
    assert worker.dials == dials


async def test_a_link_that_is_suspended_is_tried_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    cluster.unreachable = True
    await suspended(cluster, worker)
    await trio.sleep(5)
    worker.way_lost = cluster.unreachable = False
    before = trio.current_time()
    worker.machine.change_addresses()
    assert await resumptions_of(worker) == 1
    assert trio.current_time() == before


async def test_a_master_that_is_gone_is_dialled_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    cluster.kill_master()
    await trio.sleep(60)
    cluster.restart()
    before, dials = trio.current_time(), worker.dials
    worker.machine.change_addresses()
    await wait_all_tasks_blocked()
    assert worker.dials == dials + 1
    assert trio.current_time() == before
    assert cluster.router.catalog.names() == ["forever"]


async def test_a_link_that_cannot_be_resumed_is_left_alone(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    cluster.options.resume_window = 0
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    for change in (wake, move):
        change(worker)
        await trio.sleep(2 * HEARTBEAT)
    assert worker.dials == 1
    assert not call.ended
