"""What a trace shows of the causes that ``docs/why.md`` names: a queue, a cold model, a slow replica, a slow client.

The queue is in ``test_traces.py``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import patience
import pytest
import trio

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from traced import PARENT, open_traced

from trio_cluster import ChatRequest, ClusterServer
from trio_cluster.core.story import AttemptFacts
from trio_cluster.telemetry.call_spans import local_waits

WAYS = pytest.mark.parametrize("otel", [False, True], ids=["master only", "both"])


@WAYS
async def test_a_slow_replica(otel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(request: ChatRequest) -> AsyncIterator[str]:
        await trio.sleep(0.3)
        yield "a"

    async with open_traced(monkeypatch) as traced:
        await traced.worker("w1", lambda server: server.register_chat("m", slow), otel=otel)
        await traced.ask()
        await traced.stop()
        handler, attempt = traced.collector.one("handler"), traced.collector.one("attempt")
        assert traced.collector.named("queue") == []
    assert handler.end - handler.begin >= 300_000_000
    assert attempt.end - attempt.begin >= 300_000_000
    assert "trio_cluster.held_back" not in handler.attributes


@WAYS
async def test_a_slow_client(otel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = 0

    async def large(request: ChatRequest) -> AsyncIterator[str]:
        nonlocal given
        for _ in range(400):
            given += 1
            yield "x" * 100_000

    def add(server: ClusterServer) -> None:
        server.register_chat("m", large)

    async with open_traced(monkeypatch) as traced:
        worker = await traced.worker("w1", add, otel=otel)
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        async with (
            traced.client(**PARENT) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            before = unmoved = 0
            with patience.fail_after(10):
                # Nothing moves any more: the client takes nothing. Many looks, for a process that gets no core for a
                # while moves nothing between two of them either.
                while unmoved < 25:
                    await trio.sleep(0.01)
                    unmoved = unmoved + 1 if before == given > 0 else 0
                    before = given
            assert given < 400
            async for _ in response.aiter_raw():
                pass
        assert not worker.router.live
        await traced.stop()
        handler = traced.collector.one("handler")
    assert handler.attributes["trio_cluster.held_back"] >= 0.2


def test_a_cold_model(facts: AttemptFacts) -> None:
    cold = msgspec.structs.replace(facts, cold_since=101.0, cold_for=30.0, queued_for=2.0, started_at=133.0)
    assert local_waits(cold) == [("model start", "", 101.0, 131.0), ("queue", "node", 131.0, 133.0)]


@pytest.fixture
def facts() -> AttemptFacts:
    """An attempt that was opened at 100, in which nothing has happened."""
    never = dict.fromkeys(
        ("started_at", "begun_at", "ended_at", "released_at", "queued_at", "cancelled_at"), -1.0
    )
    zero = dict.fromkeys(("queued_for", "queued_for_model", "cold_for", "held_back"), 0.0)
    false = dict.fromkeys(
        (
            "waiting",
            "forwarded",
            "overdue",
            "superseded",
            "complete",
            "lost",
            "retryable",
            "timed_out",
            "over_capacity",
        ),
        False,
    )
    return AttemptFacts(
        node="local", model="m", why="", candidates=[], cached=0, prompt_size=0, opened_at=100.0, cold_since=-1.0,
        cold="", notes=[], cancelled=None, cancelled_by="", error=None, usage=None, delivered=0, times={},
        **never, **zero, **false,
    )  # fmt: skip
