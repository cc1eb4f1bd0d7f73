"""How long connections may be idle.

Between two requests a connection waits for the next one, and is closed if that does not come in time. To have a
deadline for each of these waits would mean to sort it into the event loop's deadlines and out of them again for each
request, and nearly none of them ever passes. But all waits are equally long, so those that began first end first: they
are kept in the order in which they began, and one task for all connections sleeps until the first of them would be too
long. When it wakes, that one is mostly over, and it looks at what has become the first.
"""

from __future__ import annotations

import logging
from typing import Protocol

import trio

__all__ = ["Idle", "IdleTimeout"]

logger = logging.getLogger("trio_cluster.http")


class Idle(Protocol):
    """Something that may be idle."""

    def expire(self) -> None:
        """It has been idle for too long. Called without waiting; not called again."""
        ...


class IdleTimeout:
    """A bound on the time that each of many is idle without a break.

    Args:
        seconds: the bound; the same for all.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Idle, float] = {}
        self._anybody = trio.lowlevel.ParkingLot()

    def begin(self, one: Idle) -> None:
        """Count from now on."""
        self._since[one] = trio.current_time()
        if self._anybody:
            self._anybody.unpark_all()

    def end(self, one: Idle) -> None:
        """Count no more. Harmless for one that is not idle, or was for too long."""
        self._since.pop(one, None)

    async def run(self) -> None:
        """Tell those whose time has come, until cancelled."""
        while True:
            while not self._since:
                await self._anybody.park()
            one, since = next(iter(self._since.items()))
            if since + self._seconds > trio.current_time():
                await trio.sleep_until(since + self._seconds)
            else:
                del self._since[one]
                try:
                    one.expire()
                except Exception:
                    # That one is wrong; the others still have their deadlines here.
                    logger.exception("an idle connection could not be closed")
