"""The invariants of a cluster: what must hold whatever happens, and what must hold again when all faults are over.

There are three kinds. Some hold *at every turn* of the event loop: the stats balance, no handler runs without a slot,
no worker that is dead or silent is on the list of workers. Some are about how each request *ended*: a response that
looks complete is complete, any other is a prefix of it, every error has a fault that explains it, nothing takes longer
than its bound, and no handler outlives its request. And some hold *when the cluster is quiescent*: nothing is left.

No invariant says "never fails": in a schedule of faults most failures are correct. What is checked is that a failure
has a fault which explains it, near enough in place and time (see ``_fault_oracle``).
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Final

import trio

from ..cluster.remote_worker import RemoteWorker
from ..core.limits import WINDOW
from ..gateway.deadlines import GRACE
from ..protocol.retention import ACK_ALONE
from ..routing.backend import LOCAL
from ._fault_oracle import STOPS, WORKER_FAULTS, FaultOracle
from ._grammar import StreamGrammarError, read_stream
from ._history import History
from ._plan import Plan, SimulatedRequest
from ._resident_check import ResidentCheck
from ._scripted_models import HandlerRun, ScriptedModels
from ._scripts import MARGIN
from ._simulation import MAX_IGNORED_CANCELLATION, ProcessRun, Simulation
from ._stories import StoryCheck
from ._workload import Outcome

__all__ = ["Invariants"]

#: Bytes of the largest piece of output, as it is sent.
_LARGEST_PIECE: Final = 160_000
#: Bytes of a link that may wait for their acknowledgement. It is sent for each ``ACK_ALONE``, and while it is on its
#: way the buffers of the connection take more.
_MOST_RETAINED: Final = 2 * ACK_ALONE
#: Turns of the event loop within which time must advance.
_MAX_TURNS: Final = 50_000


class Invariants(trio.abc.Instrument):
    """The invariants of one schedule. As an instrument, it checks those that hold at every turn.

    Args:
        plan: the plan of the schedule.
        simulation: the cluster to check.
        history: where violations are recorded, and where faults are looked up.
        models: the record of what the handlers did.
    """

    def __init__(self, plan: Plan, simulation: Simulation, history: History, models: ScriptedModels) -> None:
        self._plan = plan
        self._simulation = simulation
        self._history = history
        self._models = models
        self._oracle = FaultOracle(plan, history)
        self._stories = StoryCheck(simulation)
        self._residents = ResidentCheck(plan, simulation, history, self._oracle, self._report)
        self._missing_since: dict[str, float] = {}
        self._reported: set[str] = set()
        # How many slots may be taken in each process, and how many were, by its number.
        self._limits: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._turns = 0
        self._last_turn = 0.0

    @property
    def reaction_time(self) -> float:
        """Seconds between a fault and its effect on another node, if nothing delays it."""
        return self._oracle.reaction_time

    # At every turn

    def before_io_wait(self, timeout: float) -> None:
        """See ``trio.abc.Instrument``. Must not raise."""
        for process in self._simulation.processes:
            if not (process.killed or process.node.over.is_set()):
                self._check_stats(process)
                self._check_slots(process)
                self._check_memory(process)
                if not self._turns:
                    # Once in each instant, since there are many turns in some.
                    self._check_retained(process)
                self._check_reservations(process)
        self._residents.check()
        self._check_workers()
        self._check_time()
        self._stories.follow()

    def _check_stats(self, process: ProcessRun) -> None:
        router = process.server.router
        stats = router.stats
        ended = stats.completed + stats.cancelled + stats.timed_out + stats.worker_lost + stats.failed
        if stats.admitted != ended + len(router.live):
            self._report(f"{process.name}: {stats.admitted} calls were admitted, {ended} have ended, "
                         f"{len(router.live)} are in flight")  # fmt: skip

    def _check_slots(self, process: ProcessRun) -> None:
        pool = process.server.pool
        busy = self._models.busy.get(process.number, 0)
        if busy > pool.running:
            self._report(f"{process.name}: {busy} handlers run in {pool.running} slots")
        # If there are fewer slots now than there were, those that are taken stay taken, and no more are.
        limit = max(
            pool.capacity, min(self._limits.get(process.number, 0), self._taken.get(process.number, 0))
        )
        if busy > limit:
            self._report(f"{process.name}: {busy} handlers run, and there are {limit} slots")
        self._limits[process.number], self._taken[process.number] = limit, max(busy, pool.running)
        self._oracle.record_load(process.name, full=pool.running >= pool.capacity)

    def _check_memory(self, process: ProcessRun) -> None:
        # On a master, what the connection has received meanwhile is added to what waits already.
        limit = (3 if process.name in self._plan.masters else 1) * WINDOW
        for call in process.server.router.live:
            if call.body.waiting_bytes > WINDOW + _LARGEST_PIECE:
                self._report(f"{process.name}: {call.body.waiting_bytes} bytes wait for one client")
            upload = call.request.upload
            if upload is not None and upload.waiting_bytes > limit:
                self._report(f"{process.name}: {upload.waiting_bytes} bytes of one upload wait")

    def _check_retained(self, process: ProcessRun) -> None:
        """Check that what is kept for a resumption of each link is acknowledged in time."""
        for end in (process.server.worker_manager, process.server.worker_client):
            for session in () if end is None else end.sessions:
                if session.retained > _MOST_RETAINED:
                    self._report(
                        f"{process.name}: more than {_MOST_RETAINED} bytes of a link are not acknowledged"
                    )

    def _check_reservations(self, process: ProcessRun) -> None:
        """Check that each request of a limited key that has a call holds a reservation."""
        limiter = process.server.limiter
        if limiter is None or not self._plan.limited_keys:
            return
        limited = {
            call.request.request_id
            for call in process.server.router.live
            if call.request.principal.limits is not None
        }
        if len(limited) > limiter.open_reservations:
            self._report(
                f"{process.name}: {limiter.open_reservations} reservations for {len(limited)} limited requests"
            )

    def _check_time(self) -> None:
        now = self._history.now
        self._turns = self._turns + 1 if now == self._last_turn else 0
        self._last_turn = now
        if self._turns == _MAX_TURNS:
            self._report("time does not advance: a deadlock, or a task that loops without waiting")
            self._simulation.abort()

    def _check_workers(self) -> None:
        now = self._history.now
        in_flight = dict.fromkeys(self._plan.workers, 0)
        # The workers that each master that is up should know.
        for master_name in self._plan.masters:
            master = self._simulation.current.get(master_name)
            manager = None if master is None or master.killed else master.server.worker_manager
            for name in self._plan.workers:
                known = None if manager is None else manager.workers.get(name)
                if known is not None:
                    in_flight[name] += known.in_flight
                process = self._simulation.current.get(name)
                silent = process is None or process.killed or process.frozen
                key = f"{name} at {master_name}"
                if not silent or known is None:
                    self._missing_since.pop(key, None)
                elif now - self._missing_since.setdefault(key, now) > self._may_be_listed(known):
                    self._report(f"{name} is dead or frozen, and still on the list of workers")
            for process in self._simulation.predecessors(master_name) if master is not None else ():
                manager = process.server.worker_manager
                for known in () if manager is None else manager.workers.values():
                    in_flight[known.name] = in_flight.get(known.name, 0) + known.in_flight
        for name, count in in_flight.items():
            process = self._simulation.current.get(name)
            if process is not None:
                self._check_in_flight(process, count)

    def _may_be_listed(self, worker: RemoteWorker) -> float:
        """Return for how many seconds a worker that is dead or frozen may be on the list of workers."""
        # It may have died while its link was cut. Such a death cannot be seen, and the worker is waited for.
        window = float(self._plan.options["resume_window"]) if worker.health.suspended else 0.0
        return self._oracle.detection_time + self._oracle.reaction_time + window

    def _check_in_flight(self, process: ProcessRun, in_flight: int) -> None:
        """Check that the masters know every call that a worker runs, unless they have just lost each other."""
        busy = self._models.busy.get(process.number, 0)
        if busy <= in_flight:
            return
        now = self._history.now
        since = now - self._oracle.aftermath - MAX_IGNORED_CANCELLATION
        hosts = frozenset([process.name, *self._plan.masters])
        excused = self._history.faults_on(hosts, since, now) or self._oracle.replaced_master_ends(since, now)
        if not excused:
            self._report(f"{busy} handlers run on {process.name}, and its masters know of {in_flight}")

    def _report(self, text: str) -> None:
        """Record a violation once, although it is found again at every turn."""
        if text not in self._reported:
            self._reported.add(text)
            self._history.add_violation(text)

    # Of each request

    def bound(self, request: SimulatedRequest) -> float:
        """Return the seconds within which a request must have ended, if its client is not partitioned."""
        script, options = request.script, self._plan.options
        # A stall that is longer than the idle timeout ends with the timeout.
        attempt = options["queue_timeout"] + script.duration - script.stalled + GRACE
        attempt += 2 * options["default_timeout"]
        attempt += self._oracle.start_time(request)
        return float(
            2 * len(request.models) * attempt
            + self._oracle.read_pauses(request)
            + self._oracle.transport_time(request)
            + self._oracle.detection_time
        )

    def check_outcome(self, outcome: Outcome) -> None:
        """Check how a request ended, and set its verdict."""
        request = outcome.request
        complaints: list[str] = []
        if outcome.ending == "overdue":
            excuse = self._history.faulty_time(
                frozenset([request.host, request.master]), outcome.began, outcome.ended
            )
            outcome.verdict = "overdue"
            if not excuse:
                complaints.append(f"no end after {outcome.ended - outcome.began:.1f} s")
        elif outcome.ending == "refused":
            outcome.verdict = "refused"
            if not self._oracle.fault_near(
                frozenset([request.master]), outcome, frozenset({"master killed", "master stopped"})
            ):
                complaints.append("refused by a master that runs")
        elif outcome.ending == "lost":
            outcome.verdict = "connection lost"
            if not self._oracle.was_disconnected(outcome):
                complaints.append("the connection was lost before the response, and no fault broke it")
        elif outcome.status >= 400:
            self._check_error(outcome, complaints)
        elif outcome.status:
            self._check_response(outcome, complaints)
        else:
            outcome.verdict = "left early"
        for complaint in complaints:
            self._history.add_violation(f"request {request.number} to {request.model}: {complaint}")
        self._history.log(f"client {request.number}: {outcome.ending}, {outcome.verdict}")

    def _check_error(self, outcome: Outcome, complaints: list[str]) -> None:
        outcome.verdict = f"status {outcome.status}"
        if not outcome.complete:
            if outcome.ending != "left" and not self._oracle.was_disconnected(outcome):
                complaints.append(f"an incomplete error with status {outcome.status}")
            return
        try:
            error = json.loads(outcome.body)["error"]
            code = error["code"]
        except (ValueError, KeyError, TypeError):
            complaints.append(f"an error without an envelope: {outcome.body[:200]!r}")
            return
        outcome.verdict = f"{outcome.status} {code}"
        if not self._oracle.explains(outcome, code):
            complaints.append(f"an error without a cause: {code}: {error['message']}")

    def _check_response(self, outcome: Outcome, complaints: list[str]) -> None:
        script = outcome.request.script
        if outcome.content_type.startswith("text/event-stream"):
            self._check_stream(outcome, complaints)
        elif outcome.complete:
            outcome.verdict = "complete"
            if script.fails is not None:
                complaints.append("a complete response of a model that failed")
            elif not script.is_complete(outcome.body):
                complaints.append(f"a response that looks complete and is not: {outcome.body[:200]!r}")
        else:
            outcome.verdict = "cut"
            if script.kind == "tts" and not script.output.encode().startswith(outcome.body):
                complaints.append("a response that was cut, with another content")
            if outcome.ending != "left" and not self._oracle.may_fail(outcome):
                complaints.append("a response was cut for no reason")

    def _check_stream(self, outcome: Outcome, complaints: list[str]) -> None:
        script = outcome.request.script
        try:
            report = read_stream(outcome.body)
        except StreamGrammarError as error:
            complaints.append(f"the stream breaks the grammar: {_shortened(str(error))}")
            return
        outcome.verdict = f"stream {report.ending}"
        if report.ending == "finished":
            if script.fails is not None:
                complaints.append("a finished stream of a model that failed")
            if report.text != script.output:
                complaints.append(f"a finished stream with another text: {report.text[:200]!r}")
        elif not script.output.startswith(report.text):
            complaints.append(f"a stream that did not finish, with another text: {report.text[-200:]!r}")
        if (
            outcome.complete != (report.ending != "cut")
            and outcome.ending != "left"
            and (outcome.complete or not self._oracle.was_disconnected(outcome))
        ):
            complaints.append(f"a stream that was {report.ending} in a body with complete={outcome.complete}")
        if report.error is not None:
            outcome.verdict = f"stream failed {report.error['code']}"
            if not self._oracle.explains(outcome, report.error["code"]):
                complaints.append(f"an error without a cause: {report.error}")
        elif (
            report.ending == "cut" and outcome.ending != "left" and not self._oracle.was_disconnected(outcome)
        ):
            complaints.append("the stream just ends, and no fault broke the connection")

    # Of each story

    def check_stories(self, outcomes: list[Outcome]) -> None:
        """Check what the stories say of requests that have ended. To be called while the cluster is quiescent."""
        for outcome, complaint in self._stories.complaints(outcomes):
            self._history.add_violation(
                f"request {outcome.request.number} to {outcome.request.model}: {complaint}"
            )
        for complaint in self._stories.endless():
            self._report(complaint)

    # Of each run of a handler

    def check_runs(self, outcomes: list[Outcome]) -> None:
        """Check what the handlers did for requests that have ended."""
        for outcome in outcomes:
            runs = self._in_order(outcome.request.number)
            for complaint in self._complaints_about_runs(outcome, runs):
                self._history.add_violation(
                    f"request {outcome.request.number} to {outcome.request.model}: {complaint}"
                )

    def _in_order(self, number: int) -> list[HandlerRun]:
        """Return the runs for a request in the order in which its calls were opened.

        That need not be the order in which they began: a call that waits for a slot of a worker may be opened elsewhere
        since its link was cut, and begin before the worker knows.
        """
        openings = self._simulation.openings.get(number, [])

        def place(run: HandlerRun) -> int:
            return (
                openings.index((run.node, run.model)) if (run.node, run.model) in openings else len(openings)
            )

        return sorted(self._models.runs_of(number), key=place)

    def _complaints_about_runs(self, outcome: Outcome, runs: list[HandlerRun]) -> list[str]:
        request = outcome.request
        complaints = []
        if len(runs) > 1:
            # A request that is opened elsewhere since its link was cut may have been lost on its way. It arrives when
            # the link is resumed, with its cancellation: so its handler is stopped in the instant in which it begins.
            runs = [run for run in runs if not (run.stopped and not run.given and run.ended == run.began)]
        # Each model is asked once, and once more on another replica.
        if len(runs) > 2 * len(request.models):
            complaints.append(f"{len(runs)} handlers ran for it")
        # In the order of the list.
        tried = [request.models.index(run.model) for run in runs if run.model in request.models]
        if len(tried) != len(runs) or tried != sorted(tried):
            complaints.append(f"its handlers were those of {[run.model for run in runs]}")
        if request.behavior == "aborts upload" and runs:
            complaints.append("a handler ran for half of a request")
        if outcome.verdict in ("complete", "stream finished") and not runs:
            complaints.append("it was answered, and no handler ran")
        complaints += self._repeated(outcome, runs)
        complaints += self._outliving(outcome, runs)
        complaints += self._late_starts(outcome, runs)
        complaints += self._delays(outcome, runs)
        if request.total_timeout is not None and runs and outcome.ending == "answered":
            complaints += self._lateness(outcome, runs[-1], request.total_timeout)
        if runs and runs[-1].stopped and outcome.verdict.endswith(("cancelled", "shutting_down")):
            complaints += self._early_stop(outcome, runs[-1])
        return complaints

    def _repeated(self, outcome: Outcome, runs: list[HandlerRun]) -> list[str]:
        """Complain about a response that was generated again, although its first handler had given something.

        Unless its worker was lost. After a mere cut, only what has given nothing is opened elsewhere. Embeddings may be
        made twice.
        """
        if outcome.request.script.kind == "embedding":
            return []
        if len(runs) < 2 or not (runs[0].given and runs[1].given):
            return []
        first, second = runs[:2]
        script = outcome.request.script
        stall = script.stall if script.stalls_at == 0 else 0.0
        gives = first.began + script.first_after + stall + self._oracle.reaction_time
        hosts = frozenset([first.node, outcome.request.master])
        since = outcome.began - self._oracle.aftermath
        if self._history.faults_on(hosts, since, second.began, self._oracle.losses(outcome)) or (
            self._history.faults_on(frozenset([first.node]), outcome.began, gives)
        ):
            return []
        return [f"it was generated again on {second.node}, although it had begun on {first.node}"]

    def _outliving(self, outcome: Outcome, runs: list[HandlerRun]) -> list[str]:
        """Complain about handlers that ran for too long after their call was over, or retried elsewhere."""
        complaints = []
        # Two attempts of an embedding may run at once, until one of them has answered.
        hedged = outcome.request.script.kind == "embedding"
        ends = [outcome.ended if hedged else max(run.began, earlier.began) for earlier, run in pairwise(runs)]
        ends.append(outcome.ended)
        for run, call_ended in zip(runs, ends, strict=False):
            late = run.ended - call_ended - self._may_outlive(outcome, run, call_ended)
            if late > 0 and not self._simulation.process(run.process).killed:
                complaints.append(
                    f"its handler on {run.node} ran for {run.ended - call_ended:.3f} s after it was over"
                )
        return complaints

    def _may_outlive(self, outcome: Outcome, run: HandlerRun, call_ended: float) -> float:
        """Return for how many seconds a handler may run after its call has ended."""
        until = min(run.ended, self._history.now)
        hosts = frozenset([outcome.request.host, outcome.request.master])
        to_master = self._history.faulty_time(hosts, call_ended, until)
        # A worker that is partitioned from its master notices that by itself.
        since = call_ended - self._oracle.aftermath
        to_worker = min(
            self._history.faulty_time(frozenset([run.node]), since, until), self._oracle.detection_time
        )
        transport = self._oracle.transport_time(outcome.request)
        return run.script.ignore_cancellation_for + to_master + to_worker + transport

    def _late_starts(self, outcome: Outcome, runs: list[HandlerRun]) -> list[str]:
        """Complain about handlers that began when the deadline of the request had passed."""
        request = outcome.request
        if request.total_timeout is None:
            return []
        allowed = request.total_timeout + self._oracle.transport_time(request)
        since = outcome.began - self._oracle.aftermath
        return [
            "a handler began after the deadline of the request"
            for run in runs
            if run.began - outcome.began > allowed
            and not self._history.faults_on(self._oracle.hosts(request), since, run.began)
        ]

    def _delays(self, outcome: Outcome, runs: list[HandlerRun]) -> list[str]:
        """Complain about a response that took longer than its model and the network need, without any fault."""
        request = outcome.request
        if outcome.verdict not in ("complete", "stream finished") or len(runs) != 1:
            return []
        hosts = self._oracle.hosts(request) | {request.host}
        if self._history.faults_on(hosts, outcome.began - self._oracle.aftermath, outcome.ended):
            return []
        took = outcome.ended - runs[0].began
        allowed = (
            request.script.duration + self._oracle.read_pauses(request) + self._oracle.transport_time(request)
        )
        return [f"it took {took:.3f} s instead of {allowed:.3f} s"] if took > allowed else []

    def _lateness(self, outcome: Outcome, run: HandlerRun, total_timeout: float) -> list[str]:
        """Complain about a response that came after its deadline, from a node without any fault."""
        request, took = outcome.request, outcome.ended - outcome.began
        allowed = (
            total_timeout
            + run.script.ignore_cancellation_for
            + self._oracle.read_pauses(request)
            + self._oracle.transport_time(request)
        )
        hosts = frozenset([run.node, request.master, request.host])
        since = outcome.began - self._oracle.aftermath
        if took <= allowed or self._history.faults_on(hosts, since, outcome.ended):
            return []
        return [f"its total timeout was {total_timeout:g} s, and it took {took:.3f} s"]

    def _early_stop(self, outcome: Outcome, run: HandlerRun) -> list[str]:
        """Complain about a handler that was cancelled by a draining node before ``drain_timeout`` had passed."""
        if self._oracle.was_cancelled(outcome) or self._oracle.was_left_behind(outcome):
            return []
        nodes = frozenset([run.node, outcome.request.master])
        since = run.began - self._oracle.aftermath
        if self._history.faults_on(nodes, since, run.ended, WORKER_FAULTS - STOPS):
            return []
        stops = [stop.began for stop in self._history.faults_on(nodes, outcome.began, run.ended, STOPS)]
        allowed = float(self._plan.options["drain_timeout"]) - MARGIN
        if max(stops, default=-1.0) < run.began or run.ended - min(stops) >= allowed:
            return []
        return [f"its handler on {run.node} was stopped {run.ended - min(stops):.3f} s after the drain began"]

    # When all faults are over

    def missing(self) -> list[str]:
        """Return what a whole cluster should have, and this one does not have; a line for each."""
        missing: list[str] = []
        for name in self._plan.masters:
            missing += self._missing_at(name)
            missing += [
                f"{process.name}, process {process.number}, was replaced and has not ended"
                for process in self._simulation.predecessors(name)
            ]
        return missing + self._residents.left_over()

    def _missing_at(self, master_name: str) -> list[str]:
        master = self._simulation.current[master_name].server
        manager = master.worker_manager
        joined: dict[str, Any] = {} if manager is None else manager.workers
        at = "" if master_name == "master" else f" at {master_name}"
        missing = [f"{name} is not connected{at}" for name in self._plan.workers if name not in joined]
        missing += [
            f"{name} should not be connected{at}" for name in joined if name not in self._plan.workers
        ]
        for model in self._plan.models:
            serving = master.router.catalog.served_by(model.name)
            served = [(master_name if name == LOCAL else name) for name in serving]
            # A master knows its own models, and not those of the other one.
            hosts = [host for host in model.hosts if host == master_name or host not in self._plan.masters]
            if sorted(served) != sorted(hosts):
                missing.append(f"{model.name} is served by {served}{at}, not by {hosts}")
        others = {name for name in self._plan.masters if name != master_name}
        for name, worker in joined.items():
            if {other for other, _ in worker.other_masters} != others:
                missing.append(f"{name} has told {master_name} of {worker.other_masters}, not of {others}")
        return missing


def _shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
