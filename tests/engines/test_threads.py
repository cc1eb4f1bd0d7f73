"""Work in a thread: its results and errors, and that it has ended when its block is left."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import trio
import trio.testing
from thread_shortage import no_threads
from trio.testing import wait_all_tasks_blocked

from trio_cluster.core.principal import Principal
from trio_cluster.core.request import Request
from trio_cluster.core.threads import NoThread
from trio_cluster.engines import Outlet, ThreadStream, _threads
from trio_cluster.local.slots import Slots, answered_request


class Work:
    """Puts numbers until the outlet is closed, or ``count`` of them."""

    def __init__(self, count: int = 10**9) -> None:
        self.count = count
        self.made = 0
        self.ended = threading.Event()

    def __call__(self, outlet: Outlet[int]) -> None:
        try:
            while self.made < self.count:
                self.made += 1
                if not outlet.put(self.made):
                    return
        finally:
            self.ended.set()


async def test_results_arrive_in_order_and_then_the_end() -> None:
    async with ThreadStream(Work(200), Slots(1)) as values:
        assert [value async for value in values] == list(range(1, 201))


async def test_without_a_thread_nothing_is_done_and_the_slot_is_free() -> None:
    work, slots = Work(3), Slots(1)
    with no_threads(), pytest.raises(NoThread):
        async with ThreadStream(work, slots):
            pass
    assert (work.made, slots.running) == (0, 0)
    async with ThreadStream(work, slots) as values:
        assert [value async for value in values] == [1, 2, 3]


async def test_an_error_is_raised_after_the_results_before_it() -> None:
    def work(outlet: Outlet[str]) -> None:
        outlet.put("one")
        raise LookupError("no two")

    async with ThreadStream(work, Slots(1)) as values:
        assert await anext(values) == "one"
        with pytest.raises(LookupError, match="no two"):
            await anext(values)


async def test_leaving_stops_the_work_and_waits_until_it_has_ended() -> None:
    work = Work()
    slots = Slots(1)
    async with ThreadStream(work, slots, bound=2) as values:
        async for value in values:
            if value == 5:
                break
    assert work.ended.is_set()
    assert slots.running == 0


async def test_a_slow_consumer_blocks_the_work_at_the_bound() -> None:
    work = Work()
    async with ThreadStream(work, Slots(1), bound=3) as values:
        assert await anext(values) == 1
        with trio.fail_after(5):
            while work.made < 5:
                await trio.testing.wait_all_tasks_blocked(0.01)
        await trio.testing.wait_all_tasks_blocked(0.05)
        # One was taken, three are in the queue, one is being put.
        assert work.made == 5


async def test_a_cancelled_consumer_leaves_no_thread_behind() -> None:
    work = Work(3)
    reading = trio.Event()
    hold = threading.Event()

    def blocking(outlet: Outlet[int]) -> None:
        work(outlet)
        while not outlet.closed():
            hold.wait(0.001)
        work.ended.set()

    async def read() -> None:
        async with ThreadStream(blocking, Slots(1)) as values:
            async for value in values:
                if value == 3:
                    reading.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await reading.wait()
        work.ended.clear()
        nursery.cancel_scope.cancel()
    assert work.ended.is_set()


async def test_closing_a_generator_at_its_yield_stops_the_work() -> None:
    work = Work()

    async def handler() -> AsyncIterator[int]:
        async with ThreadStream(work, Slots(1)) as values:
            async for value in values:
                yield value

    async with aclosing(handler()) as pieces:  # type: ignore[type-var]
        async for _ in pieces:
            break
    assert work.ended.is_set()


async def test_puts_after_the_end_do_not_block() -> None:
    refused = []

    def stubborn(outlet: Outlet[int]) -> None:
        for number in range(20):
            refused.append(outlet.put(number))

    async with ThreadStream(stubborn, Slots(1), bound=1):
        pass
    assert refused[-1] is False
    assert len(refused) == 20


async def test_waiting_for_a_slot_can_be_cancelled_and_starts_nothing() -> None:
    slots = Slots(1)
    second = Work()
    async with ThreadStream(Work(), slots, bound=1):
        with trio.move_on_after(0.05) as scope:
            async with ThreadStream(second, slots):
                pytest.fail("there is only one slot")
        assert scope.cancelled_caught
    assert second.made == 0
    assert slots.running == 0


async def test_a_blocking_step_is_interrupted() -> None:
    interrupted = threading.Event()
    blocked = threading.Event()

    def work(outlet: Outlet[int]) -> None:
        outlet.interrupt_with(interrupted.set)
        blocked.set()
        assert interrupted.wait(5)

    with trio.fail_after(5):
        async with ThreadStream(work, Slots(1)):
            await trio.to_thread.run_sync(blocked.wait)
    assert interrupted.is_set()


async def test_an_interrupt_function_that_is_registered_too_late_is_called_at_once() -> None:
    called = []
    begin = threading.Event()

    def work(outlet: Outlet[int]) -> None:
        begin.wait()
        while not outlet.closed():
            begin.wait()
        outlet.interrupt_with(lambda: called.append("late"))

    async with ThreadStream(work, Slots(1)):
        begin.set()
    assert called == ["late"]


async def test_a_thread_that_does_not_stop_keeps_its_slot_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_threads, "STOP_TIMEOUT", 0.05)
    slots = Slots(1)
    stuck = threading.Event()
    async with ThreadStream(lambda outlet: stuck.wait(), slots, name="stuck"):
        pass
    assert slots.running == 1
    assert "stuck" in caplog.text
    stuck.set()
    with trio.fail_after(5):
        assert await slots.acquire(Request("e", "chat", "m", b""))
    slots.release()


async def test_slots_are_given_fairly_between_the_principals_of_the_requests() -> None:
    slots = Slots(1)
    go = threading.Event()
    order: list[str] = []

    async def use(name: str) -> None:
        answered_request.set(Request("e", "chat", "m", b"", principal=Principal(name)))
        async with ThreadStream(lambda outlet: go.wait(), slots) as values:
            order.append(name)
            async for _ in values:
                pass

    async with trio.open_nursery() as nursery:
        for name in "aaab":
            nursery.start_soon(use, name)
            await wait_all_tasks_blocked()
        go.set()
    assert "".join(order) == "aaba"
    assert (slots.running, slots.waiting) == (0, 0)
