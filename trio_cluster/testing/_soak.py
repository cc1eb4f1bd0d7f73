"""Many schedules, one after another in several processes, and what they add up to."""

from __future__ import annotations

import faulthandler
import itertools
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator

import attrs

from ._schedule import ScheduleFailed, ScheduleReport, run_schedule

__all__ = ["Tally", "soak"]

#: Real seconds after which a schedule that does not end is given up, and shows where it is.
_STUCK = 300.0


@attrs.define
class Tally:
    """What many schedules add up to."""

    schedules: int = 0
    requests: int = 0
    simulated: float = 0.0
    real: float = 0.0
    """Seconds that went by, however many processes were at work."""
    outcomes: Counter[str] = attrs.field(factory=Counter)
    faults: Counter[str] = attrs.field(factory=Counter)
    failures: list[str] = attrs.field(factory=list)

    def add(self, report: ScheduleReport | str) -> None:
        """Add a schedule; a text says what was wrong with it."""
        self.schedules += 1
        if isinstance(report, str):
            self.failures.append(report)
            return
        self.requests += report.requests
        self.simulated += report.simulated
        self.outcomes += report.outcomes
        self.faults += report.faults

    def describe(self) -> str:
        """Return all of it for people."""
        hours = self.simulated / 3600
        lines = [
            f"{self.schedules} schedules, {len(self.failures)} of them broke a law",
            f"{self.requests} requests, {hours:.1f} simulated hours in {self.real:.0f} s: "
            f"{hours / self.real if self.real else math.nan:.3f} simulated hours per second",
        ]
        for title, counts in (("faults", self.faults), ("outcomes", self.outcomes)):
            lines.append(f"{title}, {counts.total()} together:")
            lines += [f"{count:9}  {name}" for name, count in counts.most_common()]
        return "\n".join(lines)


def soak(first: int, *, count: int | None, seconds: float, processes: int) -> Tally:
    """Play schedules, and return what they add up to. Failures are printed when they happen.

    Args:
        first: the first seed; the others follow it.
        count: how many schedules; without it, as many as there is time for.
        seconds: when to begin no more of them.
        processes: how many to play at a time.
    """
    tally, began = Tally(), time.monotonic()

    def seeds() -> Iterator[int]:
        for seed in itertools.count(first) if count is None else range(first, first + count):
            if time.monotonic() - began >= seconds:
                return
            yield seed

    # Not forked: a child is to be what a replay of its seed is.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        waiting: list[multiprocessing.pool.AsyncResult[ScheduleReport | str]] = []
        for seed in seeds():
            waiting.append(pool.apply_async(_play, (seed,)))
            while len(waiting) >= 2 * processes:
                _take(waiting, tally)
        while waiting:
            _take(waiting, tally)
    tally.real = time.monotonic() - began
    return tally


def _take(waiting: list[multiprocessing.pool.AsyncResult[ScheduleReport | str]], tally: Tally) -> None:
    # A process that gave up has not said anything, and never will.
    report = waiting.pop(0).get(timeout=4 * _STUCK)
    if isinstance(report, str):
        print(report, flush=True)
    tally.add(report)


def _play(seed: int) -> ScheduleReport | str:
    faulthandler.dump_traceback_later(_STUCK, exit=True, file=sys.stderr)
    try:
        # The log is what takes the most memory, and is there again when the seed is.
        return attrs.evolve(run_schedule(seed), log=())
    except ScheduleFailed as failed:
        return str(failed)
    except Exception as error:
        return f"schedule {seed} failed: {error!r}"
    finally:
        faulthandler.cancel_dump_traceback_later()
