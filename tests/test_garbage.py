"""What is over is gone at once: nothing that a request or a connection leaves behind waits for the garbage collector.

A full collection looks at everything that there is. With thousands of streams that takes long enough for all of them to
notice, so there should be no need for it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import trio

from trio_cluster import ChatRequest, ClusterServer

ROUNDS = 5


@contextmanager
def garbage(found: list[str]) -> Iterator[None]:
    """Find out which of our objects the block leaves behind in cycles.

    What was there before it does not count: a node of an earlier test may still be held by a thread that is about to
    end, and becomes garbage whenever it likes.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += sorted(
            {type(each).__name__ for each in gc.garbage if "trio_cluster" in type(each).__module__}
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()
        gc.collect()
        gc.freeze()


async def echo(request: ChatRequest) -> AsyncIterator[str]:
    yield "one "
    yield "two"


async def endless(request: ChatRequest) -> AsyncIterator[str]:
    while True:
        yield "more "
        await trio.sleep(0.001)


async def broken(request: ChatRequest) -> AsyncIterator[str]:
    yield "one "
    raise ValueError("not this time")


async def ask(port: int, model: str, until: bytes, **extra: object) -> None:
    """Send a request, read until something has come, and leave."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}], **extra}).encode()
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await stream.send_all(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        while until not in received:
            piece = await stream.receive_some()
            if not piece:
                break
            received += piece


ERRANDS = {
    "a plain answer": ("echo", b"two", {}),
    "a stream that ends": ("echo", b"[DONE]", {"stream": True}),
    "a stream whose client leaves": ("endless", b"more", {"stream": True}),
    "a stream that fails": ("broken", b"error", {"stream": True}),
    "a failure": ("broken", b"error", {}),
    "a refusal": ("unknown", b"error", {}),
}


@pytest.mark.parametrize("errand", ERRANDS)
@pytest.mark.parametrize("where", ["here", "on a worker"])
async def test_nothing_waits_for_the_garbage_collector(
    nursery: trio.Nursery, errand: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    master, worker = ClusterServer(), ClusterServer()
    serving = master if where == "here" else worker
    for name, handler in {"echo": echo, "endless": endless, "broken": broken}.items():
        serving.register_chat(name, handler)
    master.options.server.host = "127.0.0.1"
    await nursery.start(master.run_as_master, 0)
    await nursery.start(worker.run_as_worker, "127.0.0.1", master.internal_port)
    assert master.port is not None
    model, until, extra = ERRANDS[errand]

    async def go(rounds: int) -> None:
        assert master.port is not None
        for _ in range(rounds):
            await ask(master.port, model, until, **extra)
        with trio.fail_after(5):
            while master.router.live or worker.router.live:  # noqa: ASYNC110
                await trio.sleep(0.01)
        caplog.clear()

    await go(1)
    found: list[str] = []
    with garbage(found):
        await go(ROUNDS)
    assert found == [], found
