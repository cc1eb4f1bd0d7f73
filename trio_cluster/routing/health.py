"""The health of a replica: whether it may be given new calls, and how its calls ended."""

from __future__ import annotations

from collections import Counter

from ..core.outcome import Outcome

__all__ = ["Health"]


class Health:
    """The health of one backend. The owner of the backend updates it, and the router reads it.

    Attributes:
        available: new calls may be opened. An attribute and not a property, since it is read for each replica of each
            request.
        draining: the backend takes no new calls, finishes those that it has, and stops.
        stalled: why the backend cannot do anything at the moment, although it is connected; empty if it can.
        suspended: the connection to the backend was cut, and may be resumed.
        lost: why the connection to the backend was lost, for good; ``None`` while it was not.
        outcomes: how many of its calls ended with each outcome.
        failures: how many calls in a row failed because of the backend (lost or timed out). A completed call resets it.
    """

    __slots__ = ("available", "draining", "failures", "lost", "outcomes", "stalled", "suspended")

    def __init__(self) -> None:
        self.available = True
        self.draining = False
        self.stalled = ""
        self.suspended = False
        self.lost: str | None = None
        self.outcomes: Counter[Outcome] = Counter()
        self.failures = 0

    def drain(self) -> None:
        """Record that the backend is about to stop."""
        self.draining = True
        self._update()

    def stall(self, reason: str) -> None:
        """Record why the backend cannot do anything at the moment; empty: it can again."""
        self.stalled = reason
        self._update()

    def suspend(self, suspended: bool) -> None:
        """Record that the connection was cut, or resumed."""
        self.suspended = suspended
        self._update()

    def lose(self, reason: str) -> None:
        """Record that the connection to the backend was lost."""
        self.lost = reason
        self._update()

    def record(self, outcome: Outcome) -> None:
        """Record the outcome of a call of this backend."""
        self.outcomes[outcome] += 1
        if outcome in ("worker_lost", "timed_out"):
            self.failures += 1
        elif outcome == "completed":
            self.failures = 0

    def _update(self) -> None:
        self.available = not (self.draining or self.stalled or self.suspended) and self.lost is None
