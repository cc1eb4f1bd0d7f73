"""Principals: who sends a request.

The gateway's authenticator determines the principal. It travels with the request to the worker.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

__all__ = ["ANONYMOUS", "PRIORITIES", "BudgetPeriod", "Limits", "Principal", "Priority", "Role"]

#: What a principal may do. ``inference``: send requests to models; ``operator``: also see the calls of other clients,
#: cancel them, and drain workers; ``admin``: everything.
Role: TypeAlias = Literal["inference", "operator", "admin"]


#: In which order waiting requests of several principals are served, as far as fairness allows.
Priority: TypeAlias = Literal["high", "normal", "low"]

#: Priorities as they travel to a worker.
PRIORITIES: Final[dict[Priority, int]] = {"high": 1, "normal": 0, "low": -1}

#: The calendar period, in UTC, that a budget is for; a week begins on Monday.
BudgetPeriod: TypeAlias = Literal["day", "week", "month"]


@attrs.frozen
class Limits:
    """How much a principal may use. ``None``: any amount."""

    requests_per_minute: int | None = None
    """Requests that are admitted in any 60 seconds."""
    tokens_per_minute: int | None = None
    """Tokens, of prompts and answers together, in any 60 seconds."""
    max_concurrency: int | None = None
    """Requests that are answered at the same time."""
    budget_tokens: int | None = None
    """Tokens, of prompts and answers together, in one calendar period."""
    budget_per: BudgetPeriod = "month"


@attrs.frozen
class Principal:
    """Who sends a request."""

    name: str = ""
    """The name of the API key that the request has; empty where no key is required."""
    role: Role = "inference"
    """What the principal may do; checked by the authenticate stage."""
    models: tuple[str, ...] = ()
    """Patterns (``fnmatch``) of the names of the models that it may use; empty: all models."""
    limits: Limits | None = None
    """How much it may use; ``None``: any amount, and nothing is counted for it."""
    weight: float = 1.0
    """Its share of a node that is busy, relative to the weights of others that wait."""
    priority: Priority = "normal"
    created_at: float = 0.0
    """When its key was made, in seconds since the epoch; 0: not known. It tells a key from an earlier one of the same
    name that was revoked."""


#: The principal of requests to a node that requires no key.
ANONYMOUS: Final = Principal()
