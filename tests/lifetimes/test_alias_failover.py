"""A request for a list of models goes on to the next one in each phase before its answer, and in none after that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, ClusterServer
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.testing import Response, SimulatedClient, SimulatedCluster, open_cluster, settle, worker

OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 20.0,
    "worker_timeout": 15.0,
    "drain_timeout": 10.0,
    "queue_timeout": 2.0,
    "max_concurrency": 1,
    "on_conflict": "replicate",
    "keepalive": 0.0,
}


class Limited:
    """An authenticator: what is reserved for a request has to be given back."""

    async def authenticate(self, context: Any) -> Principal:
        return Principal("limited", "admin", limits=Limits(1000, 100_000_000, 100, 1_000_000_000, "day"))


class Stage:
    """A cluster whose workers have a model of their own name each, with the list of all of them as an alias.

    Attributes:
        starts: which handlers have started, and with how many seconds until their deadline.
        go: set to let the handlers end.
        speaks: the handlers give some output before they wait.
        responses: of the clients, in the order of their ends.
    """

    def __init__(self, cluster: SimulatedCluster, nursery: trio.Nursery) -> None:
        self.cluster = cluster
        self.nursery = nursery
        self.starts: list[tuple[str, float]] = []
        self.go = trio.Event()
        self.speaks = False
        self.responses: list[Response] = []

    def add(self, server: ClusterServer, name: str, model: str) -> None:
        @server.chat(model)
        async def handler(request: Any) -> AsyncIterator[str]:
            assert request.model == request.raw["model"] == model
            self.starts.append((name, trio.current_effective_deadline() - trio.current_time()))
            if self.speaks:
                yield "begun "
            await self.go.wait()
            yield f"from {name}"

    async def ask(self, *, stream: bool = True, model: str = "list", **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        client: SimulatedClient = self.cluster.client(**named)
        self.responses.append(await client.chat(model, stream=stream))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.starts]

    @property
    def retried(self) -> int:
        return self.cluster.master.server.router.stats.retried


@asynccontextmanager
async def staged(models: dict[str, str], **options: Any) -> AsyncIterator[Stage]:
    """Open a cluster with workers, which each serve one model, by name."""
    aliases = {"list": list(dict.fromkeys(models.values()))}
    async with (
        open_cluster(
            latency=0.01, aliases=aliases, authenticator=Limited(), **(OPTIONS | options)
        ) as cluster,
        trio.open_nursery() as nursery,
    ):
        stage = Stage(cluster, nursery)
        for name, model in models.items():
            server = worker(name, **(OPTIONS | options))
            stage.add(server, name, model)
            await cluster.start_worker(server)
        yield stage
        for name in models:
            cluster.workers[name].thaw()
        stage.go.set()
        await settle(cluster)
        limiter = cluster.master.server.limiter
        assert limiter is not None
        assert limiter.open_reservations == 0
        nursery.cancel_scope.cancel(reason="the test is over")


def check(stage: Stage, text: str, model: str, worker_name: str, *, sent_late: bool = False) -> None:
    (response,) = stage.responses
    assert (response.status, response.complete) == (200, True), response.body
    assert text.encode() in response.body
    assert b'"model":"list"' in response.body
    if not sent_late:
        assert response.headers["x-trio-cluster-model"] == model
        assert response.headers["x-trio-cluster-worker"] == worker_name


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("cause", ["killed", "cut", "frozen", "drained"])
async def test_the_next_model_answers_if_the_first_is_lost_before_its_answer(
    stream: bool, cause: str, autojump_clock: MockClock
) -> None:
    async with staged({"a": "one", "b": "two"}, resume_window=0.0) as stage:
        stage.nursery.start_soon(lambda: stage.ask(stream=stream))
        await trio.sleep(1)
        assert stage.names == ["a"]
        node = stage.cluster.workers["a"]
        if cause == "killed":
            node.kill()
        elif cause == "cut":
            node.link.cut()
        elif cause == "frozen":
            node.freeze()
        else:
            # It gives back what it has not begun, when its time is up.
            node.stop()
        await trio.sleep(18)
        assert stage.names[:2] == ["a", "b"]
        stage.go.set()
        await trio.sleep(1)
        check(stage, "from b", "two", "b")
        assert stage.retried == 1


async def test_the_next_model_answers_if_the_first_is_lost_while_it_waits_for_a_slot(
    autojump_clock: MockClock,
) -> None:
    async with staged({"a": "one", "b": "two"}, queue_timeout=10.0) as stage:
        stage.nursery.start_soon(lambda: stage.ask(model="one"))
        await trio.sleep(1)
        stage.nursery.start_soon(stage.ask)
        await trio.sleep(1)
        assert stage.names == ["a"]
        stage.cluster.workers["a"].kill()
        await trio.sleep(1)
        assert stage.names == ["a", "b"]
        assert [response.status for response in stage.responses] == [502]
        stage.responses.clear()
        stage.go.set()
        await trio.sleep(1)
        check(stage, "from b", "two", "b")


async def test_the_next_model_answers_if_the_first_stays_busy(autojump_clock: MockClock) -> None:
    async with staged({"a": "one", "b": "two"}) as stage:
        stage.nursery.start_soon(lambda: stage.ask(model="one"))
        await trio.sleep(1)
        stage.nursery.start_soon(stage.ask)
        await trio.sleep(1)
        assert stage.names == ["a"]
        await trio.sleep(1.5)
        # The queue timeout of the first model has passed.
        assert stage.names == ["a", "b"]
        stage.go.set()
        await trio.sleep(1)
        assert b"from b" in stage.responses[-1].body + stage.responses[0].body
        assert [response.status for response in stage.responses] == [200, 200]
        # A model that is asked for by its own name has no other, and is refused.
    async with staged({"a": "one", "b": "two"}) as stage:
        for _ in range(2):
            stage.nursery.start_soon(lambda: stage.ask(model="one"))
        await trio.sleep(4)
        assert [response.status for response in stage.responses] == [503]


async def test_a_replica_of_the_same_model_comes_before_the_next_model(autojump_clock: MockClock) -> None:
    async with staged({"a": "one", "b": "one", "c": "two"}, resume_window=0.0) as stage:
        stage.nursery.start_soon(stage.ask)
        await trio.sleep(1)
        stage.cluster.workers[stage.names[0]].kill()
        await trio.sleep(1)
        assert sorted(stage.names) == ["a", "b"]
        stage.cluster.workers[stage.names[1]].kill()
        await trio.sleep(1)
        assert stage.names[2:] == ["c"]
        stage.go.set()
        await trio.sleep(1)
        check(stage, "from c", "two", "c")
        assert stage.retried == 2


async def test_each_name_is_tried_once_and_the_end_of_the_list_is_the_end(autojump_clock: MockClock) -> None:
    async with staged({"a": "one", "b": "two", "c": "three"}, resume_window=0.0) as stage:
        stage.nursery.start_soon(stage.ask)
        for _ in range(3):
            await trio.sleep(1)
            stage.cluster.workers[stage.names[-1]].kill()
        await trio.sleep(1)
        assert stage.names == ["a", "b", "c"]
        (response,) = stage.responses
        assert (response.status, response.error["code"]) == (502, "worker_lost")
        assert response.headers["x-trio-cluster-model"] == "three"


async def test_after_the_first_byte_nothing_is_tried_any_more(autojump_clock: MockClock) -> None:
    async with staged({"a": "one", "b": "two"}, resume_window=0.0) as stage:
        stage.speaks = True
        stage.nursery.start_soon(stage.ask)
        await trio.sleep(1)
        stage.cluster.workers["a"].kill()
        await trio.sleep(1)
        assert stage.names == ["a"]
        assert stage.retried == 0
        assert stage.responses[0].report().ending == "failed"


async def test_the_total_timeout_counts_on(autojump_clock: MockClock) -> None:
    async with staged({"a": "one", "b": "two"}, resume_window=0.0) as stage:
        stage.nursery.start_soon(lambda: stage.ask(x_request_timeout="10"))
        await trio.sleep(4)
        stage.cluster.workers["a"].kill()
        await trio.sleep(1)
        assert stage.names == ["a", "b"]
        assert 5.9 <= stage.starts[1][1] <= 6.1
        await trio.sleep(8)
        (response,) = stage.responses
        assert (response.status, response.error["code"]) == (504, "timeout")


async def test_a_client_that_leaves_leaves_nothing_whichever_model_has_its_request(
    autojump_clock: MockClock,
) -> None:
    async with staged({"a": "one", "b": "two"}, resume_window=0.0) as stage:
        with trio.move_on_after(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stage.ask)
                await trio.sleep(1)
                stage.cluster.workers["a"].kill()
        await trio.sleep(1)
        assert stage.names == ["a", "b"]
        assert not stage.cluster.master.server.router.live


async def test_a_failure_of_the_handler_is_its_own_and_moves_nothing(autojump_clock: MockClock) -> None:
    calls = []
    async with open_cluster(aliases={"list": ["one", "two"]}) as cluster:
        for name in ("one", "two"):

            @cluster.master.server.chat(name)
            async def handler(request: Any) -> str:
                calls.append(request.model)
                raise ApiError(503, "no", code="over_capacity")

        response = await cluster.client().chat("list")
        assert (response.status, response.error["message"]) == (503, "no")
        assert calls == ["one"]


async def test_the_next_model_answers_after_the_client_got_comments(autojump_clock: MockClock) -> None:
    async with staged({"a": "one", "b": "two"}, resume_window=0.0, keepalive=1.0) as stage:
        stage.nursery.start_soon(stage.ask)
        await trio.sleep(3)
        stage.cluster.workers["a"].kill()
        await trio.sleep(3)
        stage.go.set()
        await trio.sleep(1)
        check(stage, "from b", "two", "b", sent_late=True)


async def test_a_list_goes_past_a_model_whose_replicas_cannot_be_given_calls(
    autojump_clock: MockClock,
) -> None:
    async with staged({"a": "one", "b": "two"}) as stage:
        # For longer than its heartbeats may be late.
        stage.cluster.workers["a"].freeze()
        await trio.sleep(12)
        stage.nursery.start_soon(stage.ask)
        await trio.sleep(1)
        assert stage.names == ["b"]
        stage.go.set()
        await trio.sleep(1)
        check(stage, "from b", "two", "b")
