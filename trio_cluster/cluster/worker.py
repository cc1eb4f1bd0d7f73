"""The worker's side: dials its masters, registers this node's models, serves what is forwarded, and reconnects.

A worker may have several masters. There is a :class:`MasterLink` for each, with a task and a backoff of its own, so
what happens at one master does not concern the others: its loss cancels its own calls and no other. What they share is
the pool, whose slots are the worker's: a call takes one whichever master it comes from, and waits for one if the
masters have forwarded more than there are. So that this is rare, each master is told how many calls the others have
here, within :data:`_REPORT_AFTER` of a change, and not at all if there is none.

Each link to a master is one :class:`MasterConnection`. A link that is cut is suspended: its calls go on, and the
worker dials again at once, to go on with the same session (:class:`_Resumption`). When the link ends for good, every
call that came over it is cancelled at once, since there is no one left to answer; then the worker waits and dials
again. The wait is exponential with full jitter (uniform between zero and a bound that doubles), so that a hundred
workers whose master was restarted do not reconnect as one. Of 500 workers whose master has been away for minutes, fewer
than 60 dial in any tenth of a second, and all are back 5 s after its return
(``tests/cluster/test_returning_workers.py``).

Several addresses may lead to one master, as the two of a machine that has IPv4 and IPv6. A master would take the second
link for the worker's return, and drop the first. So a worker says in its handshake to which masters it has a link, by
the ``instance`` that each process draws; a master that finds itself there answers, and closes the connection. The
address is a spare one then, which is used when the other link is gone.

A master that is about to be replaced by another process at its address says so in its heartbeats. The worker then opens
a link to that process, and keeps the old one beside it until the master closes it. If it is not replaced after all, the
old link is the only one again.

A machine may know better than any timer that a connection is lost: it was suspended, or its addresses have changed
(``net/machine.py``). Each link tries another connection beside its own then, and goes on with it unless its own one
answers a ping before; and a link that waits before it dials again does not wait any longer.

A worker that drains serves its links to the end and does not dial again: it would only register its models once more,
just to have them removed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import attrs
import trio

from .._version import __version__
from ..core import randomness
from ..core.model import ModelInfo
from ..core.status import MasterStatus
from ..errors import HandshakeRefused
from ..link.demux import FrameDemux
from ..link.link import Choose, First, Link, LinkClosed
from ..link.websocket import dial
from ..local.control import open_control
from ..local.pool import HandlerPool
from ..net.machine import Machine
from ..net.sockets import is_refused, why_not_connected
from ..net.tls import TLS_REQUIRED
from ..net.watchdog import InjectableStream, injectable
from ..options import ClusterServerOptions
from ..protocol import (
    OTHERS_MAX,
    Cancel,
    Data as DataMessage,
    Drain,
    ForwardRequest,
    Handshake,
    Heartbeat,
    ModelRegistered,
    ModelRejected,
    SessionState,
    Shutdown,
    WorkerEvent,
    WorkerSession,
)
from ..routing.router import Router
from .dialer import Dialer, SiblingDialer
from .forwarded import ForwardedCalls
from .guardian import Guardian
from .masters import Masters

__all__ = ["MasterConnection", "MasterLink", "WorkerClient"]

logger = logging.getLogger("trio_cluster.client")

#: The first bound of the wait before dialling again, and the last, in seconds. Workers have to be back within 5 s of
#: their master's return: a worker may have dialled just before, and needs a moment for connection and handshake.
_BACKOFF_FIRST: Final = 0.5
_BACKOFF_LAST: Final = 4.5
#: The HTTP statuses with which a master itself rejects the handshake, and not a proxy before it: they are final.
_FINAL: Final = (400, 401, 403, 404, 405, 426)
#: The first bound of the wait before dialling again for a session that is suspended, in seconds. The first two attempts
#: are made at once, if the first one was answered at all.
_RESUME_BACKOFF_FIRST: Final = 0.05
#: The last bound of the wait before dialling again for a session that is suspended, in seconds.
_RESUME_BACKOFF_LAST: Final = 2.0
#: Seconds for which a connection for such a session is waited for before another one is tried, too.
_RESUME_PATIENCE: Final = 4.0
#: Seconds after a change of how many calls the other masters have here until a master is told.
_REPORT_AFTER: Final = 0.25
#: Seconds after which a master that has refused this worker is dialled again, while another one serves it.
_REFUSED_PAUSE: Final = 60.0
#: Seconds between two looks at whether a spare address is needed. It is if the master has no link at two of them.
_SPARE_PAUSE: Final = (1.0, 2.0)
#: Seconds within which workers dial the process that takes the place of their master.
_REPLACED_SPREAD: Final = 0.5
#: Heartbeat intervals without a sign of life, after which a worker tries a second connection: two are missing then.
_SILENT_HEARTBEATS: Final = 2.5


class WorkerClient:
    """A worker's links to its masters.

    Args:
        router: this node's own models, and the calls for them.
        pool: where their handlers run; its load is reported to the masters.
        options: read at the time of use.
        node_id: the name of this worker.
        on_shutdown_request: called with the reason when a master asks this worker to stop. It has to call
            :meth:`drain` and :meth:`close`; this class does nothing about the request.
        machine: tells when connections are doubtful; ``None``: nothing does.

    Attributes:
        guardian: tells the masters when this process dies; ``None``: there is none. To be set before this runs.
    """

    def __init__(
        self,
        router: Router,
        pool: HandlerPool,
        options: ClusterServerOptions,
        node_id: str,
        on_shutdown_request: Callable[[str], None] = lambda _: None,
        machine: Machine | None = None,
    ) -> None:
        self._machine = machine
        self.guardian: Guardian | None = None
        self._router = router
        self._pool = pool
        self._options = options
        self._node_id = node_id
        self._on_shutdown_request = on_shutdown_request
        # Tells this process from another one of the same name; see `master.py`.
        self._instance = randomness.token(8)
        self._links: dict[Dialer, MasterLink] = {}
        # The masters, and for each that is several processes the dialers of the others, by their numbers.
        self._followed: dict[Dialer, dict[int, SiblingDialer]] = {}
        self._nursery: trio.Nursery | None = None
        self._on_registered: Callable[[], None] = lambda: None
        self._draining = trio.Event()
        # Unparked whenever something has been written, and whenever a link is over.
        self._sent = trio.lowlevel.ParkingLot()
        self._closing = False
        # Set when this worker is to end, be it that it is closed or that it cannot go on.
        self._ending = trio.Event()
        self._failure: Exception | None = None
        self._calls_changed = trio.Event()
        # Links that are over, and whose calls have not stopped.
        self._past: list[MasterConnection] = []

    async def run(self, masters: Masters, on_registered: Callable[[], None] = lambda: None) -> None:
        """Serve the masters for as long as this runs, through any number of links. A checkpoint.

        When cancelled, the links are dropped and their calls are cancelled.

        Args:
            masters: which masters there are.
            on_registered: called when all models are registered for the first time, at any of them.

        Returns:
            After :meth:`close`, when everything that was queued has been sent, or at once if there is no link.

        Raises:
            HandshakeRefused: all masters have refused this worker, or are none.
        """
        self._on_registered = on_registered
        reports = self._pool.on_demand.on_changed
        reports.append(self._report_on_demand)
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._guarded, masters.run, self.follow)
                self._nursery.start_soon(self._report_other_masters)
                if self._machine is not None:
                    self._nursery.start_soon(self._guarded, self._machine.watch_addresses, self._on_addresses)
                await self._ending.wait()
                while self._failure is None and self.connections:
                    await self._sent.park()
                self._nursery.cancel_scope.cancel(reason="the worker was closed")
        finally:
            reports.remove(self._report_on_demand)
            self._nursery = None
        if self._failure is not None:
            raise self._failure

    def follow(self, dialers: Iterable[Dialer]) -> None:
        """Have a link to each of these masters, and to no others. Synchronous; to be called while this runs.

        A link to a master that is no longer among them is drained: its calls go on, and it is closed after the last.
        """
        self._followed = {dialer: self._followed.get(dialer, {}) for dialer in dialers}
        self._follow()

    def _follow(self) -> None:
        wanted = dict.fromkeys(
            each for dialer, siblings in self._followed.items() for each in (dialer, *siblings.values())
        )
        for dialer, link in list(self._links.items()):
            link.want(dialer in wanted)
        for dialer in wanted:
            if dialer not in self._links and not self._draining.is_set():
                link = self._links[dialer] = MasterLink(self, dialer)
                self.start(self._run_link, link)

    def on_processes(self, dialer: Dialer, process: int, processes: int) -> None:
        """A master is several processes, or no longer: have a link to each of them. Synchronous.

        Args:
            dialer: the one with which the master was reached.
            process: the number of the process that has answered there.
            processes: how many there are.
        """
        siblings = self._followed.get(dialer)
        if siblings is None or (processes == 1 and not siblings):
            return
        # From now on the same one each time: the others have links of their own.
        dialer.process = process if processes > 1 else None
        wanted = set(range(processes)) - {process}
        for number in siblings.keys() - wanted:
            del siblings[number]
        for number in sorted(wanted - siblings.keys()):
            siblings[number] = SiblingDialer(dialer, number)
        self._follow()

    def _report_on_demand(self) -> None:
        for connection in self.connections:
            connection.report_on_demand()

    def on_tick(self) -> None:
        """A heartbeat is due on one of the links. Synchronous."""
        if self._machine is not None and (seconds := self._machine.suspended_for()):
            self._doubt(f"this machine was suspended for {seconds:.0f} s")

    def _on_addresses(self) -> None:
        self._doubt("the addresses of this machine have changed")

    def _doubt(self, why: str) -> None:
        """Have each link find out at once whether it still works. Synchronous."""
        logger.info("%s; links are tried anew", why)
        for link in self._links.values():
            link.doubt()

    async def _guarded(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run a function; what it raises ends :meth:`run`, without a group around it."""
        try:
            await function(*args)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        self._ending.set()
        self._sent.unpark_all()

    async def _run_link(self, link: MasterLink) -> None:
        await link.run()
        if not link.wanted:
            del self._links[link.dialer]

    @property
    def connected(self) -> bool:
        """Whether there is a link to a master, with all models registered there."""
        return any(link.connected for link in self._links.values())

    @property
    def rejected_models(self) -> dict[str, str]:
        """The models that a master refused, with its reasons."""
        links = self._links.values()
        if len(links) == 1:
            return next(iter(links)).rejected_models
        rejected: dict[str, str] = {}
        for link in links:
            for name, reason in link.rejected_models.items():
                reason = f"{link.dialer.label}: {reason}"
                rejected[name] = f"{rejected[name]}; {reason}" if name in rejected else reason
        return rejected

    @property
    def connections(self) -> list[MasterConnection]:
        """The links that there are now, in the order of the masters."""
        return [connection for link in self._links.values() for connection in link.connections]

    @property
    def sessions(self) -> list[WorkerSession]:
        """The sessions of all links."""
        return [connection.session for connection in self.connections]

    @property
    def session(self) -> WorkerSession | None:
        """The session on the first link; ``None`` while there is no link."""
        return next(iter(self.sessions), None)

    @property
    def instance(self) -> str:
        """Drawn once for this object; tells its process from another one of the same name."""
        return self._instance

    @property
    def in_flight(self) -> int:
        """How many calls came over the links and have not ended, including those whose body is still being received."""
        return sum(link.in_flight for link in self._links.values())

    def status(self) -> list[MasterStatus]:
        """Return what is known of each master now."""
        return [link.status() for link in self._links.values()]

    def announce(self, info: ModelInfo) -> None:
        """Register a new model with the masters. Where there is no link, it is registered after the next handshake."""
        for connection in self.connections:
            connection.announce(info)

    def withdraw(self, name: str) -> None:
        """Unregister a model at the masters. Its running calls go on."""
        for link in self._links.values():
            link.rejected_models.pop(name, None)
        for connection in self.connections:
            connection.withdraw(name)

    def drain(self, reason: str) -> None:
        """Ask the masters for no more calls; running ones go on. :meth:`close` has to follow. Synchronous.

        Calls whose body is still being received are given back: they have not begun, and may run on another replica.
        """
        self._draining.set()
        for link in self._links.values():
            link.interrupt()
        for connection in self.connections:
            connection.drain(reason)

    async def wait_sent(self) -> None:
        """Wait until nothing is queued for a master any more, for instance because of a slow client. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while any(session.unsent for session in self.sessions):
            await self._sent.park()

    def close(self, reason: str) -> None:
        """Make :meth:`run` return as soon as everything that is queued has been sent. Synchronous."""
        self._draining.set()
        self._closing = True
        self._ending.set()
        for link in self._links.values():
            link.interrupt()
        for connection in self.connections:
            connection.link.close_when_flushed(reason)

    # For the links

    def open_connection(self, link: MasterLink, stream: InjectableStream) -> MasterConnection:
        """Return a new connection to a master."""
        return MasterConnection(
            stream,
            self._router,
            self._pool,
            self._options,
            node_id=self._node_id,
            instance=self._instance,
            draining=self._draining.is_set(),
            linked=[
                *(each.instance for each in self._linked() if each is not link),
                *link.replaced_instances,
            ],
            rejected_models=link.rejected_models,
            on_joined=self.on_links_changed,
            on_registered=link.on_registered,
            on_shutdown_request=self._on_shutdown_request,
            on_written=self._sent.unpark_all,
            on_connected=link.on_connected,
            on_tick=self.on_tick,
        )

    def start(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a task that ends with :meth:`run`. Synchronous."""
        if self._nursery is not None:
            self._nursery.start_soon(self._guarded, function, *args)

    @property
    def options(self) -> ClusterServerOptions:
        """As given."""
        return self._options

    @property
    def draining(self) -> trio.Event:
        """Set when this worker is about to stop."""
        return self._draining

    @property
    def closing(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closing

    @property
    def all_refused(self) -> bool:
        """Whether each master has refused this worker when it was last asked."""
        return all(link.refusal is not None for link in self._links.values() if link.wanted)

    def on_registered(self) -> None:
        """All models are registered at one of the masters. Synchronous."""
        on_registered, self._on_registered = self._on_registered, lambda: None
        on_registered()

    def on_links_changed(self, over: MasterConnection | None = None) -> None:
        """A link has been opened, or is over. Synchronous.

        Args:
            over: the one that is over.
        """
        if over is not None and over.unfinished and len(self._links) > 1:
            over.watch_calls(self._on_calls_changed)
            self._past.append(over)
        linked = self._linked()
        # A worker with one master takes no note of what its calls do.
        several = len(linked) > 1
        for link in linked:
            link.watch_calls(self._on_calls_changed if several else None)
        self._calls_changed.set()
        self._sent.unpark_all()

    def holder_of(self, instance: str, *, but: MasterLink) -> MasterLink | None:
        """Return another link to the master with this instance, if there is one."""
        return next(
            (link for link in self._linked() if link is not but and instance and link.instance == instance),
            None,
        )

    async def wait_changed(self) -> None:
        """Wait until something has been written, or a link is over. A checkpoint."""
        await self._sent.park()

    def _linked(self) -> list[MasterLink]:
        """Return the links on which the master has sent its handshake."""
        return [
            link for link in self._links.values() if link.connection is not None and link.connection.joined
        ]

    def _on_calls_changed(self) -> None:
        # The event is replaced again and again, so its method cannot be the callback.
        self._calls_changed.set()

    async def _report_other_masters(self) -> None:
        """Tell each master how many calls the others have here, soon after that has changed."""
        while True:
            await self._calls_changed.wait()
            await trio.sleep(_REPORT_AFTER)
            self._calls_changed = trio.Event()
            linked = self._linked()
            # Handlers of a master that was lost take their slots until they have stopped.
            self._past = [connection for connection in self._past if connection.unfinished]
            calls = sum(connection.unfinished for connection in self._past)
            calls += sum(link.unfinished for link in linked)
            for link in linked:
                others = [(each.master_id, each.dialer.label) for each in linked if each is not link]
                link.report_other_masters(calls - link.unfinished, others)


class MasterLink:
    """The links to one master, one after the other.

    Args:
        client: the worker's client.
        dialer: connects to the master.

    Attributes:
        dialer: as given.
        wanted: whether the master is one of those that the worker is to serve.
        connected: whether there is a link, with all models registered.
        connection: the link; ``None`` while there is none.
        rejected_models: the models that the master refused, with its reasons.
        refusal: why the master refused this worker at the last attempt; ``None`` if it did not.
        why: why there is no link, for people; empty while there is one.
    """

    def __init__(self, client: WorkerClient, dialer: Dialer) -> None:
        self.dialer = dialer
        self.wanted = True
        self.connected = False
        self.connection: MasterConnection | None = None
        self.rejected_models: dict[str, str] = {}
        self.refusal: HandshakeRefused | None = None
        self.why = "not connected yet"
        self._client = client
        # Set to end all waits.
        self._interrupted = trio.Event()
        # The present wait before the next attempt, or the last one.
        self._waiting = trio.CancelScope()
        self._bound = _BACKOFF_FIRST
        # The links to masters that are being replaced.
        self._replaced: list[MasterConnection] = []
        # Of the master at the end of the last link; empty if there was none.
        self._last_instance = ""

    @property
    def instance(self) -> str:
        """Tells the process of the master from all others; empty without a link, and if the master is an older one."""
        return (
            ""
            if self.connection is None or self.connection.master is None
            else self.connection.master.instance
        )

    @property
    def master_id(self) -> str:
        """The name of the master; empty without a link."""
        return (
            ""
            if self.connection is None or self.connection.master is None
            else self.connection.master.node_id
        )

    @property
    def connections(self) -> list[MasterConnection]:
        """The link, and those to masters that are being replaced at this address."""
        return [*([] if self.connection is None else [self.connection]), *self._replaced]

    @property
    def replaced_instances(self) -> list[str]:
        """The instances of masters that are being replaced, as far as they have sent one."""
        return [each.master.instance for each in self._replaced if each.master is not None]

    @property
    def in_flight(self) -> int:
        """How many calls came over the link and have not ended."""
        return sum(connection.in_flight for connection in self.connections)

    @property
    def unfinished(self) -> int:
        """How many calls came over the link whose work has not stopped."""
        return sum(connection.unfinished for connection in self.connections)

    def watch_calls(self, on_changed: Callable[[], None] | None) -> None:
        """See :meth:`MasterConnection.watch_calls`."""
        for connection in self.connections:
            connection.watch_calls(on_changed)

    def report_other_masters(self, calls: int, masters: Sequence[tuple[str, str]]) -> None:
        """See :meth:`MasterConnection.report_other_masters`."""
        if self.connection is not None:
            self.connection.report_other_masters(calls, masters)

    def status(self) -> MasterStatus:
        """Return what is known of the master now."""
        return MasterStatus(
            id=self.master_id,
            address=self.dialer.label,
            connected=self.connected,
            in_flight=self.in_flight,
            why=self.why,
        )

    async def run(self) -> None:
        """Serve the master until it is not wanted any more, or this worker is closed. A checkpoint.

        Raises:
            HandshakeRefused: it has refused this worker, and so have all others.
        """
        client = self._client
        while self.wanted and not client.draining.is_set():
            fields: dict[str, object] = {"master": self.dialer.label}
            began, why, refused_for = trio.current_time(), None, 0.0
            try:
                why = await self._serve_once()
                self.why = why or ""
            except HandshakeRefused as refused:
                refused_for = _REPLACED_SPREAD if self._replaced else _REFUSED_PAUSE
                if self._replaced:
                    # Not final: the process that refuses is about to take the place of the master, and may fail to.
                    logger.warning("refused, and the old link goes on: %s", refused, extra={"fields": fields})
                else:
                    self.why, self.refusal = str(refused), refused
                    if client.all_refused:
                        raise
                    logger.error(
                        "a master refused this worker, which serves the others: %s",
                        refused,
                        extra={"fields": fields | {"retry_in": _REFUSED_PAUSE}},
                    )
            finally:
                was_connected, self.connected = self.connected, bool(self._replaced)
            if refused_for:
                await self._pause(refused_for)
                continue
            if why is None:
                # The workers of one master do not come all at once; it serves them meanwhile.
                await self._pause(randomness.uniform(0, _REPLACED_SPREAD))
                continue
            if client.draining.is_set():
                if not client.closing:
                    logger.warning("lost the master while draining: %s", why, extra={"fields": fields})
                break
            if client.holder_of(self._last_instance, but=self) is not None:
                self.why = "another address leads to the same master"
                logger.info(self.why, extra={"fields": fields})
                await self._wait_until_needed()
                continue
            delay = randomness.uniform(0, self._bound)
            if not was_connected:
                # It counts from the beginning of the attempt, which a master that does not answer makes a long one.
                delay = max(0.0, delay - (trio.current_time() - began))
            self._bound = min(2 * self._bound, _BACKOFF_LAST)
            if self.wanted:
                text = "lost the master: %s" if was_connected else "no link to the master: %s"
                logger.warning(text, why, extra={"fields": fields | {"retry_in": round(delay, 2)}})
                await self._pause(delay)
        while self._replaced:
            await client.wait_changed()

    def want(self, wanted: bool) -> None:
        """Say whether the master is to be served; a link to one that is not is drained. Synchronous."""
        if wanted == self.wanted:
            return
        self.wanted = wanted
        if wanted:
            # A link that is being drained ends nevertheless, and is followed by a new one.
            self._interrupted = trio.Event()
            return
        logger.info("this master is not served any more", extra={"fields": {"master": self.dialer.label}})
        self.interrupt()
        if self.connection is not None:
            self._client.start(self._leave, self.connection)

    def interrupt(self) -> None:
        """End a wait before the next attempt. Synchronous."""
        self._interrupted.set()

    def doubt(self) -> None:
        """Find out at once whether the link still works; dial at once if there is none. Synchronous."""
        self._bound = _BACKOFF_FIRST
        self._waiting.cancel(reason="the machine has changed")
        for connection in self.connections:
            connection.on_doubt()

    def on_registered(self) -> None:
        """The master has answered for all models. Synchronous."""
        self._bound = _BACKOFF_FIRST
        self.connected = True
        self.refusal, self.why = None, ""
        self._client.on_registered()

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds) as self._waiting:
            await self._interrupted.wait()

    async def _wait_until_needed(self) -> None:
        """Wait until the other link to the same master is gone, and has not come back soon after. A checkpoint."""
        missed = 0
        while self.wanted and not self._client.draining.is_set() and missed < 2:
            await self._pause(randomness.uniform(*_SPARE_PAUSE))
            found = self._client.holder_of(self._last_instance, but=self)
            missed = missed + 1 if found is None else 0

    async def _leave(self, connection: MasterConnection) -> None:
        """Let the calls of a link end, and close it. A checkpoint."""
        reason = "the worker does not serve this master any more"
        connection.drain(reason)
        while connection.in_flight or connection.session.unsent:
            await self._client.wait_changed()
        connection.link.close_when_flushed(reason)

    async def _serve_once(self) -> str | None:
        """Serve one link. Return why it ended, or why there was none; ``None``: its master is being replaced.

        Raises:
            HandshakeRefused: the master refused this worker, or what listens there is none.
        """
        client, connect = self._client, self.dialer.connect
        for each in self._replaced:
            if not each.replaced.is_set():
                # It goes on after all.
                self._replaced.remove(each)
                self.connected = True
                return await self._wait_over(each)
        self._last_instance = ""
        try:
            with trio.fail_after(client.options.worker_timeout):
                stream = injectable(await connect())
        except (OSError, trio.TooSlowError) as error:
            return why_not_connected(error)
        # Not the name before: a dialer with several addresses knows only now which one it is.
        host = self.dialer.host
        connection = client.open_connection(self, stream)
        client.start(self._run_connection, connection, stream, host)
        return await self._wait_over(connection)

    async def _wait_over(self, connection: MasterConnection) -> str | None:
        """Wait until a link is over, and return why; or until its master is being replaced, and return ``None``.

        Raises:
            HandshakeRefused: the master refused this worker, or what listens there is none.
        """
        self.connection = connection
        await connection.wait_over_or_replaced()
        if not connection.over:
            self._last_instance, self.connection = self.instance, None
            self._replaced.append(connection)
            return None
        if connection.refusal is not None:
            raise connection.refusal
        return connection.why_over

    async def _run_connection(
        self, connection: MasterConnection, stream: InjectableStream, host: str
    ) -> None:
        """Serve a link until it is over."""
        client = self._client
        try:
            closed = await _Resumption(connection, self.dialer, host, client.options).run(stream)
            connection.why_over = closed.why
            if client.guardian is not None:
                # Not if this is cancelled: then the connection is dropped, which may look like a cut.
                client.guardian.forget(connection.session)
            if closed.status in _FINAL:
                connection.refusal = HandshakeRefused(_refusal(host, closed))
            elif closed.incompatible:
                connection.refusal = HandshakeRefused(f"{host}: {closed.why}")
        except Exception:
            # A bug in this package. It costs the link and its calls, and not the process with its models.
            logger.exception("the link to the master failed")
            connection.why_over = "an internal error"
        finally:
            if self.connection is connection:
                self._last_instance = self.instance
                self.connection = None
            if connection in self._replaced:
                fields = {"master": self.dialer.label}
                why = connection.why_over
                logger.info(
                    "the link to a master that was replaced is over: %s", why, extra={"fields": fields}
                )
                self._replaced.remove(connection)
            connection.session.close("the link is over")
            connection.cancel_all()
            connection.end()
            client.on_links_changed(over=connection)

    def on_connected(self, connection: MasterConnection) -> None:
        """Let the guardian know a connection on which the master has sent its handshake. Synchronous."""
        guardian, link, dialer = self._client.guardian, connection.link, self.dialer
        if connection.master is not None:
            self._client.on_processes(dialer, connection.master.process, connection.master.processes)
        if guardian is not None:
            with suppress(OSError):
                guardian.tell_end_of(
                    connection.session,
                    dialer.host,
                    link.peer_address,
                    dialer.trust,
                    proxied=link.proxied,
                    process=dialer.process,
                )


@attrs.define(eq=False)
class _Doubt:
    """Whether the connection still works that carries a session, since the machine has changed."""

    resumptions: int
    """How often the session was resumed before. Later, it is on another connection."""
    answered: bool = False
    """Whether the master has answered a ping there."""


class _Resumption:
    """Runs the link of one session, over as many connections as it needs.

    Each connection has a task. A connection that is to go on with the session is opened beside the one that carries it;
    only when the master has answered there, the other one is left. So whichever answers is used.

    Whether the present connection works is doubtful when the master is silent, and when the machine has changed
    (:meth:`_on_doubt`). In the first case, anything from the master is a sign of life. In the second one, only the
    answer to a ping is: what else comes may have arrived before.

    Args:
        connection: has the session and its link.
        dialer: opens connections to the master.
        host: the master's name.
        options: read at the time of use.
    """

    def __init__(
        self,
        connection: MasterConnection,
        dialer: Dialer,
        host: str,
        options: ClusterServerOptions,
    ) -> None:
        self._connection = connection
        self._session = connection.session
        self._link = connection.link
        self._dialer = dialer
        self._host = host
        self._options = options
        self._patience = _SILENT_HEARTBEATS * options.heartbeat_interval
        self._nursery: trio.Nursery | None = None
        # The task that tries other connections since the machine has changed, or the last one of these.
        self._comparing = trio.CancelScope()
        # The wait before the next attempt to resume, or the last one.
        self._waiting = trio.CancelScope()
        # One for each further connection that is tried; set when it is decided whether the session goes on there.
        self._attempts: set[trio.Event] = set()
        self._ended, self._endings = trio.open_memory_channel[LinkClosed](math.inf)

    async def run(self, stream: InjectableStream) -> LinkClosed:
        """Run the link until it is over for good, and return the reason. A checkpoint.

        Args:
            stream: the first connection.
        """
        self._connection.on_resumed = self._on_resumed
        self._connection.on_doubt = self._on_doubt
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._run_on, stream, None)
            self._nursery.start_soon(self._watch_silence)
            while True:
                closed = await self._endings.receive()
                if self._session.close_reason is not None:
                    break
                if self._session.suspended and (closed.status in _FINAL or closed.incompatible):
                    self._link.end(closed.why)
                    break
                if closed.was_reset or closed.has_ended:
                    logger.warning(
                        "the link was cut: %s", closed.why, extra={"fields": {"master": self._host}}
                    )
                    self._nursery.start_soon(self._resume)
            self._nursery.cancel_scope.cancel(reason="the link is over")
        return closed

    async def _run_on(self, stream: InjectableStream, choose: Choose | None) -> None:
        opener = dial(stream, self._host, token=self._options.cluster_token, process=self._dialer.process)
        try:
            await self._link.run(opener, stream=stream, choose=choose)
        except LinkClosed as closed:
            self._ended.send_nowait(closed)

    async def _resume(self) -> None:
        """Try further connections until the session, which is suspended, goes on, or its window has passed."""
        until, bound = self._session.deadline(), _RESUME_BACKOFF_FIRST
        # A master that is killed resets its links a moment before it stops to listen. A connection that is made in this
        # moment is reset when it does, so the next one shows that the master is gone.
        at_once = True
        with trio.move_on_at(until):
            while self._session.suspended:
                try:
                    # One that is not answered goes on, and another one is tried beside it.
                    with trio.move_on_after(_RESUME_PATIENCE):
                        await self._try_connection()
                except (OSError, trio.TooSlowError) as error:
                    at_once = False
                    if is_refused(error) and not self._link.proxied:
                        # No master listens there any more: its process has ended.
                        self._give_up("the master is gone: it refuses connections")
                        return
                if at_once:
                    at_once = False
                elif self._session.suspended:
                    with trio.move_on_after(randomness.uniform(0, bound)) as self._waiting:
                        await trio.sleep_forever()
                    bound = min(2 * bound, _RESUME_BACKOFF_LAST)
            return
        self._give_up("the connection was cut, and not resumed in time")

    def _give_up(self, why: str) -> None:
        if self._session.suspended:
            self._link.end(why)
            self._ended.send_nowait(LinkClosed(why))

    async def _watch_silence(self) -> None:
        """Try another connection when the master is silent for longer than heartbeats can explain."""
        if self._patience >= self._options.worker_timeout:
            return
        pause = self._options.heartbeat_interval / 2
        while True:
            now = trio.current_time()
            # Not in the past, or each look after one that came late would be late, too.
            due = max(now, now + self._patience - self._session.silence(now))
            await trio.sleep_until(due)
            # Not if this process itself did not run: what has come meanwhile must be read first.
            late = trio.current_time() - due > pause
            silent = self._session.silence(trio.current_time()) >= self._patience
            if late or not silent or not self._may_move:
                await trio.sleep(pause)
                continue
            fields = {"master": self._host}
            logger.info("the master is silent; another connection is tried", extra={"fields": fields})
            with suppress(OSError, trio.TooSlowError):
                await self._try_connection()
            await trio.sleep(pause)

    @property
    def _may_move(self) -> bool:
        """Whether the session may leave the connection that carries it for another one."""
        session = self._session
        # At the address of a master that is being replaced another process answers; it does not know the session.
        return session.resumable and not session.suspended and not self._connection.replaced.is_set()

    def _on_doubt(self) -> None:
        """The machine has changed: find out at once whether the connection still works. Synchronous."""
        if self._session.suspended:
            self._waiting.cancel(reason="the machine has changed")
        elif self._may_move and self._nursery is not None:
            self._comparing.cancel(reason="the machine has changed again")
            self._comparing = trio.CancelScope()
            self._nursery.start_soon(self._compare, self._comparing)

    async def _compare(self, scope: trio.CancelScope) -> None:
        """Try other connections until the session goes on at one, or the present one has answered. A checkpoint.

        Args:
            scope: cancelled when the present one has answered.
        """
        doubt = _Doubt(self._session.resumptions)

        def on_answer() -> None:
            doubt.answered = True
            scope.cancel(reason="the connection works")

        with scope:
            self._link.ping(on_answer)
            while not doubt.answered and self._may_move:
                with suppress(OSError, trio.TooSlowError):
                    await self._try_connection(doubt)
                if self._session.resumptions != doubt.resumptions:
                    return
                # The way may not be there yet. It may also come back without a change of addresses.
                await trio.sleep(self._options.heartbeat_interval / 2)

    async def _try_connection(self, doubt: _Doubt | None = None) -> None:
        """Open a connection, and wait until the session goes on there, or will not. A checkpoint.

        Args:
            doubt: why, if the machine has changed.

        Raises:
            OSError, trio.TooSlowError: it cannot be opened.
        """
        with trio.fail_after(self._options.worker_timeout):
            stream = injectable(await self._dialer.connect())
        decided = trio.Event()
        self._attempts.add(decided)
        assert self._nursery is not None
        self._nursery.start_soon(self._run_attempt, stream, decided, doubt)
        try:
            await decided.wait()
        finally:
            self._attempts.discard(decided)

    async def _run_attempt(self, stream: InjectableStream, decided: trio.Event, doubt: _Doubt | None) -> None:
        try:
            await self._run_on(stream, partial(self._choose, doubt))
        finally:
            decided.set()

    def _works(self, doubt: _Doubt | None) -> bool:
        """Return whether the present connection has given a sign of life since it was doubtful."""
        if doubt is not None:
            return doubt.answered or self._session.resumptions != doubt.resumptions
        return self._session.silence(trio.current_time()) < self._patience

    async def _choose(self, doubt: _Doubt | None, demux: FrameDemux) -> tuple[Link, First] | None:
        """Go on with the session on a connection on which the master has just answered, if that is still wanted."""
        session = self._session
        if session.close_reason is None and not session.suspended:
            if self._works(doubt) or not self._may_move:
                return None
            await self._link.detach()
        if session.session_state is not SessionState.SUSPENDED:
            # It is over, or another connection was faster.
            return None
        session.resume()
        return self._link, None

    def _on_resumed(self) -> None:
        for each in self._attempts:
            each.set()


class MasterConnection:
    """One link to the master, from dialling to its end.

    Args:
        stream: the connection; closed with the link.
        router: this node's models, and the calls for them.
        pool: where the handlers run.
        options: read at the time of use.
        node_id, instance: the names of this worker and of its process.
        draining: this worker is about to stop: the link is closed after the handshake, and no model is registered.
        linked: the instances of the masters to which this worker has links.
        rejected_models: where to record which models the master refused, and why.
        on_joined: called when the master has sent its handshake, and whenever the link goes on.
        on_registered: called once, when the master has answered for all models.
        on_shutdown_request: called with the reason when the master asks this worker to stop.
        on_written: called after each write. Synchronous.
        on_connected: called with this object after the handshake on each connection. Synchronous.
        on_tick: called when a heartbeat is due. Synchronous.

    Attributes:
        session: the worker's half of the protocol.
        link: what carries it.
        master: the master's handshake; ``None`` before it.
        on_resumed: called when the link, which was suspended, goes on. Synchronous.
        on_doubt: called when the machine has changed in a way that may have cost the connection. Synchronous.
        replaced: set while another process is about to take the place of the master, or has done so.
        over: whether the link is over.
        why_over: why, for people.
        refusal: set if the link is over since the master refused this worker, or is none.
    """

    def __init__(
        self,
        stream: InjectableStream,
        router: Router,
        pool: HandlerPool,
        options: ClusterServerOptions,
        *,
        node_id: str,
        instance: str,
        draining: bool,
        linked: Sequence[str],
        rejected_models: dict[str, str],
        on_joined: Callable[[], None],
        on_registered: Callable[[], None],
        on_shutdown_request: Callable[[str], None],
        on_written: Callable[[], object],
        on_connected: Callable[[MasterConnection], None] = lambda _: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._router = router
        self._pool = pool
        self._options = options
        self._draining = draining
        self._rejected_models = rejected_models
        self._linked = linked
        self._on_joined = on_joined
        self._on_registered = on_registered
        self._on_shutdown_request = on_shutdown_request
        self._on_written = on_written
        self._on_connected = on_connected
        self._on_tick = on_tick
        # What the master was told last of the other ones.
        self._reported: tuple[int, tuple[tuple[str, str], ...]] = (0, ())
        self.master: Handshake | None = None
        # The models for which the master's answer is pending; None before the handshake.
        self._unconfirmed: set[str] | None = None
        self._registered = False
        self._master_blocked = False
        self.on_resumed: Callable[[], None] = lambda: None
        self.on_doubt: Callable[[], None] = lambda: None
        self.replaced = trio.Event()
        self.over = False
        self.why_over = ""
        self.refusal: HandshakeRefused | None = None
        self._decided = trio.lowlevel.ParkingLot()
        # The last heartbeat was about models that run on demand.
        self._has_on_demand = False
        self.session = WorkerSession(
            node_id,
            __version__,
            trio.current_time(),
            instance=instance,
            heartbeat_interval=options.heartbeat_interval,
            silence_timeout=options.worker_timeout,
            resume_window=options.resume_window,
            proxied=options.through_proxy,
        )
        self.session.announce_links(linked)
        self.link = Link(
            stream,
            self.session,
            on_events=self._on_events,
            on_sent=self._on_sent,
            on_closed=self._on_link_closed,
            before_tick=self._before_tick,
            timeout=options.worker_timeout,
            linger=options.batch_wait,
        )
        self._calls = ForwardedCalls(
            self.session, self.link.wake, router, options, partial(open_control, pool)
        )

    @property
    def in_flight(self) -> int:
        """See :attr:`WorkerClient.in_flight`."""
        return len(self._calls.live)

    @property
    def unfinished(self) -> int:
        """How many calls came over the link whose work has not stopped; also after the link is over."""
        return self._calls.unfinished

    @property
    def joined(self) -> bool:
        """Whether the master has sent its handshake, and is to be served on this link."""
        return self._unconfirmed is not None

    def watch_calls(self, on_changed: Callable[[], None] | None) -> None:
        """Call this whenever a call of this link begins, or its work has stopped; ``None``: no more. Synchronous."""
        self._calls.on_changed = on_changed

    def report_other_masters(self, calls: int, masters: Sequence[tuple[str, str]]) -> None:
        """Tell the master what the others do here, if that is new to it. Synchronous.

        Args:
            calls: how many calls of theirs there are.
            masters: the names and addresses of the others.
        """
        if self.session.suspended or self.master is None or not self.master.instance:
            # A master that is older than this message sends no instance.
            return
        report = (calls, tuple(masters[:OTHERS_MAX]))
        if report != self._reported:
            self._reported = report
            self.session.report_other_masters(*report)
            self.link.wake()

    def announce(self, info: ModelInfo) -> None:
        """Register a model with the master; before the handshake it does nothing, since all are registered then."""
        if self._unconfirmed is None:
            return
        try:
            self.session.register(info)
        except ValueError as error:
            self._on_model_rejected(info.name, str(error))
            return
        self._unconfirmed.add(info.name)
        self.link.wake()

    def withdraw(self, name: str) -> None:
        """Unregister a model at the master."""
        if self._unconfirmed is None:
            return
        # No answer to its registration is waited for any more.
        self._on_model_answer(name)
        self.session.unregister(name)
        self.link.wake()

    def drain(self, reason: str) -> None:
        """See :meth:`WorkerClient.drain`."""
        self._draining = True
        if self._unconfirmed is not None:
            self.session.drain(reason)
            self._calls.requeue_uploading()
            self.link.wake()

    async def wait_over_or_replaced(self) -> None:
        """Wait until the link is over, or its master is being replaced. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not (self.over or self.replaced.is_set()):
            await self._decided.park()

    def end(self) -> None:
        """The link is over. Synchronous."""
        self.over = True
        self._decided.unpark_all()

    def cancel_all(self) -> None:
        """Cancel every call that came over the link: it is over, and there is no one left to answer. Idempotent."""
        self._calls.cancel_all()

    def _on_link_closed(self, closed: LinkClosed) -> None:
        if not self.session.suspended:
            self.cancel_all()

    def _before_tick(self) -> None:
        self._report_load()
        self._on_tick()

    def _report_load(self) -> None:
        pool = self._pool
        self.session.load = (pool.running, pool.waiting, pool.capacity)
        self.session.report_progress(
            (call_id, -1 if call.queued else call.produced) for call_id, call in self._calls.live.items()
        )
        states = pool.on_demand.live_states
        if states or self._has_on_demand:
            self._has_on_demand = bool(states)
            now = trio.current_time()
            self.session.report_on_demand(
                (
                    (name, "failed" if state.why else state.state, round(state.ready_in(now), 3))
                    for name, state in states.items()
                ),
                self._calls.model_waits(),
            )

    def report_on_demand(self) -> None:
        """Tell the master what has changed about the models that run on demand. Synchronous."""
        if self._unconfirmed is not None and not self.session.suspended:
            self._report_load()
            self.session.queue_heartbeat()
            self.link.wake()

    def _on_events(self, events: Sequence[WorkerEvent]) -> None:
        for event in events:
            try:
                self._on_event(event)
            except Exception:
                if not isinstance(event, ForwardRequest | DataMessage | Cancel):
                    raise
                logger.exception("a call failed unexpectedly", extra={"fields": {"call": event.call}})
                self._calls.fail_after_error(event.call)

    def _on_event(self, event: WorkerEvent) -> None:
        match event:
            case ForwardRequest():
                self._calls.open(event)
            case DataMessage():
                self._calls.on_data(event)
            case Cancel():
                self._calls.cancel(event.call, event.reason, complete=event.complete)
            case Handshake():
                self._on_handshake(event)
            case ModelRegistered():
                self._rejected_models.pop(event.name, None)
                self._on_model_answer(event.name)
            case ModelRejected():
                self._on_model_rejected(event.name, event.reason)
                self._on_model_answer(event.name)
            case Heartbeat():
                self._on_master_heartbeat(event.blocked)
                self._on_replaced(event.replaced)
            case Drain():
                logger.info("the master is about to stop: %s", event.reason)
            case Shutdown():
                self._on_shutdown_request(event.reason)

    def _on_handshake(self, handshake: Handshake) -> None:
        fields = {"master": handshake.node_id, "version": handshake.version}
        if self.master is None:
            self.master = handshake
        self.link.proxied = handshake.proxied or self._options.through_proxy
        self._on_connected(self)
        if self._unconfirmed is not None:
            logger.info("the link to the master goes on", extra={"fields": fields})
            self._master_blocked = False
            self._report_load()
            self.on_resumed()
            self._on_joined()
            return
        if handshake.instance and handshake.instance in self._linked:
            self.link.end("there is a link to this master already")
            return
        logger.info("connected to the master", extra={"fields": fields})
        self._report_load()
        self.session.queue_heartbeat()
        self._unconfirmed = set()
        self._on_joined()
        if self._draining:
            self.link.close_when_flushed("the worker is being stopped")
            return
        for info in self._router.catalog.infos():
            self.announce(info)
        self._on_model_answer("")

    def _on_master_heartbeat(self, blocked: str) -> None:
        if blocked and not self._master_blocked:
            logger.warning("the master is blocked: %s", blocked)
        elif self._master_blocked and not blocked:
            logger.info("the master runs again")
        self._master_blocked = bool(blocked)

    def _on_replaced(self, replaced: bool) -> None:
        if replaced and not self.replaced.is_set():
            logger.info("the master is being replaced by another process")
            self.replaced.set()
            self._decided.unpark_all()
        elif not replaced and self.replaced.is_set():
            logger.info("the master goes on, and is not replaced")
            self.replaced = trio.Event()

    def _on_model_rejected(self, name: str, reason: str) -> None:
        if self._router.catalog.info(name) is None:
            # It has been withdrawn meanwhile, or the master makes names up. What it refuses is kept.
            return
        self._rejected_models[name] = reason
        logger.warning("the master refused a model: %s", reason, extra={"fields": {"model": name}})

    def _on_model_answer(self, name: str) -> None:
        assert self._unconfirmed is not None
        self._unconfirmed.discard(name)
        if not self._unconfirmed and not self._registered:
            self._registered = True
            self._on_registered()

    def _on_sent(self, counts: Sequence[tuple[int, int]]) -> None:
        self._calls.on_sent(counts)
        self._on_written()


def _refusal(host: str, closed: LinkClosed) -> str:
    if closed.status in (401, 403):
        return f"{host}: {closed.why}"
    if TLS_REQUIRED in closed.why:
        return f"{host}: this master speaks TLS: connect with --tls (in Python: tls=True), or join with an invitation"
    return (
        f"{host}: this is not the port on which a trio_cluster master takes workers ({closed.why}); "
        "that is the port of its API plus 1000"
    )
