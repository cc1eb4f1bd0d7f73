"""The traces of calls: which requests are sampled, and the ids that travel.

Theory of operation
===================

The ids of a trace must be known before its spans are made, since a worker, and the server behind an engine, are sent
the id of the span that theirs belong to. All the rest of a span can be made at the end, from the story of the request.
So what is done when a call is opened is only this: the trace context of the client is read, the sampler decides, and a
few random numbers are drawn. For a request that is not sampled, nothing else is ever done.

A request has one :class:`RequestTrace`, each attempt at it a :class:`AttemptTrace`. The header ``traceparent`` of an
attempt names the span below which everything happens that the attempt makes other programs do: the span ``handler`` of
a model of this node, or, if a worker exports that span itself, the span ``link``, to which it belongs.

The span ``handler`` is a real span of the SDK while the handler runs, so that the handler can give it attributes, and
its own spans nest in it. All other spans exist only when they are over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, cast

import attrs
from opentelemetry.context import Context, attach
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    TraceState,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..core import clock, randomness
from ..core.request import Request
from .exporting import Pipeline
from .handler_span import HandlerSpan

__all__ = ["AttemptTrace", "CallTracer", "RequestTrace", "new_span_id"]

_PARENT: Final = "traceparent"
_STATE: Final = "tracestate"
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)
_propagator: Final = TraceContextTextMapPropagator()
_NO_CONTEXT: Final = Context()


def new_span_id() -> int:
    """Return the id of a span."""
    return randomness.generator.getrandbits(64) or 1


class RequestTrace:
    """What all spans of a request on this node have in common.

    Args:
        headers: of the request; those of the trace context are read.
        sampler: decides whether there are spans.

    Attributes:
        parent: the span of the client; ``None`` if it has sent none.
        trace_id: of the trace.
        is_sampled: whether there are spans.
        state: the state of the trace that travels on.
        attributes: what the sampler wants the first span to have.
        server_id, inference_id: the ids of the first two spans.
        offset: what is added to a time of ``core/clock.py`` in nanoseconds for the time of day.
    """

    __slots__ = (
        "attributes",
        "inference_id",
        "is_sampled",
        "offset",
        "parent",
        "server_id",
        "state",
        "trace_id",
    )

    def __init__(self, headers: Mapping[str, str], sampler: Sampler) -> None:
        parent_context = _NO_CONTEXT
        self.parent: SpanContext | None = None
        if _PARENT in headers:
            parent_context = _propagator.extract(headers, _NO_CONTEXT)
            parent = get_current_span(parent_context).get_span_context()
            if parent.is_valid:
                self.parent = parent
        if self.parent is None:
            self.trace_id = randomness.generator.getrandbits(128) or 1
        else:
            self.trace_id = self.parent.trace_id
        decision = sampler.should_sample(parent_context, self.trace_id, "request", SpanKind.SERVER)
        self.is_sampled = decision.decision.is_sampled()
        self.state: TraceState = decision.trace_state or TraceState()
        if self.is_sampled:
            self.attributes = decision.attributes
            self.server_id, self.inference_id = new_span_id(), new_span_id()
            self.offset = time.time_ns() - int(clock.now() * 1e9)

    def context(self, span_id: int) -> SpanContext:
        """Return the context of a span of this trace."""
        flags = _SAMPLED if self.is_sampled else _NOT_SAMPLED
        return SpanContext(self.trace_id, span_id, is_remote=False, trace_flags=flags, trace_state=self.state)

    def nanoseconds(self, at: float) -> int:
        """Return the time of day of a time of ``core/clock.py``."""
        return int(at * 1e9) + self.offset


class AttemptTrace:
    """The trace of one call; see ``CallTrace``.

    Args:
        root: of the request.
        pipeline: where spans go.
        owns_handler: this node knows for certain that it exports the span of the handler.

    Attributes:
        root: as given.
        attempt_id, handler_id: the ids of two spans.
        handler: the span of the handler; ``None`` if it is not running here, or has not begun.
    """

    __slots__ = ("_owns_handler", "_pipeline", "attempt_id", "handler", "handler_id", "root")

    def __init__(self, root: RequestTrace, pipeline: Pipeline, owns_handler: bool) -> None:
        self.root = root
        self.attempt_id, self.handler_id = new_span_id(), new_span_id()
        self.handler: HandlerSpan | None = None
        self._pipeline = pipeline
        self._owns_handler = owns_handler

    @property
    def is_exported(self) -> bool:
        """See ``CallTrace``."""
        return self._owns_handler and self.root.is_sampled

    @property
    def parent(self) -> SpanContext | None:
        """What the span of the handler belongs to."""
        return self.root.parent if self._owns_handler else self.root.context(self.attempt_id)

    def enter(self) -> None:
        """See ``CallTrace``."""
        context = self.root.context(self.handler_id)
        # The task of a call serves nothing else, so this is never taken back.
        if self.root.is_sampled:
            self.handler = self._pipeline.handler_span(context, self.parent, is_remote=self._owns_handler)
            self.handler.start(self.root.nanoseconds(clock.now()))
            attach(set_span_in_context(self.handler))
        else:
            attach(set_span_in_context(NonRecordingSpan(context)))
        self._pipeline.enter()

    def failed(self, error: BaseException) -> None:
        """See ``CallTrace``."""
        if self.handler is not None:
            self.handler.record_exception(error)

    def header(self) -> str:
        """Return the header ``traceparent`` of what the attempt makes other programs do."""
        return f"00-{self.root.trace_id:032x}-{self.handler_id:016x}-0{int(self.root.is_sampled)}"


class CallTracer:
    """Opens the traces of calls; see ``Tracer``.

    Args:
        pipeline: where spans go.
        sampler: decides which requests have any.
        is_worker: the calls of this node are handlers, and a master has opened them.
    """

    def __init__(self, pipeline: Pipeline, sampler: Sampler, *, is_worker: bool) -> None:
        self._pipeline = pipeline
        self._sampler = sampler
        self._is_worker = is_worker

    def open(self, request: Request) -> Request:
        """See ``Tracer``."""
        if request.trace is None:
            root = RequestTrace(request.headers, self._sampler)
        else:
            root = cast(AttemptTrace, request.trace).root
        trace = AttemptTrace(root, self._pipeline, self._is_worker)
        headers = {**request.headers, _PARENT: trace.header()}
        if root.state:
            headers[_STATE] = root.state.to_header()
        else:
            headers.pop(_STATE, None)
        return attrs.evolve(request, headers=headers, trace=trace)

    def refused(self, headers: Mapping[str, str]) -> RequestTrace:
        """Return the trace of a request for which no call was opened."""
        return RequestTrace(headers, self._sampler)
