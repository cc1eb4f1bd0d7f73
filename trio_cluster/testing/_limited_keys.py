"""The keys of a schedule's clients: some of them have limits, and reach them.

Clients in a simulation have no keys; whose request it is follows from the machine that it comes from.
"""

from __future__ import annotations

import re
from typing import Final

from ..core.principal import Limits, Principal, Priority
from ..gateway.context import RequestContext

__all__ = ["LimitedKeys"]

_NUMBER: Final = re.compile(r"client-(\d+)\b")

#: Tight enough that some requests of a schedule are refused, and not many.
_LIMITS: Final = (
    Limits(requests_per_minute=18, tokens_per_minute=400_000),
    Limits(tokens_per_minute=100_000, max_concurrency=4),
    None,
)
#: Weight and priority of each.
_SHARES: Final[tuple[tuple[float, Priority], ...]] = ((1.0, "high"), (0.5, "low"), (3.0, "normal"))


class LimitedKeys:
    """An authenticator that gives the clients of a schedule one of three keys. See ``Authenticator``.

    Args:
        first_probe: clients of this number, and of higher ones, have no limits.
    """

    def __init__(self, first_probe: int) -> None:
        self._first_probe = first_probe

    async def authenticate(self, context: RequestContext) -> Principal:
        """See ``Authenticator``."""
        found = _NUMBER.match(context.client)
        number = int(found[1]) if found is not None else self._first_probe
        if not self.is_limited(number):
            return Principal("unlimited", "admin")
        index = number % len(_LIMITS)
        weight, priority = _SHARES[index]
        return Principal(f"key-{index}", limits=_LIMITS[index], weight=weight, priority=priority)

    def is_limited(self, number: int) -> bool:
        """Tell whether the client of this number has a key with limits."""
        return number < self._first_probe and _LIMITS[number % len(_LIMITS)] is not None
