"""The slots of a pool: how many calls run at once, and what becomes of those that wait."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from handler_bench import Bench, echo, failure, released, request
from memory_cluster import everything
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster import ClusterServer
from trio_cluster.core.answer import Done, Failed
from trio_cluster.core.model import KINDS, ModelInfo
from trio_cluster.core.principal import Principal
from trio_cluster.errors import Overloaded, ShuttingDown
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.pool import HandlerPool
from trio_cluster.local.slots import MAX_WAITING
from trio_cluster.openai import ChatRequest
from trio_cluster.options import ClusterServerOptions


async def test_a_pool_that_is_not_served_opens_nothing() -> None:
    pool = HandlerPool(ClusterServerOptions())
    with pytest.raises(ShuttingDown):
        HandlerBackend(ModelInfo("m", "chat"), echo, pool).open(request())


async def test_no_more_handlers_run_at_once_than_there_are_slots(bench: Bench) -> None:
    go = trio.Event()

    async def waits(request: ChatRequest) -> str:
        await go.wait()
        return "x"

    calls = [bench.open(waits) for _ in range(5)]
    await wait_all_tasks_blocked()
    assert (bench.pool.running, bench.pool.waiting) == (2, 3)
    go.set()
    for call in calls:
        assert isinstance((await everything(call))[-1], Done)
    assert (bench.pool.running, bench.pool.waiting) == (0, 0)


async def test_a_model_with_slots_of_its_own_leaves_the_others_of_the_process_alone(bench: Bench) -> None:
    go, running, most = trio.Event(), 0, 0

    async def waits(request: ChatRequest) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1
        return "x"

    narrow = HandlerBackend(ModelInfo("m", "chat"), waits, bench.pool, max_concurrency=1)
    calls = []
    for _ in range(4):
        calls.append(narrow.open(request()))
        await wait_all_tasks_blocked()
    # Those that wait for the model hold no slot of the process.
    assert (bench.pool.running, bench.pool.waiting, running) == (1, 3, 1)
    assert narrow.load == 4
    assert isinstance((await everything(bench.open(echo)))[-1], Done)
    assert [call.queued for call in calls] == [False, True, True, True]
    calls[1].cancel("not wanted any more")
    await wait_all_tasks_blocked()
    assert bench.pool.waiting == 2
    go.set()
    for call in [calls[0], *calls[2:]]:
        assert isinstance((await everything(call))[-1], Done)
    assert (bench.pool.running, bench.pool.waiting, most, narrow.load) == (0, 0, 1, 0)


async def test_the_slots_of_a_model_are_within_those_of_the_process(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async def waits(request: ChatRequest) -> None:
        await trio.sleep_forever()

    wide = HandlerBackend(ModelInfo("m", "chat"), waits, bench.pool, max_concurrency=3)
    calls = [wide.open(request()) for _ in range(2)]
    await wait_all_tasks_blocked()
    began = trio.current_time()
    third = wide.open(request())
    await trio.sleep(3)
    fourth = wide.open(request())
    await wait_all_tasks_blocked()
    assert (bench.pool.running, bench.pool.waiting) == (2, 2)
    # The fourth gets the slot of the model that the third gives up; both its waits together are bounded.
    for call, waited in [(third, 5), (fourth, 3 + 5)]:
        error = await failure(call)
        assert (error.status, error.code) == (503, "over_capacity")
        assert trio.current_time() - began == waited
    for call in calls:
        call.cancel("the test is over")


async def test_the_slots_of_a_model_are_given_fairly(bench: Bench) -> None:
    order: list[str] = []
    go = trio.Event()

    async def waits(request: ChatRequest) -> str:
        order.append(request.key_name)
        await go.wait()
        return "x"

    narrow = HandlerBackend(ModelInfo("m", "chat"), waits, bench.pool, max_concurrency=1)
    names = ["greedy"] * 5 + ["modest"]
    calls = []
    for name in names:
        calls.append(narrow.open(attrs.evolve(request(), principal=Principal(name))))
        await wait_all_tasks_blocked()
    go.set()
    for call in calls:
        assert isinstance((await everything(call))[-1], Done)
    assert order.index("modest") <= 2


@pytest.mark.parametrize(
    ("number", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), ("2", TypeError)]
)
def test_the_slots_of_a_model_are_a_number_of_at_least_one(number: Any, error: type[Exception]) -> None:
    server = ClusterServer()
    for kind in set(KINDS) - {"any", "custom"}:
        with pytest.raises(error, match="max_concurrency"):
            getattr(server, f"register_{kind}")("m", echo, max_concurrency=number)
        with pytest.raises(error, match="max_concurrency"):
            getattr(server, kind)("m", max_concurrency=number)(echo)
    assert server.list_models() == []


async def test_slots_are_given_in_the_order_of_asking(bench: Bench) -> None:
    order: list[int] = []
    go = trio.Event()

    def numbered(number: int) -> Any:
        async def handler(request: ChatRequest) -> str:
            order.append(number)
            await go.wait()
            return "x"

        return handler

    bench.options.server.max_concurrency = 1
    calls = []
    for number in range(6):
        calls.append(bench.open(numbered(number)))
        await wait_all_tasks_blocked()
    go.set()
    for call in calls:
        await everything(call)
    assert order == list(range(6))


async def test_a_call_that_waits_too_long_for_a_slot_gets_503_with_retry_after(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async def waits(request: ChatRequest) -> str:
        await trio.sleep(20)
        return "x"

    running = [bench.open(waits) for _ in range(2)]
    await wait_all_tasks_blocked()
    start = trio.current_time()
    error = await failure(bench.open(waits))
    assert trio.current_time() - start == pytest.approx(5.0)
    assert (error.status, error.code) == (503, "over_capacity")
    assert error.retry_after is not None
    assert error.retry_after >= 1
    for call in running:
        assert isinstance((await everything(call))[-1], Done)


async def test_a_bounded_number_of_calls_may_wait(bench: Bench) -> None:
    async def waits(request: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    for _ in range(2 + MAX_WAITING):
        bench.open(waits)
    await wait_all_tasks_blocked()
    with pytest.raises(Overloaded):
        bench.open(waits)
    assert bench.pool.waiting == MAX_WAITING


async def test_a_call_that_is_cancelled_while_it_waits_never_reaches_the_handler(bench: Bench) -> None:
    reached: list[str] = []

    async def waits(request: ChatRequest) -> str:
        reached.append("x")
        await trio.sleep_forever()
        return "x"

    for _ in range(2):
        bench.open(waits)
    await wait_all_tasks_blocked()
    call = bench.open(waits)
    await wait_all_tasks_blocked()
    call.cancel("client left")
    await released(call)
    assert len(reached) == 2
    assert bench.pool.waiting == 0


async def test_a_call_that_is_cancelled_before_its_task_runs_never_reaches_the_handler(bench: Bench) -> None:
    reached: list[str] = []

    async def handler(request: ChatRequest) -> str:
        reached.append("x")
        return "x"

    call = bench.open(handler)
    call.cancel("client left")
    await released(call)
    # A function without a checkpoint may have begun to run, but what it gave went nowhere.
    assert isinstance(call.receive_nowait(), Failed)
    assert bench.pool.running == 0


async def test_more_slots_let_waiting_calls_run_at_once(bench: Bench) -> None:
    async def waits(request: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    for _ in range(5):
        bench.open(waits)
    await wait_all_tasks_blocked()
    bench.options.server.max_concurrency = 4
    bench.pool.resize()
    await wait_all_tasks_blocked()
    assert (bench.pool.running, bench.pool.waiting, bench.pool.capacity) == (4, 1, 4)


async def test_a_slot_is_freed_when_the_handler_has_stopped_and_not_when_it_was_asked_to(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async def slow_to_leave(request: ChatRequest) -> AsyncIterator[str]:
        try:
            yield "x"
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(7)

    call = bench.open(slow_to_leave)
    await wait_all_tasks_blocked()
    call.cancel("client left")
    assert isinstance(call.receive_nowait(), Failed)
    start = trio.current_time()
    await wait_all_tasks_blocked()
    assert (bench.pool.running, call.released) == (1, False)
    await released(call)
    assert trio.current_time() - start == pytest.approx(7)
    assert bench.pool.running == 0


async def test_a_call_is_queued_until_it_has_its_slot(bench: Bench) -> None:
    go = trio.Event()

    async def waits(request: ChatRequest) -> str:
        await go.wait()
        return "x"

    bench.pool.options.server.max_concurrency = 1
    first = bench.open(waits)
    await wait_all_tasks_blocked()
    second = bench.open(waits)
    await wait_all_tasks_blocked()
    assert (first.phase, second.phase) == ("waiting", "queued")
    first.cancel("client left")
    await wait_all_tasks_blocked()
    assert second.phase == "waiting"
    go.set()
    assert isinstance((await everything(second))[-1], Done)


async def test_a_total_timeout_that_passes_in_the_queue_never_reaches_the_handler(
    bench: Bench, autojump_clock: MockClock
) -> None:
    reached: list[str] = []

    async def waits(request: ChatRequest) -> str:
        reached.append("x")
        await trio.sleep(100)
        return "x"

    bench.options.server.default_timeout = math.inf
    for _ in range(2):
        bench.open(waits)
    await wait_all_tasks_blocked()
    error = await failure(bench.open(waits, total_timeout=2))
    assert error.status == 504
    assert len(reached) == 2


async def test_a_pool_that_is_stopped_cancels_its_handlers(nursery: trio.Nursery) -> None:
    pool = HandlerPool(ClusterServerOptions())
    cleaned: list[str] = []

    async def waits(request: ChatRequest) -> str:
        try:
            await trio.sleep_forever()
        finally:
            cleaned.append("x")
        return "x"

    async with trio.open_nursery() as inner:
        await inner.start(pool.serve)
        call = HandlerBackend(ModelInfo("m", "chat"), waits, pool).open(request())
        await wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
    assert cleaned == ["x"]
    assert call.released
    assert isinstance(call.receive_nowait(), Failed)
