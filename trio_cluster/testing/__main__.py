"""``python -m trio_cluster.testing``: replay one random schedule, or play many new ones."""

from __future__ import annotations

import argparse
import math
import sys

from ._schedule import ScheduleFailed, run_schedule
from ._soak import soak


def main(arguments: list[str]) -> int:
    """Run the command line, and return the exit code: 0 if all invariants held, otherwise 1."""
    parser = argparse.ArgumentParser(
        prog="python -m trio_cluster.testing", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument(
        "seed", type=int, nargs="?", help="replay the schedule of this seed, and nothing else"
    )
    parser.add_argument("--seed", type=int, dest="same_seed", help="the same, as an option")
    parser.add_argument("--log", action="store_true", help="print the whole log of it")
    parser.add_argument("--first", type=int, default=1, help="the first of many seeds (default: %(default)s)")
    parser.add_argument(
        "--count", type=int, help="how many schedules (default: as many as there is time for)"
    )
    parser.add_argument("--minutes", type=float, help="how long to play (default: 10, without --count)")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="how many schedules to play at the same time (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    seed = given.same_seed if given.seed is None else given.seed
    if seed is not None:
        return _replay(seed, log=given.log)
    minutes = given.minutes if given.minutes is not None else 10.0 if given.count is None else math.inf
    tally = soak(given.first, count=given.count, seconds=60 * minutes, processes=given.processes)
    print(tally.describe())
    return 1 if tally.failures else 0


def _replay(seed: int, *, log: bool) -> int:
    try:
        report = run_schedule(seed)
    except ScheduleFailed as failed:
        if log:
            print(*failed.log, sep="\n")
        print(failed)
        return 1
    if log:
        print(*report.log, sep="\n")
    faults = ", ".join(f"{count} {name}" for name, count in report.faults.most_common()) or "no faults"
    outcomes = ", ".join(f"{count} {name}" for name, count in report.outcomes.most_common())
    print(f"schedule {seed}: {report.simulated:.0f} s in {report.real:.1f} s; {faults}; {outcomes}")
    print(f"digest {report.digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
