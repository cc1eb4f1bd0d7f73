"""The span of a handler while it runs, and how spans that the handler makes itself reach the node's exporters.

Handlers use the API of OpenTelemetry as everywhere: ``opentelemetry.trace.get_tracer(...)``, or the instrumentation of
a library that they call. So there is a tracer provider for the whole process, which passes every span on to the node
that runs the handler: a program may run several servers, one after the other or at once, while the provider of a
process can be set only once. If the program has set one before, it stays, and its spans have the right parents all the
same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.trace import Span, TracerProvider
from opentelemetry.trace import NoOpTracerProvider

__all__ = ["HandlerSpan", "ProcessTracerProvider", "current_provider", "provide", "withdraw"]

#: The provider of the node that runs the current handler; ``None`` outside of handlers.
current_provider: Final[ContextVar[TracerProvider | None]] = ContextVar("current_provider", default=None)

#: The providers of the nodes that run, oldest first.
_provided: Final[list[TracerProvider]] = []


class HandlerSpan(Span):
    """A span of the SDK whose ids were known before. Ended by the node, when the work has stopped."""


class ProcessTracerProvider(trace.TracerProvider):
    """The tracer provider of a process in which nodes run."""

    def get_tracer(self, *args: Any, **more: Any) -> trace.Tracer:
        """See ``opentelemetry.trace.TracerProvider``."""
        return _Tracer(args, more)


class _Tracer(trace.Tracer):
    def __init__(self, args: Sequence[Any], more: dict[str, Any]) -> None:
        self._args = args
        self._more = more

    def start_span(self, *args: Any, **more: Any) -> trace.Span:
        """See ``opentelemetry.trace.Tracer``."""
        return self._tracer().start_span(*args, **more)

    def start_as_current_span(self, *args: Any, **more: Any) -> Any:
        """See ``opentelemetry.trace.Tracer``."""
        return self._tracer().start_as_current_span(*args, **more)

    def _tracer(self) -> trace.Tracer:
        provider = current_provider.get() or (_provided[-1] if _provided else NoOpTracerProvider())
        # The SDK keeps one tracer for each name.
        return provider.get_tracer(*self._args, **self._more)


def provide(provider: TracerProvider) -> None:
    """Pass the spans of handlers to this provider, until :func:`withdraw`. Synchronous."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(ProcessTracerProvider())
    _provided.append(provider)


def withdraw(provider: TracerProvider) -> None:
    """Undo :func:`provide`. Synchronous."""
    _provided.remove(provider)
