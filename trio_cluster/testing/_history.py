"""What happened in a schedule: a log that can be compared byte for byte, the troubles, and what was wrong.

Troubles are the faults with the time for which they lasted and the machines they touched. A law of the cluster nearly
always has the form "within so many seconds, unless the network was in the way"; this is where it is looked up whether
it was, and for how long.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from typing import Final

import attrs
import trio

__all__ = ["History", "Trouble"]

#: Levels of log records, short.
_MARKS: Final = {logging.INFO: "-", logging.WARNING: "!"}


@attrs.define(eq=False)
class Trouble:
    """Something that was done to the cluster.

    Attributes:
        kind: what; one word.
        hosts: the machines that it touched.
        began, ended: when, in seconds since the schedule began; it has not ended yet if that is infinite.
    """

    kind: str
    hosts: frozenset[str]
    began: float
    ended: float = math.inf

    def overlap(self, since: float, until: float) -> float:
        """Return for how many seconds of that time it was there; 0 for what only happened in an instant."""
        return max(0.0, min(self.ended, until) - max(self.began, since))

    def touches(self, since: float, until: float) -> bool:
        """Return whether it was there in that time, be it for an instant."""
        return self.began <= until and self.ended >= since


class History(logging.Handler):
    """The chronicle of one schedule. As a logging handler, it also takes in what the nodes log.

    Attributes:
        lines: the log.
        violations: the laws that were broken, and how.
        faults: how many there were of each kind.
        tolerated: exceptions that the nodes may log as errors.
    """

    def __init__(self, tolerated: type[BaseException]) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.faults: Counter[str] = Counter()
        self.tolerated = tolerated
        self._troubles: list[Trouble] = []
        self._epoch = 0.0

    def start(self) -> None:
        """Let the time begin."""
        self._epoch = trio.current_time()

    @property
    def now(self) -> float:
        """Seconds since the schedule began."""
        return trio.current_time() - self._epoch

    def note(self, text: str) -> None:
        """Write a line."""
        self.lines.append(f"{self.now:9.3f} {text}")

    def violate(self, text: str) -> None:
        """Write down that a law was broken."""
        self.violations.append(f"{self.now:.3f}: {text}")
        self.note(f"*** {text}")

    def begin(self, kind: str, *hosts: str) -> Trouble:
        """Write down that a trouble begins."""
        trouble = Trouble(kind, frozenset(hosts), self.now)
        self._troubles.append(trouble)
        self.faults[kind] += 1
        self.note(f"{kind}: {' '.join(hosts)}")
        return trouble

    def end(self, trouble: Trouble) -> None:
        """Write down that it is over."""
        if trouble.ended == math.inf:
            trouble.ended = self.now
            self.note(f"end of {trouble.kind}: {' '.join(sorted(trouble.hosts))}")

    def flash(self, kind: str, *hosts: str) -> None:
        """Write down a trouble that begins and ends in the same instant."""
        self.begin(kind, *hosts).ended = self.now

    def troubles(
        self, hosts: frozenset[str], since: float, until: float, kinds: frozenset[str] | None = None
    ) -> list[Trouble]:
        """Return the troubles that touched any of ``hosts`` in that time, of some kinds or of any."""
        return [
            trouble
            for trouble in self._troubles
            if trouble.hosts & hosts
            and trouble.touches(since, until)
            and (kinds is None or trouble.kind in kinds)
        ]

    def troubled_time(self, hosts: frozenset[str], since: float, until: float) -> float:
        """Return for how long of that time any of ``hosts`` was in trouble, each instant counted once."""
        spans = sorted((max(each.began, since), min(each.ended, until)) for each in
                       self.troubles(hosts, since, until))  # fmt: skip
        total, reached = 0.0, since
        for began, ended in spans:
            total += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        return total

    @property
    def digest(self) -> str:
        """A hash of the log: two runs that have the same one were the same."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging``."""
        fields = getattr(record, "fields", {})
        told = " ".join(f"{name}={fields[name]}" for name in sorted(fields))
        text = f"{record.name.removeprefix('trio_cluster.')}: {record.getMessage()} {told}".rstrip()
        if record.levelno < logging.ERROR:
            self.note(f"  {_MARKS.get(record.levelno, '?')} {text}")
            return
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, self.tolerated):
            self.note(f"  E {text}")
        else:
            self.violate(f"logged as an error: {text}" + (f" ({error!r})" if error else ""))
