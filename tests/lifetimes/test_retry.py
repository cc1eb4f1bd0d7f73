"""A call without any output is retried once, on another replica and within its deadline; no other call is retried."""

from __future__ import annotations

import logging
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
    # So that a failure has its own status, however late it is.
    "keepalive": 0.0,
}


class Replicas:
    """Workers that serve the same model, whose handler waits until it may give output.

    Attributes:
        starts: which of their handlers have started, when, and with how many seconds to their deadline.
        cancelled: which of their handlers have been cancelled.
        may_answer: set to let the handlers give their output.
        begins_first: the handlers give some output before they wait.
    """

    def __init__(self, cluster: SimulatedCluster, nursery: trio.Nursery) -> None:
        self.cluster = cluster
        self.nursery = nursery
        self.starts: list[tuple[str, float, float]] = []
        self.cancelled: list[str] = []
        self.may_answer = trio.Event()
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
                await self.may_answer.wait()
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
        """The worker whose handler started last."""
        return self.cluster.workers[self.names[-1]]

    @property
    def retried(self) -> int:
        return self.cluster.master.server.router.stats.retried


@asynccontextmanager
async def replicas(*names: str, **options: Any) -> AsyncIterator[Replicas]:
    async with (
        open_cluster(latency=LATENCY, **(OPTIONS | options)) as cluster,
        trio.open_nursery() as nursery,
    ):
        all_of_them = Replicas(cluster, nursery)
        for name in names:
            await all_of_them.add(name)
        yield all_of_them
        for name in names:
            cluster.workers[name].thaw()
        await settle(cluster)
        nursery.cancel_scope.cancel(reason="the test is over")


def response_of(caller: Caller) -> Response:
    assert caller.response is not None
    return caller.response


def kill(node: SimulatedNode) -> None:
    node.kill()


def cut(node: SimulatedNode) -> None:
    node.link.cut()


def reset(node: SimulatedNode) -> None:
    node.link.reset()


@pytest.mark.parametrize("lose", [kill, cut])
async def test_the_log_tells_calls_that_were_retried_from_those_that_were_lost(
    lose: Any, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster.workers")
    async with replicas("a", "b") as cluster:
        caller = cluster.ask()
        await trio.sleep(1)
        lose(cluster.busy)
        await trio.sleep(1)
        cluster.may_answer.set()
        await trio.sleep(1)
        assert response_of(caller).complete
        assert cluster.retried == 1
    left = [vars(each)["fields"] for each in caplog.records if each.getMessage().startswith("worker left")]
    assert [(each["calls_lost"], each["calls_retried"]) for each in left[:1]] == [(0, 1)]


@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
@pytest.mark.parametrize("lose", [kill, cut, reset])
async def test_a_call_without_output_is_retried_on_another_replica(
    endpoint: str, lose: Any, autojump_clock: MockClock
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask(endpoint)
        await trio.sleep(1)
        lost = cluster.names[0]
        lose(cluster.busy)
        await trio.sleep(1)
        cluster.may_answer.set()
        await trio.sleep(1)
        (other,) = {"a", "b"} - {lost}
        assert cluster.names == [lost, other]
        response = response_of(caller)
        assert (response.status, response.complete) == (200, True)
        assert f"from {other}".encode() in response.body
        assert cluster.retried == 1


@pytest.mark.parametrize("http", ["lean", "hypercorn"])
@pytest.mark.parametrize("lose", [kill, cut, reset])
async def test_a_call_is_retried_also_after_its_client_got_comments(
    lose: Any, http: str, autojump_clock: MockClock
) -> None:
    async with replicas("a", "b", keepalive=1.0, http=http) as cluster:
        caller = cluster.ask()
        await trio.sleep(3.5)
        lost = cluster.names[0]
        lose(cluster.busy)
        await trio.sleep(1)
        cluster.may_answer.set()
        await trio.sleep(1)
        (other,) = {"a", "b"} - {lost}
        assert cluster.names == [lost, other]
        response = response_of(caller)
        report = response.report()
        assert (response.status, report.ending, report.text) == (200, "finished", f"from {other}")
        assert report.comments == 4
        assert cluster.retried == 1


async def test_a_retry_is_shown_in_metrics_and_status(autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        cluster.ask()
        await trio.sleep(1)
        cluster.busy.kill()
        cluster.may_answer.set()
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


async def test_the_second_worker_gets_what_is_left_of_the_total_timeout(
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
        assert (response_of(caller).status, response_of(caller).error["code"]) == (504, "timeout")


async def test_a_retry_does_not_extend_the_idle_timeout_of_the_client(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask()
        await trio.sleep(1)
        cluster.busy.freeze()
        await trio.sleep(30)
        assert len(cluster.names) == 2
        assert response_of(caller).status == 504
        assert caller.ended_at is not None
        assert caller.ended_at - caller.asked_at == pytest.approx(20 + GRACE, abs=4 * LATENCY)
        assert cluster.cancelled[-1] == cluster.names[-1]


async def test_a_call_whose_deadline_has_passed_is_not_retried(autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask(x_request_timeout="10")
        await trio.sleep(1)
        cluster.busy.freeze()
        await trio.sleep(20)
        assert response_of(caller).status == 504
        assert (len(cluster.names), cluster.retried) == (1, 0)


@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
async def test_after_the_first_output_a_call_is_not_retried(endpoint: str, autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        cluster.begins_first = True
        caller = cluster.ask(endpoint)
        await trio.sleep(1)
        cluster.busy.kill()
        await trio.sleep(1)
        response = response_of(caller)
        error = response.report().error if endpoint == "chat-stream" else response.error
        assert error is not None
        assert error["code"] == "worker_lost"
        assert (len(cluster.names), cluster.retried) == (1, 0)


async def test_a_call_is_retried_once_and_not_twice(autojump_clock: MockClock) -> None:
    async with replicas("a", "b", "c") as cluster:
        caller = cluster.ask()
        for _ in range(2):
            await trio.sleep(1)
            cluster.busy.kill()
        await trio.sleep(1)
        assert (response_of(caller).status, response_of(caller).error["code"]) == (502, "worker_lost")
        assert (len(cluster.names), cluster.retried) == (2, 1)


async def test_a_failure_of_the_handler_is_not_retried(autojump_clock: MockClock) -> None:
    async with replicas("a", "b") as cluster:
        for node in cluster.cluster.workers.values():
            node.server.unregister_model(MODEL)

            @node.server.chat(MODEL)
            async def broken(request: Any) -> str:
                cluster.starts.append(("one of them", 0.0, 0.0))
                raise RuntimeError("the handler fails")

        await trio.sleep(1)
        caller = cluster.ask()
        await trio.sleep(1)
        assert response_of(caller).status == 500
        assert (len(cluster.names), cluster.retried) == (1, 0)


async def test_a_call_that_a_draining_worker_gives_back_is_retried_on_another_replica(
    autojump_clock: MockClock,
) -> None:
    async with replicas("a", "b") as cluster:
        caller = cluster.ask()
        await trio.sleep(1)
        leaving = cluster.busy
        leaving.stop()
        # Its drain_timeout passes, and its handler has given no output.
        await trio.sleep(12)
        assert cluster.names == [leaving.name, *({"a", "b"} - {leaving.name})]
        cluster.may_answer.set()
        await trio.sleep(1)
        assert response_of(caller).complete
        assert cluster.retried == 1


@pytest.mark.parametrize("after", [0.2, 0.5], ids=["before the worker has received any of it", "half-way"])
async def test_a_call_whose_body_is_on_its_way_to_a_draining_worker_is_retried_on_another_replica(
    after: float, autojump_clock: MockClock
) -> None:
    async with replicas("a", "b") as cluster:
        cluster.may_answer.set()
        for node in cluster.cluster.workers.values():
            node.link.delay(0.4)
        caller = cluster.ask(padding=900_000)
        await trio.sleep(after)
        (first,) = {call.served_by for call in cluster.cluster.master.server.router.live}
        cluster.cluster.workers[first].stop()
        await trio.sleep(15)
        assert cluster.names == [*({"a", "b"} - {first})]
        assert response_of(caller).complete
        assert cluster.retried == 1


@pytest.mark.parametrize("after", [0.2, 0.5], ids=["before the worker has received any of it", "half-way"])
async def test_without_another_replica_the_client_may_try_again(
    after: float, autojump_clock: MockClock
) -> None:
    async with replicas("a") as cluster:
        cluster.cluster.workers["a"].link.delay(0.4)
        caller = cluster.ask(padding=900_000)
        await trio.sleep(after)
        cluster.cluster.workers["a"].stop()
        await trio.sleep(15)
        response = response_of(caller)
        assert (response.status, response.error["code"]) == (503, "shutting_down")
        assert int(response.headers["retry-after"]) >= 1
        assert cluster.names == []


async def test_a_call_whose_body_is_on_its_way_is_given_back_before_the_other_calls_have_finished(
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
        assert response_of(caller).status == 503
        cluster.may_answer.set()
        await trio.sleep(2)
        assert response_of(running).complete
        assert cluster.names == ["a"]


async def test_a_client_that_leaves_cancels_the_second_handler_like_the_first(
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


#: Codes of the errors about nodes, which a handler may also use for its own errors.
CODES: Final = (
    "shutting_down",
    "worker_lost",
    "upstream_lost",
    "model_not_found",
    "model_unavailable",
    "over_capacity",
    "cancelled",
)


@pytest.mark.parametrize("code", CODES)
async def test_an_error_of_the_handler_is_sent_to_the_client_whatever_its_code(
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
            response = await cluster.client().chat(MODEL, stream=False)
            assert (response.status, response.error["code"]) == (429, code)
            assert response.error["message"] == "the quota of this user is used up"
        assert cluster.master.server.router.stats.retried == 0
    # Each request ran once, the two on different replicas.
    assert sorted(runs) == ["w1", "w2"]


async def test_a_504_of_the_handler_is_not_counted_as_a_timeout(autojump_clock: MockClock) -> None:
    async with open_cluster(**OPTIONS) as cluster:
        server = worker("w1", **OPTIONS)

        @server.chat(MODEL)
        async def handler(request: Any) -> str:
            raise ApiError(504, "the database is slow")

        await cluster.start_worker(server)
        assert (await cluster.client().chat(MODEL, stream=False)).status == 504
        stats = cluster.master.server.router.stats
        assert (stats.failed, stats.timed_out) == (1, 0)
