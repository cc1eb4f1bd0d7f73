"""Random schedules: a cluster, its clients and many faults, all drawn from one seed, and the invariants that must hold.

:func:`run_schedule` draws a plan from a seed, plays it on a simulated cluster, and checks the invariants at every turn
of the event loop. When all faults are over it checks that the cluster has recovered: every worker is connected, every
slot can be used, nothing is left over.

Everything follows from the seed: the plan, trio's choice of which task runs first, the backoff before reconnecting. So
a schedule that failed fails again, and its log is the same to the last byte.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import trio
import trio.testing

from ..gateway.body import SpooledBody
from ..routing.policy import LeastBusy
from ._cluster import PORT, open_cluster
from ._history import History
from ._invariants import Invariants
from ._nemesis import Nemesis
from ._plan import ModelSpec, Plan, SimulatedRequest, draw_plan
from ._quiescence import OrphansLeft, assert_no_orphans
from ._scripted_models import ScriptedModels
from ._scripted_residents import ScriptedResidents
from ._scripts import Script, ScriptedFailure
from ._seed import seeded
from ._simulation import FIRST_PROBE, Simulation
from ._workload import Outcome, send_request

__all__ = ["ScheduleFailed", "ScheduleReport", "run_schedule"]

#: Lines of the log that a failure shows.
_TAIL: Final = 60

#: Seconds within which a cluster has recovered when the last fault is over; a worker reconnects within 30.
_RECOVERY_TIME: Final = 60.0


@attrs.frozen
class ScheduleReport:
    """What happened in a schedule.

    Attributes:
        seed: what it was drawn from.
        simulated: seconds that passed in it.
        real: seconds that it took to play.
        requests: how many requests there were.
        outcomes: how they ended, and how often.
        faults: the faults that were injected, and how often.
        log: every line of the log, in the order of time.
        digest: a hash of the log.
    """

    seed: int
    simulated: float
    real: float
    requests: int
    outcomes: Counter[str]
    faults: Counter[str]
    log: tuple[str, ...] = attrs.field(repr=False)
    digest: str


class ScheduleFailed(AssertionError):
    """An invariant was violated. The message says which, and how to replay the schedule.

    Attributes:
        seed: the schedule's.
        violations: what was wrong, in the order in which it was found.
        log: every line of the log, in the order of time.
    """

    def __init__(self, seed: int, violations: list[str], log: list[str]) -> None:
        self.seed = seed
        self.violations = tuple(violations)
        self.log = tuple(log)
        broken = "\n".join(f"  {violation}" for violation in violations[:20])
        tail = "\n".join(f"  {line[:240]}" for line in log[-_TAIL:])
        super().__init__(
            f"schedule {seed} violated {len(violations)} invariants:\n{broken}\nthe end of its log:\n{tail}\n"
            f"to replay it with the whole log: python -m trio_cluster.testing {seed} --log"
        )


def run_schedule(seed: int, *, seconds: float = 30.0, requests: int = 60, faults: int = 16) -> ScheduleReport:
    """Play the schedule of a seed. Synchronous: runs an event loop of its own, on a virtual clock of its own.

    Args:
        seed: what everything follows from, together with the other arguments.
        seconds: for how long requests and faults begin; the simulated time is longer, until the cluster has recovered.
        requests: how many requests there are.
        faults: how many faults there are at most.

    Returns:
        What happened, if all invariants held.

    Raises:
        ScheduleFailed: an invariant was violated, or the simulation itself failed.
        RuntimeError: the scheduler of this version of trio cannot be seeded.
    """
    plan = draw_plan(seed, seconds=seconds, requests=requests, faults=faults)
    history = History(ScriptedFailure)
    began = time.perf_counter()
    with seeded(seed), _recording_logs(history), _without_threads():
        try:
            clock = trio.testing.MockClock(autojump_threshold=0)
            outcomes, simulated = trio.run(_play, plan, history, clock=clock)
        except Exception as error:
            # Whatever failed, the log before it explains it.
            violations = [*history.violations, f"the simulation itself failed: {error!r}"]
            raise ScheduleFailed(seed, violations, history.lines) from error
    if history.violations:
        raise ScheduleFailed(seed, history.violations, history.lines)
    return ScheduleReport(
        seed=seed,
        simulated=simulated,
        real=time.perf_counter() - began,
        requests=len(outcomes),
        outcomes=Counter(outcome.verdict for outcome in outcomes),
        faults=history.fault_counts,
        log=tuple(history.lines),
        digest=history.digest,
    )


@attrs.frozen
class _Run:
    """The parts of a schedule that is being played."""

    plan: Plan
    history: History
    models: ScriptedModels
    simulation: Simulation
    invariants: Invariants


async def _play(plan: Plan, history: History) -> tuple[list[Outcome], float]:
    history.start()
    models = ScriptedModels(history, ScriptedResidents(plan, history))
    outcomes: list[Outcome] = []
    with trio.CancelScope() as scope:
        async with (
            # As on the command line, models on demand outlive their node.
            trio.open_nursery() as residents,
            open_cluster(latency=plan.latency, fast_path=plan.fast_path, **plan.options) as cluster,
        ):
            # The master that was opened with the cluster has no models.
            cluster.master.kill()
            await cluster.master.over.wait()
            simulation = Simulation(plan, cluster, history, models, scope, residents)
            invariants = Invariants(plan, simulation, history, models)
            nemesis = Nemesis(simulation, history)
            run = _Run(plan, history, models, simulation, invariants)
            trio.lowlevel.add_instrument(invariants)
            for name in plan.slots:
                await simulation.start(name)
            await _wait_for_recovery(run)
            async with trio.open_nursery() as nursery:
                for fault in plan.faults:
                    nursery.start_soon(_at, fault.at, nemesis.inject, fault)
                for request in plan.requests:
                    nursery.start_soon(_at, request.at, _run_request, run, request, outcomes)
            await _wait_for_recovery(run)
            invariants.check_runs(outcomes)
            invariants.check_stories(outcomes)
            if not history.violations:
                await _probe(run)
            trio.lowlevel.remove_instrument(invariants)
            for process in simulation.processes:
                if process.node.error is not None:
                    history.add_violation(
                        f"{process.name}, process {process.number}, failed: {process.node.error!r}"
                    )
    return outcomes, history.now


async def _at(when: float, function: Any, *args: Any) -> None:
    await trio.sleep(when)
    await function(*args)


async def _run_request(run: _Run, request: SimulatedRequest, outcomes: list[Outcome]) -> None:
    run.simulation.active_clients[request.number] = request.host
    run.history.log(f"client {request.number} sends a request to {request.asked}, and {request.behavior}")
    bound = run.invariants.bound(request)
    with run.models.residents.wanting(request.models, request.host):
        outcome = await send_request(request, run.simulation.cluster.network, run.history, PORT, bound)
    del run.simulation.active_clients[request.number]
    run.invariants.check_outcome(outcome)
    outcomes.append(outcome)


async def _wait_for_recovery(run: _Run) -> None:
    """Wait until the cluster is whole and quiescent; that this happens in time is an invariant, too."""
    bound = _RECOVERY_TIME + 2 * float(run.plan.options["worker_timeout"])
    pause = 0.01
    # The last fault must have had its effect before the cluster can be said to have recovered from it.
    await trio.sleep(run.invariants.reaction_time)
    with trio.move_on_after(bound):
        while run.invariants.missing() or _orphans(run.simulation):
            await trio.sleep(pause)
            pause = min(2 * pause, 1.0)
        return
    for wrong in [*run.invariants.missing(), *_orphans(run.simulation)]:
        run.history.add_violation(f"not recovered {bound:.0f} s after the last fault: {wrong}")


async def _wait_for_ejections(simulation: Simulation) -> None:
    """Wait until each replica that is left alone is to be tried with the next request."""
    masters = [simulation.current[name] for name in simulation.plan.masters]
    ejected = [each.server.router.ejections.table.ejected for each in masters]
    ends = [record.until for table in ejected for record in table.values() if record.until is not None]
    await trio.sleep_until(max(ends, default=-math.inf))


async def _wait_for_retries(simulation: Simulation) -> None:
    """Wait until each model on demand that has failed may be started again."""
    for process in simulation.current.values():
        for resident in process.server.on_demand.schedule.residents:
            await trio.sleep_until(resident.retry_at)


def _orphans(simulation: Simulation) -> list[str]:
    try:
        assert_no_orphans(simulation.cluster)
    except OrphansLeft as left:
        return left.orphans
    return []


async def _probe(run: _Run) -> None:
    """Send each node as many requests at once as it has slots, then each model one request after another."""
    plan, history, models = run.plan, run.history, run.models
    models.residents.calm = True
    await _wait_for_retries(run.simulation)
    await _wait_for_ejections(run.simulation)
    numbers = itertools.count(FIRST_PROBE)
    outcomes: list[Outcome] = []

    async def ask(model: ModelSpec) -> None:
        single = model.kind in ("embedding", "image_generation")
        script = Script(next(numbers), model.kind, pieces=1 if single else 5, first_after=0.5)
        request = SimulatedRequest(0.0, model.name, script, stream=model.kind in ("chat", "asr"))
        await _run_request(run, request, outcomes)

    for model in plan.models:
        if model.name == f"only-{model.hosts[0]}":
            node, slots = model.hosts[0], plan.slots[model.hosts[0]]
            models.peak.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(slots):
                    nursery.start_soon(ask, model)
            if models.peak.get(node, 0) != slots:
                history.add_violation(
                    f"{node} has {slots} slots, and ran {models.peak.get(node, 0)} handlers"
                )
        else:
            # Every replica is to be asked, however fast it was.
            run.simulation.current["master"].server.router.policy = LeastBusy()
            for _ in model.hosts:
                await ask(model)
            served = {each.node for each in models.runs[-len(model.hosts) :]}
            if served != set(model.hosts):
                history.add_violation(
                    f"{model.name} is answered by {sorted(served)}, not by {sorted(model.hosts)}"
                )
    run.invariants.check_runs(outcomes)
    for outcome in outcomes:
        if outcome.verdict not in ("complete", "stream finished"):
            history.add_violation(f"{outcome.request.model} answers with {outcome.verdict} after recovery")
    await _wait_for_recovery(run)
    run.invariants.check_stories(outcomes)


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Access the disk without threads: when a thread ends does not follow from the seed."""

    async def at_once(self: SpooledBody, work: Callable[[bytes], bytes], data: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return work(data)

    in_thread = SpooledBody.in_thread
    SpooledBody.in_thread = at_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpooledBody.in_thread = in_thread  # type: ignore[method-assign]


@contextlib.contextmanager
def _recording_logs(history: History) -> Iterator[None]:
    """Add what the nodes log to the history."""
    root, package = logging.getLogger(), logging.getLogger("trio_cluster")
    level = package.level
    root.addHandler(history)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        root.removeHandler(history)
