"""A node: one run of a master, a worker or a standalone server, in one nursery.

A node is made for one run and dropped with it, so that no state of a run is left for the next one. What outlives a run
(the models, the pool, the options) is passed to it.

Stopping. The task that serves a node may be cancelled at any time. That is quick: handlers are cancelled, streams are
cut, links are dropped. :meth:`Node.stop` stops it gracefully, in these steps:

1. New requests are refused with 503 and ``Retry-After``, and the nodes at the other end of the links are notified.
2. Running requests have ``drain_timeout`` seconds to finish.
3. Those that are left are cancelled, and their clients get an error. They have ``CLOSE_TIMEOUT`` seconds for that.
4. Links, connections and listeners are closed. A peer that does not react within ``CLOSE_TIMEOUT`` seconds is
   disconnected, so that a shutdown ends in bounded time.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import trio
from msgspec import UNSET, UnsetType

from ._version import __version__
from .accounts.accounts import Accounts, open_accounts
from .accounts.errors import StoreError
from .admin.app import create_app, put_gateway_in_front
from .admin.membership import Membership
from .cluster.admission import Doorkeeper
from .cluster.guardian import Guardian
from .cluster.master import Place, WorkerManager
from .cluster.masters import Masters
from .cluster.model_memory import ModelMemory
from .cluster.remote_worker import RemoteWorker
from .cluster.replacement import SOCKET_NAME, HandOver, Succession, SuccessorStarter, wait_for_workers
from .cluster.sleeping import SleepingWorkers
from .cluster.worker import WorkerClient
from .core import randomness
from .core.call import Call
from .core.limits import CLOSE_TIMEOUT
from .core.log_context import MOST_IDS
from .core.request import Request
from .core.state_dir import StateDir, StateDirError, default_state_dir, path_of
from .core.status import (
    WORKER_STATES,
    MasterStatus,
    NodeStatus,
    OnDemandStatus,
    ResidentStatus,
    SlotStatus,
    WorkerStatus,
    most_waiting,
)
from .errors import ClusterError, ClusterPortError, HandshakeRefused
from .gateway.access_log import RefusedRequests
from .gateway.auth import Authenticator
from .gateway.node_context import GaugeSample, NodeContext
from .gateway.response import render_refusal
from .gateway.stories import Stories
from .group.front import Front
from .group.limiter import GroupLimiter
from .group.live import LiveGroup
from .group.member import Member
from .group.messages import Notice
from .http1.asgi import App
from .http1.framing import refusal_response
from .http1.refusal import HttpRefusal
from .http1.server import serve_http
from .hypercorn_server.server import serve_http as serve_with_hypercorn
from .limits.limiter import Limiter
from .limits.memory import MemoryLimiter
from .limits.redis import RedisLimiter
from .local.control import open_control
from .local.pool import HandlerPool
from .net.connections import Retirement
from .net.gate import Gate, gated
from .net.machine import ThisMachine
from .net.names import own_names
from .net.sockets import (
    HandsOver,
    Listeners,
    Network,
    Sockets,
    local_address,
    outward_address,
    port_of,
    shown_address,
)
from .net.tls import TLS_REQUIRED, with_tls
from .net.watchdog import log_blocks
from .options import ClusterMode, ClusterServerOptions, Reloaded
from .routing.backend import LOCAL, Backend
from .routing.router import Router
from .security.master_tls import MasterTls, open_tls
from .stored.database import DatabaseResponses
from .stored.memory import MemoryResponses
from .stored.record import ResponseStore
from .telemetry.node_telemetry import open_telemetry

if TYPE_CHECKING:
    from quart_trio import QuartTrio

__all__ = ["Node"]

logger = logging.getLogger("trio_cluster.node")

#: Seconds for which a master that was replaced keeps connections without a request. Most clients keep theirs for less
#: than that, and so are never in the middle of sending a request when it is closed.
_IDLE_TIME = 6.0


class Node:
    """One run of a server. The method ``serve_as_*`` of its mode is to be called, once.

    These attributes are ``None`` until the node serves, and in the modes that do not have them:

    ===================  ==========  ========  ==========
    attribute            standalone  master    worker
    ===================  ==========  ========  ==========
    ``url``, ``port``    yes         yes       if it has a listen address
    ``app``              yes         yes
    ``internal_port``                yes
    ``worker_manager``               yes
    ``worker_client``                          yes
    ===================  ==========  ========  ==========

    Args:
        mode: the role of the node.
        options: read at the time of use.
        router: the models of this process, and on a master those of its workers, too.
        pool: runs the handlers of this process.
        network: opens listeners and connections.
        authenticator: determines who sends a request; ``None``: the API key of the options is required.
        name: the name of the node if the options have none; ``None``: one is made up.
        serves_pool: serve the pool while this node serves. Otherwise its caller does, for several nodes one after the
            other, whose handlers go on from one to the next.
        reload: reads the configuration again; ``None``: there is none to read.
        starter: starts a process that takes the place of this one; ``None``: it has to be started elsewhere.

    Attributes:
        mode: as given.
        url, port: where clients reach the API of this process.
        app: the Quart-Trio application behind the gateway. A worker's own API has one, too, which is not public.
        internal_port: the port on which a master listens for workers.
        worker_manager: the workers of a master.
        worker_client: a worker's connections to its masters.
    """

    def __init__(
        self,
        mode: ClusterMode,
        options: ClusterServerOptions,
        router: Router,
        pool: HandlerPool,
        network: Network,
        authenticator: Authenticator | None = None,
        *,
        name: str | None = None,
        serves_pool: bool = True,
        reload: Callable[[], Awaitable[Reloaded]] | None = None,
        starter: SuccessorStarter | None = None,
    ) -> None:
        self.mode = mode
        self.url: str | None = None
        self.port: int | None = None
        self.internal_port: int | None = None
        self.app: QuartTrio | None = None
        self.worker_manager: WorkerManager | None = None
        self.worker_client: WorkerClient | None = None
        self._options = options
        self._router = router
        self._pool = pool
        self._serves_pool = serves_pool
        self._network = network
        self._starter = starter
        self._stop_requested = trio.Event()
        self._start_over = trio.Event()
        self._start_over.set()
        self._api_may_end = trio.Event()
        self._api_ended = trio.Event()
        self._retirement = Retirement()
        self._drain_deadline: float | None = None
        self._listen_address: tuple[str, int] | None = None
        self._listen_changed = trio.Event()
        self._id = options.server.worker_id or name or _new_id()
        self._tls: MasterTls | None = None
        pool.node_name = self._id
        router.accept()
        self._node_context = NodeContext(
            router=router,
            options=options,
            node_id=self._id,
            mode=str(mode),
            status=self._status,
            gauges=self._gauges,
            drain_worker=self._drain_worker,
            open_control=self._open_control,
            authenticator=authenticator,
            reload=reload,
        )

    @property
    def name(self) -> str:
        """The name of this node."""
        return self._id

    @property
    def stop_requested(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop_requested.is_set()

    async def wait_stop(self, seconds: float) -> bool:
        """Wait until :meth:`stop` is called, for so many seconds at most; return whether it was. A checkpoint."""
        with trio.move_on_after(seconds):
            await self._stop_requested.wait()
        return self.stop_requested

    @property
    def requires_key(self) -> bool:
        """Whether requests for models need an API key."""
        return self._node_context.requires_key

    @property
    def limiter(self) -> Limiter:
        """Counts the requests of keys that have limits."""
        return self._node_context.limiter

    @property
    def stories(self) -> Stories:
        """What has become of requests."""
        return self._node_context.stories

    def stop(self) -> None:
        """Request a graceful stop; the ``serve_as_*`` method returns when it is done. Synchronous, idempotent."""
        self._stop_requested.set()
        self._start_over.set()

    def begin_start(self) -> None:
        """Serve no models of this process until :meth:`finish_start`; a worker does not dial its master. Synchronous.

        To be called before the node serves.
        """
        self._start_over = trio.Event()
        self._node_context.starting = True

    def finish_start(self) -> None:
        """Start-up hooks are done. Synchronous, idempotent."""
        self._node_context.starting = False
        self._start_over.set()

    async def _has_started(self) -> bool:
        """Wait until the start-up hooks are done or a stop is requested; return whether they are done. A checkpoint."""
        await self._start_over.wait()
        return not self._node_context.starting

    async def read_certificates(self) -> Callable[[], bool]:
        """Read the certificates of this node again; see :meth:`MasterTls.read_again`. A checkpoint."""
        if self._tls is None:
            await trio.lowlevel.checkpoint()
            return lambda: False
        return await self._tls.read_again()

    def listen_on(self, address: tuple[str, int] | None) -> None:
        """Serve the own API of a worker on this address from now on; ``None``: do not serve it. Synchronous."""
        self._listen_address = address
        self._listen_changed.set()

    async def serve_as_standalone(
        self,
        listeners: Listeners,
        started: Callable[[], None],
        *,
        state_name: str | None = None,
        keeps_state: bool = False,
    ) -> None:
        """Serve the API until stopped.

        Args:
            listeners: the listeners for clients; closed at the end.
            started: called when requests are accepted. Synchronous.
            state_name: the name of the state directory if the options have none; ``None``: there is none.
            keeps_state: it is for keys, usage and what was used of limits, and not only for certificates.

        Raises:
            ClusterError: TLS is not possible as the options ask for it, the state directory or the database of the
                options cannot be used, or the loop of an asyncio handler could not be started.
        """
        await self._open_tls(state_name)
        state = self._open_state(state_name if keeps_state else None)
        limiter = self._node_context.limiter = self._new_limiter(state)
        async with (
            self._open_telemetry(),
            self._open_accounts(state) as accounts,
            limiter.opened(),
            self._open_loops(),
            trio.open_nursery() as nursery,
        ):
            if accounts is not None:
                nursery.start_soon(accounts.run)
            responses = self._node_context.responses = self._new_response_store(accounts)
            nursery.start_soon(responses.run)
            await self._start_pool(nursery)
            nursery.start_soon(self._log_blocks)
            await self._start_api(nursery, listeners)
            if await self._has_started():
                started()
            await self._stop_requested.wait()
            await self._drain("the server is being stopped", self._node_context.wait_answered)
            await self._end_api(nursery)

    async def serve_as_master(
        self,
        listeners: Listeners,
        internal_listeners: Listeners,
        started: Callable[[], None],
        *,
        state_name: str | None = None,
        succession: Succession | None = None,
        member: Member | None = None,
    ) -> None:
        """Serve the API, and accept workers, until stopped or replaced by another process.

        Args:
            listeners: the listeners for clients; closed at the end.
            internal_listeners: the listeners for workers; closed at the end.
            started: called when requests and workers are accepted. Synchronous.
            state_name: the name of the state directory if the options have none; ``None``: there is none.
            succession: takes the place of a running master, whose listeners these are; ``None``: there is none.
            member: this process is one of several of this master; ``None``: it is the only one.

        Raises:
            TakeOverFailed: the running master goes on.
            StateDirError, StoreError: the state directory or the database of the options cannot be used.
            OptionsError: the limits cannot be counted where the options say.
            ClusterError: the loop of an asyncio handler could not be started.
        """
        state = self._open_state(state_name)
        taking_over = succession is not None
        # Of several processes one writes: all serve the same models.
        writes = member is None or member.process == 0
        sleeping = SleepingWorkers(self._router.catalog, self._options)
        later = taking_over or not writes
        memory = None if state is None else self._model_memory(state, sleeping, later=later)
        # The running master keeps what keys use until it leaves that to this one.
        limiter = self._node_context.limiter = self._new_limiter(None if taking_over else state, member)
        self._tls = await open_tls(self._options, state, self._own_names)
        doorkeeper = Doorkeeper(self._options)
        if self._tls is not None:
            doorkeeper = Doorkeeper(
                self._options, self._tls.is_revoked, self._tls.is_member, self._invite_command
            )
        place = None if member is None else Place(member.process, member.processes)
        manager = WorkerManager(self._router.catalog, self._options, self._id, doorkeeper, place, sleeping)
        self.worker_manager = manager
        self.internal_port = port_of(internal_listeners)
        clients_gate, workers_gate = Gate(is_open=not taking_over), Gate(is_open=not taking_over)
        hand_over: HandOver | None = None
        handovers = self._network.handovers if isinstance(self._network, HandsOver) else None
        directory = None if handovers is None else handovers.directory if state is None else state.path
        if member is not None:
            listeners = gated(listeners, clients_gate)
        elif handovers is not None and directory is not None:
            hand_over = HandOver(
                handovers,
                directory / SOCKET_NAME,
                handovers.handles_of(listeners),
                handovers.handles_of(internal_listeners),
                clients_gate,
                workers_gate,
                manager,
                limiter,
                memory,
                self._tls,
                self._starter,
            )
            listeners = gated(listeners, clients_gate)
            internal_listeners = gated(internal_listeners, workers_gate)
        failure: ClusterError | None = None
        async with (
            self._open_telemetry(),
            self._open_accounts(state) as accounts,
            limiter.opened(),
            self._open_loops(),
            trio.open_nursery() as nursery,
        ):
            if memory is not None and not taking_over and writes:
                nursery.start_soon(memory.run)
            if accounts is not None:
                nursery.start_soon(accounts.run)
            responses = self._node_context.responses = self._new_response_store(
                accounts, shared=member is not None
            )
            nursery.start_soon(responses.run)
            await self._start_pool(nursery)
            nursery.start_soon(self._log_blocks)
            if self._tls is not None:
                internal_listeners = with_tls(internal_listeners, self._tls.link_context, _plain_http_reply)
            await nursery.start(manager.serve, internal_listeners)
            await self._start_api(nursery, listeners, member, clients_gate)
            if await self._has_started():
                if succession is not None:
                    failure = await self._take_over(
                        nursery, succession, state, memory, clients_gate, workers_gate
                    )
                if clients_gate.is_open:
                    if hand_over is not None:
                        await nursery.start(hand_over.serve)
                    started()
            if failure is None:
                await self._wait_stopped_or_replaced(hand_over)
            manager.drain("the master is being stopped")
            await self._drain("the server is being stopped", self._node_context.wait_answered)
            await manager.close_all("the master was stopped")
            await self._end_api(nursery, hand_over)
        if failure is not None:
            raise failure

    async def _take_over(
        self,
        nursery: trio.Nursery,
        succession: Succession,
        state: StateDir | None,
        memory: ModelMemory | None,
        clients_gate: Gate,
        workers_gate: Gate,
    ) -> ClusterError | None:
        """Take the place of the running master, unless this one is stopped before. A checkpoint.

        Returns:
            Why that has failed; ``None`` if it has not.
        """
        limiter, manager = self._node_context.limiter, self.worker_manager
        assert manager is not None
        failure: ClusterError | None = None

        async def take_over() -> None:
            models = await succession.begin()
            if state is not None:
                limiter.load(state)
            if self._tls is not None:
                await self._tls.reload()
            if memory is not None:
                nursery.start_soon(memory.run)
            workers_gate.open()
            await wait_for_workers(manager, models)
            await succession.arrive()
            clients_gate.open()
            await succession.serve()
            logger.info("took over from another process", extra={"fields": {"predecessor": succession.pid}})

        async def cancel_when_stopped(scope: trio.CancelScope) -> None:
            await self._stop_requested.wait()
            scope.cancel(reason="the server is being stopped")

        nursery.start_soon(succession.run, limiter.apply, self.stop)
        async with trio.open_nursery() as taking:
            taking.start_soon(cancel_when_stopped, taking.cancel_scope)
            try:
                await take_over()
            except ClusterError as error:
                failure = error
            taking.cancel_scope.cancel(reason="it is decided who serves")
        if not clients_gate.is_open:
            # The running master goes on as soon as it notices that.
            workers_gate.close()
            limiter.unload()
            if memory is not None:
                memory.suspend()
            succession.close()
        return failure

    async def _wait_stopped_or_replaced(self, hand_over: HandOver | None) -> None:
        """Wait until this master is to end. If another process has its place, wait for the clients, too."""
        if hand_over is None:
            await self._stop_requested.wait()
            return

        async def wait_replaced(scope: trio.CancelScope) -> None:
            await hand_over.replaced.wait()
            fields = {"calls": len(self._router.live)}
            logger.info("replaced by another process; finishing", extra={"fields": fields})
            responses = self._node_context.responses
            if isinstance(responses, MemoryResponses) and responses.count:
                text = "responses that were stored in memory end with this process; the option database keeps them"
                logger.warning(text, extra={"fields": {"responses": responses.count}})
            self._drain_deadline = trio.current_time() + self._options.drain_timeout
            self._retirement.begun.set()
            with trio.move_on_after(min(_IDLE_TIME, self._options.drain_timeout)):
                await self._retirement.over.wait()
            self._retirement.idle_time_over.set()
            # Nothing is refused, not even an upload that takes long.
            with trio.move_on_at(self._drain_deadline):
                await self._retirement.over.wait()
            scope.cancel(reason="it was replaced")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_replaced, nursery.cancel_scope)
            await self._stop_requested.wait()
            hand_over.stop()
            nursery.cancel_scope.cancel(reason="it is being stopped")

    def _open_telemetry(self) -> AbstractAsyncContextManager[None]:
        # The times of a simulated network are not those of the day.
        if not isinstance(self._network, Sockets):
            return nullcontext()
        return open_telemetry(self._options, self.mode, self._id, self._router, self._node_context.stories)

    def _open_loops(self) -> AbstractAsyncContextManager[None]:
        return self._pool.loops.opened() if self._serves_pool else nullcontext()

    async def _start_pool(self, nursery: trio.Nursery) -> None:
        if self._serves_pool:
            await nursery.start(self._pool.serve)
            nursery.start_soon(self._pool.loops.watch, self._options.heartbeat_interval)

    @asynccontextmanager
    async def _open_accounts(self, state: StateDir | None) -> AsyncIterator[Accounts | None]:
        """Open the database of keys and usage for the length of a block; ``None`` if there is no place for it.

        Raises:
            StoreError: the options name one that cannot be used.
        """
        options, context = self._options, self._node_context
        database: str | Path | None = options.database
        if database is None and state is not None:
            database = state.path / "accounts.db"
        async with AsyncExitStack() as stack:
            if database is not None:
                opening = open_accounts(
                    database, context.audit, self._router.observers, lambda: options.usage_days
                )
                try:
                    context.accounts = await stack.enter_async_context(opening)
                except StoreError as error:
                    if options.database is not None or options.state_dir is not None:
                        raise
                    logger.warning("serving without keys and usage: %s", error)
            yield context.accounts

    def _new_response_store(self, accounts: Accounts | None, *, shared: bool = False) -> ResponseStore:
        """Return what keeps responses: in the database if the options name one, in memory if not.

        Args:
            accounts: have the database.
            shared: other processes must find them, too, so they are kept in the database that there is.
        """
        if accounts is not None and (shared or self._options.database is not None):
            return DatabaseResponses(accounts, self._options)
        responses = MemoryResponses(self._options)
        if accounts is not None:
            accounts.on_revoked = responses.forget
        return responses

    def _open_state(self, name: str | None) -> StateDir | None:
        """Return the directory for what must survive a restart; ``None`` if there is no place for it.

        Raises:
            StateDirError: the options name one that cannot be used.
        """
        given = self._options.state_dir
        if given is None and name is None:
            return None
        try:
            path = path_of(given) or default_state_dir(os.environ, name or "")
            return StateDir(path)
        except StateDirError as error:
            if given is not None:
                raise
            what = "" if self._options.database is not None else "serving without keys and usage, and "
            logger.warning("%sthe state of this node will not survive a restart: %s", what, error)
            return None

    def _model_memory(self, state: StateDir, sleeping: SleepingWorkers, *, later: bool) -> ModelMemory | None:
        """Return the memory of models, with what is remembered restored; ``None`` if it cannot be kept.

        Args:
            state: where it is kept.
            sleeping: the workers whose models are remembered for longer.
            later: another process still writes there.
        """
        memory = ModelMemory(self._router.catalog, state, sleeping)
        try:
            memory.restore()
            if not later:
                memory.save()
        except StateDirError as error:
            if self._options.state_dir is not None:
                raise
            logger.warning("the names of models will not survive a restart: %s", error)
            return None
        return memory

    def _new_limiter(self, state_dir: StateDir | None, member: Member | None = None) -> Limiter:
        """Return what counts the requests of keys, with what was used before a restart."""
        if self._options.limits is not None:
            return RedisLimiter(self._options.limits, refuse=self._options.limits_failure == "refuse")
        if member is not None:
            return GroupLimiter(member)
        try:
            return MemoryLimiter(state_dir=state_dir)
        except StateDirError as error:
            if self._options.state_dir is not None:
                raise
            logger.warning("what keys have used will not survive a restart: %s", error)
            return MemoryLimiter()

    async def serve_as_worker(self, masters: Masters, started: Callable[[], None]) -> None:
        """Serve masters until stopped.

        Args:
            masters: which there are.
            started: called when the models are registered for the first time, at any master. Synchronous.

        Raises:
            HandshakeRefused: all masters refused this worker, or what listens at their addresses is not a master.
            ClusterPortError: the node cannot listen on its listen address.
            ClusterError: the loop of an asyncio handler could not be started.
        """
        # A simulated network is not this machine's.
        machine = ThisMachine() if isinstance(self._network, Sockets) else None
        client = WorkerClient(
            self._router, self._pool, self._options, self._id, self._on_shutdown_request, machine
        )
        self.worker_client = client
        if self._options.guardian:
            client.guardian = Guardian(self._options)
        if self._listen_address is not None:
            await self._open_tls("worker")
        async with self._open_telemetry(), self._open_loops():
            await self._serve_masters(client, masters, started)

    async def _serve_masters(
        self, client: WorkerClient, masters: Masters, started: Callable[[], None]
    ) -> None:
        listeners = await self._open_listen_address()
        refused: HandshakeRefused | None = None
        serving = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            await self._start_pool(nursery)
            if client.guardian is not None:
                nursery.start_soon(client.guardian.run)
            if self._tls is not None:
                nursery.start_soon(self._tls.run)
            nursery.start_soon(self._serve_listen_address, listeners)
            nursery.start_soon(self._stop_worker, client, serving)
            with serving:
                try:
                    if await self._has_started():
                        await client.run(masters, started)
                except HandshakeRefused as error:
                    # Raised below, outside the nursery, which would wrap it in an exception group.
                    refused = error
            nursery.cancel_scope.cancel(reason="the worker was stopped")
        if refused is not None:
            raise refused

    def _on_shutdown_request(self, reason: str) -> None:
        logger.info("the master asks this worker to stop: %s", reason)
        self.stop()

    async def _stop_worker(self, client: WorkerClient, serving: trio.CancelScope) -> None:
        """Wait until a stop is requested, and stop the worker gracefully."""
        await self._stop_requested.wait()
        reason = "the worker was stopped"
        client.drain("the worker is being stopped")
        await self._drain("the worker is being stopped", client.wait_sent)
        if client.connected:
            # client.run() returns when the link is closed, and the nursery is cancelled, which ends this sleep. A
            # master that does not read what was sent last, or does not close the link, is disconnected at the end of
            # it.
            client.close(reason)
            await trio.sleep(CLOSE_TIMEOUT)
        serving.cancel(reason=reason)

    async def _log_blocks(self) -> None:
        """Log blocks of the event loop until cancelled; a worker's link does that for a worker."""
        if not isinstance(self._network, Sockets):
            # Time stands still while a simulated network's loop is blocked.
            return
        with log_blocks(self._options.heartbeat_interval):
            await trio.sleep_forever()

    async def _drain(self, reason: str, wait_delivered: Callable[[], Awaitable[None]]) -> None:
        """Refuse new calls, let running ones finish, and cancel those that are left after ``drain_timeout``.

        A call has finished when its work has stopped and its answer has left this node. If a client is slow to read,
        that is long after the work has stopped.

        Args:
            reason: why calls are cancelled.
            wait_delivered: waits until the answers have left this node.
        """
        self._router.drain("The server is shutting down; try again shortly")
        if self._drain_deadline is None:
            self._drain_deadline = trio.current_time() + self._options.drain_timeout
        with trio.move_on_at(self._drain_deadline):
            await self._router.wait_idle()
            await wait_delivered()
            return
        left = [call.request.request_id for call in self._router.live]
        fields = {"calls": len(left), "request_ids": left[:MOST_IDS]}
        logger.warning("cancelling what did not finish in time", extra={"fields": fields})
        self._router.cancel_all(reason)
        # Time for the errors to reach the clients, and for the work to stop. Handlers that do not stop, and clients
        # that do not read, are not waited for here any longer.
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._router.wait_idle()
            await wait_delivered()

    async def _start_api(
        self,
        nursery: trio.Nursery,
        listeners: Listeners,
        member: Member | None = None,
        clients_gate: Gate | None = None,
    ) -> None:
        manager = self.worker_manager
        membership = None
        if manager is not None:
            membership = Membership(
                self._tls, self._outward_addresses, manager.drop_worker, self._invite_command
            )
        live = self._node_context.siblings = None if member is None else LiveGroup(member)
        self.app = create_app(self._node_context, membership)
        self._set_address(self._options.server.host, listeners)
        if self._tls is not None:
            nursery.start_soon(self._tls.run)
            listeners = self._with_tls(listeners)
        app = self._behind_gateway(self.app)
        if member is not None and clients_gate is not None and live is not None:
            front = Front(app, member)
            orphaned = functools.partial(self._stop_orphaned, member, clients_gate)
            nursery.start_soon(member.run, front.answer_alone, self._on_notice, orphaned, live.answer)
            nursery.start_soon(live.run)
            app = front
        await nursery.start(self._serve_api, app, listeners)

    def _stop_orphaned(self, member: Member, clients_gate: Gate) -> None:
        """The supervisor has ended: listen no more, so that another group can take the ports, and end. Synchronous."""
        logger.warning(
            "the supervisor of this process has ended; this process finishes its requests and ends"
        )
        clients_gate.close()
        for listener in member.clients:
            listener.close()
        self.stop()

    async def _on_notice(self, notice: Notice) -> None:
        """Another process of this master has changed what all share: look at it. A checkpoint."""
        accounts = self._node_context.accounts
        if notice.kind == "keys" and accounts is not None:
            await accounts.load()
        elif notice.kind == "members" and self._tls is not None:
            await self._tls.reload()
        if notice.worker and self.worker_manager is not None:
            self.worker_manager.drop_worker(notice.worker, "the certificate of this worker was revoked")

    async def _open_tls(self, state_name: str | None) -> None:
        """Get the certificates of a node that keeps nothing else."""
        if self._options.server.has_tls:
            self._tls = await open_tls(self._options, self._open_state(state_name), self._own_names)

    def _with_tls(self, listeners: Listeners) -> Listeners:
        return (
            listeners if self._tls is None else with_tls(listeners, self._tls.api_context, _plain_http_reply)
        )

    async def _serve_api(self, app: App, listeners: Listeners, *, task_status: trio.TaskStatus[None]) -> None:
        await self._serve_http(app, listeners, self._api_may_end.wait, task_status=task_status)
        self._api_ended.set()

    async def _serve_http(
        self,
        app: App,
        listeners: Listeners,
        shutdown_trigger: Callable[[], Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Serve an application with the HTTP server that the options name."""
        serve: Callable[..., Awaitable[None]] = functools.partial(
            serve_http, render_refusal=RefusedRequests(self._options).render
        )
        if self._options.server.http == "hypercorn":
            serve = serve_with_hypercorn
        await serve(
            app,
            listeners,
            shutdown_trigger=shutdown_trigger,
            grace=CLOSE_TIMEOUT,
            retirement=self._retirement,
            task_status=task_status,
        )

    def _behind_gateway(self, app: QuartTrio) -> App:
        # Quart's type of an ASGI application is narrower than the one that the gateway and the HTTP server use.
        return cast("App", put_gateway_in_front(app, self._node_context))

    async def _end_api(self, nursery: trio.Nursery, hand_over: HandOver | None = None) -> None:
        """Stop the HTTP server, and then everything else that runs in the nursery."""
        self._api_may_end.set()
        # The server gives its connections CLOSE_TIMEOUT to end (`grace`), and then cancels them. Twice as long is
        # enough for both, and for the application's `after_serving` functions; more is not waited for.
        with trio.move_on_after(2 * CLOSE_TIMEOUT):
            await self._api_ended.wait()
        if hand_over is not None:
            await hand_over.flush()
        nursery.cancel_scope.cancel(reason="the server was stopped")

    async def _open_listen_address(self) -> Listeners:
        if self._listen_address is None:
            return []
        listeners = await self._network.listen(*self._listen_address)
        self._set_address(self._listen_address[0], listeners)
        return listeners

    async def _serve_listen_address(self, listeners: Listeners) -> None:
        """Serve the own API of a worker on its listen address, wherever :meth:`listen_on` moves it."""
        while True:
            self._listen_changed = trio.Event()
            async with trio.open_nursery() as nursery:
                if listeners:
                    app = self._behind_gateway(create_app(self._node_context))
                    await nursery.start(self._serve_http, app, self._with_tls(listeners), trio.sleep_forever)
                    logger.info("serving this worker's own API", extra={"fields": {"url": self.url}})
                await self._listen_changed.wait()
                nursery.cancel_scope.cancel(reason="the listen address was changed")
            self.url = self.port = None
            try:
                listeners = await self._open_listen_address()
            except ClusterPortError as error:
                logger.error("cannot serve this worker's own API: %s", error)
                listeners = []

    def _own_names(self) -> list[str]:
        """Return what a certificate of this node's own is for. Blocks."""
        server, internal_host = self._options.server, self._options.internal_host
        return own_names(server.host, [*server.tls_names, *([internal_host] if internal_host else [])])

    def _outward_addresses(self) -> list[str]:
        """Return where workers on other machines reach the API, most likely first. Synchronous."""
        server = self._options.server
        assert self.port is not None
        hosts = [*server.tls_names, outward_address() if server.host in ("0.0.0.0", "::") else server.host]
        return [shown_address(host, self.port) for host in dict.fromkeys(hosts)]

    def _invite_command(self) -> str:
        """Return the command that makes an invitation on this machine. Synchronous."""
        return f"trio-cluster invite {self.url}"

    def _set_address(self, host: str, listeners: Listeners) -> None:
        self.port = port_of(listeners)
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://{shown_address(local_address(host), self.port)}"

    def _drain_worker(self, name: str) -> WorkerStatus | None:
        manager = self.worker_manager
        return None if manager is None else manager.drain_worker(name, "requested by an operator")

    def _on_demand_status(self) -> OnDemandStatus | UnsetType:
        on_demand = self._pool.on_demand
        if not on_demand.by_model:
            return UNSET
        schedule = on_demand.schedule
        return OnDemandStatus(
            memory=None if math.isinf(schedule.budget) else int(schedule.budget),
            reserved=int(schedule.reserved),
            models={
                model: ResidentStatus(
                    name=tenancy.resident.name,
                    state=tenancy.resident.state,
                    memory=int(tenancy.resident.reserved),
                    start_seconds=tenancy.resident.start_seconds,
                    answering=tenancy.resident.answering,
                    waiting=schedule.waiting_for(tenancy.resident),
                    why=tenancy.resident.why if tenancy.resident.state == "failed" else "",
                )
                for model, tenancy in sorted(on_demand.by_model.items())
            },
        )

    def _open_control(self, backend: Backend, request: Request) -> Call:
        return backend.open(request) if backend.name != LOCAL else open_control(self._pool, request)

    def _status(self) -> NodeStatus:
        manager, client, pool = self.worker_manager, self.worker_client, self._pool
        return NodeStatus(
            version=__version__,
            slots=SlotStatus(pool.running, pool.waiting, pool.capacity, most_waiting(pool.waiting_by)),
            workers=[] if manager is None else manager.status(),
            masters=self._masters(),
            connected=UNSET if client is None else client.connected,
            rejected_models=UNSET if client is None else dict(client.rejected_models),
            on_demand=self._on_demand_status(),
            sleeping=[] if manager is None else manager.sleeping(),
        )

    def _masters(self) -> list[MasterStatus] | UnsetType:
        if self.worker_client is not None:
            return self.worker_client.status()
        return UNSET if self.worker_manager is None else self.worker_manager.other_masters()

    def _gauges(self) -> list[GaugeSample]:
        pool, manager = self._pool, self.worker_manager
        gauges = [
            GaugeSample("slots_running", "Handlers that run in this process.", pool.running),
            GaugeSample("slots_waiting", "Calls that wait for a slot of this process.", pool.waiting),
            GaugeSample(
                "slots_waiting_principals",
                "Principals of which calls wait for a slot of this process.",
                len(pool.waiting_by),
            ),
            GaugeSample("slots_capacity", "Handlers that may run in this process at once.", pool.capacity),
        ]
        if manager is not None:
            gauges.append(GaugeSample("workers", "Workers that are connected.", len(manager.workers)))
            ejected = Counter(replica.node for replica in self._router.ejections.status())
            for worker in manager.workers.values():
                gauges += _worker_gauges(worker, ejected[worker.name])
        return gauges


def _worker_gauges(worker: RemoteWorker, ejected: int) -> list[GaugeSample]:
    labels = {"worker": worker.name}
    samples: list[tuple[str, str, float]] = [
        ("worker_in_flight", "Calls that are forwarded to a worker.", worker.in_flight),
        ("worker_running", "Handlers that run on a worker, as of its last heartbeat.", worker.running),
        (
            "worker_waiting",
            "Calls that wait for a slot on a worker, as of its last heartbeat.",
            worker.waiting,
        ),
        ("worker_capacity", "Handlers that may run on a worker at once.", worker.capacity),
        ("worker_lag_seconds", "The longest time that a worker's event loop was blocked lately.", worker.lag),
    ]
    about = "Models of which a worker's replica is left alone for a while, since it keeps failing."
    samples.append(("worker_ejected", about, ejected))
    states = [
        GaugeSample(
            "worker_state",
            "1 for the current state of a worker, 0 for the others.",
            worker.state == state,
            labels | {"state": state},
        )
        for state in WORKER_STATES
    ]
    return [GaugeSample(name, about, value, labels) for name, about, value in samples] + states


def _plain_http_reply() -> bytes:
    refusal = HttpRefusal(400, TLS_REQUIRED)
    headers, body = render_refusal(refusal)
    return refusal_response(refusal.status, headers, body)


def _new_id() -> str:
    """Return a name that shows people which process it is, and that no other process has."""
    return f"{socket.gethostname()}-{os.getpid()}-{randomness.token(3)}"
