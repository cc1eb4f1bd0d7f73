"""Which models there are, who serves them, and how every call ended.

One registry serves a whole node: on a worker it holds the node's own models, on a master those and the ones that
workers registered. To whoever opens a call there is no difference between them.

Opening is synchronous, as everywhere in this house. Waiting for a slot is not done here: it is part of the call
itself, on the node that runs the handler, so that a waiting call can be cancelled like a running one.

The registry keeps the books. Every call that was opened is counted once as admitted and, when its work has really
stopped, once under the way it ended, so that at any instant

    admitted = completed + cancelled + timed_out + worker_lost + failed + in flight
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from typing import ClassVar

import attrs
import trio

from ..core.answer import Done, Failed
from ..core.call import Backend, Call
from ..core.model import Kind, ModelInfo
from ..core.request import Request
from ..errors import ModelNotFound, Overloaded, ShuttingDown, WorkerLost, WrongKind

__all__ = ["CallStats", "Histogram", "NameTaken", "Registry"]


class NameTaken(ValueError):
    """A model of this name is already served, and may not be served a second time."""


@attrs.define
class CallStats:
    """How many calls there have been, and what became of them."""

    admitted: int = 0
    completed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    worker_lost: int = 0
    failed: int = 0
    retried: int = 0
    """Calls that were opened a second time elsewhere; both openings are counted as admitted."""

    def record(self, call: Call) -> None:
        """Enter how ``call`` ended."""
        if call.cancelled is not None:
            self.cancelled += 1
        elif isinstance(call.end, Done):
            self.completed += 1
        elif call.end is not None and isinstance(call.end.error, WorkerLost):
            self.worker_lost += 1
        elif call.end is not None and call.end.timed_out:
            self.timed_out += 1
        else:
            self.failed += 1


@attrs.define
class Histogram:
    """How long something took, by classes: enough to tell whether a promise about time is kept."""

    BOUNDS: ClassVar = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
    """The most seconds that belong into each class; what took longer has a class of its own."""

    counts: list[int] = attrs.field(factory=lambda: [0] * (len(Histogram.BOUNDS) + 1))
    total: float = 0.0
    """The sum of all, in seconds."""

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(self.BOUNDS, seconds)] += 1
        self.total += seconds


class _Served:
    """A model and everybody who serves it, the one used longest ago first, each with what it says the model is."""

    def __init__(self, info: ModelInfo) -> None:
        self.replicas: dict[Backend, ModelInfo] = {}
        self.info = info
        """What is known of the model: what its first replica said, and all that any of them answers."""

    def note(self, info: ModelInfo, backend: Backend) -> None:
        self.replicas[backend] = info
        self._sum_up()

    def forget(self, backend: Backend) -> None:
        del self.replicas[backend]
        self._sum_up()

    def _sum_up(self) -> None:
        extra_endpoints = dict.fromkeys(
            each for info in self.replicas.values() for each in info.extra_endpoints
        )
        if tuple(extra_endpoints) != self.info.extra_endpoints:
            self.info = attrs.evolve(self.info, extra_endpoints=tuple(extra_endpoints))


class Registry:
    """The models of a node and their calls.

    Attributes:
        stats: what became of every call.
        cancel_durations: how long it took from giving a call up until its work had really stopped, wherever it ran.
        live: the calls whose work has not stopped yet, each with the backend that does it.
        draining_reason: why new calls are refused (the node drains); ``None`` while they are not.
    """

    def __init__(self) -> None:
        self._models: dict[str, _Served] = {}
        # The names of models of the kind "any".
        self._passthrough: set[str] = set()
        self.stats = CallStats()
        self.cancel_durations = Histogram()
        self.live: dict[Call, Backend] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self.draining_reason: str | None = None

    def add(self, info: ModelInfo, backend: Backend, *, replicate: bool = False) -> None:
        """Serve a model, from now on.

        Args:
            info: what the model is.
            backend: who answers for it.
            replicate: another model of the same name and kind is not a conflict, but a replica of this one.

        Raises:
            NameTaken: the name is taken.
        """
        served = self._models.get(info.name)
        if served is None:
            served = self._models[info.name] = _Served(info)
            served.note(info, backend)
            self._note_kind(info)
            return
        who = ", ".join(replica.name for replica in served.replicas)
        if not replicate:
            raise NameTaken(f"a model named '{info.name}' is already served by {who}")
        kind = served.info.kind
        if kind != info.kind:
            raise NameTaken(
                f"a model named '{info.name}' is already served by {who}, as {kind}, not {info.kind}"
            )
        if any(replica.name == backend.name for replica in served.replicas):
            raise NameTaken(f"'{backend.name}' already serves a model named '{info.name}'")
        served.note(info, backend)

    def update(self, info: ModelInfo, backend: Backend) -> None:
        """Take note that a model of ``backend``, which serves it, is something else from now on.

        Raises:
            NameTaken: it would be of another kind than its replicas are.
        """
        served = self._models[info.name]
        others = [other for replica, other in served.replicas.items() if replica is not backend]
        if any(other.kind != info.kind for other in others):
            raise NameTaken(
                f"a model named '{info.name}' is already served as {others[0].kind}, not {info.kind}"
            )
        if not others:
            served.info = info
        served.note(info, backend)
        self._note_kind(info)

    def remove(self, name: str, backend: Backend) -> bool:
        """Stop routing calls for a model to ``backend``; calls that run go on. Return whether it served it."""
        served = self._models.get(name)
        if served is None or backend not in served.replicas:
            return False
        served.forget(backend)
        if not served.replicas:
            del self._models[name]
            self._passthrough.discard(name)
        return True

    def _note_kind(self, info: ModelInfo) -> None:
        if info.kind == "any":
            self._passthrough.add(info.name)
        else:
            self._passthrough.discard(info.name)

    @property
    def has_passthrough(self) -> bool:
        """Whether there are models of the kind ``"any"``, which want to see what clients send as it is."""
        return bool(self._passthrough)

    def info(self, name: str) -> ModelInfo | None:
        """Return what is known of a model, or ``None`` if nobody serves it."""
        served = self._models.get(name)
        return None if served is None else served.info

    def infos(self) -> list[ModelInfo]:
        """Return all models, sorted by name."""
        return [self._models[name].info for name in sorted(self._models)]

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self._models)

    def served_by(self, name: str) -> list[str]:
        """Return the names of the nodes that serve a model, sorted."""
        served = self._models.get(name)
        return [] if served is None else sorted(replica.name for replica in served.replicas)

    def check(self, name: str, kind: Kind, endpoint: str = "") -> ModelInfo:
        """Return what is known of a model that an endpoint for ``kind`` wants.

        Raises:
            ModelNotFound: nobody serves it.
            WrongKind: it does not answer that endpoint.
        """
        served = self._models.get(name)
        if served is None:
            raise ModelNotFound(name, list(self._models))
        if not served.info.answers(kind, endpoint):
            raise WrongKind(name, served.info.kind, endpoint if kind == "custom" else kind)
        return served.info

    def answers(self, endpoint: str) -> bool:
        """Tell whether any model answers an endpoint that is not one of the OpenAI API."""
        return any(served.info.answers("custom", endpoint) for served in self._models.values())

    def open(self, request: Request) -> Call:
        """Begin to answer ``request`` on the least busy node that serves its model.

        Raises:
            ApiError: nobody can; nothing was started.
        """
        return self._open(request)

    def reopen(self, call: Call, time_left: float = math.inf) -> Call | None:
        """Open once more, elsewhere, a call whose worker was lost or went away before anything came of it.

        The caller vouches that nothing of the answer has been sent to the client, and that this is the first time.

        Args:
            call: the one that failed.
            time_left: seconds that are left of the time for the whole answer: the request's own began to run when it was
                opened first.

        Returns:
            The new call, or ``None`` if this one may not be repeated: it ended for another reason, its time is used
            up, or nobody else serves the model.
        """
        if not (isinstance(call.end, Failed) and call.end.retryable):
            return None
        served = self._models.get(call.request.model)
        if self.draining_reason is not None or served is None:
            return None
        if not (call.request.replayable and self._least_busy(served, call.request, avoid=call.served_by)):
            return None
        if time_left <= 0:
            return None
        again = self._open(attrs.evolve(call.request, total_timeout=time_left), avoid=call.served_by)
        self.stats.retried += 1
        return again

    def calls_of(self, request_id: str) -> list[Call]:
        """Return the live calls of all requests that have this id, oldest first."""
        return [call for call in self.live if call.request.request_id == request_id]

    def cancel_all(self, reason: str) -> None:
        """Cancel every call that is live."""
        for call in list(self.live):
            call.cancel(reason)

    async def wait_idle(self) -> None:
        """Wait until the work of every call has really stopped. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self.live:
            await self._idle.park()

    @staticmethod
    def _least_busy(served: _Served, request: Request, avoid: str) -> Backend | None:
        """Return who is to answer, if anybody can; of equals, the one used longest ago."""
        best, least = None, math.inf
        # There may be hundreds, and this is done for each request: so all are asked for their load only.
        for replica, info in served.replicas.items():
            load = replica.load
            if load >= least or not replica.available or replica.name == avoid:
                continue
            if info.answers(request.kind, request.endpoint):
                best, least = replica, load
                if not load:
                    break
        return best

    def _open(self, request: Request, avoid: str = "") -> Call:
        if self.draining_reason is not None:
            raise ShuttingDown(self.draining_reason)
        self.check(request.model, request.kind, request.endpoint)
        served = self._models[request.model]
        backend = self._least_busy(served, request, avoid)
        if backend is None:
            raise Overloaded(
                f"Every node that serves '{request.model}' is busy or about to stop; try again shortly",
                retry_after=2.0,
            )
        call = backend.open(request)
        # Among equals, take turns: the one just used goes to the end.
        served.replicas[backend] = served.replicas.pop(backend)
        self.stats.admitted += 1
        self.live[call] = backend
        call.on_release(lambda: self._released(call))
        return call

    def _released(self, call: Call) -> None:
        del self.live[call]
        self.stats.record(call)
        if call.cancelled is not None:
            self.cancel_durations.add(time.monotonic() - call.cancelled_at)
        if not self.live and self._idle:
            self._idle.unpark_all()
