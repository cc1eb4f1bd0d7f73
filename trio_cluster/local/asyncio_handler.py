"""Handlers that were written for asyncio, made into handlers like every other.

Theory of operation
===================

:func:`from_asyncio` makes a trio handler, of the shape that pushes. For each call, it starts one asyncio task on an
:class:`~trio_cluster.local.asyncio_loop.AsyncioLoop`, and relays what that task gives to the provider of the call. The
task runs in a copy of the call's context, so the request's id is in every log line.

*Hand-over.* The asyncio task appends its output to a queue, and wakes the trio task, unless that is awake: a wake-up
costs much more than a token, so tokens that come faster than they are relayed share one. When a few small pieces wait,
or a large one, the asyncio task waits until all that it handed over has been pushed. So the generator is not advanced
while the client is slow (backpressure), and runs ahead of it by a few tokens at most.

*Cancellation from trio.* The asyncio task is cancelled, with ``task.cancel()``, and the call waits for its end, however
long that takes, shielded from cancellation. Only then is the slot free. An asyncio task sees a cancellation once, not
at every ``await`` as a trio task does, and its cleanup may await. So the cancellation is not repeated at once. It is
repeated where the handler certainly goes on as if there were none, that is, where it gives more output; and every
``CANCEL_AGAIN`` seconds, which bounds how long a task that swallows it can go on.

*Cancellation from asyncio.* If the task ends by a ``CancelledError`` that this module did not cause, the answer is not
complete. That is an error of the handler, like any other exception.

*Failures of the relay*, such as output that the model's kind cannot have, cancel the task as well. The call fails with
the original error.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from typing import Any, Final

import trio

from ..net.watchdog import is_users_code, place_of
from .adapters import Adapter, Handler, Provider, adapt, is_async
from .asyncio_loop import AsyncioLoop, LoopRun

__all__ = ["CANCEL_AGAIN", "LARGE_PIECE", "AsyncioHandler", "Relay", "from_asyncio"]

logger = logging.getLogger("trio_cluster.handlers")

#: Seconds after which a task that was cancelled, and still runs, is cancelled again.
CANCEL_AGAIN: Final = 10.0

#: How many pieces of output an asyncio task may be ahead of what was pushed, and of which length a single piece is
#: large: then the task waits until the piece was pushed.
_AHEAD: Final = 16
LARGE_PIECE: Final = 4096

#: Stands in the queue for the end of the output.
_END: Final = object()

#: The loop of handlers for which no other one was given.
_DEFAULT_LOOP: Final = AsyncioLoop()


def from_asyncio(handler: Handler, loop: AsyncioLoop | None = None) -> AsyncioHandler:
    """Make a handler that was written for asyncio into one that can be registered like every other.

    The handler runs as an asyncio task, on one event loop for all such handlers of the process, in a thread of its own.
    When its call is cancelled, the task is cancelled, and the slot is free when the task has really ended. Output waits
    while the client is slow.

    Args:
        handler: an async generator function, a coroutine function that returns the whole output, or one that takes
            ``(request, provider)`` and pushes with ``await provider.push(piece)``. For ``register_raw``, a coroutine
            function that gets an ``AsyncioRawCall``.
        loop: the loop to run on; ``None``: one that all handlers without a loop of their own share.

    Returns:
        The handler to register.

    Raises:
        TypeError: the handler has none of these shapes, or the loop is not an :class:`AsyncioLoop`.
    """
    return AsyncioHandler(handler, _DEFAULT_LOOP if loop is None else loop)


class AsyncioHandler:
    """What :func:`from_asyncio` returns: a handler for trio, of the shape ``async def h(request, provider)``.

    Args:
        handler, loop: see :func:`from_asyncio`.

    Attributes:
        handler, loop: as given.
    """

    def __init__(self, handler: Handler, loop: AsyncioLoop) -> None:
        if not isinstance(loop, AsyncioLoop):
            raise TypeError(f"the loop must be an AsyncioLoop, not {loop!r}")
        self._adapter = adapt(handler)
        if not is_async(handler):
            raise TypeError(
                f"from_asyncio needs an async function, not {handler!r}; a plain function is registered as it is, and "
                "runs in a thread"
            )
        self.handler = handler
        self.loop = loop

    async def __call__(self, request: Any, provider: Provider) -> None:
        """Run the handler for one request; see ``Provider`` for what it may push. A checkpoint."""
        run = await self.loop.acquire()
        try:
            await Relay(run, self._adapter, request).run(provider)
        finally:
            await self.loop.release(run)  # noqa: ASYNC102  (it shields itself)


class Relay:
    """One asyncio task that runs a handler, and the relay of its output to trio.

    Also the provider of the handler, in asyncio: :meth:`push` and :meth:`end`.

    Args:
        run: the loop, which must run for as long as the relay does.
        adapter: runs the handler, given a request and a provider; awaits nothing of its own.
        request: the request.

    Attributes:
        cancelled: the task was cancelled, or will be in this turn of the loop.
    """

    def __init__(self, run: LoopRun, adapter: Adapter, request: Any) -> None:
        self._loop = run
        self._adapter = adapter
        self._request = request
        self._token = trio.lowlevel.current_trio_token()
        # What was handed over, and has not been pushed yet; the piece that is being pushed is the first one.
        self._values: deque[object] = deque()
        # Whether the trio task will look at the queue again without being woken. Each side writes it, and looks at
        # the queue, or puts something into it, in the opposite order: so no piece is left lying.
        self._awake = True
        self._parked = trio.lowlevel.ParkingLot()
        self._task: asyncio.Task[None] | None = None
        self._has_ended = False
        self._error: BaseException | None = None
        self.cancelled = False
        # Only used in asyncio: the output was ended, pieces in this turn, and what a push waits for.
        self._output_ended = False
        self._in_turn = 0
        self._room: asyncio.Future[None] | None = None

    # In trio

    async def run(self, provider: Provider) -> None:
        """Run the handler, and push what it gives. A checkpoint.

        Raises:
            BaseException: what the handler raised, or ``provider.push``.
        """
        take_back = self._loop.on_end(self._lost)
        try:
            self._loop.post(self._start)
            try:
                await self._push_all(provider)
            except BaseException as error:
                await self._stop()  # noqa: ASYNC102  (it shields itself, and repeats the cancellation)
                if isinstance(error, trio.Cancelled) and isinstance(self._error, Exception):
                    raise self._take_error() from error  # noqa: ASYNC104  (the handler has failed)
                raise
        finally:
            take_back()
        if self._error is not None:
            raise self._take_error()

    async def _push_all(self, provider: Provider) -> None:
        values = self._values
        while True:
            while values:
                value = values[0]
                if value is _END:
                    provider.end()
                else:
                    await provider.push(value)
                # Not before it was pushed: an empty queue means that there is room.
                values.popleft()
            room, self._room = self._room, None
            if room is not None:
                self._loop.post(_release, room)
            if self._has_ended and not values:
                return
            self._awake = False
            if not values and not self._has_ended:
                await self._parked.park()
            self._awake = True

    async def _stop(self) -> None:
        """Cancel the task, and wait until it has ended."""
        with trio.CancelScope(shield=True):
            while not self._has_ended:
                self._loop.post(self._cancel_task)
                with trio.move_on_after(CANCEL_AGAIN):
                    await self._wait_ended()
                if not self._has_ended:
                    logger.warning(
                        "the asyncio handler of '%s' still runs %g s after it was cancelled%s; it is cancelled again",
                        getattr(self._request, "model", ""),
                        CANCEL_AGAIN,
                        self._place(),
                    )

    async def _wait_ended(self) -> None:
        self._awake = False
        while not self._has_ended:
            await self._parked.park()
            self._awake = False

    def _place(self) -> str:
        """Say for people where the task waits; empty if it is in an async generator, which cannot be looked into."""
        waits: Any = None if self._task is None else self._task.get_coro()
        frame = None
        while waits is not None and (inner := getattr(waits, "cr_frame", None)) is not None:
            if is_users_code(inner.f_code.co_filename):
                frame = inner
            waits = waits.cr_await
        return "" if frame is None else f" ({place_of(frame)})"

    def _take_error(self) -> BaseException:
        """Return the error of the task to be raised, and forget it: it refers to this object by its traceback."""
        error, self._error = self._error, None
        assert error is not None
        return error

    def _wake(self) -> None:
        self._parked.unpark_all()

    # In asyncio

    async def push(self, chunk: object, *, large: bool = False) -> None:
        """See ``Provider``. It may return before the piece has been pushed, unless that is ``large``."""
        if self.cancelled:
            raise asyncio.CancelledError
        if self._output_ended:
            raise trio.ClosedResourceError("the output has been ended")
        self.hand_over(chunk)
        large = large or (isinstance(chunk, (str, bytes, bytearray, list)) and len(chunk) > LARGE_PIECE)
        self._in_turn += 1
        if large or len(self._values) >= _AHEAD:
            self._room = room = asyncio.get_running_loop().create_future()
            # The queue may have become empty before there was something to release.
            if self._values:
                await room
            self._room = None
        elif self._in_turn >= _AHEAD:
            # A generator that never waits would keep all other tasks from running.
            await asyncio.sleep(0)
        else:
            return
        self._in_turn = 0

    def end(self) -> None:
        """See ``Provider``."""
        if not self._output_ended:
            self._output_ended = True
            self.hand_over(_END)

    def hand_over(self, value: object) -> None:
        """Let the trio task push a value, and do not wait for anything. Synchronous."""
        self._values.append(value)
        self._notify()

    def _notify(self) -> None:
        if not self._awake:
            self._awake = True
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake)

    def _start(self) -> None:
        if self._loop.closing:
            # The task would not be run to its end. `_lost` ends the relay.
            return
        # In a copy of the context of the trio task: `post` has called this function in one.
        self._task = asyncio.get_running_loop().create_task(self._work())
        self._task.add_done_callback(self._done)

    async def _work(self) -> None:
        # The log names it if this handler blocks the loop; see `blocking_frame`.
        __traceback_info__ = f"handler of '{getattr(self._request, 'model', '')}'"
        try:
            await self._adapter(self._request, self)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            # Not raised: asyncio would end the loop for SystemExit.
            self._error = error

    def _cancel_task(self) -> None:
        # Set here, where the task does not run. A push that raised before its task is cancelled would have the handler
        # begin its cleanup, which the cancellation would then interrupt.
        self.cancelled = True
        if self._task is not None:
            self._task.cancel("the request was cancelled")

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() and not self.cancelled:
            self._error = RuntimeError(
                "the asyncio task of the handler was cancelled, but its request was not"
            )
        self._end_task()

    def _lost(self) -> None:
        """Take note that the loop has ended; nothing runs on it any more."""
        if not self._has_ended:
            self._error = RuntimeError("the asyncio loop has ended before its handler")
            self._end_task()

    def _end_task(self) -> None:
        self._has_ended = True
        self._notify()


def _release(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
