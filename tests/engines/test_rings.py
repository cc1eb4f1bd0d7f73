"""Three clusters in a ring: a worker of each one serves what the one before it lists.

In virtual time, over real sockets: the engine's HTTP client reads descriptors, which a simulated network has not. What
is sent over loopback has arrived before the clock finds that nothing happens, and jumps.
"""

from __future__ import annotations

from functools import partial

import attrs
import pytest
import trio
from clusters import RULES, Clusters, Running, ask, echo, entries, served_by, until
from trio.testing import MockClock

from trio_cluster import ChatRequest
from trio_cluster.cluster.worker import WorkerClient

#: Seconds between two polls of a list of models; the default of the engine.
POLL = 5.0
#: Seconds in which everything is as before when a cluster is back: its workers return, and what they have comes round
#: by three polls, each after one that failed at most.
SETTLED = 5.0 + 4 * POLL

#: What a client may be answered while a cluster is away, or has just returned.
MEANWHILE = [
    (200, None),
    (503, "model_unavailable"),
    (502, "upstream_lost"),
    (502, "worker_lost"),
    (508, "loop_detected"),
    (404, "model_not_found"),
]


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.005)


@attrs.define
class Ring:
    """Three clusters, each of which serves what the one before it lists; the first one has the model."""

    clusters: Clusters
    rule: str
    masters: list[Running] = attrs.field(factory=list)
    relays: list[Running] = attrs.field(factory=list)
    real: Running = attrs.field(init=False)
    """The newest worker that has the model itself."""
    asked: list[dict[str, str]] = attrs.field(factory=list)
    """The headers of each request that has reached a handler."""

    async def open(self) -> Ring:
        """Start all of it, and wait until all serve the model."""
        for _ in range(3):
            self.masters.append(await self.clusters.master(on_conflict=self.rule))
        await self.serve(0)
        for number, master in enumerate(self.masters):
            self.relays.append(await self.clusters.relay(master, self.masters[number - 1], POLL))
        await until(self.is_served, SETTLED, step=0.5)
        return self

    async def serve(self, number: int) -> None:
        """Start a worker of one cluster that has the model itself."""

        async def handler(request: ChatRequest) -> str:
            self.asked.append(dict(request.headers))
            return await echo(request)

        self.real = await self.clusters.worker(self.masters[number], m=handler)

    def is_served(self) -> bool:
        return all(served_by(master) for master in self.masters)

    async def is_as_it_should_be(self) -> None:
        """Every cluster answers, each request reaches a handler once, and nothing is left of it."""
        for master in self.masters:
            del self.asked[:]
            assert await ask(master) == (200, None)
            assert len(self.asked) == 1
        await until(lambda: not any(master.server.router.live for master in self.masters))

    async def end(self, number: int) -> int:
        """Kill a master; return its port."""
        port = self.masters[number].server.port
        assert port is not None
        await self.masters[number].end()
        return port

    async def begin(self, number: int, port: int) -> None:
        """Start a master again."""
        self.masters[number] = await self.clusters.master(port, on_conflict=self.rule)


def client_of(worker: Running) -> WorkerClient:
    client = worker.server.worker_client
    assert client is not None
    return client


@pytest.mark.parametrize("rule", RULES)
async def test_a_request_is_answered_once_whichever_cluster_is_asked(
    rule: str, clusters: Clusters, clock: MockClock
) -> None:
    ring = await Ring(clusters, rule).open()
    before = [master.server.router.stats.counters()["admitted"] for master in ring.masters]
    for _ in range(5):
        await ring.is_as_it_should_be()
    after = [master.server.router.stats.counters()["admitted"] for master in ring.masters]
    # The first one has all of them, the last one only those of its own clients.
    assert [now - then for now, then in zip(after, before, strict=True)] == [15, 10, 5]
    assert [len((await entries(master))["m"]["trio_cluster_via"]) for master in ring.masters] == [1, 2, 3]


@pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "second", "third"])
@pytest.mark.parametrize("rule", RULES)
async def test_all_is_as_before_soon_after_one_of_them_was_restarted(
    rule: str, number: int, clusters: Clusters, clock: MockClock
) -> None:
    ring = await Ring(clusters, rule).open()
    for away in (0.2, 60.0):
        port = await ring.end(number)
        began = trio.current_time()
        while trio.current_time() < began + min(away, 5):
            for other in {0, 1, 2} - {number}:
                with trio.fail_after(3):
                    assert await ask(ring.masters[other]) in MEANWHILE
            await trio.sleep(1)
        await trio.sleep_until(began + away)
        await ring.begin(number, port)
        returned = trio.current_time()
        while not ring.is_served():
            assert trio.current_time() < returned + SETTLED
            for master in ring.masters:
                with trio.fail_after(3):
                    assert await ask(master) in MEANWHILE
            await trio.sleep(1)
        await trio.sleep_until(returned + SETTLED)
        for _ in range(2):
            await ring.is_as_it_should_be()
            await trio.sleep(POLL)


@pytest.mark.parametrize("rule", RULES)
async def test_a_model_that_nobody_has_does_not_go_round_although_clusters_are_restarted(
    rule: str, clusters: Clusters, clock: MockClock
) -> None:
    ring = await Ring(clusters, rule).open()
    await ring.real.end()
    for number in (0, 1, 2):
        # The new process has another id, which nothing has that still comes round.
        await ring.begin(number, await ring.end(number))
        for _ in range(4):
            for master in ring.masters:
                with trio.fail_after(3):
                    assert await ask(master) in MEANWHILE[1:]
            await trio.sleep(1)
    await trio.sleep(SETTLED)
    assert not any(served_by(master) for master in ring.masters)
    assert not any(master.server.router.live for master in ring.masters)
    await ring.serve(1)
    await until(ring.is_served, SETTLED, step=0.5)


@pytest.mark.parametrize("rule", RULES)
async def test_a_model_that_moves_to_another_cluster_is_refused_by_none_for_the_circle_that_was(
    rule: str, clusters: Clusters, clock: MockClock
) -> None:
    ring = await Ring(clusters, rule).open()
    for number in (1, 2, 0):
        await ring.real.end()
        await trio.sleep(SETTLED)
        assert not any(served_by(master) for master in ring.masters)
        await ring.serve(number)
        await until(ring.is_served, SETTLED, step=0.5)
        await trio.sleep(SETTLED)
        await ring.is_as_it_should_be()
        # Only the one that has it itself refuses what it is offered by the one before.
        refused = [bool(client_of(relay).rejected_models) for relay in ring.relays]
        assert refused == [each == number for each in range(3)]


@pytest.mark.parametrize("rule", RULES)
async def test_a_model_that_moves_at_once_is_refused_by_none_for_the_circle_that_was(
    rule: str, clusters: Clusters, clock: MockClock
) -> None:
    ring = await Ring(clusters, rule).open()
    for number in (1, 2, 0, 2, 1):
        before = ring.real
        await ring.serve(number)
        await before.end()
        await trio.sleep(2 * SETTLED)
        assert ring.is_served()
        await ring.is_as_it_should_be()


@pytest.mark.parametrize("rule", RULES)
async def test_time_that_is_used_up_ends_a_request_in_all_clusters(
    rule: str, clusters: Clusters, clock: MockClock
) -> None:
    ring = await Ring(clusters, rule).open()
    stopped: list[float] = []

    async def slow(request: ChatRequest) -> str:
        ring.asked.append(dict(request.headers))
        try:
            await trio.sleep_forever()
        finally:
            stopped.append(trio.current_time())

    await clusters.worker(ring.masters[0], slow=slow)
    await until(lambda: all(served_by(master, "slow") for master in ring.masters), SETTLED, step=0.5)
    began = trio.current_time()
    answers: list[tuple[int, str | None]] = []

    async def ask_for(seconds: float) -> None:
        answers.append(await ask(ring.masters[2], "slow", **{"x-request-timeout": str(seconds)}))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(ask_for, 2.0))
    assert answers == [(504, "timeout")]
    assert trio.current_time() - began < 2.5
    assert 0 < float(ring.asked[0]["x-request-timeout"]) <= 2.0
    await until(lambda: not any(master.server.router.live for master in ring.masters), 0.5)
    assert len(stopped) == 1
