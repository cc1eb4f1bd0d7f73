"""Blocking work in a thread as an async iterator of its results. With this, no work of an engine outlives its request.

Theory of operation
===================

The libraries that run models block. The blocking part of each request therefore runs in a thread of its own, and hands
its results over through a bounded queue. Three rules hold:

*The thread is never abandoned.* Leaving the ``async with`` block, in whatever way, closes the queue and then waits,
shielded from cancellation, until the thread has ended. The work is responsible for keeping that wait short: it checks
between any two steps whether the queue is closed (:meth:`Outlet.closed`, or the result of :meth:`Outlet.put`). If a
library can be interrupted from another thread, the work registers how with :meth:`Outlet.interrupt_with`.

*The slot belongs to the thread, not to the request.* It is acquired before the thread starts and released when the
thread has ended, even if the wait for the thread times out because a library does not react.

*Backpressure.* The queue is bounded: a consumer that is slow, because its client is, blocks the work at its next
result.

No nursery and no cancel scope is open between two results, so an async generator may ``yield`` from inside the ``async
with`` block. Wake-ups of the event loop are coalesced: results that arrive faster than they are consumed cost one
wake-up.
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

from trio_cluster.core.request import Request
from trio_cluster.core.threads import raise_shortage
from trio_cluster.errors import Overloaded
from trio_cluster.local.slots import Slots, answered_request

__all__ = ["Outlet", "ThreadStream"]

#: What a thread that is started outside of a call works for.
_NO_REQUEST: Final = Request("", "custom", "", b"")

T = TypeVar("T")

logger = logging.getLogger("trio_cluster.engines")

#: Seconds to wait for the thread after its queue was closed. If its library does not react until then, an error is
#: logged and the wait ends.
STOP_TIMEOUT: Final = 30.0

#: Results that may wait in the queue by default.
_BOUND: Final = 64


class Outlet(Generic[T]):
    """The thread's end of a :class:`ThreadStream`, which creates it. All methods are called from the thread."""

    def __init__(self, bound: int, wake: Callable[[], None]) -> None:
        # Protects `_closed` together with `_interrupt`; the deque and the semaphore are safe by themselves.
        self._lock = threading.Lock()
        self._room = threading.Semaphore(bound)
        self._values: deque[T] = deque()
        self._wake = wake
        self._closed = False
        self._interrupt: Callable[[], None] | None = None

    def closed(self) -> bool:
        """Tell whether the result is not needed any more, so that the work should stop as soon as possible."""
        return self._closed

    def put(self, value: T) -> bool:
        """Put a result into the queue. Blocks while the queue is full.

        Args:
            value: the result.

        Returns:
            Whether the work should go on. ``False`` means that the stream is :meth:`closed`; the value was dropped.
        """
        self._room.acquire()
        if self._closed:
            # Passed on to the next put, which must not block either.
            self._room.release()
            return False
        self._values.append(value)
        self._wake()
        return True

    def interrupt_with(self, interrupt: Callable[[], None] | None) -> None:
        """Register a function that makes a blocking step of the work return early.

        Args:
            interrupt: called once, from the event loop's thread, when the stream is closed; called right here if it is
                closed already. Must not block. ``None`` removes the function that was registered before.
        """
        with self._lock:
            self._interrupt = interrupt
            late = self._closed
        if late and interrupt is not None:
            interrupt()


class _Queue(Outlet[T]):
    """The whole queue: the thread's end, and the end of the event loop. The methods here are called from the latter."""

    def close(self) -> None:
        """Tell the work to stop: unblock a ``put`` that waits, and interrupt the current step if that is possible."""
        with self._lock:
            self._closed = True
            interrupt = self._interrupt
        self._room.release()
        if interrupt is not None:
            interrupt()

    def empty(self) -> bool:
        """Tell whether there is nothing to take."""
        return not self._values

    def take(self) -> T:
        """Return the oldest result. Raises ``IndexError`` if there is none."""
        value = self._values.popleft()
        self._room.release()
        return value


class ThreadStream(Generic[T]):
    """The results that ``work`` produces in a thread, as an async iterator.

    Use it as an async context manager, once, and iterate inside; every iteration is a checkpoint. Entering waits for a
    slot of ``slots``, which can be cancelled, and starts the thread. Leaving closes the stream and waits, shielded
    from cancellation, until the thread has ended, for at most 30 seconds.

    Args:
        work: called in a thread with an :class:`Outlet`. An exception that it raises is raised by the iteration, after
            the results that were put before.
        slots: bounds the number of threads. A slot is held until the thread has ended. Those that wait for one are
            served fairly between principals, on behalf of the request that the current task answers.
        name: the name of the thread, for debuggers and lists of threads.
        bound: how many results may wait in the queue.

    Raises:
        ApiError: on entering, if the system starts no further thread, or if too many wait: a 503.
        RuntimeError: on entering, if it was entered before.
    """

    def __init__(
        self,
        work: Callable[[Outlet[T]], object],
        slots: Slots,
        *,
        name: str = "engine",
        bound: int = _BOUND,
    ) -> None:
        self._work: Callable[[Outlet[T]], object] | None = work
        self._slots = slots
        self._name = name
        self._bound = bound
        self._ended = False
        self._error: BaseException | None = None
        self._parked = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> ThreadStream[T]:
        # The work may hold a whole model. Dropping the reference here frees it when the thread ends, not in a garbage
        # collection of the event loop some time later.
        work, self._work = self._work, None
        if work is None:
            raise RuntimeError("a ThreadStream can be entered only once")
        if not await self._slots.acquire(answered_request.get() or _NO_REQUEST):
            raise Overloaded("Too many requests wait for this model")
        token = trio.lowlevel.current_trio_token()

        # The run can be finished only if the thread has outlasted the stop timeout. No task waits for it then.
        def wake() -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._parked.unpark_all, idempotent=True)

        def run() -> None:
            work(self._queue)

        def deliver(result: Outcome[None]) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._end, result.error if isinstance(result, Error) else None)

        self._queue: _Queue[T] = _Queue(self._bound, wake)
        try:
            trio.lowlevel.start_thread_soon(run, deliver, name=self._name)
        except Exception as error:
            self._slots.release()
            raise_shortage(error)
            raise
        return self

    def __aiter__(self) -> ThreadStream[T]:
        return self

    async def __anext__(self) -> T:
        await trio.lowlevel.checkpoint()
        while self._queue.empty():
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._parked.park()
        return self._queue.take()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._queue.close()
        with trio.move_on_after(STOP_TIMEOUT, shield=True):
            while not self._ended:
                await self._parked.park()
        if not self._ended:
            logger.error(
                "the thread %r has not stopped within %g s; its slot stays taken until it does",
                self._name,
                STOP_TIMEOUT,
            )

    def _end(self, error: BaseException | None) -> None:
        self._ended = True
        self._error = error
        self._slots.release()
        self._parked.unpark_all()
