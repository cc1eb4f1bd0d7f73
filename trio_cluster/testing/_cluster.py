"""A whole cluster in one process: real nodes, on a simulated network.

The nodes are :class:`~trio_cluster.ClusterServer` objects that run as they do everywhere; only their network is
replaced (see ``_network``). Under trio's mock clock minutes of silence, timeouts and reconnections take milliseconds,
and every fault happens exactly when the test says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import attrs
import trio

from ..gateway.auth import Authenticator
from ..net.sockets import Network
from ..options import ClusterServerOptions, ServerOptions
from ..server import ClusterServer
from ._client import SimulatedClient, StreamingResponse
from ._clock import threads_hold_clock, virtual_time_shown
from ._deprecation import warn_renamed
from ._network import Connection, SimulatedNetwork
from ._seed import seeded

__all__ = ["PORT", "SimulatedCluster", "SimulatedNode", "open_cluster", "worker"]

#: Where the simulated master listens.
PORT = 8080


class SimulatedNode:
    """A process of the cluster, and the faults that can be injected into it.

    Attributes:
        name: the name of its machine, and of the worker.
        server: the server that runs in it.
        error: the exception that ended it, if there was one.
        over: set when the process has ended.
        task: the task that all other tasks of the process descend from; ``None`` until it runs.
    """

    def __init__(self, cluster: SimulatedCluster, name: str, server: ClusterServer) -> None:
        self.name = name
        self.server = server
        self.error: Exception | None = None
        self.over = trio.Event()
        self.task: trio.lowlevel.Task | None = None
        self._cluster = cluster
        self._scope = trio.CancelScope()

    def kill(self) -> None:
        """End it as ``kill -9`` does: without a close handshake; the kernel closes its connections. Synchronous.

        Unlike those of a real process, its ``finally`` blocks do run; but nothing that they send leaves the machine.
        """
        self._cluster.network.thaw(self.name)
        self._cluster.network.unplug(self.name)
        self._scope.cancel(reason="killed")

    def freeze(self) -> None:
        """Freeze it as ``SIGSTOP`` does, as far as other machines can see: silence, open connections. Synchronous."""
        self._cluster.network.freeze(self.name)

    def thaw(self) -> None:
        """Resume it, as ``SIGCONT`` does. Synchronous."""
        self._cluster.network.thaw(self.name)

    def stop(self) -> None:
        """Ask it to drain and stop, as ``SIGTERM`` does. Synchronous; ``over`` is set when it has ended."""
        self.server.stop()

    @property
    def link(self) -> Connection:
        """The newest connection between this worker and a master."""
        connections = self._cluster.network.connections_of(self.name)
        return next(each for each in reversed(connections) if each.client == self.name)

    def link_to(self, master: str) -> Connection:
        """Return the newest connection between this worker and the master of this name."""
        connections = self._cluster.network.connections_of(self.name)
        return next(
            each for each in reversed(connections) if (each.client, each.server) == (self.name, master)
        )

    async def run(self, run: Callable[..., Any], *args: Any, task_status: trio.TaskStatus[Any]) -> None:
        """Run the process until it ends. Never raises what ended it; see :attr:`error`."""
        self.task = trio.lowlevel.current_task()
        try:
            with self._scope:
                await run(*args, task_status=task_status)
        except Exception as error:
            self.error = error
        finally:
            self.over.set()


class SimulatedCluster:
    """Masters, workers and clients. Created by :func:`open_cluster`, with one master.

    Attributes:
        network: the network that connects them.
        options: the master's options.
        authenticator: determines who sends a request to a master that :meth:`start_master` makes; ``None``: the API
            key of the options is required.
        masters: the current masters, by name.
        workers: the current workers, by name.
        past: nodes that have been replaced by others.
        responses: every response that has begun, of all clients that :meth:`client` has returned.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        network: SimulatedNetwork,
        options: ClusterServerOptions,
        above: Callable[[Network], Network],
    ) -> None:
        self.network = network
        self._above = above
        self.options = options
        self.authenticator: Authenticator | None = None
        self.masters: dict[str, SimulatedNode] = {}
        self.workers: dict[str, SimulatedNode] = {}
        self.past: list[SimulatedNode] = []
        self.responses: list[StreamingResponse] = []
        self._nursery = nursery

    @property
    def answers(self) -> list[StreamingResponse]:
        """Deprecated, the former name of ``responses``."""
        warn_renamed("SimulatedCluster.answers", "SimulatedCluster.responses")
        return self.responses

    @property
    def master(self) -> SimulatedNode:
        """The current master; of several, the one that was opened with the cluster."""
        return self.masters["master"]

    @property
    def nodes(self) -> list[SimulatedNode]:
        """All current nodes, including ended ones that were not replaced."""
        return [*self.masters.values(), *self.workers.values()]

    def network_of(self, name: str) -> Network:
        """Return the network as the node or client of this name uses it. Synchronous."""
        return self._above(self.network.host(name))

    async def start_master(
        self, server: ClusterServer | None = None, *, name: str = "master", take_over: bool = False
    ) -> SimulatedNode:
        """Start a master, and wait until it serves. It replaces one of that name that has ended. A checkpoint.

        Args:
            server: with its models; without it, the master has no models. It is given the simulated network.
            name: of its machine. Workers that are started afterwards have a link to each master that has been started.
            take_over: take the place of the master that runs there, which finishes its answers and ends. If that is not
                possible, it stays the master of this name. To kill or freeze one of the two concerns both.

        Returns:
            The node.

        Raises:
            ClusterError: it has ended before it served.
        """
        if server is None:
            of_server = attrs.evolve(self.options.server, worker_id=name)
            server = ClusterServer(
                self.options if name == "master" else attrs.evolve(self.options, server=of_server)
            )
            server.authenticator = self.authenticator
        server.network = self.network_of(name)
        node = SimulatedNode(self, name, server)
        if take_over:
            try:
                await self._start(
                    node, partial(node.run, partial(server.run_as_master, PORT, take_over=True))
                )
            except BaseException:
                self.past.append(node)
                raise
        if name in self.masters:
            self.past.append(self.masters[name])
        self.masters[name] = node
        if not take_over:
            await self._start(node, partial(node.run, server.run_as_master, PORT))
        return node

    async def start_worker(self, server: ClusterServer, *, wait: bool = True) -> SimulatedNode:
        """Start a worker; its name is its ``worker_id``. It replaces one of that name that has ended.

        A checkpoint, unless ``wait`` is false.

        Args:
            server: with its models. It is given the simulated network.
            wait: wait until a master has registered it.

        Returns:
            The node.

        Raises:
            ClusterError: it has ended before it was registered, for instance because the master refused it.
            ValueError: the server has no ``worker_id``.
        """
        name = server.options.server.worker_id
        if name is None:
            raise ValueError("a simulated worker needs a worker_id")
        server.network = self.network_of(name)
        node = SimulatedNode(self, name, server)
        if name in self.workers:
            self.past.append(self.workers[name])
        self.workers[name] = node
        masters = [(master, PORT + 1000) for master in self.masters]
        run = partial(node.run, partial(server.run_as_worker, masters=masters))
        if wait:
            await self._start(node, run)
        else:
            # Not `start`: a worker that ends before it was registered must not end the cluster.
            self._nursery.start_soon(partial(run, task_status=trio.TASK_STATUS_IGNORED))
        return node

    async def _start(self, node: SimulatedNode, run: Callable[..., Any]) -> None:
        try:
            await self._nursery.start(run)
        except RuntimeError:
            # It ended before it had started. Its own error says why; the nursery's only says that it did.
            raise node.error if node.error is not None else RuntimeError(f"{node.name} was stopped") from None

    def client(self, name: str = "client", *, of: str = "master", **headers: str) -> SimulatedClient:
        """Return a client of a master. Synchronous.

        Args:
            name: of the machine that it runs on.
            of: of the master's machine.
            headers: sent with every request.
        """
        return SimulatedClient(self.network_of(name), of, PORT, headers, self.responses.append)


def worker(name: str, **options: Any) -> ClusterServer:
    """Return a server to be started as a simulated worker, on which models can be registered. Synchronous.

    Args:
        name: the worker's id.
        options: fields of ``ServerOptions`` and ``ClusterServerOptions``, mixed.
    """
    return ClusterServer(_options(options | {"worker_id": name}))


def open_cluster(
    *,
    latency: float = 0.0,
    fast_path: bool = True,
    seed: int | None = None,
    above: Callable[[Network], Network] = lambda network: network,
    authenticator: Authenticator | None = None,
    **options: Any,
) -> AbstractAsyncContextManager[SimulatedCluster]:
    """Open a cluster with a master that has no models, and no workers. The end of the block closes it, by force.

    Inside the block a mock clock does not jump while the thread of a handler computes; otherwise all other tasks would
    see that as minutes of silence.

    Args:
        latency: seconds that everything takes on the network, one way.
        fast_path: let tokens be written to their client in the task that receives them; see
            :class:`SimulatedNetwork`. Its former name, ``short_way``, is deprecated.
        seed: make the run reproducible; see :func:`seeded`.
        above: called with the network of each node and client; returns what it uses in its place, for instance one
            with TLS on each connection.
        authenticator: determines who sends a request, and which limits the sender has; ``None``: the API key of the
            options is required, if there is one.
        options: the master's, fields of ``ServerOptions`` and ``ClusterServerOptions`` mixed. ``batch_wait`` is 0 if
            it is not given.

    Returns:
        A context manager that gives the :class:`SimulatedCluster`. Entering it is a checkpoint, and raises a
        ``RuntimeError`` if there is a ``seed`` and this version of trio cannot be seeded.
    """
    if "short_way" in options:
        warn_renamed("open_cluster(short_way=...)", "fast_path=")
        fast_path = options.pop("short_way")
    return _opened(latency, fast_path, seed, above, authenticator, options)


@asynccontextmanager
async def _opened(
    latency: float,
    fast_path: bool,
    seed: int | None,
    above: Callable[[Network], Network],
    authenticator: Authenticator | None,
    options: dict[str, Any],
) -> AsyncIterator[SimulatedCluster]:
    failure: Exception | None = None
    with threads_hold_clock(), virtual_time_shown(), nullcontext() if seed is None else seeded(seed):
        async with trio.open_nursery() as nursery:
            # The default name would contain the number of this process, which is not reproducible.
            master = _options({"worker_id": "master"} | options)
            cluster = SimulatedCluster(nursery, SimulatedNetwork(latency, fast_path=fast_path), master, above)
            cluster.authenticator = authenticator
            await cluster.start_master()
            try:
                yield cluster
            except Exception as error:
                # Nothing else in this nursery raises, so the error of the block needs no group around it.
                failure = error
            nursery.cancel_scope.cancel(reason="the cluster was closed")
    if failure is not None:
        raise failure


def _options(options: dict[str, Any]) -> ClusterServerOptions:
    # Without the millisecond for which a token may wait for others, times in tests are round numbers.
    options = {"batch_wait": 0.0} | options
    of_server = {field.name for field in attrs.fields(ServerOptions)}
    server = ServerOptions(**{name: value for name, value in options.items() if name in of_server})
    rest = {name: value for name, value in options.items() if name not in of_server}
    return ClusterServerOptions(server=server, **rest)
