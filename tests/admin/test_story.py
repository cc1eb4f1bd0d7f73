"""What a story says: how a request ended and by whom, what took longest, and the words of each step."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from trio_cluster.admin.story import story_view
from trio_cluster.core import clock
from trio_cluster.core.answer import Usage
from trio_cluster.core.clock import NEVER
from trio_cluster.core.story import AttemptFacts, StoryFacts
from trio_cluster.gateway.story_ending import ending_of


def attempt(**changes: Any) -> AttemptFacts:
    """Return an attempt on worker 'w1' that was opened at 100.1 and complete at 103."""
    facts = AttemptFacts(
        node="w1",
        model="m",
        forwarded=True,
        why="the only one",
        candidates=[],
        cached=0,
        prompt_size=0,
        opened_at=100.1,
        started_at=NEVER,
        begun_at=101.0,
        ended_at=103.0,
        released_at=103.0,
        waiting=False,
        queued_at=NEVER,
        queued_for=0.0,
        queued_for_model=0.0,
        cold_since=NEVER,
        cold_for=0.0,
        cold="",
        held_back=0.0,
        notes=[],
        cancelled=None,
        cancelled_by="",
        cancelled_at=NEVER,
        overdue=False,
        superseded=False,
        complete=True,
        lost=False,
        retryable=False,
        timed_out=False,
        over_capacity=False,
        error=None,
        usage=None,
        delivered=1000,
        times={},
    )
    return msgspec.structs.replace(facts, **changes)


def failed(status: int, code: str, message: str = "so it is", **changes: Any) -> AttemptFacts:
    failure = {"complete": False, "begun_at": NEVER, "error": (status, code, message)}
    return attempt(**(failure | changes))


def cancelled(reason: str, **changes: Any) -> AttemptFacts:
    at = {"cancelled": reason, "cancelled_at": 103.0}
    return failed(503, "cancelled", f"The request was cancelled: {reason}", **(at | changes))


def story(*attempts: AttemptFacts, **changes: Any) -> StoryFacts:
    """Return the story of a request that arrived at 100 and was over at 103."""
    facts = StoryFacts(
        request_id="r1",
        endpoint="chat.completions",
        path="/v1/chat/completions",
        model="m",
        key="team",
        client="10.0.0.9:4711",
        size=123,
        idle_timeout=60.0,
        total_timeout=math.inf,
        default_timeout=60.0,
        began=100.0,
        uploaded_at=NEVER,
        answered_at=101.0,
        ended_at=103.0,
        status=200,
        error=None,
        left=False,
        delivered=True,
        early=False,
        attempts=list(attempts),
        answering=len(attempts) - 1,
    )
    return msgspec.structs.replace(facts, **changes)


@pytest.fixture(autouse=True)
def at_110(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: 110.0)


# How it ended. What the law of lifetimes can cause is compared in `tests/lifetimes/test_matrix.py`.
ENDINGS: list[tuple[StoryFacts, str, str, str]] = [
    (story(attempt()), "completed", "model", "the answer was complete, with status 200"),
    (story(attempt(), status=429), "completed", "model", "the answer was complete, with status 429"),
    (story(attempt(), ended_at=NEVER), "running", "", "it is not over"),
    (
        story(status=429, error=(429, "rate_limit_exceeded", "Too many")),
        "refused",
        "node",
        "refused: 429 rate_limit_exceeded: Too many",
    ),
    (story(status=413, error=(413, "", "Too large")), "refused", "node", "refused: 413: Too large"),
    (
        story(status=408, error=(408, "", "Too late")),
        "timed_out",
        "client",
        "the client did not send its body in time",
    ),
    (
        story(cancelled("the request was refused"), status=408, error=(408, "", "Too late")),
        "timed_out",
        "client",
        "the client did not send its body in time",
    ),
    (
        story(status=0, left=True, delivered=False),
        "cancelled",
        "client",
        "the client left before its request was admitted",
    ),
    (
        story(status=0, delivered=False),
        "cancelled",
        "node",
        "this node ended it before it was admitted: it is being stopped",
    ),
    (
        story(attempt(), left=True, delivered=False),
        "cancelled",
        "client",
        "the client left before it had all of the answer",
    ),
    (
        story(attempt(), delivered=False),
        "cancelled",
        "node",
        "this node was stopped before the client had all of the answer",
    ),
    (
        story(cancelled("client left"), left=True),
        "cancelled",
        "client",
        "the client left before the answer had begun",
    ),
    (
        story(cancelled("client left", begun_at=101.0), left=True),
        "cancelled",
        "client",
        "the client left in the middle of the answer",
    ),
    # Its client leaves when it is told, or was about to. It has not ended the request.
    (
        story(cancelled("enough", cancelled_by="ops"), left=True, delivered=False),
        "cancelled",
        "operator",
        "cancelled by an operator (ops): enough",
    ),
    (
        story(cancelled("the server is being stopped")),
        "cancelled",
        "node",
        "cancelled by this node: the server is being stopped",
    ),
    (
        story(
            cancelled("the answer to a request for a stream is none"),
            error=(502, "not_a_stream", "Something else"),
        ),
        "refused",
        "node",
        "refused: 502 not_a_stream: Something else",
    ),
    (
        story(failed(502, "worker_lost", "it was lost: killed", lost=True)),
        "worker_lost",
        "worker",
        "worker 'w1' was lost: 502 worker_lost: it was lost: killed",
    ),
    # A handler may choose any code for its own error.
    (
        story(failed(502, "worker_lost", "I say")),
        "failed",
        "model",
        "the model 'm' failed on worker 'w1': 502 worker_lost: I say",
    ),
    (
        story(failed(503, "over_capacity", over_capacity=True)),
        "failed",
        "worker",
        "worker 'w1' could not take it: 503 over_capacity: so it is",
    ),
    (
        story(failed(503, "over_capacity", over_capacity=True, forwarded=False, node="local")),
        "failed",
        "node",
        "this node could not take it: 503 over_capacity: so it is",
    ),
    (
        story(failed(503, "shutting_down", retryable=True)),
        "failed",
        "worker",
        "worker 'w1' gave it back: 503 shutting_down: so it is",
    ),
    (
        story(failed(503, "cancelled")),
        "cancelled",
        "worker",
        "cancelled by worker 'w1': 503 cancelled: so it is",
    ),
    (
        story(failed(504, "timeout", timed_out=True), total_timeout=2.9, idle_timeout=2.9),
        "timed_out",
        "client",
        "not complete within the client's time limit for the whole answer (x-request-timeout: 2.9 s)",
    ),
    (
        story(failed(504, "timeout", timed_out=True), idle_timeout=2.9),
        "timed_out",
        "client",
        "silent for longer than the client waits (x-stainless-read-timeout: 2.9 s)",
    ),
    (
        story(failed(504, "timeout", timed_out=True), idle_timeout=2.9, default_timeout=2.9),
        "timed_out",
        "node",
        "silent for 2.9 s (option default_timeout)",
    ),
    (
        story(failed(504, "timeout", "nothing for 2 s", timed_out=True)),
        "timed_out",
        "worker",
        "silent for longer than worker 'w1' allows: 504 timeout: nothing for 2 s",
    ),
    (
        story(cancelled("silent for 2.9 s", overdue=True), idle_timeout=2.9, default_timeout=2.9),
        "timed_out",
        "node",
        "silent for 2.9 s (option default_timeout)",
    ),
    (
        story(failed(502, "worker_lost", lost=True), error=(503, "over_capacity", "All busy"), status=503),
        "refused",
        "node",
        "worker 'w1' failed (502 worker_lost: so it is), and it could not be tried elsewhere: 503 over_capacity: "
        "All busy",
    ),
    # The deadline passes in the moment in which the worker is lost.
    (
        story(
            failed(502, "worker_lost", lost=True),
            error=(504, "timeout", "silent for 2.9 s"),
            status=504,
            idle_timeout=2.9,
            default_timeout=2.9,
        ),
        "timed_out",
        "node",
        "silent for 2.9 s (option default_timeout)",
    ),
    (
        story(
            failed(500, "handler_failed"),
            failed(502, "worker_lost", lost=True, node="w2"),
            error=(500, "handler_failed", "so it is"),
        ),
        "failed",
        "model",
        "the model 'm' failed on worker 'w1': 500 handler_failed: so it is",
    ),
    # The last one of several attempts counts, or the one that has answered.
    (
        story(failed(502, "worker_lost", lost=True), attempt(node="w2")),
        "completed",
        "model",
        "the answer was complete, with status 200",
    ),
    (
        story(attempt(), cancelled("the other has answered", superseded=True), answering=0),
        "completed",
        "model",
        "the answer was complete, with status 200",
    ),
]


@pytest.mark.parametrize(("facts", "outcome", "by", "text"), ENDINGS)
def test_the_end_names_its_cause(facts: StoryFacts, outcome: str, by: str, text: str) -> None:
    ending = ending_of(facts)
    assert (ending.outcome, ending.by, ending.text) == (outcome, by, text)


def steps(facts: StoryFacts) -> list[str]:
    return [f"+{step.at:.3f} {step.text}" for step in story_view(facts).steps]


def test_the_steps_of_a_plain_request() -> None:
    times = {"started": 10_000, "first_output": 700_000, "ended": 2_700_000, "queued": 10_000}
    facts = story(attempt(times=times, usage=Usage(100, 20, 60)))
    assert steps(facts) == [
        "+0.000 the request arrived: chat.completions for 'm' with key 'team' from 10.0.0.9:4711",
        "+0.100 admitted with its body of 123 bytes",
        "+0.100 sent to worker 'w1': the only one",
        # Half of the 0.2 s of both ways, and what the worker has measured.
        "+0.210 waited 0.010 s in the queue of worker 'w1'",
        "+0.210 the handler of 'm' began on worker 'w1'",
        "+1.000 first output, 0.900 s after it was sent to worker 'w1'",
        "+1.000 the response began with status 200",
        "+3.000 the answer was complete: 100 tokens read (60 from the cache), 20 written",
        "+3.000 over: the answer was complete, with status 200",
    ]


def test_the_steps_of_a_request_that_is_answered_here() -> None:
    facts = story(
        attempt(node="local", forwarded=False, started_at=100.6, queued_for=0.1, queued_for_model=0.4),
        key="",
        uploaded_at=100.5,
        size=-1,
    )
    assert steps(facts)[:6] == [
        "+0.000 the request arrived: chat.completions for 'm' from 10.0.0.9:4711",
        "+0.100 admitted while its body arrives",
        "+0.100 sent to this node: the only one",
        "+0.500 the client had sent all of its body",
        "+0.600 waited 0.500 s in the queue of model 'm'",
        "+0.600 the handler of 'm' began on this node",
    ]


def test_a_model_that_had_to_be_started_is_told() -> None:
    times = {"started": 8_000_000, "first_output": 8_100_000, "cold": 7_900_000}
    facts = story(attempt(opened_at=100.0, begun_at=108.1, ended_at=108.2, times=times), ended_at=108.2)
    assert "+8.000 waited 7.900 s for model 'm' to start on worker 'w1'" in steps(facts)
    assert story_view(facts).attempts[0].cold_for == 7.9


def test_a_choice_is_told_with_its_numbers() -> None:
    candidates = [("w2", 0.9, 0), ("w1", 0.5, 3000), ("w3", 2.0, 100)]
    facts = story(attempt(candidates=candidates, cached=3000, prompt_size=4000))
    assert steps(facts)[2] == (
        "+0.100 sent to worker 'w1': the least cost of 3 replicas ('w1' 0.500 s, 3000 of 4000 bytes cached; "
        "'w2' 0.900 s, 0 of 4000 bytes cached; 'w3' 2.000 s, 100 of 4000 bytes cached)"
    )
    view = story_view(facts).attempts[0]
    assert [(each.node, each.cost, each.cached_bytes, each.chosen) for each in view.candidates] == [
        ("w2", 0.9, 0, False),
        ("w1", 0.5, 3000, True),
        ("w3", 2.0, 100, False),
    ]
    # Costs that differ by little count as equal.
    near = [("w2", 0.5, 0), ("w1", 0.51, 3000)]
    assert "about the least cost, and most in its cache of 2" in steps(story(attempt(candidates=near)))[2]
    near = [("w2", 0.5, 0), ("w1", 0.51, 0)]
    assert "about the least cost, and used longest ago of 2" in steps(story(attempt(candidates=near)))[2]
    many = [(f"w{number}", float(number), 0) for number in range(1, 9)]
    assert steps(story(attempt(candidates=many)))[2].endswith("; and 3 more)")


def test_a_machine_that_was_woken_is_no_failure() -> None:
    wait = {
        "node": "w1, asleep",
        "forwarded": False,
        "cold_for": 1.9,
        "ended_at": 102.0,
        "released_at": 102.0,
    }
    woken = failed(503, "model_unavailable", retryable=True, **wait)
    facts = story(woken, attempt(opened_at=102.0, begun_at=102.1))
    assert [step for step in steps(facts) if step.startswith("+2.0") or "sleep" in step] == [
        "+0.100 sent to the sleeping worker 'w1': the only one",
        "+2.000 waited 1.900 s for the machine of worker 'w1' to wake",
        "+2.000 a worker has brought 'm'",
        "+2.000 sent to worker 'w1': the only one",
    ]
    assert story_view(facts).slowest == "1.900 of 3.000 s for the machine of worker 'w1' to wake"
    facts = story(failed(503, "model_start_failed", "it did not", retryable=True, **wait))
    assert steps(facts)[-1].endswith(
        "over: the sleeping worker 'w1' could not answer it: 503 model_start_failed: it did not"
    )
    assert "+2.000 the sleeping worker 'w1' failed: 503 model_start_failed: it did not" in steps(facts)


def test_further_attempts_say_why_there_are_any() -> None:
    lost = failed(502, "worker_lost", "lost", lost=True, retryable=True, ended_at=101.0, released_at=101.0)
    facts = story(lost, attempt(node="w2", opened_at=101.0, begun_at=102.0))
    assert [step for step in steps(facts) if "w2" in step or "lost" in step] == [
        "+1.000 worker 'w1' failed: 502 worker_lost: lost",
        "+1.000 tried once more, on worker 'w2': the only one",
        "+2.000 first output, 1.000 s after it was sent to worker 'w2'",
    ]
    assert [each.kind for each in story_view(facts).attempts] == ["first", "retry"]
    facts = story(lost, attempt(model="b", opened_at=101.0), model="either")
    assert "+0.100 sent to worker 'w1' as model 'm', which 'either' stands for: the only one" in steps(facts)
    assert "+1.000 went on to the next name, 'b', on worker 'w1': the only one" in steps(facts)
    loser = cancelled("the other attempt has answered first", superseded=True, opened_at=100.9)
    loser = msgspec.structs.replace(loser, ended_at=101.0, released_at=101.5)
    facts = story(attempt(), loser, answering=0)
    assert [each.kind for each in story_view(facts).attempts] == ["first", "hedge"]
    assert "+0.900 sent to worker 'w1' as well, since the first attempt is late: the only one" in steps(facts)
    assert "+1.000 the attempt on worker 'w1' was cancelled: the other attempt has answered first" in steps(
        facts
    )
    assert "+1.500 the work on worker 'w1' had stopped, 0.500 s later, and its slot was free" in steps(facts)


def test_what_runs_says_what_it_waits_for() -> None:
    open_ = {"begun_at": NEVER, "ended_at": NEVER, "released_at": NEVER, "complete": False}
    running = {"ended_at": NEVER, "answered_at": NEVER, "status": 0, "delivered": False}

    def now(*attempts: AttemptFacts) -> str:
        return steps(story(*attempts, **running))[-1]

    assert now() == "+10.000 now: waiting for its body, or for its admission"
    assert now(attempt(**open_)) == "+10.000 now: waiting for the first output of 'm' on worker 'w1'"
    assert now(attempt(**(open_ | {"waiting": True}))) == "+10.000 now: waiting for a slot of worker 'w1'"
    cold = {"cold": "loading m", "cold_since": 104.0}
    assert now(attempt(**(open_ | cold))) == "+10.000 now: waiting for model 'm' on worker 'w1': loading m"
    begun = attempt(**(open_ | {"begun_at": 101.0}))
    assert now(begun) == "+10.000 now: answering: 1000 bytes are on their way to the client"
    assert now(attempt()) == "+10.000 now: waiting for the client to read the rest of the answer"
    held = story(cancelled("enough", released_at=NEVER))
    assert steps(held)[-1] == "+10.000 the work on worker 'w1' has not stopped yet"


@pytest.mark.parametrize(
    ("facts", "slowest"),
    [
        (story(error=(429, "", "")), "3.000 of 3.000 s for its body and its admission"),
        (story(attempt(opened_at=102.0, begun_at=102.5)), "2.000 of 3.000 s for its body and its admission"),
        (story(attempt(begun_at=102.9)), "2.800 of 3.000 s for the first output of 'm' on worker 'w1'"),
        (story(attempt()), "2.000 of 3.000 s for the rest of the output of 'm' on worker 'w1'"),
        (
            story(attempt(begun_at=102.9, times={"queued": 2_000_000})),
            "2.000 of 3.000 s in the queue of worker 'w1'",
        ),
        (
            story(attempt(begun_at=102.9, times={"queued_model": 2_000_000})),
            "2.000 of 3.000 s in the queue of model 'm'",
        ),
        (
            story(attempt(begun_at=102.9, times={"cold": 2_000_000})),
            "2.000 of 3.000 s for model 'm' to start on worker 'w1'",
        ),
        (
            story(attempt(begun_at=102.9, node="local", forwarded=False, cold_for=2.5)),
            "2.500 of 3.000 s for model 'm' to start on this node",
        ),
        (
            story(attempt(times={"held_back": 1_500_000})),
            "1.500 of 3.000 s for the client to read the answer",
        ),
        (story(attempt(ended_at=101.2)), "1.800 of 3.000 s for the client to read the answer"),
        (
            story(failed(502, "", ended_at=102.5), attempt(opened_at=102.5, begun_at=102.6)),
            "2.400 of 3.000 s for attempts that did not answer",
        ),
        (
            story(
                attempt(begun_at=NEVER, ended_at=NEVER, complete=False, waiting=True, queued_at=101.0),
                ended_at=NEVER,
            ),
            "9.000 of 10.000 s in the queue of worker 'w1'",
        ),
    ],
)
def test_what_took_longest_is_named(facts: StoryFacts, slowest: str) -> None:
    assert story_view(facts).slowest == slowest


def test_times_that_make_no_sense_do_no_harm() -> None:
    for times in ({"started": 10**15}, {"held_back": 10**18}, {"first_output": 0, "started": 0, "queued": 0}):
        view = story_view(story(attempt(times=times)))
        assert all(step.at >= 0 for step in view.steps)
