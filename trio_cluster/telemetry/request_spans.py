"""The spans of a request that is over, made of its story; and its metrics. See ``trace.py`` for the whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from opentelemetry.sdk.trace import Event
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode

from ..core.attempt_times import cold_time, queue_times, worker_moment
from ..core.redaction import without_keys
from ..core.story import AttemptFacts, StoryFacts
from ..gateway.context import RequestContext
from ..gateway.story_ending import Ending, ending_of
from . import names
from .call_spans import (
    Wait,
    end_handler,
    handler_attributes,
    local_waits,
    put_outcome,
    put_waits,
    queue_waits,
)
from .exporting import Pipeline
from .metrics import RequestMetrics
from .operations import operation_of
from .trace import AttemptTrace, CallTracer, RequestTrace, new_span_id

__all__ = ["RequestSpans"]

logger = logging.getLogger("trio_cluster.telemetry")

_FIRST_SERVER_ERROR: Final = 500
#: Characters of a header that are shown.
_HEADER_MAX: Final = 256
_TRACE_HEADERS: Final = ("traceparent", "tracestate")
#: What is shown of the parsed request, each with the fields that may have it and the types of its values.
_REQUEST_FIELDS: Final = (
    (names.REQUEST_MAX_TOKENS, ("max_completion_tokens", "max_tokens", "max_output_tokens"), (int,)),
    (names.REQUEST_TEMPERATURE, ("temperature",), (int, float)),
    (names.REQUEST_TOP_P, ("top_p",), (int, float)),
    (names.REQUEST_SEED, ("seed",), (int,)),
    (names.REQUEST_CHOICES, ("n",), (int,)),
)


class RequestSpans:
    """Makes the spans and metrics of a node's requests; see ``gateway.stories.RequestTracer``.

    Args:
        pipeline: where they go.
        tracer: has opened the traces of the calls; ``None``: there are no spans.
        metrics: counts every request; ``None``: there are no metrics.
        scheme: of the URLs of this node.
    """

    def __init__(
        self, pipeline: Pipeline, tracer: CallTracer | None, metrics: RequestMetrics | None, scheme: str
    ) -> None:
        self._pipeline = pipeline
        self._tracer = tracer
        self._metrics = metrics
        self._scheme = scheme

    def trace_of(self, context: RequestContext) -> RequestTrace | None:
        """See ``RequestTracer``."""
        if self._tracer is None:
            return None
        if context.calls and isinstance(trace := context.calls[-1].request.trace, AttemptTrace):
            root = trace.root
        else:
            headers = {
                name: value.decode("latin-1")
                for name in _TRACE_HEADERS
                if (value := context.header(name.encode())) is not None
            }
            root = self._tracer.refused(headers)
        return root if root.is_sampled else None

    def end(self, context: RequestContext, trace: RequestTrace | None, story: StoryFacts) -> None:
        """See ``RequestTracer``."""
        try:
            self._end(context, trace, story)
        except Exception:
            # A request must not fail by what is shown of it.
            fields = {"request_id": context.request_id}
            logger.exception("the spans of a request could not be made", extra={"fields": fields})

    def _end(self, context: RequestContext, trace: RequestTrace | None, story: StoryFacts) -> None:
        if self._metrics is not None:
            self._metrics.record(context)
        if trace is None:
            return
        ending = ending_of(story)
        self._put_server_span(context, trace, story, ending)
        if story.attempts:
            self._put_inference_span(context, trace, story, ending)
        for number, (call, facts) in enumerate(zip(context.calls, story.attempts, strict=True)):
            attempt_trace = call.request.trace
            if isinstance(attempt_trace, AttemptTrace):
                put = partial(
                    self._put_attempt, attempt_trace, facts, number, story.endpoint, story.request_id
                )
                # At once, unless its work goes on.
                call.on_release(put)

    def _put_server_span(
        self, context: RequestContext, trace: RequestTrace, story: StoryFacts, ending: Ending
    ) -> None:
        attributes: dict[str, Any] = {
            **dict(trace.attributes or {}),
            names.HTTP_METHOD: "POST",
            names.HTTP_ROUTE: story.path,
            names.URL_PATH: story.path,
            names.URL_SCHEME: self._scheme,
            names.REQUEST_ID: story.request_id,
            names.OUTCOME: ending.outcome,
        }
        if story.status:
            attributes[names.HTTP_STATUS] = story.status
        _put_header(attributes, names.HTTP_REQUEST_ID, context, b"x-request-id", as_list=True)
        _put_header(attributes, names.USER_AGENT, context, b"user-agent")
        _put_address(attributes, names.CLIENT_ADDRESS, names.CLIENT_PORT, story.client)
        host = context.header(b"host")
        if host is not None:
            _put_address(attributes, names.SERVER_ADDRESS, names.SERVER_PORT, host.decode("latin-1"))
        if story.key:
            attributes[names.KEY] = story.key
        if ending.by:
            attributes[names.ENDED_BY] = ending.by
        status = _put_error(attributes, story, ending)
        if story.status and story.status < _FIRST_SERVER_ERROR and story.error is not None:
            # An error of the client is none of the server.
            status = None
        elif story.status >= _FIRST_SERVER_ERROR:
            attributes[names.ERROR_TYPE] = str(story.status)
        self._pipeline.put(
            f"POST {story.path}",
            trace.context(trace.server_id),
            trace.parent,
            trace.nanoseconds(story.began),
            trace.nanoseconds(story.ended_at),
            attributes,
            kind=SpanKind.SERVER,
            status=status,
        )

    def _put_inference_span(
        self, context: RequestContext, trace: RequestTrace, story: StoryFacts, ending: Ending
    ) -> None:
        operation = operation_of(story.endpoint)
        began = story.attempts[0].opened_at
        attempt = story.attempts[story.answering]
        attributes: dict[str, Any] = {
            names.OPERATION: operation,
            names.PROVIDER_NAME: names.PROVIDER,
            names.REQUEST_MODEL: story.model,
            names.RESPONSE_MODEL: attempt.model,
            names.REQUEST_ID: story.request_id,
            names.OUTCOME: ending.outcome,
            names.ATTEMPTS: len(story.attempts),
        }
        parsed = context.request.parsed
        raw = getattr(parsed, "raw", None)
        if isinstance(raw, Mapping):
            for name, fields, types in _REQUEST_FIELDS:
                for field in fields:
                    if type(value := raw.get(field)) in types:
                        attributes[name] = value
        if getattr(parsed, "stream", False) is True:
            attributes[names.REQUEST_STREAM] = True
            if attempt.begun_at >= 0:
                attributes[names.TIME_TO_FIRST_CHUNK] = max(0.0, attempt.begun_at - began)
        if attempt.finish:
            attributes[names.FINISH_REASONS] = attempt.finish.split(",")
        usage = attempt.usage
        if usage is not None:
            attributes[names.INPUT_TOKENS] = usage.prompt_tokens
            attributes[names.OUTPUT_TOKENS] = usage.completion_tokens
            if usage.cached_tokens:
                attributes[names.CACHED_TOKENS] = usage.cached_tokens
            if usage.reasoning_tokens:
                attributes[names.REASONING_TOKENS] = usage.reasoning_tokens
        if ending.by:
            attributes[names.ENDED_BY] = ending.by
        status = _put_error(attributes, story, ending)
        self._pipeline.put(
            f"{operation} {story.model}",
            trace.context(trace.inference_id),
            trace.context(trace.server_id),
            trace.nanoseconds(began),
            trace.nanoseconds(story.ended_at),
            attributes,
            kind=SpanKind.CLIENT,
            status=status,
        )

    def _put_attempt(
        self, trace: AttemptTrace, facts: AttemptFacts, number: int, endpoint: str, request_id: str
    ) -> None:
        """Export the spans of an attempt whose work has stopped."""
        root, pipeline = trace.root, self._pipeline
        context = root.context(trace.attempt_id)
        attributes: dict[str, Any] = {
            names.ATTEMPT_NUMBER: number + 1,
            names.NODE: facts.node,
            names.MODEL: facts.model,
            names.WHY: facts.why,
            names.DELIVERED_BYTES: facts.delivered,
        }
        if facts.candidates:
            attributes[names.CANDIDATES] = [name for name, _, _ in facts.candidates]
        if facts.cached:
            attributes[names.EXPECTED_CACHED_BYTES] = facts.cached
        status = put_outcome(attributes, facts)
        events = [
            Event(names.NOTE, {names.NOTE_TEXT: text}, root.nanoseconds(at)) for at, text in facts.notes
        ]
        if facts.begun_at >= 0:
            events.append(Event(names.FIRST_OUTPUT, {}, root.nanoseconds(facts.begun_at)))
        pipeline.put(
            names.ATTEMPT_SPAN,
            context,
            root.context(root.inference_id),
            root.nanoseconds(facts.opened_at),
            root.nanoseconds(facts.ended_at),
            attributes,
            status=status,
            events=events,
        )
        if not facts.forwarded:
            put_waits(pipeline, root, context, facts.model, local_waits(facts))
            if trace.handler is not None:
                end_handler(trace.handler, root, facts, endpoint, request_id)
            return
        self._put_link(trace, context, facts, endpoint, request_id)

    def _put_link(
        self, trace: AttemptTrace, parent: SpanContext, facts: AttemptFacts, endpoint: str, request_id: str
    ) -> None:
        """Export the span of the link, and those of the worker unless that does so itself."""
        root, pipeline = trace.root, self._pipeline
        begin = None if facts.times.get("traced") else _worker_time(facts, "started")
        # What the worker and the server behind it do belongs to the span whose id they were sent: the handler's, or, if
        # that is not made here, the link's.
        link = root.context(trace.handler_id if begin is None else new_span_id())
        pipeline.put(
            names.LINK_SPAN,
            link,
            parent,
            root.nanoseconds(facts.opened_at),
            root.nanoseconds(facts.released_at),
            {names.NODE: facts.node},
            kind=SpanKind.CLIENT,
        )
        if facts.times and not facts.times.get("traced"):
            put_waits(pipeline, root, link, facts.model, _worker_waits(facts))
        if begin is None:
            return
        attributes = handler_attributes(facts, endpoint, request_id)
        status = put_outcome(attributes, facts)
        end = _worker_time(facts, "stopped") or _worker_time(facts, "ended") or facts.released_at
        pipeline.put(
            names.HANDLER_SPAN,
            root.context(trace.handler_id),
            link,
            root.nanoseconds(begin),
            root.nanoseconds(end),
            attributes,
            status=status,
        )


def _worker_waits(facts: AttemptFacts) -> list[Wait]:
    end = _worker_time(facts, "started") or facts.ended_at
    queued, for_model = queue_times(facts)
    waits = queue_waits(queued, for_model, end)
    if cold := cold_time(facts):
        end -= queued + for_model
        waits.insert(0, (names.MODEL_START_SPAN, "", end - cold, end))
    return [
        (name, queue, max(facts.opened_at, begin), max(facts.opened_at, end))
        for name, queue, begin, end in waits
    ]


def _worker_time(facts: AttemptFacts, name: str) -> float | None:
    at = worker_moment(facts, name)
    # What a worker says is not trusted to lie within what this node has seen.
    return None if at is None else min(at, facts.released_at)


def _put_error(attributes: dict[str, Any], story: StoryFacts, ending: Ending) -> Status | None:
    """Put the error of a request into the attributes of a span, and return the status of that."""
    if ending.outcome == "completed":
        return None
    if story.error is not None:
        attributes[names.ERROR_TYPE] = story.error[1] or str(story.error[0])
    else:
        attempt = story.attempts[story.answering] if story.attempts else None
        error = None if attempt is None else attempt.error
        attributes[names.ERROR_TYPE] = (error and (error[1] or str(error[0]))) or ending.outcome
    if ending.outcome == "cancelled" and ending.by == "client":
        attributes[names.ERROR_TYPE] = "cancelled"
        return None
    return Status(StatusCode.ERROR, ending.text)


def _put_header(
    attributes: dict[str, Any], name: str, context: RequestContext, header: bytes, *, as_list: bool = False
) -> None:
    value = context.header(header)
    if value is not None:
        text = without_keys(value.decode("latin-1")[:_HEADER_MAX])
        attributes[name] = [text] if as_list else text


def _put_address(attributes: dict[str, Any], address: str, port: str, shown: str) -> None:
    """Put ``host:port`` into attributes; the port may be missing, and an IPv6 address stands in brackets."""
    host, _, number = shown.rpartition(":")
    if not host or not number.isdecimal() or shown.endswith("]"):
        host, number = shown, ""
    if host:
        attributes[address] = host.strip("[]")
    if number and len(number) <= 5:
        attributes[port] = int(number)
