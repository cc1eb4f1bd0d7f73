"""The task of a call: its time limits, and its turns on the event loop."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial

import pytest
import trio
from handler_bench import Bench, failure, released
from memory_cluster import everything
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.answer import Data, Done, Head
from trio_cluster.core.limits import WINDOW
from trio_cluster.local.adapters import Provider
from trio_cluster.local.task import MAX_OUTPUTS_PER_TURN
from trio_cluster.openai import ChatRequest, OutputChunk

# Time limits


async def test_silence_before_the_first_output_is_504(bench: Bench, autojump_clock: MockClock) -> None:
    ended: list[str] = []

    async def silent(request: ChatRequest) -> str:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("x")
        return "x"

    start = trio.current_time()
    call = bench.open(silent, idle_timeout=3)
    error = await failure(call)
    assert trio.current_time() - start == pytest.approx(3)
    assert error.status == 504
    await released(call)
    assert ended == ["x"]


async def test_each_output_restarts_the_idle_timer(bench: Bench, autojump_clock: MockClock) -> None:
    async def steady(request: ChatRequest) -> AsyncIterator[str]:
        for _ in range(10):
            await trio.sleep(2)
            yield "x"
        await trio.sleep(4)
        yield "late"

    start = trio.current_time()
    error = await failure(bench.open(steady, idle_timeout=3))
    assert error.status == 504
    assert trio.current_time() - start == pytest.approx(23)


async def test_the_shorter_idle_timeout_of_request_and_node_counts(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.options.server.default_timeout = 2.0

    async def silent(request: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    start = trio.current_time()
    await failure(bench.open(silent, idle_timeout=30))
    assert trio.current_time() - start == pytest.approx(2)


async def test_the_total_timeout_ends_even_a_busy_answer(bench: Bench, autojump_clock: MockClock) -> None:
    async def endless(request: ChatRequest) -> AsyncIterator[str]:
        while True:
            await trio.sleep(1)
            yield "x"

    start = trio.current_time()
    call = bench.open(endless, total_timeout=10.5)
    error = await failure(call)
    assert (error.status, error.code) == (504, "timeout")
    assert "within the total timeout of the request" in error.message
    assert trio.current_time() - start == pytest.approx(10.5)


async def test_the_deadline_of_a_handler_is_the_real_one(bench: Bench, autojump_clock: MockClock) -> None:
    seen: list[float] = []

    async def looks(request: ChatRequest) -> AsyncIterator[str]:
        seen.append(trio.current_effective_deadline() - trio.current_time())
        await trio.sleep(2)
        yield "x"
        seen.append(trio.current_effective_deadline() - trio.current_time())

    await everything(bench.open(looks, idle_timeout=5, total_timeout=6))
    assert seen == [pytest.approx(5), pytest.approx(4)]


async def test_a_slow_client_is_not_a_slow_model(bench: Bench, autojump_clock: MockClock) -> None:
    async def torrent(request: ChatRequest) -> AsyncIterator[str]:
        for _ in range(3):
            yield "x" * WINDOW

    call = bench.open(torrent, idle_timeout=2)
    assert isinstance(await call.receive(), Head)
    await wait_all_tasks_blocked()
    await trio.sleep(60)
    events = await everything(call)
    assert isinstance(events[-1], Done)


async def test_output_with_nothing_to_show_keeps_a_stream_alive_once_it_has_begun(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async def mute(request: ChatRequest) -> AsyncIterator[str]:
        yield "x"
        for _ in range(20):
            await trio.sleep(2)
            yield ""

    events = await everything(bench.open(mute, idle_timeout=3))
    assert isinstance(events[-1], Done)
    assert len([event for event in events if isinstance(event, Data) and not event.data]) == 20


async def test_output_with_nothing_to_show_does_not_begin_a_stream(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async def mute(request: ChatRequest) -> AsyncIterator[OutputChunk]:
        while True:
            await trio.sleep(1)
            yield OutputChunk.usage(1, 1)

    start = trio.current_time()
    call = bench.open(mute, idle_timeout=3)
    assert (await failure(call)).status == 504
    assert trio.current_time() - start == pytest.approx(3)
    assert not call.begun


# Turns


#: For messages about what :meth:`CallTask.apply_backpressure` assumes of trio.
TRIO = f"trio {trio.__version__}"


async def test_trio_forgets_the_sleep_data_of_a_task_whenever_it_is_scheduled(nursery: trio.Nursery) -> None:
    send, receive = trio.open_memory_channel[None](0)
    lot = trio.lowlevel.ParkingLot()

    async def sleep_until_cancelled() -> None:
        with trio.move_on_after(0.001):
            await trio.sleep_forever()

    async def wake() -> None:
        while True:
            await wait_all_tasks_blocked()
            lot.unpark_all()
            with suppress(trio.WouldBlock):
                send.send_nowait(None)

    waits: dict[str, Callable[[], Awaitable[object]]] = {
        "checkpoint()": trio.lowlevel.checkpoint,
        "cancel_shielded_checkpoint()": trio.lowlevel.cancel_shielded_checkpoint,
        "sleep()": partial(trio.sleep, 0.001),
        "ParkingLot.park()": lot.park,
        "a memory channel": receive.receive,
        "a thread": partial(trio.to_thread.run_sync, bool),
        "a cancelled sleep": sleep_until_cancelled,
    }
    nursery.start_soon(wake)
    task = trio.lowlevel.current_task()
    for name, wait in waits.items():
        task.custom_sleep_data = waits
        await wait()
        assert task.custom_sleep_data is None, (
            f"{TRIO} did not reset Task.custom_sleep_data when it scheduled a task after {name}. "
            "CallTask.apply_backpressure() relies on that; without it each piece of output costs a checkpoint."
        )
    nursery.cancel_scope.cancel()


async def test_trio_leaves_the_sleep_data_of_a_running_task_alone(nursery: trio.Nursery) -> None:
    task = trio.lowlevel.current_task()
    for mark in (object(), "text", 0, []):
        task.custom_sleep_data = mark
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + 60
            nursery.start_soon(trio.sleep, 0)
            trio.Event().set()
            await trio.lowlevel.checkpoint_if_cancelled()
        assert task.custom_sleep_data is mark, (
            f"{TRIO} changed Task.custom_sleep_data of a task that was not scheduled. CallTask.apply_backpressure() "
            "relies on the opposite: a handler that never waits would keep the event loop for itself."
        )


async def test_a_generator_that_never_awaits_does_not_starve_the_others(bench: Bench) -> None:
    async def greedy(request: ChatRequest) -> AsyncIterator[str]:
        while True:
            yield "x"

    call = bench.open(greedy, stream=False)
    for _ in range(50):
        await trio.lowlevel.checkpoint()
    call.cancel("client left")
    await released(call)


async def test_a_handler_that_never_waits_is_rescheduled_after_a_few_pushes(bench: Bench) -> None:
    pushed = 0
    seen: list[int] = []

    async def hurries(request: ChatRequest) -> AsyncIterator[str]:
        nonlocal pushed
        for _ in range(100):
            pushed += 1
            yield "x"

    async def look() -> None:
        while pushed < 100:
            seen.append(pushed)
            await trio.lowlevel.checkpoint()

    call = bench.open(hurries)
    await look()
    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    # The one that looks may run at the end of one turn and at the beginning of the next one.
    assert 2 <= max(steps) <= 2 * MAX_OUTPUTS_PER_TURN
    assert isinstance((await everything(call))[-1], Done)


async def test_a_handler_that_waits_for_each_piece_is_scheduled_once_for_it(bench: Bench) -> None:
    class Steps(trio.abc.Instrument):
        taken = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.taken += task is not own

    own = trio.lowlevel.current_task()
    send, receive = trio.open_memory_channel[str](0)

    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        async for piece in receive:
            yield piece

    call = bench.open(waits)
    await wait_all_tasks_blocked()
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    for _ in range(50):
        send.send_nowait("x")
        await wait_all_tasks_blocked()
    trio.lowlevel.remove_instrument(steps)
    assert steps.taken == 50
    send.close()
    assert isinstance((await everything(call))[-1], Done)


async def test_a_push_notices_a_cancellation_even_if_it_does_not_reschedule(bench: Bench) -> None:
    go = trio.Event()
    pushed: list[str] = []

    async def shields(request: ChatRequest, provider: Provider) -> None:
        with trio.CancelScope(shield=True):
            await go.wait()
        pushed.append("first")
        await provider.push("x")
        pushed.append("second")

    call = bench.open(shields)
    await wait_all_tasks_blocked()
    call.cancel("no more")
    go.set()
    await released(call)
    assert pushed == ["first"]
