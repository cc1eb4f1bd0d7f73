"""Quiescence: what must be gone when no request is in progress, and the stats that must always balance.

A cluster is quiescent when there are no tasks of requests, no slots taken, no calls in any router or on any link,
nothing queued on any link, nothing reserved of the limits of any key, and no connection that only one of its ends still
holds open. Anything that is left then has outlived the request it was for: an orphan.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Final

import trio
from trio.testing import wait_all_tasks_blocked

from ..cluster.master import WorkerManager
from ..core.stats import CallStats
from ..gateway.cycle import RequestCycle
from ..http1.connection import Http1Connection
from ..protocol import MasterSession, WorkerSession
from ..routing.backend import LOCAL
from ..routing.router import Router
from ._cluster import SimulatedCluster, SimulatedNode

__all__ = ["OrphansLeft", "assert_no_orphans", "assert_stats_balance", "settle"]

#: A task that serves a connection has one of these in its stack: a client's connection, or a worker's.
_SERVES_CONNECTION: Final = frozenset({Http1Connection.serve.__code__, WorkerManager.serve_stream.__code__})
#: A task that serves an HTTP request has this in its stack, whatever serves the request.
_SERVES_REQUEST: Final = frozenset({RequestCycle.run.__code__})

#: Seconds between two checks, at most.
_POLL_INTERVAL: Final = 1.0


class OrphansLeft(AssertionError):
    """Something has outlived the request that it was for, or the stats do not balance. The message is a list.

    Attributes:
        orphans: a line for each of them, which begins with the name of its node.
    """

    def __init__(self, orphans: list[str]) -> None:
        super().__init__("the cluster is not quiescent:\n" + "\n".join(f"  {each}" for each in orphans))
        self.orphans = orphans


def assert_stats_balance(cluster: SimulatedCluster) -> None:
    """Check, at any instant, that on every node each call that was admitted has ended in one way, or is in flight.

    Synchronous.

    Raises:
        OrphansLeft: on some node the sum is wrong.
    """
    _raise_if([line for node in _nodes(cluster) for line in _unbalanced_stats(node)])


def assert_no_orphans(cluster: SimulatedCluster) -> None:
    """Check that the cluster is quiescent now: nothing is left of any request, on live nodes and on ended ones.

    Synchronous. What has only just ended may still be winding down; :func:`settle` waits for it first.

    Raises:
        OrphansLeft: something is left. The message says what, and on which node.
    """
    _raise_if(_orphans(cluster))


async def settle(cluster: SimulatedCluster, *, within: float = 120.0) -> None:
    """Wait until the cluster is quiescent. A checkpoint.

    Args:
        cluster: no requests may be sent to it meanwhile, and every partition and freeze must have been healed.
        within: seconds after which to stop waiting. Must exceed the time in which nodes notice that another one is
            gone, which is ``worker_timeout``, and the longest silence that handlers are allowed.

    Raises:
        OrphansLeft: something is left after that time. The message says what, and on which node.
    """
    pause = 0.001
    with trio.move_on_after(within):
        while True:
            await wait_all_tasks_blocked()
            if not _orphans(cluster):
                return
            await trio.sleep(pause)
            pause = min(2 * pause, _POLL_INTERVAL)
    assert_no_orphans(cluster)


def _raise_if(orphans: list[str]) -> None:
    if orphans:
        raise OrphansLeft(orphans)


def _nodes(cluster: SimulatedCluster) -> list[SimulatedNode]:
    """Return all nodes, current and past: each server once, with its newest process."""
    newest = {id(node.server): node for node in [*cluster.past, *cluster.nodes]}
    return list(newest.values())


def _orphans(cluster: SimulatedCluster) -> list[str]:
    orphans = [
        line
        for node in _nodes(cluster)
        for find in (_calls, _links, _reservations, _unbalanced_stats)
        for line in find(node)
    ]
    orphans += [
        line
        for node in [*cluster.past, *cluster.nodes]
        for line in _tasks(node, _connections_to(cluster, node))
    ]
    for connection in cluster.network.connections:
        if connection.open_ends == 1 and not connection.held:
            gone, left = connection.client, connection.server
            if connection.server_stream.closed:
                gone, left = left, gone
            orphans.append(f"{left}: a connection to port {connection.port} that {gone} has closed")
    return orphans


def _connections_to(cluster: SimulatedCluster, node: SimulatedNode) -> int:
    connections = cluster.network.connections
    return sum(each.server == node.name and not each.server_stream.closed for each in connections)


def _calls(node: SimulatedNode) -> Iterator[str]:
    router, pool = node.server.router, node.server.pool
    for call, backend in router.live.items():
        request = call.request
        where = "here" if backend.name == LOCAL else f"on {backend.name}"
        yield (
            f"{node.name}: call {request.request_id} of '{request.model}' {where}, {call.phase}, "
            f"{call.body.waiting_bytes} bytes waiting"
        )
    for number, what in (
        (pool.running, "slots taken"),
        (pool.waiting, "calls waiting for a slot"),
        (pool.tasks, "tasks of calls"),
    ):
        if number:
            yield f"{node.name}: {number} {what}"


def _links(node: SimulatedNode) -> Iterator[str]:
    sessions: list[tuple[str, MasterSession | WorkerSession]] = []
    manager, client = node.server.worker_manager, node.server.worker_client
    if manager is not None:
        sessions += [
            ("a worker in its handshake" if each.peer is None else each.peer.node_id, each)
            for each in manager.sessions
        ]
        for worker in manager.workers.values():
            if worker.in_flight:
                yield f"{node.name}: {worker.in_flight} calls forwarded to {worker.name}"
    if client is not None:
        sessions += [("a master", session) for session in client.sessions]
        if client.in_flight:
            yield f"{node.name}: {client.in_flight} calls from its masters"
    for peer, session in sessions:
        if session.open_calls:
            yield f"{node.name}: calls {session.open_calls} open on the link with {peer}"
        elif session.peer is not None and not session.idle:
            # Before the handshake nothing of any request can wait there, and a worker dials a master that does not
            # answer again and again.
            yield f"{node.name}: unsent messages on the link with {peer}"


def _reservations(node: SimulatedNode) -> Iterator[str]:
    limiter = node.server.limiter
    if limiter is not None and (limiter.open_reservations or limiter.open_tokens):
        yield (
            f"{node.name}: {limiter.open_reservations} reservations of limits, "
            f"which hold {limiter.open_tokens} tokens"
        )


def _tasks(node: SimulatedNode, connections: int) -> Iterator[str]:
    if node.task is None or node.over.is_set():
        return
    tasks = list(_below(node.task))
    requests = sum(_is_in(task, _SERVES_REQUEST) for task in tasks)
    if requests:
        yield f"{node.name}: {requests} tasks of HTTP requests"
    serving = sum(_is_in(task, _SERVES_CONNECTION) for task in tasks)
    if serving > connections:
        yield f"{node.name}: {serving} tasks of connections, of which {connections} are open"


def _below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from _below(child)


def _is_in(task: trio.lowlevel.Task, functions: frozenset[CodeType]) -> bool:
    """Return whether one of these functions is in the stack of a task."""
    return any(frame.f_code in functions for frame, _ in task.iter_await_frames())


def _unbalanced_stats(node: SimulatedNode) -> Iterator[str]:
    router = node.server.router
    if router.stats.admitted != _counted(router):
        counters = ", ".join(f"{name}={count}" for name, count in router.stats.counters().items())
        yield f"{node.name}: CallStats({counters}) and {len(router.live)} in flight do not balance"


def _counted(router: Router) -> int:
    stats: CallStats = router.stats
    ended = stats.completed + stats.cancelled + stats.timed_out + stats.worker_lost + stats.failed
    return ended + len(router.live)
