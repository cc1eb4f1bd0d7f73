"""The nemesis: injects the faults of a plan into the simulated cluster.

Faults of different kinds may overlap as they like. Two of one kind on one target may not, and the second is skipped.
Each fault ends itself: a killed process is started again, a partition is healed. So when all faults have run, the
cluster is whole again, and must soon behave so.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from ._history import FaultSpan, History
from ._network import Connection
from ._plan import Fault, ResidentSpec, replica_name, take_over_name
from ._scripted_models import Trouble
from ._scripts import MARGIN
from ._simulation import MAX_IGNORED_CANCELLATION, ProcessRun, Simulation

__all__ = ["Nemesis"]

#: A fault that is to fall into the middle of a transfer waits until this many bytes are under way, and for how many
#: seconds at most.
_TRANSFER_BYTES: Final = 20_000
_TRANSFER_WAIT: Final = 3.0
_POLL_INTERVAL: Final = 0.005
#: Seconds after which a worker that has lost its master is back.
_RETURN: Final = 5.0
#: How often one request loses its worker to "failover broken", at most.
_MAX_BROKEN_FAILOVERS: Final = 3

_PROCESS_FAULTS: Final = frozenset({"killed", "stopped", "drained", "frozen", "replaced"})


class Nemesis:
    """Injects faults.

    Args:
        simulation: the cluster to break.
        history: where faults are recorded.
    """

    def __init__(self, simulation: Simulation, history: History) -> None:
        self._simulation = simulation
        self._network = simulation.cluster.network
        self._history = history
        self._current: set[tuple[str, str]] = set()

    async def inject(self, fault: Fault) -> None:
        """Inject a fault, and repair what it broke when it has lasted. A checkpoint, unless the fault is skipped."""
        words = fault.kind.split()
        # A process has one of these faults at a time, whichever it is.
        kind = "process" if words[-1] in _PROCESS_FAULTS else fault.kind
        target = fault.target or f"choice {fault.choice}"
        if (kind, target) in self._current:
            return
        self._current.add((kind, target))
        try:
            await self._injection(fault)(fault)
        finally:
            self._current.discard((kind, target))

    def _injection(self, fault: Fault) -> Callable[[Fault], Awaitable[None]]:
        match fault.kind:
            case "worker killed" | "master killed":
                return self._kill
            case "worker stopped" | "master stopped":
                return self._stop
            case "master replaced":
                return self._replace
            case "worker drained":
                return self._drain
            case "worker frozen" | "master frozen":
                return self._freeze
            case "worker partitioned" | "client partitioned":
                return self._partition_host
            case "resident died":
                return self._let_die
            case "resident unloaded" | "resident loaded":
                return self._load_or_unload
            case "model unregistered":
                return self._unregister
            case "slots changed":
                return self._change_slots
            case "call cancelled":
                return self._cancel_call
            case "failover broken":
                return self._break_failover
            case "replica failing" | "replica stuck":
                return self._trouble
            case _:
                return self._break_connection

    # Processes

    async def _kill(self, fault: Fault) -> None:
        if fault.target not in self._simulation.plan.masters:
            await _wait_for_transfer(fault, self._simulation.current[fault.target].node.link)
        process = self._simulation.current[fault.target]
        async with self._recorded(fault, process.name):
            # With a process that was replaced, and would have finished its requests: the machine is one.
            processes = [process, *self._simulation.predecessors(process.name)]
            for each in processes:
                each.killed = True
                self._simulation.models.residents.killed.add(each.number)
                each.node.kill()
            await trio.sleep(fault.duration)
            # The remaining tasks of a killed process hold no port, but they would close the port of its successor.
            for each in processes:
                await self._await_end(each, MAX_IGNORED_CANCELLATION + MARGIN)
            await self._simulation.start(process.name)

    async def _stop(self, fault: Fault) -> None:
        process = self._simulation.current[fault.target]
        async with self._recorded(fault, process.name):
            process.node.stop()
            await self._await_end(process, self._simulation.stopping_time)
            await trio.sleep(fault.duration)
            await self._simulation.start(process.name)

    async def _replace(self, fault: Fault) -> None:
        """Let another process take the place of a master."""
        place = take_over_name(fault.target)
        began = self._history.now
        async with self._recorded(fault, place):
            why = await self._simulation.take_over(fault.target)
        if not why:
            return
        # Without a worker that joins it, the new process does not serve.
        workers = self._simulation.plan.workers
        since = began - float(self._simulation.plan.options["worker_timeout"]) - _RETURN
        if not all(self._history.faults_on(frozenset([name]), since, self._history.now) for name in workers):
            self._history.add_violation(f"{fault.target} could not be replaced: {why}")

    async def _drain(self, fault: Fault) -> None:
        process = self._simulation.current[fault.target]
        async with self._recorded(fault, process.name):
            status = await self._post_to_master(f"/cluster/workers/{process.name}/drain")
            if status == 202:
                with trio.move_on_after(self._simulation.stopping_time):
                    await process.node.over.wait()
            # The message that asks it to drain may have been lost with the link.
            process.node.stop()
            await self._await_end(process, self._simulation.stopping_time)
            await trio.sleep(fault.duration)
            await self._simulation.start(process.name)

    async def _freeze(self, fault: Fault) -> None:
        process = self._simulation.current[fault.target]
        async with self._recorded(fault, process.name):
            process.node.freeze()
            process.frozen_since = self._history.now
            await trio.sleep(fault.duration)
            process.frozen_since = math.inf
            process.node.thaw()

    async def _await_end(self, process: ProcessRun, bound: float) -> None:
        with trio.move_on_after(bound):
            await process.node.over.wait()
        if not process.node.over.is_set():
            self._history.add_violation(
                f"{process.name} should have ended, and still runs after {bound:.1f} s"
            )
            await process.node.over.wait()
        residents = self._simulation.plan.residents
        with trio.move_on_after(max((spec.stop for spec in residents), default=0.0) + MARGIN):
            await process.residents_ended.wait()
        if not process.residents_ended.is_set():
            self._history.add_violation(f"{process.name} has ended, and its models on demand have not")
            await process.residents_ended.wait()

    # Connections

    async def _partition_host(self, fault: Fault) -> None:
        host = fault.target or self._choose_client(fault)
        if host is None:
            return
        masters = self._simulation.plan.masters
        master = masters[fault.choice % len(masters)] if fault.target else self._master_of(host)
        async with self._recorded(fault, host):
            self._network.partition(host, master)
            await trio.sleep(fault.duration)
            self._network.heal(host, master)

    async def _break_connection(self, fault: Fault) -> None:
        host = fault.target or self._choose_client(fault)
        connections = [] if host is None else self._network.connections_of(host)
        if host is None or not connections:
            return
        connection = connections[-1]
        await _wait_for_transfer(fault, connection)
        match fault.kind.split()[-1]:
            case "cut":
                self._history.record_instant(fault.kind, host)
                connection.cut()
            case "reset":
                self._history.record_instant(fault.kind, host)
                connection.reset()
            case "delayed":
                async with self._recorded(fault, host):
                    connection.delay(fault.amount)
                    await trio.sleep(fault.duration)
                    connection.delay(self._simulation.plan.latency)
            case _:
                async with self._recorded(fault, host):
                    connection.partition()
                    await trio.sleep(fault.duration)
                    connection.heal()

    def _choose_client(self, fault: Fault) -> str | None:
        hosts = list(self._simulation.active_clients.values())
        return hosts[fault.choice % len(hosts)] if hosts else None

    # Actions of operators and programs

    async def _unregister(self, fault: Fault) -> None:
        process = self._simulation.current[fault.target]
        on_demand = {spec.model for spec in self._simulation.plan.residents}
        names = sorted(
            model.name
            for model in self._simulation.plan.models
            if process.name in model.hosts and model.name not in on_demand
        )
        name = names[fault.choice % len(names)]
        async with self._recorded(fault, process.name):
            process.server.unregister_model(name)
            await trio.sleep(fault.duration)
            if not process.server.has_model(name):
                self._simulation.register(process.server, name, process.name, process.number)

    async def _change_slots(self, fault: Fault) -> None:
        process = self._simulation.current[fault.target]
        async with self._recorded(fault, process.name):
            process.server.set_max_concurrency(int(fault.amount))
            await trio.sleep(fault.duration)
            process.server.set_max_concurrency(self._simulation.plan.slots[process.name])

    async def _trouble(self, fault: Fault) -> None:
        """Let one replica fail a few times, or hang, whatever it is asked."""
        plan, troubles = self._simulation.plan, self._simulation.models.troubles
        names = [model.name for model in plan.models if len(model.hosts) > 1 and fault.target in model.hosts]
        # Half of the troubles are those of a model with two replicas, to which most requests go.
        name = "twice" if "twice" in names and fault.choice % 2 else names[fault.choice // 2 % len(names)]
        key = fault.target, name
        if key in troubles:
            return
        stuck = fault.kind == "replica stuck"
        # A refusal is no failure, however often it is given.
        status = (500, 502, 503, 429)[fault.choice // 8 % 4]
        # Only the replica is at fault, and not the machine: no other invariant is to excuse anything by it.
        async with self._recorded(fault, replica_name(*key)):
            troubles[key] = Trouble(None if stuck else 1 + fault.choice // 32 % 8, status, fault.amount)
            await trio.sleep(fault.duration)
            del troubles[key]

    async def _let_die(self, fault: Fault) -> None:
        """Let a model on demand die while it answers, or what is ready if none does so in time."""
        models, current = self._simulation.models, self._simulation.current
        spec = self._chosen_resident(fault)
        with trio.move_on_after(_TRANSFER_WAIT):
            while not models.handlers_on(current[fault.target].number, spec.model):  # noqa: ASYNC110  (no event)
                await trio.sleep(_POLL_INTERVAL)
        await trio.sleep(fault.amount)
        run = models.residents.run_of(current[fault.target].number, spec.model)
        if run is not None and run.is_ready:
            self._history.record_instant(fault.kind, replica_name(fault.target, spec.model))
            models.residents.let_die(run)

    async def _load_or_unload(self, fault: Fault) -> None:
        spec, master = self._chosen_resident(fault), self._simulation.plan.masters[0]
        action = fault.kind.split()[-1].removesuffix("ed")
        self._history.record_instant(fault.kind, replica_name(fault.target, spec.model))
        if action == "unload":
            await self._post_to_master(f"/cluster/models/{spec.model}/unload", master)
            return
        with self._simulation.models.residents.wanting((spec.model,), "operator"):
            await self._post_to_master(f"/cluster/models/{spec.model}/load", master, fault.duration)

    def _chosen_resident(self, fault: Fault) -> ResidentSpec:
        residents = self._simulation.plan.residents
        return residents[fault.choice % len(residents)]

    async def _cancel_call(self, fault: Fault) -> None:
        host = self._choose_client(fault)
        if host is not None:
            self._history.record_instant(fault.kind, host)
            number = host.removeprefix("client-")
            await self._post_to_master(f"/cluster/calls/r{number}/cancel", self._master_of(host))

    async def _break_failover(self, fault: Fault) -> None:
        """Reset the link of the worker that runs one request, and again wherever the request is retried."""
        host = self._choose_client(fault)
        if host is None:
            return
        self._history.fault_counts[fault.kind] += 1
        number, seen = int(host.removeprefix("client-")), 0
        runs_of = self._simulation.models.runs_of
        with trio.move_on_after(_TRANSFER_WAIT):
            for _ in range(fault.choice // 2 % _MAX_BROKEN_FAILOVERS + 1):
                while len(runs := runs_of(number)) <= seen:  # noqa: ASYNC110  (there is no event for it)
                    await trio.sleep(_POLL_INTERVAL)
                seen, node = len(runs), runs[-1].node
                if node in self._simulation.plan.masters:
                    return
                link = self._simulation.current[node].node.link_to(self._master_of(host))
                if fault.choice % 2:
                    await trio.sleep(fault.amount)
                else:
                    await _wait_for_transfer(fault, link)
                self._history.record_instant("link reset", node)
                link.reset()

    def _master_of(self, client: str) -> str:
        """Return the master that a client asks."""
        number = int(client.removeprefix("client-"))
        for request in self._simulation.plan.requests:
            if request.number == number:
                return request.master
        return "master"

    async def _post_to_master(self, path: str, master: str = "master", patience: float = 5.0) -> int:
        """Send an operator's request to a master, and return the status of the response; 0 if there was none."""
        with trio.move_on_after(patience):
            try:
                return (await self._simulation.cluster.client("operator", of=master).post(path, {})).status
            except OSError:
                pass
        return 0

    @asynccontextmanager
    async def _recorded(self, fault: Fault, *hosts: str) -> AsyncIterator[FaultSpan]:
        span = self._history.begin_fault(fault.kind, *hosts)
        try:
            yield span
        finally:
            self._history.end_fault(span)


async def _wait_for_transfer(fault: Fault, connection: Connection) -> None:
    """Let every other fault wait for a moment with many bytes under way, to fall into the middle of a response."""
    if fault.choice % 2:
        return
    with trio.move_on_after(_TRANSFER_WAIT):
        while connection.waiting_bytes < _TRANSFER_BYTES:  # noqa: ASYNC110  (there is no event for it)
            await trio.sleep(_POLL_INTERVAL)
