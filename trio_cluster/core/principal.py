"""Principals: who sends a request.

The gateway's authenticator determines the principal. It travels with the request to the worker.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

__all__ = ["ANONYMOUS", "Principal", "Role"]

#: What a principal may do. ``inference``: send requests to models; ``operator``: also look at the state of the node;
#: ``admin``: everything.
Role: TypeAlias = Literal["inference", "operator", "admin"]


@attrs.frozen
class Principal:
    """Who sends a request."""

    name: str = ""
    """The name of the API key that the request has; empty where no key is required."""
    role: Role = "admin"
    """What the principal may do. Not checked yet: the only key that a node can have allows everything."""


#: The principal of requests to a node that requires no key.
ANONYMOUS: Final = Principal()
