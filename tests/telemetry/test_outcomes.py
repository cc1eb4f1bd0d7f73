"""How an attempt has ended, as its span says it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra 'otel' is not installed")

from opentelemetry.trace import StatusCode

from trio_cluster.core.answer import Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.request import Request
from trio_cluster.core.story import AttemptFacts
from trio_cluster.errors import ApiError, WorkerLost
from trio_cluster.gateway.context import RequestContext
from trio_cluster.gateway.stories import CLIENT_LEFT, story_of
from trio_cluster.options import ClusterServerOptions
from trio_cluster.telemetry import names
from trio_cluster.telemetry.call_spans import local_waits, put_outcome


def attempt(act: Any = None, **attributes: Any) -> AttemptFacts:
    """Return the facts of a call with which something is done."""
    context = RequestContext([], path="/v1/embeddings")
    context.request = Request("embeddings", "embedding", "m", b"{}")
    call = Call(context.request, served_by="w1")
    for name, value in attributes.items():
        setattr(call, name, value)
    context.add_call(call)
    if act is not None:
        act(call)
    call.release()
    (facts,) = story_of(context, ClusterServerOptions()).attempts
    return facts


def complete(call: Call) -> None:
    call.put(Head())
    call.put(Done())


ERROR = ApiError(429, "not now", code="busy")


@pytest.mark.parametrize(
    ("facts", "outcome", "error", "by", "status"),
    [
        (attempt(complete), "completed", None, None, None),
        (attempt(lambda call: call.put(Failed(ERROR))), "failed", "busy", None, StatusCode.ERROR),
        (
            attempt(lambda call: call.put(Failed(ApiError(418, "tea")))),
            "failed",
            "418",
            None,
            StatusCode.ERROR,
        ),
        (
            attempt(lambda call: call.put(Failed(WorkerLost("w1", "gone"), retryable=True))),
            "worker_lost",
            "worker_lost",
            None,
            StatusCode.ERROR,
        ),
        (
            attempt(lambda call: call.put(Failed(ERROR, timed_out=True))),
            "timed_out",
            "busy",
            None,
            StatusCode.ERROR,
        ),
        (attempt(lambda call: call.cancel(CLIENT_LEFT)), "cancelled", "cancelled", "client", None),
        (
            attempt(lambda call: call.cancel("enough", operator="ann")),
            "cancelled",
            "cancelled",
            "operator",
            StatusCode.ERROR,
        ),
        (attempt(lambda call: call.expire("late")), "cancelled", "cancelled", "deadline", StatusCode.ERROR),
        (
            attempt(lambda call: call.cancel("the other attempt has answered first"), superseded=True),
            "cancelled",
            "cancelled",
            "other_attempt",
            None,
        ),
        (attempt(lambda call: call.cancel("stopping")), "cancelled", "cancelled", "node", StatusCode.ERROR),
    ],
)
def test_the_outcome_of_an_attempt(
    facts: AttemptFacts, outcome: str, error: str | None, by: str | None, status: StatusCode | None
) -> None:
    attributes: dict[str, Any] = {}
    found = put_outcome(attributes, facts)
    assert attributes[names.OUTCOME] == outcome
    assert attributes.get(names.ERROR_TYPE) == error
    assert attributes.get(names.CANCELLED_BY) == by
    assert (None if found is None else found.status_code) == status


def test_the_waits_of_a_call_lie_one_behind_the_other() -> None:
    facts = attempt(
        complete, cold_since=10.0, cold_for=5.0, queued_for=2.0, queued_for_model=1.0, started_at=19.0
    )
    assert local_waits(facts) == [
        (names.MODEL_START_SPAN, "", 10.0, 15.0),
        (names.QUEUE_SPAN, "model", 16.0, 17.0),
        (names.QUEUE_SPAN, "node", 17.0, 19.0),
    ]
    never_started = attempt(lambda call: call.put(Failed(ERROR)), queued_for=2.0)
    ((_, _, begin, end),) = local_waits(never_started)
    assert (end, end - begin) == (never_started.ended_at, pytest.approx(2.0))
