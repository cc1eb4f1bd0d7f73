"""What must be true of a cluster in any weather, and what must be true again when the weather is fine.

Three kinds of law. Some hold *at every turn* of the event loop, whatever happens: the books add up, no handler runs
without a slot, nobody who is dead or silent is on the list of workers. Some are about how each request *ended*: an
answer that looks complete is complete, one that is not is a beginning of it, every error has a cause in the chronicle,
nothing takes longer than it may, and no handler outlives its request. And some hold *at rest*: nothing is left over.

No law says "never fails": in a schedule of faults most failures are right. What is checked is that a failure has
something which explains it, near enough in place and time.
"""

from __future__ import annotations

import json
from typing import Any, Final

import trio

from ..core.limits import WINDOW
from ..gateway.deadlines import GRACE
from ..routing.backend import LOCAL
from ._actors import Actors, Run
from ._causes import LOSSES, STOPS, Causes
from ._errands import Outcome
from ._grammar import StreamGrammarError, read_stream
from ._history import History
from ._plan import Errand, Plan
from ._scripts import MARGIN
from ._stage import LONGEST_CLING, Life, Stage

__all__ = ["Laws"]

#: Bytes of the largest piece of output, as it is sent.
_LARGEST: Final = 160_000
#: Turns of the event loop after which the time should have gone on.
_TURNS: Final = 50_000


class Laws(trio.abc.Instrument):
    """The laws, for one schedule. As an instrument, it looks after those that hold at every turn."""

    def __init__(self, plan: Plan, stage: Stage, history: History, actors: Actors) -> None:
        self._plan = plan
        self._stage = stage
        self._history = history
        self._actors = actors
        self._causes = Causes(plan, history)
        self._missing_since: dict[str, float] = {}
        self._said: set[str] = set()
        self._turns = 0
        self._turned_at = 0.0

    @property
    def reaction(self) -> float:
        """Seconds between a cause and its effect on another node, if nothing is in the way."""
        return self._causes.reaction

    # At every turn

    def before_io_wait(self, timeout: float) -> None:
        """See ``trio.abc.Instrument``. Must not raise."""
        for life in self._stage.past:
            if not (life.killed or life.node.over.is_set()):
                self._check_books(life)
                self._check_slots(life)
                self._check_memory(life)
        self._check_workers()
        self._check_time()

    def _check_books(self, life: Life) -> None:
        registry = life.server.registry
        stats = registry.stats
        ended = stats.completed + stats.cancelled + stats.timed_out + stats.worker_lost + stats.failed
        if stats.admitted != ended + len(registry.live):
            self._say(f"{life.name}: {stats.admitted} calls were admitted, {ended} have ended, "
                      f"{len(registry.live)} are in flight")  # fmt: skip

    def _check_slots(self, life: Life) -> None:
        pool = life.server.pool
        busy = self._actors.busy.get(life.number, 0)
        if busy > pool.running:
            self._say(f"{life.name}: {busy} handlers run in {pool.running} slots")
        self._causes.note_load(life.name, full=pool.running >= pool.capacity)

    def _check_memory(self, life: Life) -> None:
        # On a master, what the connection has taken meanwhile comes on top of what waits already.
        room = (3 if life.name == "master" else 1) * WINDOW
        for call in life.server.registry.live:
            if call.body.waiting_bytes > WINDOW + _LARGEST:
                self._say(f"{life.name}: {call.body.waiting_bytes} bytes wait for one client")
            upload = call.request.upload
            if upload is not None and upload.waiting_bytes > room:
                self._say(f"{life.name}: {upload.waiting_bytes} bytes of one upload wait")

    def _check_time(self) -> None:
        now = self._history.now
        self._turns = self._turns + 1 if now == self._turned_at else 0
        self._turned_at = now
        if self._turns == _TURNS:
            self._say("everybody waits for something that does not come, or somebody runs in circles")
            self._stage.give_up()

    def _check_workers(self) -> None:
        master = self._stage.lives.get("master")
        manager = None if master is None or master.killed else master.server.worker_manager
        if manager is None:
            self._missing_since.clear()
            return
        now = self._history.now
        for name in self._plan.workers:
            life = self._stage.lives.get(name)
            if life is not None and name in manager.workers:
                self._check_flight(life, manager.workers[name].in_flight)
            silent = life is None or life.killed or life.frozen
            if not silent or name not in manager.workers:
                self._missing_since.pop(name, None)
            elif (
                now - self._missing_since.setdefault(name, now) > self._causes.silence + self._causes.reaction
            ):
                self._say(f"{name} is dead or frozen, and still on the list of workers")

    def _check_flight(self, life: Life, in_flight: int) -> None:
        """What runs on a worker is on its master's list, unless one of them has just lost the other."""
        busy, now = self._actors.busy.get(life.number, 0), self._history.now
        if busy > in_flight and not self._history.troubles(
            frozenset([life.name, "master"]), now - self._causes.aftermath - LONGEST_CLING, now
        ):
            self._say(f"{busy} handlers run on {life.name}, and its master knows of {in_flight}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._history.violate(text)

    # Of each request

    def bound(self, errand: Errand) -> float:
        """Return the seconds within which a request must be answered, if its client is not cut off."""
        script, options = errand.script, self._plan.options
        # A stall that is longer than the silence that is allowed ends there.
        attempt = options["queue_timeout"] + script.duration - script.stalled + GRACE
        attempt += 2 * options["default_timeout"]
        return float(
            2 * attempt + self._causes.pauses(errand) + self._causes.transport(errand) + self._causes.silence
        )

    def judge(self, outcome: Outcome) -> None:
        """Check how a request ended, and give it its verdict."""
        errand = outcome.errand
        complaints: list[str] = []
        if outcome.ending == "overdue":
            excuse = self._history.troubled_time(
                frozenset([errand.host, "master"]), outcome.began, outcome.ended
            )
            outcome.verdict = "overdue"
            if not excuse:
                complaints.append(f"no end after {outcome.ended - outcome.began:.1f} s")
        elif outcome.ending == "refused":
            outcome.verdict = "refused"
            if not self._causes.near(
                frozenset(["master"]), outcome, frozenset({"master killed", "master stopped"})
            ):
                complaints.append("refused by a master that is there")
        elif outcome.ending == "lost":
            outcome.verdict = "connection lost"
            if not self._causes.was_broken(outcome):
                complaints.append("the connection was lost before the answer, and nobody broke it")
        elif outcome.status >= 400:
            self._judge_error(outcome, complaints)
        elif outcome.status:
            self._judge_answer(outcome, complaints)
        else:
            outcome.verdict = "left early"
        for complaint in complaints:
            self._history.violate(f"request {errand.number} to {errand.model}: {complaint}")
        self._history.note(f"client {errand.number}: {outcome.ending}, {outcome.verdict}")

    def _judge_error(self, outcome: Outcome, complaints: list[str]) -> None:
        outcome.verdict = f"status {outcome.status}"
        if not outcome.complete:
            if outcome.ending != "left" and not self._causes.was_broken(outcome):
                complaints.append(f"half of an error with status {outcome.status}")
            return
        try:
            error = json.loads(outcome.body)["error"]
            code = error["code"]
        except (ValueError, KeyError, TypeError):
            complaints.append(f"an error that is no envelope: {outcome.body[:200]!r}")
            return
        outcome.verdict = f"{outcome.status} {code}"
        if not self._causes.explains(outcome, code):
            complaints.append(f"an error without a cause: {code}: {error['message']}")

    def _judge_answer(self, outcome: Outcome, complaints: list[str]) -> None:
        script = outcome.errand.script
        if outcome.content_type.startswith("text/event-stream"):
            self._judge_stream(outcome, complaints)
        elif outcome.complete:
            outcome.verdict = "complete"
            if script.fails is not None:
                complaints.append("a complete answer of a model that failed")
            elif not script.is_whole(outcome.body):
                complaints.append(f"an answer that looks complete and is not: {outcome.body[:200]!r}")
        else:
            outcome.verdict = "cut"
            if script.kind == "tts" and not script.whole.encode().startswith(outcome.body):
                complaints.append("the beginning of an answer that is another one")
            if outcome.ending != "left" and not self._causes.may_fail(outcome):
                complaints.append("an answer was cut for no reason")

    def _judge_stream(self, outcome: Outcome, complaints: list[str]) -> None:
        script = outcome.errand.script
        try:
            report = read_stream(outcome.body)
        except StreamGrammarError as error:
            complaints.append(f"the stream breaks the grammar: {_short(str(error))}")
            return
        outcome.verdict = f"stream {report.ending}"
        if report.ending == "finished":
            if script.fails is not None:
                complaints.append("a finished stream of a model that failed")
            if report.text != script.whole:
                complaints.append(f"a finished stream with another text: {report.text[:200]!r}")
        elif not script.whole.startswith(report.text):
            complaints.append(f"a stream that did not finish, with another text: {report.text[-200:]!r}")
        if outcome.complete != (report.ending == "finished") and outcome.ending != "left":
            broken = self._causes.was_broken(outcome)
            if outcome.complete or not broken:
                complaints.append(
                    f"a stream that was {report.ending} in a body with complete={outcome.complete}"
                )
        if report.error is not None:
            outcome.verdict = f"stream failed {report.error['code']}"
            if not self._causes.explains(outcome, report.error["code"]):
                complaints.append(f"an error without a cause: {report.error}")
        elif report.ending == "cut" and outcome.ending != "left" and not self._causes.was_broken(outcome):
            complaints.append("the stream just ends, and nobody broke the connection")

    # Of each run of a handler

    def judge_runs(self, outcomes: list[Outcome]) -> None:
        """Check what the handlers did for the requests that ended like this."""
        for outcome in outcomes:
            runs = self._actors.runs_of(outcome.errand.number)
            for complaint in self._complaints_about_runs(outcome, runs):
                self._history.violate(
                    f"request {outcome.errand.number} to {outcome.errand.model}: {complaint}"
                )

    def _complaints_about_runs(self, outcome: Outcome, runs: list[Run]) -> list[str]:
        errand = outcome.errand
        complaints = []
        if len(runs) > 2:
            complaints.append(f"{len(runs)} handlers ran for it")
        if errand.manner == "aborts upload" and runs:
            complaints.append("a handler ran for half of a request")
        if outcome.verdict in ("complete", "stream finished") and not runs:
            complaints.append("it was answered, and no handler ran")
        ends = [*(run.began for run in runs[1:]), outcome.ended]
        for run, gone in zip(runs, ends, strict=False):
            late = run.ended - gone - self._may_outlive(outcome, run, gone)
            life = self._stage.life(run.life)
            if late > 0 and not life.killed:
                complaints.append(
                    f"its handler on {run.node} ran for {run.ended - gone:.3f} s after it was over"
                )
        if errand.budget is not None:
            complaints += [
                "a handler began when the time for the answer was over"
                for run in runs
                if run.began - outcome.began > errand.budget + self._causes.transport(errand)
                and not self._history.troubles(
                    self._causes.hosts(errand), outcome.began - self._causes.aftermath, run.began
                )
            ]
        complaints += self._delays(outcome, runs)
        if errand.budget is not None and runs and outcome.ending == "answered":
            complaints += self._lateness(outcome, runs[-1], errand.budget)
        if runs and runs[-1].stopped and outcome.verdict.endswith(("cancelled", "shutting_down")):
            complaints += self._haste(outcome, runs[-1])
        return complaints

    def _lateness(self, outcome: Outcome, run: Run, budget: float) -> list[str]:
        """Complain about an answer that came later than the client wanted to wait, from a node that was well."""
        errand, took = outcome.errand, outcome.ended - outcome.began
        may = budget + run.script.clings + self._causes.pauses(errand) + self._causes.transport(errand)
        hosts = frozenset([run.node, "master", errand.host])
        if took <= may or self._history.troubles(
            hosts, outcome.began - self._causes.aftermath, outcome.ended
        ):
            return []
        return [f"it was given {budget:g} s, and took {took:.3f} s"]

    def _haste(self, outcome: Outcome, run: Run) -> list[str]:
        """Complain about a handler that ran when its node was stopped, and was not given the time for that."""
        if self._causes.was_cancelled(outcome):
            return []
        nodes = frozenset([run.node, "master"])
        if self._history.troubles(nodes, run.began - self._causes.aftermath, run.ended, LOSSES - STOPS):
            return []
        stops = [stop.began for stop in self._history.troubles(nodes, outcome.began, run.ended, STOPS)]
        given = float(self._plan.options["drain_timeout"]) - MARGIN
        if max(stops, default=-1.0) < run.began or run.ended - min(stops) >= given:
            return []
        late = run.ended - min(stops)
        return [f"its handler on {run.node} was stopped {late:.3f} s after the node was to stop"]

    def _may_outlive(self, outcome: Outcome, run: Run, gone: float) -> float:
        """Return for how many seconds a handler may go on after nobody wants its answer any more."""
        until = min(run.ended, self._history.now)
        towards = self._history.troubled_time(frozenset([outcome.errand.host, "master"]), gone, until)
        # The worker notices by itself that it is cut off.
        since = gone - self._causes.aftermath
        onwards = min(self._history.troubled_time(frozenset([run.node]), since, until), self._causes.silence)
        return run.script.clings + towards + onwards + self._causes.transport(outcome.errand)

    def _delays(self, outcome: Outcome, runs: list[Run]) -> list[str]:
        """Complain about an answer that took longer than its model and the network need, in fine weather."""
        errand = outcome.errand
        if outcome.verdict not in ("complete", "stream finished") or len(runs) != 1:
            return []
        hosts = self._causes.hosts(errand) | {errand.host}
        if self._history.troubles(hosts, outcome.began - self._causes.aftermath, outcome.ended):
            return []
        took = outcome.ended - runs[0].began
        may = errand.script.duration + self._causes.pauses(errand) + self._causes.transport(errand)
        return [f"it took {took:.3f} s instead of {may:.3f} s"] if took > may else []

    # At rest

    def absent(self) -> list[str]:
        """Return what a cluster that is whole again should have, and has not."""
        master = self._stage.lives["master"].server
        manager = master.worker_manager
        joined: dict[str, Any] = {} if manager is None else manager.workers
        missing = [f"{name} is not connected" for name in self._plan.workers if name not in joined]
        missing += [f"{name} should not be there" for name in joined if name not in self._plan.workers]
        for model in self._plan.models:
            served = [
                ("master" if name == LOCAL else name)
                for name in master.registry.catalog.served_by(model.name)
            ]
            if sorted(served) != sorted(model.hosts):
                missing.append(f"{model.name} is served by {served}, not by {list(model.hosts)}")
        return missing


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"
