"""A call that nothing has come of is opened once more elsewhere, inside its time; and never otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from scenario import ENDPOINTS, LATENCY, MODEL, Caller
from trio.testing import MockClock

from trio_cluster import ApiError
from trio_cluster.gateway.deadlines import GRACE
from trio_cluster.testing import Response, SimulatedCluster, SimulatedNode, open_cluster, settle, worker

OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 20.0,
    "worker_timeout": 15.0,
    "drain_timeout": 10.0,
    "on_conflict": "replicate",
}


class Replicas:
    """Some workers that serve the same model, whose handler waits until it may speak.

    Attributes:
        starts: which of them have begun to answer, when, and with how much time.
        cancelled: which of them have been cancelled.
    """

    def __init__(self, cluster: SimulatedCluster, nursery: trio.Nursery) -> None:
        self.cluster = cluster
        self.nursery = nursery
        self.starts: list[tuple[str, float, float]] = []
        self.cancelled: list[str] = []
        self.speak = trio.Event()
        self.begins_first = False

    async def add(self, name: str) -> None:
        server = worker(name, **OPTIONS)

        @server.chat(MODEL)
        async def handler(request: Any) -> AsyncIterator[str]:
            now = trio.current_time()
            self.starts.append((name, now, trio.current_effective_deadline() - now))
            try:
                if self.begins_first:
                    yield "begun "
                await self.speak.wait()
                yield f"from {name}"
            except trio.Cancelled:
                self.cancelled.append(name)
                raise

        await self.cluster.start_worker(server)

    def ask(self, endpoint: str = "chat-stream", padding: int = 0, **headers: str) -> Caller:
        caller = Caller(
            self.cluster,
            ENDPOINTS[endpoint],
            padding=padding,
            whole=True,
            reads=True,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        )
        self.nursery.start_soon(caller.run)
        return caller

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.starts]

    @property
    def busy(self) -> SimulatedNode:
        """The worker that was asked last."""
        return self.cluster.workers[self.names[-1]]

    @property
    def retried(self) -> int:
        return self.cluster.master.server.router.stats.retried


@asynccontextmanager
async def replicas(*names: str) -> AsyncIterator[Replicas]:
    async with open_cluster(latency=LATENCY, **OPTIONS) as cluster, trio.open_nursery() as nursery:
        all_of_them = Replicas(cluster, nursery)
        for name in names:
            await all_of_them.add(name)
        yield all_of_them
        for name in names:
            cluster.workers[name].thaw()
        await settle(cluster)
        nursery.cancel_scope.cancel(reason="the test is over")


def answer_of(caller: Caller) -> Response:
    assert caller.answer is not None
    return caller.answer


def kill(node: SimulatedNode) -> None:
    node.kill()


def cut(node: SimulatedNode) -> None:
    node.link.cut()


def reset(node: SimulatedNode) -> None:
    node.link.reset()


@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
@pytest.mark.parametrize("lose", [kill, cut, reset])
async def test_a_call_that_nothing_has_come_of_is_answered_by_another_replica(
    endpoint: str, lose: Any, autojump_clock: MockClock
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask(endpoint)
        await trio.sleep(1)
        lost = cluster.names[0]
        lose(cluster.busy)
        await trio.sleep(1)
        cluster.speak.set()
        await trio.sleep(1)
        (other,) = {"a", "b"} - {lost}
        assert cluster.names == [lost, other]
        answer = answer_of(caller)
        assert (answer.status, answer.complete) == (200, True)
        assert f"from {other}".encode() in answer.body
        assert cluster.retried == 1


async def test_a_retry_is_shown_to_whoever_watches(autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        cluster.ask()
        await trio.sleep(1)
        cluster.busy.kill()
        cluster.speak.set()
        await trio.sleep(1)
        watcher = cluster.cluster.client("watcher")
        assert b"trio_cluster_calls_retried_total 1.0\n" in (await watcher.get("/metrics")).body
        status = (await watcher.get("/cluster/status")).json()
        assert status["calls"] == {
            "admitted": 2,
            "completed": 1,
            "cancelled": 0,
            "timed_out": 0,
            "worker_lost": 1,
            "failed": 0,
            "retried": 1,
            "in_flight": 0,
        }


async def test_the_second_worker_gets_what_is_left_of_the_budget_and_not_a_fresh_one(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask(x_request_timeout="10")
        await trio.sleep(1)
        await trio.sleep_until(caller.asked_at + 6)
        cluster.busy.kill()
        await trio.sleep(1)
        (_, first, given), (_, second, left) = cluster.starts
        assert given == pytest.approx(10)
        assert second + left == pytest.approx(caller.asked_at + 10 + 2 * LATENCY)
        assert second - first == pytest.approx(6, abs=4 * LATENCY)
        await trio.sleep(5)
        assert (answer_of(caller).status, answer_of(caller).error["code"]) == (504, "timeout")


async def test_the_silence_of_two_workers_together_is_not_longer_than_that_of_one(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask()
        await trio.sleep(1)
        cluster.busy.freeze()
        await trio.sleep(30)
        assert len(cluster.names) == 2
        assert answer_of(caller).status == 504
        assert caller.ended_at is not None
        assert caller.ended_at - caller.asked_at == pytest.approx(20 + GRACE, abs=4 * LATENCY)
        assert cluster.cancelled[-1] == cluster.names[-1]


async def test_a_call_whose_budget_is_used_up_is_not_opened_again(autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask(x_request_timeout="10")
        await trio.sleep(1)
        cluster.busy.freeze()
        await trio.sleep(20)
        assert answer_of(caller).status == 504
        assert (len(cluster.names), cluster.retried) == (1, 0)


@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
async def test_after_the_first_output_nothing_is_opened_again(
    endpoint: str, autojump_clock: MockClock
) -> None:
    async with replicas("a", "b") as cluster:
        cluster.begins_first = True
        caller = cluster.ask(endpoint)
        await trio.sleep(1)
        cluster.busy.kill()
        await trio.sleep(1)
        answer = answer_of(caller)
        error = answer.report().error if endpoint == "chat-stream" else answer.error
        assert error is not None
        assert error["code"] == "worker_lost"
        assert (len(cluster.names), cluster.retried) == (1, 0)


async def test_a_call_is_opened_again_once_and_not_twice(autojump_clock: MockClock) -> None:
    async with replicas("a", "b", "c") as cluster:
        caller = cluster.ask()
        for _ in range(2):
            await trio.sleep(1)
            cluster.busy.kill()
        await trio.sleep(1)
        assert (answer_of(caller).status, answer_of(caller).error["code"]) == (502, "worker_lost")
        assert (len(cluster.names), cluster.retried) == (2, 1)


async def test_a_failure_of_the_handler_is_nobody_elses_to_repeat(autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        for node in cluster.cluster.workers.values():
            node.server.unregister_model(MODEL)

            @node.server.chat(MODEL)
            async def broken(request: Any) -> str:
                cluster.starts.append(("one of them", 0.0, 0.0))
                raise RuntimeError("as the script says")

        await trio.sleep(1)
        caller = cluster.ask()
        await trio.sleep(1)
        assert answer_of(caller).status == 500
        assert (len(cluster.names), cluster.retried) == (1, 0)


async def test_a_call_that_a_worker_gives_back_is_answered_by_another_replica(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask()
        await trio.sleep(1)
        leaving = cluster.busy
        leaving.stop()
        # Its drain_timeout passes; the model had all that time, and has given nothing.
        await trio.sleep(12)
        assert cluster.names == [leaving.name, *({"a", "b"} - {leaving.name})]
        cluster.speak.set()
        await trio.sleep(1)
        assert answer_of(caller).complete
        assert cluster.retried == 1


@pytest.mark.parametrize("after", [0.2, 0.5], ids=["before the worker has heard of it", "half-way"])
async def test_a_call_whose_body_is_on_its_way_to_a_worker_that_stops_is_answered_by_another_one(
    after: float, autojump_clock: MockClock
) -> None:
    async with replicas("a", "b") as cluster:
        cluster.speak.set()
        for node in cluster.cluster.workers.values():
            node.link.delay(0.4)
        caller = cluster.ask(padding=900_000)
        await trio.sleep(after)
        (first,) = {call.served_by for call in cluster.cluster.master.server.router.live}
        cluster.cluster.workers[first].stop()
        await trio.sleep(15)
        assert cluster.names == [*({"a", "b"} - {first})]
        assert answer_of(caller).complete
        assert cluster.retried == 1


@pytest.mark.parametrize("after", [0.2, 0.5], ids=["before the worker has heard of it", "half-way"])
async def test_without_another_replica_it_is_an_invitation_to_try_again(
    after: float, autojump_clock: MockClock
) -> None:
    async with replicas("a") as cluster:
        cluster.cluster.workers["a"].link.delay(0.4)
        caller = cluster.ask(padding=900_000)
        await trio.sleep(after)
        cluster.cluster.workers["a"].stop()
        await trio.sleep(15)
        answer = answer_of(caller)
        assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) >= 1
        assert cluster.names == []


async def test_a_body_on_its_way_is_given_back_at_once_though_the_worker_has_other_calls_to_finish(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a") as cluster:
        running = cluster.ask()
        await trio.sleep(1)
        cluster.cluster.workers["a"].link.delay(0.4)
        caller = cluster.ask(padding=900_000)
        await trio.sleep(0.5)
        cluster.cluster.workers["a"].stop()
        await trio.sleep(0.5)
        assert answer_of(caller).status == 503
        cluster.speak.set()
        await trio.sleep(2)
        assert answer_of(running).complete
        assert cluster.names == ["a"]


async def test_a_client_that_leaves_stops_the_second_handler_like_the_first(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask()
        await trio.sleep(1)
        cluster.busy.kill()
        await trio.sleep(1)
        caller.leave()
        await trio.sleep(2 * LATENCY + 1e-6)
        assert cluster.cancelled == cluster.names


#: Codes of our own errors about nodes, which a handler may as well use for its own.
CODES: Final = (
    "shutting_down",
    "worker_lost",
    "upstream_lost",
    "model_not_found",
    "over_capacity",
    "cancelled",
)


@pytest.mark.parametrize("code", CODES)
async def test_a_handler_s_error_is_the_client_s_answer_whatever_its_code(
    code: str, autojump_clock: MockClock
) -> None:
    runs: list[str] = []
    async with open_cluster(**OPTIONS) as cluster:
        for name in ("w1", "w2"):
            server = worker(name, **OPTIONS)

            async def handler(request: Any, name: str = name) -> str:
                runs.append(name)
                raise ApiError(429, "the quota of this user is used up", code=code)

            server.register_chat(MODEL, handler)
            await cluster.start_worker(server)
        for _ in range(2):
            answer = await cluster.client().chat(MODEL, stream=False)
            assert (answer.status, answer.error["code"]) == (429, code)
            assert answer.error["message"] == "the quota of this user is used up"
        assert cluster.master.server.router.stats.retried == 0
    # Each request ran once, the two on different replicas.
    assert sorted(runs) == ["w1", "w2"]


async def test_a_handler_s_504_is_not_counted_as_a_deadline_of_ours(autojump_clock: MockClock) -> None:
    async with open_cluster(**OPTIONS) as cluster:
        server = worker("w1", **OPTIONS)

        @server.chat(MODEL)
        async def handler(request: Any) -> str:
            raise ApiError(504, "the database is slow")

        await cluster.start_worker(server)
        assert (await cluster.client().chat(MODEL, stream=False)).status == 504
        stats = cluster.master.server.router.stats
        assert (stats.failed, stats.timed_out) == (1, 0)
