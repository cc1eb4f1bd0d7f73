"""The router: opens calls on the replica that the policy chooses, retries a call once on another replica, and drains.

One router serves a whole node. On a worker it has the node's own models, on a master those and the models of its
workers. To the caller that opens a call, they are the same.

Opening a call is synchronous. The router does not wait for a slot: that is part of the call, on the node that runs the
handler, so that a waiting call can be cancelled like a running one.

A retry happens in one place (:meth:`Router.reopen`), once, and only if nothing of the answer has begun. Whether a
failed call may be retried is a field of its ``Failed`` event. It is never derived from the error that a handler raised.
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
from ..core.tracer import Tracer
from ..errors import ApiError, LoopDetected, Overloaded, ShuttingDown
from ..options import ClusterServerOptions
from .backend import Backend
from .catalog import Catalog
from .ejection import Ejections
from .hedging import Hedging
from .policy import LearningPolicy, LeastBusy, RoutingPolicy

__all__ = ["Router"]


class Router:
    """Routes the requests of a node to its models, and knows its live calls.

    Args:
        policy: chooses among replicas; ``None``: the least busy one.
        options: those of the node; ``None``: the defaults.

    Attributes:
        catalog: the models and their replicas.
        observers: called at every step of every call.
        hedging: when a request gets a second attempt, and how many did.
        stats: the counters of the node's calls; one of the observers.
        ejections: the replicas that are left alone for a while, since they keep failing; one of the observers.
        live: the calls whose work has not stopped yet, each with its backend, oldest first.
        tracer: opens a trace for each call; ``None``: there is no tracing.
    """

    def __init__(
        self, policy: RoutingPolicy | None = None, options: ClusterServerOptions | None = None
    ) -> None:
        self.catalog = Catalog()
        self.policy = LeastBusy() if policy is None else policy
        self.observers = Observers()
        self.hedging = Hedging()
        self.stats = CallStats()
        self.observers.add(self.stats)
        options = ClusterServerOptions() if options is None else options
        self.ejections = Ejections(options, self.catalog.replicas, self.observers)
        self.observers.add(self.ejections)
        self.live: dict[Call, Backend] = {}
        self.tracer: Tracer | None = None
        self._idle = trio.lowlevel.ParkingLot()
        self._draining_reason: str | None = None

    @property
    def policy(self) -> RoutingPolicy:
        """What chooses among replicas. May be replaced, and then applies from the next request on."""
        return self._policy

    @policy.setter
    def policy(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        self._learning = policy if isinstance(policy, LearningPolicy) else None

    @property
    def draining_reason(self) -> str | None:
        """The message with which new calls are refused, while the node drains; ``None`` while they are accepted."""
        return self._draining_reason

    def drain(self, reason: str) -> None:
        """Refuse new calls from now on, with this message; running calls go on. Synchronous."""
        self._draining_reason = reason

    def accept(self) -> None:
        """Accept new calls again, for another run of the node. Synchronous.

        Models that left during the last run, and replicas that failed, are forgotten.
        """
        self._draining_reason = None
        self.catalog.absent.clear()
        self.ejections.clear()

    def open(self, request: Request) -> Call:
        """Begin to answer a request on the replica that the policy chooses. Synchronous.

        Raises:
            ShuttingDown: the node drains.
            ModelNotFound: no backend serves the model.
            ModelUnavailable: no backend serves the model now, and one did a short while ago.
            WrongKind: the model does not answer the endpoint.
            LoopDetected: all its replicas lead back to a cluster that the request has passed.
            Overloaded: none of its replicas can be given a call now.
            ApiError: the backend refused the request.

        After any of these, nothing was started. The request for an alias goes on to its next name after any of them,
        unless the node drains, and they are raised only if there is none.
        """
        return self._open(request, "") if request.otherwise is None else self._open_any(request)

    def reopen(self, call: Call, time_left: float = math.inf) -> Call | None:
        """Retry a call that failed because of the node that had it. Synchronous.

        A request is retried once on another replica of its model. If the client has asked for an alias that is a list,
        the request goes on to its next name after that, or if there is no other replica, or if the node had no room for
        the call. So a request is opened at most twice for each name.

        The caller guarantees that nothing of the answer was sent to the client.

        Args:
            call: the call that failed.
            time_left: seconds that are left for the whole answer. The total timeout counts from the first opening.

        Returns:
            The new call; ``None`` if this one cannot be retried: its failure is not of that kind, its body was streamed
            and not kept, its time is used up, the node drains, or no other backend can be given the request.

        Raises:
            ApiError: as for :meth:`open`.
        """
        failed, request = call.end, call.request
        if not (isinstance(failed, Failed) and failed.movable):
            return None
        if self._draining_reason is not None or not request.replayable or time_left <= 0:
            return None
        again = None
        if failed.retryable and not request.retried:
            retry = attrs.evolve(request, total_timeout=time_left, retried=True)
            if self.catalog.candidates(retry, avoid=call.served_by):
                try:
                    again = self._open(retry, call.served_by)
                except ApiError:
                    if request.otherwise is None:
                        raise
        if again is None:
            return self.open_following(call, "it has failed", time_left)
        self.tell_replaced(call, again)
        return again

    def open_following(self, call: Call, why: str, time_left: float = math.inf) -> Call | None:
        """Open the request of a call for the next name of its alias. Synchronous.

        The caller guarantees that nothing of the answer was sent to the client.

        Args:
            call: a call that has failed or is not to be waited for any longer, or whose server has answered that it
                cannot take the request now. Nothing of it is received any more if there is a new call.
            why: the reason, for logs.
            time_left: seconds that are left for the whole answer.

        Returns:
            The new call; ``None`` if there is no next name, or none that can be given the request, or the node drains.
        """
        make = call.request.otherwise
        if make is None or self._draining_reason is not None or time_left <= 0:
            return None
        following = make()
        if following is None:
            return None
        try:
            again = self._open_any(attrs.evolve(following, total_timeout=time_left, trace=call.request.trace))
        except ApiError:
            # The client is told why the first name failed, rather than that the next one is away.
            return None
        # Its outcome is the answer of the server, which says something about the replica.
        call.satisfy(f"{why}; the next name of the alias is tried")
        self.tell_replaced(call, again)
        return again

    def open_hedge(self, call: Call, time_left: float) -> Call | None:
        """Open a request a second time, on another replica of its model, while its first call goes on. Synchronous.

        Args:
            call: the first call, whose answer is late.
            time_left: seconds that are left for the whole answer.

        Returns:
            The second call, which is never retried; ``None`` if there is none: the budget is spent, the node drains,
            the request was retried before or cannot be sent again, or no other replica has room for it.
        """
        request = call.request
        if self._draining_reason is not None or request.retried or not request.replayable or time_left <= 0:
            return None
        if not self.hedging.allows(request.model):
            return None
        second = attrs.evolve(request, total_timeout=time_left, retried=True, otherwise=None)
        if not any(replica.load < 1 for replica in self.catalog.candidates(second, avoid=call.served_by)):
            return None
        try:
            opened = self._open(second, call.served_by)
        except ApiError:
            return None
        self.hedging.spend(request.model)
        return opened

    def tell_replaced(self, lost: Call, again: Call) -> None:
        """Tell the observers that a call was replaced by another one of the same request. Synchronous."""
        for listener in self.observers.retried:
            listener(lost, again)

    def calls_of(self, request_id: str) -> list[Call]:
        """Return the live calls of all requests that have this id, oldest first. Clients may use an id repeatedly."""
        return [call for call in self.live if call.request.request_id == request_id]

    def cancel_all(self, reason: str) -> None:
        """Cancel all live calls. Synchronous."""
        for call in list(self.live):
            call.cancel(reason)

    async def wait_idle(self) -> None:
        """Wait until the work of every call has really stopped. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self.live:
            await self._idle.park()

    def _open_any(self, request: Request) -> Call:
        """Open a request for the first of the names of an alias for which it can be opened."""
        total_timeout = request.total_timeout
        refusal: ApiError | None = None
        following: Request | None = request
        while following is not None:
            try:
                return self._open(following, "")
            except ApiError as error:
                if self._draining_reason is not None:
                    raise
                # The first reason counts, unless another one says that it is worth to try again.
                if refusal is None or (error.status == 503 and refusal.status != 503):
                    refusal = error
            following = None if following.otherwise is None else following.otherwise()
            if following is not None and following.total_timeout != total_timeout:
                following = attrs.evolve(following, total_timeout=total_timeout)
        assert refusal is not None
        try:
            raise refusal
        finally:
            # Otherwise the error and this frame would refer to each other.
            del refusal

    def _open(self, request: Request, avoid: str) -> Call:
        if self._draining_reason is not None:
            raise ShuttingDown(self._draining_reason)
        candidates = self.catalog.candidates(request, avoid=avoid)
        if self.ejections.ejected:
            candidates = self.ejections.admit(request, candidates)
        backend = self._policy.pick(candidates, request)
        if backend is None:
            # Raises the reason, if it is the request; otherwise the replicas are unavailable at the moment.
            self.catalog.check(request.model, request.kind, request.endpoint)
            if VIA_HEADER in request.headers and self.catalog.leads_back(request):
                raise LoopDetected(request.model)
            raise Overloaded(
                f"Every node that serves '{request.model}' is busy, starting or about to stop; try again shortly",
                retry_after=2.0,
            )
        # Before anything is open: a policy that lacks its reason fails here.
        why = self._policy.why
        if self.tracer is not None:
            request = self.tracer.open(request)
        call = backend.open(request)
        call.why = why
        self.catalog.used(request.model, backend)
        self.live[call] = backend
        if self._learning is not None and (placement := self._learning.placement) is not None:
            placement.follow(call)
        call.on_release(lambda: self._released(call))
        if self.ejections.ejected:
            self.ejections.opened(call)
        try:
            self._tell_opened(call, why)
        except Exception:
            # The caller gets no call that it could cancel.
            call.cancel("an internal error")
            raise
        return call

    def _tell_opened(self, call: Call, why: str) -> None:
        observers = call.observers = self.observers
        for listener in observers.routed:
            listener(call, why)
        if call.forwarded:
            for listener in observers.forwarded:
                listener(call)
        if call.begun:
            for listener in observers.first_byte:
                listener(call)

    def _released(self, call: Call) -> None:
        outcome = outcome_of(call)
        del self.live[call]
        try:
            for listener in self.observers.ended:
                listener(call, outcome)
        finally:
            if not self.live and self._idle:
                self._idle.unpark_all()
