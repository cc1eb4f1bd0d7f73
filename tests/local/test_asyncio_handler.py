"""Handlers that were written for asyncio: their shapes, cancellation both ways, backpressure, context."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import pytest
import trio
from handler_bench import Bench, failure, released
from memory_cluster import everything
from thread_shortage import no_threads
from trio.testing import MockClock

from trio_cluster import ApiError, AsyncioLoop, from_asyncio
from trio_cluster.core.answer import Data, Done, Failed
from trio_cluster.core.log_context import current_request
from trio_cluster.local.adapters import adapt
from trio_cluster.local.asyncio_handler import CANCEL_AGAIN
from trio_cluster.testing import read_stream
from trio_cluster.testing._clock import threads_hold_clock

#: Seconds within which everything here happens.
PATIENCE = 20


class Collector:
    """A provider that keeps what it is given, and that takes nothing while it is closed."""

    def __init__(self) -> None:
        self.values: list[object] = []
        self.ends = 0
        self.open = trio.Event()
        self.open.set()
        self.waits = trio.Event()

    async def push(self, chunk: object) -> None:
        await trio.lowlevel.checkpoint()
        self.values.append(chunk)
        if not self.open.is_set():
            self.waits.set()
            await self.open.wait()

    def end(self) -> None:
        self.ends += 1


class Signals:
    """Events that asyncio sets and trio waits for."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._events: dict[str, trio.Event] = {}
        self.log: list[str] = []

    def __call__(self, word: str) -> None:
        """Say, in asyncio, that something has happened."""
        self.log.append(word)
        self._token.run_sync_soon(self.event(word).set)

    def event(self, word: str) -> trio.Event:
        return self._events.setdefault(word, trio.Event())

    async def wait(self, word: str) -> None:
        with trio.fail_after(PATIENCE):
            await self.event(word).wait()


@pytest.fixture
async def say() -> Signals:
    return Signals()


@pytest.fixture
async def loop() -> AsyncIterator[AsyncioLoop]:
    """A loop that runs, and that has nothing left to do at the end."""
    made = AsyncioLoop()
    run = await made.acquire()
    yield made
    # A handler may have worked on after its answer, and be just about to end.
    with trio.move_on_after(PATIENCE):
        while run.users > 1:  # noqa: ASYNC110
            await trio.sleep(0.001)
    users = run.users
    await made.release(run)
    assert (users, run.ended) == (1, True)


async def generator(request: str) -> AsyncIterator[str]:
    for word in request.split():
        await asyncio.sleep(0)
        yield word


async def coroutine(request: str) -> str:
    await asyncio.sleep(0)
    return request


async def push(request: str, provider: Any) -> None:
    for word in request.split():
        await provider.push(word)
    provider.end()
    provider.end()


async def push_from_tasks(request: str, provider: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for word in request.split():
            group.create_task(provider.push(word))


class WithCall:
    async def __call__(self, request: str) -> AsyncIterator[str]:
        for word in request.split():
            yield word

    async def method(self, request: str) -> str:
        return request


async def with_prefix(prefix: str, request: str) -> AsyncIterator[str]:
    yield prefix
    yield request


@pytest.mark.parametrize(
    ("handler", "values", "ends"),
    [
        pytest.param(generator, ["a", "b"], 0, id="async generator"),
        pytest.param(coroutine, ["a b"], 0, id="coroutine"),
        pytest.param(push, ["a", "b"], 1, id="push"),
        pytest.param(push_from_tasks, ["a", "b"], 0, id="push from tasks"),
        pytest.param(WithCall(), ["a", "b"], 0, id="object"),
        pytest.param(WithCall().method, ["a b"], 0, id="method"),
        pytest.param(functools.partial(with_prefix, "x"), ["x", "a b"], 0, id="partial"),
    ],
)
async def test_every_shape_pushes_what_it_gives(
    handler: Any, values: list[str], ends: int, loop: AsyncioLoop
) -> None:
    collector = Collector()
    await adapt(from_asyncio(handler, loop))("a b", collector)
    assert (collector.values, collector.ends) == (values, ends)


def plain(request: str) -> str:
    return request


async def three(request: str, provider: Any, more: Any) -> None:
    pass


async def yields_and_pushes(request: str, provider: Any) -> AsyncIterator[str]:
    yield "x"


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("text", "not 'text'"),
        (plain, "from_asyncio needs an async function"),
        (three, "takes 3 arguments"),
        (yields_and_pushes, "both yields and takes a provider"),
    ],
)
def test_other_shapes_are_refused(handler: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        from_asyncio(handler)


def test_a_loop_of_asyncio_is_refused() -> None:
    with pytest.raises(TypeError, match="must be an AsyncioLoop"):
        from_asyncio(generator, asyncio.DefaultEventLoopPolicy)  # type: ignore[arg-type]


async def test_all_handlers_of_a_loop_run_on_it_in_one_thread(loop: AsyncioLoop) -> None:
    async def where(request: str) -> tuple[int, int]:
        return threading.get_ident(), id(asyncio.get_running_loop())

    collector = Collector()
    for _ in range(3):
        await from_asyncio(where, loop)("", collector)
    assert len(set(collector.values)) == 1
    assert collector.values[0][0] != threading.get_ident()  # type: ignore[index]


async def test_output_in_a_burst_arrives_whole_and_in_order(loop: AsyncioLoop) -> None:
    async def burst(request: str, provider: Any) -> None:
        for number in range(5000):
            await provider.push(number)
        provider.end()

    async def other(request: str) -> AsyncIterator[int]:
        for number in range(5000):
            yield number

    for handler in (burst, other):
        collector = Collector()
        await from_asyncio(handler, loop)("", collector)
        assert collector.values == list(range(5000))


async def test_a_generator_that_never_waits_lets_other_tasks_run(loop: AsyncioLoop, say: Signals) -> None:
    done = asyncio.Event()

    async def endless(request: str) -> AsyncIterator[str]:
        while not done.is_set():
            yield "x"

    async def sets(request: str) -> str:
        done.set()
        return ""

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(from_asyncio(endless, loop), "", Collector())
            nursery.start_soon(from_asyncio(sets, loop), "", Collector())


async def test_a_generator_whose_client_is_as_fast_lets_other_tasks_run(
    loop: AsyncioLoop, say: Signals
) -> None:
    over: list[str] = []

    async def spins(request: str, provider: Any) -> None:
        while not over and len(say.log) < 100_000:
            await provider.push("x")
            # As if it had been pushed at once.
            provider._values.clear()
            say.log.append("")
        say("over")

    async def ends_it(request: str) -> str:
        over.append(request)
        return ""

    collector = Collector()
    collector.open = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_asyncio(spins, loop), "", collector)
        nursery.start_soon(from_asyncio(ends_it, loop), "", Collector())
        await say.wait("over")
        nursery.cancel_scope.cancel()
    assert len(say.log) < 100_000


# Cancellation from trio


def cancellable(say: Signals) -> dict[str, Callable[..., Any]]:
    """Return handlers that wait for ever, each in another place, and whose cleanup awaits."""

    async def clean_up() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        say("cleaned up")

    async def waits(request: str) -> str:
        try:
            say("waits")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say("cancelled")
            raise
        finally:
            await clean_up()
        return ""

    async def waits_in_generator(request: str) -> AsyncIterator[str]:
        try:
            yield "x"
            say("waits")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say("cancelled")
            raise
        finally:
            await clean_up()

    async def yields(request: str) -> AsyncIterator[str]:
        try:
            say("waits")
            while True:
                yield "x" * 5000
        except GeneratorExit:
            say("cancelled")
            raise
        finally:
            await clean_up()

    async def pushes(request: str, provider: Any) -> None:
        try:
            say("waits")
            while True:
                await provider.push("x")
        except asyncio.CancelledError:
            say("cancelled")
            raise
        finally:
            await clean_up()

    async def waits_in_a_task(request: str) -> str:
        async with asyncio.TaskGroup() as group:
            group.create_task(waits(request))
        return ""

    return {
        function.__name__: function
        for function in (waits, waits_in_generator, yields, pushes, waits_in_a_task)
    }


@pytest.mark.parametrize("name", ["waits", "waits_in_generator", "yields", "pushes", "waits_in_a_task"])
async def test_a_cancelled_call_cancels_the_task_and_waits_for_its_cleanup(
    name: str, loop: AsyncioLoop, say: Signals
) -> None:
    collector = Collector()
    collector.open = trio.Event()
    if name == "waits_in_generator":
        collector.open.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_asyncio(cancellable(say)[name], loop), "", collector)
        await say.wait("waits")
        if name in ("yields", "pushes"):
            await collector.waits.wait()
        nursery.cancel_scope.cancel()
    assert say.log == ["waits", "cancelled", "cleaned up"]


async def test_the_slot_is_free_when_the_task_has_ended(
    bench: Bench, loop: AsyncioLoop, say: Signals
) -> None:
    may_end = asyncio.Event()

    async def hangs(request: Any) -> str:
        try:
            say("waits")
            await asyncio.Event().wait()
        finally:
            say("cancelled")
            await may_end.wait()
            say("ended")
        return ""

    call = bench.open(from_asyncio(hangs, loop))
    await say.wait("waits")
    call.cancel("test")
    await say.wait("cancelled")
    await trio.testing.wait_all_tasks_blocked()
    assert bench.pool.running == 1
    run = loop.running
    assert run is not None
    run.post(may_end.set)
    await released(call)
    assert say.log == ["waits", "cancelled", "ended"]
    assert bench.pool.running == 0


async def test_a_task_that_was_cancelled_before_it_began_does_not_begin(loop: AsyncioLoop) -> None:
    began: list[str] = []

    async def handler(request: str) -> str:
        began.append(request)
        return ""

    class Block:
        """Keeps the loop busy until it is cancelled."""

        def __init__(self) -> None:
            self.over = threading.Event()

    block = Block()
    run = loop.running
    assert run is not None
    run.post(block.over.wait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_asyncio(handler, loop), "", Collector())
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        await trio.lowlevel.cancel_shielded_checkpoint()
        trio.lowlevel.current_trio_token().run_sync_soon(block.over.set)
    assert began == []


async def test_a_handler_that_swallows_its_cancellation_is_stopped_by_its_next_output(
    loop: AsyncioLoop, say: Signals
) -> None:
    async def stubborn(request: str, provider: Any) -> None:
        say("waits")
        for _ in range(2):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                say("swallowed")
                await provider.push("more")

    collector = Collector()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_asyncio(stubborn, loop), "", collector)
        await say.wait("waits")
        nursery.cancel_scope.cancel()
    assert say.log == ["waits", "swallowed"]
    assert collector.values == []


async def test_a_handler_that_swallows_its_cancellation_is_cancelled_again(
    loop: AsyncioLoop, say: Signals, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def stubborn(request: str) -> str:
        say("waits")
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                say("swallowed")
        say("ends")
        return "too late"

    collector = Collector()
    began = trio.current_time()
    with threads_hold_clock():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(from_asyncio(stubborn, loop), "", collector)
            await say.wait("waits")
            nursery.cancel_scope.cancel()
    assert say.log == ["waits", "swallowed", "swallowed", "swallowed", "ends"]
    assert trio.current_time() - began == 2 * CANCEL_AGAIN
    assert collector.values == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all("still runs 10 s after it was cancelled" in line for line in lines)
    assert all("test_asyncio_handler.py" in line and "in stubborn" in line for line in lines)


async def test_an_error_in_the_cleanup_is_the_handler_s_error(loop: AsyncioLoop, say: Signals) -> None:
    async def handler(request: str) -> str:
        try:
            say("waits")
            await asyncio.Event().wait()
        finally:
            raise ValueError("in the cleanup")

    async def run_and_cancel() -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(from_asyncio(handler, loop), "", Collector())
                await say.wait("waits")
                scope.cancel()

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="in the cleanup")):
        await run_and_cancel()


async def test_a_timeout_cancels_the_task(
    bench: Bench, loop: AsyncioLoop, say: Signals, autojump_clock: MockClock
) -> None:
    with threads_hold_clock():
        call = bench.open(from_asyncio(cancellable(say)["waits"], loop), idle_timeout=5)
        error = await failure(call)
    assert (error.status, error.code) == (504, "timeout")
    assert say.log == ["waits", "cancelled", "cleaned up"]


# Cancellation from asyncio, and errors


async def cancels_itself(request: Any) -> str:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    return ""


async def raises_cancelled(request: Any) -> AsyncIterator[str]:
    yield "a beginning"
    raise asyncio.CancelledError


async def awaits_cancelled(request: Any) -> str:
    task = asyncio.ensure_future(asyncio.sleep(1000))
    task.cancel()
    await task
    return ""


@pytest.mark.parametrize("handler", [cancels_itself, raises_cancelled, awaits_cancelled])
async def test_a_task_that_is_cancelled_by_another_is_an_error(
    handler: Any, bench: Bench, loop: AsyncioLoop, caplog: pytest.LogCaptureFixture
) -> None:
    error = await failure(bench.open(from_asyncio(handler, loop)))
    assert (error.status, error.code) == (500, "handler_failed")
    assert "the asyncio task of the handler was cancelled, but its request was not" in caplog.text


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_what_a_handler_raises_reaches_its_caller_and_the_loop_goes_on(
    kind: type[BaseException], loop: AsyncioLoop
) -> None:
    async def raises(request: str) -> str:
        raise kind("the reason")

    run = loop.running
    with pytest.raises(kind, match="the reason"):
        await from_asyncio(raises, loop)("", Collector())
    assert loop.running is run


async def test_an_api_error_reaches_the_client_as_it_is(bench: Bench, loop: AsyncioLoop) -> None:
    async def raises(request: Any) -> AsyncIterator[str]:
        yield ""
        raise ApiError(429, "not now", code="slow_down")

    error = await failure(bench.open(from_asyncio(raises, loop)))
    assert (error.status, error.code, error.message) == (429, "slow_down", "not now")


async def test_output_that_the_kind_cannot_have_ends_the_task(
    bench: Bench, loop: AsyncioLoop, say: Signals, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> AsyncIterator[object]:
        try:
            yield object()
            await asyncio.Event().wait()
        finally:
            say("ended")

    error = await failure(bench.open(from_asyncio(handler, loop)))
    assert (error.status, error.code) == (500, "handler_failed")
    assert say.log == ["ended"]


async def test_pushing_after_the_end_is_an_error_and_work_after_it_is_not(
    bench: Bench, loop: AsyncioLoop, say: Signals
) -> None:
    async def handler(request: Any, provider: Any) -> None:
        await provider.push("all")
        provider.end()
        with pytest.raises(trio.ClosedResourceError):
            await provider.push("more")
        say("works on")

    events = await everything(bench.open(from_asyncio(handler, loop)))
    assert isinstance(events[-1], Done)
    assert read_stream(b"".join(event.data for event in events if isinstance(event, Data))).text == "all"
    await say.wait("works on")


async def test_the_loop_ends_under_its_handlers(
    bench: Bench, caplog: pytest.LogCaptureFixture, say: Signals
) -> None:
    loop = AsyncioLoop()

    def exits() -> None:
        raise SystemExit(3)

    async def handler(request: Any) -> str:
        say("waits")
        await asyncio.Event().wait()
        return ""

    async def fine(request: Any) -> str:
        return "fine"

    run = await loop.acquire()
    call = bench.open(from_asyncio(handler, loop))
    await say.wait("waits")
    run.post(exits)
    error = await failure(call)
    assert error.code == "handler_failed"
    await released(call)
    await run.wait_ended()
    assert "the asyncio loop has ended unexpectedly" in caplog.text
    # The next one begins again.
    events = await everything(bench.open(from_asyncio(fine, loop)))
    assert isinstance(events[-1], Done)
    await loop.release(run)
    assert loop.running is None


async def test_the_loop_ends_before_a_handler_has_begun(bench: Bench, say: Signals) -> None:
    go_on = threading.Event()

    def exits() -> None:
        go_on.wait(PATIENCE)
        raise SystemExit(3)

    async def handler(request: Any) -> str:
        say("began")
        return ""

    loop = AsyncioLoop()
    run = await loop.acquire()
    run.post(exits)
    call = bench.open(from_asyncio(handler, loop))
    await trio.testing.wait_all_tasks_blocked()
    go_on.set()
    assert (await failure(call)).code == "handler_failed"
    assert say.log == []
    await loop.release(run)


async def test_a_loop_that_cannot_be_started_for_want_of_a_thread_costs_the_request_only(
    bench: Bench,
) -> None:
    loop = AsyncioLoop()
    with no_threads():
        events = await everything(bench.open(from_asyncio(coroutine_of_chat, loop)))
    last = events[-1]
    assert isinstance(last, Failed)
    assert (last.error.status, last.error.code, last.retryable) == (503, "over_capacity", True)
    assert isinstance((await everything(bench.open(from_asyncio(coroutine_of_chat, loop))))[-1], Done)


async def coroutine_of_chat(request: Any) -> str:
    return str(request.last_text)


# Backpressure


@pytest.mark.parametrize(
    ("piece", "ahead"), [("x", 20), ("x" * 5000, 3), (b"x" * 5000, 3), ([0.5] * 5000, 3)]
)
async def test_a_generator_is_not_advanced_while_its_client_is_slow(
    piece: object, ahead: int, loop: AsyncioLoop
) -> None:
    given = 0

    async def counts(request: str) -> AsyncIterator[object]:
        nonlocal given
        for _ in range(100):
            given += 1
            yield piece

    collector = Collector()
    collector.open = trio.Event()
    run = loop.running
    assert run is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(from_asyncio(counts, loop), "", collector)
        await collector.waits.wait()
        # The loop has done all that it can when it has waited again, and has nothing to do.
        turns = run.turns
        run.post(int)
        with trio.fail_after(PATIENCE):
            while run.busy or run.turns == turns:
                await trio.lowlevel.checkpoint()
        assert 1 <= given <= ahead
        collector.open.set()
    assert collector.values == [piece] * 100


async def test_the_time_for_which_a_client_is_slow_does_not_count(
    bench: Bench, loop: AsyncioLoop, autojump_clock: MockClock
) -> None:
    async def handler(request: Any) -> AsyncIterator[str]:
        for _ in range(4):
            yield "x" * 200_000

    with threads_hold_clock():
        call = bench.open(from_asyncio(handler, loop), idle_timeout=5)
        await trio.sleep(100)
        assert isinstance((await everything(call))[-1], Done)


# Context


async def test_the_context_of_the_request_is_that_of_the_task(loop: AsyncioLoop) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="")
    inner: list[str] = []

    async def handler(request: str) -> str:
        variable.set(variable.get() + "!")
        async with asyncio.TaskGroup() as group:
            group.create_task(in_a_task())
        return variable.get()

    async def in_a_task() -> None:
        inner.append(variable.get())

    variable.set("here")
    collector = Collector()
    await from_asyncio(handler, loop)("", collector)
    assert (collector.values, inner) == (["here!"], ["here!"])
    assert variable.get() == "here"


async def test_log_lines_of_the_task_are_about_its_request(bench: Bench, loop: AsyncioLoop) -> None:
    seen: list[str] = []

    async def handler(request: Any) -> str:
        seen.append(current_request.get())
        return ""

    call = bench.open(from_asyncio(handler, loop))
    await everything(call)
    assert seen == [call.request.request_id]


# Hints


async def uses_asyncio(request: Any) -> str:
    await asyncio.sleep(1)
    return ""


async def yields_to_asyncio(request: Any) -> str:
    await asyncio.sleep(0)
    return ""


async def hides_the_reason(request: Any) -> str:
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise ConnectionError("no connection") from error
    return ""


@pytest.mark.parametrize("handler", [uses_asyncio, yields_to_asyncio, hides_the_reason])
async def test_asyncio_in_a_handler_of_trio_is_explained_in_the_log(
    handler: Any, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await failure(bench.open(handler))).code == "handler_failed"
    assert "the handler of 'm' failed: it " in caplog.text
    assert "register from_asyncio(handler)" in caplog.text


async def test_trio_in_a_handler_of_asyncio_is_explained_in_the_log(
    bench: Bench, loop: AsyncioLoop, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any) -> str:
        await trio.sleep(1)
        return ""

    assert (await failure(bench.open(from_asyncio(handler, loop)))).code == "handler_failed"
    assert "it uses trio outside of trio" in caplog.text


async def test_other_errors_are_not_explained(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Any) -> str:
        raise RuntimeError("something else")

    await failure(bench.open(handler))
    assert [record.getMessage() for record in caplog.records] == ["the handler of 'm' failed"]


# Leftovers


async def test_a_call_leaves_nothing_for_the_garbage_collector(
    bench: Bench, loop: AsyncioLoop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    class Mark:
        pass

    marks: list[Any] = []

    async def fails(request: Any) -> AsyncIterator[str]:
        mark = Mark()
        yield "x"
        raise ValueError(mark)

    async def fine(request: Any) -> AsyncIterator[str]:
        mark = Mark()
        yield "x"
        del mark

    del marks
    for handler in (fine, fails):
        call = bench.open(from_asyncio(handler, loop))
        await everything(call)
        await released(call)
        del call
    caplog.clear()
    # The asyncio task goes with its loop's next turn.
    run = loop.running
    assert run is not None
    turned = trio.Event()
    token = trio.lowlevel.current_trio_token()
    run.post(lambda: token.run_sync_soon(turned.set))
    await turned.wait()
    gc.disable()
    try:
        left = [each for each in gc.get_objects() if isinstance(each, Mark)]
    finally:
        gc.enable()
    assert len(left) == 0
