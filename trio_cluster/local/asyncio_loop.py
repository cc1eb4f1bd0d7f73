"""An asyncio event loop in a thread of its own, for handlers that were written for asyncio.

Theory of operation
===================

A node runs on trio. What belongs to asyncio (an engine such as vLLM's ``AsyncLLM``, a session of aiohttp, a pool of
database connections) belongs to one event loop, and works nowhere else. So all asyncio handlers of a process share one
loop, an :class:`AsyncioLoop`, which runs in one thread.

*The loop runs while it is used.* Users are the nodes that serve a handler of this loop (:class:`AsyncioLoops`), and
each call of such a handler. The first user starts the thread, and waits until the hook ``on_start`` has returned. When
the last user has left, ``on_stop`` runs, tasks that are left on the loop are cancelled and awaited, and the thread
ends; the last user waits for that, shielded from cancellation. A call is a user until its asyncio task has ended, so
``on_stop`` runs after the last handler, and no thread outlives its node. Each start makes a new loop and a new thread.

*From trio to asyncio* everything goes through :meth:`LoopRun.post`, in order. *From asyncio to trio* everything goes
through the token of the trio run that waits; several nodes in one process may share a loop.

*If the loop ends by itself*, because something on it raised ``SystemExit``, every task that was running there is over;
:meth:`LoopRun.on_end` tells their calls. The next user starts the loop again.

*The length of a turn.* The loop's selector notes when it waits. What it does between two waits is a turn, as it is for
trio's loop in ``net/watchdog.py``, and a turn that is too long is a block: the node logs what blocks the loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import selectors
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Final, TypeAlias, TypeVarTuple
from weakref import WeakSet

import trio

from ..core.threads import NoThread, start_thread
from ..errors import ClusterError
from ..net.watchdog import blocking_frame

__all__ = ["AsyncioLoop", "AsyncioLoops", "LoopRun", "live_runs"]

logger = logging.getLogger("trio_cluster.handlers")

Ts = TypeVarTuple("Ts")

#: A coroutine function without arguments.
Hook: TypeAlias = Callable[[], Awaitable[object]]

#: How often a node looks whether a loop is blocked, in an interval between two heartbeats.
_LOOKS: Final = 4

#: Seconds within which a timer is due that a mock clock waits for.
_SOON: Final = 1.0


class AsyncioLoop:
    """An asyncio event loop for handlers, with hooks that run in it. See :func:`from_asyncio`.

    The loop has a thread of its own, from the start of the first server that serves one of its handlers to the end of
    the last one. A server accepts requests, and a worker announces its models, when ``on_start`` has returned. A model
    that is registered while the server runs has its loop started then. A server that is started again starts the loop
    again.

    Both hooks run in one and the same task, so what was entered by the first may be left by the second.

    Args:
        on_start: a coroutine function without arguments: opens what the handlers use. If it raises, the server does not
            start.
        on_stop: a coroutine function without arguments: closes it again. Runs when the last handler has ended, and not
            if ``on_start`` has raised. What it raises is logged. When it has returned, tasks that are left on the loop
            are cancelled and awaited, as by ``asyncio.run``.
        loop_factory: makes the loop, ``uvloop.new_event_loop`` for instance; ``None``: asyncio's own. The log names
            what blocks the loop only for asyncio's own.

    Raises:
        TypeError: a hook cannot be called.
    """

    def __init__(
        self,
        on_start: Hook | None = None,
        on_stop: Hook | None = None,
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> None:
        for hook in (on_start, on_stop, loop_factory):
            if hook is not None and not callable(hook):
                raise TypeError(f"a hook must be a function, not {hook!r}")
        self._on_start = on_start
        self._on_stop = on_stop
        self._loop_factory = loop_factory
        # Protects what several trio runs may change: the current run of the loop, and the number of its users.
        self._lock = threading.Lock()
        self._run: LoopRun | None = None

    @property
    def running(self) -> LoopRun | None:
        """The run of the loop at this moment; ``None`` if there is none, or if it is over."""
        run = self._run
        return None if run is None or run.ended else run

    async def acquire(self) -> LoopRun:
        """Become a user of the loop, and wait until it runs. A checkpoint only if it does not run yet.

        Returns:
            The run of the loop, to be given back by :meth:`release`.

        Raises:
            NoThread: the system starts no further thread.
            BaseException: what ``on_start`` raised.
        """
        while True:
            with self._lock:
                run = self._run
                begins = run is None or run.ended
                if run is None or run.ended:
                    run = self._run = LoopRun(self._on_start, self._on_stop, self._loop_factory)
                if not (run.stopping or run.closing):
                    run.users += 1
                    break
            await run.wait_ended()
        if run.started:
            return run
        try:
            if begins:
                run.start()
            await run.wait_started()
        except BaseException:
            await self.release(run)  # noqa: ASYNC102  (it shields itself)
            raise
        return run

    async def release(self, run: LoopRun) -> None:
        """Be a user no longer. The last one stops the loop, and waits for its thread, shielded from cancellation."""
        with self._lock:
            run.users -= 1
            if run.users:
                return
            run.stopping = True
        run.stop()
        with trio.CancelScope(shield=True):
            await run.wait_ended()
        with self._lock:
            if self._run is run:
                self._run = None


class LoopRun:
    """One run of a loop, in one thread.

    Args:
        on_start, on_stop, loop_factory: see :class:`AsyncioLoop`.

    Attributes:
        users: how many there are; changed by :class:`AsyncioLoop`, under its lock.
        stopping: the last user has left; changed in the same way.
        started: ``on_start`` has returned.
        closing: nothing new can run on the loop; what was left there is cancelled and awaited.
        ended: the thread does nothing more.
        turns: how often the loop has waited for something.
    """

    def __init__(
        self,
        on_start: Hook | None,
        on_stop: Hook | None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None,
    ) -> None:
        self.users = 0
        self.stopping = False
        self.started = False
        self.closing = False
        self.ended = False
        self._on_start = on_start
        self._on_stop = on_stop
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._selector: _NotingSelector | None = None
        if loop_factory is None and sys.platform != "win32":
            loop_factory = self._make_loop
        self._loop_factory = loop_factory
        # Protects what the thread and its users both change: the lists, the loop, and the three flags above.
        self._lock = threading.Lock()
        self._waiting: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []
        self._on_end: set[Callable[[], None]] = set()
        self._posted = 0
        self._handled = 0

    # The side of the users, in trio

    def start(self) -> None:
        """Start the thread. Synchronous.

        Raises:
            NoThread: the system starts no further thread; the run is over.
        """
        _live.add(self)
        try:
            self._thread = start_thread(self._run, name="trio_cluster asyncio")
        except NoThread as error:
            self._error = error
            self._finish()
            raise

    def stop(self) -> None:
        """Let the run end. What is running in ``on_start`` is cancelled. Synchronous, idempotent."""
        with self._lock:
            # Before the loop has begun to run, its main task finds that it has to stop.
            if self._main is not None:
                self._call_soon(self._on_stop_request)

    def post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call a function in the loop, soon, in a copy of the current context.

        Synchronous, from any thread. Without effect if the loop has ended.
        """
        with self._lock:
            if self._loop is not None and not self.ended:
                self._posted += 1
                self._call_soon(self._handle, function, args)

    def on_end(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have a function called, in the thread, if the loop ends before that is taken back. Synchronous.

        Args:
            callback: must not raise. It is called in the thread of the loop, or here if the loop has ended already.

        Returns:
            A function that takes it back; idempotent.
        """
        with self._lock:
            late = self.ended
            if not late:
                self._on_end.add(callback)
        if late:
            callback()
        return lambda: self._on_end.discard(callback)

    async def wait_started(self) -> None:
        """Wait until ``on_start`` has returned. A checkpoint, if that is not yet so.

        Raises:
            BaseException: what ``on_start`` raised.
        """
        while not (self.started or self.ended):
            await self._wait(lambda: self.started or self.ended)
        if not self.started:
            raise self._error or RuntimeError("the asyncio loop has ended while it was starting")

    async def wait_ended(self) -> None:
        """Wait until the thread has ended. A checkpoint, if that is not yet so."""
        while not self.ended:
            await self._wait(lambda: self.ended)
        if self._thread is not None:
            # It has nothing left to do but to end, so this does not block.
            self._thread.join()

    async def _wait(self, over: Callable[[], bool]) -> None:
        """Wait for the next change of a flag, unless it has changed as ``over`` says."""
        event = trio.Event()
        with self._lock:
            if over():
                return
            self._waiting.append((trio.lowlevel.current_trio_token(), event))
        await event.wait()

    @property
    def busy(self) -> bool:
        """Whether the loop does something at this moment, or will within a second, unless it waits for IO only."""
        starts_or_stops = not self.started or self.stopping
        waits = self._selector is None or self._selector.waits
        return not self.ended and (starts_or_stops or self._posted != self._handled or not waits)

    @property
    def turns(self) -> int:
        """How often the loop has waited for something; 0 if it is not known."""
        return 0 if self._selector is None else self._selector.turns

    def turn_began(self) -> float | None:
        """Return when the turn of the loop began, on the monotonic clock; ``None`` if it waits, or if unknown."""
        return None if self._selector is None or self.ended else self._selector.since

    def blocked_by(self) -> str:
        """Say for people what the loop is doing at this moment; see ``blocking_frame``."""
        ident = None if self._thread is None else self._thread.ident
        return "" if ident is None else blocking_frame(ident)

    # The side of the loop, in its thread

    def _make_loop(self) -> asyncio.AbstractEventLoop:
        self._selector = _NotingSelector()
        return asyncio.SelectorEventLoop(self._selector)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                try:
                    runner.run(self._serve())
                finally:
                    self.closing = True
        except BaseException as error:  # noqa: ASYNC103
            # Whatever it is, it ends with this thread. `SystemExit` of a callback comes this way, too.
            self._error = error
            if self.started:
                logger.error("the asyncio loop has ended unexpectedly", exc_info=error)
        finally:
            self._finish()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        with self._lock:
            self._loop = asyncio.get_running_loop()
            self._main = asyncio.current_task()
        if self.stopping:
            return
        if self._on_start is not None:
            await self._on_start()
        with self._lock:
            self.started = True
        self._wake()
        await self._stop.wait()
        if self._on_stop is not None:
            try:
                await self._on_stop()
            except Exception:
                logger.exception("the hook on_stop of the asyncio loop failed")

    def _on_stop_request(self) -> None:
        assert self._stop is not None
        assert self._main is not None
        self._stop.set()
        if not self.started:
            self._main.cancel()

    def _handle(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._handled += 1
        function(*args)

    def _call_soon(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Call a function in the loop. To be called with the lock held."""
        assert self._loop is not None
        # The loop may have been closed, by its thread's end, which is not yet known here.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for token, event in waiting:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(event.set)

    def _finish(self) -> None:
        with self._lock:
            self.ended = True
            callbacks, self._on_end = self._on_end, set()
        for callback in callbacks:
            callback()
        _live.discard(self)
        self._wake()


class _NotingSelector(selectors.DefaultSelector):
    """A selector that notes when its loop waits.

    Attributes:
        waits: the loop waits, for IO or for a timer that is more than a second away.
        since: when the turn began, on the monotonic clock; ``None`` while the loop waits.
        turns: how often the loop has waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = False
        self.since: float | None = None
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.since = None
        self.turns += 1
        # With a timeout of 0, the loop only looks for IO, since it has something to do.
        self.waits = timeout is None or timeout > _SOON
        try:
            ready: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
            return ready
        finally:
            self.waits = False
            self.since = time.monotonic()


_live: Final[WeakSet[LoopRun]] = WeakSet()


def live_runs() -> list[LoopRun]:
    """Return the runs of all loops of this process that have begun and not ended. Synchronous."""
    return list(_live)


class AsyncioLoops:
    """The loops that the handlers of one server use."""

    def __init__(self) -> None:
        # A dict for its order. The value tells whether the server has started the loop, or has tried to.
        self._loops: dict[AsyncioLoop, bool] = {}
        self._added: trio.Event | None = None

    def add(self, loop: AsyncioLoop) -> None:
        """Let a loop run while the server runs; if the server runs already, from now on. Synchronous, idempotent."""
        self._loops.setdefault(loop, False)
        if self._added is not None:
            self._added.set()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Run the loops during the ``async with`` block. Both ends are checkpoints only if there are loops.

        Raises:
            ClusterError: a loop could not be started. The message says why.
        """
        async with AsyncExitStack() as held:
            try:
                for loop in list(self._loops):
                    self._loops[loop] = True
                    await _hold(loop, held)
                yield
            finally:
                self._loops = dict.fromkeys(self._loops, False)

    async def watch(self, every: float) -> None:
        """Start loops that are added from now on, and log when one is blocked, until cancelled.

        Args:
            every: seconds after which a turn of a loop is called a block.
        """
        blocked: dict[LoopRun, float] = {}
        async with AsyncExitStack() as held:
            try:
                while True:
                    self._added = trio.Event()
                    for loop in [each for each, started in self._loops.items() if not started]:
                        self._loops[loop] = True
                        try:
                            await _hold(loop, held)
                        except ClusterError as error:
                            # The next call for one of its handlers tries again, and fails with the error.
                            logger.error("%s", error)
                    for loop in self._loops:
                        if loop.running is not None:
                            _look(loop.running, every, blocked)
                    with trio.move_on_after(every / _LOOKS if self._loops else math.inf):
                        await self._added.wait()
            finally:
                self._added = None


async def _hold(loop: AsyncioLoop, held: AsyncExitStack) -> None:
    """Use a loop until the stack is closed."""
    try:
        run = await loop.acquire()
    except NoThread as error:
        raise ClusterError(error.message) from error
    except Exception as error:
        raise ClusterError(
            f"the hook on_start of an asyncio loop failed: {type(error).__name__}: {error}"
        ) from error
    held.push_async_callback(loop.release, run)


def _look(run: LoopRun, every: float, blocked: dict[LoopRun, float]) -> None:
    """Log if a loop is blocked, or runs again; ``blocked`` has when the turns began that were logged."""
    since, now = run.turn_began(), time.monotonic()
    logged = blocked.get(run)
    if logged is not None and since != logged:
        del blocked[run]
        logger.warning(
            "the asyncio loop runs again", extra={"fields": {"blocked_for": round(now - logged, 3)}}
        )
    if since is not None and since != logged and now - since >= every:
        blocked[run] = since
        fields = {"blocked_for": round(now - since, 3)}
        logger.warning("the asyncio loop is blocked: %s", run.blocked_by(), extra={"fields": fields})
