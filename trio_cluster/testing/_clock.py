"""Virtual time and threads: a mock clock that waits for threads.

Trio's mock clock jumps to the next deadline as soon as no task has anything to do. A task that waits for a thread has
nothing to do either, however long the thread computes; so while a handler in a thread adds two numbers, heartbeats and
timeouts would pass. Here the clock stands still while any thread of ``trio.to_thread`` is outside trio. A thread that
waits *in* trio, through ``trio.from_thread``, does not stop the clock.

The loop of asyncio handlers stops the clock while it does something, and while it waits for a timer of its own that is
due within a second of real time. While it waits for anything else, the clock goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import trio
from trio.testing import MockClock, active_thread_count

from ..core import clock as shown
from ..local.asyncio_loop import LoopRun, live_runs
from ._trio_internals import autojump_replaced, waits_for_thread

__all__ = ["threads_hold_clock", "virtual_time_shown"]

#: Real seconds between two checks whether threads still compute.
_POLL_INTERVAL: Final = 0.0002


@contextmanager
def threads_hold_clock() -> Iterator[None]:
    """Keep the mock clock of this run from jumping while a thread computes. No effect if time is real.

    Raises:
        RuntimeError: called outside a run of trio.
    """
    clock = trio.lowlevel.current_clock()
    if not isinstance(clock, MockClock):
        yield
        return
    with autojump_replaced(clock, _jump_unless_threads_compute):
        yield


def virtual_time_shown() -> AbstractContextManager[None]:
    """Have nodes of this run show virtual time: in ages, durations and stories. No effect if time is real.

    Raises:
        RuntimeError: called outside a run of trio.
    """
    clock = trio.lowlevel.current_clock()
    return shown.replaced(clock.current_time) if isinstance(clock, MockClock) else nullcontext()


def _jump_unless_threads_compute(jump: Callable[[], None]) -> Callable[[], None]:
    turns: dict[LoopRun, int] = {}

    def wait_or_jump() -> None:
        nonlocal turns
        before, turns = turns, {run: run.turns for run in live_runs()}
        # A loop that has done something since the last look may have sent trio something that has not arrived yet.
        if (
            turns != before
            or any(run.busy for run in turns)
            or (active_thread_count() and any(map(waits_for_thread, _all_tasks())))
        ):
            time.sleep(_POLL_INTERVAL)
        else:
            jump()

    return wait_or_jump


def _all_tasks() -> Iterator[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    left = [] if root is None else [root]
    while left:
        task = left.pop()
        yield task
        for nursery in task.child_nurseries:
            left += nursery.child_tasks
