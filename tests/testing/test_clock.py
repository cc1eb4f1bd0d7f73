"""A mock clock that waits for threads that compute, and not for threads that wait in trio."""

from __future__ import annotations

import time

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.testing._clock import threads_hold_clock


async def let_the_clock_jump() -> None:
    """Give an autojumping clock deadlines to jump to."""
    for _ in range(10_000):
        await trio.sleep(1)


async def test_the_clock_stands_still_while_a_thread_computes(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    nursery.start_soon(let_the_clock_jump)
    with threads_hold_clock():
        await trio.to_thread.run_sync(time.sleep, 0.05)
        assert trio.current_time() == 0
    await trio.to_thread.run_sync(time.sleep, 0.05)
    assert trio.current_time() > 0
    nursery.cancel_scope.cancel()


async def test_the_clock_advances_for_a_thread_that_waits_in_trio(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    nursery.start_soon(let_the_clock_jump)

    async def wait(seconds: float) -> None:
        await trio.sleep(seconds)

    def work() -> None:
        for _ in range(20):
            trio.from_thread.run(wait, 10)
            time.sleep(0.001)

    with threads_hold_clock():
        await trio.to_thread.run_sync(work)
    assert trio.current_time() == 200
    nursery.cancel_scope.cancel()


async def test_one_thread_that_computes_stops_the_clock_for_another_that_waits(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    waited_until = []

    def wait() -> None:
        trio.from_thread.run(trio.sleep, 10)
        waited_until.append(time.monotonic())

    with threads_hold_clock():
        async with trio.open_nursery() as threads:
            threads.start_soon(trio.to_thread.run_sync, wait)
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(time.sleep, 0.05)
            computed_until = time.monotonic()
    assert waited_until[0] >= computed_until - 0.01


async def test_a_thread_that_waits_in_trio_is_cancelled_by_a_deadline(autojump_clock: MockClock) -> None:
    def work() -> None:
        while True:
            trio.from_thread.run(trio.sleep, 1)

    with threads_hold_clock(), trio.move_on_after(5) as scope:
        await trio.to_thread.run_sync(work)
    assert scope.cancelled_caught
    assert trio.current_time() == 5


async def test_nested_blocks_have_the_effect_of_the_outer_one(autojump_clock: MockClock) -> None:
    with threads_hold_clock():
        with threads_hold_clock():
            pass
        assert "_autojump" in vars(autojump_clock)
    assert "_autojump" not in vars(autojump_clock)


async def test_real_time_is_not_affected() -> None:
    with threads_hold_clock():
        began = time.monotonic()
        await trio.sleep(0.01)
        assert time.monotonic() - began >= 0.009


def test_outside_a_run_there_is_no_clock() -> None:
    with pytest.raises(RuntimeError), threads_hold_clock():
        pass
