"""The history of a schedule: a log that can be compared byte for byte, the faults, and the violated invariants.

A :class:`FaultSpan` is a fault with the time for which it lasted and the machines it touched. An invariant of the
cluster nearly always has the form "within so many seconds, unless the network was in the way"; the history answers
whether it was, and for how long.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from typing import Final

import attrs
import trio

__all__ = ["FaultSpan", "History"]

#: Levels of log records, short.
_MARKS: Final = {logging.INFO: "-", logging.WARNING: "!"}


@attrs.define(eq=False)
class FaultSpan:
    """A fault that was injected.

    Attributes:
        kind: which fault.
        hosts: the machines that it touched.
        began, ended: when, in seconds since the schedule began; ``ended`` is infinite while it lasts.
    """

    kind: str
    hosts: frozenset[str]
    began: float
    ended: float = math.inf

    def overlaps(self, since: float, until: float) -> bool:
        """Return whether it lasted at any instant of that time, both ends included."""
        return self.began <= until and self.ended >= since


class History(logging.Handler):
    """The history of one schedule. It is a logging handler, and so contains what the nodes log.

    Attributes:
        lines: the log.
        violations: the invariants that were violated, with the time and the details.
        fault_counts: how many faults there were of each kind.
        expected_error: exceptions that the nodes may log as errors.
    """

    def __init__(self, expected_error: type[BaseException]) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.fault_counts: Counter[str] = Counter()
        self.expected_error = expected_error
        self._faults: list[FaultSpan] = []
        self._epoch = 0.0

    def start(self) -> None:
        """Make this the instant from which times are counted."""
        self._epoch = trio.current_time()

    @property
    def now(self) -> float:
        """Seconds since the schedule began."""
        return trio.current_time() - self._epoch

    def log(self, text: str) -> None:
        """Add a line to the log."""
        self.lines.append(f"{self.now:9.3f} {text}")

    def add_violation(self, text: str) -> None:
        """Record that an invariant was violated."""
        self.violations.append(f"{self.now:.3f}: {text}")
        self.log(f"*** {text}")

    def begin_fault(self, kind: str, *hosts: str) -> FaultSpan:
        """Record that a fault begins."""
        fault = FaultSpan(kind, frozenset(hosts), self.now)
        self._faults.append(fault)
        self.fault_counts[kind] += 1
        self.log(f"{kind}: {' '.join(hosts)}")
        return fault

    def end_fault(self, fault: FaultSpan) -> None:
        """Record that a fault is over. No effect if it was over before."""
        if fault.ended == math.inf:
            fault.ended = self.now
            self.log(f"end of {fault.kind}: {' '.join(sorted(fault.hosts))}")

    def record_instant(self, kind: str, *hosts: str) -> None:
        """Record a fault that begins and ends at this instant."""
        self.begin_fault(kind, *hosts).ended = self.now

    def faults_on(
        self, hosts: frozenset[str], since: float, until: float, kinds: frozenset[str] | None = None
    ) -> list[FaultSpan]:
        """Return the faults that touched any of ``hosts`` in that time, of some kinds or of any."""
        return [
            fault
            for fault in self._faults
            if fault.hosts & hosts and fault.overlaps(since, until) and (kinds is None or fault.kind in kinds)
        ]

    def faulty_time(self, hosts: frozenset[str], since: float, until: float) -> float:
        """Return for how many seconds of that time a fault lasted on any of ``hosts``, each instant counted once."""
        spans = sorted((max(each.began, since), min(each.ended, until)) for each in
                       self.faults_on(hosts, since, until))  # fmt: skip
        total, reached = 0.0, since
        for began, ended in spans:
            total += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        return total

    @property
    def digest(self) -> str:
        """A hash of the log: two runs with the same digest were the same."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging``. A record of level ERROR is a violation, unless its exception is expected."""
        fields = getattr(record, "fields", {})
        shown = " ".join(f"{name}={fields[name]}" for name in sorted(fields))
        text = f"{record.name.removeprefix('trio_cluster.')}: {record.getMessage()} {shown}".rstrip()
        if record.levelno < logging.ERROR:
            self.log(f"  {_MARKS.get(record.levelno, '?')} {text}")
            return
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, self.expected_error):
            self.log(f"  E {text}")
        else:
            self.add_violation(f"logged as an error: {text}" + (f" ({error!r})" if error else ""))
