"""Soak tests: many schedules in several processes, and their totals."""

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

#: Real seconds after which a process whose schedule does not end prints its stacks and exits.
_SCHEDULE_TIMEOUT = 300.0


@attrs.define
class Tally:
    """The totals of many schedules."""

    schedules: int = 0
    requests: int = 0
    simulated: float = 0.0
    real: float = 0.0
    """Real seconds from the first to the last, in whatever number of processes."""
    outcomes: Counter[str] = attrs.field(factory=Counter)
    faults: Counter[str] = attrs.field(factory=Counter)
    failures: list[str] = attrs.field(factory=list)

    def add(self, report: ScheduleReport | str) -> None:
        """Add a schedule: its report, or a text that says why it failed."""
        self.schedules += 1
        if isinstance(report, str):
            self.failures.append(report)
            return
        self.requests += report.requests
        self.simulated += report.simulated
        self.outcomes += report.outcomes
        self.faults += report.faults

    def describe(self) -> str:
        """Return the totals as text of several lines."""
        hours = self.simulated / 3600
        lines = [
            f"{self.schedules} schedules, {len(self.failures)} of them failed",
            f"{self.requests} requests, {hours:.1f} simulated hours in {self.real:.0f} s: "
            f"{hours / self.real if self.real else math.nan:.3f} simulated hours per second",
        ]
        for title, counts in (("faults", self.faults), ("outcomes", self.outcomes)):
            lines.append(f"{title}, {counts.total()} in total:")
            lines += [f"{count:9}  {name}" for name, count in counts.most_common()]
        return "\n".join(lines)


def soak(first: int, *, count: int | None, seconds: float, processes: int) -> Tally:
    """Play schedules, and return their totals. Synchronous. Failures are printed when they happen.

    Args:
        first: the first seed; the others follow it.
        count: how many schedules; ``None``: as many as there is time for.
        seconds: real seconds after which no more schedules are begun.
        processes: how many schedules are played at the same time.
    """
    tally, began = Tally(), time.monotonic()

    def seeds() -> Iterator[int]:
        for seed in itertools.count(first) if count is None else range(first, first + count):
            if time.monotonic() - began >= seconds:
                return
            yield seed

    # Spawned, not forked: a replay of the seed starts from a new process as well.
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
    # A process that exited after its timeout never delivers a result.
    report = waiting.pop(0).get(timeout=4 * _SCHEDULE_TIMEOUT)
    if isinstance(report, str):
        print(report, flush=True)
    tally.add(report)


def _play(seed: int) -> ScheduleReport | str:
    faulthandler.dump_traceback_later(_SCHEDULE_TIMEOUT, exit=True, file=sys.stderr)
    try:
        # The log takes the most memory, and can be had again from the seed.
        return attrs.evolve(run_schedule(seed), log=())
    except ScheduleFailed as failed:
        return str(failed)
    except Exception as error:
        return f"schedule {seed} failed: {error!r}"
    finally:
        faulthandler.cancel_dump_traceback_later()
