"""Raw handlers that were written for asyncio.

A raw handler gets no provider but a call, on which it does several things. What it does is handed over in the queue of
the relay (see ``asyncio_handler.py``), in the form of functions that the trio task calls in turn. Only waiting for the
body has a task of its own beside it, so that a handler may wait for the body in one task, and send in another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import trio

from ..core.request import Request
from .adapters import Adapter, Handler, is_generator, takes_provider
from .asyncio_handler import LARGE_PIECE, AsyncioHandler, Relay
from .asyncio_loop import LoopRun
from .passthrough import RawCall, RawHandler

__all__ = ["AsyncioRawCall", "raw_from_asyncio"]

T = TypeVar("T")


def raw_from_asyncio(wrapped: AsyncioHandler) -> RawHandler:
    """Return what :func:`from_asyncio` has made as a raw handler, for trio. Synchronous.

    Args:
        wrapped: a coroutine function in it gets an :class:`AsyncioRawCall`.

    Raises:
        TypeError: it is no coroutine function that takes one argument.
    """
    handler, loop = wrapped.handler, wrapped.loop
    if is_generator(handler) or takes_provider(handler):
        raise TypeError(f"a raw handler must be an async def that takes the call, not {handler!r}")

    async def run_raw(call: RawCall) -> None:
        run = await loop.acquire()
        try:
            errors: list[Exception] = []
            async with trio.open_nursery() as nursery:
                view = AsyncioRawCall(call, run, nursery)
                relay = Relay(run, view.run_handler(handler), call.request)
                try:
                    await relay.run(_Performer())
                except Exception as error:
                    # Raised below, outside the nursery, which would wrap it in an exception group.
                    errors.append(error)
                finally:
                    nursery.cancel_scope.cancel(reason="the handler has ended")
            if errors:
                raise errors.pop()
        finally:
            await loop.release(run)  # noqa: ASYNC102  (it shields itself)

    return run_raw


class _Performer:
    """A provider whose output are functions to call."""

    async def push(self, chunk: Any) -> None:
        """Call a function, and wait for what it returns, if that can be awaited. A checkpoint only then."""
        result = chunk()
        if result is not None:
            await result

    def end(self) -> None:
        """A raw handler ends its output by returning."""
        raise RuntimeError("a raw handler has no output to end")


class AsyncioRawCall:
    """What a raw handler of :func:`from_asyncio` gets: a :class:`~trio_cluster.RawCall`, for use in asyncio.

    Everything is done in the order in which it was asked for. A mistake, such as sending before the answer was begun,
    is found later, in trio: the task is cancelled then, and the call fails with the error.

    Args:
        call: the call.
        run: the loop.
        nursery: of the call; for tasks that wait for the body.
    """

    def __init__(self, call: RawCall, run: LoopRun, nursery: trio.Nursery) -> None:
        self._call = call
        self._run = run
        self._nursery = nursery
        self._clock = trio.lowlevel.current_clock()
        self._relay: Relay | None = None

    def run_handler(self, handler: Handler) -> Adapter:
        """Return what runs the handler with this call, as the relay needs it. Synchronous."""

        async def adapter(_: object, relay: Any) -> None:
            self._relay = relay
            await handler(self)

        return adapter

    @property
    def request(self) -> Request:
        """The request: endpoint, model, headers, query, and the size of the body if it is known."""
        return self._call.request

    @property
    def worker(self) -> str:
        """The name of the node on which the handler runs: a worker, or a server that serves the model itself."""
        return self._call.worker

    @property
    def key_name(self) -> str:
        """The name of the API key that the request has; empty where no key is required."""
        return self._call.key_name

    @property
    def ended(self) -> bool:
        """Whether the answer is over: the client has left, or the call was cancelled. What is sent is dropped."""
        return self._call.ended

    @property
    def time_left(self) -> float:
        """Seconds that are left for the whole answer; infinite if the client has set no limit."""
        return self._call.deadline - self._clock.current_time()

    async def receive(self) -> bytes:
        """Return the bytes of the request's body that arrived since the last time, waiting for some; empty at its end.

        Raises:
            asyncio.CancelledError: the call was cancelled.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._hand_over(partial(self._nursery.start_soon, self._receive, future))
        return await future

    def begin(self, status: int, content_type: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        """Begin the answer; see ``RawCall.begin``. Synchronous."""
        self._hand_over(partial(self._call.begin, status, content_type, headers))

    async def send(self, data: bytes) -> None:
        """Send a piece of the answer's body to the client, as it is.

        It waits while the client is slow, and may return before the piece was sent: a handler may be ahead by a few
        small pieces.

        Raises:
            asyncio.CancelledError: the call was cancelled.
        """
        assert self._relay is not None
        await self._relay.push(partial(self._call.send, data), large=len(data) > LARGE_PIECE)

    def report_usage(
        self,
        prompt_tokens: int,
        completion_tokens: int = 0,
        *,
        cached_tokens: int = 0,
        reasoning_tokens: int = 0,
    ) -> None:
        """Report the tokens of the answer, for metering; see ``RawCall.report_usage``. Synchronous."""
        self._hand_over(
            partial(
                self._call.report_usage,
                prompt_tokens,
                completion_tokens,
                cached_tokens=cached_tokens,
                reasoning_tokens=reasoning_tokens,
            )
        )

    def _hand_over(self, function: Callable[[], object]) -> None:
        assert self._relay is not None
        if self._relay.cancelled:
            # Nothing is done for it any more, so its cleanup would wait in vain.
            raise asyncio.CancelledError
        self._relay.hand_over(function)

    async def _receive(self, future: asyncio.Future[bytes]) -> None:
        try:
            data = await self._call.receive()
        except Exception as error:
            self._run.post(_fail, future, error)
        else:
            self._run.post(_resolve, future, data)


def _resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
