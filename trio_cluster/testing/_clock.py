"""Virtual time and threads: a clock that waits for them.

Trio's mock clock jumps to the next deadline as soon as no task has anything to do. A task that waits for a thread has
nothing to do either, however hard the thread works; so a handler in a thread would see heartbeats, timeouts and the end
of the world go by while it adds two numbers. Here the clock stays where it is for as long as any thread of
``trio.to_thread`` is outside of trio. One that waits *in* trio, through ``trio.from_thread``, holds nothing up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio
from trio.testing import MockClock, active_thread_count

__all__ = ["threads_hold_clock"]

#: Real seconds between two looks at the threads.
_LOOK_EVERY = 0.0002


@contextmanager
def threads_hold_clock() -> Iterator[None]:
    """Keep the mock clock of this run from jumping while a thread computes; nothing, where time is real."""
    clock = trio.lowlevel.current_clock()
    if not isinstance(clock, MockClock) or "_autojump" in vars(clock):
        yield
        return
    jump: Any = clock._autojump

    def jump_unless_threads_compute() -> None:
        if active_thread_count() and any(map(_waits_for_thread, _tasks())):
            time.sleep(_LOOK_EVERY)
        else:
            jump()

    vars(clock)["_autojump"] = jump_unless_threads_compute
    try:
        yield
    finally:
        del vars(clock)["_autojump"]


def _tasks() -> Iterator[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    left = [] if root is None else [root]
    while left:
        task = left.pop()
        yield task
        for nursery in task.child_nurseries:
            left += nursery.child_tasks


def _waits_for_thread(task: trio.lowlevel.Task) -> bool:
    """Tell a task whose thread is out from one that is doing in trio what its thread has asked for."""
    codes = [frame.f_code for frame, _ in task.iter_await_frames()]
    return any(
        code.co_name == "to_thread_run_sync" and within.co_name == "wait_task_rescheduled"
        for code, within in itertools.pairwise(codes)
    )
