"""A request that is late gets a second attempt: one answer, at most two attempts, and both are over at the end."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Final

import attrs
import pytest
import trio
from scripted_replica import Scripted
from trio.testing import MockClock

from trio_cluster import ApiError
from trio_cluster.core.answer import Done, Head
from trio_cluster.core.call import Call
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.observer import Observer
from trio_cluster.core.outcome import Outcome
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.core.request import Request
from trio_cluster.gateway.deadlines import ResponseDeadlines
from trio_cluster.gateway.hedge import first_event
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.hedging import ENOUGH
from trio_cluster.routing.router import Router
from trio_cluster.testing import Response, SimulatedCluster, open_cluster, settle, worker

OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 20.0,
    "worker_timeout": 15.0,
    "max_concurrency": 2,
    "on_conflict": "replicate",
    "resume_window": 0.0,
    "routing": "least-busy",
}
#: Seconds that an answer takes usually, and requests after which this is known, and paid for.
USUAL: Final = 0.5
LESSONS: Final = 40


class Limited:
    """An authenticator: what is reserved for a request has to be given back."""

    async def authenticate(self, context: Any) -> Principal:
        return Principal("limited", "admin", limits=Limits(1000, 100_000_000, 100, 1_000_000_000, "day"))


class Ends(Observer):
    """Notes how calls have ended, and which of them count."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []
        self.reasons: list[str | None] = []

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        self.outcomes.append((call.served_by, outcome))
        self.reasons.append(call.cancelled)


class Stage:
    """Workers with one embedding model.

    Attributes:
        starts: the workers whose handlers have started for the request that is looked at.
        stopped: those whose handlers have stopped, and when.
        takes: seconds that the next answer of each worker takes; ``None``: it never comes.
        hides: seconds for which handlers hide from their cancellation.
        fails: what the handler of a worker raises instead of its answer.
    """

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.starts: list[str] = []
        self.stopped: dict[str, float] = {}
        self.takes: dict[str, float] = {}
        self.hides = 0.0
        self.fails: dict[str, Exception] = {}
        self.ends = Ends()

    async def add(self, name: str, *, hedge: bool = True, **options: Any) -> None:
        server = worker(name, **(OPTIONS | options))

        @server.embedding("m", hedge=hedge)
        async def handler(request: Any) -> list[list[float]]:
            self.starts.append(name)
            try:
                await trio.sleep(self.takes.get(name, USUAL))
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await trio.sleep(self.hides)
                raise
            finally:
                self.stopped[name] = trio.current_time()
            if name in self.fails:
                raise self.fails[name]
            return [[1.0 if name == "a" else 2.0]]

        await self.cluster.start_worker(server)

    async def ask(self, **headers: str) -> Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.cluster.client(**named).post("/v1/embeddings", {"model": "m", "input": "x"})

    async def learn(self, lessons: int = LESSONS) -> None:
        for _ in range(lessons):
            assert (await self.ask()).status == 200
        self.starts.clear()
        self.stopped.clear()
        self.ends.outcomes.clear()

    @property
    def hedges(self) -> tuple[int, int]:
        hedging = self.cluster.master.server.router.hedging
        return hedging.sent, hedging.won

    @property
    def in_flight(self) -> dict[str, int]:
        manager = self.cluster.master.server.worker_manager
        assert manager is not None
        return {name: each.in_flight for name, each in manager.workers.items()}


@asynccontextmanager
async def staged(*names: str, hedge: bool = True, **options: Any) -> AsyncIterator[Stage]:
    async with open_cluster(latency=0.01, authenticator=Limited(), **(OPTIONS | options)) as cluster:
        stage = Stage(cluster)
        for name in names:
            await stage.add(name, hedge=hedge, **options)
        cluster.master.server.router.observers.add(stage.ends)
        yield stage
        for name in names:
            cluster.workers[name].thaw()
        await settle(cluster)
        limiter = cluster.master.server.limiter
        # A master that has stopped has none any more.
        assert limiter is None or limiter.open_reservations == 0


def vector(response: Response) -> float:
    assert response.status == 200, response.body
    return float(response.json()["data"][0]["embedding"][0])


async def test_the_second_attempt_answers_and_the_first_is_cancelled(autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        stage.takes = {"a": 10.0}
        # The least recently used replica is the first.
        while not (stage.starts and stage.starts[0] == "a"):
            stage.starts.clear()
            began = trio.current_time()
            response = await stage.ask()
        assert stage.starts == ["a", "b"]
        assert vector(response) == 2.0
        assert response.headers["x-trio-cluster-worker"] == "b"
        # As long as the usual answer, twice.
        assert 2 * USUAL <= trio.current_time() - began <= 2 * USUAL + 0.2
        assert stage.hedges == (1, 1)
        await trio.sleep(0.1)
        assert stage.in_flight == {"a": 0, "b": 0}
        assert sorted(stage.ends.outcomes[-2:]) == [("a", "cancelled"), ("b", "completed")]
        # Cancelled by the other attempt, and not by the end of the request.
        assert "the other attempt has answered first" in stage.ends.reasons


async def slow_first(stage: Stage, **takes: float) -> Response:
    """Ask until the first attempt is on worker ``a``, whose answers take long."""
    for _ in range(2):
        stage.starts.clear()
        stage.takes = {}
        if stage.cluster.master.server.router.catalog.replicas("m")[0].name == "a":
            break
        await stage.ask()
    stage.starts.clear()
    stage.takes = {"a": 10.0, **takes}
    return await stage.ask()


async def test_the_first_attempt_may_still_be_the_first_to_answer(autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        response = await slow_first(stage, a=USUAL + 0.3, b=5.0)
        assert stage.starts == ["a", "b"]
        assert vector(response) == 1.0
        assert response.headers["x-trio-cluster-worker"] == "a"
        assert stage.hedges == (1, 0)


async def test_the_slot_of_the_loser_is_free_when_it_has_stopped_and_not_before(
    autojump_clock: MockClock,
) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        stage.hides = 3.0
        assert vector(await slow_first(stage)) == 2.0
        answered = trio.current_time()
        await trio.sleep(1)
        # Its handler hides from the cancellation, so it still counts: on the worker and on the master.
        assert stage.in_flight == {"a": 1, "b": 0}
        assert stage.cluster.workers["a"].server.pool.running == 1
        await trio.sleep(2.1)
        assert 2.9 <= stage.stopped["a"] - answered <= 3.1
        assert stage.in_flight == {"a": 0, "b": 0}
        assert stage.cluster.workers["a"].server.pool.running == 0


async def test_a_client_that_leaves_ends_both_attempts(autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        with trio.move_on_after(2):
            await slow_first(stage, b=10.0)
        assert stage.starts == ["a", "b"]
        await trio.sleep(0.1)
        assert stage.in_flight == {"a": 0, "b": 0}
        assert [outcome for _, outcome in stage.ends.outcomes[-2:]] == ["cancelled", "cancelled"]


async def test_a_request_that_times_out_ends_both_attempts(autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        for _ in range(2):
            stage.starts.clear()
            stage.takes = {"a": 30.0, "b": 30.0}
            response = await stage.ask(x_request_timeout="5")
            assert (response.status, response.error["code"]) == (504, "timeout")
            assert len(stage.starts) <= 2
        await trio.sleep(3)
        assert stage.in_flight == {"a": 0, "b": 0}


@pytest.mark.parametrize("lost", ["a", "b"])
async def test_if_one_attempt_is_lost_the_other_goes_on(lost: str, autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        responses = []

        async def ask() -> None:
            responses.append(await slow_first(stage, a=4.0, b=4.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(2.5)
            assert stage.starts == ["a", "b"]
            stage.cluster.workers[lost].kill()
        assert vector(responses[0]) == (2.0 if lost == "a" else 1.0)
        # Neither of the two is retried.
        assert stage.starts == ["a", "b"]


@pytest.mark.parametrize("lost", ["a", "b"])
async def test_a_request_has_waited_for_the_attempt_that_was_not_lost_when_its_time_is_over(
    lost: str, autojump_clock: MockClock
) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        stage.takes = {"a": 30.0, "b": 30.0}
        responses = []
        won = stage.hedges[1]

        async def ask() -> None:
            responses.append(await stage.ask(x_request_timeout="5"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(2.5)
            assert sorted(stage.starts) == ["a", "b"]
            stage.cluster.workers[lost].kill()
        (response,) = responses
        assert (response.status, response.error["code"]) == (504, "timeout")
        path = f"/cluster/requests/{response.headers['x-request-id']}"
        story = (await stage.cluster.client().get(path)).json()
        assert story["outcome"] == "timed_out", story
        assert stage.hedges[1] == won
        await trio.sleep(3)
        assert sum(stage.in_flight.values()) == 0


async def test_an_attempt_whose_link_is_cut_goes_on_when_that_is_resumed(autojump_clock: MockClock) -> None:
    """It would not be opened elsewhere, so it is not given up for that; the other attempt may be lost."""
    async with staged("a", "b", resume_window=15.0) as stage:
        await stage.learn()
        stage.takes = {"a": 8.0, "b": 8.0}
        responses = []

        async def ask() -> None:
            responses.append(await stage.ask())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(2.5)
            assert sorted(stage.starts) == ["a", "b"]
            cut, lost = stage.starts
            stage.cluster.workers[cut].link.reset()
            await trio.sleep(1)
            stage.cluster.workers[lost].kill()
        assert vector(responses[0]) == (1.0 if cut == "a" else 2.0)
        assert len(stage.starts) == 2


async def test_if_both_attempts_are_lost_there_is_no_third(autojump_clock: MockClock) -> None:
    async with staged("a", "b", "c") as stage:
        await stage.learn(60)
        responses = []
        stage.takes = dict.fromkeys("abc", 8.0)

        async def ask() -> None:
            responses.append(await stage.ask())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(2)
            assert len(stage.starts) == 2
            for name in list(stage.starts):
                stage.cluster.workers[name].kill()
        assert (responses[0].status, responses[0].error["code"]) == (502, "worker_lost")
        assert len(stage.starts) == 2


async def test_an_error_of_the_handler_is_an_answer(autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        stage.fails = {"b": ApiError(418, "no")}
        response = await slow_first(stage)
        assert stage.starts == ["a", "b"]
        assert response.status == 418
        assert response.headers["x-trio-cluster-worker"] == "b"


@pytest.mark.parametrize("why", ["one replica", "no hedge", "few answers", "draining", "busy"])
async def test_there_is_no_second_attempt(why: str, autojump_clock: MockClock) -> None:
    names = ["a"] if why == "one replica" else ["a", "b"]
    async with staged(*names, hedge=why != "no hedge") as stage:
        await stage.learn(10 if why == "few answers" else LESSONS)
        stage.takes = {"a": 3.0, "b": 3.0}
        async with trio.open_nursery() as nursery:
            if why == "busy":
                for _ in range(4):
                    nursery.start_soon(stage.ask)
            else:
                nursery.start_soon(stage.ask)
            await trio.sleep(0.2)
            if why == "draining":
                stage.cluster.master.stop()
        assert len(stage.starts) == (4 if why == "busy" else 1)
        assert stage.hedges == (0, 0)


async def test_the_budget_bounds_second_attempts_if_everything_is_slow(autojump_clock: MockClock) -> None:
    async with staged("a", "b") as stage:
        await stage.learn()
        stage.takes = {"a": 2.0, "b": 2.0}
        before = stage.hedges[0]
        for _ in range(8):
            await stage.ask()
        # Two were saved up by the lessons; what is late is learned anew after ten answers.
        assert stage.hedges[0] - before == 2


@attrs.define
class Context:
    """What the race uses of the context of a request."""

    call: Call
    deadlines: ResponseDeadlines

    def add_call(self, call: Call) -> None:
        self.call = call


async def test_a_first_attempt_that_has_answered_at_the_same_time_was_not_replaced(
    autojump_clock: MockClock,
) -> None:
    # Which of the two tasks runs first is up to chance.
    for _ in range(20):
        router = Router(options=ClusterServerOptions())
        for name in ("a", "b"):
            router.catalog.add(ModelInfo("m", "embedding", hedge=True), Scripted(name), replicate=True)
        for _ in range(ENOUGH):
            router.hedging.late_after("m")
            router.hedging.record("m", USUAL)
        first = router.open(Request(endpoint="embeddings", kind="embedding", model="m", body=b"{}"))
        context: Any = Context(first, ResponseDeadlines(math.inf, math.inf, trio.current_time()))
        node_context: Any = SimpleNamespace(router=router)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first_event, node_context, context, math.inf)
            await trio.sleep(4 * USUAL)
            assert len(router.live) == 2
            for call in list(router.live):
                call.put(Head())
                call.put(Done())
                call.release()
        assert router.stats.counters()["retried"] == 0
