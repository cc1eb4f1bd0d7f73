"""How fast a replica has been, and how much it still has to do. Values with explicit time, in seconds.

Two things are measured for each replica of each model: seconds per byte of a prompt that it has read, and seconds per
token that it has said. Both are throughputs: what a replica does at once counts as done in turn, so that the figures of
a server that batches and those of one that does not can be compared, and add up.

The work that a backend has left is kept like the level of a tank. A call adds its share when it is opened; while there
are calls, one second drains one second; and when a call has read its prompt or has ended, nothing of that part is left.
So no call is looked at when a request is routed, however many there are.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Rate", "Workload"]

#: What counts of the samples before the last one: about the last ten count.
_KEEP: Final = 0.9
#: Seconds without a sample after which only half of what a replica has shown is believed, and for the other half, it is
#: taken for an average one. Otherwise one slow answer could keep it from all others, and so from showing better.
_HALF_LIFE: Final = 60.0
#: The share of its open work that a backend is believed to have left at least: what takes longer than expected is not
#: finished.
_LEAST_LEFT: Final = 0.1


class Rate:
    """Seconds per unit, as the recent samples have it.

    Attributes:
        at: the time of the last sample; negative if there was none.
    """

    __slots__ = ("_seconds", "_units", "at")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._units = 0.0
        self.at = -1.0

    def add(self, seconds: float, units: float, now: float) -> None:
        """Add a sample: so many units took so long."""
        self._seconds = self._seconds * _KEEP + seconds
        self._units = self._units * _KEEP + units
        self.at = now

    @property
    def per_second(self) -> float | None:
        """Units per second of the last samples, however old they are; ``None``: there was none. For display."""
        return self._units / self._seconds if self._seconds and self._units else None

    def value(self, now: float, usual: float) -> float:
        """Return seconds per unit.

        Args:
            now: the time.
            usual: what holds if nothing is known of this replica, or nothing recent.
        """
        if self.at < 0 or not self._units:
            return usual
        own = self._seconds / self._units
        age = now - self.at
        return own if age <= 1.0 else usual + (own - usual) * 0.5 ** (age / _HALF_LIFE)


class Workload:
    """The seconds of work that a backend has left.

    Attributes:
        calls: how many calls it has.
        last_end: when a call ended last; negative if none has.
    """

    __slots__ = ("_at", "_left", "_open", "calls", "last_end")

    def __init__(self) -> None:
        self.calls = 0
        self.last_end = -1.0
        self._open = 0.0
        self._left = 0.0
        self._at = 0.0

    def left(self, now: float) -> float:
        """Return the seconds that are left."""
        left = self._left - (now - self._at)
        least = _LEAST_LEFT * self._open
        return left if left > least else least

    def begin(self, seconds: float, now: float) -> None:
        """Record a new call with so much work."""
        self._left = self.left(now) + seconds
        self._at = now
        self._open += seconds
        self.calls += 1

    def finish(self, seconds: float, now: float, *, ended: bool = False) -> None:
        """Record that a part of a call's work is over, or the rest of it and the call."""
        if ended:
            self.calls -= 1
            self.last_end = now
        # Exactly zero where nothing is left: sums of floats are not.
        self._open = max(0.0, self._open - seconds) if self.calls else 0.0
        self._left = min(self.left(now), self._open)
        self._at = now
