"""What the HTTP face needs to know of the house it stands in front of.

The face asks for everything at the time of use: a key that is set, a limit that is changed or a model that
appears acts on the next request. It never writes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import trio

from ..options import ClusterServerOptions
from ..routing.router import Router
from .context import RequestContext

__all__ = ["GaugeSample", "NodeContext"]


@attrs.frozen
class GaugeSample:
    """One value of a gauge that ``/metrics`` shows besides the face's own numbers.

    Measures of the same name are values of one gauge, told apart by their labels; all have the same label
    names.
    """

    name: str
    """What is measured, without the prefix ``trio_cluster_``; for instance ``worker_load``."""
    help: str
    """One sentence for whoever reads the numbers."""
    value: float
    labels: Mapping[str, str] = attrs.field(factory=dict)


def _nobody(_: str) -> None:
    return None


@attrs.define(eq=False)
class NodeContext:
    """The node that the face belongs to.

    ``status`` gives what ``GET /cluster/status`` adds to the face's own account of models and calls; it must
    be JSON. ``gauges`` gives what ``GET /metrics`` adds. Both are called on each such request, must not
    block, and an exception from them is a 500 for that request only.

    ``drain_worker`` asks the worker of a name to finish its calls and stop, and gives what is to be told about it,
    or ``None`` if there is no such worker here.
    """

    registry: Router
    options: ClusterServerOptions
    node_id: str = ""
    mode: str = ""
    status: Callable[[], Mapping[str, Any]] = dict
    gauges: Callable[[], Iterable[GaugeSample]] = tuple
    drain_worker: Callable[[str], Mapping[str, Any] | None] = _nobody
    started: float = attrs.field(factory=time.monotonic)
    """When the node began, on the monotonic clock."""
    _answering: set[RequestContext] = attrs.field(factory=set, init=False)
    _answered: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    def begin_answer(self, context: RequestContext) -> None:
        """Note that a call has been opened for an exchange."""
        self._answering.add(context)

    def end_answer(self, context: RequestContext) -> None:
        """Note that an exchange is over: its answer has been written, or its client has left. Idempotent."""
        self._answering.discard(context)
        if not self._answering and self._answered:
            self._answered.unpark_all()

    async def wait_answered(self) -> None:
        """Wait until the answers of all calls have been written. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self._answering:
            await self._answered.park()

    @property
    def uptime(self) -> float:
        """Seconds since the node began."""
        return time.monotonic() - self.started
