"""Work in a thread as a stream of values; here engines keep the promise that no work outlives its request.

Theory of operation
===================

The libraries that run models block. Each request's blocking part therefore runs in a thread of its own and
hands its results over through a bounded queue. Three rules hold the two sides together:

*The thread is never abandoned.* Leaving the ``async with`` block, by whatever way, raises a flag and then
waits, shielded from cancellation, until the thread has ended. What makes the wait short is the work's part:
it looks at the flag between any two steps (:attr:`Outlet.closed`, or the answer of :meth:`Outlet.put`), and
where a library can be interrupted from outside, :meth:`Outlet.interrupt_with` says how.

*A slot is held by the thread, not by the request.* It is taken before the thread starts and given back when
the thread has ended, even in the case that the wait runs into its deadline because a library does not listen.

*The queue is bounded, in the thread's direction.* A reader that is slow, because its client is, stops the
work at its next value.

There is no nursery and no cancel scope between two values, so an async generator may ``yield`` from inside
the ``async with`` block. Waking the event loop is coalesced: values that come faster than they are taken cost
one wake.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Generic, TypeVar

import trio
from outcome import Error, Outcome

__all__ = ["Outlet", "ThreadStream"]

T = TypeVar("T")

logger = logging.getLogger("trio_cluster.engines")

#: Seconds to wait for a cancelled thread. Then its library does not listen; we say so and go on without it.
PATIENCE: Final = 30.0

_BOUND: Final = 64


class Outlet(Generic[T]):
    """The thread's end of a :class:`ThreadStream`. Everything here is called from the thread."""

    def __init__(self, bound: int, wake: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._wait_for_upload_room = threading.Semaphore(bound)
        self._values: deque[T] = deque()
        self._wake = wake
        self._closed = False
        self._interrupt: Callable[[], None] | None = None

    def closed(self) -> bool:
        """Tell whether nobody wants the result any more: then stop as soon as possible."""
        return self._closed

    def put(self, value: T) -> bool:
        """Hand over a value, waiting while the queue is full.

        Returns:
            Whether to go on; ``False`` means the same as :attr:`closed`, and the value was dropped.
        """
        self._wait_for_upload_room.acquire()
        if self._closed:
            # For the next put, which must not wait either.
            self._wait_for_upload_room.release()
            return False
        self._values.append(value)
        self._wake()
        return True

    def interrupt_with(self, interrupt: Callable[[], None] | None) -> None:
        """Say what to call, from the event loop's thread, to make a blocking step return early.

        If it is too late for that already, ``interrupt`` is called here and now. ``None`` takes it back.
        """
        with self._lock:
            self._interrupt = interrupt
            late = self._closed
        if late and interrupt is not None:
            interrupt()

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            interrupt = self._interrupt
        self._wait_for_upload_room.release()
        if interrupt is not None:
            interrupt()

    def _take(self) -> T:
        value = self._values.popleft()
        self._wait_for_upload_room.release()
        return value


class ThreadStream(Generic[T]):
    """The values that ``work`` produces in a thread, as an async iterator.

    Use it as an async context manager; iterate inside. Entering waits for a slot of ``limiter`` and starts
    the thread. Leaving stops the work and waits for the thread to end, for at most :data:`PATIENCE` seconds.

    Args:
        work: called in a thread with an :class:`Outlet`. Its exceptions come out of the iteration, after the
            values that were put before.
        limiter: bounds how many threads there are; one slot is held for as long as the thread really runs.
        name: of the thread, for whoever looks at a list of them.
        bound: how many values may wait to be taken.
    """

    def __init__(
        self,
        work: Callable[[Outlet[T]], object],
        limiter: trio.CapacityLimiter,
        *,
        name: str = "engine",
        bound: int = _BOUND,
    ) -> None:
        self._work: Callable[[Outlet[T]], object] | None = work
        self._limiter = limiter
        self._name = name
        self._bound = bound
        self._ended = False
        self._error: BaseException | None = None
        self._parked = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> ThreadStream[T]:
        # What the work holds on to, a whole model perhaps, is to be let go of with the thread, not by some later
        # collection of garbage in the event loop.
        work, self._work = self._work, None
        if work is None:
            raise RuntimeError("a ThreadStream is entered once")
        await self._limiter.acquire_on_behalf_of(self)
        token = trio.lowlevel.current_trio_token()

        # Only a thread that outlasted our patience can find the run finished, and nobody waits for it then.
        def wake() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._parked.unpark_all, idempotent=True)

        def run() -> None:
            work(self._outlet)

        def deliver(result: Outcome[None]) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._end, result.error if isinstance(result, Error) else None)

        self._outlet: Outlet[T] = Outlet(self._bound, wake)
        try:
            trio.lowlevel.start_thread_soon(run, deliver, name=self._name)
        except BaseException:
            self._limiter.release_on_behalf_of(self)
            raise
        return self

    def __aiter__(self) -> ThreadStream[T]:
        return self

    async def __anext__(self) -> T:
        await trio.lowlevel.checkpoint()
        while not self._outlet._values:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._parked.park()
        return self._outlet._take()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._outlet._close()
        with trio.move_on_after(PATIENCE, shield=True):
            while not self._ended:
                await self._parked.park()
        if not self._ended:
            logger.error(
                "the thread %r has not stopped %g s after it was asked to; its slot stays taken so long",
                self._name,
                PATIENCE,
            )

    def _end(self, error: BaseException | None) -> None:
        self._ended = True
        self._error = error
        self._limiter.release_on_behalf_of(self)
        self._parked.unpark_all()
