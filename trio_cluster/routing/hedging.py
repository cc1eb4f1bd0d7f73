"""Hedging: a second attempt on another replica for a request whose first one is late.

Late is later than 95 of 100 recent answers of the model began. That is measured for each model; before there are
:data:`ENOUGH` answers nothing is late. Second attempts have a budget: each request to such a model saves 5 % of one,
and a few can be saved up. So a cluster that is slow as a whole gets 5 % more requests from that, and not twice as many.

What is decided here needs no tasks and no clock. ``gateway/hedge.py`` waits, and opens the second attempt.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import attrs

__all__ = ["BUDGET", "ENOUGH", "MARGIN", "Hedging"]

#: Second attempts for each request, and how many can be saved up.
BUDGET: Final = 0.05
_SAVED: Final = 5.0
#: Answers of a model that must have been seen, and how many are remembered.
ENOUGH: Final = 20
_REMEMBERED: Final = 200
#: What is late is later than that by a tenth: where all answers take about the same time, half of them would be late.
MARGIN: Final = 1.1
#: Answers after which it is calculated anew what is late.
_PAUSE: Final = 10
#: Models that are remembered; the one that was seen first makes room.
_MODELS: Final = 1000


@attrs.define
class _Recent:
    durations: deque[float] = attrs.field(factory=lambda: deque(maxlen=_REMEMBERED))
    late: float | None = None
    since: int = 0
    budget: float = 0.0


class Hedging:
    """What one node knows of the models whose requests are hedged.

    Attributes:
        sent: how many second attempts there were.
        won: how many of them have answered first.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.won = 0
        self._models: dict[str, _Recent] = {}

    def late_after(self, model: str) -> float | None:
        """Count a request to a model. Synchronous.

        Returns:
            The seconds after which its answer is late; ``None`` if that is not known.
        """
        recent = self._models.get(model)
        if recent is None:
            if len(self._models) >= _MODELS:
                del self._models[next(iter(self._models))]
            recent = self._models[model] = _Recent()
        recent.budget = min(_SAVED, recent.budget + BUDGET)
        return recent.late

    def record(self, model: str, seconds: float) -> None:
        """Record how long a first attempt took to its answer. Synchronous."""
        recent = self._models.get(model)
        if recent is None:
            return
        recent.durations.append(seconds)
        recent.since += 1
        known = len(recent.durations)
        if known >= ENOUGH and (recent.late is None or recent.since >= _PAUSE):
            recent.since = 0
            recent.late = MARGIN * sorted(recent.durations)[(known * 95 - 1) // 100]

    def allows(self, model: str) -> bool:
        """Tell whether there is a second attempt left in the budget. Synchronous."""
        recent = self._models.get(model)
        # Sums of twentieths are not exact.
        return recent is not None and recent.budget >= 1 - 1e-9

    def spend(self, model: str) -> None:
        """Record that a second attempt was opened. Synchronous."""
        self.sent += 1
        recent = self._models.get(model)
        if recent is not None:
            recent.budget -= 1
