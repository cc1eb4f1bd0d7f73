"""A master is replaced by another process of its machine, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ClusterServer
from trio_cluster.cluster import replacement
from trio_cluster.errors import ClusterError
from trio_cluster.net.handover import UnixHandovers
from trio_cluster.testing import FakeModel, SimulatedCluster, open_cluster, settle, worker


async def start_worker(cluster: SimulatedCluster, name: str, model: FakeModel) -> None:
    server = worker(name, on_conflict="replicate", max_concurrency=40)
    server.register_chat("m", model)
    await cluster.start_worker(server)


async def test_the_old_process_finishes_what_it_has_and_the_new_one_serves(autojump_clock: MockClock) -> None:
    model = FakeModel(tokens=10, interval=1)
    async with open_cluster(latency=0.01) as cluster, trio.open_nursery() as nursery:
        await start_worker(cluster, "w", model)
        old = cluster.master
        bodies: list[str] = []

        async def ask() -> None:
            response = await cluster.client().chat("m")
            assert response.status == 200
            bodies.append(response.report().text)

        for _ in range(30):
            nursery.start_soon(ask)
            await trio.sleep(0.2)
            if len(cluster.past) == 0:
                new = await cluster.start_master(take_over=True)
        assert cluster.master is new is not old
        assert cluster.past == [old]
        with trio.fail_after(15):
            await old.over.wait()
        assert old.error is None
        # It had one request, which it has finished.
        assert old.server.router.stats.completed == old.server.router.stats.admitted == 1
        await ask()
        await settle(cluster)
        await trio.sleep(15)
        assert set(bodies) == {model.text()}
        assert model.started == model.finished == 31
        # The worker has one link again.
        assert len(cluster.network.connections_of("w")) == 2
        assert [each.open_ends for each in cluster.network.connections_of("w")] == [0, 2]


async def test_a_process_that_fails_leaves_the_old_one_serving(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster() as cluster:
        await start_worker(cluster, "w", FakeModel())
        old = cluster.master

        async def refuse(*_: object) -> None:
            raise replacement.TakeOverFailed("no")

        with monkeypatch.context() as patched:
            patched.setattr("trio_cluster.node.wait_for_workers", refuse)
            with pytest.raises(ClusterError, match="no"):
                await cluster.start_master(take_over=True)
        assert cluster.master is old
        assert (await cluster.client().chat("m")).status == 200
        new = await cluster.start_master(take_over=True)
        assert (await cluster.client().chat("m")).status == 200
        assert new.server.router.stats.completed == 1


async def test_without_a_master_it_starts_as_one(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        cluster.master.kill()
        await cluster.master.over.wait()
        await cluster.start_master(take_over=True)
        assert (await cluster.client().get("/health")).status == 200


async def test_the_port_is_free_when_both_have_ended(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        await cluster.start_master(take_over=True)
        await cluster.past[0].over.wait()
        assert (await cluster.client().get("/health")).status == 200
        cluster.master.stop()
        await cluster.master.over.wait()
        with pytest.raises(ConnectionRefusedError):
            await cluster.client().get("/health")
        await cluster.start_master(ClusterServer())
        assert (await cluster.client().get("/health")).status == 200


class Starter:
    """Starts a successor in the simulation, instead of a process; or one that ends at once."""

    def __init__(self, cluster: SimulatedCluster, nursery: trio.Nursery, *, fails: bool = False) -> None:
        self.pid = 1  # of all processes in a simulation
        self.started = 0
        self.handed_over: list[int] = []
        self.closed = 0
        self._cluster = cluster
        self._nursery = nursery
        self._ended = trio.Event()
        self._fails = fails

    async def start(self) -> Starter:
        await trio.lowlevel.checkpoint()
        self.started += 1
        if self._fails:
            self._ended.set()
        else:
            self._nursery.start_soon(partial(self._cluster.start_master, take_over=True))
        return self

    async def wait_ended(self) -> None:
        await self._ended.wait()

    def close(self) -> None:
        self.closed += 1

    def hand_over(self, pid: int) -> None:
        self.handed_over.append(pid)


def replace(cluster: SimulatedCluster) -> Awaitable[int]:
    """Ask the master to start the process that takes its place, as `trio-cluster replace` does."""
    handovers = cluster.network.host("master").handovers
    return replacement.ask_to_replace(handovers, Path("/simulated") / replacement.SOCKET_NAME)


async def start_replaceable(
    cluster: SimulatedCluster, nursery: trio.Nursery, *, fails: bool = False
) -> Starter:
    starter = Starter(cluster, nursery, fails=fails)
    server = ClusterServer()
    server.successor_starter = starter
    await cluster.start_master(server, take_over=True)
    return starter


async def test_a_master_starts_its_successor_when_it_is_asked_to(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start_worker(cluster, "w", FakeModel())
        starter = await start_replaceable(cluster, nursery)
        old = cluster.master
        with trio.fail_after(30):
            assert await replace(cluster) == 1
            # Who is to be watched from now on was told before it ends, and once.
            assert starter.handed_over == [1]
            assert not old.over.is_set()
            await old.over.wait()
        assert (starter.started, starter.closed) == (1, 1)
        assert cluster.master is not old
        assert (await cluster.client().chat("m")).status == 200


async def test_a_master_whose_successor_ends_goes_on_and_says_so(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        await start_worker(cluster, "w", FakeModel())
        starter = await start_replaceable(cluster, nursery, fails=True)
        master = cluster.master
        for number in (1, 2):
            with pytest.raises(replacement.TakeOverFailed, match="goes on: the new process has ended before"):
                await replace(cluster)
            assert (starter.started, starter.closed) == (number, number)
        assert starter.handed_over == []
        assert cluster.master is master
        assert (await cluster.client().chat("m")).status == 200
        # Another process may take over, whoever has started it; it is not the one to be watched.
        await cluster.start_master(take_over=True)
        assert starter.handed_over == []


async def test_a_master_without_a_service_manager_starts_none(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster:
        with pytest.raises(replacement.TakeOverFailed, match="not started by a service manager"):
            await replace(cluster)


async def test_one_successor_is_started_at_a_time(autojump_clock: MockClock) -> None:
    async with open_cluster() as cluster, trio.open_nursery() as nursery:
        starter = await start_replaceable(cluster, nursery)

        async def never() -> Starter:
            return starter

        starter.start = never  # type: ignore[method-assign]

        async def ask() -> None:
            await replace(cluster)

        nursery.start_soon(ask)
        await trio.sleep(1)
        with pytest.raises(replacement.TakeOverFailed, match="started already"):
            await ask()
        nursery.cancel_scope.cancel()


async def test_there_is_no_master_to_replace(tmp_path: Path) -> None:
    with pytest.raises(replacement.TakeOverFailed, match="none waits at"):
        await replacement.ask_to_replace(UnixHandovers(), tmp_path / replacement.SOCKET_NAME)
