"""The key limits stage: admits a request within the limits of its key, and says in every answer what is left of them.

It comes after the parse stage, since how many tokens a request may use follows from its body, and before anything is
opened for it. What it reserves belongs to the request context, which ends the reservation with the request; the calls
of the request hold it until their work has really stopped (``limits/reservation.py``).

Requests of keys without limits do not pass this stage.
"""

from __future__ import annotations

import time

from ..limits.account import LimitState
from ..limits.limiter import Refused
from ..openai import ErrorFamily
from .context import RequestContext
from .node_context import NodeContext

__all__ = ["ReserveLimits", "with_limit_headers"]

_Headers = list[tuple[bytes, bytes]]


class ReserveLimits:
    """Reserves what the request may use. See ``Stage``.

    Args:
        node_context: the node, for its limiter.
    """

    def __init__(self, node_context: NodeContext) -> None:
        self._node_context = node_context

    async def admit(self, context: RequestContext) -> None:
        """See ``Stage``.

        Raises:
            ApiError: the key is over one of its limits (429), or they cannot be counted at the moment (503).
        """
        principal = context.principal
        if principal.limits is None:
            return
        try:
            reservation = await self._node_context.limiter.reserve(
                principal, principal.limits, context.request
            )
        except Refused as refused:
            context.limit_state = refused.state
            raise refused.error from None
        context.reservation = reservation
        context.limit_state = reservation.state


async def with_limit_headers(
    node_context: NodeContext, context: RequestContext, headers: _Headers
) -> _Headers:
    """Return the headers of an answer with those that say what is left of the limits of its key.

    A server behind a model may have limits of its own, and say so in the same headers. A client that has limits here is
    told these. May be a checkpoint; waits for a second at most.
    """
    principal, state = context.principal, context.limit_state
    if principal.limits is None:
        return headers
    if state is None:
        # The request ended before it came to the stage, or is not for a model.
        state = await node_context.limiter.state(principal, principal.limits)
    prefixes = context.errors.limit_prefixes
    others = [header for header in headers if not header[0].startswith(prefixes)]
    return others + _headers(state, context.errors)


def _headers(state: LimitState, errors: ErrorFamily) -> _Headers:
    headers: _Headers = []
    for name, standing in ((b"requests", state.requests), (b"tokens", state.tokens)):
        if standing is not None:
            headers += errors.limit_headers(
                name, standing.limit, standing.remaining, standing.reset, time.time()
            )
    return headers
