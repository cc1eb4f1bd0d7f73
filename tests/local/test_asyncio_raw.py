"""Raw handlers that were written for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from memory_cluster import everything, text
from trio.testing import MockClock

from trio_cluster import AsyncioRawCall, ClusterServer, RawCall, from_asyncio
from trio_cluster.core.answer import Data, Done, Failed, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.local.asyncio_raw import raw_from_asyncio
from trio_cluster.local.passthrough import RawBackend
from trio_cluster.local.pool import HandlerPool
from trio_cluster.options import ClusterServerOptions, ServerOptions
from trio_cluster.testing._clock import threads_hold_clock


class Bench:
    """A pool that is being served, and raw handlers of asyncio on it."""

    def __init__(self, pool: HandlerPool) -> None:
        self.pool = pool

    def open(
        self, handler: Any, body: bytes = b"body", upload: ByteChannel | None = None, **fields: Any
    ) -> Call:
        backend = RawBackend(ModelInfo("m", "any"), raw_from_asyncio(from_asyncio(handler)), self.pool)
        request = Request(
            "/v1/x", "custom", "m", body, "text/plain", upload=upload, request_id="r1", **fields
        )
        return backend.open(request)


@pytest.fixture
async def bench(nursery: trio.Nursery) -> AsyncIterator[Bench]:
    pool = HandlerPool(ClusterServerOptions(server=ServerOptions(default_timeout=20.0)))
    await nursery.start(pool.serve)
    with threads_hold_clock():
        yield Bench(pool)


async def ended(call: Call) -> Any:
    """Return how a call has ended, when its work has stopped."""
    released = trio.Event()
    call.on_release(released.set)
    with trio.fail_after(1000):
        last = (await everything(call))[-1]
        await released.wait()
    return last


async def echo(call: AsyncioRawCall) -> None:
    await asyncio.sleep(0)
    call.begin(201, "text/plain", (("x-own", "yes"),))
    while piece := await call.receive():
        await call.send(piece)
    call.report_usage(3, 4)


async def test_bytes_go_in_and_come_out_as_they_are(bench: Bench) -> None:
    with trio.fail_after(1000):
        events = await everything(bench.open(echo))
    assert events == [Head(201, "text/plain", (("x-own", "yes"),)), Data(b"body"), Done(Usage(3, 4, 0, 0))]


async def test_a_body_is_received_while_the_answer_is_sent(bench: Bench) -> None:
    upload = ByteChannel()

    async def both(call: AsyncioRawCall) -> None:
        async def read() -> None:
            while piece := await call.receive():
                await call.send(b"got " + piece)

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            call.begin(200, "text/plain")
            # Sent while the other task waits for the body.
            await asyncio.sleep(0)
            await call.send(b"first ")

    call = bench.open(both, b"", upload)
    with trio.fail_after(1000):
        assert isinstance(await call.receive(), Head)
        assert await call.receive() == Data(b"first ")
        upload.put(b"one")
        assert await call.receive() == Data(b"got one")
        upload.put(b"two", last=True)
        assert text(await everything(call)) == "got two"


async def test_what_is_asked_can_be_looked_at(bench: Bench) -> None:
    seen: list[Any] = []

    async def look(call: AsyncioRawCall) -> None:
        seen.append((call.request.model, call.request.endpoint, call.key_name, call.worker, call.time_left))
        call.begin(200, "text/plain")

    await ended(bench.open(look, total_timeout=9.0))
    ((model, endpoint, key_name, worker, left),) = seen
    assert (model, endpoint, key_name, worker) == ("m", "/v1/x", "", bench.pool.node_name)
    assert 8.0 < left <= 9.0


async def send_before_begin(call: AsyncioRawCall) -> None:
    await call.send(b"x")


async def begin_twice(call: AsyncioRawCall) -> None:
    call.begin(200, "text/plain")
    call.begin(200, "text/plain")
    await asyncio.sleep(1000)


async def give_up(call: AsyncioRawCall) -> None:
    raise ApiError(418, "no coffee")


async def bad_usage(call: AsyncioRawCall) -> None:
    call.begin(200, "text/plain")
    call.report_usage(-1)


@pytest.mark.parametrize(
    ("handler", "status"), [(send_before_begin, 500), (begin_twice, 500), (bad_usage, 500), (give_up, 418)]
)
async def test_a_handler_that_fails(handler: Any, status: int, bench: Bench) -> None:
    end = await ended(bench.open(handler))
    assert isinstance(end, Failed)
    assert end.error.status == status


@pytest.mark.parametrize("where", ["receive", "sleep"])
async def test_a_cancelled_call_cancels_the_task_and_waits_for_its_cleanup(where: str, bench: Bench) -> None:
    log: list[str] = []
    token, began = trio.lowlevel.current_trio_token(), trio.Event()

    async def wait(call: AsyncioRawCall) -> None:
        try:
            call.begin(200, "text/plain")
            token.run_sync_soon(began.set)
            await (call.receive() if where == "receive" else asyncio.sleep(1000))
        except asyncio.CancelledError:
            log.append("cancelled")
            await asyncio.sleep(0.01)
            # Nothing of these may be waited for.
            with pytest.raises(asyncio.CancelledError):
                await call.send(b"x" * 10_000)
            with pytest.raises(asyncio.CancelledError):
                await call.receive()
            log.append("cleaned up")
            raise

    call = bench.open(wait, b"", ByteChannel())
    with trio.fail_after(1000):
        await began.wait()
    call.cancel("client left")
    await ended(call)
    assert log == ["cancelled", "cleaned up"]


async def test_silence_is_504(bench: Bench, autojump_clock: MockClock) -> None:
    async def silent(call: AsyncioRawCall) -> None:
        await asyncio.sleep(1000)

    end = await ended(bench.open(silent))
    assert isinstance(end, Failed)
    assert end.error.status == 504


async def test_a_slow_client_holds_the_handler_back(bench: Bench, autojump_clock: MockClock) -> None:
    sent = 0
    piece = b"x" * 10_000

    async def flood(call: AsyncioRawCall) -> None:
        nonlocal sent
        call.begin(200, "text/plain")
        while sent < 200:
            await call.send(piece)
            sent += 1

    call = bench.open(flood)
    with trio.fail_after(1000):
        assert isinstance(await call.receive(), Head)
        # Longer than any silence may be.
        await trio.sleep(100)
        assert sent <= WINDOW // len(piece) + 2
        assert len(text(await everything(call))) == 200 * len(piece)
    assert sent == 200


async def generator(call: Any) -> AsyncIterator[bytes]:
    yield b""


async def with_provider(call: Any, provider: Any) -> None:
    pass


@pytest.mark.parametrize("handler", [generator, with_provider])
def test_other_shapes_are_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match="async def that takes the call"):
        ClusterServer().register_raw("m", from_asyncio(handler))


def test_it_has_everything_that_the_call_of_trio_has() -> None:
    public = {name for name in vars(RawCall) if not name.startswith("_")}
    # These two are for the pool.
    assert public - {"prepare", "work"} <= {name for name in vars(AsyncioRawCall) if not name.startswith("_")}
