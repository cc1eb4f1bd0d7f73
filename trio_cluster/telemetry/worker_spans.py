"""The spans of a worker's calls: of the handler, and of what the call has waited for before. See ``trace.py``."""

from __future__ import annotations

import logging

from ..core.answer import Done, Failed
from ..core.call import Call
from ..core.observer import Observer
from ..core.outcome import Outcome
from ..core.story import AttemptFacts
from ..errors import WorkerLost
from .call_spans import end_handler, local_waits, put_waits
from .exporting import Pipeline
from .trace import AttemptTrace

__all__ = ["WorkerSpans"]

logger = logging.getLogger("trio_cluster.telemetry")


class WorkerSpans(Observer):
    """Exports the spans of calls that a master has opened.

    Args:
        pipeline: where they go.
        node: the name of the worker.
    """

    def __init__(self, pipeline: Pipeline, node: str) -> None:
        self._pipeline = pipeline
        self._node = node

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """See ``Observer``."""
        trace = call.request.trace
        if not isinstance(trace, AttemptTrace) or not trace.root.is_sampled:
            return
        try:
            self._put(call, trace)
        except Exception:
            # A call must not fail by what is shown of it.
            fields = {"request_id": call.request.request_id}
            logger.exception("the spans of a call could not be made", extra={"fields": fields})

    def _put(self, call: Call, trace: AttemptTrace) -> None:
        facts, request, root = _facts(call, self._node), call.request, trace.root
        put_waits(self._pipeline, root, trace.parent, facts.model, local_waits(facts))
        if trace.handler is not None:
            end_handler(trace.handler, root, facts, request.endpoint, request.request_id)


def _facts(call: Call, node: str) -> AttemptFacts:
    """Return what a master would record of a call that has ended."""
    end = call.end
    failed = end if isinstance(end, Failed) else None
    error = None if failed is None else failed.error
    return AttemptFacts(
        node=node,
        model=call.request.model,
        forwarded=False,
        why="",
        candidates=[],
        cached=0,
        prompt_size=0,
        opened_at=call.opened_at,
        started_at=call.started_at,
        begun_at=call.begun_at,
        ended_at=call.ended_at,
        released_at=call.released_at,
        waiting=False,
        queued_at=call.queued_at,
        queued_for=call.queued_for,
        queued_for_model=call.queued_for_model,
        cold_since=call.cold_since,
        cold_for=call.cold_for,
        cold="",
        held_back=call.body.held_back,
        notes=[],
        cancelled=call.cancelled,
        cancelled_by=call.cancelled_by,
        cancelled_at=call.cancelled_at,
        overdue=call.overdue,
        superseded=False,
        complete=isinstance(end, Done),
        lost=isinstance(error, WorkerLost),
        retryable=failed is not None and failed.retryable,
        timed_out=failed is not None and failed.timed_out,
        over_capacity=failed is not None and failed.over_capacity,
        error=None if error is None else (error.status, str(error.code or ""), error.message),
        usage=None,
        delivered=call.body.delivered,
        times={},
    )
