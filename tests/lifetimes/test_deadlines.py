"""Deadlines travel: what counts, from when, and that a handler knows how much is left for it."""

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
    """Have somebody ask; ``headers`` with underscores for dashes."""
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    caller = Caller(scenario.cluster, ENDPOINTS[endpoint], padding=padding, whole=whole, reads=True, **named)
    scenario.nursery.start_soon(caller.run)
    return caller


@asynccontextmanager
async def asked(forwarded: bool, phase: Phase = "waiting", **options: Any) -> AsyncIterator[Scenario]:
    async with open_scenario(
        CHAT, phase, forwarded=forwarded, threaded=False, **({"max_concurrency": 1} | options)
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
async def test_the_smallest_limit_is_the_deadline_that_the_handler_sees(
    forwarded: bool, server: float, headers: dict[str, float], limit: float, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, default_timeout=server) as scenario:
        call(scenario, **headers)
        await trio.sleep(1)
        ((started, _),) = scenario.script.log
        assert scenario.script.deadline - started == pytest.approx(limit)


@pytest.mark.parametrize(("master", "worker"), [(5, 20), (20, 5)])
async def test_the_stricter_one_of_master_and_worker_holds(
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
async def test_a_budget_that_is_used_up_in_the_queue_never_reaches_a_handler(
    forwarded: bool, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, queue_timeout=100) as scenario:
        scenario.occupy()
        await trio.sleep(1)
        caller = call(scenario, x_request_timeout=7)
        await trio.sleep(8)
        assert caller.answer is not None
        assert (caller.answer.status, caller.answer.error["code"]) == (504, "timeout")
        scenario.free_the_slot()
        await trio.sleep(10)
        assert scenario.script.words == []


@PLACES
async def test_the_time_that_the_client_takes_for_its_upload_does_not_count(
    forwarded: bool, autojump_clock: MockClock
) -> None:
    async with asked(forwarded) as scenario:
        caller = call(scenario, whole=False, x_request_timeout=7, x_stainless_read_timeout=7)
        await trio.sleep(12)
        caller.send_rest.set()
        await trio.sleep(1)
        assert scenario.script.deadline - scenario.script.log[0][0] == pytest.approx(7)


async def test_the_time_on_the_link_counts_for_the_whole_answer_and_not_as_silence_of_the_model(
    autojump_clock: MockClock,
) -> None:
    async with asked(True, default_timeout=20) as scenario:
        scenario.cluster.workers["w"].link.delay(0.5)
        caller = call(scenario, padding=900_000, x_request_timeout=15)
        await trio.sleep(10)
        started = scenario.script.log[0][0]
        assert started - caller.asked_at > 2
        # Counted from the moment at which the worker has heard of it; what its body took was a part.
        assert scenario.script.deadline == pytest.approx(caller.asked_at + 15 + 0.5, abs=0.2)
    async with asked(True, default_timeout=20) as scenario:
        scenario.cluster.workers["w"].link.delay(0.5)
        call(scenario, padding=900_000)
        await trio.sleep(10)
        assert scenario.script.deadline - scenario.script.log[0][0] == pytest.approx(20)


@PLACES
@pytest.mark.parametrize("endpoint", ["chat-stream", "completions-stream", "chat"])
async def test_an_answer_that_is_late_is_a_failure_and_has_no_reason_to_have_finished(
    forwarded: bool, endpoint: str, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, "streaming") as scenario:
        caller = call(scenario, endpoint=endpoint, x_request_timeout=7)
        await trio.sleep(9)
        answer = caller.answer
        assert answer is not None
        if endpoint == "chat":
            assert (answer.status, answer.error["code"]) == (504, "timeout")
        else:
            report = answer.report()
            assert report.error is not None
            assert (report.ending, report.error["code"], report.finish_reasons) == ("failed", "timeout", {})
        assert answer.error["type"] == "timeout_error" if endpoint == "chat" else True


async def silent_and_deaf(request: Any, provider: Any) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(30)


async def busy_and_deaf(request: Any, provider: Any) -> None:
    with trio.CancelScope(shield=True):
        for _ in range(30):
            await provider.push("more ")
            await trio.sleep(1)


async def fast_and_deaf(request: Any, provider: Any) -> None:
    with trio.CancelScope(shield=True):
        until = trio.current_time() + 30
        while trio.current_time() < until:
            await provider.push("x" * LARGE)
            await trio.sleep(0.01)


@PLACES
async def test_not_even_a_deaf_handler_that_is_always_ahead_of_its_client_outlasts_the_budget(
    forwarded: bool, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, default_timeout=20) as scenario:
        scenario.back.unregister_model(MODEL)
        scenario.back.register_chat(MODEL, fast_and_deaf)
        await trio.sleep(1)
        caller = call(scenario, x_request_timeout=7)
        # Slow enough for there always to be something that waits.
        caller.pace = 0.1
        await trio.sleep(15)
        assert caller.answer is not None
        report = caller.answer.report()
        assert report.error is not None
        assert (report.ending, report.error["code"]) == ("failed", "timeout")
        assert caller.ended_at is not None
        # What was on its way to a slow client takes its time.
        assert caller.ended_at - caller.asked_at < 7 + GRACE + 6
        await trio.sleep(20)


@PLACES
@pytest.mark.parametrize("endpoint", ["chat-stream", "chat"])
@pytest.mark.parametrize("handler", [silent_and_deaf, busy_and_deaf], ids=["silent", "busy"])
async def test_a_handler_that_is_deaf_keeps_its_slot_but_not_its_client(
    forwarded: bool, endpoint: str, handler: Any, autojump_clock: MockClock
) -> None:
    async with asked(forwarded, default_timeout=20) as scenario:
        scenario.back.unregister_model(MODEL)
        scenario.back.register_chat(MODEL, handler)
        await trio.sleep(1)
        caller = call(scenario, endpoint=endpoint, x_request_timeout=7)
        await trio.sleep(15)
        assert caller.ended_at is not None
        # The busy one is asked again when it gives its next piece.
        assert 7 < caller.ended_at - caller.asked_at <= 7 + GRACE + 1 + 4 * LATENCY
        assert scenario.back.pool.running == 1
        await trio.sleep(16)
        assert scenario.back.pool.running == 0
        if endpoint == "chat":
            assert caller.answer is not None
            assert caller.answer.status == 504
        elif handler is busy_and_deaf:
            assert caller.answer is not None
            assert caller.answer.report().ending == "failed"
