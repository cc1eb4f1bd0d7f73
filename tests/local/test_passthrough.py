"""Models that answer with bytes of their own making."""

from __future__ import annotations

import logging
from typing import Any

import attrs
import pytest
import trio
from memory_cluster import everything, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.answer import Data, Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.local.passthrough import RawBackend, RawCall
from trio_cluster.local.pool import HandlerPool
from trio_cluster.options import ClusterServerOptions, ServerOptions


def request(body: bytes = b"body", upload: ByteChannel | None = None, **fields: Any) -> Request:
    return Request(
        "/v1/anything", "custom", "m", body, "text/plain", upload=upload, request_id="r1", **fields
    )


@attrs.define
class Bench:
    """A pool that is being served."""

    options: ClusterServerOptions
    pool: HandlerPool

    def backend(self, handler: Any, max_concurrency: int | None = None) -> RawBackend:
        return RawBackend(ModelInfo("m", "any"), handler, self.pool, max_concurrency)

    def open(self, handler: Any, asked: Request | None = None) -> Call:
        return self.backend(handler).open(asked or request())


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    options = ClusterServerOptions(
        server=ServerOptions(max_concurrency=1, queue_timeout=5.0, default_timeout=20.0)
    )
    pool = HandlerPool(options)
    await nursery.start(pool.serve)
    return Bench(options, pool)


async def failure(call: Call) -> ApiError:
    with trio.fail_after(1000):
        end = (await everything(call))[-1]
    assert isinstance(end, Failed)
    return end.error


async def echo(call: RawCall) -> None:
    call.begin(201, "text/plain", (("x-own", "yes"),))
    while piece := await call.receive():
        await call.send(piece)


# The answer


async def test_bytes_go_in_and_come_out_as_they_are(bench: Bench) -> None:
    events = await everything(bench.open(echo))
    assert events == [Head(201, "text/plain", (("x-own", "yes"),)), Data(b"body"), Done()]


async def test_a_body_that_is_still_coming_is_received_piece_by_piece(bench: Bench) -> None:
    upload = ByteChannel()
    call = bench.open(echo, request(b"", upload))
    assert isinstance(await call.receive(), Head)
    for piece in (b"a", b"b"):
        upload.put(piece)
        assert await call.receive() == Data(piece)
    upload.put(b"", last=True)
    assert await call.receive() == Done()


async def test_what_is_asked_can_be_looked_at(bench: Bench) -> None:
    async def look(call: RawCall) -> None:
        call.begin(200, "text/plain")
        asked = call.request
        await call.send(f"{asked.endpoint} {asked.model} {asked.content_type} {asked.request_id}".encode())

    assert text(await everything(bench.open(look))) == "/v1/anything m text/plain r1"


async def test_a_handler_that_never_begins_has_failed(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def nothing(call: RawCall) -> None:
        pass

    error = await failure(bench.open(nothing))
    assert (error.status, error.code) == (500, "handler_failed")
    assert caplog.records[-1].fields["request_id"] == "r1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", ["twice", "too early"])
async def test_an_answer_out_of_order_is_a_failure(
    wrong: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(call: RawCall) -> None:
        if wrong == "twice":
            call.begin(200, "")
            call.begin(200, "")
        await call.send(b"x")

    assert (await failure(bench.open(handler))).code == "handler_failed"
    assert "failed" in caplog.text


@pytest.mark.parametrize("count", [-1, 2**53, 10**19])
async def test_a_number_of_tokens_that_cannot_be_counted_is_a_failure(count: int, bench: Bench) -> None:
    async def handler(call: RawCall) -> None:
        call.report_usage(1, cached_tokens=count)
        call.begin(200, "")

    assert (await failure(bench.open(handler))).code == "handler_failed"


@pytest.mark.parametrize("begun", [False, True])
async def test_an_api_error_is_told_as_it_was_raised(begun: bool, bench: Bench) -> None:
    async def handler(call: RawCall) -> None:
        if begun:
            call.begin(200, "text/plain")
            await call.send(b"some")
        raise ApiError(429, "too many", code="mine")

    error = await failure(bench.open(handler))
    assert (error.status, error.code) == (429, "mine")


@pytest.mark.parametrize("begun", [False, True])
async def test_any_other_error_shows_no_internals_and_is_logged(
    begun: bool, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(call: RawCall) -> None:
        if begun:
            call.begin(200, "text/plain")
        raise RuntimeError("a secret")

    error = await failure(bench.open(handler))
    assert (error.code, "secret" in error.message) == ("handler_failed", False)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "a secret" in caplog.text
    assert record.fields == {"model": "m", "request_id": "r1"}  # type: ignore[attr-defined]


async def test_a_group_from_a_nursery_of_the_handler_is_a_failure_too(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise RuntimeError("in a task")

    async def handler(call: RawCall) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)

    assert (await failure(bench.open(handler))).code == "handler_failed"
    assert "in a task" in caplog.text


async def test_an_api_error_from_a_nursery_of_the_handler_reaches_the_client(bench: Bench) -> None:
    async def fail() -> None:
        raise ApiError(418, "a teapot", code="teapot")

    async def handler(call: RawCall) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()

    assert (await failure(bench.open(handler))).code == "teapot"


# Its end before its time


async def test_a_handler_that_is_cancelled_cleans_up_and_is_released_then(bench: Bench) -> None:
    steps: list[str] = []
    go_on = trio.Event()

    async def handler(call: RawCall) -> None:
        try:
            await trio.sleep_forever()
        finally:
            steps.append("cancelled")
            with trio.CancelScope(shield=True):
                await go_on.wait()

    call = bench.open(handler)
    await wait_all_tasks_blocked()
    call.cancel("the client left")
    await wait_all_tasks_blocked()
    assert (steps, call.released) == (["cancelled"], False)
    go_on.set()
    await wait_all_tasks_blocked()
    assert call.released


@pytest.mark.parametrize("wakes", [True, False])
async def test_a_handler_that_fails_while_it_is_cancelled_is_only_cancelled(
    wakes: bool, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("while it is cancelled")

    async def handler(call: RawCall) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_when_cancelled)
            if wakes:
                nursery.start_soon(trio.sleep_forever)

    call = bench.open(handler)
    await wait_all_tasks_blocked()
    call.cancel("the client left")
    await wait_all_tasks_blocked()
    assert call.released
    assert (bench.pool.tasks, call.cancelled) == (0, "the client left")


async def test_silence_is_504(bench: Bench, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    error = await failure(bench.open(sleep_on))
    assert (error.status, trio.current_time() - began) == (504, 20.0)


async def sleep_on(call: RawCall) -> None:
    await trio.sleep_forever()


async def test_each_piece_of_the_answer_moves_the_deadline_on(
    bench: Bench, autojump_clock: MockClock
) -> None:
    async def slow(call: RawCall) -> None:
        await trio.sleep(15)
        call.begin(200, "text/plain")
        for _ in range(3):
            await trio.sleep(15)
            await call.send(b"x")

    assert text(await everything(bench.open(slow))) == "xxx"


async def test_the_idle_timeout_does_not_count_while_the_body_is_arriving(
    bench: Bench, autojump_clock: MockClock
) -> None:
    upload = ByteChannel()
    call = bench.open(echo, request(b"", upload))
    for _ in range(5):
        await trio.sleep(19)
        upload.put(b"x")
        await wait_all_tasks_blocked()
        await trio.sleep(19)
    upload.put(b"", last=True)
    assert text(await everything(call)) == "xxxxx"


async def test_silence_counts_when_the_body_is_there_be_it_read_or_not(
    bench: Bench, autojump_clock: MockClock
) -> None:
    upload = ByteChannel()
    call = bench.open(sleep_on, request(b"", upload))
    await trio.sleep(100)
    assert not call.ended
    upload.put(b"x", last=True)
    began = trio.current_time()
    assert (await failure(call)).status == 504
    assert trio.current_time() - began == 20.0


async def test_taking_the_body_is_no_silence(bench: Bench, autojump_clock: MockClock) -> None:
    async def slow(call: RawCall) -> None:
        await trio.sleep(15)
        await call.receive()
        await trio.sleep(15)
        call.begin(200, "text/plain")

    upload = ByteChannel()
    upload.put(b"x", last=True)
    assert isinstance((await everything(bench.open(slow, request(b"", upload))))[-1], Done)


async def test_the_total_timeout_ends_even_a_busy_answer(bench: Bench, autojump_clock: MockClock) -> None:
    async def busy(call: RawCall) -> None:
        call.begin(200, "text/plain")
        while True:
            await call.send(b"x")
            await trio.sleep(1)

    began = trio.current_time()
    assert (await failure(bench.open(busy, request(total_timeout=7.5)))).status == 504
    assert trio.current_time() - began == 7.5


async def test_a_slow_client_holds_the_handler_back_and_is_not_its_silence(
    bench: Bench, autojump_clock: MockClock
) -> None:
    sent = 0

    async def pour(call: RawCall) -> None:
        nonlocal sent
        call.begin(200, "text/plain")
        for _ in range(8):
            await call.send(bytes(WINDOW // 4))
            sent += 1

    call = bench.open(pour)
    await trio.sleep(1000)
    assert sent == 3
    assert len(text(await everything(call))) == 2 * WINDOW


# Its place


async def test_a_raw_model_takes_no_slot_of_the_node(bench: Bench) -> None:
    calls = [bench.open(sleep_on) for _ in range(20)]
    await wait_all_tasks_blocked()
    assert (bench.pool.running, bench.pool.waiting, bench.pool.tasks) == (0, 0, 20)
    for call in calls:
        call.cancel("enough")


async def test_no_more_run_at_once_than_it_says_and_the_others_wait(bench: Bench) -> None:
    running, most, go_on = 0, 0, trio.Event()

    async def count(call: RawCall) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        running -= 1
        call.begin(200, "text/plain")

    backend = bench.backend(count, 2)
    calls = [backend.open(request()) for _ in range(6)]
    await wait_all_tasks_blocked()
    assert (backend.load, most) == (3.0, 2)
    assert sorted(call.phase for call in calls) == ["queued"] * 4 + ["waiting"] * 2
    go_on.set()
    for call in calls:
        assert isinstance((await everything(call))[-1], Done)
    await wait_all_tasks_blocked()
    assert (backend.load, most) == (0.0, 2)


async def test_who_waits_too_long_for_a_place_gets_503(bench: Bench, autojump_clock: MockClock) -> None:
    backend = bench.backend(sleep_on, 1)
    busy = backend.open(request())
    await wait_all_tasks_blocked()
    began = trio.current_time()
    error = await failure(backend.open(request()))
    assert (error.status, trio.current_time() - began) == (503, 5.0)
    busy.cancel("enough")


async def test_without_a_limit_its_load_is_told_by_the_number_of_its_calls(bench: Bench) -> None:
    backend = bench.backend(sleep_on)
    calls = [backend.open(request()) for _ in range(3)]
    assert backend.load == 0.03
    for call in calls:
        call.cancel("enough")
    await wait_all_tasks_blocked()
    assert backend.load == 0


# Registering


@pytest.mark.parametrize("handler", [None, "text", lambda call: None])
def test_a_handler_that_is_no_coroutine_function_is_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match="coroutine function"):
        RawBackend(ModelInfo("m", "any"), handler, HandlerPool(ClusterServerOptions()))


def test_an_object_that_is_called_like_one_will_do() -> None:
    class Relay:
        async def __call__(self, call: RawCall) -> None:
            call.begin(200, "")

    assert RawBackend(ModelInfo("m", "any"), Relay(), HandlerPool(ClusterServerOptions())).health.available


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_nothing_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RawBackend(ModelInfo("m", "any"), echo, HandlerPool(ClusterServerOptions()), limit)


def test_it_answers_everything_and_cannot_be_given_more() -> None:
    backend = RawBackend(ModelInfo("m", "any"), echo, HandlerPool(ClusterServerOptions()))
    assert backend.info.answers("chat", "chat.completions")
    assert backend.info.answers("custom", "/v1/whatever")
    with pytest.raises(ValueError, match="every route"):
        backend.add_endpoint("/v1/x", echo)
