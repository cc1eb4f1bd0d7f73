"""When a process that has ended is started again. Without a clock: the times are passed."""

from __future__ import annotations

from typing import Final

__all__ = ["Restarts"]

#: Seconds after which a process counts as healthy: its end is not the fault of its start.
_HEALTHY: Final = 10.0
#: Seconds until another start of one that was not: at first, and at most.
_FIRST: Final = 0.5
_LAST: Final = 30.0


class Restarts:
    """Of one process.

    Attributes:
        count: how often it was started again.
    """

    def __init__(self) -> None:
        self.count = 0
        self._pause = _FIRST

    def ended(self, lived: float) -> float:
        """Return the seconds until the process is to be started again. Synchronous.

        Args:
            lived: seconds for which it ran.
        """
        self.count += 1
        if lived >= _HEALTHY:
            self._pause = _FIRST
            return 0.0
        pause, self._pause = self._pause, min(2 * self._pause, _LAST)
        return pause
