"""The parts of a node's telemetry, put together; the module by which the SDK is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gateway.stories import Stories
from ..options import ClusterMode
from ..routing.router import Router
from .exporting import Pipeline, resource_of
from .metrics import RequestMetrics
from .request_spans import RequestSpans
from .trace import CallTracer
from .variables import Signals
from .worker_spans import WorkerSpans

__all__ = ["Telemetry"]


class Telemetry:
    """Exports the spans and metrics of one node.

    To be made in a thread: it blocks.

    Args:
        signals: what is exported.
        attributes: of the resource.
        mode: the role of the node.
        node: its name.
        scheme: of the URLs of its API.

    Raises:
        ValueError, OSError: a variable of the environment has a value that makes no sense.
    """

    def __init__(
        self, signals: Signals, attributes: Mapping[str, str], mode: ClusterMode, node: str, scheme: str
    ) -> None:
        if mode is ClusterMode.WORKER:
            # Requests are counted where clients send them.
            signals = Signals(signals.traces)
        self._signals = signals
        self._pipeline = pipeline = Pipeline(signals, resource_of(attributes))
        is_worker = mode is ClusterMode.WORKER
        self._tracer = (
            CallTracer(pipeline, pipeline.provider.sampler, is_worker=is_worker)
            if pipeline.has_traces
            else None
        )
        self._worker_spans = WorkerSpans(pipeline, node) if is_worker else None
        metrics = None if pipeline.meters is None else RequestMetrics(pipeline.meters)
        self._requests = RequestSpans(pipeline, self._tracer, metrics, scheme)

    @property
    def fields(self) -> dict[str, Any]:
        """What is exported, for the log."""
        return {"traces": self._signals.traces, "metrics": self._signals.metrics}

    def attach(self, router: Router, stories: Stories) -> None:
        """Follow the calls and requests of a node from now on. Synchronous."""
        self._pipeline.open()
        router.tracer = self._tracer
        if self._worker_spans is not None:
            router.observers.add(self._worker_spans)
        else:
            stories.tracer = self._requests

    def detach(self, router: Router, stories: Stories) -> None:
        """Undo :meth:`attach`. Synchronous."""
        if self._worker_spans is not None:
            router.observers.remove(self._worker_spans)
        router.tracer = stories.tracer = None
        self._pipeline.close()

    def flush(self) -> None:
        """Export what waits, and end. Blocks."""
        self._pipeline.flush()

    def abort(self) -> None:
        """Let :meth:`flush`, which is running, come to its end. Synchronous."""
        self._pipeline.abort()
