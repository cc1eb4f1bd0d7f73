"""Random schedules: a few are played on each run of the tests, and they can be replayed. See `test_planted_bugs.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any, ClassVar, get_args

import pytest
import trio
from trio.testing import MockClock

from trio_cluster.core.limits import WINDOW
from trio_cluster.gateway.body import SPOOL_THRESHOLD
from trio_cluster.testing import ScheduleFailed, ScheduleReport, open_cluster, run_schedule
from trio_cluster.testing.__main__ import main
from trio_cluster.testing._fault_oracle import FaultOracle
from trio_cluster.testing._history import History
from trio_cluster.testing._invariants import Invariants
from trio_cluster.testing._plan import MEMORY, ClientBehavior, FaultKind, Plan, SimulatedRequest, draw_plan
from trio_cluster.testing._scripted_models import HandlerRun, ScriptedModels
from trio_cluster.testing._scripted_residents import ScriptedResidents
from trio_cluster.testing._scripts import Failure, Script, ScriptedFailure, read_script
from trio_cluster.testing._simulation import MAX_IGNORED_CANCELLATION
from trio_cluster.testing._soak import soak
from trio_cluster.testing._workload import Outcome

SMALL: dict[str, Any] = {"seconds": 12, "requests": 20, "faults": 8}
#: A sample; ``nox -s soak`` plays new ones for as long as it is given.
SEEDS = range(1, 11)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_invariants_hold_in_this_schedule(seed: int) -> None:
    report = run_schedule(seed, **SMALL)
    assert report.requests == SMALL["requests"] == report.outcomes.total()
    assert report.simulated > SMALL["seconds"] / 2


def test_a_seed_gives_the_same_log_in_another_process() -> None:
    logs = [
        subprocess.run(
            [sys.executable, "-m", "trio_cluster.testing", "4", "--log"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout.splitlines()
        for hash_seed in ("1", "2")
    ]
    # The line before the digest has the real time that it took.
    first, second = ([*log[:-2], log[-1]] for log in logs)
    assert len(first) > 100
    assert first == second


def test_another_seed_gives_another_log() -> None:
    first, second = (run_schedule(seed, seconds=1, requests=2, faults=1).digest for seed in (1, 2))
    assert first != second


def test_plans_have_uploads_that_are_streamed() -> None:
    plans = [draw_plan(seed, seconds=30, requests=60, faults=16) for seed in range(20)]
    scripts = [
        request.script
        for plan in plans
        for request in plan.requests
        if request.script.padding > SPOOL_THRESHOLD
    ]
    assert {script.kind for script in scripts} == {"asr"}
    assert {script.model_last for script in scripts} == {False, True}
    for script in scripts[:2]:
        _, body, _ = script.request("m", stream=False, route="")
        assert len(body) > SPOOL_THRESHOLD
        assert (body.index(b'name="model"') > SPOOL_THRESHOLD) is script.model_last


#: What a dozen seeds in a row must contain. Fewer would not have every kind of fault: some of them are rare.
DOZEN = [draw_plan(seed, seconds=30, requests=60, faults=16) for seed in range(12)]


def test_a_dozen_plans_have_every_path_of_a_token() -> None:
    # The fast path or the slow one; waiting for other tokens on a busy link, or not.
    paths = Counter((plan.fast_path, plan.options["batch_wait"] > 0) for plan in DOZEN)
    assert paths == {(True, True): 6, (True, False): 2, (False, True): 3, (False, False): 1}


def test_a_dozen_plans_cut_links_all_the_time_and_resume_them_or_not() -> None:
    resets = [sum(fault.kind == "link reset" for fault in plan.faults) for plan in DOZEN]
    assert sum(count >= 30 for count in resets) == 4
    assert {plan.options["resume_window"] > 0 for plan in DOZEN} == {True, False}


def test_a_dozen_plans_have_one_master_or_two() -> None:
    two = [plan for plan in DOZEN if len(plan.masters) > 1]
    assert len(two) == 3
    assert {request.master for plan in two for request in plan.requests} == {"master", "master-2"}
    assert {request.master for plan in DOZEN if plan not in two for request in plan.requests} == {"master"}


def test_some_of_a_dozen_plans_have_models_on_demand_that_do_not_fit_together() -> None:
    plans = [plan for plan in DOZEN if plan.residents]
    assert 2 <= len(plans) <= 6
    for plan in plans:
        assert sum(spec.memory for spec in plan.residents) > MEMORY
        assert max(spec.memory for spec in plan.residents) <= MEMORY
        names = {spec.model for spec in plan.residents}
        assert names < {model.name for model in plan.models}
        assert any(request.model in names for request in plan.requests)
    starts = [start for plan in plans for spec in plan.residents for start in spec.starts]
    assert {start.fails for start in starts} == {True, False}


def test_a_dozen_plans_have_every_fault() -> None:
    drawn = {fault.kind for plan in DOZEN for fault in plan.faults}
    assert drawn == set(get_args(FaultKind))
    targets = {(fault.kind.split()[0], fault.target) for plan in DOZEN for fault in plan.faults}
    assert {target for what, target in targets if what == "master"} == {"master", "master-2"}
    assert {target for what, target in targets if what in ("worker", "link")} >= {"w1", "w2", "w3"}
    assert {target for what, target in targets if what in ("client", "connection", "call", "failover")} == {
        ""
    }


def test_a_dozen_plans_have_every_kind_of_client() -> None:
    requests = [request for plan in DOZEN for request in plan.requests]
    assert {request.behavior for request in requests} == set(get_args(ClientBehavior))
    assert {request.route for request in requests} == {"chat", "completions", "messages"}
    for kind in ("chat", "asr"):
        assert {request.stream for request in requests if request.script.kind == kind} == {True, False}
    for limit in ("total_timeout", "idle_timeout"):
        assert {getattr(request, limit) is None for request in requests} == {True, False}


def test_a_dozen_plans_have_every_model_and_every_script() -> None:
    models = {model.name: model for plan in DOZEN for model in plan.models}
    assert {model.kind for model in models.values()} == {
        "chat",
        "tts",
        "asr",
        "embedding",
        "image_generation",
    }
    for kind in {model.kind for model in models.values()}:
        forms = {model.yields for plan in DOZEN for model in plan.models if model.kind == kind}
        assert forms == {True, False}
    assert {request.model for plan in DOZEN for request in plan.requests} == models.keys()
    scripts = [request.script for plan in DOZEN for request in plan.requests]
    assert {script.fails for script in scripts} == {None, *get_args(Failure)}
    assert {script.stalls_at >= 0 for script in scripts} == {True, False}
    assert {script.ignore_cancellation_for > 0 for script in scripts} == {True, False}
    assert max(script.ignore_cancellation_for for script in scripts) <= MAX_IGNORED_CANCELLATION
    # On both sides of a window, in either direction.
    assert {script.output_bytes > WINDOW for script in scripts} == {True, False}
    assert {script.padding > WINDOW for script in scripts} == {True, False}


def test_a_dozen_plans_have_every_size_of_a_cluster() -> None:
    assert {len(plan.workers) for plan in DOZEN} == {2, 3, 4}
    assert {slots for plan in DOZEN for slots in plan.slots.values()} == {1, 2, 3, 4}
    assert {plan.latency for plan in DOZEN} == {0.0, 0.001, 0.02}
    assert {plan.options["queue_timeout"] for plan in DOZEN} == {0.0, 1.0, 4.0}
    assert {plan.options["drain_timeout"] for plan in DOZEN} == {1.0, 4.0, 8.0}


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_schedule_is_played_on_the_path_of_its_plan(
    fast_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[bool] = []

    def record(**options: Any) -> Any:
        opened.append(options["fast_path"])
        return open_cluster(**options)

    monkeypatch.setattr("trio_cluster.testing._schedule.open_cluster", record)
    seed = 1 if fast_path else 3
    run_schedule(seed, seconds=1, requests=2, faults=1)
    assert opened == [fast_path] == [draw_plan(seed, seconds=1, requests=2, faults=1).fast_path]


def test_a_plan_follows_from_its_seed() -> None:
    assert draw_plan(7, seconds=30, requests=60, faults=16) == draw_plan(
        7, seconds=30, requests=60, faults=16
    )
    assert draw_plan(7, seconds=30, requests=60, faults=16) != draw_plan(
        8, seconds=30, requests=60, faults=16
    )


# The command line


def test_a_schedule_is_replayed_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["4"]) == 0
    out = capsys.readouterr().out
    assert "schedule 4: " in out
    assert run_schedule(4).digest in out


def test_a_schedule_that_fails_prints_what_was_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(seed: int) -> ScheduleReport:
        raise ScheduleFailed(seed, ["1.000: it broke"], ["    1.000 a line of the log"])

    monkeypatch.setattr("trio_cluster.testing.__main__.run_schedule", fails)
    assert main(["--seed", "9", "--log"]) == 1
    out = capsys.readouterr().out
    assert "1.000: it broke" in out
    assert out.count("a line of the log") == 2


def test_a_soak_test_adds_up_the_results_of_its_processes(capsys: pytest.CaptureFixture[str]) -> None:
    tally = soak(3, count=2, seconds=60, processes=2)
    assert tally.schedules == 2
    assert tally.failures == []
    assert tally.requests == tally.outcomes.total()
    assert tally.simulated > 30
    assert "2 schedules, 0 of them failed" in tally.describe()


# The checker


@pytest.fixture
def plan() -> Plan:
    return draw_plan(1, seconds=1, requests=1, faults=0)


def outcome(body: bytes, *, complete: bool, status: int = 200, fails: Any = None) -> Outcome:
    kind = "text/event-stream" if body.startswith(b"data") else "application/json"
    request = SimulatedRequest(0.0, "everywhere", Script(1, "chat", pieces=2, fails=fails))
    return Outcome(request, 0.0, 0.5, "answered", status, kind, body, complete)


def stream(*texts: str, end: bytes = b"") -> bytes:
    choices = [
        {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts
    ]
    return b"".join(b"data: " + json.dumps(choice).encode() + b"\n\n" for choice in choices) + end


STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
LOST = b'data: {"error":{"message":"lost","code":"worker_lost"}}\n\n'


def violations(plan: Plan, it: Outcome, *faults: tuple[str, str]) -> list[str]:
    """Return the violations that are found in an outcome, with these faults just before it."""

    async def check() -> list[str]:
        history = History(ScriptedFailure)
        history.start()
        for kind, host in faults:
            history.record_instant(kind, host)
        models = ScriptedModels(history, ScriptedResidents(plan, history))
        Invariants(plan, None, history, models).check_outcome(it)  # type: ignore[arg-type]
        return history.violations

    return trio.run(check, clock=MockClock())


@pytest.mark.parametrize(
    ("it", "complaint"),
    [
        (outcome(stream("1.0 ", "1.0 ", end=STOP), complete=True), "with another text"),
        (outcome(stream("1.0 ", end=STOP), complete=True), "with another text"),
        (outcome(stream("1.0 ", "2.1 ", end=LOST), complete=True), "with another text"),
        (
            outcome(stream("1.0 ", "1.1 ", end=STOP), complete=True, fails="api_error"),
            "of a model that failed",
        ),
        (outcome(stream("1.0 "), complete=True), "in a body with complete=True"),
        (outcome(stream("1.0 ", end=LOST), complete=True), "an error without a cause"),
        (outcome(stream("1.0 ", end=LOST), complete=False), "was failed in a body with complete=False"),
        (outcome(stream("1.0 "), complete=False), "just ends"),
        (outcome(stream("1.0 ", end=STOP + LOST), complete=False), "breaks the grammar"),
        (outcome(b'{"choices":[{"message":{"content":"1.0 "}}]}', complete=True), "complete and is not"),
        (
            outcome(b'{"error":{"message":"?","code":"timeout"}}', complete=True, status=504),
            "without a cause",
        ),
        (outcome(b'{"error":{"message":"?","code":"oops"}}', complete=True, status=500), "without a cause"),
        (outcome(b"<html>", complete=True, status=502), "without an envelope"),
    ],
)
def test_the_checker_complains(plan: Plan, it: Outcome, complaint: str) -> None:
    assert any(complaint in violation for violation in violations(plan, it)), violations(plan, it)


@pytest.mark.parametrize(
    ("it", "faults"),
    [
        (outcome(stream("1.0 ", "1.1 ", end=STOP), complete=True), ()),
        (outcome(stream("1.0 ", end=LOST), complete=True), [("worker killed", "w1")]),
        (outcome(stream("1.0 "), complete=False), [("connection cut", "client-1")]),
        (
            outcome(
                b'{"error":{"message":"?","code":"scripted"}}', complete=True, status=429, fails="api_error"
            ),
            (),
        ),
    ],
)
def test_the_checker_accepts(plan: Plan, it: Outcome, faults: list[tuple[str, str]]) -> None:
    assert violations(plan, it, *faults) == []


def test_a_handler_that_outlives_its_client_is_found(plan: Plan) -> None:
    async def check() -> list[str]:
        history = History(ScriptedFailure)
        history.start()
        models = ScriptedModels(history, ScriptedResidents(plan, history))
        it = outcome(stream("1.0 ", "1.1 ", end=STOP), complete=True)
        it.verdict = "stream finished"
        late = it.ended + FaultOracle(plan, history).transport_time(it.request) + 0.01
        models.runs.append(HandlerRun(it.request.script, "everywhere", "w1", 1, 0.0, late))
        await trio.sleep(10)

        class Simulation:
            openings: ClassVar[dict[int, Any]] = {}
            process = staticmethod(lambda number: type("ProcessRun", (), {"killed": False}))

        Invariants(plan, Simulation(), history, models).check_runs([it])  # type: ignore[arg-type]
        return history.violations

    found = trio.run(check, clock=MockClock(autojump_threshold=0))
    assert any("after it was over" in violation for violation in found)


def test_faulty_time_counts_each_instant_once() -> None:
    async def count() -> None:
        history = History(ScriptedFailure)
        history.start()
        first = history.begin_fault("link partitioned", "w1")
        await trio.sleep(2)
        second = history.begin_fault("worker frozen", "w1")
        await trio.sleep(1)
        history.end_fault(first)
        await trio.sleep(1)
        history.end_fault(second)
        await trio.sleep(1)
        assert history.faulty_time(frozenset(["w1"]), 1, 5) == pytest.approx(3)
        assert history.faulty_time(frozenset(["w2"]), 1, 5) == 0

    trio.run(count, clock=MockClock(autojump_threshold=0))


def test_a_script_knows_its_output_and_detects_a_damaged_request() -> None:
    script = Script(12, "chat", pieces=3, size=70_000, padding=300)
    assert read_script(script.dump()) == script
    assert script.output == script.piece(0) + script.piece(1) + script.piece(2)
    assert [len(script.piece(index)) for index in range(3)] == [70_000] * 3
    damaged = script.dump().replace(script.dump()[-20:-10], script.dump()[-19:-9])
    with pytest.raises(ValueError, match="damaged"):
        read_script(damaged)
