"""Who sends a request: found out by the gateway's authenticator, and carried with the request to the worker."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import attrs

__all__ = ["ANONYMOUS", "Principal", "Role"]

#: What a principal may do: ask models; also look at the calls of others, cancel them, and drain workers; everything.
Role: TypeAlias = Literal["inference", "operator", "admin"]


@attrs.frozen
class Principal:
    """Who sends a request."""

    name: str = ""
    """The name of the key that was shown; empty where no key is required."""
    role: Role = "inference"


#: Whoever sends a request to a node that requires no key.
ANONYMOUS: Final = Principal()
