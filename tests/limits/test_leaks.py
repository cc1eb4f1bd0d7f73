"""Many requests that end in all ways: at the end nothing is reserved, and no slot is taken.

``LEAK_REQUESTS=10000`` in the environment plays more of them.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from redis_server import REDIS, redis_server

from trio_cluster import ApiError, ChatRequest, OutputChunk
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.gateway.context import RequestContext
from trio_cluster.limits.limiter import Limiter
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

REQUESTS: Final = int(os.environ.get("LEAK_REQUESTS", "600"))

LIMITS: Final = (
    Limits(requests_per_minute=5000, tokens_per_minute=10**8, max_concurrency=30),
    Limits(requests_per_minute=300, tokens_per_minute=10**7, budget_tokens=10**9),
    Limits(tokens_per_minute=100_000, max_concurrency=6),
    None,
)

#: What the model does, and how its client behaves.
SCRIPTS: Final = ("plain", "slow", "raises", "refuses", "raises late", "silent", "hangs", "long")
CLIENTS: Final = (
    "waits",
    "waits",
    "waits",
    "leaves",
    "resets",
    "times out",
    "operator",
    "invalid",
    "unknown",
    "huge",
)


class Keys:
    async def authenticate(self, context: RequestContext) -> Principal:
        number = int(context.header(b"x-number") or 3)
        limits = LIMITS[number % len(LIMITS)]
        return Principal(f"key-{number % len(LIMITS)}", "admin", limits=limits)


async def model(request: ChatRequest, pieces: int) -> AsyncIterator[Any]:
    script = request.last_text
    if script == "raises":
        raise RuntimeError
    if script == "refuses":
        raise ApiError(429, "tired", code="tired")
    if script == "silent":
        await trio.sleep(1000)
    try:
        for _ in range(pieces if script == "long" else 4):
            yield "some words "
            if script != "plain":
                await trio.sleep(0.3)
            if script == "raises late":
                raise RuntimeError
        if script != "slow":
            yield OutputChunk.usage(20, 12)
    finally:
        if script == "hangs":
            with trio.CancelScope(shield=True):
                await trio.sleep(2)


class Load:
    def __init__(self, cluster: SimulatedCluster, seed: int, long: int = 200) -> None:
        self.cluster = cluster
        self.model = partial(model, pieces=long)
        self.rng = random.Random(seed)
        self.ends: Counter[str] = Counter()

    async def one(self, number: int) -> None:
        rng = self.rng
        behavior, script, after = rng.choice(CLIENTS), rng.choice(SCRIPTS), rng.uniform(0, 3)
        headers = {"x-number": str(number), "x-request-id": f"request-{number}"}
        if behavior == "times out":
            headers["x-request-timeout"] = f"{rng.uniform(0.05, 3):.2f}"
        client = self.cluster.client(f"client-{number}", **headers)
        fields = {"max_tokens": 10**12} if behavior == "huge" else {}
        if behavior == "invalid":
            fields = {"temperature": "hot"}
        name = "unknown" if behavior == "unknown" else rng.choice(["m", "m", "alone"])
        if behavior == "operator":
            self.nursery.start_soon(self._cancel, number, after)
        try:
            with trio.move_on_after(after if behavior in ("leaves", "resets") else 500) as scope:
                async with client.open_chat(name, script, stream=rng.random() < 0.6, **fields) as response:
                    if behavior == "resets":
                        await trio.sleep(after * 0.7)
                        response.reset()
                        self.ends["reset"] += 1
                        return
                    done = await response.finish()
                    word = "" if done.complete and b'"error"' not in done.body else " failed"
                    if done.status >= 400:
                        word = f" {done.error['code']}"
                    self.ends[f"{done.status}{word}"] += 1
            if scope.cancelled_caught:
                self.ends["left"] += 1
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.ends[type(error).__name__] += 1

    async def _cancel(self, number: int, after: float) -> None:
        await trio.sleep(after)
        try:
            operator = self.cluster.client("operator")
            await operator.post(f"/cluster/calls/request-{number}/cancel", {})
        except OSError:
            pass

    async def nemesis(self) -> None:
        """Break workers and links, again and again."""
        while True:
            await trio.sleep(self.rng.uniform(2, 8))
            name = self.rng.choice(["w1", "w2"])
            node = self.cluster.workers[name]
            what = self.rng.choice(["kill", "cut", "reset", "drain"])
            if what == "kill":
                node.kill()
            elif what == "drain":
                node.stop()
            elif node.server.worker_client is not None and node.server.worker_client.connected:
                node.link.cut() if what == "cut" else node.link.reset()
                continue
            await node.over.wait()
            await self.start_worker(name)

    async def start_worker(self, name: str) -> None:
        server = worker(name, **OPTIONS)
        server.register_chat("m", self.model)
        if name == "w1":
            server.register_chat("alone", self.model)
        await self.cluster.start_worker(server, wait=False)

    async def play(self, requests: int) -> None:
        for name in ("w1", "w2"):
            await self.start_worker(name)
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nemesis = trio.CancelScope()

            async def harm() -> None:
                with nemesis:
                    await self.nemesis()

            nursery.start_soon(harm)
            async with trio.open_nursery() as clients:
                for number in range(requests):
                    clients.start_soon(self.one, number)
                    await trio.sleep(self.rng.choice([0.0, 0.02, 0.1]))
            nemesis.cancel()


OPTIONS: Final[dict[str, Any]] = {
    "on_conflict": "replicate",
    "default_timeout": 4.0,
    "queue_timeout": 1.0,
    "max_concurrency": 6,
    "heartbeat_interval": 1.0,
    "worker_timeout": 4.0,
    "drain_timeout": 3.0,
}


async def test_nothing_is_reserved_when_all_requests_have_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_cluster(latency=0.005, authenticator=Keys(), **OPTIONS) as cluster:
        load = Load(cluster, 1)
        await load.play(REQUESTS)
        await settle(cluster)
        limiter = cluster.master.server.limiter
        assert limiter is not None
        report(load, limiter)
        assert (limiter.open_reservations, limiter.open_tokens) == (0, 0)
        # Slots are not only counted: they can be used.
        for key, limits in enumerate(LIMITS[:3]):
            assert limits is not None
            await trio.sleep(61)
            results: list[int] = []

            async def ask(key: int, results: list[int]) -> None:
                client = cluster.client("again", **{"x-number": str(key)})
                results.append((await client.chat("m", "plain", stream=False, max_tokens=5)).status)

            async with trio.open_nursery() as nursery:
                for _ in range(min(limits.max_concurrency or 6, 6)):
                    nursery.start_soon(ask, key, results)
            assert set(results) == {200}
        await settle(cluster)


def report(load: Load, limiter: Limiter) -> None:
    print(
        f"{sum(load.ends.values())} requests ended: {dict(load.ends.most_common())}; "
        f"reserved at the end: {limiter.open_reservations} slots, {limiter.open_tokens} tokens"
    )


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path) as server:
        yield server.url


@pytest.mark.processes
@pytest.mark.skipif(REDIS is None, reason="no redis-server and no valkey-server is installed here")
async def test_nothing_is_reserved_in_redis_either(redis_url: str) -> None:
    """In real time, since the server lives in it; so with fewer requests."""
    pytest.importorskip("coredis", reason="the extra 'redis' is not installed")
    options = OPTIONS | {"limits": redis_url}
    async with open_cluster(authenticator=Keys(), **options) as cluster:
        # Six seconds, which is longer than anything else here: drains, timeouts, and the patience of clients.
        load = Load(cluster, 2, long=20)
        await load.play(min(REQUESTS, 80))
        await settle(cluster)
        limiter = cluster.master.server.limiter
        assert limiter is not None
        report(load, limiter)
        assert (limiter.open_reservations, limiter.open_tokens) == (0, 0)
        await trio.sleep(0.3)
        url = redis_url.removeprefix("redis://").partition("/")[0]
        host, _, port = url.partition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            for key in range(3):
                await stream.send_all(b"ZCARD {trio-cluster}:limits:slots:key-%d\r\n" % key)
                assert await stream.receive_some() == b":0\r\n"
