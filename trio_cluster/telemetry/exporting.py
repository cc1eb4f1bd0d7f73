"""The export of spans and metrics to a collector: the SDK's processors, its exporters and their threads.

The SDK keeps spans that are over in a queue of bounded length (``OTEL_BSP_MAX_QUEUE_SIZE``, 2048; the oldest ones make
room), and exports them in a thread of its own; metrics are exported in another one, once a minute
(``OTEL_METRIC_EXPORT_INTERVAL``). A collector that is away, or does not answer, holds up nothing else. What the SDK
logs about it, over and over, becomes one line once in a while.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    ConsoleMetricExporter,
    MetricExporter,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status

from .._version import __version__
from .handler_span import HandlerSpan, current_provider, provide, withdraw
from .names import SCHEMA_URL, SCOPE
from .variables import Signals

__all__ = ["Pipeline", "resource_of"]

logger = logging.getLogger("trio_cluster.telemetry")

#: Seconds between two lines about what could not be exported.
LINES_APART: Final = 60.0
#: The loggers of the SDK whose lines are replaced by ours.
_SDK_LOGGERS: Final = ("opentelemetry.exporter", "opentelemetry.sdk")
#: Characters of a line of the SDK that are kept.
_LINE_MAX: Final = 400


class ExportLines(logging.Handler):
    """Logs one line in a while, in the place of those of the SDK. May be called in any thread.

    Args:
        now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._now = now
        self._next = -math.inf
        self._suppressed = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``. Called with the handler's lock."""
        now = self._now()
        if now < self._next:
            self._suppressed += 1
            return
        suppressed, self._suppressed, self._next = self._suppressed, 0, now + LINES_APART
        fields = {"suppressed": suppressed} if suppressed else {}
        text = record.getMessage()[:_LINE_MAX]
        logger.warning("OpenTelemetry: %s", text, extra={"fields": fields})


lines: Final = ExportLines()


def _replace_lines() -> None:
    """Replace the lines of the SDK by ours, in this process. Synchronous, idempotent."""
    for name in _SDK_LOGGERS:
        replaced = logging.getLogger(name)
        if lines not in replaced.handlers:
            replaced.addHandler(lines)
            replaced.propagate = False


@attrs.define(eq=False)
class Pipeline:
    """The exporters of one node.

    To be made in a thread, since loading certificates blocks.

    Raises:
        ValueError: a variable of the environment has a value that makes no sense.
    """

    signals: Signals
    resource: Resource
    provider: TracerProvider = attrs.field(init=False)
    """Makes the spans of handlers."""
    meters: MeterProvider | None = attrs.field(init=False, default=None)
    """Has the metrics; ``None``: none are exported."""
    scope: InstrumentationScope = attrs.field(init=False)
    _processor: BatchSpanProcessor | None = attrs.field(init=False, default=None)
    _span_exporter: SpanExporter | None = attrs.field(init=False, default=None)
    _metric_exporter: MetricExporter | None = attrs.field(init=False, default=None)
    _limits: SpanLimits = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.scope = InstrumentationScope(SCOPE, __version__, SCHEMA_URL)
        self._limits = SpanLimits()
        if self.signals.metrics != "none":
            is_otlp = self.signals.metrics == "otlp"
            self._metric_exporter = OTLPMetricExporter() if is_otlp else ConsoleMetricExporter()
            reader = PeriodicExportingMetricReader(self._metric_exporter)
            self.meters = MeterProvider([reader], self.resource, shutdown_on_exit=False)
        self.provider = TracerProvider(resource=self.resource, shutdown_on_exit=False)
        if self.signals.traces != "none":
            is_otlp = self.signals.traces == "otlp"
            self._span_exporter = OTLPSpanExporter() if is_otlp else ConsoleSpanExporter()
            self._processor = BatchSpanProcessor(self._span_exporter)
            self.provider.add_span_processor(self._processor)
        # From here on: before, the SDK has told which variables it does not understand, each in a line of its own.
        _replace_lines()

    @property
    def has_traces(self) -> bool:
        """Whether spans are exported."""
        return self._processor is not None

    def open(self) -> None:
        """Pass the spans that handlers make themselves to these exporters. Synchronous."""
        if self.has_traces:
            provide(self.provider)

    def enter(self) -> None:
        """A handler begins in the current task: its own spans go here. Synchronous."""
        current_provider.set(self.provider)

    def handler_span(
        self, context: SpanContext, parent: SpanContext | None, *, is_remote: bool
    ) -> HandlerSpan:
        """Return the span of a handler, which has not begun. Synchronous.

        Args:
            context: its own.
            parent: of the span that it belongs to; ``None``: to none.
            is_remote: the call comes from another node.
        """
        assert self._processor is not None
        return HandlerSpan(
            "handler",
            context,
            parent,
            resource=self.resource,
            kind=SpanKind.SERVER if is_remote else SpanKind.INTERNAL,
            span_processor=self._processor,
            instrumentation_scope=self.scope,
            limits=self._limits,
        )

    def put(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        begin: int,
        end: int,
        attributes: Mapping[str, Any],
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status | None = None,
        events: Sequence[Event] = (),
    ) -> None:
        """Export a span that is over. Synchronous: it is put into a queue. Times are in nanoseconds of the day's."""
        if self._processor is not None:
            span = ReadableSpan(
                name,
                context,
                parent,
                self.resource,
                attributes,
                events,
                kind=kind,
                status=Status() if status is None else status,
                start_time=begin,
                end_time=max(begin, end),
                instrumentation_scope=self.scope,
            )
            self._processor.on_end(span)

    def close(self) -> None:
        """Pass no more spans of handlers here. Synchronous."""
        if self.has_traces:
            withdraw(self.provider)

    def flush(self) -> None:
        """Export what waits, and end the threads. Blocks, for as long as the collector does."""
        if self._processor is not None:
            self._processor.shutdown()
        if self.meters is not None:
            self.meters.shutdown()

    def abort(self) -> None:
        """Try no longer to export what waits. Synchronous; after :meth:`flush` has begun in another thread."""
        for exporter in (self._span_exporter, self._metric_exporter):
            if exporter is not None:
                exporter.shutdown()


def resource_of(attributes: Mapping[str, str]) -> Resource:
    """Return the resource of a node: these attributes, and those of the environment, which count more."""
    given = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in attributes.items() if name not in given})
