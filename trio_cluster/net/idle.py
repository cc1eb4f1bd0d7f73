"""The idle timeout of connections.

Between two requests a connection waits for the next one, and is closed if that does not come in time. A cancel scope
with a deadline for each wait would cost an insertion into the event loop's deadlines and a removal for each request,
and hardly any of these deadlines ever passes. But all waits are equally long, so those that began first end first. They
are kept in the order in which they began, and one task for all connections sleeps until the first of them would be too
long. When it wakes, that one is mostly over, and the task sleeps for the one that is now the first.
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
        """End, since it has been idle for too long. Synchronous. Called once for each :meth:`IdleTimeout.begin`."""
        ...


class IdleTimeout:
    """One idle timeout for many connections.

    Args:
        seconds: how long each may be idle without a break.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Idle, float] = {}
        self._begun = trio.lowlevel.ParkingLot()

    def begin(self, one: Idle) -> None:
        """Let the timeout of ``one`` begin. Synchronous."""
        self._since[one] = trio.current_time()
        if self._begun:
            self._begun.unpark_all()

    def end(self, one: Idle) -> None:
        """Stop the timeout of ``one``. Synchronous; harmless if it did not begin, or has passed."""
        self._since.pop(one, None)

    async def run(self) -> None:
        """Call :meth:`Idle.expire` when a timeout has passed, until cancelled."""
        while True:
            while not self._since:
                await self._begun.park()
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
