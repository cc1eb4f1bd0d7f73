"""How well a replica does: whether it may be given new calls, and how those that it had ended."""

from __future__ import annotations

from collections import Counter

from ..core.outcome import Outcome

__all__ = ["Health"]


class Health:
    """The state of one backend, kept by whoever watches it and read by the router.

    Attributes:
        available: new calls may be opened. A plain attribute, since it is read for each replica of each request.
        draining: the backend is about to stop: it finishes what it has.
        stalled: why it can do nothing at the moment, although it is not lost; empty if it can.
        lost: why it is gone for good; ``None`` while it is not.
        outcomes: how the calls ended that it had.
        failures: calls in a row that ended because of the backend, and not because of what was asked.
    """

    __slots__ = ("available", "draining", "failures", "lost", "outcomes", "stalled")

    def __init__(self) -> None:
        self.available = True
        self.draining = False
        self.stalled = ""
        self.lost: str | None = None
        self.outcomes: Counter[Outcome] = Counter()
        self.failures = 0

    def drain(self) -> None:
        """Take note that the backend is about to stop."""
        self.draining = True
        self._update()

    def stall(self, reason: str) -> None:
        """Take note of why the backend can do nothing; empty if it can do something again."""
        self.stalled = reason
        self._update()

    def lose(self, reason: str) -> None:
        """Take note that the backend is gone."""
        self.lost = reason
        self._update()

    def record(self, outcome: Outcome) -> None:
        """Take note of how a call of this backend ended."""
        self.outcomes[outcome] += 1
        if outcome in ("worker_lost", "timed_out"):
            self.failures += 1
        elif outcome == "completed":
            self.failures = 0

    def _update(self) -> None:
        self.available = not (self.draining or self.stalled) and self.lost is None
