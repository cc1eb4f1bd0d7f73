"""What the gateway and the admin application may see of the node that they belong to.

Everything is asked for at the time of use: a key that is set, a limit that is changed or a model that appears acts on the
next request. Nothing of the node is written here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import attrs
import trio

from ..core.status import NodeStatus, WorkerStatus
from ..options import ClusterServerOptions
from ..routing.router import Router
from .context import RequestContext

__all__ = ["GaugeSample", "NodeContext"]


@attrs.frozen
class GaugeSample:
    """One value of a gauge that ``/metrics`` shows.

    Samples of the same name are values of one gauge, told apart by their labels; all have the same label names.
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
    """The node behind the gateway.

    ``status`` returns what only the node knows of its state; ``gauges`` returns what ``GET /metrics`` shows besides the
    counters of calls. Both are called for each such request and must not block; an exception from them is a 500 for that
    request only.

    ``drain_worker`` asks the worker of a name to finish its calls and stop, and returns its state, or ``None`` if there is
    no such worker here.
    """

    router: Router
    options: ClusterServerOptions
    node_id: str = ""
    mode: str = ""
    status: Callable[[], NodeStatus] = NodeStatus
    gauges: Callable[[], Iterable[GaugeSample]] = tuple
    drain_worker: Callable[[str], WorkerStatus | None] = _nobody
    started: float = attrs.field(factory=time.monotonic)
    """When the node began, on the monotonic clock."""
    _answering: set[RequestContext] = attrs.field(factory=set, init=False)
    _answered: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    def begin_answer(self, context: RequestContext) -> None:
        """Take note that a call was opened for a request. Synchronous."""
        self._answering.add(context)

    def end_answer(self, context: RequestContext) -> None:
        """Take note that a request is over: its answer was written, or its client left. Synchronous, idempotent."""
        self._answering.discard(context)
        if not self._answering and self._answered:
            self._answered.unpark_all()

    async def wait_answered(self) -> None:
        """Wait until the answers of all calls were written. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self._answering:
            await self._answered.park()

    @property
    def uptime(self) -> float:
        """Seconds since the node began."""
        return time.monotonic() - self.started
