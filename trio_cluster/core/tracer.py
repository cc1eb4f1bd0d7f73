"""The interface of tracing: two hooks in the path of a request, which cost nothing while they are not used.

The router lets the node's tracer open the trace of a call before it opens the call (``Router.tracer``). The trace then
belongs to the request that the backend gets (``Request.trace``): its context is in the request's headers, which go to a
worker and to the server behind an engine, and what runs the handler enters it. ``telemetry/`` implements both hooks:
which spans there are, and where they are exported.
"""

from __future__ import annotations

from typing import Protocol

from .request import Request

__all__ = ["Tracer"]


class Tracer(Protocol):
    """Opens the traces of a node's calls."""

    def open(self, request: Request) -> Request:
        """Return the request of a call that is about to be opened, with the call's trace. Synchronous; must not raise.

        Args:
            request: if it has a trace, that of an earlier attempt at the same request.
        """
