"""Links that are cut while another process takes the place of the master: over at once, and nothing waits in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, everything, forever
from test_resuming import Counting, begin, state_of, words_of
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.cluster.master import WorkerManager
from trio_cluster.core.answer import Done, Failed


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery, on_conflict="replicate")


async def replace(cluster: MemoryCluster, *workers: Worker) -> WorkerManager:
    """Let another master be at the address, and wait until the workers have joined it; return the old one."""
    old = cluster.manager
    old.announce_successor(coming=True)
    cluster.restart()
    # They dial within half a second.
    await trio.sleep(1)
    assert set(cluster.manager.workers) == {worker.options.server.worker_id for worker in workers}
    return old


async def test_a_link_that_is_cut_then_is_over_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, _ = await begin(cluster, "counting")
    old_streams = worker.streams
    old = await replace(cluster, worker)
    assert set(old.workers) == {"w1"}
    new_streams = worker.streams
    for stream in old_streams:
        stream.fail()
    with trio.fail_after(1):
        events = await everything(call)
    assert isinstance(events[-1], Failed)
    assert not old.workers
    await trio.sleep(1)
    assert model.cancelled
    # The link to the new master is another one, and can be resumed.
    for stream in new_streams:
        stream.fail()
    await trio.sleep(1)
    assert state_of(cluster) == "ok"
    assert [session.resumptions for session in cluster.manager.sessions] == [1]


async def test_what_has_given_nothing_may_be_asked_for_elsewhere(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    async def silent(request: object) -> str:
        await trio.sleep_forever()
        raise AssertionError

    workers = [await cluster.start(name, silent) for name in ("w1", "w2")]
    call = cluster.router.open(chat := chat_request("silent", stream=False))
    await trio.sleep(0.1)
    (asked,) = [worker for worker in workers if worker.pool.running]
    old_streams = asked.streams
    router = cluster.router
    await replace(cluster, *workers)
    for stream in old_streams:
        stream.fail()
    with trio.fail_after(1):
        events = await everything(call)
    assert isinstance(events[-1], Failed)
    assert events[-1].retryable
    # The other worker is still linked to the old master.
    again = router.open(chat)
    await trio.sleep(0.1)
    assert again.served_by == next(each.options.server.worker_id for each in workers if each is not asked)


async def test_a_link_that_was_cut_before_is_waited_for(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    worker.way_lost = True
    worker.reset()
    await wait_all_tasks_blocked()
    assert state_of(cluster) == "suspended"
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def find_way() -> None:
            await trio.sleep(3)
            worker.find_way()

        began = trio.current_time()
        await cluster.manager.wait_uncut(10)
        assert 3 <= trio.current_time() - began < 5
    assert state_of(cluster) == "ok"
    await replace(cluster, worker)
    events += await everything(call)
    assert isinstance(events[-1], Done)
    assert words_of(events) == model.whole


async def test_a_link_that_stays_cut_is_waited_for_so_long_and_is_over_then(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call, _ = await begin(cluster, "forever")
    worker.lose_way()
    worker.reset()
    await wait_all_tasks_blocked()
    began = trio.current_time()
    await cluster.manager.wait_uncut(10)
    assert trio.current_time() - began == pytest.approx(10)
    assert state_of(cluster) == "suspended"
    cluster.manager.announce_successor(coming=True)
    with trio.fail_after(1):
        assert isinstance((await everything(call))[-1], Failed)
    assert not cluster.manager.workers


async def dials_while_silent(cluster: MemoryCluster, meanwhile: Callable[[Worker], object]) -> int:
    """Let a master that is replaced be silent for 20 s in the middle of an answer, of which nothing is lost.

    Args:
        cluster: what the worker is started in.
        meanwhile: is called with the worker, as soon as its master is silent.

    Returns:
        How often the worker has dialled meanwhile.
    """
    model = Counting(40)
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    old_streams = worker.streams
    await replace(cluster, worker)
    dials = worker.dials
    # Longer than a worker waits with another connection, which would lead to the other master.
    for stream in old_streams:
        stream.held = True
    meanwhile(worker)
    await trio.sleep(20)
    for stream in old_streams:
        stream.release()
    events += await everything(call)
    assert words_of(events) == model.whole
    return worker.dials - dials


async def test_silence_of_a_master_that_is_replaced_is_borne(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    assert await dials_while_silent(cluster, lambda worker: None) == 0


async def test_a_changed_machine_does_not_move_the_link_to_a_master_that_is_replaced(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    # The other master answers before this one does. The link to it is tried anew, and no other one.
    assert await dials_while_silent(cluster, lambda worker: worker.machine.change_addresses()) == 1


async def test_a_link_that_is_tried_anew_stays_when_its_master_is_replaced_meanwhile(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting(40)
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    old_streams = worker.streams
    # The worker's pings do not arrive, and no other connection can be made yet.
    old_streams[0].held = True
    cluster.unreachable = True
    worker.machine.change_addresses()
    await trio.sleep(0.1)
    await replace(cluster, worker)
    await trio.sleep(15)
    old_streams[0].release()
    events += await everything(call)
    assert words_of(events) == model.whole


async def test_a_master_that_is_not_replaced_after_all_waits_for_links_again(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    model = Counting()
    worker = await cluster.start("w1", model.counting)
    call, events = await begin(cluster, "counting")
    cluster.manager.announce_successor(coming=True)
    cluster.manager.announce_successor(coming=False)
    await trio.sleep(1)
    worker.reset()
    events += await everything(call)
    assert words_of(events) == model.whole
    assert model.begun == 1
