"""The models on demand of a schedule: residents whose starts take the time that the plan says, fail or die.

There is a record of everything that was done with them.

A :class:`ResidentRun` is one run of a resident, from the beginning of its start until nothing of it is left. The
invariants about models on demand are invariants about these runs. They are checked against what has really happened:
who is asking for a model is known from the clients, and not from the package.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from ..errors import ClusterError
from ._history import History
from ._plan import START_FAILED, Plan, ResidentSpec, replica_name

if TYPE_CHECKING:
    from ..on_demand.residents import Run
    from ..server import ClusterServer

__all__ = ["ResidentRun", "ScriptedResidents"]

#: Seconds that a start takes while the recovered cluster is checked.
_CALM_START: Final = 0.5
#: Seconds by which a limit may seem to have passed too early: sums of times are rounded.
_ROUNDING: Final = 0.001


@attrs.define(eq=False)
class ResidentRun:
    """One run of a resident. Times are seconds since the schedule began; infinite: it has not come to that.

    Attributes:
        spec: the resident.
        process: the number of the process that it runs in.
        began: its start began.
        ready: it became ready.
        stopping: its stop, or the end of a failed start, began.
        ended: nothing of it is left.
        died: set when it has died while it was ready.
        lost: reports its death.
    """

    spec: ResidentSpec
    process: int
    began: float
    ready: float = math.inf
    stopping: float = math.inf
    ended: float = math.inf
    died: trio.Event = attrs.field(factory=trio.Event)
    lost: Run | None = None

    @property
    def is_starting(self) -> bool:
        """Whether its start goes on."""
        return self.ready == self.stopping == math.inf

    @property
    def is_ready(self) -> bool:
        """Whether it can answer."""
        return self.ready < math.inf and self.stopping == math.inf and not self.died.is_set()


class ScriptedResidents:
    """All models on demand of all processes.

    Attributes:
        runs: every run so far, in the order in which they began.
        calm: no start fails any more.
        killed: the numbers of the processes that were killed: what they ran is gone without a stop.
    """

    def __init__(self, plan: Plan, history: History) -> None:
        self.runs: list[ResidentRun] = []
        self.calm = False
        self.killed: set[int] = set()
        self._plan = plan
        self._history = history
        # Clients and operators that want each model; and of those that do not any more, when they left, and from where.
        self._wanted: Counter[str] = Counter()
        self._left: dict[str, list[tuple[float, str]]] = {}
        # How many runs each resident has had, in all processes.
        self._starts: Counter[tuple[str, str]] = Counter()
        # How many of them have failed, by process.
        self._failures: Counter[tuple[int, str]] = Counter()

    def run_of(self, process: int, model: str) -> ResidentRun | None:
        """Return the last run of a model in a process."""
        runs = (run for run in reversed(self.runs) if (run.process, run.spec.model) == (process, model))
        return next(runs, None)

    def has_died(self, run: ResidentRun) -> bool:
        """Return whether a run has died, or the one before has and this one is not ready."""
        if run.ready < math.inf:
            return run.died.is_set()
        key = run.process, run.spec.model
        before = [each for each in self.runs if (each.process, each.spec.model) == key and each is not run]
        return bool(before) and before[-1].died.is_set()

    def is_on_demand(self, model: str) -> bool:
        """Return whether a model is started on demand."""
        return any(spec.model == model for spec in self._plan.residents)

    # Who wants a model

    @contextmanager
    def wanting(self, models: tuple[str, ...], host: str) -> Iterator[None]:
        """Inside, a client or an operator on that machine wants these models."""
        wanted = [model for model in models if self.is_on_demand(model)]
        self._wanted.update(wanted)
        try:
            yield
        finally:
            self._wanted.subtract(wanted)
            for model in wanted:
                self._left.setdefault(model, []).append((self._history.now, host))

    def unwanted_since(self, model: str) -> float:
        """Return since when a model is wanted by no client and no operator; infinite if it is wanted."""
        if self._wanted[model]:
            return math.inf
        return max((at for at, _ in self._left.get(model, ())), default=0.0)

    def left_since(self, model: str, since: float) -> frozenset[str]:
        """Return the machines whose clients wanted a model, and left since that time."""
        return frozenset(host for at, host in self._left.get(model, ()) if at >= since)

    # The residents of one process

    async def serve(
        self, server: ClusterServer, name: str, process: int, over: trio.Event, ended: trio.Event
    ) -> None:
        """Run the residents of a process until it is over, and stop them then. A checkpoint.

        Args:
            server: of the process. The models are registered already.
            name: of its machine.
            process: its number.
            over: set when its node has ended.
            ended: set when its residents have ended, too.
        """
        try:
            async with trio.open_nursery() as nursery:
                for spec in self._plan.residents:
                    if spec.host == name:
                        tenancy = server.on_demand.add(
                            spec.model,
                            [spec.model],
                            partial(self._open, spec, process),
                            memory=spec.memory,
                            idle=spec.idle,
                            start_timeout=spec.start_timeout,
                        )
                        nursery.start_soon(server.on_demand.run, tenancy)
                await over.wait()
                nursery.cancel_scope.cancel(reason="the process ends")
        finally:
            ended.set()

    @asynccontextmanager
    async def _open(self, spec: ResidentSpec, process: int, report: Run) -> AsyncIterator[None]:
        key = spec.host, spec.model
        start = spec.starts[self._starts[key] % len(spec.starts)]
        self._starts[key] += 1
        run = ResidentRun(spec, process, self._history.now, lost=report)
        self.runs.append(run)
        self._history.log(f"{spec.host}: {spec.model} is started")
        try:
            await trio.sleep(_CALM_START if self.calm else start.seconds)
            if start.fails and not self.calm:
                raise ClusterError("the plan says so")
            run.ready = self._history.now
            self._history.log(f"{spec.host}: {spec.model} is ready")
            yield
        except ClusterError:
            self.record_failure(run)
            raise
        finally:
            run.stopping = self._history.now
            if run.ready == math.inf and run.stopping - run.began >= spec.start_timeout - _ROUNDING:
                self.record_failure(run)
            self._history.log(f"{spec.host}: {spec.model} is stopped")
            if process not in self.killed:
                with trio.CancelScope(shield=True):
                    await trio.sleep(spec.stop)
            run.ended = self._history.now
            self._history.log(f"{spec.host}: {spec.model} has ended")

    def let_die(self, run: ResidentRun) -> None:
        """Let a resident die that is ready. Synchronous."""
        run.died.set()
        self.record_failure(run)
        if run.lost is not None:
            run.lost.lost("the plan says so")

    def record_failure(self, run: ResidentRun) -> None:
        """Record that a run has failed, and for how long requests may fail for that reason, at most."""
        key = run.process, run.spec.model
        span = self._history.begin_fault(START_FAILED, replica_name(run.spec.host, run.spec.model))
        # From the end of what is left of it.
        span.ended = self._history.now + run.spec.stop + 2.0 ** self._failures[key]
        self._failures[key] += 1
