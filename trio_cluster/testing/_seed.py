"""Reproducible runs: everything that is random in a test is seeded, so that a number reproduces a run.

Four things are random: trio's scheduler, which shuffles the tasks that are ready; Python's ``random``, which handlers
may use; this package, for the jitter of waits and for ids; and the test itself, if it wants to be. Seeding the
scheduler is not part of trio's public interface; see ``_trio_internals``.

Two runs with the same seed are the same if only random numbers and virtual time decide what happens: no threads, no
real sockets, no clock but trio's mock clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core import randomness
from ._trio_internals import reproducible_scheduler

__all__ = ["can_be_seeded", "seeded"]


def can_be_seeded() -> bool:
    """Return whether :func:`seeded` works with this version of trio."""
    try:
        with reproducible_scheduler():
            return True
    except RuntimeError:
        return False


@contextmanager
def seeded(seed: int) -> Iterator[random.Random]:
    """Make everything random inside the block follow from ``seed``; afterwards the former state is restored.

    It may be used around ``trio.run`` or inside it. It seeds trio's scheduler, Python's ``random``, and the jitter and
    the ids of this package.

    Args:
        seed: any whole number.

    Yields:
        A generator for the test's own decisions, seeded too. What is drawn from it does not change anything else.

    Raises:
        RuntimeError: the scheduler of this version of trio cannot be seeded. The message names trio and its version.
    """
    with reproducible_scheduler() as scheduler:
        generators: list[Any] = [scheduler, random, randomness.generator]
        states = [each.getstate() for each in generators]
        for each in generators:
            each.seed(seed)
        try:
            yield random.Random(seed)
        finally:
            for each, state in zip(generators, states, strict=True):
                each.setstate(state)
