"""The metrics of requests that are over, by the conventions for generative AI.

Every request for a model is counted, whether its trace is sampled or not. Only names of models that are served here are
labels, so there is a bounded number of them.
"""

from __future__ import annotations

from typing import Any, Final

from opentelemetry.sdk.metrics import MeterProvider

from .._version import __version__
from ..core import clock
from ..core.answer import Done, Failed
from ..gateway.context import RequestContext
from . import names
from .operations import operation_of

__all__ = ["RequestMetrics"]

_FIRST_ERROR: Final = 400


class RequestMetrics:
    """Records requests.

    Args:
        meters: exports them.
    """

    def __init__(self, meters: MeterProvider) -> None:
        meter = meters.get_meter(names.SCOPE, __version__, names.SCHEMA_URL)
        self._record: dict[str, Any] = {}
        for name, (unit, about, buckets) in names.METRICS.items():
            if buckets:
                histogram = meter.create_histogram(
                    name, unit, about, explicit_bucket_boundaries_advisory=buckets
                )
                self._record[name] = histogram.record
            else:
                self._record[name] = meter.create_counter(name, unit, about).add

    def record(self, context: RequestContext) -> None:
        """Record a request that is over. Synchronous."""
        request, call = getattr(context, "request", None), getattr(context, "call", None)
        endpoint = context.endpoint
        attributes: dict[str, Any] = {
            names.OPERATION: operation_of("" if endpoint is None else endpoint.name),
            names.PROVIDER_NAME: names.PROVIDER,
        }
        if request is not None:
            attributes[names.REQUEST_MODEL] = request.alias or request.model
        ended = clock.now()
        end = None if call is None else call.end
        if end is not None and call is not None and isinstance(end, Done) and end.usage is not None:
            usage = end.usage
            for name, tokens in (
                (names.INPUT_TOKENS_COUNTER, usage.prompt_tokens),
                (names.OUTPUT_TOKENS_COUNTER, usage.completion_tokens),
                (names.CACHED_TOKENS_COUNTER, usage.cached_tokens),
                (names.REASONING_TOKENS_COUNTER, usage.reasoning_tokens),
            ):
                if tokens:
                    self._record[name](tokens, attributes)
        if call is not None and call.begun and getattr(call.request.parsed, "stream", False) is True:
            self._record[names.TIME_TO_FIRST_TOKEN](max(0.0, call.begun_at - context.began), attributes)
            if isinstance(end, Done) and end.usage is not None and end.usage.completion_tokens > 1:
                each = (call.ended_at - call.begun_at) / (end.usage.completion_tokens - 1)
                self._record[names.TIME_PER_OUTPUT_TOKEN](max(0.0, each), attributes)
        error = _error_of(context, end)
        if error:
            attributes = {**attributes, names.ERROR_TYPE: error}
        self._record[names.REQUEST_DURATION](max(0.0, ended - context.began), attributes)


def _error_of(context: RequestContext, end: Done | Failed | None) -> str:
    """Return what a request has failed by: a status, ``failed`` after its answer had begun; empty if it has not."""
    if context.status >= _FIRST_ERROR:
        return str(context.status)
    if isinstance(end, Failed):
        return "failed" if context.status else "cancelled"
    return "" if context.status else "cancelled"
