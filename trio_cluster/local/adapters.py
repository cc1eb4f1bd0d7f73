"""Adapters: a user's handler, in any of its shapes, becomes a coroutine function that pushes its output.

A handler is a function that a user wrote. It may yield pieces of output, return the whole output, or push pieces into a
provider; and it may be an ``async def`` or a ``def``, which then runs in a thread. :func:`adapt` inspects the function
once, when it is registered, and returns an *adapter* ``async (request, provider)``, so that the rest of the package
knows a single shape.

Cancellation. An adapter is cancelled like any trio code. An ``async`` handler sees ``trio.Cancelled`` where it awaits,
or ``GeneratorExit`` where it is parked in a ``yield``; its ``finally`` blocks run before the adapter returns. A handler
in a thread cannot be interrupted: it learns of the cancellation at its next ``push`` or ``yield``, or where it calls
``trio.from_thread.check_cancelled()``, and the adapter waits for it however long that takes. Abandoning the thread
instead would free the slot while the work goes on, and that is what this project exists to prevent.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias

import trio

from ..core.threads import run_in_thread

__all__ = ["Adapter", "Handler", "Provider", "ThreadProvider", "adapt", "is_async"]

Handler: TypeAlias = Callable[..., Any]


class Provider(Protocol):
    """Takes the output of a handler; the second argument of an ``async`` push-style handler."""

    async def push(self, chunk: object) -> None:
        """Send a piece of output to the client, and wait while the client is slow to read.

        It checks for cancellation in every case. It lets other tasks run when this one has pushed a few pieces without
        waiting for anything else, so that not every push costs a pass through the scheduler.

        Args:
            chunk: a piece of output, of the types that the model's kind allows.

        Raises:
            TypeError, ValueError: a model of this kind cannot answer with such a piece.
            trio.ClosedResourceError: the output has been ended.
            trio.Cancelled: the client has left, the call was cancelled, or it timed out.
        """
        ...

    def end(self) -> None:
        """End the output: the answer is complete. Returning from the handler does the same. Synchronous, idempotent."""
        ...


class ThreadProvider:
    """The second argument of a push-style handler that runs in a thread: like :class:`Provider`, without ``await``."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def push(self, chunk: object) -> None:
        """Send a piece of output to the client; block while the client is slow. Raises as ``Provider.push`` does."""
        trio.from_thread.run(self._provider.push, chunk)

    def end(self) -> None:
        """End the output: the answer is complete. Returning from the handler does the same. Idempotent."""
        trio.from_thread.run_sync(self._provider.end)


Adapter: TypeAlias = Callable[[Any, Provider], Awaitable[None]]

# Handlers in threads are limited by the slots that they hold. Trio's default limit of 40 threads would be a second
# limit: a handler that waits for a thread would hold a slot, and be reported as running.
_UNLIMITED = math.inf


def adapt(handler: Handler) -> Adapter:
    """Return a coroutine function that runs ``handler`` and pushes its output.

    Args:
        handler: a function, method, ``functools.partial`` or object with ``__call__``, of one of the shapes that the
            documentation lists.

    Raises:
        TypeError: it has none of these shapes; the message names what was found.
    """
    if not callable(handler):
        raise TypeError(f"a handler must be a function, not {handler!r}")
    pushes = takes_provider(handler)
    if _is(inspect.isasyncgenfunction, handler):
        adapter = _async_generator
    elif _is(inspect.iscoroutinefunction, handler):
        adapter = _async_push if pushes else _async_value
    elif _is(inspect.isgeneratorfunction, handler):
        adapter = _thread_generator
    else:
        adapter = _thread_push if pushes else _thread_value
    if pushes and adapter in (_async_generator, _thread_generator):
        raise TypeError(f"{_name(handler)} both yields and takes a provider; it must do one or the other")
    return functools.partial(adapter, handler)


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
    return await run_in_thread(function, limiter=trio.CapacityLimiter(_UNLIMITED))


def is_async(handler: Handler) -> bool:
    """Return whether a handler is an ``async def``, of whatever shape, or an object whose ``__call__`` is one."""
    return _is(inspect.isasyncgenfunction, handler) or _is(inspect.iscoroutinefunction, handler)


def is_generator(handler: Handler) -> bool:
    """Return whether a handler yields its output."""
    return _is(inspect.isasyncgenfunction, handler) or _is(inspect.isgeneratorfunction, handler)


def _is(test: Callable[[Any], bool], handler: Handler) -> bool:
    """Apply a test of ``inspect`` to a function, or to the ``__call__`` of an object that is used as one."""
    return test(handler) or test(getattr(handler, "__call__", None))  # noqa: B004


def _name(handler: Handler) -> str:
    return getattr(handler, "__qualname__", None) or repr(handler)


def takes_provider(handler: Handler) -> bool:
    """Return whether a handler is called as ``h(request, provider)``, and not as ``h(request)``.

    Raises:
        TypeError: it can be called in neither way.
    """
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except ValueError:
        # Functions written in C may have no signature. They are called with the request only.
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if keywords:
        raise TypeError(
            f"{_name(handler)} requires the keyword argument {keywords[0]}; handlers are called without any"
        )
    if len(required) > 2 or not (positional or starred):
        raise TypeError(
            f"{_name(handler)} takes {len(required)} arguments; a handler takes (request) or (request, provider)"
        )
    return len(required) == 2 or (len(positional) >= 2 and positional[1].name == "provider")
