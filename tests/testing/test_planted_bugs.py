"""Bugs of the kind that gateways have, each planted with a few lines: random schedules find them by the law they break.

An invariant that is never violated may be one that is never checked. So each bug here names its law. It has to be found
by one of the first seeds whose plans could show it at all: which seed that is changes whenever the schedules do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, Final

import attrs
import pytest
import trio

from trio_cluster.cluster.forwarded import ForwardedCalls
from trio_cluster.cluster.master import WorkerManager
from trio_cluster.cluster.replacement import HandOver
from trio_cluster.core.answer import Failed
from trio_cluster.core.story import StoryFacts
from trio_cluster.gateway.body import SpooledBody
from trio_cluster.gateway.stories import Stories
from trio_cluster.gateway.story_ending import Ending, ending_of
from trio_cluster.local.pool import HandlerPool
from trio_cluster.local.slots import Slots
from trio_cluster.node import Node
from trio_cluster.on_demand.schedule import Resident, Schedule
from trio_cluster.openai import failures
from trio_cluster.protocol import MasterSession
from trio_cluster.protocol.messages import Ack
from trio_cluster.protocol.retention import Retention
from trio_cluster.protocol.session import Session
from trio_cluster.routing import ejection
from trio_cluster.routing.catalog import Catalog
from trio_cluster.routing.ejection import Ejections, EjectionTable, Verdict
from trio_cluster.routing.health import Health
from trio_cluster.testing import ScheduleFailed, _stories, run_schedule
from trio_cluster.testing._plan import Plan, draw_plan

#: How many schedules may be played for a bug. Most are found by the first or the second one.
ENOUGH: Final = 12

SMALL: Final[dict[str, Any]] = {"seconds": 12, "requests": 20, "faults": 8}
LARGE: Final[dict[str, Any]] = {"seconds": 30, "requests": 60, "faults": 16}
#: Links are cut several times in each second.
DENSE: Final[dict[str, Any]] = {"seconds": 8, "requests": 60, "faults": 4}

#: Most requests are for the same two models, within five seconds.
BUSY: Final[dict[str, Any]] = {"seconds": 10, "requests": 120, "faults": 2}

#: Nearly nothing explains a failure.
CALM: Final[dict[str, Any]] = {"seconds": 20, "requests": 60, "faults": 0}

Plant = Callable[[pytest.MonkeyPatch], None]


@attrs.frozen
class Planted:
    """A bug.

    Attributes:
        plant: breaks the package.
        law: what a violation of the law says that has to find it, as a pattern.
        size: of the schedules.
        fits: whether a plan could show it.
    """

    plant: Plant
    law: str
    size: dict[str, Any] = SMALL
    fits: Callable[[Plan], bool] = lambda plan: True

    def __str__(self) -> str:
        return self.plant.__name__


# Which plans


def resumes(plan: Plan) -> bool:
    return plan.options["resume_window"] > 0


def cuts_all_the_time(plan: Plan) -> bool:
    return resumes(plan) and sum(fault.kind == "link reset" for fault in plan.faults) >= 30


def has_two_masters(plan: Plan) -> bool:
    return len(plan.masters) > 1


def has_residents(plan: Plan) -> bool:
    return bool(plan.residents)


def has_troubles(plan: Plan) -> bool:
    """Whether replicas are ejected soon, and again and again."""
    options = plan.options
    soon = options.get("ejection_failures") == 2 and options.get("ejection_time", 5.0) <= 1.0
    return soon and sum(fault.kind == "replica failing" for fault in plan.faults) >= 7


def freezes_workers(plan: Plan) -> bool:
    """Whether a worker is frozen for long while there are requests."""
    noticed = 0.5 * plan.options["worker_timeout"] + plan.options["heartbeat_interval"]
    freezes = (fault for fault in plan.faults if fault.kind == "worker frozen")
    return any(each.at + noticed < plan.seconds / 2 and each.duration > 1.5 * noticed for each in freezes)


def replaces_masters(plan: Plan) -> bool:
    return any(fault.kind == "master replaced" for fault in plan.faults)


# Of calls and handlers


def forget_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MasterSession, "cancel", lambda self, call, reason, **more: None)


def finish_failed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "error_event", lambda error: b"data: [DONE]\n\n")


def keep_models_of_lost_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "remove", lambda self, name, backend: True)


def lose_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    run = HandlerPool._in_slot

    async def in_slot(self: HandlerPool, answer: Any, slots: Any) -> None:
        try:
            await run(self, answer, slots)
        except trio.Cancelled:
            self.slots.running += 1
            raise

    monkeypatch.setattr(HandlerPool, "_in_slot", in_slot)


def lose_spooled_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpooledBody, "_fetch", lambda self, data: b"")


def let_two_masters_own_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link has slots of its own, as many as the process has."""
    slots: dict[tuple[int, int], Slots] = {}
    link = 0
    open_call, start = ForwardedCalls.open, HandlerPool.start

    def open_of_link(self: ForwardedCalls, opened: Any) -> None:
        nonlocal link
        link = id(self)
        open_call(self, opened)
        link = 0

    def start_in_slots_of_link(self: HandlerPool, request: Any, make_task: Any, own: Any, *more: Any) -> Any:
        if link and own is not None:
            own = slots.setdefault((id(self), link), Slots(self.options.server.max_concurrency))
            own.resize(self.options.server.max_concurrency)
        return start(self, request, make_task, own, *more)

    def running(self: HandlerPool) -> int:
        return self.slots.running + sum(each.running for key, each in slots.items() if key[0] == id(self))

    monkeypatch.setattr(ForwardedCalls, "open", open_of_link)
    monkeypatch.setattr(HandlerPool, "start", start_in_slots_of_link)
    monkeypatch.setattr(HandlerPool, "running", property(running))


# Of links that are resumed


def patch_resumption(monkeypatch: pytest.MonkeyPatch, on_resumed: Callable[..., None]) -> None:
    """Let `on_resumed`, which is given the method itself as well, go on with a session at both ends of a link."""
    method = Session._on_resumed

    def patched(self: Session[Any], received: int, now: float) -> None:
        on_resumed(method, self, received, now)

    monkeypatch.setattr(Session, "_on_resumed", patched)


def send_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_resumed(method: Any, session: Any, received: int, now: float) -> None:
        answer = list(session._ready)
        method(session, received, now)
        session._ready.clear()
        session._ready.extend(answer)

    patch_resumption(monkeypatch, on_resumed)


def replay_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_resumed(method: Any, session: Any, received: int, now: float) -> None:
        method(session, received, now)
        session._ready.extend(session._retention.batches)

    patch_resumption(monkeypatch, on_resumed)


def replay_what_was_acknowledged_on_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the last acknowledgement before the cut, which may be an old one, and not the one in the handshake."""

    def on_resumed(method: Any, session: Any, received: int, now: float) -> None:
        method(session, session._retention.acknowledged, now)

    patch_resumption(monkeypatch, on_resumed)


def do_not_restore_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The credit of the bodies that are under way belongs to the connection, and is lost with it."""

    def on_resumed(method: Any, session: Any, received: int, now: float) -> None:
        method(session, received, now)
        for stream in session._outbox._streams.values():
            stream.credit = 0

    patch_resumption(monkeypatch, on_resumed)


def lose_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = Session._receive_message

    def receive_message(self: Any, message: Any, events: list[Any]) -> None:
        if type(message) is not Ack:
            receive(self, message, events)

    monkeypatch.setattr(Session, "_receive_message", receive_message)


def acknowledge_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget one batch more than the peer has received."""
    acknowledge = Retention.acknowledge
    monkeypatch.setattr(
        Retention, "acknowledge", lambda self, count: acknowledge(self, min(count + 1, self.sent))
    )


def accept_stale_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on with any session that could have the numbers, also if the one that is named is over."""

    def is_named_by(self: Any, handshake: Any) -> bool:
        return (
            self.close_reason is None
            and self.peer is not None
            and self._retention is not None
            and self._retention.knows(handshake.received)
        )

    monkeypatch.setattr(MasterSession, "is_named_by", is_named_by)


# Of ejection


def try_a_replica_with_two_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def due(self: EjectionTable, key: tuple[str, str], now: float) -> bool:
        record = self.ejected.get(key)
        return record is not None and record.until is not None and record.until <= now

    monkeypatch.setattr(EjectionTable, "due", due)


def eject_the_last_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = EjectionTable.failed

    def with_imagined_replicas(
        self: EjectionTable, key: Any, verdict: Any, now: float, others: Any, *more: Any
    ) -> Any:
        return failed(self, key, verdict, now, [*others, *"abcdefgh"], *more)

    monkeypatch.setattr(EjectionTable, "failed", with_imagined_replicas)


def count_clients_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ejection.judge

    def judge_cancelled_calls(call: Any, outcome: str, *more: Any) -> Any:
        return Verdict("failed", "cancelled") if outcome == "cancelled" else judge(call, outcome, *more)

    monkeypatch.setattr(ejection, "judge", judge_cancelled_calls)


def count_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ejection.judge

    def judge_refusals(call: Any, outcome: str, *more: Any) -> Any:
        refused = isinstance(call.end, Failed) and 400 <= call.end.error.status < 500
        return Verdict("failed", "refused") if refused else judge(call, outcome, *more)

    monkeypatch.setattr(ejection, "judge", judge_refusals)


def do_not_double_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    eject = EjectionTable._eject

    def as_if_for_the_first_time(self: EjectionTable, key: Any, record: Any, *more: Any) -> Any:
        record.ejections = 0
        return eject(self, key, record, *more)

    monkeypatch.setattr(EjectionTable, "_eject", as_if_for_the_first_time)


def do_not_leave_replicas_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ejections, "admit", lambda self, request, candidates: candidates)


def do_not_honour_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ejection, "_seconds", lambda retry_after: 0.0)


def send_more_to_a_frozen_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Health, "stall", lambda self, reason: None)


# Of take-overs


def accept_clients_before_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait_for_nothing(manager: Any, models: Any) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr("trio_cluster.node.wait_for_workers", wait_for_nothing)


def end_as_soon_as_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Node._wait_stopped_or_replaced

    async def wait_replaced_only(self: Any, hand_over: HandOver | None) -> None:
        if hand_over is None:
            await wait(self, hand_over)
            return
        async with trio.open_nursery() as nursery:

            async def end_with(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(end_with, hand_over.replaced)
            nursery.start_soon(end_with, self._stop_requested)

    monkeypatch.setattr(Node, "_wait_stopped_or_replaced", wait_replaced_only)


def tell_workers_nothing_of_a_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerManager, "announce_successor", lambda self, coming: None)


# Of models on demand


def do_not_give_up_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Schedule._stop

    def stop_what_is_ready(self: Schedule, resident: Resident, *more: Any) -> None:
        if resident.state != "starting":
            stop(self, resident, *more)

    monkeypatch.setattr(Schedule, "_stop", stop_what_is_ready)


def stop_models_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_that_are_ready(self: Schedule, now: float, claimed: Any) -> list[Resident]:
        return [each for each in self.residents if each.state == "ready" and each not in claimed]

    monkeypatch.setattr(Schedule, "_stoppable", all_that_are_ready)


def free_memory_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Schedule._stop

    def stop_and_free(self: Schedule, resident: Resident, *more: Any) -> None:
        stop(self, resident, *more)
        resident.reserved = 0.0

    monkeypatch.setattr(Schedule, "_stop", stop_and_free)


def admit_calls_while_the_model_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resident, "let_in", lambda self, number: self.state in ("starting", "ready"))


LOST_BY_A_CUT: Final = "an error without a cause"
DAMAGED: Final = (
    "an error without a cause|with another text|looks complete and is not|not recovered|no fault broke it"
)


def forget_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stories, "end", lambda self, context, left: self.live.pop(context, None))


def blame_models_for_lost_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def blame(facts: StoryFacts) -> Ending:
        told = ending_of(facts)
        return Ending("failed", "model", "") if told.outcome == "worker_lost" else told

    monkeypatch.setattr(_stories, "ending_of", blame)


PLANTED: Final = [
    Planted(forget_to_cancel, "after it was over|not recovered"),
    Planted(finish_failed_streams, "breaks the grammar|finished stream"),
    Planted(keep_models_of_lost_workers, "should not be connected|is served by|is answered by"),
    Planted(lose_slots, "not recovered"),
    Planted(lose_spooled_body, "logged as an error|without a cause|damaged"),
    Planted(let_two_masters_own_one_slot, r"\d handlers run, and there are \d slots", LARGE, has_two_masters),
    Planted(send_nothing_again, DAMAGED, DENSE, cuts_all_the_time),
    Planted(replay_twice, DAMAGED, DENSE, cuts_all_the_time),
    Planted(replay_what_was_acknowledged_on_resumption, DAMAGED, DENSE, cuts_all_the_time),
    Planted(do_not_restore_windows, f"{LOST_BY_A_CUT}.*timeout|no fault broke it", DENSE, cuts_all_the_time),
    Planted(lose_acknowledgements, "bytes of a link are not acknowledged", LARGE, resumes),
    Planted(acknowledge_too_much, DAMAGED, DENSE, cuts_all_the_time),
    Planted(try_a_replica_with_two_requests, "is tried with 2 requests at once", BUSY, has_troubles),
    Planted(
        eject_the_last_replica, r"as the last replica|\d of \d replicas are left alone", BUSY, has_troubles
    ),
    Planted(count_clients_that_leave, "which was no failure of it", BUSY, has_troubles),
    Planted(count_refusals, "which was no failure of it", BUSY, has_troubles),
    Planted(do_not_double_the_back_off, "is left alone for .* s instead of", BUSY, has_troubles),
    Planted(do_not_leave_replicas_alone, "which is left alone", BUSY, has_troubles),
    Planted(do_not_honour_retry_after, "is left alone for .* s instead of", BUSY, has_troubles),
    Planted(send_more_to_a_frozen_worker, "frozen for .* s", BUSY, freezes_workers),
    Planted(accept_clients_before_the_workers, "without a cause: model_", LARGE, replaces_masters),
    Planted(end_as_soon_as_replaced, "without a cause|no fault broke it", BUSY, replaces_masters),
    Planted(tell_workers_nothing_of_a_successor, "could not be replaced", LARGE, replaces_masters),
    Planted(do_not_give_up_starts, "is started, and its last request has left", CALM, has_residents),
    Planted(stop_models_that_answer, r"is stopped, and \d+ handlers run on it", CALM, has_residents),
    Planted(free_memory_too_early, r"models on demand take \d+ of 100 bytes", CALM, has_residents),
    Planted(admit_calls_while_the_model_starts, "begins, which is not ready", CALM, has_residents),
    Planted(accept_stale_sessions, LOST_BY_A_CUT, DENSE, cuts_all_the_time),
    Planted(forget_stories, "was answered, and has no story"),
    Planted(blame_models_for_lost_workers, "saw .* worker_lost, and its story says failed by model"),
]


def seeds_of(bug: Planted) -> list[int]:
    fitting = (seed for seed in itertools.count(1) if bug.fits(draw_plan(seed, **bug.size)))
    return list(itertools.islice(fitting, ENOUGH))


def play(seed: int, size: dict[str, Any]) -> ScheduleFailed | None:
    try:
        run_schedule(seed, **size)
    except ScheduleFailed as failed:
        return failed
    return None


@pytest.mark.parametrize("bug", PLANTED, ids=str)
def test_a_planted_bug_is_found(bug: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    found: list[str] = []
    for seed in seeds_of(bug):
        failed = play(seed, bug.size)
        if failed is None:
            continue
        assert failed.seed == seed
        assert f"schedule {seed} " in str(failed)
        assert f"python -m trio_cluster.testing {seed} " in str(failed)
        assert failed.log[-1][:200] in str(failed)
        assert failed.violations[0] in str(failed)
        if any(re.search(bug.law, violation) for violation in failed.violations):
            print(f"{bug} is found by the schedule of {seed}: {failed.violations[0]}")
            return
        found += failed.violations
    pytest.fail(f"no schedule says {bug.law!r}; violations: {found}")
