"""Hundreds of workers whose master was away: all of them return soon, and not all at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, echo, everything
from trio.testing import MockClock

from trio_cluster.core.answer import Done
from trio_cluster.testing import seeded

WORKERS = 500
#: Seconds in which all have to be back. Networks and handshakes take no time here; half a second is left for them.
RETURN = 4.5
#: Attempts in a tenth of a second: while the master is away and when it returns, and right after it was lost.
CROWD, FIRST_CROWD = 60, 200


@pytest.fixture(autouse=True)
def few_lines_and_one_seed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.ERROR, "trio_cluster")
    with seeded(500):
        yield


def crowd(times: Sequence[float], window: float = 0.1) -> int:
    """Return how many of these times are in the same window at most."""
    most, recent = 0, deque[float]()
    for time in times:
        recent.append(time)
        while recent[0] <= time - window:
            recent.popleft()
        most = max(most, len(recent))
    return most


async def start(nursery: trio.Nursery) -> tuple[MemoryCluster, list[Worker], list[float]]:
    """Start the workers, and wait until all are registered. Return when each attempt to connect is made, too."""
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    workers = [Worker(cluster, f"w{number}") for number in range(WORKERS)]
    dials: list[float] = []
    connect = cluster.connect

    def recording_connect() -> object:
        dials.append(trio.current_time())
        return connect()

    cluster.connect = recording_connect  # type: ignore[method-assign, assignment]
    for number, worker in enumerate(workers):
        worker.serve(f"m{number % 50}", echo)
        nursery.start_soon(worker.run)
    for worker in workers:
        await worker.registered.wait()
    dials.clear()
    return cluster, workers, dials


async def are_back(cluster: MemoryCluster, workers: list[Worker]) -> None:
    """Wait until the master knows all workers, and all their models."""
    while True:
        if all(worker.client.connected for worker in workers):
            break
        await trio.sleep(0.01)
    assert len(cluster.manager.workers) == WORKERS
    assert [len(cluster.router.catalog.replicas(f"m{number}")) for number in range(50)] == [10] * 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "away" in metafunc.fixturenames:
        # Six seconds after the loss, workers look for their master as rarely as they ever do. So minutes differ from
        # half of one by the number of attempts, and by what these cost the test.
        metafunc.parametrize("away", [30.0, 150.0] if metafunc.config.option.all_ways else [30.0])


async def test_all_return_within_five_seconds_of_a_long_absence_and_not_at_once(
    away: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    cluster, workers, dials = await start(nursery)
    cluster.kill_master()
    lost = trio.current_time()
    await trio.sleep(away)
    while_away = list(dials)
    dials.clear()
    cluster.restart()
    with trio.fail_after(RETURN + 0.01):
        await are_back(cluster, workers)
    assert isinstance((await everything(cluster.router.open(chat_request("m7"))))[-1], Done)
    # None had to try twice.
    assert len(dials) == WORKERS
    assert crowd(dials) <= CROWD
    assert crowd([time for time in while_away if time > lost + 10]) <= CROWD
    assert crowd(while_away) <= FIRST_CROWD


async def test_all_return_from_links_that_broke_in_the_same_instant(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    cluster, workers, dials = await start(nursery)
    for worker in workers:
        worker.cut()
    await trio.sleep(0.001)
    with trio.fail_after(0.6):
        await are_back(cluster, workers)
    assert len(dials) == WORKERS
    assert crowd(dials) <= FIRST_CROWD
