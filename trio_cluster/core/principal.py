"""Principals: who sends a request.

The gateway's authenticator determines the principal. It travels with the request to the worker.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

__all__ = ["ANONYMOUS", "Principal", "Role"]

#: What a principal may do. ``inference``: send requests to models; ``operator``: also see the calls of other clients,
#: cancel them, and drain workers; ``admin``: everything.
Role: TypeAlias = Literal["inference", "operator", "admin"]


@attrs.frozen
class Principal:
    """Who sends a request."""

    name: str = ""
    """The name of the API key that the request has; empty where no key is required."""
    role: Role = "inference"
    """What the principal may do; checked by the authenticate stage."""


#: The principal of requests to a node that requires no key.
ANONYMOUS: Final = Principal()
