"""What the spans of calls have in common on masters and workers: how a call has ended, and what it has waited for."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from opentelemetry.trace import SpanContext, Status, StatusCode

from ..core.story import AttemptFacts
from ..gateway.stories import CLIENT_LEFT
from . import names
from .exporting import Pipeline
from .handler_span import HandlerSpan
from .trace import RequestTrace, new_span_id

__all__ = [
    "Wait",
    "end_handler",
    "handler_attributes",
    "local_waits",
    "put_outcome",
    "put_waits",
    "queue_waits",
]

_MICROSECONDS: Final = 1e6


def put_outcome(attributes: dict[str, Any], facts: AttemptFacts) -> Status | None:
    """Put how an attempt has ended into the attributes of a span, and return the status of that."""
    attributes[names.OUTCOME] = outcome = outcome_of(facts)
    if outcome == "completed":
        return None
    if facts.error is not None:
        status, code, message = facts.error
        attributes[names.ERROR_TYPE] = code or str(status)
    else:
        attributes[names.ERROR_TYPE], message = outcome, ""
    if outcome == "cancelled":
        attributes[names.CANCELLED_BY] = by = _cancelled_by(facts)
        attributes[names.CANCELLED_REASON] = facts.cancelled or ""
        if by in ("client", "other_attempt"):
            return None
    return Status(StatusCode.ERROR, message)


def outcome_of(facts: AttemptFacts) -> str:
    """Return how an attempt has ended, in one word."""
    if facts.cancelled is not None:
        return "cancelled"
    if facts.complete:
        return "completed"
    if facts.lost:
        return "worker_lost"
    return "timed_out" if facts.timed_out else "failed"


def _cancelled_by(facts: AttemptFacts) -> str:
    if facts.cancelled_by:
        return "operator"
    if facts.overdue:
        return "deadline"
    if facts.superseded:
        return "other_attempt"
    return "client" if facts.cancelled == CLIENT_LEFT else "node"


def end_handler(
    span: HandlerSpan, root: RequestTrace, facts: AttemptFacts, endpoint: str, request_id: str
) -> None:
    """End the span of a handler that has run on this node."""
    # Otherwise the handler has ended it.
    if span.is_recording():
        attributes = handler_attributes(facts, endpoint, request_id)
        status = put_outcome(attributes, facts)
        span.set_attributes(attributes)
        if status is not None:
            span.set_status(status)
        span.end(root.nanoseconds(facts.released_at))


def handler_attributes(facts: AttemptFacts, endpoint: str, request_id: str) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        names.NODE: facts.node,
        names.MODEL: facts.model,
        names.ENDPOINT: endpoint,
        names.REQUEST_ID: request_id,
    }
    held_back = facts.times.get("held_back", 0) / _MICROSECONDS or facts.held_back
    if held_back:
        attributes[names.HELD_BACK] = held_back
    return attributes


#: What a call has waited for: the name of the span, of the queue, and from when to when.
Wait: TypeAlias = tuple[str, str, float, float]


def local_waits(facts: AttemptFacts) -> list[Wait]:
    """Return what a call of this node has waited for before its handler began."""
    waits: list[Wait] = []
    if facts.cold_for:
        waits.append((names.MODEL_START_SPAN, "", facts.cold_since, facts.cold_since + facts.cold_for))
    end = facts.started_at if facts.started_at >= 0 else facts.ended_at
    return waits + queue_waits(facts.queued_for, facts.queued_for_model, end)


def queue_waits(queued: float, for_model: float, end: float) -> list[Wait]:
    """Return the waits for slots that have ended at a time: one of the model is waited for first."""
    waits: list[Wait] = []
    if for_model:
        waits.append((names.QUEUE_SPAN, "model", end - queued - for_model, end - queued))
    if queued:
        waits.append((names.QUEUE_SPAN, "node", end - queued, end))
    return waits


def put_waits(
    pipeline: Pipeline, root: RequestTrace, parent: SpanContext | None, model: str, waits: list[Wait]
) -> None:
    """Export the spans of what a call has waited for."""
    for name, queue, begin, end in waits:
        attributes = {names.QUEUE: queue} if queue else {names.MODEL: model}
        context = root.context(new_span_id())
        pipeline.put(name, context, parent, root.nanoseconds(begin), root.nanoseconds(end), attributes)
