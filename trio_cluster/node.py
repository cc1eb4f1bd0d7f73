"""What a process is while it runs: a master, a worker or a standalone server, in one nursery.

A node is made for one run and thrown away with it, so nothing of a run can be left over for the next. What outlives
runs (the models, the options) is given to it.

Stopping. Cancelling whoever serves a node is always valid, and quick: handlers are cancelled, streams are cut, links
are dropped. :meth:`Node.stop` is the graceful way, in this order: new requests are refused (503 and ``Retry-After``),
those that run may finish for ``drain_timeout`` seconds, what is left is cancelled, which gives its clients an error,
and then everything is closed.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import trio
from msgspec import UNSET

from ._version import __version__
from .admin.app import create_app, put_gateway_in_front
from .cluster.master import WorkerManager
from .cluster.model_memory import ModelMemory
from .cluster.worker import WorkerClient
from .core import randomness
from .core.limits import CLOSE_TIMEOUT
from .core.log_context import MOST_IDS
from .core.state_dir import StateDir, StateDirError, default_state_dir
from .core.status import WORKER_STATES, NodeStatus, SlotStatus, WorkerStatus
from .errors import ClusterPortError, HandshakeRefused
from .gateway.node_context import GaugeSample, NodeContext
from .gateway.response import render_refusal
from .http1.asgi import App
from .http1.server import serve_http
from .local.pool import HandlerPool
from .net.sockets import Listeners, Network, local_address, port_of, shown_address
from .options import ClusterMode, ClusterServerOptions
from .routing.router import Router

if TYPE_CHECKING:
    from quart_trio import QuartTrio

__all__ = ["Node"]

logger = logging.getLogger("trio_cluster.node")


class Node:
    """One run of a server.

    Args:
        mode: which part it plays; the ``serve_as_*`` method of that name is to be called, once.
        options: read at the time of use.
        router: the models of this process, and on a master those of its workers.
        pool: where this process's handlers run.
        network: where it listens and connects.

    Attributes:
        url, port: where the API of this process is reached; ``None`` where there is none.
        internal_port: where a master takes workers.
        app: the Quart-trio application of a master or standalone server.
        worker_manager: a master's workers.
        worker_client: a worker's link to its master.
    """

    def __init__(
        self,
        mode: ClusterMode,
        options: ClusterServerOptions,
        router: Router,
        pool: HandlerPool,
        network: Network,
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
        self._network = network
        self._asked_to_stop = trio.Event()
        self._api_may_end = trio.Event()
        self._api_ended = trio.Event()
        self._listen_address: tuple[str, int] | None = None
        self._listen_changed = trio.Event()
        self._id = options.server.worker_id or _new_id()
        router.accept()
        self._node_context = NodeContext(
            router=router,
            options=options,
            node_id=self._id,
            mode=str(mode),
            status=self._status,
            gauges=self._gauges,
            drain_worker=self._drain_worker,
        )

    def stop(self) -> None:
        """Ask for a graceful stop. Idempotent."""
        self._asked_to_stop.set()

    def listen_on(self, address: tuple[str, int] | None) -> None:
        """Serve a worker's own API there from now on; ``None``: nowhere."""
        self._listen_address = address
        self._listen_changed.set()

    async def serve_as_standalone(self, listeners: Listeners, started: Callable[[], None]) -> None:
        """Serve the API until stopped.

        Args:
            listeners: listening; closed with the run.
            started: called when everything answers.
        """
        async with trio.open_nursery() as nursery:
            await nursery.start(self._pool.serve)
            await self._start_api(nursery, listeners)
            started()
            await self._asked_to_stop.wait()
            await self._drain("the server is being stopped", self._node_context.wait_answered)
            await self._end_api(nursery)

    async def serve_as_master(
        self,
        listeners: Listeners,
        internal_listeners: Listeners,
        started: Callable[[], None],
        *,
        state_name: str | None = None,
    ) -> None:
        """Serve the API, and take workers, until stopped; see :meth:`serve_as_standalone`.

        Args:
            listeners, started: see there.
            internal_listeners: where workers connect; closed with the run.
            state_name: the name of the state directory, if the options have none; ``None``: then there is none.

        Raises:
            StateDirError: the state directory that the options name cannot be used.
        """
        memory = self._model_memory(state_name)
        manager = WorkerManager(self._router.catalog, self._options, self._id)
        self.worker_manager = manager
        self.internal_port = port_of(internal_listeners)
        async with trio.open_nursery() as nursery:
            if memory is not None:
                nursery.start_soon(memory.run)
            await nursery.start(self._pool.serve)
            await nursery.start(manager.serve, internal_listeners)
            await self._start_api(nursery, listeners)
            started()
            await self._asked_to_stop.wait()
            manager.drain("the master is being stopped")
            await self._drain("the server is being stopped", self._node_context.wait_answered)
            await manager.close_all("the master was stopped")
            await self._end_api(nursery)

    def _model_memory(self, name: str | None) -> ModelMemory | None:
        """Return the memory of models, with what is remembered restored; ``None`` if there is no place for it."""
        given = self._options.state_dir
        if given is None and name is None:
            return None
        try:
            path = default_state_dir(os.environ, name or "") if given is None else Path(given).expanduser()
            memory = ModelMemory(self._router.catalog, StateDir(path))
            memory.restore()
            memory.save()
        except StateDirError as error:
            if given is not None:
                raise
            logger.warning("the names of models will not survive a restart: %s", error)
            return None
        return memory

    async def serve_as_worker(self, host: str, port: int, started: Callable[[], None]) -> None:
        """Serve a master until stopped.

        Args:
            host, port: the master's internal address.
            started: called when the models are registered for the first time.

        Raises:
            HandshakeRefused: there is no master that would have this worker.
            ClusterPortError: the worker's own listen address cannot be had.
        """
        client = WorkerClient(self._router, self._pool, self._options, self._id, self._on_shutdown_request)
        self.worker_client = client
        listeners = await self._open_listen_address()
        refused: HandshakeRefused | None = None
        visit = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._pool.serve)
            nursery.start_soon(self._serve_listen_address, listeners)
            nursery.start_soon(self._stop_worker, client, visit)
            with visit:
                try:
                    await client.run(functools.partial(self._network.connect, host, port), host, started)
                except HandshakeRefused as error:
                    refused = error
            nursery.cancel_scope.cancel(reason="the worker was stopped")
        if refused is not None:
            raise refused

    def _on_shutdown_request(self, reason: str) -> None:
        logger.info("the master asks this worker to stop: %s", reason)
        self.stop()

    async def _stop_worker(self, client: WorkerClient, visit: trio.CancelScope) -> None:
        await self._asked_to_stop.wait()
        reason = "the worker was stopped"
        client.drain("the worker is being stopped")
        await self._drain("the worker is being stopped", client.wait_sent)
        if client.connected:
            client.close(reason)
            await trio.sleep(CLOSE_TIMEOUT)
        visit.cancel(reason=reason)

    async def _drain(self, reason: str, wait_delivered: Callable[[], Awaitable[None]]) -> None:
        """Refuse new calls, let those that run finish, and cancel what is left when the time for that is over.

        A call has finished for whoever asked when its answer has left this node; its work may have ended long before
        a slow client has taken all of that.
        """
        self._router.drain("The server is shutting down; try again shortly")
        with trio.move_on_after(self._options.drain_timeout):
            await self._router.wait_idle()
            await wait_delivered()
            return
        left = [call.request.request_id for call in self._router.live]
        fields = {"calls": len(left), "request_ids": left[:MOST_IDS]}
        logger.warning("cancelling what did not finish in time", extra={"fields": fields})
        self._router.cancel_all(reason)
        # Their clients are still to be told, and the work to stop; who ignores that is left behind.
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._router.wait_idle()
            await wait_delivered()

    async def _start_api(self, nursery: trio.Nursery, listeners: Listeners) -> None:
        self.app = create_app(self._node_context)
        self._set_address(self._options.server.host, listeners)
        await nursery.start(self._serve_api, self._gated(self.app), listeners)

    async def _serve_api(self, app: App, listeners: Listeners, *, task_status: trio.TaskStatus[None]) -> None:
        await serve_http(
            app,
            listeners,
            render_refusal=render_refusal,
            shutdown_trigger=self._api_may_end.wait,
            grace=CLOSE_TIMEOUT,
            task_status=task_status,
        )
        self._api_ended.set()

    def _gated(self, app: QuartTrio) -> App:
        # Quart's own description of ASGI is narrower than the one that a gate and a server need.
        return cast("App", put_gateway_in_front(app, self._node_context))

    async def _end_api(self, nursery: trio.Nursery) -> None:
        self._api_may_end.set()
        with trio.move_on_after(2 * CLOSE_TIMEOUT):
            await self._api_ended.wait()
        nursery.cancel_scope.cancel(reason="the server was stopped")

    async def _open_listen_address(self) -> Listeners:
        if self._listen_address is None:
            return []
        listeners = await self._network.listen(*self._listen_address)
        self._set_address(self._listen_address[0], listeners)
        return listeners

    async def _serve_listen_address(self, listeners: Listeners) -> None:
        """Serve a worker's own API, wherever it is wanted at the moment."""
        while True:
            self._listen_changed = trio.Event()
            async with trio.open_nursery() as nursery:
                if listeners:
                    app = self._gated(create_app(self._node_context))
                    await nursery.start(
                        functools.partial(
                            serve_http,
                            app,
                            listeners,
                            render_refusal=render_refusal,
                            shutdown_trigger=trio.sleep_forever,
                            grace=CLOSE_TIMEOUT,
                        )
                    )
                    logger.info("this worker's own API", extra={"fields": {"url": self.url}})
                await self._listen_changed.wait()
                nursery.cancel_scope.cancel(reason="another listen address was asked for")
            self.url = self.port = None
            try:
                listeners = await self._open_listen_address()
            except ClusterPortError as error:
                logger.error("no API of this worker's own: %s", error)
                listeners = []

    def _set_address(self, host: str, listeners: Listeners) -> None:
        self.port = port_of(listeners)
        self.url = f"http://{shown_address(local_address(host), self.port)}"

    def _drain_worker(self, name: str) -> WorkerStatus | None:
        manager = self.worker_manager
        return None if manager is None else manager.drain_worker(name, "an operator asked for it")

    def _status(self) -> NodeStatus:
        manager, client, pool = self.worker_manager, self.worker_client, self._pool
        return NodeStatus(
            version=__version__,
            slots=SlotStatus(pool.running, pool.waiting, pool.capacity),
            workers=[] if manager is None else manager.status(),
            connected=UNSET if client is None else client.connected,
            rejected_models=UNSET if client is None else dict(client.rejected_models),
        )

    def _gauges(self) -> list[GaugeSample]:
        pool, manager = self._pool, self.worker_manager
        gauges = [
            GaugeSample("slots_running", "Handlers of this process that run.", pool.running),
            GaugeSample("slots_waiting", "Calls that wait for a slot of this process.", pool.waiting),
            GaugeSample("slots_capacity", "Handlers of this process that may run at once.", pool.capacity),
        ]
        if manager is not None:
            gauges.append(GaugeSample("workers", "Workers that are connected.", len(manager.workers)))
            for worker in manager.workers.values():
                labels = {"worker": worker.name}
                gauges += [
                    GaugeSample("worker_in_flight", "Calls forwarded to a worker.", worker.in_flight, labels),
                    GaugeSample(
                        "worker_running", "Handlers that a worker says it runs.", worker.running, labels
                    ),
                    GaugeSample(
                        "worker_waiting", "Calls that a worker says wait there.", worker.waiting, labels
                    ),
                    GaugeSample(
                        "worker_capacity", "Handlers a worker runs at once.", worker.capacity, labels
                    ),
                    GaugeSample(
                        "worker_lag_seconds", "How late a worker's event loop was.", worker.lag, labels
                    ),
                ]
                gauges += [
                    GaugeSample(
                        "worker_state",
                        "1 for the state in which a worker is.",
                        worker.state == state,
                        labels | {"state": state},
                    )
                    for state in WORKER_STATES
                ]
        return gauges


def _new_id() -> str:
    """Return a name that tells a person which process it is, and that no other process has."""
    return f"{socket.gethostname()}-{os.getpid()}-{randomness.token(3)}"
