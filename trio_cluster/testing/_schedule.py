"""Random schedules: a cluster, its clients and a hail of faults, all from one seed, and the laws that must hold.

:func:`run_schedule` draws a plan from a seed, plays it on a simulated cluster, checks all the while what can be checked
all the while, then lets the weather clear up and checks that everything is as it should be: every worker is back,
every slot can be used, nothing is left over.

Everything follows from the seed: the plan, trio's choice of which task runs first, the pauses between attempts to
reconnect. So a schedule that failed fails again, and its log is the same to the last byte.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import trio
import trio.testing

from ..gateway.body import SpooledBody
from ._actors import Actors
from ._cluster import PORT, open_cluster
from ._errands import Outcome, run_errand
from ._history import History
from ._laws import Laws
from ._plan import Errand, Model, Plan, draw_plan
from ._rest import OrphansLeft, assert_no_orphans
from ._scripts import Script, ScriptedFailure
from ._seed import seeded
from ._stage import Stage

__all__ = ["ScheduleFailed", "ScheduleReport", "run_schedule"]

#: Lines of the log that a failure shows.
_TAIL: Final = 60

#: Seconds within which a cluster is well again when the last fault is over; a worker dials again within 30.
_WELL: Final = 60.0

#: The number of the first request that asks whether all is well again.
_PROBES: Final = 10_000


@attrs.frozen
class ScheduleReport:
    """What happened in a schedule.

    Attributes:
        seed: what it followed from.
        simulated: seconds that passed in it.
        real: seconds that it took.
        requests: how many requests there were.
        outcomes: how they ended, and how often.
        faults: what was done to the cluster, and how often.
        log: every line of what happened, in the order of time.
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
    """A law did not hold. The message says which, and how to see it again.

    Attributes:
        seed: the schedule's.
        violations: what was wrong, in the order in which it was seen.
        log: every line of what happened.
    """

    def __init__(self, seed: int, violations: list[str], log: list[str]) -> None:
        self.seed = seed
        self.violations = tuple(violations)
        self.log = tuple(log)
        broken = "\n".join(f"  {violation}" for violation in violations[:20])
        tail = "\n".join(f"  {line[:240]}" for line in log[-_TAIL:])
        super().__init__(
            f"schedule {seed} broke {len(violations)} laws:\n{broken}\nthe end of its log:\n{tail}\n"
            f"again, with the whole log: python -m trio_cluster.testing {seed} --log"
        )


def run_schedule(seed: int, *, seconds: float = 30.0, requests: int = 60, faults: int = 16) -> ScheduleReport:
    """Play the schedule of a seed. Runs an event loop of its own, on a clock of its own.

    Args:
        seed: what everything follows from, together with the other arguments.
        seconds: for how long requests and faults begin; the simulated time is longer, until all is well again.
        requests: how many requests there are.
        faults: how many faults there are at most.

    Returns:
        What happened, if all laws held.

    Raises:
        ScheduleFailed: one did not.
    """
    plan = draw_plan(seed, seconds=seconds, requests=requests, faults=faults)
    history = History(ScriptedFailure)
    began = time.perf_counter()
    with seeded(seed), _heard_by(history), _without_threads():
        try:
            clock = trio.testing.MockClock(autojump_threshold=0)
            outcomes, simulated = trio.run(_play, plan, history, clock=clock)
        except Exception as error:
            # Whatever it is, what happened before is what explains it.
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
        faults=history.faults,
        log=tuple(history.lines),
        digest=history.digest,
    )


async def _play(plan: Plan, history: History) -> tuple[list[Outcome], float]:
    history.start()
    actors = Actors(history)
    outcomes: list[Outcome] = []
    with trio.CancelScope() as scope:
        async with open_cluster(latency=plan.latency, short_way=plan.short_way, **plan.options) as cluster:
            # The master that was opened with the cluster has no models.
            cluster.master.kill()
            await cluster.master.over.wait()
            stage = Stage(plan, cluster, history, actors, scope)
            laws = Laws(plan, stage, history, actors)
            trio.lowlevel.add_instrument(laws)
            for name in plan.slots:
                await stage.start(name)
            await _wait_until_well(plan, stage, history, laws)
            async with trio.open_nursery() as nursery:
                for fault in plan.faults:
                    nursery.start_soon(_at, fault.at, stage.run, fault)
                for errand in plan.errands:
                    nursery.start_soon(_at, errand.at, _run_errand, errand, stage, history, laws, outcomes)
            await _wait_until_well(plan, stage, history, laws)
            laws.judge_runs(outcomes)
            if not history.violations:
                await _probe(plan, stage, history, laws, actors)
            trio.lowlevel.remove_instrument(laws)
            for life in stage.past:
                if life.node.error is not None:
                    history.violate(f"{life.name}, life {life.number}, failed: {life.node.error!r}")
            return outcomes, history.now
    return outcomes, history.now


async def _at(when: float, function: Any, *args: Any) -> None:
    await trio.sleep(when)
    await function(*args)


async def _run_errand(
    errand: Errand, stage: Stage, history: History, laws: Laws, outcomes: list[Outcome]
) -> None:
    stage.active[errand.number] = errand.host
    history.note(f"client {errand.number} asks {errand.model}, and {errand.manner}")
    bound = laws.bound(errand)
    outcome = await run_errand(errand, stage.cluster.network, history, PORT, bound)
    del stage.active[errand.number]
    laws.judge(outcome)
    outcomes.append(outcome)


async def _wait_until_well(plan: Plan, stage: Stage, history: History, laws: Laws) -> None:
    """Wait until the cluster is whole and at rest; that it comes to that in time is a law too."""
    bound = _WELL + 2 * float(plan.options["worker_timeout"])
    pause = 0.01
    # What happened last must have had its effect.
    await trio.sleep(laws.reaction)
    with trio.move_on_after(bound):
        while laws.absent() or _orphans(stage):
            await trio.sleep(pause)
            pause = min(2 * pause, 1.0)
        return
    for wrong in [*laws.absent(), *_orphans(stage)]:
        history.violate(f"not well {bound:.0f} s after the last fault: {wrong}")


def _orphans(stage: Stage) -> list[str]:
    try:
        assert_no_orphans(stage.cluster)
    except OrphansLeft as left:
        return left.orphans
    return []


async def _probe(plan: Plan, stage: Stage, history: History, laws: Laws, actors: Actors) -> None:
    """Ask each node for as much at a time as it has slots, and then each model for one answer after another."""
    numbers = itertools.count(_PROBES)
    outcomes: list[Outcome] = []

    async def ask(model: Model) -> None:
        single = model.kind in ("embedding", "image_generation")
        script = Script(next(numbers), model.kind, pieces=1 if single else 5, first_after=0.5)
        errand = Errand(0.0, model.name, script, stream=model.kind in ("chat", "asr"))
        await _run_errand(errand, stage, history, laws, outcomes)

    for model in plan.models:
        if model.name == f"only-{model.hosts[0]}":
            node, slots = model.hosts[0], plan.slots[model.hosts[0]]
            actors.most.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(slots):
                    nursery.start_soon(ask, model)
            if actors.most.get(node, 0) != slots:
                history.violate(f"{node} has {slots} slots, and ran {actors.most.get(node, 0)} handlers")
        else:
            for _ in model.hosts:
                await ask(model)
            served = {run.node for run in actors.runs[-len(model.hosts) :]}
            if served != set(model.hosts):
                history.violate(f"{model.name} is answered by {sorted(served)}, not by {sorted(model.hosts)}")
    laws.judge_runs(outcomes)
    for outcome in outcomes:
        if outcome.verdict not in ("complete", "stream finished"):
            history.violate(f"{outcome.errand.model} answers with {outcome.verdict} when all is well")
    await _wait_until_well(plan, stage, history, laws)


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Let nobody wait for the disk in a thread, whose end is in no order that could be repeated."""

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
def _heard_by(history: History) -> Iterator[None]:
    """Let the chronicle hear what the nodes log."""
    root, ours = logging.getLogger(), logging.getLogger("trio_cluster")
    level = ours.level
    root.addHandler(history)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        root.removeHandler(history)
