from __future__ import annotations

import itertools
import json
import logging
import math
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import attrs
import pytest
import trio
from memory_cluster import everything, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.answer import Data, Done, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError, Overloaded, ShuttingDown
from trio_cluster.local.adapters import Provider, ThreadProvider
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.pool import MAX_OUTPUTS_PER_TURN, MAX_WAITING, HandlerPool
from trio_cluster.openai import ChatRequest, OutputChunk
from trio_cluster.options import ClusterServerOptions, ServerOptions
from trio_cluster.testing import read_stream


def request(
    *, stream: bool = True, idle_timeout: float = math.inf, total_timeout: float = math.inf
) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": "a b c"}], "stream": stream}
    return Request(
        endpoint="chat.completions",
        kind="chat",
        model="m",
        body=json.dumps(body).encode(),
        idle_timeout=idle_timeout,
        total_timeout=total_timeout,
    )


class Bench:
    """A pool that is being served, and handlers on it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.options = ClusterServerOptions(
            server=ServerOptions(max_concurrency=2, queue_timeout=5.0, default_timeout=60.0)
        )
        self.pool = HandlerPool(self.options)
        self.nursery = nursery

    def backend(self, handler: Any) -> HandlerBackend:
        return HandlerBackend(ModelInfo("m", "chat"), handler, self.pool)

    def open(self, handler: Any, **kwargs: Any) -> Call:
        return self.backend(handler).open(request(**kwargs))


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    made = Bench(nursery)
    await nursery.start(made.pool.serve)
    return made


async def failure(call: Call) -> ApiError:
    last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    return last.error


async def released(call: Call) -> None:
    done = trio.Event()
    call.on_release(done.set)
    with trio.fail_after(1000):
        await done.wait()


async def echo(request: ChatRequest) -> AsyncIterator[str]:
    for word in request.last_text.split():
        yield word


async def test_a_handler_answers_with_head_data_and_done(bench: Bench) -> None:
    call = bench.open(echo)
    events = await everything(call)
    assert isinstance(events[0], Head)
    assert events[0].content_type == "text/event-stream"
    assert isinstance(events[-1], Done)
    assert text(events).endswith("data: [DONE]\n\n")
    await released(call)
    assert bench.pool.running == 0


async def test_a_plain_answer_is_one_json_object(bench: Bench) -> None:
    events = await everything(bench.open(echo, stream=False))
    assert json.loads(text(events))["choices"][0]["message"]["content"] == "abc"


async def test_a_body_that_the_master_has_checked_is_not_checked_again(bench: Bench) -> None:
    async def temperature(request: ChatRequest) -> str:
        return str(request.temperature)

    body = b'{"model":"m","messages":[{"role":"user","content":"a"}],"temperature":3}'
    asked = Request(endpoint="chat.completions", kind="chat", model="m", body=body)
    backend = bench.backend(temperature)
    assert (await failure(backend.open(asked))).status == 400
    events = await everything(backend.open(attrs.evolve(asked, checked=True)))
    assert json.loads(text(events))["choices"][0]["message"]["content"] == "3.0"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_an_answer_carries_the_usage_that_its_handler_reported(
    bench: Bench, stream: bool
) -> None:
    async def counts(request: ChatRequest) -> AsyncIterator[Any]:
        yield "x"
        yield {"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}

    for handler, usage in ((echo, None), (counts, Usage(prompt_tokens=3, cached_tokens=2))):
        assert (await everything(bench.open(handler, stream=stream)))[-1] == Done(usage)


async def test_a_pool_that_is_not_served_opens_nothing() -> None:
    pool = HandlerPool(ClusterServerOptions())
    with pytest.raises(ShuttingDown):
        HandlerBackend(ModelInfo("m", "chat"), echo, pool).open(request())


# Slots


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


async def test_who_waits_too_long_for_a_slot_gets_503_with_retry_after(
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


# Time


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


async def test_each_output_moves_the_deadline_on(bench: Bench, autojump_clock: MockClock) -> None:
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


async def test_the_shorter_of_the_requests_and_the_nodes_patience_counts(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.options.server.default_timeout = 2.0

    async def silent(request: ChatRequest) -> str:
        await trio.sleep_forever()
        return "x"

    start = trio.current_time()
    await failure(bench.open(silent, idle_timeout=30))
    assert trio.current_time() - start == pytest.approx(2)


async def test_a_budget_ends_even_a_busy_answer(bench: Bench, autojump_clock: MockClock) -> None:
    async def endless(request: ChatRequest) -> AsyncIterator[str]:
        while True:
            await trio.sleep(1)
            yield "x"

    start = trio.current_time()
    call = bench.open(endless, total_timeout=10.5)
    error = await failure(call)
    assert (error.status, error.code) == (504, "timeout")
    assert "within the time that its client gives it" in error.message
    assert trio.current_time() - start == pytest.approx(10.5)


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


async def test_a_budget_that_is_spent_in_the_queue_never_reaches_the_handler(
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


async def test_a_long_plain_answer_gives_signs_of_life(bench: Bench, autojump_clock: MockClock) -> None:
    async def long(request: ChatRequest) -> AsyncIterator[str]:
        for _ in range(100):
            await trio.sleep(0.1)
            yield "x"

    call = bench.open(long, stream=False, idle_timeout=3)
    events = await everything(call)
    signs = [event for event in events if isinstance(event, Data) and not event.data]
    assert 8 <= len(signs) <= 11
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


# What a client that leaves does


async def test_a_handler_that_awaits_is_cancelled_and_cleans_up(bench: Bench) -> None:
    seen: list[type[BaseException]] = []

    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        yield "x"
        try:
            await trio.sleep_forever()
        except BaseException as error:
            seen.append(type(error))
            raise

    call = bench.open(waits)
    await wait_all_tasks_blocked()
    call.cancel("client left")
    await released(call)
    assert seen == [trio.Cancelled]
    assert bench.pool.running == 0


async def test_a_generator_that_is_parked_in_yield_is_closed(bench: Bench) -> None:
    seen: list[type[BaseException]] = []

    async def torrent(request: ChatRequest) -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * WINDOW
        except BaseException as error:
            seen.append(type(error))
            raise

    call = bench.open(torrent)
    await wait_all_tasks_blocked()
    assert call.body.waiting_bytes >= WINDOW
    call.cancel("client left")
    await released(call)
    assert seen == [GeneratorExit]


async def test_a_generator_that_never_awaits_does_not_starve_the_others(bench: Bench) -> None:
    async def greedy(request: ChatRequest) -> AsyncIterator[str]:
        while True:
            yield "x"

    call = bench.open(greedy, stream=False)
    for _ in range(50):
        await trio.lowlevel.checkpoint()
    call.cancel("client left")
    await released(call)


async def test_a_handler_that_never_waits_gives_way_after_a_few_pushes(bench: Bench) -> None:
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


async def test_a_push_notices_a_cancellation_even_if_it_gives_nobody_a_turn(bench: Bench) -> None:
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


async def test_a_handler_in_a_thread_stops_at_its_next_push(bench: Bench) -> None:
    stopped: list[str] = []

    def pushes(request: ChatRequest, provider: ThreadProvider) -> None:
        try:
            while True:
                provider.push("x")
        finally:
            stopped.append("x")

    call = bench.open(pushes)
    assert isinstance(await call.receive(), Head)
    call.cancel("client left")
    await released(call)
    assert stopped == ["x"]
    assert bench.pool.running == 0


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


# Errors


async def test_an_api_error_reaches_the_client_as_it_was_raised(bench: Bench) -> None:
    async def refuses(request: ChatRequest) -> str:
        raise ApiError(429, "slow down", code="quota", type="rate_limit_error", retry_after=7)

    error = await failure(bench.open(refuses))
    assert (error.status, error.message, error.code, error.retry_after) == (429, "slow down", "quota", 7)


async def test_an_api_error_from_a_nursery_of_the_handler_reaches_the_client(bench: Bench) -> None:
    async def refuses(request: ChatRequest) -> str:
        async with trio.open_nursery():
            raise ApiError(429, "slow down")

    assert (await failure(bench.open(refuses))).status == 429


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), SystemExit("secret"), KeyError("secret")])
async def test_any_other_error_shows_no_internals_and_is_logged_where_it_happened(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    async def breaks(request: ChatRequest) -> AsyncIterator[str]:
        yield "x"
        raise error

    with caplog.at_level(logging.ERROR, "trio_cluster"):
        answer = await failure(bench.open(breaks))
    assert answer.status == 500
    assert "secret" not in answer.message
    assert "in breaks" in caplog.text


@pytest.mark.parametrize("value", [object(), 3, None, b"audio"], ids=["object", "number", "none", "bytes"])
async def test_a_value_that_no_chat_can_answer_with_is_a_failure_of_the_handler(
    bench: Bench, caplog: pytest.LogCaptureFixture, value: object
) -> None:
    async def odd(request: ChatRequest) -> object:
        return value

    assert (await failure(bench.open(odd))).status == 500


async def test_an_error_chunk_ends_the_answer(bench: Bench) -> None:
    async def tells(request: ChatRequest) -> AsyncIterator[object]:
        yield "x"
        yield OutputChunk.error("full", "no room", status=503)

    error = await failure(bench.open(tells))
    assert (error.status, error.code, error.message) == (503, "full", "no room")


async def test_pushing_after_the_end_is_an_error_of_the_handler_alone(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[type[BaseException]] = []

    async def overdoes(request: ChatRequest, provider: Provider) -> None:
        await provider.push("x")
        provider.end()
        try:
            await provider.push("y")
        except trio.ClosedResourceError as error:
            seen.append(type(error))

    events = await everything(bench.open(overdoes))
    assert isinstance(events[-1], Done)
    assert seen == [trio.ClosedResourceError]


async def test_a_request_that_cannot_be_read_never_reaches_the_handler(bench: Bench) -> None:
    backend = bench.backend(echo)
    call = backend.open(Request(endpoint="chat.completions", kind="chat", model="m", body=b"{"))
    assert (await failure(call)).status == 400


async def test_a_cancel_scope_that_leaks_out_of_a_generator_harms_only_its_own_call(
    bench: Bench, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def leaks(request: ChatRequest) -> AsyncIterator[str]:
        with trio.move_on_after(1):
            while True:
                yield "x" * WINDOW

    call = bench.open(leaks)
    await released(call)
    assert (await failure(call)).status == 500
    good = await everything(bench.open(echo))
    assert isinstance(good[-1], Done)
    assert bench.pool.running == 0


async def test_a_nursery_around_a_yield_harms_only_its_own_call(
    bench: Bench, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def crashes() -> None:
        await trio.sleep(1)
        raise ValueError("in the background")

    async def risky(request: ChatRequest) -> AsyncIterator[str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crashes)
            while True:
                yield "x" * WINDOW

    call = bench.open(risky)
    await released(call)
    assert (await failure(call)).status == 500
    assert isinstance((await everything(bench.open(echo)))[-1], Done)


async def test_a_deep_recursion_in_a_handler_is_just_a_failure(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def deep(request: ChatRequest) -> str:
        def dig(n: int) -> int:
            return dig(n + 1)

        return str(dig(0))

    assert (await failure(bench.open(deep))).status == 500
    assert sys.getrecursionlimit() > 100


async def test_a_sync_generator_streams_from_its_thread(bench: Bench) -> None:
    def words(request: ChatRequest) -> Iterator[str]:
        yield from request.last_text.split()

    events = await everything(bench.open(words, stream=False))
    assert json.loads(text(events))["choices"][0]["message"]["content"] == "abc"


async def test_others_are_served_while_many_vectors_are_encoded(bench: Bench) -> None:
    count, turns = 500, 0
    body = {"model": "m", "input": ["word"] * count}
    asked = Request("embeddings", "embedding", "m", json.dumps(body).encode())
    encoding = trio.Event()

    async def vectors(request: Any) -> list[list[float]]:
        encoding.set()
        return [[0.123456789] * 1000] * count

    async def others() -> None:
        nonlocal turns
        await encoding.wait()
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        call = HandlerBackend(ModelInfo("m", "embedding"), vectors, bench.pool).open(asked)
        events = await everything(call)
        nursery.cancel_scope.cancel()
    data = [event.data for event in events if isinstance(event, Data)]
    assert len(json.loads(b"".join(data))["data"]) == count
    # Half a million numbers, eight thousand at a time; and what goes out waits for whoever takes it.
    assert turns > 60
    assert max(map(len, data)) <= 66_000


# Several prompts


def completion(prompts: list[str], *, stream: bool = False, **fields: Any) -> Request:
    body = {"model": "m", "prompt": prompts, "stream": stream} | fields
    return Request(endpoint="completions", kind="chat", model="m", body=json.dumps(body).encode())


async def generates(request: ChatRequest) -> AsyncIterator[str]:
    for letter in request.prompt or "":
        yield letter.upper()


async def returns(request: ChatRequest) -> str:
    assert request.prompts is None
    return request.last_text.upper()


async def pushes(request: ChatRequest, provider: Provider) -> None:
    await provider.push(request.last_text.upper())
    provider.end()
    with pytest.raises(trio.ClosedResourceError):
        await provider.push("more")


def in_a_thread(request: ChatRequest, provider: ThreadProvider) -> None:
    provider.push(request.last_text.upper())
    provider.end()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("handler", [generates, returns, pushes, in_a_thread])
async def test_each_of_several_prompts_is_answered_in_one_slot(
    bench: Bench, handler: Any, stream: bool
) -> None:
    call = bench.backend(handler).open(completion(["ab", "cd", "ef"], stream=stream))
    events = text(await everything(call))
    await released(call)
    if stream:
        assert read_stream(events.encode()).texts == {0: "AB", 1: "CD", 2: "EF"}
    else:
        assert [each["text"] for each in json.loads(events)["choices"]] == ["AB", "CD", "EF"]


async def test_a_call_with_several_prompts_is_cancelled_and_fails_as_one(bench: Bench) -> None:
    seen = []

    async def waits(request: ChatRequest) -> str:
        seen.append(request.prompt)
        if request.prompt == "b":
            await trio.sleep_forever()
        return "x"

    call = bench.backend(waits).open(completion(["a", "b", "c"]))
    await trio.testing.wait_all_tasks_blocked()
    call.cancel("client left")
    await released(call)
    assert seen == ["a", "b"]

    async def fails(request: ChatRequest) -> str:
        if request.prompt == "b":
            raise ApiError(429, "not that one")
        return "x"

    assert (await failure(bench.backend(fails).open(completion(["a", "b", "c"])))).status == 429
