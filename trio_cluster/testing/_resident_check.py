"""The invariants of models on demand, which are checked at every turn of the event loop.

They are checked against what has really happened to each resident (see ``_scripted_residents``); what the package
thinks of it is looked at only where its own sums must fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from ._fault_oracle import FaultOracle
from ._history import History
from ._plan import MEMORY, Plan
from ._scripted_residents import ResidentRun
from ._scripts import MARGIN
from ._simulation import ProcessRun, Simulation

__all__ = ["ResidentCheck"]

#: Round trips that the departure of a client may take until the worker knows it.
_ROUND_TRIPS: Final = 8


class ResidentCheck:
    """Checks the models on demand of one schedule.

    Args:
        plan: the plan of the schedule.
        simulation: the cluster to check.
        history: where faults are looked up.
        oracle: knows how long things may take.
        report: called with what is wrong; the same text may come again and again.
    """

    def __init__(
        self,
        plan: Plan,
        simulation: Simulation,
        history: History,
        oracle: FaultOracle,
        report: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._simulation = simulation
        self._history = history
        self._oracle = oracle
        self._report = report
        self._stopped: set[ResidentRun] = set()

    def check(self) -> None:
        """Check what must hold at this moment. Synchronous; must not raise."""
        if not self._plan.residents:
            return
        models = self._simulation.models
        live = [run for run in models.residents.runs if run not in self._stopped]
        for process in self._simulation.processes:
            if not process.killed:
                self._check_process(process, [run for run in live if run.process == process.number])
        self._stopped.update(run for run in live if run.ended < math.inf)

    def _check_process(self, process: ProcessRun, live: list[ResidentRun]) -> None:
        memory = sum(run.spec.memory for run in live if run.ended == math.inf)
        if memory > MEMORY:
            self._report(f"{process.name}: models on demand take {memory} of {MEMORY} bytes")
        reserved = process.server.on_demand.schedule.reserved
        if reserved > MEMORY:
            self._report(f"{process.name}: {reserved} of {MEMORY} bytes are reserved")
        if process.node.over.is_set():
            return
        for run in live:
            handlers = self._simulation.models.handlers_on(process.number, run.spec.model)
            if run.stopping < math.inf and not run.died.is_set() and handlers:
                self._report(
                    f"{process.name}: {run.spec.model} is stopped, and {handlers} handlers run on it"
                )
            if run.is_starting:
                self._check_wanted(process, run)

    def _check_wanted(self, process: ProcessRun, run: ResidentRun) -> None:
        """Check that a start goes on only while a client or an operator waits for it."""
        residents, now = self._simulation.models.residents, self._history.now
        model = run.spec.model
        since = residents.unwanted_since(model)
        takes = self._oracle.reaction_time + MARGIN + _ROUND_TRIPS * self._plan.longest_delay
        if now - max(since, run.began) <= takes:
            return
        before = since - self._oracle.aftermath
        hosts = frozenset([process.name, *self._plan.masters]) | residents.left_since(model, before)
        if self._history.faults_on(hosts, before, now) or self._oracle.replaced_master_ends(before, now):
            return
        self._report(f"{process.name}: {model} is started, and its last request has left at {since:.3f}")

    def left_over(self) -> list[str]:
        """Return what the package counts of requests for models on demand although there are none; a line for each."""
        return [
            f"{process.name} counts {resident.answering} answers of {resident.name}, and {waiting} that wait"
            for process in self._simulation.current.values()
            for schedule in [process.server.on_demand.schedule]
            for resident in schedule.residents
            for waiting in [schedule.waiting_for(resident)]
            if resident.answering or waiting
        ]
