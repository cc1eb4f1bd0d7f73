"""The server: one object for every part that a process may play.

``ClusterServer`` is what users hold. It keeps what outlives a run (the options, this process's models, the pool in
which their handlers run) and makes a :class:`~trio_cluster.node.Node` for each run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

from .cluster.master import WorkerManager
from .cluster.probe import is_master
from .cluster.worker import WorkerClient
from .core.model import ModelInfo
from .errors import ClusterPortError
from .local.pool import HandlerPool
from .net.sockets import INTERNAL_OFFSET, Listeners, Network, Sockets, close_all, local_address, open_pair
from .node import Node
from .options import ClusterMode, ClusterServerOptions, ServerOptions
from .registration import ModelCatalog
from .routing.router import Router

if TYPE_CHECKING:
    from quart_trio import QuartTrio

__all__ = ["ClusterServer"]

Started = trio.TaskStatus[ClusterMode]

#: A process that has just taken the port may not have its second one yet: ask again a few times.
_PROBE_TRIES: Final = 5
_PROBE_PAUSE: Final = 0.1
_PROBE_TIMEOUT: Final = 2.0


class ClusterServer(ModelCatalog):
    """A master, a worker or a standalone server, and the models that this process serves.

    Args:
        options: all of them, or only the port of the API. They are the server's from now on.

    Raises:
        TypeError: ``options`` is neither.
        OptionsError: the port is no port.

    Models may be registered before the server runs and while it runs. Apart from that, and from configuring it
    before, everything here is to be called from inside the trio run in which the server runs. Cancelling the task
    that runs it is always a valid way to stop it; afterwards it can run again, but not twice at a time.
    """

    def __init__(self, options: int | ClusterServerOptions | None = None) -> None:
        if options is None:
            options = ClusterServerOptions()
        elif isinstance(options, int) and not isinstance(options, bool):
            options = ClusterServerOptions(server=ServerOptions(port=options))
        elif not isinstance(options, ClusterServerOptions):
            raise TypeError(f"expected a port or ClusterServerOptions, got {options!r}")
        super().__init__(options)
        self._listen_address: tuple[str, int] | None = None
        self._network: Network = Sockets()
        self._node: Node | None = None

    # Configuration

    @property
    def options(self) -> ClusterServerOptions:
        """All options. Most of their fields may be assigned to while the server runs, and act at once."""
        return self._options

    @options.setter
    def options(self, options: ClusterServerOptions) -> None:
        if self._node is not None:
            raise RuntimeError("the options as a whole cannot be replaced while the server runs")
        self._replace_options(options)

    def set_max_concurrency(self, n: int) -> None:
        """Let this process's handlers run ``n`` requests at once, from now on."""
        self._options.server.max_concurrency = n
        self._pool.resize()

    def set_timeout(self, seconds: float) -> None:
        """Let handlers be silent for this long, in requests that come from now on."""
        self._options.server.default_timeout = seconds

    def set_api_key(self, key: str | None) -> None:
        """Want to be shown this key from now on; ``None``: no key."""
        self._options.server.api_key = key

    def set_worker_listen_address(self, host: str | None, port: int = 0) -> None:
        """Serve a worker's own models on an address of its own too, for debugging on one machine.

        Args:
            host: where to listen; ``None``: nowhere.
            port: 0 picks a free one; ``url`` tells which.
        """
        self._listen_address = None if host is None else (host, port)
        if self._node is not None:
            self._node.listen_on(self._listen_address)

    # State

    @property
    def is_running(self) -> bool:
        """Whether one of the ``run*`` methods is running."""
        return self._node is not None

    @property
    def mode(self) -> ClusterMode | None:
        """The part this server plays; ``None`` while it does not run."""
        return None if self._node is None else self._node.mode

    @property
    def url(self) -> str | None:
        """Where this process's API is reached from this machine; ``None`` while it serves none."""
        return None if self._node is None else self._node.url

    @property
    def port(self) -> int | None:
        """The port of this process's API; ``None`` while it serves none."""
        return None if self._node is None else self._node.port

    @property
    def internal_port(self) -> int | None:
        """The port on which a master takes workers; ``None`` in the other modes."""
        return None if self._node is None else self._node.internal_port

    @property
    def app(self) -> QuartTrio | None:
        """The Quart-trio application of a master or standalone server, to which routes can be added."""
        return None if self._node is None else self._node.app

    @property
    def registry(self) -> Router:
        """What can be asked here, the calls that are live, and the books about those that are over."""
        return self._registry

    @property
    def pool(self) -> HandlerPool:
        """The slots of this process and the tasks of its handlers."""
        return self._pool

    @property
    def worker_manager(self) -> WorkerManager | None:
        """A master's workers; ``None`` in the other modes."""
        return None if self._node is None else self._node.worker_manager

    @property
    def worker_client(self) -> WorkerClient | None:
        """A worker's link to its master; ``None`` in the other modes."""
        return None if self._node is None else self._node.worker_client

    def _announce(self, info: ModelInfo) -> None:
        if self.worker_client is not None:
            self.worker_client.announce(info)

    def _withdraw(self, name: str) -> None:
        if self.worker_client is not None:
            self.worker_client.withdraw(name)

    # Running

    def stop(self) -> None:
        """Ask for a graceful stop; the ``run*`` call returns when it is done.

        New requests are refused, running ones get ``drain_timeout`` seconds to finish, then they are cancelled.
        Does nothing while the server does not run.
        """
        if self._node is not None:
            self._node.stop()

    async def run(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Be the master if ``port`` is free, and a worker of the master that holds it if it is not.

        Args:
            port: the port of the API; without it, the one in the options, which is 8080 if nobody chose another.
            task_status: started with the mode once the server serves, or is registered.

        Returns:
            The mode in which it ran, after it was stopped.

        Raises:
            ClusterPortError: the port is held by something else than a trio_cluster master.
            HandshakeRefused: the master that holds it does not take this worker.
            RuntimeError: the server runs already.
        """
        if not self._options.enable_cluster:
            return await self.run_as_standalone(port, task_status=task_status)
        port = self._options.server.port if port is None else port
        for tries_left in reversed(range(_PROBE_TRIES)):
            try:
                external, internal = await self._open_pair(port)
            except ClusterPortError as error:
                # Any other port than the first one being taken is for a person to mend.
                if error.port != port or not error.taken:
                    raise
                refusal = error
            else:
                return await self._run_as_master(external, internal, task_status)
            host = local_address(self._options.internal_host or self._options.server.host)
            internal_port = self._options.internal_port or port + INTERNAL_OFFSET
            if await is_master(self._network, host, internal_port, _PROBE_TIMEOUT):
                return await self.run_as_worker(host, internal_port, task_status=task_status)
            if tries_left:
                await trio.sleep(_PROBE_PAUSE)
        raise ClusterPortError(
            port,
            f"held by something that is not a trio_cluster master (nothing answers as one on {internal_port})",
        ) from refusal

    async def run_as_master(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Serve the API on ``port`` and take workers on ``port + 1000``.

        Args:
            port: 0 picks a free pair of ports, still 1000 apart.
            task_status: started with the mode once it serves.

        Returns:
            ``ClusterMode.MASTER``, after it was stopped.

        Raises:
            ClusterPortError: a port cannot be had.
            RuntimeError: the server runs already.
        """
        external, internal = await self._open_pair(self._options.server.port if port is None else port)
        return await self._run_as_master(external, internal, task_status)

    async def run_as_worker(
        self, master_host: str, master_port: int, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Serve this process's models to a master, and come back to it for as long as this runs.

        Args:
            master_host: a name or an address.
            master_port: the master's internal port.
            task_status: started with the mode once the models are registered for the first time.

        Returns:
            ``ClusterMode.WORKER``, after it was stopped.

        Raises:
            HandshakeRefused: the master does not take this worker (wrong token, another protocol), or what is there
                is not a master. Everything that a retry may mend is retried instead.
            ClusterPortError: the worker's own listen address cannot be had.
            RuntimeError: the server runs already.
        """
        with self._node_for(ClusterMode.WORKER) as node:
            await node.serve_as_worker(master_host, master_port, lambda: task_status.started(node.mode))
        return ClusterMode.WORKER

    async def run_as_standalone(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Serve the API on ``port`` with this process's models only.

        Args:
            port: 0 picks a free one.
            task_status: started with the mode once it serves.

        Returns:
            ``ClusterMode.STANDALONE``, after it was stopped.

        Raises:
            ClusterPortError: the port cannot be had.
            RuntimeError: the server runs already.
        """
        with self._node_for(ClusterMode.STANDALONE) as node:
            host = self._options.server.host
            listeners = await self._network.listen(host, self._options.server.port if port is None else port)
            try:
                await node.serve_as_standalone(listeners, lambda: task_status.started(node.mode))
            finally:
                close_all(listeners)
        return ClusterMode.STANDALONE

    async def _run_as_master(
        self, external: Listeners, internal: Listeners, task_status: Started
    ) -> ClusterMode:
        try:
            with self._node_for(ClusterMode.MASTER) as node:
                await node.serve_as_master(external, internal, lambda: task_status.started(node.mode))
        finally:
            close_all([*external, *internal])
        return ClusterMode.MASTER

    async def _open_pair(self, port: int) -> tuple[Listeners, Listeners]:
        options = self._options
        internal_host = options.internal_host or options.server.host
        return await open_pair(self._network, options.server.host, port, internal_host, options.internal_port)

    @contextmanager
    def _node_for(self, mode: ClusterMode) -> Iterator[Node]:
        if self._node is not None:
            raise RuntimeError(f"the server runs already, as {self._node.mode}")
        self._node = Node(mode, self._options, self._registry, self._pool, self._network)
        self._node.listen_on(self._listen_address)
        try:
            yield self._node
        finally:
            self._node = None
