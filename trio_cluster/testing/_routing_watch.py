"""Watches the router of one master: in which order replicas are asked, and whether the right ones are left alone.

The invariants of ejection are checked here, against what has really happened to each call: what its handler did, what
faults its node had, and how long it took. What the package makes of the end of a call is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio

from ..core.call import Call
from ..core.observer import Observer
from ..core.outcome import Outcome
from ..routing.backend import LOCAL
from ..routing.ejection import WINDOW
from ._scripts import MARGIN

if TYPE_CHECKING:
    from ..server import ClusterServer
    from ._history import History
    from ._plan import Plan
    from ._scripted_models import HandlerRun, ScriptedModels

__all__ = ["Openings", "RoutingWatch"]

#: For each request, by its number, the nodes and the models that it was opened for, in this order.
Openings: TypeAlias = dict[int, list[tuple[str, str]]]

#: The part of ``worker_timeout`` after which a silent worker is given no calls.
_SUSPECT_AFTER: Final = 0.5


class RoutingWatch(Observer):
    """Watches one master, from its start to its end. To be added behind the observers of its router.

    Args:
        name: of the master.
        server: the master.
        plan: the plan of the schedule.
        history: where violations are recorded, and where faults are looked up.
        models: the record of what the handlers did.
        openings: what is opened is added to it.
        frozen_since: returns since when a worker is frozen; infinite if it is not.
    """

    def __init__(
        self,
        name: str,
        server: ClusterServer,
        plan: Plan,
        history: History,
        models: ScriptedModels,
        openings: Openings,
        frozen_since: Callable[[str], float],
    ) -> None:
        self._name = name
        self._server = server
        self._plan = plan
        self._history = history
        self._models = models
        self._openings = openings
        self._frozen_since = frozen_since
        self._table = server.router.ejections.table
        # Those that the table had when this was called last.
        self._left_alone: set[tuple[str, str]] = set()
        self._total = 0
        self._opened: dict[Call, float] = {}
        # What the ends of calls have said against each replica, by what has really happened.
        self._guilt: dict[tuple[str, str], float] = {}
        self._ejections: dict[tuple[str, str], int] = {}
        self._until: dict[tuple[str, str], float] = {}
        self._trials: dict[tuple[str, str], list[Call]] = {}

    # The steps of calls

    def on_routed(self, call: Call, why: str) -> None:
        """See ``Observer``."""
        key, number = (call.served_by, call.request.model), _number_of(call)
        tried = {node for node, _ in self._openings.get(number, ())}
        self._openings.setdefault(number, []).append((self._node(call), call.request.model))
        self._opened[call] = self._history.now
        others = [
            each
            for each in self._server.router.catalog.replicas(call.request.model)
            if each.health.available
            and each.name not in (call.served_by, *tried)
            and (each.name, call.request.model) not in self._table.ejected
        ]
        if not others:
            # Then every replica may be asked.
            return
        if key in self._table.ejected:
            self._check_trial(call, key)
        self._check_frozen(call, [each.name for each in others])

    def on_first_byte(self, call: Call) -> None:
        """See ``Observer``."""
        self._left_alone &= self._table.ejected.keys()

    def on_overdue(self, call: Call) -> None:
        """See ``Observer``."""
        self._look(call, "timed_out")

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """See ``Observer``."""
        if not call.overdue:
            self._look(call, outcome)
        self._opened.pop(call, None)

    # What must hold

    def _check_trial(self, call: Call, key: tuple[str, str]) -> None:
        """Check that a replica that is left alone is given a call only to try it, and one at a time."""
        if trio.current_time() < self._until.get(key, 0.0):
            self._report(f"request {_number_of(call)} was sent to {_shown(key)}, which is left alone")
            return
        trials = self._trials.setdefault(key, [])
        live = [each for each in trials if not each.released and not each.overdue]
        if live:
            self._report(f"{_shown(key)} is tried with {1 + len(live)} requests at once")
        trials.append(call)

    def _check_frozen(self, call: Call, others: list[str]) -> None:
        """Check that a frozen worker costs no more than the requests that it has."""
        options, now = self._plan.options, self._history.now
        noticed = _SUSPECT_AFTER * options["worker_timeout"] + options["heartbeat_interval"]
        noticed += MARGIN + 2 * self._plan.longest_delay
        frozen = now - self._frozen_since(call.served_by)
        if frozen > noticed and any(now - self._frozen_since(name) < 0 for name in others):
            self._report(
                f"request {_number_of(call)} was sent to {call.served_by}, frozen for {frozen:.1f} s"
            )

    def _look(self, call: Call, outcome: Outcome) -> None:
        key = (call.served_by, call.request.model)
        guilt, retry_after = self._guilt_of(call, outcome)
        self._guilt[key] = self._guilt.get(key, 0.0) + guilt
        if self._table.total != self._total:
            self._total = self._table.total
            self._check_ejection(call, key, guilt, retry_after)
        self._left_alone = set(self._table.ejected)

    def _check_ejection(self, call: Call, key: tuple[str, str], guilt: float, retry_after: float) -> None:
        record = self._table.ejected.get(key)
        if record is None:
            self._report(f"another replica than {_shown(key)} was ejected when a call of that one ended")
            return
        why = f"{_shown(key)} was ejected ({record.reason}) when request {_number_of(call)} ended"
        if not guilt:
            self._report(f"{why}, which was no failure of it")
        is_trial = call in self._trials.get(key, ())
        failures = self._server.options.ejection_failures
        if not (is_trial or key in self._left_alone or retry_after) and self._guilt[key] < failures:
            self._report(f"{why}, after {self._guilt[key]:g} failures instead of {failures}")
        if key not in self._left_alone:
            self._check_share(key, why)
        self._check_back_off(key, record, retry_after)
        self._until[key] = trio.current_time() + record.back_off

    def _check_share(self, key: tuple[str, str], why: str) -> None:
        others = [
            (each.name, key[1])
            for each in self._server.router.catalog.replicas(key[1])
            if each.health.available and each.name != key[0]
        ]
        gone = sum(each in self._table.ejected for each in others)
        if gone == len(others):
            self._report(f"{why}, as the last replica")
        elif gone + 1 > self._server.options.ejection_share * (len(others) + 1):
            self._report(f"{why}: {gone + 1} of {len(others) + 1} replicas are left alone")

    def _check_back_off(self, key: tuple[str, str], record: Any, retry_after: float) -> None:
        options = self._server.options
        count = self._ejections.get(key, 0)
        # It is forgotten some time after it was well.
        forgotten = trio.current_time() - self._until.get(key, 0.0) > WINDOW
        allowed = []
        for earlier in (count, 0) if forgotten else (count,):
            seconds = options.ejection_time * 2.0**earlier
            if retry_after:
                seconds = max(retry_after, seconds / 2 if earlier else 0.0)
            allowed.append(min(seconds, options.ejection_time_max))
        if record.back_off not in allowed:
            self._report(f"{_shown(key)} is left alone for {record.back_off:g} s instead of {allowed[0]:g} s")
        self._ejections[key] = count + 1 if record.back_off == allowed[0] else 1

    # What has really happened

    def _guilt_of(self, call: Call, outcome: Outcome) -> tuple[float, float]:
        """Return what the end of a call counts against its replica, and for how long that wants to be left alone."""
        node, opened = self._node(call), self._opened.get(call, 0.0)
        run = self._run_of(call, node)
        if run is not None and run.failed:
            return 1.0, run.retry_after
        faults = self._history.faults_on(
            frozenset([node, self._name]),
            opened - 2 * self._plan.options["worker_timeout"],
            self._history.now,
        )
        if outcome == "worker_lost" and faults:
            return 1.0, 0.0
        timeout = float(self._plan.options["default_timeout"])
        request = call.request
        if (
            outcome == "timed_out"
            and self._history.now - opened >= timeout - MARGIN
            and request.idle_timeout >= timeout
            and (run is not None or faults)
        ):
            return float((self._server.options.ejection_failures + 1) // 2), 0.0
        return 0.0, 0.0

    def _run_of(self, call: Call, node: str) -> HandlerRun | None:
        runs = self._models.runs_of(_number_of(call))
        return next(
            (run for run in reversed(runs) if (run.node, run.model) == (node, call.request.model)), None
        )

    def _node(self, call: Call) -> str:
        return self._name if call.served_by == LOCAL else call.served_by

    def _report(self, text: str) -> None:
        self._history.add_violation(f"{self._name}: {text}")


def _number_of(call: Call) -> int:
    """Return the number of the request of a call; -1 if it is not one of the schedule's."""
    number = call.request.request_id.removeprefix("r")
    return int(number) if number.isdigit() else -1


def _shown(key: tuple[str, str]) -> str:
    return f"{key[1]} on {key[0]}"
