"""The same again: whatever draws lots in a test is seeded, so that a number names a course of events.

Four things draw lots: trio's scheduler, which shuffles the tasks that are ready; Python's ``random``, which handlers
may use; this package, for the jitter of waits and for ids; and the test itself, if it wants to. Seeding the first one
is not part of trio's public interface. What is used here is what Hypothesis and pytest-trio use for the same purpose,
and whether it is there is checked when it is used.

Two runs with the same seed take the same course if nothing but lots and virtual time decides what happens: no threads,
no real sockets, no clock but trio's mock clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trio._core import _run

from ..core import randomness

__all__ = ["seeded"]

_SORTS = "_ALLOW_DETERMINISTIC_SCHEDULING"


@contextmanager
def seeded(seed: int) -> Iterator[random.Random]:
    """Make everything random inside the block follow from ``seed``; afterwards all is as it was.

    It may stand around ``trio.run`` or inside it. Seeded are trio's scheduler, Python's ``random``, and the jitter and
    the ids of this package.

    Args:
        seed: any whole number.

    Yields:
        A generator for the test's own decisions, seeded too. What it draws changes nothing for the others.

    Raises:
        RuntimeError: this version of trio has a scheduler that cannot be seeded.
    """
    scheduler = getattr(_run, "_r", None)
    if not isinstance(scheduler, random.Random) or not hasattr(_run, _SORTS):
        raise RuntimeError("the scheduler of this version of trio cannot be seeded")
    generators: list[Any] = [scheduler, random, randomness.generator]
    states = [each.getstate() for each in generators]
    sorts = getattr(_run, _SORTS)
    # A batch of tasks that are ready is in no order that could be repeated, unless it is sorted before it is shuffled.
    setattr(_run, _SORTS, True)
    for each in generators:
        each.seed(seed)
    try:
        yield random.Random(seed)
    finally:
        setattr(_run, _SORTS, sorts)
        for each, state in zip(generators, states, strict=True):
            each.setstate(state)
