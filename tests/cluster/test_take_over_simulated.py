"""A master is replaced by another process of its machine, in virtual time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ClusterServer
from trio_cluster.cluster import replacement
from trio_cluster.errors import ClusterError
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
