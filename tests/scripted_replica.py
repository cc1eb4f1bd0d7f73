"""A replica for tests of what routes requests."""

from __future__ import annotations

import attrs

from trio_cluster.core.call import Call
from trio_cluster.core.request import Request
from trio_cluster.routing.health import Health

__all__ = ["Scripted"]


@attrs.define(eq=False)
class Scripted:
    """A backend whose calls are ended by the test.

    Attributes:
        calls: all that were opened, oldest first.
    """

    name: str
    load: float = 0.0
    elsewhere: int = 0
    health: Health = attrs.field(factory=Health)
    calls: list[Call] = attrs.field(factory=list)

    def open(self, request: Request) -> Call:
        call = Call(request, served_by=self.name)
        self.calls.append(call)
        return call
