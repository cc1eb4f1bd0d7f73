"""A whole cluster in one process: real nodes, on a network of memory.

The nodes are :class:`~trio_cluster.ClusterServer` objects that run as they do everywhere; only their network is
another one (see ``_network``). Under trio's mock clock minutes of silence, timeouts and reconnections take
milliseconds, and every fault happens exactly when the test says.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import trio

from ..options import ClusterServerOptions, ServerOptions
from ..server import ClusterServer
from ._client import SimulatedClient, StreamingAnswer
from ._clock import threads_hold_clock
from ._network import Connection, SimulatedNetwork
from ._seed import seeded

__all__ = ["SimulatedCluster", "SimulatedNode", "open_cluster"]

#: Where the simulated master listens.
PORT = 8080


class SimulatedNode:
    """A process of the cluster, and what can happen to it.

    Attributes:
        name: the name of its machine, and of the worker.
        server: what runs there.
        error: what ended it, if it was not asked to end.
        over: set when the process has ended.
        task: the task that everything of the process runs in.
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
        """End it as ``kill -9`` does: no goodbye, its connections closed by the kernel.

        What a simulation cannot do is keep the ``finally`` blocks of the dead process from running; but nothing that
        they say gets out.
        """
        self._cluster.network.thaw(self.name)
        self._cluster.network.unplug(self.name)
        self._scope.cancel(reason="killed")

    def freeze(self) -> None:
        """Stop it as ``SIGSTOP`` does, as far as anybody else can see."""
        self._cluster.network.freeze(self.name)

    def thaw(self) -> None:
        """Let it go on, as ``SIGCONT`` does."""
        self._cluster.network.thaw(self.name)

    def stop(self) -> None:
        """Ask it to stop gracefully, as ``SIGTERM`` does."""
        self.server.stop()

    @property
    def link(self) -> Connection:
        """The newest connection between this worker and its master."""
        return [each for each in self._cluster.network.connections_of(self.name) if each.client == self.name][
            -1
        ]

    async def run(self, run: Callable[..., Any], *args: Any, task_status: trio.TaskStatus[Any]) -> None:
        """Be the process."""
        self.task = trio.lowlevel.current_task()
        try:
            with self._scope:
                await run(*args, task_status=task_status)
        except Exception as error:
            self.error = error
        finally:
            self.over.set()


class SimulatedCluster:
    """A master, workers and clients. Made by :func:`open_cluster`.

    Attributes:
        network: what is between them.
        master: the current master.
        workers: the current workers, by name.
        past: nodes whose place has been taken by others.
        answers: what its clients have received so far, one for each answer that has begun.
    """

    master: SimulatedNode

    def __init__(
        self, nursery: trio.Nursery, network: SimulatedNetwork, options: ClusterServerOptions
    ) -> None:
        self.network = network
        self.options = options
        self.workers: dict[str, SimulatedNode] = {}
        self.past: list[SimulatedNode] = []
        self.answers: list[StreamingAnswer] = []
        self._nursery = nursery

    @property
    def nodes(self) -> list[SimulatedNode]:
        """All nodes, dead ones that were not replaced included."""
        return [self.master, *self.workers.values()]

    async def start_master(self, server: ClusterServer | None = None) -> SimulatedNode:
        """Start a master, and wait until it serves. It takes the place of one that is over.

        Args:
            server: with models of its own; without it, it has none. Its network becomes the simulated one.
        """
        if server is None:
            server = ClusterServer(self.options)
        server.network = self.network.host("master")
        if hasattr(self, "master"):
            self.past.append(self.master)
        self.master = SimulatedNode(self, "master", server)
        await self._start(self.master, partial(self.master.run, server.run_as_master, PORT))
        return self.master

    async def start_worker(self, server: ClusterServer, *, wait: bool = True) -> SimulatedNode:
        """Start a worker; its name is its ``worker_id``. It takes the place of one of that name that is over.

        Args:
            server: with its models. Its network becomes the simulated one.
            wait: wait until the master has registered it.

        Raises:
            ClusterError: it has ended before it was registered, for instance because the master would not have it.
        """
        name = server.options.server.worker_id
        if name is None:
            raise ValueError("a simulated worker needs a worker_id")
        server.network = self.network.host(name)
        node = SimulatedNode(self, name, server)
        if name in self.workers:
            self.past.append(self.workers[name])
        self.workers[name] = node
        run = partial(node.run, server.run_as_worker, "master", PORT + 1000)
        if wait:
            await self._start(node, run)
        else:
            # Not `start`: one that ends before it was ever registered is no reason for the cluster to fail.
            self._nursery.start_soon(partial(run, task_status=trio.TASK_STATUS_IGNORED))
        return node

    async def _start(self, node: SimulatedNode, run: Callable[..., Any]) -> None:
        try:
            await self._nursery.start(run)
        except RuntimeError:
            # It has ended before it was started; why, it knows better than the nursery.
            raise node.error if node.error is not None else RuntimeError(f"{node.name} was stopped") from None

    def client(self, name: str = "client", **headers: str) -> SimulatedClient:
        """Return a client of the master on a machine of this name."""
        return SimulatedClient(self.network.host(name), "master", PORT, headers, self.answers.append)


def worker(name: str, **options: Any) -> ClusterServer:
    """Return a server to be a simulated worker, on which models can be registered.

    Args:
        name: the worker's id.
        options: fields of ``ServerOptions`` and ``ClusterServerOptions``, mixed.
    """
    return ClusterServer(_options(options | {"worker_id": name}))


@asynccontextmanager
async def open_cluster(
    *, latency: float = 0.0, short_way: bool = True, seed: int | None = None, **options: Any
) -> AsyncIterator[SimulatedCluster]:
    """Open a cluster with a master that has no models and no workers yet; close it in the end, by force.

    Inside of it a mock clock does not jump while the thread of a handler computes, which would look to everybody else
    as if that had taken minutes.

    Args:
        latency: seconds that everything takes on the network, one way.
        short_way: let tokens be written to their client where they come in; see :class:`SimulatedNetwork`.
        seed: take the same course each time; see :func:`seeded`.
        options: the master's, fields of ``ServerOptions`` and ``ClusterServerOptions`` mixed. ``batch_wait`` is 0 if
            it is not given.
    """
    failure: Exception | None = None
    with threads_hold_clock(), nullcontext() if seed is None else seeded(seed):
        async with trio.open_nursery() as nursery:
            # A name of its own would have the number of this process in it.
            master = _options({"worker_id": "master"} | options)
            cluster = SimulatedCluster(nursery, SimulatedNetwork(latency, short_way=short_way), master)
            await cluster.start_master()
            try:
                yield cluster
            except Exception as error:
                # Nobody else in this nursery raises anything, so there is no need for a group around it.
                failure = error
            nursery.cancel_scope.cancel(reason="the cluster was closed")
    if failure is not None:
        raise failure


def _options(options: dict[str, Any]) -> ClusterServerOptions:
    # Without the millisecond for which a token may wait for others, times in tests are round numbers.
    options = {"batch_wait": 0.0} | options
    ours = {field.name for field in ServerOptions.__attrs_attrs__}
    server = ServerOptions(**{name: value for name, value in options.items() if name in ours})
    rest = {name: value for name, value in options.items() if name not in ours}
    return ClusterServerOptions(server=server, **rest)
