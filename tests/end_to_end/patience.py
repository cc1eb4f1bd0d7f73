"""Deadlines of tests in real time, which other programs of the machine do not make pass.

What a test says takes a second takes one on a machine that has a core for it. CI has none to spare, for it runs other
tests beside. So the time in which some process had to wait for a core is not counted, as Linux measures it
(``/proc/pressure/cpu``), up to a bound. Where there is no such file, the first seconds are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

__all__ = ["Stopwatch", "fail_after"]

_PRESSURE: Final = Path("/proc/pressure/cpu")
#: Seconds that are not counted, at most.
_MOST: Final = 30.0
#: The same, where it is not known how busy the machine is.
_LEAST: Final = 10.0


def _starved() -> float | None:
    """Return for how many seconds some process has had to wait for a core so far; ``None`` if that is not known."""
    try:
        first, _, _ = _PRESSURE.read_text("ascii").partition("\n")
        return int(first.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return None


class Stopwatch:
    """Measures how long something takes that a core is there for."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._starved = _starved()

    @property
    def total(self) -> float:
        """How many seconds have passed."""
        return time.monotonic() - self._began

    @property
    def counted(self) -> float:
        """How many seconds have passed in which no process had to wait for a core; at most 30 are left out."""
        return self.total - self.left_out

    @property
    def left_out(self) -> float:
        """How many seconds are not counted."""
        starved = _starved()
        if starved is None or self._starved is None:
            return min(self.total, _LEAST)
        return min(starved - self._starved, self.total, _MOST)


@contextmanager
def fail_after(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer, in seconds that are counted; for tests by the real clock.

    Raises:
        trio.TooSlowError: it was too slow, and was cancelled.
    """
    watch = Stopwatch()

    async def keep_time() -> None:
        with waiting:
            while (left := seconds - watch.counted) > 0:  # noqa: ASYNC110
                await trio.sleep(max(left, 0.01))
            scope.cancel()

    waiting = trio.CancelScope()
    with trio.CancelScope() as scope:
        trio.lowlevel.spawn_system_task(keep_time)
        try:
            yield
        finally:
            waiting.cancel()
    if scope.cancelled_caught:
        raise trio.TooSlowError
