"""The cluster of a schedule, and everything that a plan can do to it.

Faults of different kinds may overlap as they like; two of one kind on one target may not, and the second is left out.
Each fault sees to its own end: what was killed is started again, what was cut off is healed. So when all have run,
the cluster is whole again, and must soon behave so.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import trio

from ..server import ClusterServer
from ._actors import Actors
from ._cluster import SimulatedCluster, SimulatedNode, worker
from ._history import History, Trouble
from ._network import Connection
from ._plan import Fault, Plan
from ._scripts import MARGIN

__all__ = ["LONGEST_CLING", "Life", "Stage"]

#: Seconds for which a handler goes on after it was cancelled, at most.
LONGEST_CLING: Final = 3.0
#: Seconds that a node may take to stop beyond the time that its requests have: last words, goodbyes.
_STOPPING: Final = 8.0

#: What counts as much that is under way, in bytes, and for how many seconds to wait for it.
_MUCH: Final = 20_000
_PATIENCE: Final = 3.0
_LOOK: Final = 0.005
#: How often a request that is pursued loses its worker, at most.
_PURSUITS: Final = 3

_PROCESS_FAULTS: Final = frozenset({"killed", "stopped", "drained", "frozen"})


@attrs.define(eq=False)
class Life:
    """One process: from its start to its end, a node of one name has one at a time.

    Attributes:
        number: each life has another one.
        name: of its node.
        server: what runs.
        node: the process.
        killed: it was; what is left of it in the simulation is a ghost, to which no law applies.
        frozen: it is, at the moment.
    """

    number: int
    name: str
    server: ClusterServer
    node: SimulatedNode
    killed: bool = False
    frozen: bool = False


class Stage:
    """A cluster that a plan is played on.

    Attributes:
        cluster: the cluster.
        lives: the current life of each node, by name.
        past: all lives, the current ones included.
        active: the clients that are at work, by number.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: SimulatedCluster,
        history: History,
        actors: Actors,
        scope: trio.CancelScope,
    ) -> None:
        self.plan = plan
        self.cluster = cluster
        self.lives: dict[str, Life] = {}
        self.past: list[Life] = []
        self._numbers = itertools.count(1)
        self.active: dict[int, str] = {}
        self._history = history
        self._actors = actors
        self._current: set[tuple[str, str]] = set()
        self._scope = scope

    def life(self, number: int) -> Life:
        """Return the life of a number."""
        return next(life for life in self.past if life.number == number)

    def give_up(self) -> None:
        """Break the play off."""
        self._scope.cancel(reason="the schedule cannot go on")

    async def start(self, name: str) -> None:
        """Start a process on the machine ``name``."""
        # Others may be starting at the same time.
        number = next(self._numbers)
        options = self.plan.options | {"max_concurrency": self.plan.slots[name]}
        server = worker(name, **options)
        for model in self.plan.models:
            if name in model.hosts:
                self._register(server, model.name, name, number)
        if name == "master":
            node = await self.cluster.start_master(server)
        else:
            node = await self.cluster.start_worker(server, wait=False)
        life = Life(number, name, server, node)
        self.lives[name] = life
        self.past.append(life)
        self._history.note(f"{name} begins its life {number}")

    async def run(self, fault: Fault) -> None:
        """Do what ``fault`` says, and undo it when it has lasted."""
        words = fault.kind.split()
        # A process can be in the middle of one fate only.
        kind = "process" if words[-1] in _PROCESS_FAULTS else fault.kind
        target = fault.target or f"pick {fault.pick}"
        if (kind, target) in self._current:
            return
        self._current.add((kind, target))
        try:
            await self._player(fault)(fault)
        finally:
            self._current.discard((kind, target))

    def _player(self, fault: Fault) -> Callable[[Fault], Awaitable[None]]:
        match fault.kind:
            case "worker killed" | "master killed":
                return self._kill
            case "worker stopped" | "master stopped":
                return self._stop
            case "worker drained":
                return self._drain
            case "worker frozen" | "master frozen":
                return self._freeze
            case "worker cut off" | "client cut off":
                return self._cut_off
            case "model taken back":
                return self._take_back
            case "slots changed":
                return self._change_slots
            case "call cancelled":
                return self._cancel_call
            case "call pursued":
                return self._pursue
            case _:
                return self._hurt_connection

    # Processes

    async def _kill(self, fault: Fault) -> None:
        if fault.target != "master":
            await _wait_for_traffic(fault, self.lives[fault.target].node.link)
        life = self.lives[fault.target]
        async with self._trouble(fault, life.name):
            life.killed = True
            life.node.kill()
            await trio.sleep(fault.lasts)
            # What is left of it holds no port, but it would close the one that its successor has.
            await self._await_end(life, LONGEST_CLING + MARGIN)
            await self.start(life.name)

    async def _stop(self, fault: Fault) -> None:
        life = self.lives[fault.target]
        async with self._trouble(fault, life.name):
            life.node.stop()
            await self._await_end(life, self.stopping_time)
            await trio.sleep(fault.lasts)
            await self.start(life.name)

    async def _drain(self, fault: Fault) -> None:
        life = self.lives[fault.target]
        async with self._trouble(fault, life.name):
            status = await self._operate(f"/cluster/workers/{life.name}/drain")
            if status == 202:
                with trio.move_on_after(self.stopping_time):
                    await life.node.over.wait()
            # The order may have been lost with the link.
            life.node.stop()
            await self._await_end(life, self.stopping_time)
            await trio.sleep(fault.lasts)
            await self.start(life.name)

    async def _freeze(self, fault: Fault) -> None:
        life = self.lives[fault.target]
        async with self._trouble(fault, life.name):
            life.node.freeze()
            life.frozen = True
            await trio.sleep(fault.lasts)
            life.frozen = False
            life.node.thaw()

    async def _await_end(self, life: Life, bound: float) -> None:
        with trio.move_on_after(bound):
            await life.node.over.wait()
        if not life.node.over.is_set():
            self._history.violate(f"{life.name} was to end, and goes on after {bound:.1f} s")
            await life.node.over.wait()

    @property
    def stopping_time(self) -> float:
        """Seconds within which a node has stopped that was asked to."""
        return (
            float(self.plan.options["drain_timeout"])
            + _STOPPING
            + LONGEST_CLING
            + self.plan.longest_delay * 4
        )

    # Connections

    async def _cut_off(self, fault: Fault) -> None:
        host = fault.target or self._pick_client(fault)
        if host is None:
            return
        async with self._trouble(fault, host):
            self.cluster.network.partition(host, "master")
            await trio.sleep(fault.lasts)
            self.cluster.network.heal(host, "master")

    async def _hurt_connection(self, fault: Fault) -> None:
        host = fault.target or self._pick_client(fault)
        connections = [] if host is None else self.cluster.network.connections_of(host)
        if host is None or not connections:
            return
        connection = connections[-1]
        await _wait_for_traffic(fault, connection)
        match fault.kind.split()[-1]:
            case "cut":
                self._history.flash(fault.kind, host)
                connection.cut()
            case "reset":
                self._history.flash(fault.kind, host)
                connection.reset()
            case "delayed":
                await self._change(fault, host, lambda: connection.delay(fault.amount),
                                   lambda: connection.delay(self.plan.latency))  # fmt: skip
            case _:
                await self._change(fault, host, *_partition(connection))

    async def _change(
        self, fault: Fault, host: str, do: Callable[[], None], undo: Callable[[], None]
    ) -> None:
        async with self._trouble(fault, host):
            do()
            await trio.sleep(fault.lasts)
            undo()

    def _pick_client(self, fault: Fault) -> str | None:
        hosts = list(self.active.values())
        return hosts[fault.pick % len(hosts)] if hosts else None

    # What operators and programs do

    async def _take_back(self, fault: Fault) -> None:
        life = self.lives[fault.target]
        names = sorted(model.name for model in self.plan.models if life.name in model.hosts)
        name = names[fault.pick % len(names)]
        async with self._trouble(fault, life.name):
            life.server.unregister_model(name)
            await trio.sleep(fault.lasts)
            if not life.server.has_model(name):
                self._register(life.server, name, life.name, life.number)

    async def _change_slots(self, fault: Fault) -> None:
        life = self.lives[fault.target]
        async with self._trouble(fault, life.name):
            life.server.set_max_concurrency(int(fault.amount))
            await trio.sleep(fault.lasts)
            life.server.set_max_concurrency(self.plan.slots[life.name])

    async def _cancel_call(self, fault: Fault) -> None:
        host = self._pick_client(fault)
        if host is not None:
            self._history.flash(fault.kind, host)
            await self._operate(f"/cluster/calls/r{host.removeprefix('client-')}/cancel")

    async def _pursue(self, fault: Fault) -> None:
        """Break the link of whichever worker begins with one request, wherever it is opened again."""
        host = self._pick_client(fault)
        if host is None:
            return
        self._history.faults[fault.kind] += 1
        number, seen = int(host.removeprefix("client-")), 0
        with trio.move_on_after(_PATIENCE):
            for _ in range(fault.pick // 2 % _PURSUITS + 1):
                while len(runs := self._actors.runs_of(number)) <= seen:  # noqa: ASYNC110  (nobody tells it)
                    await trio.sleep(_LOOK)
                seen, node = len(runs), runs[-1].node
                if node == "master":
                    return
                link = self.lives[node].node.link
                if fault.pick % 2:
                    await trio.sleep(fault.amount)
                else:
                    await _wait_for_traffic(fault, link)
                self._history.flash("link reset", node)
                link.reset()

    async def _operate(self, path: str) -> int:
        """Ask the master to do something, and return the status of its answer; 0 if there was none."""
        with trio.move_on_after(5):
            try:
                return (await self.cluster.client("operator").post(path, {})).status
            except OSError:
                pass
        return 0

    # For all of these

    @asynccontextmanager
    async def _trouble(self, fault: Fault, *hosts: str) -> AsyncIterator[Trouble]:
        trouble = self._history.begin(fault.kind, *hosts)
        try:
            yield trouble
        finally:
            self._history.end(trouble)

    def _register(self, server: ClusterServer, name: str, node: str, life: int) -> None:
        model = next(model for model in self.plan.models if model.name == name)
        register: Any = getattr(server, f"register_{model.kind}")
        register(name, self._actors.handler(model, node, life))


async def _wait_for_traffic(fault: Fault, connection: Connection) -> None:
    """Let every other fault wait for a moment in which much is under way, to fall into the middle of an answer."""
    if fault.pick % 2:
        return
    with trio.move_on_after(_PATIENCE):
        while connection.waiting_bytes < _MUCH:  # noqa: ASYNC110  (nobody tells it)
            await trio.sleep(_LOOK)


def _partition(connection: Connection) -> tuple[Callable[[], None], Callable[[], None]]:
    return connection.partition, connection.heal
