"""Deadlines are propagated: what counts, from when, and that a handler knows how much time is left."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
from scenario import ENDPOINTS, LARGE, LATENCY, MODEL, Caller, Phase, Scenario, open_scenario
from trio.testing import MockClock

from trio_cluster.gateway.deadlines import GRACE
from trio_cluster.testing import settle

CHAT: Final = ENDPOINTS["chat-stream"]
PLACES: Final = pytest.mark.parametrize("forwarded", [False, True], ids=["local", "forwarded"])


def call(
    scenario: Scenario, *, endpoint: str = "chat-stream", whole: bool = True, padding: int = 0, **headers: Any
) -> Caller:
    """Send a request; ``headers`` have underscores instead of dashes."""
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    caller = Caller(scenario.cluster, ENDPOINTS[endpoint], padding=padding, whole=whole, reads=True, **named)
    scenario.nursery.start_soon(caller.run)
    return caller


@asynccontextmanager
async def asked(forwarded: bool, phase: Phase = "waiting", **options: Any) -> AsyncIterator[Scenario]:
    async with open_scenario(
        CHAT, phase, forwarded=forwarded, **({"max_concurrency": 1} | options)
    ) as scenario:
        yield scenario
        scenario.script.go.set()
        scenario.free_the_slot()
        await settle(scenario.cluster)


@PLACES
@pytest.mark.parametrize(
    ("server", "headers", "limit"),
    [
        (20, {}, 20),
        (20, {"x_request_timeout": 30}, 20),
        (20, {"x_request_timeout": 7}, 7),
        (20, {"x_stainless_read_timeout": 30}, 20),
        (20, {"x_stainless_read_timeout": 9}, 9),
        (20, {"x_request_timeout": 7, "x_stainless_read_timeout": 9}, 7),
        (20, {"x_request_timeout": 9, "x_stainless_read_timeout": 7}, 7),
        (math.inf, {"x_request_timeout": 7}, 7),
        (math.inf, {}, math.inf),
    ],
)
async def test_the_smallest_limit_is_the_deadline_of_the_handler(
    forwarded: bool, server: float, headers: dict[str, float], limit: float, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, default_timeout=server) as scenario:
        call(scenario, **headers)
        await trio.sleep(1)
        ((started, _),) = scenario.script.log
        assert scenario.script.deadline - started == pytest.approx(limit)


@pytest.mark.parametrize(("master", "worker"), [(5, 20), (20, 5)])
async def test_the_smaller_timeout_of_master_and_worker_applies(
    master: float, worker: float, autojump_clock: MockClock
) -> None:
    async with asked(True, default_timeout=worker) as scenario:
        scenario.master.options.server.default_timeout = master
        call(scenario)
        await trio.sleep(1)
        assert scenario.script.deadline - scenario.script.log[0][0] == pytest.approx(5)


@PLACES
async def test_the_time_in_the_queue_counts(forwarded: bool, autojump_clock: MockClock) -> None:
    async with asked(forwarded, queue_timeout=100) as scenario:
        scenario.occupy()
        await trio.sleep(1)
        caller = call(scenario, x_request_timeout=7)
        await trio.sleep(3)
        scenario.free_the_slot()
        await trio.sleep(1)
        assert scenario.script.words == ["starts"]
        ways = 2 if forwarded else 1
        assert scenario.script.deadline == pytest.approx(caller.asked_at + ways * LATENCY + 7)


@PLACES
async def test_a_request_whose_deadline_passes_in_the_queue_never_reaches_a_handler(
    forwarded: bool, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, queue_timeout=100) as scenario:
        scenario.occupy()
        await trio.sleep(1)
        caller = call(scenario, x_request_timeout=7)
        await trio.sleep(8)
        assert caller.response is not None
        assert (caller.response.status, caller.response.error["code"]) == (504, "timeout")
        scenario.free_the_slot()
        await trio.sleep(10)
        assert scenario.script.words == []


@PLACES
async def test_the_time_of_the_upload_does_not_count(forwarded: bool, autojump_clock: MockClock) -> None:
    async with asked(forwarded) as scenario:
        caller = call(scenario, whole=False, x_request_timeout=7, x_stainless_read_timeout=7)
        await trio.sleep(12)
        caller.send_rest.set()
        await trio.sleep(1)
        assert scenario.script.deadline - scenario.script.log[0][0] == pytest.approx(7)


async def test_the_time_on_the_link_counts_for_the_total_timeout_and_not_for_the_idle_timeout(
    autojump_clock: MockClock,
) -> None:
    async with asked(True, default_timeout=20) as scenario:
        scenario.cluster.workers["w"].link.delay(0.5)
        caller = call(scenario, padding=900_000, x_request_timeout=15)
        await trio.sleep(10)
        started = scenario.script.log[0][0]
        assert started - caller.asked_at > 2
        # Counted from when the worker received the call; the time that the body took is part of it.
        assert scenario.script.deadline == pytest.approx(caller.asked_at + 15 + 0.5, abs=0.2)
    async with asked(True, default_timeout=20) as scenario:
        scenario.cluster.workers["w"].link.delay(0.5)
        call(scenario, padding=900_000)
        await trio.sleep(10)
        assert scenario.script.deadline - scenario.script.log[0][0] == pytest.approx(20)


@PLACES
@pytest.mark.parametrize("endpoint", ["chat-stream", "completions-stream", "chat"])
async def test_a_response_that_is_late_is_a_failure_without_a_finish_reason(
    forwarded: bool, endpoint: str, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, "streaming") as scenario:
        caller = call(scenario, endpoint=endpoint, x_request_timeout=7)
        await trio.sleep(9)
        response = caller.response
        assert response is not None
        if endpoint == "chat":
            assert (response.status, response.error["code"]) == (504, "timeout")
        else:
            report = response.report()
            assert report.error is not None
            assert (report.ending, report.error["code"], report.finish_reasons) == ("failed", "timeout", {})
        assert response.error["type"] == "timeout_error" if endpoint == "chat" else True


async def silent_and_shielded(request: Any, provider: Any) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(30)


async def busy_and_shielded(request: Any, provider: Any) -> None:
    with trio.CancelScope(shield=True):
        for _ in range(30):
            await provider.push("more ")
            await trio.sleep(1)


async def fast_and_shielded(request: Any, provider: Any) -> None:
    with trio.CancelScope(shield=True):
        until = trio.current_time() + 30
        while trio.current_time() < until:
            await provider.push("x" * LARGE)
            await trio.sleep(0.01)


@PLACES
async def test_a_shielded_handler_that_is_always_ahead_of_its_client_does_not_exceed_the_total_timeout(
    forwarded: bool, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, default_timeout=20) as scenario:
        scenario.back.unregister_model(MODEL)
        scenario.back.register_chat(MODEL, fast_and_shielded)
        await trio.sleep(1)
        caller = call(scenario, x_request_timeout=7)
        # So slow that some output always waits.
        caller.pace = 0.1
        await trio.sleep(15)
        assert caller.response is not None
        report = caller.response.report()
        assert report.error is not None
        assert (report.ending, report.error["code"]) == ("failed", "timeout")
        assert caller.ended_at is not None
        # What was under way to a slow client takes longer.
        assert caller.ended_at - caller.asked_at < 7 + GRACE + 6
        await trio.sleep(20)


@PLACES
@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
@pytest.mark.parametrize("handler", [silent_and_shielded, busy_and_shielded], ids=["silent", "busy"])
async def test_a_shielded_handler_keeps_its_slot_but_not_its_client(
    forwarded: bool, endpoint: str, handler: Any, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, default_timeout=20) as scenario:
        scenario.back.unregister_model(MODEL)
        scenario.back.register_chat(MODEL, handler)
        await trio.sleep(1)
        caller = call(scenario, endpoint=endpoint, x_request_timeout=7)
        await trio.sleep(15)
        assert caller.ended_at is not None
        # The deadline of the busy one is checked when it gives its next piece.
        assert 7 < caller.ended_at - caller.asked_at <= 7 + GRACE + 1 + 4 * LATENCY
        assert scenario.back.pool.running == 1
        await trio.sleep(16)
        assert scenario.back.pool.running == 0
        if endpoint == "chat":
            assert caller.response is not None
            assert caller.response.status == 504
        elif handler is busy_and_shielded:
            assert caller.response is not None
            assert caller.response.report().ending == "failed"
