"""What is started, what is stopped for it, and who waits. Decisions only: nothing here starts, waits or has a clock.

Theory of operation
===================

A *resident* is something that takes memory while it runs, and serves one or more models: the process of a model server,
or an engine's model in this process. All residents of a node share one amount of memory, the budget. The code that runs
them reports what happens (a request wants one, one is ready, an answer is over), each time with the present time, and
asks :meth:`Schedule.decide` what is to be done then. A decision changes the states at once, so that two of them never
contradict each other, whatever the time is that a start or a stop takes.

*States.* ``cold`` -> ``starting`` -> ``ready`` -> ``stopping`` -> ``cold``. A start that fails, and a resident that
dies, lead to ``failed``: requests fail at once until a time that doubles with each failure in a row is over; then it is
like ``cold``. A start for which no request waits any more is given up.

*Memory.* A resident needs what was said; without that, what it took when it ran last. Before its first run, nothing is
known: it then gets the whole budget for itself, until it has been measured. Memory is reserved from the decision to
start until the resident has really stopped, so the reservations never exceed the budget.

*Turns.* Requests that wait for residents are served in the order in which they came. The resident that was asked for
first, and does not fit, has residents stopped that answer no request: those that have been idle longest for the time
that it takes to start them again. Of these only as many as are needed, and none if they are not enough. If they are not
enough, residents that are busy are *closed*: their requests go on, new ones wait behind those that came before, and the
resident is stopped when it is idle. That is how two residents that do not fit together take turns although both are
always asked for.

*Minimum stay.* A resident that is ready stays for twice the time of its start, within limits, before it makes room. The
alternation costs a bounded share of the time, then. If it is idle for a quarter of that time, it makes room earlier:
then it is probably not asked for in bursts, and others would wait in vain.

*Behind the first.* A resident that was asked for later may start before one that waits for memory: in memory that the
earlier one does not need; or in memory that is kept for the earlier one, if the later one's own start and minimum stay
are expected to be over before the minimum stays of those that are to make room. Otherwise that memory would be unused
for a minute or more. The earlier one is delayed by that only if they become idle before, if the start takes longer than
usual, or if the later one's last answer is the last to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

import attrs

from ..core.sizes import format_size

__all__ = ["Decisions", "Resident", "Schedule", "State", "Waiter"]

State: TypeAlias = Literal["cold", "starting", "ready", "stopping", "failed"]

#: Seconds of a minimum stay, at least and at most; in between it is so many times as long as the start.
MIN_STAY: Final = 5.0
MAX_STAY: Final = 60.0
_STAY_FOR_START: Final = 2.0
#: The part of the minimum stay for which a resident must be idle to make room before that is over.
_GAP: Final = 0.25
#: Seconds after a failure for which requests fail at once: at first, and at most.
FIRST_BACKOFF: Final = 1.0
MAX_BACKOFF: Final = 300.0
#: Seconds that a start is believed to take before one was measured.
_UNKNOWN_START: Final = 10.0
#: What counts of the starts before the last one for the usual time of a start.
_KEEP: Final = 0.5


@attrs.define(eq=False)
class Resident:
    """Something that takes memory while it runs. The schedule changes it; others read it.

    Attributes:
        name: for people.
        said: the bytes that it needs, as its owner says; ``None``: not said.
        idle: seconds without a request after which it is stopped; 0: never for that reason.
        state: see the top of this module.
        since: the time of the last change of the state.
        reserved: the bytes that are reserved for it now.
        learned: the bytes that it took; ``None``: not measured yet.
        start_seconds: how long its start usually takes; ``None``: not known yet.
        answering: requests that use it now. It is not stopped while there are any.
        idle_since: when the last of them ended, or when it became ready.
        closed: new requests wait, since it is to make room.
        why: why it has failed; empty if it has not.
        retry_at: the time before which it is not started after a failure.
        failures: failures in a row, without a complete answer between them.
        runs: how many times it has ended.
    """

    name: str
    said: int | None = None
    idle: float = 0.0
    state: State = "cold"
    since: float = 0.0
    reserved: float = 0.0
    learned: int | None = None
    start_seconds: float | None = None
    answering: int = 0
    idle_since: float = 0.0
    closed: bool = False
    why: str = ""
    retry_at: float = 0.0
    failures: int = 0
    runs: int = 0
    dying: bool = False
    """It is stopping because it has died."""
    _unload_before: float = attrs.field(default=math.inf, alias="unload_before")
    """Waiters with a greater number wait until it has been stopped and started again; ``inf``: it is not unloaded."""

    @property
    def unloading(self) -> bool:
        """Whether it was asked to be unloaded."""
        return self._unload_before < math.inf

    @property
    def runs_failed(self) -> bool:
        """Whether its last run has failed, and there was none since."""
        return self.state == "failed"

    @property
    def stay(self) -> float:
        """Seconds for which it stays at least when it is ready."""
        return min(max(MIN_STAY, _STAY_FOR_START * (self.start_seconds or 0.0)), MAX_STAY)

    @property
    def full_turn(self) -> float:
        """Seconds from the beginning of its start until its minimum stay is over; infinite if not known."""
        return math.inf if self.start_seconds is None else self.start_seconds + self.stay

    @property
    def expected_start(self) -> float:
        """Seconds that a start is expected to take."""
        return _UNKNOWN_START if self.start_seconds is None else self.start_seconds

    def ready_in(self, now: float) -> float:
        """Return the seconds until it is ready, as far as the start alone decides that. Synchronous."""
        match self.state:
            case "ready":
                return 0.0
            case "starting":
                return max(0.0, self.since + self.expected_start - now)
            case "failed":
                return max(0.0, self.retry_at - now) + self.expected_start
        return self.expected_start

    def let_in(self, number: int) -> bool:
        """Return whether a waiter with this number may use it now."""
        return self.state == "ready" and not self.closed and number < self._unload_before

    def set_state(self, state: State, now: float) -> None:
        """Change the state."""
        self.state, self.since = state, now

    def request_unload(self, number: float) -> None:
        """Let waiters from this number on wait until it has been stopped; ``inf``: it is stopped now."""
        self._unload_before = number


@attrs.define(eq=False)
class Waiter:
    """One request for a resident: it waits, then uses it, then is over.

    Attributes:
        resident: what it wants.
        number: waiters are served in the order of their numbers.
        uses: it is a request, which uses the resident; otherwise it only waits until that is ready.
        admitted: it uses the resident now.
    """

    resident: Resident
    number: int
    uses: bool = True
    admitted: bool = False


@attrs.define
class Decisions:
    """What is to be done now. The states have been changed already.

    Attributes:
        start: residents to start.
        stop: residents to stop; also those whose start is given up.
        admit: waiters whose resident is ready. They do not wait any more.
        fail: waiters whose resident has failed, with the seconds after which it may be tried again.
    """

    start: list[Resident] = attrs.field(factory=list)
    stop: list[Resident] = attrs.field(factory=list)
    admit: list[Waiter] = attrs.field(factory=list)
    fail: list[tuple[Waiter, float]] = attrs.field(factory=list)


class Schedule:
    """The residents of a node, and their memory. See the top of this module. Everything is synchronous.

    Args:
        budget: bytes for all residents together; infinite: no limit is known.

    Attributes:
        budget: as given.
        residents: those that were added, in that order.
    """

    def __init__(self, budget: float = math.inf) -> None:
        self.budget = budget
        self.residents: list[Resident] = []
        # Those that wait, in the order of their numbers.
        self._waiting: list[Waiter] = []
        self._number = 0

    @property
    def reserved(self) -> float:
        """The bytes that are reserved for all residents together."""
        return sum(resident.reserved for resident in self.residents)

    def waiting_for(self, resident: Resident) -> int:
        """Return how many wait for a resident."""
        return sum(waiter.resident is resident for waiter in self._waiting)

    def need(self, resident: Resident) -> float:
        """Return the bytes that a resident needs; the whole budget if that is not known."""
        need = resident.said if resident.said is not None else resident.learned
        if need is None:
            return 0.0 if math.isinf(self.budget) else self.budget
        return min(need, self.budget)

    # What has happened

    def add(self, resident: Resident) -> None:
        """Add a resident, which is cold.

        Raises:
            ValueError: it says that it needs more than there is.
        """
        if resident.said is not None and resident.said > self.budget:
            need, there = format_size(resident.said), format_size(self.budget)
            raise ValueError(f"{resident.name} needs {need} of memory, and there are {there}")
        self.residents.append(resident)

    def remove(self, resident: Resident) -> list[Waiter]:
        """Remove a resident, and return those that waited for it. It must not run any more."""
        self.residents.remove(resident)
        left = [waiter for waiter in self._waiting if waiter.resident is resident]
        self._waiting = [waiter for waiter in self._waiting if waiter.resident is not resident]
        resident.set_state("cold", resident.since)
        resident.reserved = 0.0
        return left

    def want(self, resident: Resident, *, uses: bool = True) -> Waiter:
        """Record that a request wants a resident; it waits until a decision admits it or fails it.

        Args:
            resident: what it wants.
            uses: see :class:`Waiter`.
        """
        self._number += 1
        waiter = Waiter(resident, self._number, uses)
        self._waiting.append(waiter)
        return waiter

    def leave(self, waiter: Waiter, now: float, *, completed: bool = False) -> None:
        """Record that a request is over, or waits no longer. Idempotent.

        Args:
            waiter: the request.
            now: the time.
            completed: it has got a complete answer, so the resident works.
        """
        resident = waiter.resident
        if waiter.admitted:
            waiter.admitted = False
            resident.answering -= 1
            resident.idle_since = now
            if completed:
                resident.failures = 0
        elif waiter in self._waiting:
            self._waiting.remove(waiter)

    def unload(self, resident: Resident) -> None:
        """Record that a resident is to be stopped when those that use it, or wait for it now, are done."""
        if resident.state in ("starting", "ready"):
            self._number += 1
            resident.request_unload(self._number)

    def is_ready(self, resident: Resident, now: float) -> None:
        """Record that a start is over, and was successful. Without effect if the start was given up meanwhile."""
        if resident.state != "starting":
            return
        took, before = now - resident.since, resident.start_seconds
        resident.start_seconds = took if before is None else _KEEP * before + (1 - _KEEP) * took
        resident.set_state("ready", now)
        resident.idle_since = now

    def takes(self, resident: Resident, size: int) -> None:
        """Record that a resident, which runs, was measured to take so many bytes.

        The largest measurement counts. What was said holds, whatever is measured.
        """
        resident.learned = max(size, resident.learned or 0)
        if resident.said is None and resident.state == "ready":
            resident.reserved = self.need(resident)

    def dies(self, resident: Resident, now: float, why: str) -> None:
        """Record that a resident that was ready has died; what is left of it has still to be stopped."""
        if resident.state == "ready":
            resident.set_state("stopping", now)
            resident.dying, resident.why = True, why

    def ended(self, resident: Resident, now: float, why: str = "") -> None:
        """Record that a resident does not run any more: it was stopped, its start has failed, or what was
        left of it after its death is gone.

        Args:
            resident: which one.
            now: the time.
            why: why its start has failed; empty if it has not. Ignored if it was to be stopped in any case.
        """
        served = resident.dying and resident.failures == 0
        failed = resident.dying or (bool(why) and resident.state == "starting")
        why = resident.why if resident.dying else why
        resident.dying = False
        resident.runs += 1
        resident.reserved = 0.0
        resident.closed = False
        resident.request_unload(math.inf)
        if not failed:
            resident.set_state("cold", now)
            return
        resident.set_state("failed", now)
        resident.why = why
        # One that has worked is started again at once; one that fails again and again is left alone for longer.
        backoff = 0.0 if served else min(FIRST_BACKOFF * 2.0**resident.failures, MAX_BACKOFF)
        resident.retry_at = now + backoff
        resident.failures += 1

    # What is to be done

    def decide(self, now: float) -> Decisions:
        """Decide what is to be done now, and take it as begun. To be called after anything has happened."""
        decisions = Decisions()
        self._fail(now, decisions)
        self._stop_idle(now, decisions)
        self._place(now, decisions)
        for waiter in list(self._waiting):
            resident = waiter.resident
            if resident.let_in(waiter.number):
                self._waiting.remove(waiter)
                if waiter.uses:
                    waiter.admitted = True
                    resident.answering += 1
                decisions.admit.append(waiter)
        return decisions

    def wakes_at(self, resident: Resident, now: float) -> float:
        """Return the next time at which a decision may follow from the time alone; infinite if there is none."""
        if resident.state != "ready" or resident.answering:
            times = [resident.since + resident.stay] if resident.state == "ready" else []
        else:
            times = [resident.since + resident.stay, resident.idle_since + _GAP * resident.stay]
            if resident.idle:
                times.append(resident.idle_since + resident.idle)
        return min((time for time in times if time > now), default=math.inf)

    def _fail(self, now: float, decisions: Decisions) -> None:
        for waiter in list(self._waiting):
            resident = waiter.resident
            if resident.state == "failed" and now < resident.retry_at:
                self._waiting.remove(waiter)
                decisions.fail.append((waiter, resident.retry_at - now))

    def _stop_idle(self, now: float, decisions: Decisions) -> None:
        """Stop what is not wanted any more: by no request that waits, for long enough, or by its owner."""
        wanted = {id(waiter.resident): waiter.number for waiter in reversed(self._waiting)}
        for resident in self.residents:
            first = wanted.get(id(resident))
            if resident.state == "starting" and first is None:
                self._stop(resident, now, decisions)
            elif resident.state == "ready" and not resident.answering:
                is_idle = resident.idle > 0 and now >= resident.idle_since + resident.idle and first is None
                # Those that waited when it was to be unloaded are served first.
                unloads = resident.unloading and (first is None or not resident.let_in(first))
                if is_idle or unloads:
                    self._stop(resident, now, decisions)

    def _place(self, now: float, decisions: Decisions) -> None:
        """Start what waits to be started, in the order of asking, and make room for it; see the top of this module."""
        free = self.budget - self.reserved
        coming = sum(resident.reserved for resident in self.residents if resident.state == "stopping")
        if free < 0:
            # Something took more than it did before.
            self._stop_all(_cheapest(self._stoppable(now, ()), -free - coming, now), now, decisions)
            free, coming = 0.0, 0.0
        # Those that are to make room for one that waits, and are not there for another.
        claimed: list[Resident] = []
        # What is free beside that, but kept for those that wait for more, which is there at this time at the earliest.
        kept, kept_until = 0.0, math.inf
        for resident in self._queue():
            need = self.need(resident)
            if resident.state == "stopping":
                # It is started again when it has stopped. Those behind it may not take what it leaves.
                free, coming = free - max(0.0, need - coming), max(0.0, coming - need)
            elif need <= free or (need <= free + kept and now + resident.full_turn <= kept_until):
                kept -= max(0.0, need - free)
                free -= need
                resident.reserved = need
                resident.set_state("starting", now)
                decisions.start.append(resident)
            elif need <= free + coming:
                free, coming = 0.0, coming - (need - free)
            else:
                deficit = need - free - coming
                victims = _cheapest(self._stoppable(now, claimed), deficit, now)
                if victims:
                    self._stop_all(victims, now, decisions)
                    free, coming = 0.0, _sum(victims) - deficit
                else:
                    kept_until = min(kept_until, self._room_at(deficit, claimed))
                    claimed += (closing := self._closing(deficit, claimed))
                    # What they leave beyond the need may be used by those behind, as far as it is free now.
                    spare = max(0.0, min(free, _sum(closing) - deficit))
                    free, coming, kept = spare, 0.0, kept + free - spare
            free = max(0.0, free)
        for resident in self.residents:
            resident.closed = (
                resident.state == "ready" and resident in claimed and now >= resident.since + resident.stay
            )

    def _queue(self) -> list[Resident]:
        """Return the residents that do not run and for which requests wait, in the order of asking."""
        queue = dict.fromkeys(
            waiter.resident
            for waiter in self._waiting
            if waiter.resident.state in ("cold", "failed", "stopping")
        )
        return list(queue)

    def _stoppable(self, now: float, claimed: Iterable[Resident]) -> list[Resident]:
        """Return the residents that can make room at once."""
        return [
            resident
            for resident in self.residents
            if resident.state == "ready"
            and not resident.answering
            and resident not in claimed
            and (now >= resident.since + resident.stay or now >= resident.idle_since + _GAP * resident.stay)
        ]

    def _closing(self, deficit: float, claimed: Iterable[Resident]) -> list[Resident]:
        """Return the residents that are to make room when they are idle; empty if not even all would be enough.

        First those that have been there longest.
        """
        chosen: list[Resident] = []
        ready = [each for each in self.residents if each.state == "ready" and each not in claimed]
        for resident in sorted(ready, key=lambda each: each.since):
            if _sum(chosen) >= deficit:
                break
            chosen.append(resident)
        return chosen if _sum(chosen) >= deficit else []

    def _room_at(self, deficit: float, claimed: Iterable[Resident]) -> float:
        """Return the time at which enough minimum stays are over to leave so many bytes; 0 if that is not known."""

        def end_of_stay(resident: Resident) -> float:
            start = (resident.start_seconds or 0.0) if resident.state == "starting" else 0.0
            return resident.since + start + resident.stay

        found = 0.0
        running = [
            each for each in self.residents if each.state in ("starting", "ready") and each not in claimed
        ]
        for resident in sorted(running, key=end_of_stay):
            found += resident.reserved
            if found >= deficit:
                return end_of_stay(resident)
        return 0.0

    def _stop(self, resident: Resident, now: float, decisions: Decisions) -> None:
        resident.set_state("stopping", now)
        decisions.stop.append(resident)

    def _stop_all(self, residents: Iterable[Resident], now: float, decisions: Decisions) -> None:
        for resident in residents:
            self._stop(resident, now, decisions)


def _sum(residents: Iterable[Resident]) -> float:
    return sum(resident.reserved for resident in residents)


def _cheapest(residents: list[Resident], deficit: float, now: float) -> list[Resident]:
    """Return the residents whose stop costs least, and leaves so many bytes; empty if all of them do not.

    The longer one has been idle, and the sooner it would be there again, the less its stop costs.
    """

    def worth(resident: Resident) -> float:
        return (now - resident.idle_since) / max(0.1, resident.expected_start)

    chosen: list[Resident] = []
    for resident in sorted(residents, key=worth, reverse=True):
        if _sum(chosen) >= deficit:
            break
        if resident.reserved:
            chosen.append(resident)
    if _sum(chosen) < deficit:
        return []
    for resident in reversed(chosen[:]):
        if _sum(chosen) - resident.reserved >= deficit:
            chosen.remove(resident)
    return chosen
