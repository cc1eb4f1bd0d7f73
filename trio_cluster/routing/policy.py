"""Routing policies: which replica of a model a request goes to.

A policy makes one decision. It sees the request and the replicas that may be chosen, and nothing of links or handlers.
To add a policy, write a class like :class:`LeastBusy`, and plug it in: ``server.router.policy = MyPolicy()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..core.call import Call
from ..core.model_state import MODEL_STATES
from ..core.request import Request
from .backend import Backend

__all__ = ["LearningPolicy", "LeastBusy", "Placement", "RoutingPolicy"]


class RoutingPolicy(Protocol):
    """Chooses among the replicas of a model.

    Attributes:
        why: the reason for the last choice, for display.
    """

    why: str

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        """Return the replica that is to answer ``request``; ``None`` if ``replicas`` is empty.

        Synchronous, and called for each request. It must not raise. ``None`` refuses the request with 503
        ``over_capacity``.

        Args:
            replicas: those that are available and answer the request's endpoint, least recently used first; perhaps
                none.
            request: ``request.parsed`` may be set or not; ``request.body`` is empty while ``request.upload`` is set.
        """
        ...


class Placement(Protocol):
    """A choice that learns from what becomes of it."""

    def follow(self, call: Call) -> None:
        """The call was opened on the chosen replica. Synchronous; must not raise."""
        ...


@runtime_checkable
class LearningPolicy(RoutingPolicy, Protocol):
    """A policy that follows the calls for which it has chosen.

    Attributes:
        placement: the last choice, if the call is to be followed; ``None`` if not.
    """

    placement: Placement | None


class LeastBusy:
    """Chooses the replica with the lowest load; of equals, the least recently used one, so that equals take turns.

    If the model runs on demand, a replica that is ready comes before one that starts, and that before a cold one, as
    long as it is not full.
    """

    why = "least busy"

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        """See ``RoutingPolicy``."""
        best, least = None, math.inf
        for replica in replicas:
            load = replica.load
            if (states := replica.health.model_states) and (state := states.get(request.model)) is not None:
                load += MODEL_STATES.index(state.state)
            if load < least:
                best, least = replica, load
                if not load:
                    break
        return best
