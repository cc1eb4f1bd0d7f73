"""Statistics of a node's calls: how many there were, how they ended, and how long cancellations took.

Every call that was opened is counted once as admitted and, when its work has really stopped, once under its outcome. So
at every instant

    admitted = completed + cancelled + timed_out + worker_lost + failed + in flight
"""

from __future__ import annotations

from bisect import bisect_left
from typing import ClassVar

import attrs

from . import clock
from .call import Call
from .observer import Observer
from .outcome import Outcome

__all__ = ["CallStats", "Histogram"]


@attrs.define
class Histogram:
    """A histogram of durations."""

    BOUNDS: ClassVar = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
    """The upper bounds of the buckets, in seconds. One more bucket counts durations above the last bound."""

    counts: list[int] = attrs.field(factory=lambda: [0] * (len(Histogram.BOUNDS) + 1))
    total: float = 0.0
    """The sum of all durations, in seconds."""

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.total += seconds


@attrs.define(eq=False)
class CallStats(Observer):
    """The counters of a node's calls. The equation at the top of this module holds between them."""

    admitted: int = 0
    completed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    worker_lost: int = 0
    failed: int = 0
    retried: int = 0
    """Calls that were opened a second time, on another replica; both are counted as admitted."""
    cancel_durations: Histogram = attrs.field(factory=Histogram)
    """The time from cancelling a call until its work has really stopped, on whichever node it runs."""

    def counters(self) -> dict[str, int]:
        """Return the counters by name."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def on_routed(self, call: Call, why: str) -> None:
        """See ``Observer``."""
        self.admitted += 1

    def on_retried(self, lost: Call, again: Call) -> None:
        """See ``Observer``."""
        self.retried += 1

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """See ``Observer``."""
        setattr(self, outcome, getattr(self, outcome) + 1)
        if call.cancelled is not None:
            self.cancel_durations.add(clock.now() - call.cancelled_at)


_COUNTERS = tuple(field.name for field in attrs.fields(CallStats) if field.name != "cancel_durations")
