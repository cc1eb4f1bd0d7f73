"""Routing policies: which replica of a model a request goes to.

A policy is an object with one decision. It sees the replicas that may be chosen and the request, and nothing of links or
handlers. To add one: write a class like :class:`LeastBusy`, and hand it to the router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from ..core.request import Request
from .backend import Backend

__all__ = ["LeastBusy", "RoutingPolicy"]


class RoutingPolicy(Protocol):
    """Chooses among the replicas of a model.

    Attributes:
        why: the reason for the last choice, for people.
    """

    why: str

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        """Return the replica that is to answer ``request``; ``None`` if there is none to choose from.

        Synchronous, and called for each request.

        Args:
            replicas: those that are healthy and answer the request's endpoint, the one used longest ago first.
            request: may have been parsed (``request.parsed``) or not.
        """
        ...


class LeastBusy:
    """Chooses the replica with the smallest share of its slots taken; of equals, the one used longest ago."""

    why = "least busy"

    def pick(self, replicas: Sequence[Backend], request: Request) -> Backend | None:
        """See ``RoutingPolicy``."""
        best, least = None, math.inf
        for replica in replicas:
            load = replica.load
            if load < least:
                best, least = replica, load
                if not load:
                    break
        return best
