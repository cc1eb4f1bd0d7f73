"""Everything that the kit uses of trio beyond its documented interface, in one place.

Each use states what happens if a version of trio no longer has it: seeding the scheduler raises an error, and the mock
clock loses one property, with a warning. Everything else keeps working. Tests check that the installed version of trio
has all of it (``tests/testing/test_trio_internals.py``).
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, Final

import trio
from trio.testing import MockClock

__all__ = ["autojump_replaced", "missing_internals", "reproducible_scheduler", "waits_for_thread"]

#: The scheduler's random generator, and the switch that sorts ready tasks before they are shuffled. Hypothesis and
#: pytest-trio use the same names for the same purpose.
_SCHEDULER: Final = "trio._core._run"
_GENERATOR: Final = "_r"
_SORTS_TASKS: Final = "_ALLOW_DETERMINISTIC_SCHEDULING"

#: The method of a mock clock that the run loop calls when no task has anything to do.
_AUTOJUMP: Final = "_autojump"


def missing_internals() -> list[str]:
    """Return the undocumented names that the installed version of trio does not have, as full names."""
    missing = [f"{_SCHEDULER}.{name}" for name in _missing_of_scheduler()]
    if not callable(getattr(MockClock, _AUTOJUMP, None)):
        missing.append(f"trio.testing.MockClock.{_AUTOJUMP}")
    return missing


# The scheduler


def _scheduler() -> Any:
    try:
        return importlib.import_module(_SCHEDULER)
    except ImportError:
        return None


def _missing_of_scheduler() -> list[str]:
    scheduler = _scheduler()
    found = {
        _GENERATOR: isinstance(getattr(scheduler, _GENERATOR, None), random.Random),
        _SORTS_TASKS: hasattr(scheduler, _SORTS_TASKS),
    }
    return [name for name, is_there in found.items() if not is_there]


@contextmanager
def reproducible_scheduler() -> Iterator[random.Random]:
    """Let the order in which ready tasks run depend on one random generator only.

    trio keeps ready tasks in a set, whose order depends on addresses, and shuffles them. Inside the block they are
    sorted by age before they are shuffled.

    Yields:
        The generator, to be seeded.

    Raises:
        RuntimeError: this version of trio has no such generator. The message names trio and its version.
    """
    missing = _missing_of_scheduler()
    if missing:
        raise RuntimeError(
            f"the scheduler of trio {trio.__version__} cannot be seeded: "
            f"it has no {' and no '.join(f'{_SCHEDULER}.{name}' for name in missing)}"
        )
    scheduler = _scheduler()
    sorts = getattr(scheduler, _SORTS_TASKS)
    setattr(scheduler, _SORTS_TASKS, True)
    try:
        yield getattr(scheduler, _GENERATOR)
    finally:
        setattr(scheduler, _SORTS_TASKS, sorts)


# The mock clock


@contextmanager
def autojump_replaced(
    clock: MockClock, replacement: Callable[[Callable[[], None]], Callable[[], None]]
) -> Iterator[None]:
    """Replace what a mock clock does when no task has anything to do. If it is replaced already, do nothing.

    If this version of trio has no such method, a ``RuntimeWarning`` says so, and the clock is left as it is.

    Args:
        clock: of the current run.
        replacement: is given the original function, and returns the one to call instead.
    """
    original = getattr(clock, _AUTOJUMP, None)
    if not callable(original):
        warnings.warn(
            f"trio {trio.__version__} has no trio.testing.MockClock.{_AUTOJUMP}: "
            "virtual time passes while threads compute",
            RuntimeWarning,
            stacklevel=4,
        )
        yield
    elif _AUTOJUMP in vars(clock):
        yield
    else:
        vars(clock)[_AUTOJUMP] = replacement(original)
        try:
            yield
        finally:
            del vars(clock)[_AUTOJUMP]


# Threads

#: Both functions are documented. It is not documented that the first one awaits the second one while its thread runs,
#: and awaits something else while it executes in trio what the thread has asked for.
_RUN_SYNC: Final[CodeType] = inspect.unwrap(trio.to_thread.run_sync).__code__
_WAIT: Final[CodeType] = inspect.unwrap(trio.lowlevel.wait_task_rescheduled).__code__


def waits_for_thread(task: trio.lowlevel.Task) -> bool:
    """Return whether a task waits for a thread that computes; not for one that itself waits in trio."""
    codes = [frame.f_code for frame, _ in task.iter_await_frames()]
    return (_RUN_SYNC, _WAIT) in itertools.pairwise(codes)
