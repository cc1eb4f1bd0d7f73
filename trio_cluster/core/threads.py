"""Work in threads, in a process that may not be able to start another one.

The system limits threads: for a user (``ulimit -u``), for a container (the cgroup's ``pids.max``), by memory. Python
then raises a ``RuntimeError``, in the middle of whatever wanted the thread. That is no bug, and no fault of the request
that meets it. It is an exhausted resource like any other (see ``exhaustion.py``): it costs that request, which gets
503, and nothing else. So the package starts threads only by :func:`run_in_thread` and :func:`start_thread`, or converts
the error by :func:`thread_shortage` or :func:`raise_shortage`; ``tests/core/test_run_in_thread.py`` looks for others.

Work that is short and must be done is done in the event loop then: the caller catches :class:`NoThread`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

import trio

from ..errors import ClusterError, Overloaded
from .exhaustion import ExhaustionLog, exhausted_resource

__all__ = [
    "NoThread",
    "raise_shortage",
    "run_in_thread",
    "start_in_thread",
    "start_thread",
    "thread_shortage",
]

logger = logging.getLogger("trio_cluster.node")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: For each run of trio, since each has a clock of its own.
_LOG: Final = trio.lowlevel.RunVar[ExhaustionLog | None]("trio_cluster threads", None)


class NoThread(Overloaded):
    """The system lets this process start no further thread. Nothing of the work has begun."""

    def __init__(self) -> None:
        super().__init__("This server can start no more threads at the moment; try again shortly")


def thread_shortage(error: BaseException) -> NoThread | None:
    """Return what to raise in the place of an error with which a thread could not be started, and log the shortage.

    Returns:
        ``None`` if the error is another one.
    """
    resource = exhausted_resource(error) if isinstance(error, RuntimeError) else ""
    if not resource:
        return None
    if not trio.lowlevel.in_trio_run():
        # A program that starts a server in a thread gets the error itself.
        return NoThread()
    log = _LOG.get()
    if log is None:
        log = ExhaustionLog(logger, "another thread")
        _LOG.set(log)
    log.failed(resource)
    return NoThread()


def raise_shortage(error: Exception) -> None:
    """Raise what :func:`thread_shortage` returns for an error; return if the error is another one. Synchronous.

    Raises:
        NoThread: no thread could be started.
    """
    shortage = thread_shortage(error)
    if shortage is not None:
        try:
            raise shortage from None
        finally:
            # Otherwise the error and this frame would refer to each other, and wait for the garbage collector.
            del shortage


async def run_in_thread(
    function: Callable[[*Ts], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Call a function in a thread, as ``trio.to_thread.run_sync`` does, and return what it returns. A checkpoint.

    Args:
        function: called with ``args``.
        abandon_on_cancel, limiter: as for trio.

    Raises:
        NoThread: there is no thread for it; the function was not called.
        BaseException: what the function raised.
    """
    started = False

    def run() -> T:
        nonlocal started
        started = True
        return function(*args)

    try:
        result = await trio.to_thread.run_sync(run, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    except RuntimeError as error:
        # The function may have tried to start a thread itself.
        if not started:
            raise_shortage(error)
        raise
    log = _LOG.get()
    if log is not None:
        log.succeeded()
    return result


async def start_in_thread(function: Callable[[*Ts], T], *args: *Ts, abandon_on_cancel: bool = False) -> T:
    """Do what :func:`run_in_thread` does for a node that starts, and cannot without it. A checkpoint.

    Raises:
        ClusterError: there is no thread for it; the function was not called.
        BaseException: what the function raised.
    """
    try:
        return await run_in_thread(function, *args, abandon_on_cancel=abandon_on_cancel)
    except NoThread as error:
        raise ClusterError(error.message) from error


def start_thread(function: Callable[[], object], *, name: str) -> threading.Thread:
    """Start a thread that belongs to no task, and return it. Synchronous.

    It is a daemon, so that a program which ends by an error does not wait for it. The caller sees to its end.

    Args:
        function: called in the thread; must not raise.
        name: the name of the thread, for debuggers and lists of threads.

    Raises:
        NoThread: there is no thread for it; the function was not called.
    """
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise_shortage(error)
        raise
    return thread
