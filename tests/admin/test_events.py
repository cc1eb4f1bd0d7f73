"""``GET /cluster/events``: what a subscriber is sent, how often, and that nothing is done while nobody listens."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import __version__
from trio_cluster.admin import events
from trio_cluster.admin.events import INTERVAL, KEEPALIVE, Pace, Sampler
from trio_cluster.gateway.context import RequestContext
from trio_cluster.testing import SimulatedCluster, StreamingResponse, open_cluster, worker

OPTIONS: dict[str, Any] = {"max_concurrency": 2, "keepalive": 0.0, "drain_timeout": 30.0}


@pytest.fixture(autouse=True)
def _looks_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have looks as often as they may be, however busy this machine is."""
    monkeypatch.setattr("trio_cluster.admin.events._SHARE", float("inf"))


class Subscriber:
    """Keeps what it is told.

    Attributes:
        state: the items of each kind, by their ids.
        events: the names of all events, with the times at which they came.
        comments: when a comment came.
    """

    def __init__(self, response: StreamingResponse) -> None:
        self.response = response
        self.state: dict[str, dict[str, Any]] = {"requests": {}, "workers": {}, "models": {}}
        self.events: list[tuple[float, str]] = []
        self.comments: list[float] = []
        self.gone: list[str] = []
        self._unread = b""

    async def follow(self) -> None:
        try:
            while True:
                self.take(await self.response.receive())
        except (trio.EndOfChannel, trio.ClosedResourceError):
            return

    def take(self, data: bytes) -> None:
        *events, self._unread = (self._unread + data).split(b"\n\n")
        for event in events:
            if event.startswith(b":"):
                self.comments.append(trio.current_time())
                continue
            name, content = event.split(b"\n")
            self.apply(name.removeprefix(b"event: ").decode(), json.loads(content.removeprefix(b"data: ")))

    def apply(self, name: str, content: dict[str, Any]) -> None:
        self.events.append((trio.current_time(), name))
        assert (name == "snapshot") == (len(self.events) == 1)
        for kind, items in content.items():
            if name == "remove":
                for key in items:
                    del self.state[kind][key]
                    self.gone.append(key)
            else:
                self.state[kind] |= {item["id"]: item for item in items}

    @property
    def requests(self) -> dict[str, Any]:
        return {item["request_id"]: item for item in self.state["requests"].values()}


@asynccontextmanager
async def subscribed(
    cluster: SimulatedCluster, nursery: trio.Nursery, name: str = "page", **headers: str
) -> AsyncIterator[Subscriber]:
    client = cluster.client(name)
    async with client.open("GET", "/cluster/events", b"", headers=headers) as response:
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert abs(float(response.headers["x-trio-cluster-time"]) - time.time()) < 60
        subscriber = Subscriber(response)
        nursery.start_soon(subscriber.follow)
        yield subscriber


@asynccontextmanager
async def running() -> AsyncIterator[SimulatedCluster]:
    async with open_cluster(latency=0.01, **OPTIONS) as opened:
        server = worker("w", **OPTIONS)

        @server.chat("m")
        async def handler(request: Any) -> AsyncIterator[str]:
            for _ in range(500):
                await trio.sleep(0.01)
                yield "token "

        await opened.start_worker(server)
        yield opened


async def test_a_request_comes_changes_and_goes(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with running() as cluster, subscribed(cluster, nursery) as page:
        await trio.sleep(1)
        assert (page.requests, list(page.state["workers"]), list(page.state["models"])) == ({}, ["w"], ["m"])
        assert [name for _, name in page.events] == ["snapshot"]
        nursery.start_soon(cluster.client(**{"x-request-id": "r1", "x-request-timeout": "60"}).chat, "m")
        await trio.sleep(1)
        first = page.requests["r1"]
        assert (first["model"], first["node"], first["phase"], first["attempts"]) == (
            "m",
            "w",
            "streaming",
            1,
        )
        assert first["deadline"] - first["began"] == pytest.approx(60, abs=0.01)
        await trio.sleep(2)
        assert page.requests["r1"]["delivered"] > first["delivered"]
        assert page.requests["r1"]["began"] == first["began"]
        await trio.sleep(4)
        assert page.requests == {}
        assert page.gone == [first["id"]]


async def test_requests_that_were_watched_are_not_kept_when_they_are_over(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with running() as cluster:
        async with trio.open_nursery() as requests, subscribed(cluster, nursery) as page:
            requests.start_soon(cluster.client().chat, "m")
            await trio.sleep(1)
            assert len(page.requests) == 1
        await trio.sleep(1)
        gc.collect()
        kept = [
            each
            for each in gc.get_objects()
            if type(each) is RequestContext and each.path.endswith("chat/completions")
        ]
        assert kept == []


async def test_a_request_shows_its_attempts_and_what_it_waits_for(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    options = OPTIONS | {"max_concurrency": 1, "resume_window": 0.0, "heartbeat_interval": 0.2}
    async with open_cluster(latency=0.01, aliases={"good": "m"}, **options) as cluster:

        async def start(name: str) -> Any:
            server = worker(name, **options)

            @server.chat("m")
            async def handler(request: Any) -> AsyncIterator[str]:
                await trio.sleep(3)
                for _ in range(30):
                    await trio.sleep(0.1)
                    yield "token "

            return await cluster.start_worker(server)

        first = await start("w1")
        async with subscribed(cluster, nursery) as page:
            for name in ("r1", "r2"):
                nursery.start_soon(cluster.client(**{"x-request-id": name}).chat, "good")
                await trio.sleep(1)
            request, waits = page.requests["r1"], page.requests["r2"]
            assert (request["model"], request["alias"], request["phase"]) == ("m", "good", "waiting")
            assert (waits["phase"], waits["waits_for"]) == ("queued", "a slot of w1")
            assert request["first_output"] is None
            await trio.sleep(1.5)
            request = page.requests["r1"]
            assert (request["phase"], request["waits_for"]) == ("streaming", "")
            assert 3.0 < request["first_output"] - request["began"] < 3.4
            (call,) = request["calls"]
            assert (call["attempt"], call["kind"], call["node"], call["model"]) == (1, "first", "w1", "m")
            assert (call["phase"], call["error"]) == ("streaming", "")
            assert call["delivered"] == request["delivered"] > 0
            # The worker is lost, and what had not begun there is asked elsewhere.
            await start("w2")
            first.kill()
            await trio.sleep(1)
            assert "r1" not in page.requests
            lost, again = page.requests["r2"]["calls"]
            assert (lost["node"], lost["phase"], lost["error"]) == ("w1", "over", "worker_lost")
            assert (again["attempt"], again["kind"], again["node"], again["phase"]) == (
                2,
                "retry",
                "w2",
                "waiting",
            )
            assert (page.requests["r2"]["node"], page.requests["r2"]["attempts"]) == ("w2", 2)


async def test_a_request_whose_client_does_not_read_says_so(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with open_cluster(keepalive=0.0) as cluster:

        @cluster.master.server.chat("m")
        async def handler(request: Any) -> AsyncIterator[str]:
            while True:
                yield "token " * 1000

        async with subscribed(cluster, nursery) as page, cluster.client("slow").open_chat("m"):
            await trio.sleep(2)
            (request,) = page.state["requests"].values()
            assert request["waits_for"] == "its client, which reads slowly"
            assert (request["node"], request["produced"] > request["delivered"]) == ("local", True)


async def test_workers_and_models_show_what_they_are(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with open_cluster(aliases={"good": ["m", "other"]}, on_conflict="replicate", **OPTIONS) as cluster:
        for name in ("w1", "w2"):
            server = worker(name, **OPTIONS)

            @server.chat("m")
            async def handler(request: Any) -> AsyncIterator[Any]:
                for _ in range(20):
                    await trio.sleep(0.05)
                    yield "token "
                cached = {"cached_tokens": 50}
                yield {
                    "usage": {"prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": cached}
                }

            await cluster.start_worker(server)
        async with subscribed(cluster, nursery) as page:
            await trio.sleep(1)
            first = page.state["workers"]["w1"]
            assert (first["state"], first["capacity"], first["models"]) == ("ok", 2, ["m"])
            assert (first["version"], first["lag"]) == (__version__, 0.0)
            assert abs(first["connected_since"] - time.time()) < 60
            model = page.state["models"]["m"]
            assert (model["kind"], model["state"], model["in_flight"]) == ("chat", "ready", 0)
            assert model["aliases"] == [{"id": "good", "alias_of": ["m", "other"]}]
            assert [(each["node"], each["available"]) for each in model["replicas"]] == [
                ("w1", True),
                ("w2", True),
            ]
            assert model["tokens_per_second"] is None
            nursery.start_soon(cluster.client().chat, "m")
            await trio.sleep(0.5)
            assert page.state["models"]["m"]["in_flight"] == 1
            assert sum(each["in_flight"] for each in page.state["models"]["m"]["replicas"]) == 1
            await trio.sleep(2)
            model = page.state["models"]["m"]
            assert model["in_flight"] == 0
            assert model["tokens_per_second"] == pytest.approx(20, rel=0.1)
            assert (model["prompt_tokens"], model["cached_tokens"]) == (100, 50)
            # And now nothing changes any more, as long as nothing is asked.
            count = len(page.events)
            await trio.sleep(60)
            assert len(page.events) == count


async def test_a_model_with_one_replica_has_a_speed_too(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with open_cluster(**OPTIONS) as cluster, subscribed(cluster, nursery) as page:
        server = worker("w", **OPTIONS)

        @server.chat("m")
        async def handler(request: Any) -> AsyncIterator[Any]:
            for _ in range(21):
                yield "token "
                await trio.sleep(0.05)
            yield {"usage": {"prompt_tokens": 10, "completion_tokens": 21}}

        await cluster.start_worker(server)
        await cluster.client().chat("m")
        await trio.sleep(1)
        model = page.state["models"]["m"]
        assert model["tokens_per_second"] == pytest.approx(20, rel=0.1)
        assert (model["prompt_tokens"], model["cached_tokens"]) == (10, 0)
        # Each is an event of a stream, with its JSON.
        assert 100 < model["bytes_per_token"] < 400


async def test_a_worker_whose_machine_sleeps_is_shown(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    wake = {"w": "02:42:ac:11:00:02@127.0.0.1"}
    async with (
        open_cluster(latency=0.01, wake=wake, **OPTIONS) as cluster,
        subscribed(cluster, nursery) as page,
    ):
        server = worker("w", **OPTIONS)

        async def handler(request: Any) -> str:
            return "hello"

        server.register_chat("m", handler)
        node = await cluster.start_worker(server)
        await trio.sleep(1)
        assert page.state["workers"]["w"]["state"] == "ok"
        node.stop()
        await trio.sleep(10)
        away = page.state["workers"]["w"]
        assert (away["state"], away["models"], away["connected_since"]) == ("asleep", ["m"], None)
        assert page.state["models"]["m"]["state"] == "cold"
        with trio.CancelScope() as asking:
            nursery.start_soon(cluster.client().chat, "m")
            await trio.sleep(1)
            (request,) = page.state["requests"].values()
            assert (request["waits_for"], page.state["workers"]["w"]["state"]) == ("waking w", "waking")
            asking.cancel()
        nursery.cancel_scope.cancel()


async def test_there_are_at_most_four_updates_a_second(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with running() as cluster, subscribed(cluster, nursery) as page:
        for _ in range(2):
            nursery.start_soon(cluster.client().chat, "m")
        await trio.sleep(4)
        times = [when for when, name in page.events if name == "upsert"]
        assert 10 < len(times) <= 17
        assert all(later - earlier > 0.24 for earlier, later in pairwise(times))


async def test_workers_and_models_come_and_go(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with running() as cluster, subscribed(cluster, nursery) as page:
        await trio.sleep(0.5)
        cluster.workers["w"].stop()
        await trio.sleep(5)
        assert (page.state["workers"], page.state["models"]) == ({}, {})
        assert {"w", "m"} <= set(page.gone)


async def test_requests_of_one_id_are_two(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with running() as cluster, subscribed(cluster, nursery) as page:
        for _ in range(2):
            nursery.start_soon(cluster.client(**{"x-request-id": "same"}).chat, "m")
        await trio.sleep(1)
        assert [item["request_id"] for item in page.state["requests"].values()] == ["same", "same"]


@pytest.mark.parametrize(
    ("busy", "cost", "pause"),
    [
        (0.0, 0.0005, INTERVAL),
        (1.0, 0.006, INTERVAL),
        (0.1, 0.0045, 1.5),
        (1.0, 0.06, 2.0),
        (1.0, 0.5, 2.5),
        (0.0, 0.5, 2.5),
    ],
    ids=["idle, few", "busy, hundreds", "hardly busy, hundreds", "busy, many", "too many", "idle, too many"],
)
def test_looks_take_a_small_share_of_what_the_process_uses(
    monkeypatch: pytest.MonkeyPatch, busy: float, cost: float, pause: float
) -> None:
    used, at = 0.0, 0.0
    monkeypatch.setattr(events, "_SHARE", 0.03)
    monkeypatch.setattr(events.time, "process_time", lambda: used)
    monkeypatch.setattr(events.time, "perf_counter", lambda: at)
    pace = Pace()
    used, at = 10 * busy, 10.0
    assert pace.pause(cost) == pytest.approx(pause)
    # Only what was used since the last time counts.
    at = 20.0
    assert pace.pause(0.0015) == pytest.approx(0.5)


async def test_nothing_is_looked_at_while_nobody_listens(
    autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as cluster:
        looks: list[float] = []
        look = Sampler._look

        def noted(self: Sampler) -> None:
            looks.append(trio.current_time())
            look(self)

        monkeypatch.setattr(Sampler, "_look", noted)
        await cluster.client().chat("m")
        assert looks == []
        async with trio.open_nursery() as pages:
            async with subscribed(cluster, pages, "page"), subscribed(cluster, pages, "other"):
                await trio.sleep(10)
            pages.cancel_scope.cancel()
        # Two subscribers share them.
        assert len(looks) <= 43
        await trio.sleep(1)
        looks.clear()
        await trio.sleep(60)
        assert looks == []


async def test_a_subscription_is_over_as_soon_as_its_client_has_left(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribers = 0

    @contextmanager
    def counted(self: Sampler) -> Iterator[None]:
        nonlocal subscribers
        subscribers += 1
        try:
            yield
        finally:
            subscribers -= 1

    monkeypatch.setattr(Sampler, "subscribed", counted)
    async with running() as cluster, trio.open_nursery() as pages:
        async with subscribed(cluster, pages, "page"), subscribed(cluster, pages, "other"):
            await trio.sleep(1)
            assert subscribers == 2
        await trio.sleep(1)
        assert subscribers == 0
        pages.cancel_scope.cancel()


async def test_a_subscriber_that_does_not_read_gets_the_last_state_and_not_all_of_them(
    autojump_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as cluster:
        # Updates of this size do not fit into what is under way for long.
        monkeypatch.setattr("trio_cluster.admin.events._event", padded)
        async with cluster.client("page").open("GET", "/cluster/events", b"") as response:
            subscriber = Subscriber(response)
            await trio.sleep(1)
            for _ in range(20):
                await cluster.client().chat("m")
            async with trio.open_nursery() as reading:
                reading.start_soon(subscriber.follow)
                await trio.sleep(5)
                reading.cancel_scope.cancel()
        # A hundred seconds, with four updates in each.
        assert len(subscriber.events) < 60
        assert subscriber.requests == {}


def padded(name: str, data: Any) -> bytes:
    encoded = json.dumps({kind: [json.loads(bytes(item)) if not isinstance(item, str) else item for item in items]
                          for kind, items in data.items()})  # fmt: skip
    return f"event: {name}\ndata: {encoded}{' ' * 100_000}\n\n".encode()


async def test_a_quiet_subscription_has_comments(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with running() as cluster, subscribed(cluster, nursery) as page:
        await trio.sleep(3 * KEEPALIVE + 5)
        assert 2 <= len(page.comments) <= 3


async def test_a_subscription_does_not_hold_up_the_end_of_the_node(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with running() as cluster, subscribed(cluster, nursery) as page:
        nursery.start_soon(cluster.client().chat, "m")
        await trio.sleep(1)
        began = trio.current_time()
        cluster.master.stop()
        await cluster.master.over.wait()
        # The request has four more seconds.
        assert trio.current_time() - began < 6
        await trio.sleep(1)
        assert page.requests == {}
        assert page.response.complete


async def test_only_operators_may_listen(autojump_clock: MockClock) -> None:
    async with open_cluster(api_key="client", operator_key="ops") as opened:
        for key, status in (("", 401), ("client", 403), ("ops", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            async with opened.client().open("GET", "/cluster/events", b"", headers=headers) as response:
                assert response.status == status
