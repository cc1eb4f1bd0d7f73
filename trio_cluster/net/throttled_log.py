"""Log lines that any peer can cause: a few of them each second, and how many were left out.

Any client that reaches a port can make a node refuse a connection, as often as it likes. A line for each would fill the
disk, and hide the lines that matter.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import trio

__all__ = ["BURST", "LINES_PER_SECOND", "ThrottledLog"]

#: Lines in a second at most, in the long run.
LINES_PER_SECOND: Final = 5
#: Lines at once at most, after a quiet time.
BURST: Final = 20


class ThrottledLog:
    """Lines about one kind of event.

    Args:
        logger: where to.
        what: what happened, in the plural, for the line that counts those which were left out.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger = logger
        self._what = what
        self._left = float(BURST)
        self._last = trio.current_time()
        self._suppressed = 0
        self._some_suppressed = trio.lowlevel.ParkingLot()

    def warning(self, text: str, fields: dict[str, Any]) -> None:
        """Log a line, unless there were too many. Synchronous."""
        now = trio.current_time()
        self._left = min(BURST, self._left + (now - self._last) * LINES_PER_SECOND)
        self._last = now
        if self._left < 1:
            self._suppressed += 1
            self._some_suppressed.unpark_all()
            return
        self._left -= 1
        self._logger.warning("%s", text, extra={"fields": fields})

    async def run(self) -> None:
        """Once a second, log how many lines were left out, if any were, until cancelled."""
        while True:
            while not self._suppressed:
                await self._some_suppressed.park()
            await trio.sleep(1)
            count, self._suppressed = self._suppressed, 0
            self._logger.warning("%d more %s", count, self._what, extra={"fields": {"suppressed": count}})
