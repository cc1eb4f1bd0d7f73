"""Slots: who gets one, and that none is lost, whatever happens to those that wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from handler_bench import Bench, failure, request
from hypothesis import given, settings, strategies as st
from memory_cluster import everything
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.answer import Done
from trio_cluster.core.call import Call
from trio_cluster.core.fair_queue import QUANTUM, estimated_cost, share_of
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.principal import Principal
from trio_cluster.core.request import Request
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.passthrough import RawBackend, RawCall
from trio_cluster.local.slots import MAX_WAITING, Slots
from trio_cluster.openai import ChatRequest, OutputChunk

A, B, C = Principal("a"), Principal("b"), Principal("c")


def asked(principal: Principal, max_tokens: int = 0, **kwargs: Any) -> Request:
    return attrs.evolve(request(**kwargs), principal=principal, max_tokens=max_tokens)


# Nothing is lost


@attrs.define
class User:
    """A task that wants a slot, and holds it until it is told to stop."""

    principal: Principal
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    stop: trio.Event = attrs.field(factory=trio.Event)
    has_slot: bool = False
    refused: bool = False
    over: bool = False

    async def run(self, slots: Slots) -> None:
        try:
            with self.scope:
                if not await slots.acquire(asked(self.principal)):
                    self.refused = True
                    return
                self.has_slot = True
                try:
                    await self.stop.wait()
                finally:
                    self.has_slot = False
                    slots.release()
        finally:
            self.over = True


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "start", "stop", "cancel", "stop and cancel", "resize", "settle"]),
        st.integers(0, 1 << 10),
    ),
    max_size=60,
)


@given(ACTIONS, st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_no_slot_is_lost_or_given_twice(actions: list[tuple[str, int]], capacity: int) -> None:
    """Users start, stop and are cancelled in any order, also several between two steps of the scheduler."""

    async def main() -> None:
        slots = Slots(capacity)
        users: list[User] = []

        def check() -> None:
            holding = sum(user.has_slot for user in users)
            assert slots.running == holding
            live = [user for user in users if not user.over]
            assert slots.waiting == len(live) - holding
            # No slot is free while a task waits.
            assert slots.running >= slots.capacity or not slots.waiting

        async with trio.open_nursery() as nursery:
            for action, number in actions:
                live = [user for user in users if not user.over]
                if action == "start":
                    users.append(User((A, B, C)[number % 3]))
                    nursery.start_soon(users[-1].run, slots)
                elif action == "resize":
                    slots.resize(1 + number % 5)
                elif action == "settle":
                    await wait_all_tasks_blocked()
                    check()
                elif live:
                    user = live[number % len(live)]
                    if "stop" in action:
                        user.stop.set()
                    if "cancel" in action:
                        # Another one, to which the slot of the first one may be on its way.
                        live[(number // 7) % len(live)].scope.cancel()
            await wait_all_tasks_blocked()
            check()
            for user in users:
                user.stop.set()
            await wait_all_tasks_blocked()
            check()
        assert (slots.running, slots.waiting) == (0, 0)

    trio.run(main)


async def test_a_slot_is_not_handed_to_a_task_that_was_cancelled(nursery: trio.Nursery) -> None:
    slots = Slots(1)
    users = [User(A) for _ in range(3)]
    for user in users:
        nursery.start_soon(user.run, slots)
        await wait_all_tasks_blocked()
    # In one step, so that no task has run in between.
    users[1].scope.cancel()
    users[0].stop.set()
    await wait_all_tasks_blocked()
    assert [user.has_slot for user in users] == [False, False, True]
    # The other way round: it has the slot already when it is cancelled, and frees it.
    users[2].stop.set()
    await wait_all_tasks_blocked()
    assert slots.running == 0
    slots.running = 1
    waiting = [User(A), User(B)]
    for user in waiting:
        nursery.start_soon(user.run, slots)
        await wait_all_tasks_blocked()
    slots.release()
    waiting[0].scope.cancel()
    await wait_all_tasks_blocked()
    assert [user.has_slot for user in waiting] == [False, True]
    assert (slots.running, slots.waiting) == (1, 0)
    waiting[1].stop.set()


async def test_a_slot_is_taken_by_no_newcomer_while_others_wait(nursery: trio.Nursery) -> None:
    slots = Slots(1)
    users = [User(A), User(B), User(C)]
    for user in users[:2]:
        nursery.start_soon(user.run, slots)
        await wait_all_tasks_blocked()
    users[0].stop.set()
    nursery.start_soon(users[2].run, slots)
    await wait_all_tasks_blocked()
    assert [user.has_slot for user in users] == [False, True, False]
    for user in users:
        user.stop.set()


# The order in a pool


class Recorder:
    """A handler that takes as many seconds as its request costs, and keeps the order in which its calls came to it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.order: list[str] = []
        self.calls: list[Call] = []
        bench.options.server.max_concurrency = 1
        bench.options.server.queue_timeout = bench.options.server.default_timeout = 1e9

    def open(self, principal: Principal, max_tokens: int = 100) -> Call:
        call_request = asked(principal, max_tokens)

        async def handler(_: ChatRequest) -> str:
            self.order.append(principal.name)
            await trio.sleep(estimated_cost(call_request))
            return "x"

        backend = HandlerBackend(ModelInfo("m", "chat"), handler, self.bench.pool)
        self.calls.append(backend.open(call_request))
        return self.calls[-1]

    async def finish(self) -> str:
        for call in self.calls:
            assert isinstance((await everything(call))[-1], Done)
        assert (self.bench.pool.running, self.bench.pool.waiting) == (0, 0)
        assert not self.bench.pool.waiting_by
        return "".join(self.order)


async def test_waiting_calls_of_several_principals_take_turns(
    bench: Bench, autojump_clock: MockClock
) -> None:
    recorder = Recorder(bench)
    for principal in (A, A, A, A, B, C, B):
        recorder.open(principal)
        await wait_all_tasks_blocked()
    assert bench.pool.waiting_by == {"a": 3, "b": 2, "c": 1}
    assert await recorder.finish() == "aabcaba"


async def test_requests_without_a_key_are_one_principal(bench: Bench, autojump_clock: MockClock) -> None:
    recorder = Recorder(bench)
    for principal in (Principal(), Principal(), Principal(), A):
        recorder.open(principal)
        await wait_all_tasks_blocked()
    await recorder.finish()
    assert recorder.order == ["", "", "a", ""]


async def test_weight_and_priority_decide_how_often_it_is_a_principal_s_turn(
    bench: Bench, autojump_clock: MockClock
) -> None:
    for b, ratio in ((Principal("b", weight=3), 3), (Principal("b", priority="high"), 4)):
        recorder = Recorder(bench)
        for _ in range(40):
            recorder.open(A, 1000)
            recorder.open(b, 1000)
        order = await recorder.finish()
        # The first calls are there before the others.
        assert order[:40].count("b") == pytest.approx(40 * ratio / (ratio + 1), abs=2)


async def test_long_answers_are_fewer_answers(bench: Bench, autojump_clock: MockClock) -> None:
    recorder = Recorder(bench)
    for _ in range(60):
        recorder.open(A, 4000)
        recorder.open(B, 975)
    order = await recorder.finish()
    assert order[:50].count("b") == pytest.approx(40, abs=2)


async def test_a_principal_is_charged_for_what_its_answers_report(
    bench: Bench, autojump_clock: MockClock
) -> None:
    recorder = Recorder(bench)

    def open_call(principal: Principal, tokens: int | None) -> None:
        async def handler(_: ChatRequest) -> AsyncIterator[Any]:
            recorder.order.append(principal.name)
            await trio.sleep(1)
            yield "x"
            if tokens is not None:
                yield OutputChunk.usage(tokens // 2, tokens - tokens // 2)

        backend = HandlerBackend(ModelInfo("m", "chat"), handler, bench.pool)
        recorder.calls.append(backend.open(asked(principal, 1000)))

    for _ in range(60):
        open_call(A, 4000)
        open_call(B, None)
    order = await recorder.finish()
    # What is not reported is not guessed: B is charged as estimated, which is a quarter of what A takes.
    assert order[:50].count("b") == pytest.approx(40, abs=3)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 3000), st.integers(0, 4000)), min_size=1, max_size=40
    ),
    st.tuples(*[st.sampled_from([(1.0, "normal"), (2.0, "normal"), (1.0, "high"), (1.0, "low")])] * 4),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_in_virtual_time_no_principal_waits_longer_than_its_share_and_one_request(
    requests: list[tuple[int, int, int]], kinds: tuple[tuple[float, Any], ...], cancels: bool
) -> None:
    """A handler takes a second for each unit of cost, and there is one slot. So a call waits at most for the request
    that runs, for its own principal's requests before it, and for what the bound allows each of the others.
    """
    principals = [
        Principal(f"p{number}", weight=weight, priority=priority)
        for number, (weight, priority) in enumerate(kinds)
    ]
    # Of a principal: the largest cost.
    largest: Counter[str] = Counter()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = Bench(nursery)
            await nursery.start(bench.pool.serve)
            recorder = Recorder(bench)
            pending: dict[str, list[int]] = {each.name: [] for each in principals}

            async def follow(principal: Principal, call: Call, cost: int) -> None:
                came, ahead = trio.current_time(), sum(pending[principal.name])
                pending[principal.name].append(cost)
                running = max(largest.values())
                over = trio.Event()
                call.on_release(over.set)
                await over.wait()
                waited = trio.current_time() - came - cost
                pending[principal.name].remove(cost)
                due, share = ahead + cost, share_of(principal)
                allowed = (
                    running
                    + ahead
                    + sum(
                        due * share_of(other) / share + 2 * QUANTUM * share_of(other) + largest[other.name]
                        for other in principals
                        if other is not principal
                    )
                )
                assert waited <= allowed + 1e-6

            for number, max_tokens, gap in requests:
                principal = principals[number]
                call = recorder.open(principal, max_tokens)
                cost = estimated_cost(call.request)
                largest[principal.name] = max(largest[principal.name], cost)
                nursery.start_soon(follow, principal, call, cost)
                await trio.sleep(gap)
                if cancels and gap % 3 == 0:
                    call.cancel("client left")
            for _ in range(4):
                await trio.sleep(80_000)
            assert (bench.pool.running, bench.pool.waiting, len(bench.pool.waiting_by)) == (0, 0, 0)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_models_with_slots_of_their_own_serve_fairly_too(
    bench: Bench, autojump_clock: MockClock
) -> None:
    order: list[str] = []

    async def handler(call: RawCall) -> None:
        order.append(call.request.principal.name)
        await trio.sleep(1)
        call.begin(200, "text/plain")

    backend = RawBackend(ModelInfo("m", "any"), handler, bench.pool, 1)
    calls = []
    for principal in (A, A, A, B):
        calls.append(backend.open(asked(principal)))
        await wait_all_tasks_blocked()
    assert bench.pool.waiting_by == {"a": 2, "b": 1}
    for call in calls:
        await everything(call)
    assert "".join(order) == "aaba"


# A full queue


async def test_a_principal_that_fills_the_queue_keeps_no_other_out(bench: Bench) -> None:
    async def waits(_: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    bench.options.server.queue_timeout = 1e9
    backend = bench.backend(waits)
    mine = [backend.open(asked(A)) for _ in range(2 + MAX_WAITING)]
    await wait_all_tasks_blocked()
    assert bench.pool.waiting == MAX_WAITING
    with pytest.raises(Exception, match="1024 requests are waiting already"):
        backend.open(asked(A))
    other = backend.open(asked(B))
    await wait_all_tasks_blocked()
    assert other.phase == "queued"
    # The tasks of these calls have begun to wait in any order.
    (dropped,) = (call for call in mine if call.released)
    error = await failure(dropped)
    assert (error.status, error.code) == (503, "over_capacity")
    assert error.retry_after is not None
    assert bench.pool.waiting == MAX_WAITING
    assert bench.pool.waiting_by == {"a": MAX_WAITING - 1, "b": 1}


async def test_calls_that_come_at_once_are_bounded_as_well(bench: Bench) -> None:
    async def waits(_: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    bench.options.server.queue_timeout = 1e9
    backend = bench.backend(waits)
    # Their tasks have not run yet when they are opened.
    calls = [backend.open(asked(A)) for _ in range(2 + MAX_WAITING + 5)]
    await wait_all_tasks_blocked()
    assert bench.pool.waiting == MAX_WAITING
    refused = [call for call in calls if call.released]
    assert len(refused) == 5
    for call in refused:
        assert (await failure(call)).code == "over_capacity"
