"""Residents that are run: requests wait for them, they are started and stopped in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing

from trio_cluster.core.model_state import ModelState, ModelWait
from trio_cluster.errors import ClusterError, ModelStartFailed, Overloaded, ShuttingDown
from trio_cluster.on_demand.residents import OnDemand, Run, Tenancy
from trio_cluster.on_demand.schedule import FIRST_BACKOFF, MIN_STAY


@attrs.define
class Model:
    """What a test runs on demand."""

    start_takes: float = 10.0
    stop_takes: float = 1.0
    fails: str = ""
    output: str = ""
    log: list[str] = attrs.field(factory=list)
    run: Run | None = None

    @asynccontextmanager
    async def open(self, run: Run) -> AsyncIterator[str]:
        self.run = run
        run.output = lambda: self.output
        self.log.append("start")
        try:
            await trio.sleep(self.start_takes)
            if self.fails:
                raise ClusterError(self.fails)
            self.log.append("ready")
            yield "value"
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.stop_takes)
            self.log.append("stopped")


@asynccontextmanager
async def running(on_demand: OnDemand, *tenancies: Tenancy) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for tenancy in tenancies:
            await nursery.start(on_demand.run, tenancy)
        yield
        nursery.cancel_scope.cancel()


async def use(on_demand: OnDemand, tenancy: Tenancy, seconds: float = 0.0) -> float:
    """Make one request, and return how long it has waited."""
    began = trio.current_time()
    request = on_demand.ask(tenancy)
    try:
        await request.wait()
        assert tenancy.value == "value"
        waited = trio.current_time() - began
        await trio.sleep(seconds)
    except BaseException:
        request.leave()
        raise
    request.leave(completed=True)
    return waited


@pytest.fixture
def on_demand() -> OnDemand:
    return OnDemand(100.0)


async def test_one_start_serves_all_that_wait(on_demand: OnDemand, autojump_clock: object) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    waits: list[float] = []

    async def request() -> None:
        waits.append(await use(on_demand, tenancy))

    async with running(on_demand, tenancy):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(request)
        assert await use(on_demand, tenancy) == 0
    assert waits == [10.0] * 5
    assert model.log == ["start", "ready", "stopped"]


async def test_a_start_that_is_given_up_in_the_moment_of_its_decision_leaves_nothing_reserved(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=60)
    async with running(on_demand, tenancy):
        on_demand.ask(tenancy).leave()
        assert on_demand.schedule.reserved == 60
        await trio.testing.wait_all_tasks_blocked()
        assert (on_demand.schedule.reserved, tenancy.resident.state, model.log) == (0, "cold", [])
        assert await use(on_demand, tenancy) == 10


async def test_a_start_is_given_up_when_the_last_one_that_waits_leaves(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    async with running(on_demand, tenancy):
        with trio.move_on_after(3):
            await use(on_demand, tenancy)
        await trio.sleep(2)
        assert model.log == ["start", "stopped"]
        assert on_demand.states() == {"m": ModelState("cold", 0.0, 10.0)}
        assert await use(on_demand, tenancy) == 10.0


async def test_a_failed_start_fails_those_that_wait_with_the_output(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    model = Model(fails="it ended with 1", output="no such file")
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    async with running(on_demand, tenancy):
        with pytest.raises(ModelStartFailed, match="m could not be started: it ended with 1: no such file"):
            await use(on_demand, tenancy)
        with pytest.raises(ModelStartFailed) as caught:
            await use(on_demand, tenancy)
        assert caught.value.retry_after == FIRST_BACKOFF
        assert on_demand.states()["m"].why == "it ended with 1: no such file"
        model.fails = ""
        await trio.sleep(FIRST_BACKOFF)
        assert await use(on_demand, tenancy) == 10.0


async def test_a_start_that_takes_too_long_has_failed(on_demand: OnDemand, autojump_clock: object) -> None:
    model = Model(start_takes=1000)
    tenancy = on_demand.add("m", ["m"], model.open, memory=10, start_timeout=20)
    async with running(on_demand, tenancy):
        with pytest.raises(ModelStartFailed, match="not ready within 20 s"):
            await use(on_demand, tenancy)
    assert model.log == ["start", "stopped"]


async def test_an_error_that_is_none_of_the_package_is_named_and_logged(
    on_demand: OnDemand, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def open_(run: Run) -> AsyncIterator[None]:
        async with trio.open_nursery():
            raise LookupError("a bug")
        yield

    tenancy = on_demand.add("m", ["m"], open_, memory=10)
    async with running(on_demand, tenancy):
        with pytest.raises(ModelStartFailed, match="LookupError: a bug"):
            await use(on_demand, tenancy)
    assert "Traceback" in caplog.text


async def test_one_that_dies_is_started_again_by_the_next_request(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    async with running(on_demand, tenancy):
        await use(on_demand, tenancy)
        assert model.run is not None
        model.run.lost("it was killed")
        assert on_demand.states()["m"].state == "cold"
        # What is left of it is stopped first.
        assert await use(on_demand, tenancy) == 11.0
    assert model.log == ["start", "ready", "stopped"] * 2


async def test_an_idle_one_is_stopped(on_demand: OnDemand, autojump_clock: object) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=10, idle=60)
    async with running(on_demand, tenancy):
        await use(on_demand, tenancy, 100)
        await trio.sleep(59)
        assert await use(on_demand, tenancy) == 0
        await trio.sleep(62)
        assert model.log == ["start", "ready", "stopped"]


async def test_two_that_do_not_fit_take_turns(on_demand: OnDemand, autojump_clock: object) -> None:
    one, two = Model(), Model()
    first = on_demand.add("one", ["one"], one.open, memory=60)
    second = on_demand.add("two", ["two"], two.open, memory=60)
    served = {first: 0, second: 0}

    async def agent(tenancy: Tenancy) -> None:
        while True:
            await use(on_demand, tenancy, 5)
            served[tenancy] += 1

    async with running(on_demand, first, second):
        with trio.move_on_after(3600):
            async with trio.open_nursery() as nursery:
                for tenancy in (first, second):
                    for _ in range(2):
                        nursery.start_soon(agent, tenancy)
    starts = one.log.count("start") + two.log.count("start")
    # A stay of 20 s, a start of 10 s and a stop of 1 s; both are always asked for.
    assert 3600 / 45 < starts < 3600 / 30
    assert abs(served[first] - served[second]) < 20
    assert sum(served.values()) > 2 * 3600 / 5 * 0.55


async def test_what_a_request_waits_for_is_told(on_demand: OnDemand, autojump_clock: object) -> None:
    one, two = Model(), Model()
    first = on_demand.add("one", ["one"], one.open, memory=60)
    second = on_demand.add("two", ["two"], two.open, memory=60)
    waits: list[ModelWait | None] = []
    async with running(on_demand, first, second), trio.open_nursery() as nursery:
        await use(on_demand, second)
        await trio.sleep(MIN_STAY * 10)
        nursery.start_soon(use, on_demand, first, 30.0)
        await trio.sleep(12)
        request = on_demand.ask(second, waits.append)
        await request.wait()
        request.leave()
    assert [None if each is None else each.what for each in waits] == [
        "waiting for memory to start two",
        "starting two",
        None,
    ]


def test_a_wait_is_shown_with_its_seconds() -> None:
    assert str(ModelWait("starting m")) == "starting m"


async def test_a_wait_counts_down(autojump_clock: object) -> None:
    wait = ModelWait("starting m", trio.current_time() + 20)
    await trio.sleep(5)
    assert str(wait) == "starting m, about 15 s"
    await trio.sleep(50)
    assert str(wait) == "starting m, about 1 s"


@pytest.mark.parametrize("unloads", [False, True])
async def test_the_wait_for_memory_has_a_limit_for_one_that_came_while_the_model_was_ready(
    on_demand: OnDemand, unloads: bool, autojump_clock: object
) -> None:
    one, two = Model(), Model()
    first = on_demand.add("one", ["one"], one.open, memory=60, start_timeout=50)
    second = on_demand.add("two", ["two"], two.open, memory=60)
    async with running(on_demand, first, second), trio.open_nursery() as nursery:
        nursery.start_soon(use, on_demand, first, 30.0)
        await trio.sleep(35)
        # It is ready, and is to make room for this one.
        nursery.start_soon(use, on_demand, second, 1000.0)
        await trio.sleep(1)
        if unloads:
            nursery.start_soon(on_demand.unload, first)
            await trio.sleep(1)
        assert first.resident.state == "ready"
        began = trio.current_time()
        with pytest.raises(Overloaded, match="no memory became free for it within 50 s"):
            await use(on_demand, first)
        assert trio.current_time() - began == 50
        nursery.cancel_scope.cancel()


async def test_the_wait_for_memory_has_a_limit(on_demand: OnDemand, autojump_clock: object) -> None:
    one, two = Model(), Model(start_takes=40)
    first = on_demand.add("one", ["one"], one.open, memory=60)
    second = on_demand.add("two", ["two"], two.open, memory=60, start_timeout=50)
    async with running(on_demand, first, second), trio.open_nursery() as nursery:
        nursery.start_soon(use, on_demand, first, 100.0)
        await trio.sleep(20)
        began = trio.current_time()
        with pytest.raises(Overloaded, match="no memory became free for it within 50 s"):
            await use(on_demand, second)
        assert trio.current_time() - began == 50
        await trio.sleep(30)
        # The limit of the start counts anew.
        assert await use(on_demand, second) > 50


async def test_a_model_is_loaded_and_unloaded(on_demand: OnDemand, autojump_clock: object) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    async with running(on_demand, tenancy), trio.open_nursery() as nursery:
        await on_demand.load(tenancy)
        assert on_demand.states() == {"m": ModelState("ready")}
        nursery.start_soon(use, on_demand, tenancy, 20.0)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await on_demand.unload(tenancy)
        assert trio.current_time() - began == 21
        await on_demand.unload(tenancy)
    assert model.log == ["start", "ready", "stopped"]


async def test_the_end_of_the_owner_stops_it_and_fails_those_that_wait(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    model = Model()
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    async with trio.open_nursery() as requests:

        async def request() -> None:
            with pytest.raises(ShuttingDown):
                await use(on_demand, tenancy)

        async with running(on_demand, tenancy):
            requests.start_soon(request)
            await trio.sleep(5)
    assert model.log == ["start", "stopped"]
    assert not on_demand.by_model
    assert not on_demand.schedule.residents


async def test_an_unload_is_over_although_a_request_starts_the_model_again_at_once(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    @asynccontextmanager
    async def open_at_once(run: Run) -> AsyncIterator[str]:
        yield "value"

    tenancy = on_demand.add("m", ["m"], open_at_once, memory=10)
    async with running(on_demand, tenancy), trio.open_nursery() as nursery:
        # Which of two tasks runs first is random.
        for _ in range(20):
            await on_demand.load(tenancy)
            request = on_demand.ask(tenancy)
            for _ in range(2):
                nursery.start_soon(on_demand.unload, tenancy)
            await trio.testing.wait_all_tasks_blocked()
            later = on_demand.ask(tenancy)
            request.leave()
            with trio.fail_after(1):
                await on_demand.unload(tenancy)
            await later.wait()
            later.leave()


async def test_the_unload_of_a_model_that_is_not_loaded_waits_for_no_later_run(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    model = Model(start_takes=100)
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    async with running(on_demand, tenancy):
        # Which of two tasks runs first is random.
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(on_demand.load, tenancy)
                with trio.fail_after(1):
                    await on_demand.unload(tenancy)
                await trio.testing.wait_all_tasks_blocked()
                assert tenancy.resident.state == "starting"
                nursery.cancel_scope.cancel()
            await trio.sleep(2)


async def test_an_unload_is_over_when_the_owner_ends(on_demand: OnDemand, autojump_clock: object) -> None:
    model = Model(stop_takes=0)
    tenancy = on_demand.add("m", ["m"], model.open, memory=10)
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery, running(on_demand, tenancy):
            await on_demand.load(tenancy)
            on_demand.ask(tenancy)
            nursery.start_soon(on_demand.unload, tenancy)
            await trio.testing.wait_all_tasks_blocked()
    assert not on_demand.by_model


async def test_a_start_that_is_over_in_the_moment_of_its_time_limit_admits_no_request(
    on_demand: OnDemand, autojump_clock: object
) -> None:
    @asynccontextmanager
    async def open_in_time(run: Run) -> AsyncIterator[str]:
        with trio.CancelScope(shield=True):
            await trio.sleep(20)
        yield "value"

    tenancy = on_demand.add("m", ["m"], open_in_time, memory=10, start_timeout=20)
    async with running(on_demand, tenancy):
        with pytest.raises(ModelStartFailed, match="it was not ready within 20 s"):
            await use(on_demand, tenancy)


async def test_a_model_can_be_run_by_one_resident_only(on_demand: OnDemand) -> None:
    on_demand.add("a", ["m"], Model().open)
    with pytest.raises(ClusterError, match="'m' runs on demand already"):
        on_demand.add("b", ["m"], Model().open)
    with pytest.raises(ClusterError, match="c needs 200 bytes"):
        on_demand.add("c", ["c"], Model().open, memory=200)


async def test_changes_are_reported(on_demand: OnDemand, autojump_clock: object) -> None:
    tenancy = on_demand.add("m", ["m"], Model().open, memory=10)
    seen: list[str] = []
    on_demand.on_changed.append(lambda: seen.append(on_demand.states()["m"].state))
    async with running(on_demand, tenancy):
        await use(on_demand, tenancy)
        await on_demand.unload(tenancy)
        assert [each for each, before in zip(seen, ["", *seen], strict=False) if each != before] == [
            "starting",
            "ready",
            "cold",
        ]
