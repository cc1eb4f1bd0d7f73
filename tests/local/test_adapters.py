from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio

from trio_cluster.local.adapters import Provider, ThreadProvider, adapt


class Collector:
    """A provider that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[object] = []
        self.ended = False

    async def push(self, chunk: object) -> None:
        await trio.lowlevel.checkpoint()
        self.values.append(chunk)

    def end(self) -> None:
        self.ended = True


async def async_generator(request: str) -> AsyncIterator[str]:
    for word in request.split():
        yield word


async def coroutine(request: str) -> str:
    return request


async def async_push(request: str, provider: Provider) -> None:
    for word in request.split():
        await provider.push(word)
    provider.end()


def generator(request: str) -> Iterator[str]:
    yield from request.split()


def function(request: str) -> str:
    return request


def push(request: str, provider: ThreadProvider) -> None:
    for word in request.split():
        provider.push(word)
    provider.end()


class Callable:
    async def __call__(self, request: str) -> AsyncIterator[str]:
        for word in request.split():
            yield word

    async def method(self, request: str) -> str:
        return request


def with_prefix(prefix: str, request: str) -> Iterator[str]:
    yield prefix
    yield from request.split()


async def provider_by_name(request: str, provider: Any = None) -> None:
    await provider.push(request)


SHAPES = [
    pytest.param(async_generator, ["a", "b"], id="async generator"),
    pytest.param(coroutine, ["a b"], id="coroutine"),
    pytest.param(async_push, ["a", "b"], id="async push"),
    pytest.param(generator, ["a", "b"], id="generator"),
    pytest.param(function, ["a b"], id="function"),
    pytest.param(push, ["a", "b"], id="push"),
    pytest.param(Callable(), ["a", "b"], id="object with an async generator for __call__"),
    pytest.param(Callable().method, ["a b"], id="bound method"),
    pytest.param(functools.partial(with_prefix, "x"), ["x", "a", "b"], id="partial"),
    pytest.param(provider_by_name, ["a b"], id="optional provider"),
    pytest.param(str.upper, ["A B"], id="builtin"),
]


@pytest.mark.parametrize(("handler", "values"), SHAPES)
async def test_every_shape_pushes_what_it_gives(handler: Any, values: list[str]) -> None:
    collector = Collector()
    await adapt(handler)("a b", collector)
    assert collector.values == values


@pytest.mark.parametrize("handler", [async_push, push])
async def test_a_push_handler_can_end_its_output(handler: Any) -> None:
    collector = Collector()
    await adapt(handler)("a b", collector)
    assert collector.ended


async def test_plain_functions_run_in_a_thread() -> None:
    threads: list[int] = []

    def notes_generator(request: str) -> Iterator[str]:
        threads.append(threading.get_ident())
        yield request

    def notes_function(request: str) -> str:
        threads.append(threading.get_ident())
        return request

    def notes_push(request: str, provider: ThreadProvider) -> None:
        threads.append(threading.get_ident())

    for handler in (notes_generator, notes_function, notes_push):
        await adapt(handler)("a", Collector())
    assert len(threads) == 3
    assert threading.get_ident() not in threads


def keyword(request: str, *, temperature: float) -> str:
    return request


def nothing() -> str:
    return ""


def three(request: str, provider: Any, more: Any) -> None:
    pass


async def yields_and_pushes(request: str, provider: Provider) -> AsyncIterator[str]:
    yield "x"


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("text", "not 'text'"),
        (None, "not None"),
        (nothing, "takes 0 arguments"),
        (three, "takes 3 arguments"),
        (keyword, "keyword argument temperature"),
        (yields_and_pushes, "both yields and takes a provider"),
    ],
)
def test_other_shapes_are_refused_when_they_are_registered(handler: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        adapt(handler)


async def test_a_cancelled_generator_in_a_thread_is_closed(autojump_clock: trio.testing.MockClock) -> None:
    closed = threading.Event()

    def endless(request: str) -> Iterator[str]:
        try:
            while True:
                yield "x"
        finally:
            closed.set()

    class Slow(Collector):
        async def push(self, chunk: object) -> None:
            await trio.sleep_forever()

    with trio.move_on_after(1) as scope:
        await adapt(endless)("a", Slow())
    assert scope.cancelled_caught
    assert closed.is_set()


async def test_a_thread_learns_of_a_cancellation_where_it_asks() -> None:
    started = threading.Event()

    def asks(request: str) -> str:
        started.set()
        while True:
            trio.from_thread.check_cancelled()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(adapt(asks), "a", Collector())
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()


async def test_leaving_an_async_generator_runs_its_cleanup() -> None:
    cleaned: list[str] = []

    async def handler(request: str) -> AsyncIterator[str]:
        try:
            yield "x"
            yield "y"
        finally:
            cleaned.append("done")

    class Refusing(Collector):
        async def push(self, chunk: object) -> None:
            raise trio.ClosedResourceError

    with pytest.raises(trio.ClosedResourceError):
        await adapt(handler)("a", Refusing())
    assert cleaned == ["done"]
