"""Where workers come in: admits them, registers their models, watches them, and takes them off the books.

A worker is known by its name. When one comes whose name is connected already there are two cases, told apart by the
``instance`` each process draws at its start. The same process has lost its link before we noticed: the new link
replaces the old one, whose calls fail at once. Another process uses the name: as long as the first one gives signs
of life the newcomer is refused, and may try again; otherwise two machines with one name would throw each other out
for ever.

The order in which a lost worker is taken off matters. First its models go, so that no new call can be routed to it;
then its calls fail, so that those which may be opened again elsewhere find the router already right.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from typing import Any, NoReturn

import trio

from .._version import __version__
from ..core.limits import CLOSE_TIMEOUT
from ..core.model import KINDS
from ..core.status import WorkerStatus
from ..link.link import Link, LinkClosed
from ..link.websocket import PATH, PROBE_PATH, Refusal, accept
from ..net.sockets import Listeners, shown_address
from ..net.streams import ByteStream
from ..net.watchdog import NotInjectable, injectable
from ..options import ClusterServerOptions
from ..protocol import (
    Data,
    Done,
    Drain,
    Failed,
    ForwardResponse,
    Handshake,
    Heartbeat,
    MasterEvent,
    MasterSession,
    RegisterModel,
    UnregisterModel,
)
from ..routing.router import Router
from .remote_worker import RemoteWorker

__all__ = ["WorkerManager"]

logger = logging.getLogger("trio_cluster.workers")

#: The end of a connection that only asked whether this is a master.
_PROBED = "probed"
#: A worker that was heard from within this many heartbeats is alive, and keeps its name.
_ALIVE_HEARTBEATS = 2.5
#: The part of the timeout after which a worker that is silent gets nothing new to do.
_SUSPECT_AFTER = 0.5


class WorkerManager:
    """The workers of a master.

    Args:
        router: where their models are made known.
        options: read at the time of use.
        node_id: this master's name.

    Attributes:
        workers: those that are connected, by name.
    """

    def __init__(self, router: Router, options: ClusterServerOptions, node_id: str) -> None:
        self.workers: dict[str, RemoteWorker] = {}
        self._router = router
        self._options = options
        self._node_id = node_id
        # A dict and not a set, for the order: what is done to all of them is done in the order in which they came.
        self._connections: dict[WorkerConnection, None] = {}
        self._empty = trio.lowlevel.ParkingLot()

    @property
    def sessions(self) -> list[MasterSession]:
        """The conversations on all connections, oldest first, including those that are not (or no more) a worker's."""
        return [connection.session for connection in self._connections]

    async def serve(
        self,
        listeners: Listeners,
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> NoReturn:
        """Let workers in from ``listeners`` until cancelled, which ends all links."""
        await trio.serve_listeners(self.serve_stream, list(listeners), task_status=task_status)

    async def serve_stream(self, stream: ByteStream) -> None:
        """Talk with one worker until the link is over. Whatever it sends, nothing but cancellation comes out."""
        try:
            connection = WorkerConnection(self, stream)
        except NotInjectable as error:
            logger.error("connection refused: %s", error)
            return
        self._connections[connection] = None
        try:
            await connection.run()
        except Exception:
            # A bug of ours, and still no reason for the other workers to lose their master.
            logger.exception("a worker's connection failed")
        finally:
            self._connections.pop(connection, None)
            if not self._connections:
                self._empty.unpark_all()

    def drain(self, reason: str) -> None:
        """Tell all workers that this master is about to stop."""
        for connection in self._connections:
            connection.session.drain(reason)
            connection.link.wake()

    def drain_worker(self, name: str, reason: str) -> WorkerStatus | None:
        """Ask one worker to finish its calls and to stop; it gets no more of them.

        Returns:
            Its state, or ``None`` if there is no worker of this name.
        """
        worker = self.workers.get(name)
        if worker is None:
            return None
        worker.request_shutdown(reason)
        fields = {"worker": name, "in_flight": worker.in_flight}
        logger.info("worker is asked to stop: %s", reason, extra={"fields": fields})
        return self._status_of(worker)

    async def close_all(self, reason: str) -> None:
        """Say goodbye to all workers, and wait until they are gone or have had a moment for that."""
        for connection in self._connections:
            connection.link.close_when_flushed(reason)
        with trio.move_on_after(CLOSE_TIMEOUT):
            while self._connections:
                await self._empty.park()

    def status(self) -> list[WorkerStatus]:
        """Return the state of each worker as it is now, sorted by name."""
        return [self._status_of(worker) for _, worker in sorted(self.workers.items())]

    def _status_of(self, worker: RemoteWorker) -> WorkerStatus:
        return WorkerStatus(
            id=worker.name,
            instance=worker.instance,
            address=worker.address,
            state=worker.state,
            draining=worker.health.draining,
            stalled=worker.health.stalled,
            models=sorted(worker.models),
            running=worker.running,
            waiting=worker.waiting,
            capacity=worker.capacity,
            in_flight=worker.in_flight,
            lag=round(worker.lag, 3),
            connected_for=round(trio.current_time() - worker.connected_at, 3),
        )


class WorkerConnection:
    """One connection to the workers' port, from its handshake to its end."""

    def __init__(self, manager: WorkerManager, stream: ByteStream) -> None:
        self._manager = manager
        self._router = manager._router
        self._options = manager._options
        self._address = _peer(stream)
        self._stream = injectable(stream)
        self._worker: RemoteWorker | None = None
        self._instance = ""
        self._probed = False
        self._over = False
        self.session = MasterSession(
            manager._node_id,
            __version__,
            trio.current_time(),
            heartbeat_interval=self._options.heartbeat_interval,
            silence_timeout=self._options.worker_timeout,
        )
        self.link = Link(
            self._stream,
            self.session,
            on_events=self._on_events,
            on_sent=self._on_sent,
            on_closed=self._on_link_closed,
            before_tick=self._update_health,
            timeout=self._options.worker_timeout,
            linger=self._options.batch_wait,
        )

    async def run(self) -> None:
        try:
            await self.link.run(accept(self._stream, self._admit))
        except LinkClosed as closed:
            # Only if it was never opened; otherwise that has been done.
            self._on_link_closed(closed)
        finally:
            # Cancelled: this master is being stopped.
            self._deregister("the master was stopped")

    def _admit(self, path: str, headers: dict[str, str]) -> Refusal | None:
        if path == PROBE_PATH:
            self._probed = True
            self.link.close_when_flushed(_PROBED)
            return None
        if path != PATH:
            return Refusal(404, f"workers connect to {PATH}")
        token = self._options.cluster_token
        if token is not None:
            shown = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(shown, b"Bearer " + token.encode("ascii")):
                return Refusal(401, "wrong or missing cluster token")
        return None

    def _on_events(self, events: Sequence[MasterEvent]) -> None:
        for event in events:
            if not isinstance(event, Data):
                self._on_event(event)
            elif self._worker is not None:
                self._worker.on_data(event)
        if self.session.peer_blocked or (self._worker is not None and self._worker.health.stalled):
            self._update_health()

    def _on_sent(self, counts: Sequence[tuple[int, int]]) -> None:
        if self._worker is not None:
            self._worker.on_sent(counts)

    def _update_health(self) -> None:
        """Find out whether the worker can do anything."""
        worker = self._worker
        if worker is None:
            return
        stalled, silence = self.session.peer_blocked, self.session.silence(trio.current_time())
        if silence > _SUSPECT_AFTER * self._options.worker_timeout:
            stalled = f"silent for {silence:.1f} s"
        was = worker.health.stalled
        worker.health.stall(stalled)
        if stalled and not was:
            self._log(f"worker stalled: {stalled}", worker, level=logging.WARNING, in_flight=worker.in_flight)
        elif was and not stalled:
            self._log("worker runs again", worker)

    def _on_event(self, event: MasterEvent) -> None:
        worker = self._worker
        if isinstance(event, Handshake):
            if not self._probed:
                self._on_handshake(event)
            return
        if worker is None:
            # Only probed, or refused in _join; what else the newcomer has already sent is not for us.
            return
        match event:
            case Heartbeat():
                worker.on_heartbeat(event)
            case RegisterModel():
                self._register(worker, event)
            case UnregisterModel():
                if worker.models.pop(event.name, None) is not None:
                    self._router.catalog.remove(event.name, worker)
                    self._log("model left", worker, model=event.name)
            case Drain():
                worker.health.drain()
                self._log(f"worker drains: {event.reason}", worker)
            case ForwardResponse() | Done() | Failed():
                worker.on_event(event)

    def _on_handshake(self, handshake: Handshake) -> None:
        name = handshake.node_id
        for other in self._manager._connections:
            if other is self or other._worker is None or other._worker.name != name:
                continue
            silence = other.session.silence(trio.current_time())
            if (
                other._instance != handshake.instance
                and silence < _ALIVE_HEARTBEATS * self._options.heartbeat_interval
            ):
                self.link.end(f"another worker named '{name}' is connected, from {other._address}")
                return
            why = "replaced by a new connection of the same worker"
            self._log_left(why, other._worker)
            other.link.end(why)
            other._deregister(why)
        self._instance = handshake.instance
        self._worker = RemoteWorker(name, self.session, self.link.wake, self._address)
        self._manager.workers[name] = self._worker
        self._log("worker joined", self._worker, address=self._address, version=handshake.version)

    def _register(self, worker: RemoteWorker, message: RegisterModel) -> None:
        try:
            info = message.info()
            if info.kind not in KINDS:
                raise ValueError(f"this master knows no models of kind '{info.kind}'")
            if info.name in worker.models:
                self._router.catalog.update(info, worker)
            else:
                self._router.catalog.add(info, worker, replicate=self._options.on_conflict == "replicate")
        except ValueError as refusal:
            self.session.model_rejected(message.name, str(refusal))
            self._log(f"model refused: {refusal}", worker, level=logging.WARNING, model=message.name)
            return
        worker.models[info.name] = info
        self.session.model_registered(info.name)
        self._log("model registered", worker, model=info.name, kind=info.kind)

    def _on_link_closed(self, closed: LinkClosed) -> None:
        if not self._over:
            self._over = True
            self._log_end(closed)
            self._deregister(closed.why)

    def _deregister(self, why: str) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        for name in worker.models:
            self._router.catalog.remove(name, worker)
        if self._manager.workers.get(worker.name) is worker:
            del self._manager.workers[worker.name]
        worker.connection_lost(why)

    def _log_end(self, closed: LinkClosed) -> None:
        if self._worker is not None:
            in_order = self._worker.health.draining and not self._worker.in_flight
            self._log_left(closed.why, self._worker, logging.INFO if in_order else logging.WARNING)
        elif not (self._probed or self._instance):
            fields = {"address": self._address}
            logger.warning("connection refused: %s", closed.why, extra={"fields": fields})

    def _log_left(self, why: str, worker: RemoteWorker, level: int = logging.INFO) -> None:
        lost = {"request_ids": worker.request_ids} if worker.in_flight else {}
        self._log(f"worker left: {why}", worker, level=level, calls_lost=worker.in_flight, **lost)

    @staticmethod
    def _log(text: str, worker: RemoteWorker, *, level: int = logging.INFO, **fields: Any) -> None:
        logger.log(level, text, extra={"fields": {"worker": worker.name, **fields}})


def _peer(stream: ByteStream) -> str:
    try:
        return shown_address(*stream.peer_address)
    except OSError:
        return "unknown"
