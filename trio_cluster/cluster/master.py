"""The master's side: admits workers, registers their models, watches their health, and removes them when they are lost.

A worker is known by its name. When a worker connects whose name is already connected there are two cases, told apart by
the ``instance`` that each process draws at its start. If it is the same process, it has lost its link before this
master noticed: the new link replaces the old one, whose calls fail at once. If it is another process, it is refused as
long as the first one gives signs of life, and may try again; otherwise two machines with one name would replace each
other forever.

A link that is cut is *suspended*: its worker gets no new calls, and those that it has wait for another connection of
the same process, for ``resume_window``. The task that has served the connection then waits for that; the task of the
connection that comes carries the link on. So a :class:`WorkerConnection` may outlive the connection that it began with.

A model that is refused for a reason that can pass is kept, and registered as soon as the reason is gone. What others
serve is looked at when a worker leaves, or takes its model back; the rest (the limit of models, a circle of clusters,
the option ``on_conflict``) with each heartbeat. The worker is then told by ``ModelRegistered``, as it would have been
at first.

The order in which a lost worker is removed matters. First its models are taken out of the catalogue, so that no new
call can be routed to it; then its calls fail, so that those which may be retried on another replica find the catalogue
up to date.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any, Final, NoReturn

import attrs
import trio

from .._version import __version__
from ..core import randomness
from ..core.limits import CLOSE_TIMEOUT
from ..core.model import KINDS
from ..core.request import Request
from ..core.status import MasterStatus, SleepingStatus, WorkerStatus
from ..link.demux import FrameDemux
from ..link.link import First, Link, LinkClosed, receive_first
from ..link.websocket import END_HEADER, PATH, PROBE_PATH, Refusal, accept
from ..net.acceptor import accept_all
from ..net.addressing import PROCESS_HEADER
from ..net.handshakes import Handshakes
from ..net.sockets import Listeners, shown_address
from ..net.streams import ByteStream
from ..net.throttled_log import ThrottledLog
from ..net.watchdog import NotInjectable, injectable
from ..options import ClusterServerOptions
from ..protocol import (
    NAME_MAX,
    Data,
    Done,
    Drain,
    Failed,
    ForwardResponse,
    Handshake,
    Heartbeat,
    MasterEvent,
    MasterSession,
    OtherMasters,
    ProtocolError,
    RegisterModel,
    UnregisterModel,
)
from ..protocol.codec import decode_handshake
from ..routing.catalog import Catalog, ModelLoop, NameTaken
from .admission import Admitted, Doorkeeper
from .remote_worker import MAX_CAPACITY, RemoteWorker
from .sleeping import SleepingWorkers

__all__ = ["HANDSHAKE_TIMEOUT", "MAX_MODELS", "MAX_UNADMITTED", "Place", "WorkerConnection", "WorkerManager"]

logger = logging.getLogger("trio_cluster.workers")

#: Why a connection to :data:`PROBE_PATH` is closed.
_PROBED: Final = "probed"
#: Headers by which a proxy says that the request has passed it.
_PROXY_HEADERS: Final = ("via", "forwarded", "x-forwarded-for", "x-forwarded-proto")
#: A worker from which something came within this many heartbeat intervals is alive, and keeps its name.
_ALIVE_HEARTBEATS: Final = 2.5
#: The fraction of the worker timeout after which a silent worker gets no new calls.
_SUSPECT_AFTER: Final = 0.5
#: Seconds from a connection to the worker's handshake.
HANDSHAKE_TIMEOUT: Final = 10.0
#: Connections of which no worker has joined yet. One more, and the oldest of them is closed: a worker needs a moment.
MAX_UNADMITTED: Final = 256
#: Seconds between two looks at whether links are cut.
_LOOK: Final = 0.02
#: Models of one worker, and as many that are refused and kept.
MAX_MODELS: Final = 1000


@attrs.frozen
class Place:
    """Which of the processes of a master one is."""

    process: int = 0
    """Its number, from 0 on."""
    processes: int = 1
    """How many there are."""


class _TooManyModels(ValueError):
    """A worker serves as many models as it may."""


class WorkerManager:
    """The workers of a master.

    Args:
        catalog: where their models are registered.
        options: read at the time of use.
        node_id: the name of this master.
        doorkeeper: decides which workers are admitted; ``None``: by the token of the options, if there is one.
        place: which of the processes of the master this is; ``None``: it is the only one.
        sleeping: the workers whose machines can be woken; ``None``: those of the options.

    Attributes:
        workers: the connected workers, by name.
    """

    def __init__(
        self,
        catalog: Catalog,
        options: ClusterServerOptions,
        node_id: str,
        doorkeeper: Doorkeeper | None = None,
        place: Place | None = None,
        sleeping: SleepingWorkers | None = None,
    ) -> None:
        self.workers: dict[str, RemoteWorker] = {}
        self._catalog = catalog
        self._options = options
        self._node_id = node_id
        self._doorkeeper = Doorkeeper(options) if doorkeeper is None else doorkeeper
        self._place = Place() if place is None else place
        self._sleeping = SleepingWorkers(catalog, options) if sleeping is None else sleeping
        # A dict and not a set, for its order: what is done to all connections is done in the order of their age.
        self._connections: dict[WorkerConnection, None] = {}
        self._all_closed = trio.lowlevel.ParkingLot()
        self._refusals = ThrottledLog(logger, "connections were refused")
        self._refused_models = ThrottledLog(logger, "models were refused")
        self._handshakes = Handshakes(logger)
        # Tells this process from others: a worker finds out by it that two addresses lead to one master. With its name,
        # since masters of one seeded simulation may draw the same number.
        self._instance = f"{randomness.token(8)}-{node_id}"[:NAME_MAX]

    @property
    def sessions(self) -> list[MasterSession]:
        """The sessions of all connections, oldest first, including those that have no worker yet, or no more."""
        return [connection.session for connection in self._connections]

    async def serve(
        self,
        listeners: Listeners,
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> NoReturn:
        """Accept workers until cancelled, which ends all links.

        Args:
            listeners: listening; closed when this is cancelled.
            task_status: started as soon as connections are accepted.
        """
        async with trio.open_nursery() as nursery:

            def admit(stream: ByteStream) -> None:
                nursery.start_soon(self.serve_stream, stream)

            for listener in listeners:
                nursery.start_soon(accept_all, listener, admit)
            nursery.start_soon(self._refusals.run)
            nursery.start_soon(self._refused_models.run)
            nursery.start_soon(self._handshakes.run)
            if self._sleeping:
                await nursery.start(self._sleeping.run)
            task_status.started()
        raise AssertionError("unreachable: the listeners are served until this is cancelled")

    async def serve_stream(self, stream: ByteStream) -> None:
        """Serve one connection until its link is over, and close it. A checkpoint.

        Nothing is raised but cancellation, whatever the peer sends.
        """
        if stream.needs_handshake and not await self._handshakes.perform(stream):
            return
        try:
            connection = WorkerConnection(
                stream,
                self._catalog,
                self._options,
                self._node_id,
                instance=self._instance,
                doorkeeper=self._doorkeeper,
                workers=self.workers,
                connections=self._connections.keys(),
                sleeping=self._sleeping,
                refusals=self._refusals,
                refused_models=self._refused_models,
                place=self._place,
            )
        except NotInjectable as error:
            logger.error("connection refused: %s", error)
            return
        except Exception:
            logger.exception("a worker's connection failed")
            stream.close()
            return
        self._make_room()
        self._connections[connection] = None
        try:
            await connection.run()
        except Exception:
            # A bug in this package, which must not cost the other workers their master.
            logger.exception("a worker's connection failed")
        finally:
            # This one, or one that was served in its place. One whose link goes on elsewhere, or is waited for, stays.
            for each in [each for each in self._connections if each.over]:
                del self._connections[each]
            if not self._connections:
                self._all_closed.unpark_all()

    def _make_room(self) -> None:
        """Close the oldest of the connections of which no worker has joined, if there are too many."""
        unadmitted = [connection for connection in self._connections if not connection.joined]
        for connection in unadmitted[: max(0, len(unadmitted) - MAX_UNADMITTED + 1)]:
            connection.refuse(f"more than {MAX_UNADMITTED} connections without a worker")

    def drain(self, reason: str) -> None:
        """Tell all workers that this master is about to stop. Synchronous."""
        for connection in self._connections:
            connection.drain(reason)

    def announce_successor(self, *, coming: bool) -> None:
        """Tell all workers whether another process is about to take the place of this master. Synchronous.

        A link that is cut while that is so is over at once, as one that is cut already: its worker would reach the
        other process, which does not know the session.
        """
        for connection in list(self._connections):
            if coming and connection.session.suspended:
                connection.link.end(
                    "the connection was cut, and another process takes the place of this master"
                )
                continue
            connection.session.announce_successor(coming=coming)
            connection.link.wake()

    async def wait_uncut(self, seconds: float) -> None:
        """Wait until no link is cut: each is resumed, or over. For so many seconds at most. A checkpoint."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(seconds):
            # Only a master that is taken over waits.
            while any(connection.session.suspended for connection in self._connections):  # noqa: ASYNC110
                await trio.sleep(_LOOK)

    def models(self) -> dict[str, list[str]]:
        """Return the names of the connected workers, with the names of their models. Those that drain are left out."""
        return {
            name: list(worker.models) for name, worker in self.workers.items() if not worker.health.draining
        }

    def drain_worker(self, name: str, reason: str) -> WorkerStatus | None:
        """Ask one worker to finish its calls and to stop. It gets no new ones from this moment on. Synchronous.

        Returns:
            The worker's status, or ``None`` if no worker of this name is connected.
        """
        worker = self.workers.get(name)
        if worker is None:
            return None
        worker.request_shutdown(reason)
        fields = {"worker": name, "in_flight": worker.in_flight}
        logger.info("worker is asked to stop: %s", reason, extra={"fields": fields})
        return worker.status()

    def drop_worker(self, name: str, reason: str) -> bool:
        """End the link of a worker at once; its calls fail. Synchronous.

        A connection that was admitted with the certificate of this worker ends, too, although it has not joined yet:
        its certificate is not looked at again.

        Returns:
            Whether a worker of this name was connected.
        """
        found = False
        for connection in list(self._connections):
            if connection.is_of(name):
                connection.link.end(reason)
                found = True
        return found

    async def close_all(self, reason: str) -> None:
        """Close all links as soon as what is queued has been sent, and wait for that. A checkpoint.

        Returns after ``CLOSE_TIMEOUT`` in any case.
        """
        for connection in list(self._connections):
            connection.close_when_flushed(reason)
        with trio.move_on_after(CLOSE_TIMEOUT):
            while self._connections:
                await self._all_closed.park()

    def other_masters(self) -> list[MasterStatus]:
        """Return the other masters that the workers are linked to, sorted by name."""
        linked: dict[tuple[str, str], list[str]] = {}
        for name, worker in sorted(self.workers.items()):
            for master in worker.other_masters:
                linked.setdefault(master, []).append(name)
        return [MasterStatus(id, address, workers) for (id, address), workers in sorted(linked.items())]

    def sleeping(self) -> list[SleepingStatus]:
        """Return the workers that are away, and whose machines can be woken, sorted by name."""
        return sorted(
            (each.status() for each in self._sleeping if each.connected_at is None and each.models),
            key=lambda status: status.id,
        )

    def status(self) -> list[WorkerStatus]:
        """Return the status of each connected worker, sorted by name."""
        return [worker.status() for _, worker in sorted(self.workers.items())]


class WorkerConnection:
    """One connection to the port for workers, from its opening handshake to its end.

    Args:
        stream: the connection; closed by :meth:`run`.
        catalog: where the worker's models are registered.
        options: read at the time of use.
        node_id, instance: the names of this master and of its process.
        doorkeeper: decides whether the worker may join.
        workers: the connected workers, by name. This connection adds its own, and removes it.
        connections: all connections of this master, this one included.
        sleeping: is told which workers are there.
        refusals, refused_models: where to log that this connection, or a model of its worker, is refused.
        place: which of the processes of the master this is.

    Attributes:
        session: the master's half of the protocol.
        link: what carries it.
        admitted: how the connection was let in.
        address: where the peer connected from, for people.
        worker: the worker at the other end; ``None`` before it has joined, and after its link has ended.
        joined: whether a worker has joined, be it that it has left again.
        over: whether the link is over, and will not be resumed.
    """

    def __init__(
        self,
        stream: ByteStream,
        catalog: Catalog,
        options: ClusterServerOptions,
        node_id: str,
        *,
        instance: str,
        doorkeeper: Doorkeeper,
        workers: dict[str, RemoteWorker],
        connections: Collection[WorkerConnection],
        sleeping: SleepingWorkers,
        refusals: ThrottledLog,
        refused_models: ThrottledLog,
        place: Place,
    ) -> None:
        self.address = _peer(stream)
        self.worker: RemoteWorker | None = None
        self._catalog = catalog
        self._options = options
        self._workers = workers
        self._connections = connections
        self._sleeping = sleeping
        self._doorkeeper = doorkeeper
        self.admitted = Admitted("open")
        self._tls = stream.tls
        self._stream = injectable(stream)
        self._refusals = refusals
        self._refused_models = refused_models
        self._place = place
        # Nobody is to join on this connection; its peer wants to know who is here.
        self._probed = False
        self._instance = instance
        self.over = False
        self._draining = False
        # Entered until it is known whether this connection goes on with another session.
        self._choosing = trio.CancelScope()
        # Set when the link was resumed, or is over; replaced whenever it is waited for.
        self._changed = trio.Event()
        self._capacity_clipped = False
        self.joined = False
        self._joining = trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_TIMEOUT)
        self._why_refused = f"no handshake of a worker within {HANDSHAKE_TIMEOUT:g} s"
        # The models that were refused for a reason that can pass, with the reason that the worker knows.
        self._refused: dict[str, tuple[RegisterModel, str]] = {}
        self.session = MasterSession(
            node_id,
            __version__,
            trio.current_time(),
            instance=instance,
            heartbeat_interval=options.heartbeat_interval,
            silence_timeout=options.worker_timeout,
            admit=lambda handshake: not self._probed and self._holder_of_name(handshake) is None,
            resume_window=options.resume_window,
            session_id=randomness.secret(16) if options.resume_window else "",
            proxied=options.through_proxy,
            process=place.process,
            processes=place.processes,
        )
        self.link = Link(
            self._stream,
            self.session,
            on_events=self._on_events,
            on_sent=self._on_sent,
            on_closed=self._on_link_closed,
            before_tick=self._on_tick,
            timeout=options.worker_timeout,
            linger=options.batch_wait,
        )
        self.link.proxied = options.through_proxy

    async def run(self) -> None:
        """Serve the connection until its link is over, or goes on elsewhere. A checkpoint.

        When cancelled, the worker is removed at once.
        """
        served, goes_on = self, False

        async def choose(demux: FrameDemux) -> tuple[Link, First]:
            nonlocal served
            if self._probed:
                return self.link, None
            first: First = None
            with self._choosing:
                first = await receive_first(demux)
                resumed = await self._resume_another(first)
                if resumed is not None:
                    served = resumed
                    return resumed.link, None
            return self.link, first

        try:
            with self._joining:
                await self.link.run(accept(self._stream, self._admit), choose=choose)
            self._on_link_closed(LinkClosed(self._why_refused))
        except LinkClosed as closed:
            if served is self and not self.session.suspended and not closed.superseded:
                # Does something only if the link was never opened; otherwise the link has already called it.
                self._on_link_closed(closed)
            goes_on = closed.superseded or await served.wait_resumed()
        finally:
            if not goes_on:
                # Does something only if this was cancelled: the master is being stopped.
                served.remove("the master was stopped")

    async def wait_resumed(self) -> bool:
        """Wait until a link that is suspended is resumed, or over. A checkpoint if it is suspended.

        Returns:
            Whether it was resumed; another task serves it then.
        """
        if not self.session.suspended:
            return False
        changed = self._changed = trio.Event()
        with trio.move_on_at(self.session.deadline()):
            await changed.wait()
        if self.session.suspended:
            self.link.end(f"the connection was cut, and not resumed within {self._options.resume_window:g} s")
        return not self.over

    def remove(self, why: str) -> None:
        """Remove the worker, if there is one: nothing serves its link any more. Synchronous, idempotent."""
        self.over = True
        self.session.close(why)
        self._deregister(why)

    def close_when_flushed(self, reason: str) -> None:
        """End the link as soon as what is queued has been sent; at once if it is suspended. Synchronous."""
        if self.session.suspended:
            self.link.end(reason)
        else:
            self.link.close_when_flushed(reason)
            self._choosing.cancel(reason=reason)

    def drain(self, reason: str) -> None:
        """Tell the worker that the master is about to stop. Synchronous."""
        self._draining = True
        self.session.drain(reason)
        self.link.wake()

    async def _resume_another(self, first: First) -> WorkerConnection | None:
        """Return the connection whose session is named by the first message of this one, ready to go on here.

        If there is none, and none was asked for, the result is ``None``, and this connection is one of its own. If one
        was asked for in vain, this one is closed with the reason.
        """
        if not isinstance(first, bytes) or self.session.close_reason is not None:
            return None
        try:
            handshake, more = decode_handshake(first)
        except ProtocolError:
            # Found again, and reported, by the session.
            return None
        if not handshake.session:
            return None
        for other in self._connections:
            if not more and other.can_be_resumed_by(handshake, self.admitted):
                # Not to be cancelled in between: nothing would serve the other link, nor wait for it.
                with trio.CancelScope(shield=True):
                    await other.link.detach()
                # It may have ended meanwhile.
                if other.can_be_resumed_by(handshake, self.admitted) and other.session.suspended:
                    self.joined = self.over = True
                    self._joining.deadline = math.inf
                    self.session.close("the connection goes on with another session")
                    proxied = self.link.proxied or handshake.proxied
                    other.resume(handshake, self.address, proxied=proxied)
                    return other
                break
        self.link.end("this master does not know the session that is to be resumed")
        return None

    def can_be_resumed_by(self, handshake: Handshake, admitted: Admitted) -> bool:
        """Tell whether a worker that was ``admitted`` on another connection may go on with this session."""
        return (
            self.worker is not None
            and self.session.is_named_by(handshake)
            # To know the session is not enough: the connection must have been let in as the first one was.
            and self.admitted == admitted
            and self._doorkeeper.why_not(admitted, handshake.node_id) is None
        )

    def resume(self, handshake: Handshake, address: str, *, proxied: bool) -> None:
        """Go on with the session, which is suspended, on a connection from ``address``. Synchronous."""
        worker = self.worker
        assert worker is not None
        self.address, self.link.proxied = address, proxied
        self.session.resume(handshake, trio.current_time(), proxied=proxied)
        worker.resumed(address)
        self._update_health()
        self._log("link resumed", worker, address=address, in_flight=worker.in_flight)
        self._changed.set()

    def refuse(self, why: str) -> None:
        """Close the connection at once, before a worker has joined. Synchronous."""
        self._why_refused = why
        self._joining.cancel(reason=why)

    def _admit(self, path: str, headers: dict[str, str]) -> Refusal | None:
        # Every browser sends it, for every page, and no worker does. Otherwise any page that an operator looks at could
        # join as a worker, and be sent the requests of others.
        if "origin" in headers:
            return Refusal(403, "no web page may connect here")
        if path == PROBE_PATH:
            self._probed = True
            self.link.close_when_flushed(_PROBED)
            return None
        if path != PATH:
            return Refusal(404, f"workers connect to {PATH}")
        if headers.get(PROCESS_HEADER, str(self._place.process)) != str(self._place.process):
            # The processes are others than the worker knows, or something on the way hides which one was meant. Not
            # final for the worker, which tries again.
            return Refusal(503, f"this is process {self._place.process} of {self._place.processes}")
        if any(name in headers for name in _PROXY_HEADERS):
            self.link.proxied = True
            self.session.announce_proxy()
        decision = self._doorkeeper.admit(headers, self._tls)
        if isinstance(decision, Refusal):
            return decision
        self.admitted = decision
        if END_HEADER in headers:
            return self._take_note_of_end(headers[END_HEADER])
        return None

    def _take_note_of_end(self, proof: str) -> Refusal:
        """End the session for which a guardian has the proof that its process has ended."""
        # Not to be logged as a refusal: most workers that die leave an end behind, which is here first.
        self._probed = True
        for other in self._connections:
            if other.admitted == self.admitted and other.session.is_proven_over(proof):
                other.link.peer_has_ended("its process has ended, as its guardian says")
                return Refusal(410, "the end of the worker's process is noted")
        return Refusal(409, "this master has no such session")

    def _on_events(self, events: Sequence[MasterEvent]) -> None:
        for event in events:
            try:
                if not isinstance(event, Data):
                    self._on_event(event)
                elif self.worker is not None:
                    self.worker.on_data(event)
            except Exception:
                worker = self.worker
                if worker is None or not isinstance(event, Data | ForwardResponse | Done | Failed):
                    raise
                fields = {"worker": worker.name, "call": event.call}
                logger.exception("a call failed unexpectedly", extra={"fields": fields})
                worker.fail_after_error(event.call)
        if self.session.peer_blocked or (self.worker is not None and self.worker.health.stalled):
            self._update_health()

    def _on_sent(self, counts: Sequence[tuple[int, int]]) -> None:
        if self.worker is not None:
            self.worker.on_sent(counts)

    def _on_tick(self) -> None:
        self._update_health()
        # What no event tells may have changed: the option `on_conflict`, the number of the worker's models.
        for message, _ in list(self._refused.values()):
            if self.worker is not None:
                self._register(self.worker, message, again=True)

    def _update_health(self) -> None:
        """Mark the worker as stalled if it reports that it is blocked or has been silent for long; or as well again."""
        worker = self.worker
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
        worker = self.worker
        if isinstance(event, Handshake):
            if not self._probed:
                self._on_handshake(event)
            return
        if worker is None:
            # A probe, or a worker that _on_handshake has refused: what else it has already sent is ignored.
            return
        match event:
            case Heartbeat():
                worker.on_heartbeat(event)
                if event.capacity > MAX_CAPACITY and not self._capacity_clipped:
                    self._capacity_clipped = True
                    text = f"a capacity of {event.capacity} counts as {MAX_CAPACITY}"
                    self._log(text, worker, level=logging.WARNING)
            case OtherMasters():
                worker.on_other_masters(event)
            case RegisterModel():
                self._register(worker, event)
            case UnregisterModel():
                self._forget_refused(worker, event.name)
                if worker.models.pop(event.name, None) is not None:
                    self._sleeping.unregistered(worker.name, event.name)
                    self._catalog.remove(event.name, worker)
                    self._log("model left", worker, model=event.name)
            case Drain():
                worker.health.drain()
                for name in list(self._refused):
                    self._forget_refused(worker, name)
                self._log(f"worker drains: {event.reason}", worker)
            case ForwardResponse() | Done() | Failed():
                worker.on_event(event)

    def is_of(self, name: str) -> bool:
        """Tell whether a worker of this name is at the other end, or one that may only join with this name."""
        if self.worker is None:
            return not self.joined and self.admitted.name == name
        return self.worker.name == name

    def _holder_of_name(self, handshake: Handshake) -> WorkerConnection | None:
        """Return the connection of another process that is alive and has the name of this worker, if there is one."""
        for other in self._connections:
            if other.worker is None or other.worker.name != handshake.node_id:
                continue
            silence = other.session.silence(trio.current_time())
            alive = (
                silence < _ALIVE_HEARTBEATS * self._options.heartbeat_interval and not other.session.suspended
            )
            if alive and other.worker.instance != handshake.instance:
                return other
        return None

    def _on_handshake(self, handshake: Handshake) -> None:
        """Let the worker join, in the place of an older connection of its own process, or refuse it."""
        name = handshake.node_id
        if self._instance in handshake.linked:
            # It has a link to this master, by another address, which this one must not replace.
            self._probed = True
            self.link.close_when_flushed("this worker is linked already")
            return
        if why := self._doorkeeper.why_not(self.admitted, name):
            self.link.end(why)
            return
        holder = self._holder_of_name(handshake)
        if holder is not None:
            self.link.end(f"another worker named '{name}' is connected, from {holder.address}")
            return
        for other in list(self._connections):
            if other.worker is not None and other.worker.name == name:
                other.link.end("replaced by a new connection of the same worker")
        self.joined = True
        self._joining.deadline = math.inf
        self.link.proxied = self.link.proxied or handshake.proxied
        self.worker = RemoteWorker(name, self.session, self.link.wake, self.address, self.admitted.how)
        self._workers[name] = self.worker
        self._sleeping.joined(name)
        self._log("worker joined", self.worker, address=self.address, version=handshake.version)

    def _register(self, worker: RemoteWorker, message: RegisterModel, *, again: bool = False) -> None:
        """Register a model and confirm it, or refuse it. One that might be registered later is kept, and tried again.

        Args:
            worker: the one at the other end.
            message: what it sent.
            again: this is not the first try: the worker is told only what is new.
        """
        try:
            info = message.info()
            if info.kind not in KINDS:
                raise ValueError(f"this master knows no models of kind '{info.kind}'")
            if info.name not in worker.models and len(worker.models) >= MAX_MODELS:
                raise _TooManyModels(f"a worker may serve {MAX_MODELS} models at most")
            if info.name in worker.models:
                self._catalog.update(info, worker)
            else:
                self._catalog.add(info, worker, replicate=self._options.on_conflict == "replicate")
        except ValueError as refusal:
            known = self._refused.get(message.name)
            reason = str(refusal)
            if self._may_pass(refusal, message.name) and not worker.health.draining:
                self._refused[message.name] = (message, reason)
                self._catalog.retry_when_changed(message.name, worker, lambda: self._retry(worker, message))
            else:
                self._forget_refused(worker, message.name)
            if known != (message, reason) or not again:
                self.session.model_rejected(message.name, reason)
                fields = {"worker": worker.name, "model": message.name}
                self._refused_models.warning(f"model refused: {reason}", fields)
            return
        self._forget_refused(worker, message.name)
        worker.models[info.name] = info
        self._sleeping.registered(worker.name, info)
        self.session.model_registered(info.name)
        self._log("model registered", worker, model=info.name, kind=info.kind)

    def _may_pass(self, refusal: ValueError, name: str) -> bool:
        """Tell whether a model is to be tried again that was refused. Peers choose the names, so they are bounded."""
        if not isinstance(refusal, NameTaken | ModelLoop | _TooManyModels):
            return False
        return name in self._refused or len(self._refused) < MAX_MODELS

    def _retry(self, worker: RemoteWorker, message: RegisterModel) -> None:
        self._register(worker, message, again=True)
        self.link.wake()

    def _forget_refused(self, worker: RemoteWorker, name: str) -> None:
        self._catalog.retry_no_more(name, worker)
        self._refused.pop(name, None)

    def _on_link_closed(self, closed: LinkClosed) -> None:
        self._choosing.cancel(reason=closed.why)
        if self.session.suspended:
            self._on_cut(closed)
        elif not self.over:
            self.over = True
            self._log_end(closed)
            self._deregister(closed.why)
            self._changed.set()

    def _on_cut(self, closed: LinkClosed) -> None:
        """Open elsewhere what can be, and wait with the rest."""
        worker = self.worker
        assert worker is not None

        in_flight = worker.in_flight
        moved = worker.suspend(lambda request: self._can_be_elsewhere(request, worker))
        text = f"link cut: {closed.why}; waiting for it"
        self._log(text, worker, level=logging.WARNING, in_flight=in_flight, opened_elsewhere=moved)

    def _can_be_elsewhere(self, request: Request, worker: RemoteWorker) -> bool:
        """Return whether another replica can be given a request that a worker has."""
        return not self._draining and bool(self._catalog.candidates(request, avoid=worker.name))

    def _deregister(self, why: str) -> None:
        """Remove the worker, its models first, and fail its calls. Idempotent."""
        worker, self.worker = self.worker, None
        if worker is None:
            return
        for name in list(self._refused):
            self._forget_refused(worker, name)
        for name in worker.models:
            self._catalog.remove(name, worker)
        if self._workers.get(worker.name) is worker:
            del self._workers[worker.name]
            self._sleeping.left(worker.name)
        worker.connection_lost(why)

    def _log_end(self, closed: LinkClosed) -> None:
        worker = self.worker
        if worker is not None:
            expected = worker.health.draining and not worker.in_flight
            lost = {"request_ids": worker.request_ids} if worker.in_flight else {}
            level = logging.INFO if expected else logging.WARNING
            text = f"worker left: {closed.why}"
            count, retried = worker.split_calls(lambda request: self._can_be_elsewhere(request, worker))
            self._log(text, worker, level=level, calls_lost=count, calls_retried=retried, **lost)
        elif not self._probed:
            self._refusals.warning(f"connection refused: {closed.why}", {"address": self.address})

    @staticmethod
    def _log(text: str, worker: RemoteWorker, *, level: int = logging.INFO, **fields: Any) -> None:
        logger.log(level, text, extra={"fields": {"worker": worker.name, **fields}})


def _peer(stream: ByteStream) -> str:
    """Return the address of the other end of a connection, for people."""
    try:
        return shown_address(*stream.peer_address)
    except OSError:
        return "unknown"
