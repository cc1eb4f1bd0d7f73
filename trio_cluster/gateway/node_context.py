"""The node as the gateway and the admin application see it.

Everything is read at the time of use, so that a new key, a changed limit or a new model applies to the next request.
Nothing of the node is changed through it, except by ``drain_worker``, ``open_control`` and ``reload``.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

import attrs
import trio

from ..accounts.accounts import Accounts
from ..accounts.audit import AuditLog
from ..core.call import Call
from ..core.live_state import LiveSiblings
from ..core.request import Request
from ..core.status import NodeStatus, WorkerStatus
from ..errors import ModelNotOnDemand
from ..limits.limiter import Limiter
from ..limits.memory import MemoryLimiter
from ..options import ClusterServerOptions, Reloaded
from ..routing.backend import Backend
from ..routing.router import Router
from ..stored.record import ResponseStore
from .auth import Authenticator
from .context import RequestContext
from .request_stats import RequestStats
from .stories import Stories

__all__ = ["GaugeSample", "NodeContext"]


@attrs.frozen
class GaugeSample:
    """One value of a gauge that ``/metrics`` shows.

    Samples of the same name are values of one gauge, with different labels. They must have the same label names.
    """

    name: str
    """The name of the gauge without the prefix ``trio_cluster_``; for instance ``worker_in_flight``."""
    help: str
    """One sentence that explains the gauge."""
    value: float
    labels: Mapping[str, str] = attrs.field(factory=dict)


def _no_worker(_: str) -> None:
    return None


def _no_control(backend: Backend, request: Request) -> Call:
    raise ModelNotOnDemand(request.model)


@attrs.define(eq=False)
class NodeContext:
    """The node to which the gateway belongs.

    Its functions are called for each request that needs them. They must not block; an exception from them is a 500 for
    that request only.
    """

    router: Router
    options: ClusterServerOptions
    node_id: str = ""
    """The name of the node."""
    mode: str = ""
    """The role of the node; see ``ClusterMode``."""
    starting: bool = False
    """Whether start-up hooks of the node are still running."""
    status: Callable[[], NodeStatus] = NodeStatus
    """Returns the part of the node's state that only the node knows."""
    gauges: Callable[[], Iterable[GaugeSample]] = tuple
    """Returns what ``GET /metrics`` shows besides the counters of calls."""
    drain_worker: Callable[[str], WorkerStatus | None] = _no_worker
    """``drain_worker(name)`` asks a worker to finish its calls and stop, and returns its state; ``None``: there is no
    worker of this name here."""
    open_control: Callable[[Backend, Request], Call] = _no_control
    """Opens a call that loads or unloads a model on one of its backends; see ``local/control.py``."""
    accounts: Accounts | None = None
    """The keys and the usage; ``None``: the node has no database. Not to be changed after the gateway was made."""
    audit: AuditLog = attrs.field(factory=AuditLog)
    """Records what operators and admins do."""
    responses: ResponseStore | None = None
    """Keeps responses that later requests may refer to; ``None``: the node stores none."""
    limiter: Limiter = attrs.field(factory=MemoryLimiter)
    """Counts the requests of keys that have limits."""
    authenticator: Authenticator | None = None
    """Determines who sends a request; ``None``: the API key of the options is required."""
    reload: Callable[[], Awaitable[Reloaded]] | None = None
    """Reads the configuration again, and applies it, or raises a ``ClusterError``; ``None``: there is none to read."""
    siblings: LiveSiblings | None = None
    """The other processes of this master, for what is shown live; ``None``: it is the only one. Not to be changed after
    the application was made."""
    started: float = attrs.field(factory=time.monotonic)
    """The time at which the node started, by ``time.monotonic()``, in seconds."""
    stories: Stories = attrs.field(init=False)
    """What has become of requests for models."""
    request_stats: RequestStats = attrs.field(init=False)
    """How many requests for models ended how, and how long they took."""
    _answering: set[RequestContext] = attrs.field(factory=set, init=False)
    _answered: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot, init=False)

    def __attrs_post_init__(self) -> None:
        self.request_stats = RequestStats(self._is_model)
        self.stories = Stories(self.options, self.request_stats)

    def begin_answer(self, context: RequestContext) -> None:
        """Record that a call was opened for a request. Synchronous."""
        self._answering.add(context)

    def end_answer(self, context: RequestContext) -> None:
        """Record that a request has ended: its answer was written, or its client left. Synchronous, idempotent."""
        self._answering.discard(context)
        if not self._answering and self._answered:
            self._answered.unpark_all()

    async def wait_answered(self) -> None:
        """Wait until all requests for which a call was opened have ended. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self._answering:
            await self._answered.park()

    def _is_model(self, name: str) -> bool:
        """Tell whether a model of this name is served, or was a short while ago."""
        catalog = self.router.catalog
        return catalog.info(name) is not None or catalog.absent.find(name) is not None

    @property
    def requires_key(self) -> bool:
        """Whether requests for models need an API key."""
        accounts = self.accounts
        return self.options.server.api_key is not None or (accounts is not None and accounts.table.required)

    @property
    def uptime(self) -> float:
        """Seconds since the node started."""
        return time.monotonic() - self.started
