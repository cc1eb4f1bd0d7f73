"""The router: opens calls on the replica that the policy chooses, retries once elsewhere, and drains.

One router serves a whole node: on a worker it has the node's own models, on a master those and the ones that workers
registered. For whoever opens a call there is no difference between them.

Opening is synchronous, as everywhere. Waiting for a slot is not done here: it is part of the call itself, on the node
that runs the handler, so that a waiting call can be cancelled like a running one.

A retry happens in one place (:meth:`Router.reopen`), once, and only while nothing of the answer has begun. Whether a
failed call may be retried is said by its ``Failed`` event, never derived from the error that a handler raised.
"""

from __future__ import annotations

import math

import attrs
import trio

from ..core.answer import Failed
from ..core.call import Call
from ..core.observer import Observers
from ..core.outcome import outcome_of
from ..core.provenance import VIA_HEADER
from ..core.request import Request
from ..core.stats import CallStats
from ..errors import LoopDetected, Overloaded, ShuttingDown
from .backend import Backend
from .catalog import Catalog
from .policy import LeastBusy, RoutingPolicy

__all__ = ["Router"]


class Router:
    """The calls of a node, and the way to its models.

    Args:
        policy: chooses among replicas; without it, the least busy one.

    Attributes:
        catalog: the models.
        policy: as given; a new one acts on the next request.
        observers: are told of every step of every call.
        stats: counts every call.
        live: the calls whose work has not stopped yet, each with the backend that does it.
    """

    def __init__(self, policy: RoutingPolicy | None = None) -> None:
        self.catalog = Catalog()
        self.policy: RoutingPolicy = LeastBusy() if policy is None else policy
        self.observers = Observers()
        self.stats = CallStats()
        self.observers.add(self.stats)
        self.live: dict[Call, Backend] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self._draining_reason: str | None = None

    @property
    def draining_reason(self) -> str | None:
        """Why new calls are refused, because the node is about to stop; ``None`` while they are not."""
        return self._draining_reason

    def drain(self, reason: str) -> None:
        """Refuse new calls from now on; calls that run go on."""
        self._draining_reason = reason

    def accept(self) -> None:
        """Take new calls again: another run of the node begins. What was served in the last one does not count."""
        self._draining_reason = None
        self.catalog.absent.clear()

    def open(self, request: Request) -> Call:
        """Begin to answer ``request`` on the replica that the policy chooses. Synchronous.

        Raises:
            ShuttingDown: the node drains.
            ModelNotFound, ModelUnavailable: no backend serves the model; it was not served either a short while ago,
                or it was.
            WrongKind: no backend that serves the model answers the endpoint.
            LoopDetected: all that do lead back to a cluster that the request has passed.
            Overloaded: none that does can be given a call now.
            ApiError: the backend refused. Nothing was started, in all of these cases.
        """
        return self._open(request, "")

    def reopen(self, call: Call, time_left: float = math.inf) -> Call | None:
        """Open a call once more, on another replica, that failed because of the node which had it. Synchronous.

        The caller guarantees that nothing of the answer was sent to the client, and that this is the first retry.

        Args:
            call: the one that failed.
            time_left: seconds that are left for the whole answer: the request's own time began to run when it was
                opened first.

        Returns:
            The new call, or ``None`` if this one may not be repeated: it failed because of what was asked, its body is
            gone, its time is used up, or no other backend serves the model.

        Raises:
            ApiError: as :meth:`open` does.
        """
        if not (isinstance(call.end, Failed) and call.end.retryable):
            return None
        if self._draining_reason is not None or not call.request.replayable or time_left <= 0:
            return None
        request = attrs.evolve(call.request, total_timeout=time_left)
        if not self.catalog.candidates(request, avoid=call.served_by):
            return None
        again = self._open(request, call.served_by)
        for listener in self.observers.retried:
            listener(call, again)
        return again

    def calls_of(self, request_id: str) -> list[Call]:
        """Return the live calls of all requests that have this id, oldest first."""
        return [call for call in self.live if call.request.request_id == request_id]

    def cancel_all(self, reason: str) -> None:
        """Cancel every call that is live. Synchronous."""
        for call in list(self.live):
            call.cancel(reason)

    async def wait_idle(self) -> None:
        """Wait until the work of every call has really stopped. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self.live:
            await self._idle.park()

    def _open(self, request: Request, avoid: str) -> Call:
        if self._draining_reason is not None:
            raise ShuttingDown(self._draining_reason)
        backend = self.policy.pick(self.catalog.candidates(request, avoid=avoid), request)
        if backend is None:
            # Only to find out why there is none.
            self.catalog.check(request.model, request.kind, request.endpoint)
            if VIA_HEADER in request.headers and self.catalog.leads_back(request):
                raise LoopDetected(request.model)
            raise Overloaded(
                f"Every node that serves '{request.model}' is busy or about to stop; try again shortly",
                retry_after=2.0,
            )
        call = backend.open(request)
        self.catalog.used(request.model, backend)
        self.live[call] = backend
        call.on_release(lambda: self._released(call))
        observers = call.observers = self.observers
        for listener in observers.routed:
            listener(call, self.policy.why)
        if call.forwarded:
            for listener in observers.forwarded:
                listener(call)
        if call.begun:
            for listener in observers.first_byte:
                listener(call)
        return call

    def _released(self, call: Call) -> None:
        outcome = outcome_of(call)
        self.live.pop(call).health.record(outcome)
        for listener in self.observers.ended:
            listener(call, outcome)
        if not self.live and self._idle:
            self._idle.unpark_all()
