"""The limits of keys, as clients meet them: admissions, refusals, headers, and what the ends of requests free."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio

from trio_cluster import ApiError, ChatRequest, OutputChunk, RawCall
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.gateway.auth import key_of
from trio_cluster.gateway.context import RequestContext
from trio_cluster.testing import SimulatedClient, SimulatedCluster, open_cluster, settle, worker


@attrs.define
class Keys:
    """An authenticator whose keys are the names of principals."""

    limits: dict[str, Limits | None]

    async def authenticate(self, context: RequestContext) -> Principal:
        name = (key_of(context) or b"").decode()
        if name not in self.limits:
            raise ApiError(401, "unknown key", code="invalid_api_key")
        return Principal(name, limits=self.limits[name])


class Model:
    """A model that is told what to do by the last text of a request."""

    def __init__(self) -> None:
        self.usage: tuple[int, int] | None = (10, 5)
        self.go = trio.Event()
        self.lingers = 0.0

    async def answer(self, request: ChatRequest) -> AsyncIterator[Any]:
        text = request.last_text
        if "raises early" in text:
            raise RuntimeError
        if "refuses" in text:
            raise ApiError(429, "the model is tired", code="tired", retry_after=7)
        try:
            if "waits early" in text:
                await self.go.wait()
            yield "word "
            if "raises late" in text:
                raise RuntimeError
            if "waits late" in text:
                await self.go.wait()
            if self.usage is not None:
                yield OutputChunk.usage(*self.usage)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.lingers)


class Scene:
    def __init__(self, cluster: SimulatedCluster, model: Model, keys: Keys) -> None:
        self.cluster = cluster
        self.model = model
        self.keys = keys

    def client(self, key: str = "k") -> SimulatedClient:
        return self.cluster.client(authorization=f"Bearer {key}")

    async def ask(self, text: str = "hi", key: str = "k", **fields: Any) -> Any:
        return await self.client(key).chat("m", text, **fields)

    @property
    def open(self) -> tuple[int, int]:
        limiter = self.cluster.master.server.limiter
        assert limiter is not None
        return limiter.open_reservations, limiter.open_tokens


@contextlib.asynccontextmanager
async def scene(limits: Limits, *, forwarded: bool = True) -> AsyncIterator[Scene]:
    keys, model = Keys({"k": limits, "other": limits, "free": None}), Model()
    async with open_cluster() as cluster:
        cluster.master.kill()
        await cluster.master.over.wait()
        server = worker("master")
        server.authenticator = keys
        await cluster.start_master(server)
        back = worker("w") if forwarded else server
        back.register_chat("m", model.answer)
        if forwarded:
            await cluster.start_worker(back)
        yield Scene(cluster, model, keys)
        await settle(cluster)


async def test_requests_of_a_minute(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(requests_per_minute=2)) as each:
        first = await each.ask()
        assert first.status == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "1m0s"
        assert "x-ratelimit-limit-tokens" not in first.headers
        began = trio.current_time()
        await trio.sleep(20)
        assert (await each.ask()).status == 200
        refused = await each.ask()
        assert refused.status == 429
        assert (refused.error["code"], refused.error["type"]) == ("rate_limit_exceeded", "requests")
        wait = int(refused.headers["retry-after-ms"]) / 1000
        assert refused.headers["retry-after"] == "40"
        assert wait == pytest.approx(began + 60 - trio.current_time(), abs=0.05)
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        # Other keys have limits of their own, and some have none.
        assert (await each.ask(key="other")).status == 200
        free = await each.ask(key="free")
        assert free.status == 200
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]
        await trio.sleep(wait - 0.001)
        assert (await each.ask()).status == 429
        await trio.sleep(0.001)
        assert (await each.ask()).status == 200
        assert (await each.ask()).status == 429


async def test_tokens_are_reserved_and_settled(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(tokens_per_minute=1000)) as each:
        first = await each.ask(max_tokens=800)
        assert first.status == 200
        assert first.headers["x-ratelimit-limit-tokens"] == "1000"
        # What was reserved; it has used 15.
        assert 100 < int(first.headers["x-ratelimit-remaining-tokens"]) < 200
        second = await each.ask(max_tokens=800)
        assert second.status == 200
        # Nothing reports what this one has used, so that it counts as reserved.
        each.model.usage = None
        assert (await each.ask(max_tokens=800)).status == 200
        refused = await each.ask(max_tokens=800)
        assert (refused.status, refused.error["type"]) == (429, "tokens")
        assert refused.headers["retry-after"] == "60"


async def test_a_request_that_can_never_be_admitted(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(tokens_per_minute=1000)) as each:
        refused = await each.ask(max_tokens=5000)
        assert (refused.status, refused.error["type"]) == (429, "tokens")
        assert "never" in refused.error["message"]
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers
        assert refused.headers["x-ratelimit-remaining-tokens"] == "1000"


async def test_a_budget(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(budget_tokens=100, budget_per="month")) as each:
        each.model.usage = (40, 20)
        assert (await each.ask()).status == 200
        assert (await each.ask()).status == 200
        refused = await each.ask()
        assert (refused.status, refused.error["code"]) == (429, "insufficient_quota")
        assert refused.headers["x-should-retry"] == "false"
        assert "retry-after" not in refused.headers


@pytest.mark.parametrize("forwarded", [False, True])
async def test_a_slot_is_held_until_the_work_has_stopped(
    autojump_clock: trio.testing.MockClock, forwarded: bool
) -> None:
    async with scene(Limits(max_concurrency=1), forwarded=forwarded) as each:
        each.model.lingers = 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(each.ask, "waits late")
            await trio.sleep(1)
            refused = await each.ask()
            assert (refused.status, refused.error["type"]) == (429, "concurrency")
            assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
            nursery.cancel_scope.cancel()
        await trio.sleep(2.9)
        assert each.open[0] == 1
        assert (await each.ask()).status == 429
        await trio.sleep(0.2)
        assert each.open == (0, 0)
        assert (await each.ask()).status == 200


async def test_one_after_the_other_with_one_slot(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(max_concurrency=1)) as each:
        for text in ("hi", "raises early", "raises late", "refuses", "hi"):
            for stream in (False, True):
                response = await each.ask(text, stream=stream)
                assert response.status != 429 or response.error["code"] == "tired", (text, response.body)


@pytest.mark.parametrize(
    ("text", "stream", "status"),
    [("raises early", False, 500), ("raises early", True, 500), ("refuses", True, 429), ("hi", True, 200)],
)
async def test_headers_are_in_every_answer(
    autojump_clock: trio.testing.MockClock, text: str, stream: bool, status: int
) -> None:
    async with scene(Limits(requests_per_minute=5, tokens_per_minute=10_000)) as each:
        response = await each.ask(text, stream=stream)
        assert response.status == status
        for what in ("limit", "remaining", "reset"):
            for kind in ("requests", "tokens"):
                assert f"x-ratelimit-{what}-{kind}" in response.headers
        assert response.headers["x-ratelimit-remaining-requests"] == "4"


async def test_headers_are_in_answers_that_no_model_gives(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(Limits(requests_per_minute=5)) as each:
        client = each.client()
        assert (await each.ask()).status == 200
        for response in (
            await client.get("/v1/models"),
            await client.get("/v1/nothing"),
            await client.chat("nothing", "hi"),
            await client.post("/v1/chat/completions", {"model": "m"}),
        ):
            # None of them counts as a request for a model.
            assert response.headers["x-ratelimit-remaining-requests"] == "4", response.status


async def test_what_failed_before_its_first_byte_frees_its_tokens(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(Limits(tokens_per_minute=1000)) as each:
        for text in ("raises early", "refuses", "raises early"):
            for stream in (False, True):
                await each.ask(text, stream=stream, max_tokens=900)
        assert (await each.ask(max_tokens=900)).status == 200


async def test_what_was_broken_off_counts_as_its_prompt_and_what_had_come(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(Limits(tokens_per_minute=100_000)) as each:
        response = await each.ask("raises late", stream=True, max_tokens=90_000)
        assert response.status == 200
        response = await each.ask()
        remaining = int(response.headers["x-ratelimit-remaining-tokens"])
        # Much less than it had reserved, and more than nothing.
        assert 98_000 < remaining < 99_900


async def test_a_request_for_which_nothing_was_begun_is_none(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(Limits(requests_per_minute=1)) as each:
        master = each.cluster.master.server
        master.router.drain("testing")
        refused = await each.ask()
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        master.router.accept()
        assert (await each.ask()).status == 200
        assert (await each.ask()).status == 429


async def test_a_retried_request_counts_once(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(requests_per_minute=2, max_concurrency=1, tokens_per_minute=10_000)) as each:
        for server in (each.cluster.workers["w"].server,):
            server.options.on_conflict = "replicate"
        each.cluster.master.server.options.on_conflict = "replicate"
        again = worker("w2")
        again.register_chat("m", each.model.answer)
        await each.cluster.start_worker(again)
        results: list[Any] = []

        async def ask() -> None:
            results.append(await each.ask("waits early"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1)
            busy = next(name for name, node in each.cluster.workers.items() if node.server.pool.running)
            each.cluster.workers[busy].kill()
            await trio.sleep(1)
            assert each.open[0] == 1
            each.model.go.set()
        assert results[0].status == 200
        response = await each.ask()
        assert response.headers["x-ratelimit-remaining-requests"] == "0"


async def test_limits_of_a_server_behind_a_model_are_not_taken_for_those_of_the_key(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with scene(Limits(requests_per_minute=9, tokens_per_minute=1000), forwarded=False) as each:

        async def relay(call: RawCall) -> None:
            await call.receive()
            theirs = (("x-ratelimit-remaining-requests", "77"), ("x-ratelimit-limit-images", "5"))
            call.begin(429, "application/json", theirs)
            await call.send(b'{"error": {"message": "theirs", "type": "x", "param": null, "code": "theirs"}}')

        each.cluster.master.server.register_raw("raw", relay)
        for _ in range(3):
            limited = await each.client().chat("raw", "hi", stream=False, max_tokens=900)
            assert (limited.status, limited.error["code"]) == (429, "theirs")
        assert [limited.headers[name] for name in limited.headers if name.startswith("x-ratelimit-rem")] == [
            "6",
            limited.headers["x-ratelimit-remaining-tokens"],
        ]
        assert "x-ratelimit-limit-images" not in limited.headers
        free = await each.client("free").chat("raw", "hi", stream=False)
        assert free.headers["x-ratelimit-remaining-requests"] == "77"


async def test_a_lost_worker_frees_everything(autojump_clock: trio.testing.MockClock) -> None:
    async with scene(Limits(max_concurrency=1, tokens_per_minute=1000)) as each:
        results: list[Any] = []

        async def ask() -> None:
            results.append(await each.ask("waits early"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1)
            each.cluster.workers["w"].kill()
        assert results[0].status == 502
        assert each.open == (0, 0)


@pytest.mark.parametrize("failure", ["refuse", "allow"])
async def test_while_limits_cannot_be_counted_the_option_decides(failure: str) -> None:
    """In real time: the attempts to reach the server are real."""
    pytest.importorskip("coredis", reason="the extra 'redis' is not installed")
    keys = Keys({"k": Limits(requests_per_minute=1), "free": None})
    options = {"limits": "redis://127.0.0.1:1", "limits_failure": failure}
    async with open_cluster(authenticator=keys, **options) as cluster:
        cluster.master.server.register_chat("m", Model().answer)
        limited = cluster.client(authorization="Bearer k")
        first, second = [await limited.chat("m", stream=False) for _ in range(2)]
        if failure == "refuse":
            assert (first.status, first.error["code"]) == (503, "limits_unavailable")
            assert first.headers["retry-after"] == "1"
        else:
            # Each master counts alone.
            assert (first.status, second.status) == (200, 429)
        assert first.headers["x-ratelimit-limit-requests"] == "1"
        free = await cluster.client(authorization="Bearer free").chat("m", stream=False)
        assert free.status == 200
        await settle(cluster)
