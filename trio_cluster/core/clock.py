"""The clock of what is shown to people: ages, durations, and the times in the story of a request.

Deadlines do not come from here but from trio's clock, which the event loop waits with. For display that would be too
expensive: reading trio's clock takes two calls of functions in Python, this one none, and a request reads it at each of
its steps.

``trio_cluster.testing`` replaces it in a simulated cluster, so that what is shown there is virtual time, too. So it is
called as ``clock.now()``, and never imported by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["NEVER", "now", "replaced"]

#: In the place of a time: it has not happened.
NEVER: Final = -1.0

#: The time in seconds, from an arbitrary moment on.
now: Callable[[], float] = time.monotonic


@contextmanager
def replaced(by: Callable[[], float]) -> Iterator[None]:
    """Use another clock inside the block, in the whole process."""
    global now
    before, now = now, by
    try:
        yield
    finally:
        now = before
