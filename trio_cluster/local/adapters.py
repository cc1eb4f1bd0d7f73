"""The shapes a user's handler may have, each turned into the same thing: a coroutine that pushes.

A handler is a function a user wrote. It may yield pieces of output, return the whole of it, or push pieces into a
provider; and it may be ``async`` or plain, in which case it runs in a thread. :func:`adapt` looks at the
function once, when it is registered, and returns a *driver* ``async (request, provider)``, so that everything above
knows one shape only.

Cancellation. A driver is cancelled like any trio code. An ``async`` handler sees ``trio.Cancelled`` where it awaits,
or ``GeneratorExit`` where it is parked in a ``yield``; its ``finally`` blocks run before the driver returns. A
handler in a thread cannot be interrupted by anybody: it learns of the cancellation at its next ``push`` or
``yield``, or where it calls ``trio.from_thread.check_cancelled()``, and the driver waits for it however long it
takes. Abandoning the thread instead would free the slot while the work goes on, which is the very thing this
project exists to prevent.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias

import trio

__all__ = ["Adapter", "Handler", "Provider", "ThreadProvider", "adapt"]

Handler: TypeAlias = Callable[..., Any]


class Provider(Protocol):
    """Where a handler puts its output; what an ``async`` push-style handler is given as its second argument."""

    async def push(self, chunk: object) -> None:
        """Give a piece of output to the client, waiting while it is slow.

        A checkpoint as far as cancellation goes. Others get a turn here when the task has put a few pieces without
        waiting for anything.

        Raises:
            TypeError, ValueError: the piece is not something this kind of model can answer with.
            trio.ClosedResourceError: the output was ended.
            trio.Cancelled: nobody wants the answer any more.
        """
        ...

    def end(self) -> None:
        """End the output: the answer is complete. Returning from the handler does the same."""
        ...


class ThreadProvider:
    """What a push-style handler that runs in a thread is given: like :class:`Provider`, without ``await``."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def push(self, chunk: object) -> None:
        """Give a piece of output to the client; blocks while it is slow. Raises what ``Provider.push`` raises."""
        trio.from_thread.run(self._provider.push, chunk)

    def end(self) -> None:
        """End the output: the answer is complete. Returning from the handler does the same."""
        trio.from_thread.run_sync(self._provider.end)


Adapter: TypeAlias = Callable[[Any, Provider], Awaitable[None]]

# Handlers in threads are bounded by the slots they hold, not by trio's default limit of 40 threads, which would let
# a handler that waits for a thread look as if it ran.
_UNLIMITED = math.inf


def adapt(handler: Handler) -> Adapter:
    """Return a coroutine function that runs ``handler`` and pushes what it gives.

    Args:
        handler: a function, method, ``functools.partial`` or object with ``__call__``, of one of the shapes that the
            documentation lists.

    Raises:
        TypeError: it has none of these shapes; the message says what was found.
    """
    if not callable(handler):
        raise TypeError(f"a handler is a function, not {handler!r}")
    pushes = _takes_provider(handler)
    if _is(inspect.isasyncgenfunction, handler):
        driver = _async_generator
    elif _is(inspect.iscoroutinefunction, handler):
        driver = _async_push if pushes else _async_value
    elif _is(inspect.isgeneratorfunction, handler):
        driver = _thread_generator
    else:
        driver = _thread_push if pushes else _thread_value
    if pushes and driver in (_async_generator, _thread_generator):
        raise TypeError(f"{_name(handler)} both yields and takes a provider; it must do one or the other")
    return functools.partial(driver, handler)


async def _async_generator(handler: Handler, request: Any, provider: Provider) -> None:
    values: AsyncGenerator[Any, None] = handler(request)
    async with aclosing(values):
        async for value in values:
            await provider.push(value)


async def _async_value(handler: Handler, request: Any, provider: Provider) -> None:
    await provider.push(await handler(request))


async def _async_push(handler: Handler, request: Any, provider: Provider) -> None:
    await handler(request, provider)


async def _thread_generator(handler: Handler, request: Any, provider: Provider) -> None:
    def run() -> None:
        values = handler(request)
        try:
            for value in values:
                trio.from_thread.run(provider.push, value)
        finally:
            values.close()

    await _in_thread(run)


async def _thread_value(handler: Handler, request: Any, provider: Provider) -> None:
    await provider.push(await _in_thread(functools.partial(handler, request)))


async def _thread_push(handler: Handler, request: Any, provider: Provider) -> None:
    await _in_thread(functools.partial(handler, request, ThreadProvider(provider)))


async def _in_thread(function: Callable[[], Any]) -> Any:
    return await trio.to_thread.run_sync(function, limiter=trio.CapacityLimiter(_UNLIMITED))


def _is(question: Callable[[Any], bool], handler: Handler) -> bool:
    """Ask ``inspect`` about a function, or about the ``__call__`` of an object that stands for one."""
    return question(handler) or question(getattr(handler, "__call__", None))  # noqa: B004


def _name(handler: Handler) -> str:
    return getattr(handler, "__qualname__", None) or repr(handler)


def _takes_provider(handler: Handler) -> bool:
    """Tell ``h(request, provider)`` from ``h(request)``.

    Raises:
        TypeError: it can be called neither way.
    """
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except ValueError:
        # Builtins written in C may have no signature; they take what they are given.
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    demanding = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if demanding:
        raise TypeError(
            f"{_name(handler)} needs the keyword argument {demanding[0]}; a handler is given none"
        )
    if len(required) > 2 or not (positional or starred):
        raise TypeError(
            f"{_name(handler)} takes {len(required)} arguments; a handler takes (request) or (request, provider)"
        )
    return len(required) == 2 or (len(positional) >= 2 and positional[1].name == "provider")
