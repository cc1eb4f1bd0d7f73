"""The cluster that a schedule is played on: its processes, of which each machine has one after another.

:class:`Simulation` starts processes and knows which clients are active; the faults are injected by ``_nemesis``, and
``_invariants`` checks what both of them do.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import attrs
import trio

from ..errors import ClusterError
from ..server import ClusterServer
from ._cluster import SimulatedCluster, SimulatedNode, worker
from ._history import History
from ._limited_keys import LimitedKeys
from ._plan import MEMORY, Plan
from ._routing_watch import Openings, RoutingWatch
from ._scripted_models import ScriptedModels

__all__ = ["FIRST_PROBE", "MAX_IGNORED_CANCELLATION", "ProcessRun", "Simulation"]

#: The number of the first request that checks the recovered cluster.
FIRST_PROBE: Final = 10_000

#: Seconds for which a handler continues after it was cancelled, at most.
MAX_IGNORED_CANCELLATION: Final = 3.0
#: Answers of embedding models that a master has seen, and the seconds that they took. That pays for a few hedges.
_LESSONS: Final = 80
_USUAL: Final = 0.3
#: Seconds that a node may take to stop beyond the time that its calls have: last events, close handshakes.
_STOPPING: Final = 8.0


@attrs.define(eq=False)
class ProcessRun:
    """One process, from its start to its end. A machine has one at a time.

    Attributes:
        number: unique among all processes of the simulation.
        name: of its machine.
        server: the server that runs in it.
        node: the simulated process.
        killed: it was killed. Its tasks still end in the simulation, but no invariant applies to them.
        frozen_since: since when it is frozen, in seconds since the schedule began; infinite if it is not.
        residents_ended: set when its models on demand have ended, after the node.
    """

    number: int
    name: str
    server: ClusterServer
    node: SimulatedNode
    killed: bool = False
    frozen_since: float = math.inf
    residents_ended: trio.Event = attrs.field(factory=trio.Event)

    @property
    def frozen(self) -> bool:
        """Whether it is frozen at the moment."""
        return self.frozen_since < math.inf


class Simulation:
    """The cluster of a schedule.

    Args:
        plan: the plan of the schedule.
        cluster: the simulated cluster, whose master has ended.
        history: the log.
        models: the models of all nodes.
        scope: cancelled by :meth:`abort`.
        nursery: runs the models on demand.

    Attributes:
        plan: as given.
        cluster: as given.
        models: as given.
        current: the current process of each machine, by name.
        processes: all processes that have been started, the current ones included.
        openings: for each request, what it was opened for.
        active_clients: the machines of the clients that are waiting for a response, by the number of the request.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: SimulatedCluster,
        history: History,
        models: ScriptedModels,
        scope: trio.CancelScope,
        nursery: trio.Nursery,
    ) -> None:
        self.plan = plan
        self.cluster = cluster
        self.models = models
        self.current: dict[str, ProcessRun] = {}
        self.processes: list[ProcessRun] = []
        self.active_clients: dict[int, str] = {}
        self.openings: Openings = {}
        self._history = history
        self._scope = scope
        self._nursery = nursery
        self._numbers = itertools.count(1)

    def process(self, number: int) -> ProcessRun:
        """Return the process with this number."""
        return next(process for process in self.processes if process.number == number)

    def frozen_since(self, name: str) -> float:
        """Return since when the current process of a machine is frozen; infinite if it is not."""
        process = self.current.get(name)
        return math.inf if process is None else process.frozen_since

    def abort(self) -> None:
        """End the simulation at once. Synchronous."""
        self._scope.cancel(reason="the schedule cannot continue")

    async def start(self, name: str) -> None:
        """Start a process on the machine ``name``; for a master, wait until it serves. A checkpoint."""
        await self._start(name, take_over=False)

    async def take_over(self, name: str) -> str:
        """Let another process take the place of a master. A checkpoint.

        Returns:
            Why that has failed; empty if it has not.
        """
        try:
            await self._start(name, take_over=True)
        except ClusterError as error:
            return str(error)
        return ""

    def predecessors(self, name: str) -> list[ProcessRun]:
        """Return the processes of a machine that were replaced and have not ended."""
        return [
            process
            for process in self.processes
            if process.name == name
            and process is not self.current[name]
            and not (process.killed or process.node.over.is_set())
        ]

    async def _start(self, name: str, *, take_over: bool) -> None:
        # Drawn before the first checkpoint: several machines may start processes at the same time.
        number = next(self._numbers)
        options = self.plan.options | {"max_concurrency": self.plan.slots[name]}
        has_residents = any(spec.host == name for spec in self.plan.residents)
        if has_residents:
            options["memory"] = str(MEMORY)
        server = worker(name, **options)
        for model in self.plan.models:
            if name in model.hosts:
                self.register(server, model.name, name, number)
        if name in self.plan.masters:
            for model in self.plan.models:
                if model.kind == "embedding":
                    # A schedule has too few requests for it to learn this.
                    for _ in range(_LESSONS):
                        server.router.hedging.late_after(model.name)
                        server.router.hedging.record(model.name, _USUAL)
            server.router.observers.add(
                RoutingWatch(
                    name, server, self.plan, self._history, self.models, self.openings, self.frozen_since
                )
            )
            if self.plan.limited_keys:
                server.authenticator = LimitedKeys(FIRST_PROBE)
            node = await self.cluster.start_master(server, name=name, take_over=take_over)
        else:
            node = await self.cluster.start_worker(server, wait=False)
        process = ProcessRun(number, name, server, node)
        if has_residents:
            serve, ended = self.models.residents.serve, process.residents_ended
            self._nursery.start_soon(serve, server, name, number, node.over, ended)
        else:
            process.residents_ended.set()
        self.current[name] = process
        self.processes.append(process)
        self._history.log(f"{name} starts process {number}")

    def register(self, server: ClusterServer, model_name: str, node: str, process: int) -> None:
        """Register a model of the plan on the server of a process."""
        model = next(model for model in self.plan.models if model.name == model_name)
        register: Any = getattr(server, f"register_{model.kind}")
        more = {"hedge": True} if model.kind == "embedding" else {}
        register(model_name, self.models.handler(model, node, process), **more)

    @property
    def stopping_time(self) -> float:
        """Seconds within which a node that is asked to stop has ended."""
        return (
            float(self.plan.options["drain_timeout"])
            + _STOPPING
            + MAX_IGNORED_CANCELLATION
            + self.plan.longest_delay * 4
        )
