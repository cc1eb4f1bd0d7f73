"""The worker's side: dials the master, registers this node's models, serves what is forwarded, and reconnects.

Each link to the master is one :class:`MasterConnection`. A link that is cut is suspended: its calls go on, and the
worker dials again at once, to go on with the same session (:class:`_Resumption`). When the link ends for good, every
call that came over it is cancelled at once, since there is no one left to answer; then the worker waits and dials
again. The wait is exponential with full jitter (uniform between zero and a bound that doubles), so that a hundred
workers whose master was restarted do not reconnect as one. Of 500 workers whose master has been away for minutes, fewer
than 60 dial in any tenth of a second, and all are back 5 s after its return
(``tests/cluster/test_returning_workers.py``).

A worker that drains serves its link to the end and does not dial again: it would only register its models once more,
just to have them removed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from .._version import __version__
from ..core import randomness
from ..core.model import ModelInfo
from ..errors import HandshakeRefused
from ..link.demux import FrameDemux
from ..link.link import Choose, First, Link, LinkClosed
from ..link.websocket import dial
from ..local.pool import HandlerPool
from ..net.sockets import why_not_connected
from ..net.streams import ByteStream
from ..net.tls import TLS_REQUIRED
from ..net.watchdog import InjectableStream, injectable
from ..options import ClusterServerOptions
from ..protocol import (
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
from .forwarded import ForwardedCalls

__all__ = ["WorkerClient"]

logger = logging.getLogger("trio_cluster.client")

#: The first bound of the wait before dialling again, and the last, in seconds. Workers have to be back within 5 s of
#: their master's return: a worker may have dialled just before, and needs a moment for connection and handshake.
_BACKOFF_FIRST: Final = 0.5
_BACKOFF_LAST: Final = 4.5
#: The HTTP statuses with which a master itself rejects the handshake, and not a proxy before it: they are final.
_FINAL: Final = (400, 401, 403, 404, 405, 426)
#: The last bound of the wait before dialling again for a session that is suspended, in seconds.
_RESUME_BACKOFF_LAST: Final = 2.0
#: Seconds for which a connection for such a session is waited for before another one is tried, too.
_RESUME_PATIENCE: Final = 4.0
#: Heartbeat intervals without a sign of life, after which a worker tries a second connection: two are missing then.
_SILENT_HEARTBEATS: Final = 2.5


class WorkerClient:
    """A worker's links to its master, one after the other.

    Args:
        router: this node's own models, and the calls for them.
        pool: where their handlers run; its load is reported to the master.
        options: read at the time of use.
        node_id: the name of this worker.
        on_shutdown_request: called with the reason when the master asks this worker to stop. It has to call
            :meth:`drain` and :meth:`close`; this class does nothing about the request.

    Attributes:
        rejected_models: the models that the master refused, with its reasons.
        connected: whether there is a link to the master, with all models registered.
    """

    def __init__(
        self,
        router: Router,
        pool: HandlerPool,
        options: ClusterServerOptions,
        node_id: str,
        on_shutdown_request: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.rejected_models: dict[str, str] = {}
        self.connected = False
        self._router = router
        self._pool = pool
        self._options = options
        self._node_id = node_id
        self._on_shutdown_request = on_shutdown_request
        # Tells this process from another one of the same name; see `master.py`.
        self._instance = randomness.token(8)
        self._connection: MasterConnection | None = None
        self._draining = trio.Event()
        self._sent = trio.lowlevel.ParkingLot()
        self._closing = trio.Event()

    async def run(
        self,
        connect: Callable[[], Awaitable[ByteStream]],
        host: str,
        on_registered: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve the master for as long as this runs, through any number of links. A checkpoint.

        When cancelled, the link is dropped and its calls are cancelled.

        Args:
            connect: opens a new connection to the master's internal port; may raise ``OSError``.
            host: the master's name, for the handshake and for logs.
            on_registered: called when all models are registered for the first time.

        Returns:
            After :meth:`close`, when everything that was queued has been sent, or at once if there is no link.

        Raises:
            HandshakeRefused: the master refused this worker, or there is no master at this address.
        """
        first, bound = True, _BACKOFF_FIRST

        def registered() -> None:
            nonlocal bound, first
            bound = _BACKOFF_FIRST
            self.connected = True
            if first:
                first = False
                on_registered()

        while not self._draining.is_set():
            began = trio.current_time()
            try:
                why = await self._serve_once(connect, host, registered)
            finally:
                was_connected, self.connected = self.connected, False
            if self._draining.is_set():
                if not self._closing.is_set():
                    logger.warning(
                        "lost the master while draining: %s", why, extra={"fields": {"master": host}}
                    )
                break
            delay = randomness.uniform(0, bound)
            if not was_connected:
                # It counts from the beginning of the attempt, which a master that does not answer makes a long one.
                delay = max(0.0, delay - (trio.current_time() - began))
            bound = min(2 * bound, _BACKOFF_LAST)
            fields = {"master": host, "retry_in": round(delay, 2)}
            text = "lost the master: %s" if was_connected else "no link to the master: %s"
            logger.warning(text, why, extra={"fields": fields})
            await trio.sleep(delay)
        await self._closing.wait()

    @property
    def session(self) -> WorkerSession | None:
        """The session on the link to the master; ``None`` while there is no link."""
        return None if self._connection is None else self._connection.session

    @property
    def instance(self) -> str:
        """Drawn once for this object; tells its process from another one of the same name."""
        return self._instance

    @property
    def in_flight(self) -> int:
        """How many calls came over the link and have not ended, including those whose body is still being received."""
        return 0 if self._connection is None else self._connection.in_flight

    def announce(self, info: ModelInfo) -> None:
        """Register a new model with the master. Without a link, it is registered after the next handshake."""
        if self._connection is not None:
            self._connection.announce(info)

    def withdraw(self, name: str) -> None:
        """Unregister a model at the master. Its running calls go on."""
        self.rejected_models.pop(name, None)
        if self._connection is not None:
            self._connection.withdraw(name)

    def drain(self, reason: str) -> None:
        """Ask the master for no more calls; running ones go on. :meth:`close` has to follow. Synchronous.

        Calls whose body is still being received are given back: they have not begun, and may run on another replica.
        """
        self._draining.set()
        if self._connection is not None:
            self._connection.drain(reason)

    async def wait_sent(self) -> None:
        """Wait until nothing is queued for the master any more, for instance because of a slow client. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self._connection is not None and self._connection.session.unsent:
            await self._sent.park()

    def close(self, reason: str) -> None:
        """Make :meth:`run` return as soon as everything that is queued has been sent. Synchronous."""
        self._draining.set()
        self._closing.set()
        if self._connection is not None:
            self._connection.link.close_when_flushed(reason)

    async def _serve_once(
        self, connect: Callable[[], Awaitable[ByteStream]], host: str, on_registered: Callable[[], None]
    ) -> str:
        """Serve one link. Return why it ended, or why there was none."""
        try:
            with trio.fail_after(self._options.worker_timeout):
                stream = injectable(await connect())
        except (OSError, trio.TooSlowError) as error:
            return why_not_connected(error)
        self._connection = connection = MasterConnection(
            stream,
            self._router,
            self._pool,
            self._options,
            node_id=self._node_id,
            instance=self._instance,
            draining=self._draining.is_set(),
            rejected_models=self.rejected_models,
            on_registered=on_registered,
            on_shutdown_request=self._on_shutdown_request,
            on_written=self._sent.unpark_all,
        )
        try:
            closed = await _Resumption(connection, connect, host, self._options).run(stream)
            if closed.status in _FINAL:
                refused = HandshakeRefused(_refusal(host, closed))
            elif closed.incompatible:
                refused = HandshakeRefused(f"{host}: {closed.why}")
            else:
                return closed.why
        except Exception:
            # A bug in this package. It costs the link and its calls, and not the process with its models.
            logger.exception("the link to the master failed")
            return "an internal error"
        finally:
            self._connection = None
            self._sent.unpark_all()
            connection.session.close("the link is over")
            connection.cancel_all()
        raise refused


class _Resumption:
    """Runs the link of one session, over as many connections as it needs.

    Each connection has a task. A connection that is to go on with the session is opened beside the one that carries it;
    only when the master has answered there, the other one is left. So whichever answers is used.

    Args:
        connection: has the session and its link.
        connect: opens a connection to the master.
        host: the master's name.
        options: read at the time of use.
    """

    def __init__(
        self,
        connection: MasterConnection,
        connect: Callable[[], Awaitable[ByteStream]],
        host: str,
        options: ClusterServerOptions,
    ) -> None:
        self._connection = connection
        self._session = connection.session
        self._link = connection.link
        self._connect = connect
        self._host = host
        self._options = options
        self._patience = _SILENT_HEARTBEATS * options.heartbeat_interval
        self._nursery: trio.Nursery | None = None
        # One for each further connection that is tried; set when it is decided whether the session goes on there.
        self._attempts: set[trio.Event] = set()
        self._ended, self._endings = trio.open_memory_channel[LinkClosed](math.inf)

    async def run(self, stream: InjectableStream) -> LinkClosed:
        """Run the link until it is over for good, and return the reason. A checkpoint.

        Args:
            stream: the first connection.
        """
        self._connection.on_resumed = self._on_resumed
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
        opener = dial(stream, self._host, token=self._options.cluster_token)
        try:
            await self._link.run(opener, stream=stream, choose=choose)
        except LinkClosed as closed:
            self._ended.send_nowait(closed)

    async def _resume(self) -> None:
        """Try further connections until the session, which is suspended, goes on, or its window has passed."""
        until, bound = self._session.deadline(), _BACKOFF_FIRST
        with trio.move_on_at(until):
            while self._session.suspended:
                try:
                    # One that is not answered goes on, and another one is tried beside it.
                    with trio.move_on_after(_RESUME_PATIENCE):
                        await self._try_connection()
                except ConnectionRefusedError:
                    if not self._link.proxied:
                        # No master listens there any more: its process has ended.
                        self._give_up("the master is gone: it refuses connections")
                        return
                except (OSError, trio.TooSlowError):
                    pass
                if self._session.suspended:
                    await trio.sleep(randomness.uniform(0, bound))
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
            due = trio.current_time() + self._patience - self._session.silence(trio.current_time())
            await trio.sleep_until(due)
            # Not if this process itself did not run: what has come meanwhile must be read first.
            late = trio.current_time() - due > pause
            silent = self._session.silence(trio.current_time()) >= self._patience
            if late or not silent or self._session.suspended or not self._session.resumable:
                await trio.sleep(pause)
                continue
            fields = {"master": self._host}
            logger.info("the master is silent; another connection is tried", extra={"fields": fields})
            with suppress(OSError, trio.TooSlowError):
                await self._try_connection()
            await trio.sleep(pause)

    async def _try_connection(self) -> None:
        """Open a connection, and wait until the session goes on there, or will not. A checkpoint.

        Raises:
            OSError, trio.TooSlowError: it cannot be opened.
        """
        with trio.fail_after(self._options.worker_timeout):
            stream = injectable(await self._connect())
        decided = trio.Event()
        self._attempts.add(decided)
        assert self._nursery is not None
        self._nursery.start_soon(self._run_attempt, stream, decided)
        try:
            await decided.wait()
        finally:
            self._attempts.discard(decided)

    async def _run_attempt(self, stream: InjectableStream, decided: trio.Event) -> None:
        try:
            await self._run_on(stream, self._choose)
        finally:
            decided.set()

    async def _choose(self, demux: FrameDemux) -> tuple[Link, First] | None:
        """Go on with the session on a connection on which the master has just answered, if that is still wanted."""
        session = self._session
        if session.close_reason is None and not session.suspended:
            if session.silence(trio.current_time()) < self._patience:
                # The first connection has given a sign of life meanwhile.
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
        rejected_models: where to record which models the master refused, and why.
        on_registered: called once, when the master has answered for all models.
        on_shutdown_request: called with the reason when the master asks this worker to stop.
        on_written: called after each write. Synchronous.

    Attributes:
        session: the worker's half of the protocol.
        link: what carries it.
        on_resumed: called when the link, which was suspended, goes on. Synchronous.
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
        rejected_models: dict[str, str],
        on_registered: Callable[[], None],
        on_shutdown_request: Callable[[str], None],
        on_written: Callable[[], object],
    ) -> None:
        self._router = router
        self._pool = pool
        self._draining = draining
        self._rejected_models = rejected_models
        self._on_registered = on_registered
        self._on_shutdown_request = on_shutdown_request
        self._on_written = on_written
        # The models for which the master's answer is pending; None before the handshake.
        self._unconfirmed: set[str] | None = None
        self._registered = False
        self._master_blocked = False
        self.on_resumed: Callable[[], None] = lambda: None
        self.session = WorkerSession(
            node_id,
            __version__,
            trio.current_time(),
            instance=instance,
            heartbeat_interval=options.heartbeat_interval,
            silence_timeout=options.worker_timeout,
            resume_window=options.resume_window,
        )
        self.link = Link(
            stream,
            self.session,
            on_events=self._on_events,
            on_sent=self._on_sent,
            on_closed=self._on_link_closed,
            before_tick=self._report_load,
            timeout=options.worker_timeout,
            linger=options.batch_wait,
        )
        self._calls = ForwardedCalls(self.session, self.link.wake, router, options)

    @property
    def in_flight(self) -> int:
        """See :attr:`WorkerClient.in_flight`."""
        return len(self._calls.live)

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

    def cancel_all(self) -> None:
        """Cancel every call that came over the link: it is over, and there is no one left to answer. Idempotent."""
        self._calls.cancel_all()

    def _on_link_closed(self, closed: LinkClosed) -> None:
        if not self.session.suspended:
            self.cancel_all()

    def _report_load(self) -> None:
        pool = self._pool
        self.session.load = (pool.running, pool.waiting, pool.capacity)
        self.session.report_progress(
            (call_id, -1 if call.queued else call.produced) for call_id, call in self._calls.live.items()
        )

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
            case Drain():
                logger.info("the master is about to stop: %s", event.reason)
            case Shutdown():
                self._on_shutdown_request(event.reason)

    def _on_handshake(self, handshake: Handshake) -> None:
        fields = {"master": handshake.node_id, "version": handshake.version}
        self.link.proxied = handshake.proxied
        if self._unconfirmed is not None:
            logger.info("the link to the master goes on", extra={"fields": fields})
            self._master_blocked = False
            self._report_load()
            self.on_resumed()
            return
        logger.info("connected to the master", extra={"fields": fields})
        self._report_load()
        self.session.queue_heartbeat()
        self._unconfirmed = set()
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
        return f"{host}: this master speaks TLS: connect to https://{host}:PORT, or join with an invitation"
    return (
        f"{host}: this is not the port on which a trio_cluster master takes workers ({closed.why}); "
        "that is the port of its API plus 1000"
    )
