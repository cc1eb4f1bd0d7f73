"""At rest: what must be gone when nobody wants anything any more, and the books that must always add up.

A cluster is at rest when there are no tasks of requests, no slots taken, no calls on anybody's list, nothing queued on
any link, and no connection that only one of its ends believes in. Whatever is left then has outlived the request it
was for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import trio
from trio.testing import wait_all_tasks_blocked

from ..core.stats import CallStats
from ..gateway.cycle import RequestCycle
from ..protocol import MasterSession, WorkerSession
from ..routing.backend import LOCAL
from ..routing.router import Router
from ._cluster import SimulatedCluster, SimulatedNode

__all__ = ["OrphansLeft", "assert_books_balance", "assert_no_orphans", "settle"]

#: What every HTTP request is in from its beginning to its end, whatever serves it: its way through the gate.
_HTTP_REQUEST: Final = RequestCycle.run.__qualname__
#: The tasks of all connections: those of clients, and those of workers.
_CONNECTIONS: Final = frozenset(
    {
        "trio_cluster.http1.server._Connections._serve_one",
        "trio._highlevel_serve_listeners._run_handler",
    }
)

#: Seconds between two looks, at most.
_LOOK_EVERY: Final = 1.0


class OrphansLeft(AssertionError):
    """Something has outlived the request that it was for, or the books do not balance. The message is a list.

    Attributes:
        orphans: a line for each thing, which begins with the node that has it.
    """

    def __init__(self, orphans: list[str]) -> None:
        super().__init__("the cluster is not at rest:\n" + "\n".join(f"  {each}" for each in orphans))
        self.orphans = orphans


def assert_books_balance(cluster: SimulatedCluster) -> None:
    """Check, at any instant, that on every node each call that was admitted has ended in one way, or is in flight.

    Raises:
        OrphansLeft: on some node the sum is wrong.
    """
    _raise_if([line for node in _nodes(cluster) for line in _wrong_books(node)])


def assert_no_orphans(cluster: SimulatedCluster) -> None:
    """Check that the cluster is at rest now: that nothing is left of any request, on nodes that live and on others.

    What has only just ended may still be winding down; :func:`settle` waits for it first.

    Raises:
        OrphansLeft: something is left; says what it is, and whose.
    """
    _raise_if(_orphans(cluster))


async def settle(cluster: SimulatedCluster, *, within: float = 120.0) -> None:
    """Wait until the cluster is at rest.

    Args:
        cluster: in which nobody asks for anything meanwhile, and everything that was partitioned or frozen is healed.
        within: seconds after which it is not going to happen. Must exceed the time in which nodes notice that another
            one is gone, which is ``worker_timeout``, and the longest silence that handlers are allowed.

    Raises:
        OrphansLeft: something is left after that time; says what it is, and whose.
    """
    pause = 0.001
    with trio.move_on_after(within):
        while True:
            await wait_all_tasks_blocked()
            if not _orphans(cluster):
                return
            await trio.sleep(pause)
            pause = min(2 * pause, _LOOK_EVERY)
    assert_no_orphans(cluster)


def _raise_if(orphans: list[str]) -> None:
    if orphans:
        raise OrphansLeft(orphans)


def _nodes(cluster: SimulatedCluster) -> list[SimulatedNode]:
    """Return all nodes there are and were, each server once, with its newest run."""
    newest = {id(node.server): node for node in [*cluster.past, *cluster.nodes]}
    return list(newest.values())


def _orphans(cluster: SimulatedCluster) -> list[str]:
    orphans = [
        line for node in _nodes(cluster) for find in (_calls, _links, _wrong_books) for line in find(node)
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
    registry, pool = node.server.registry, node.server.pool
    for call, backend in registry.live.items():
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
            ("a newcomer" if each.peer is None else each.peer.node_id, each) for each in manager.sessions
        ]
        for worker in manager.workers.values():
            if worker.in_flight:
                yield f"{node.name}: {worker.in_flight} calls forwarded to {worker.name}"
    if client is not None:
        if client.session is not None:
            sessions.append(("the master", client.session))
        if client.in_flight:
            yield f"{node.name}: {client.in_flight} calls from the master"
    for peer, session in sessions:
        if session.open_calls:
            yield f"{node.name}: calls {session.open_calls} open on the link with {peer}"
        elif not session.idle:
            yield f"{node.name}: something to be sent on the link with {peer}"


def _tasks(node: SimulatedNode, connections: int) -> Iterator[str]:
    if node.task is None or node.over.is_set():
        return
    tasks = list(_below(node.task))
    requests = sum(_is_in_request(task) for task in tasks)
    if requests:
        yield f"{node.name}: {requests} tasks of HTTP requests"
    serving = sum(task.name in _CONNECTIONS for task in tasks)
    if serving > connections:
        yield f"{node.name}: {serving} tasks of connections, of which {connections} are open"


def _below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from _below(child)


def _is_in_request(task: trio.lowlevel.Task) -> bool:
    return any(frame.f_code.co_qualname == _HTTP_REQUEST for frame, _ in task.iter_await_frames())


def _wrong_books(node: SimulatedNode) -> Iterator[str]:
    registry = node.server.registry
    if registry.stats.admitted != _accounted_for(registry):
        counters = ", ".join(f"{name}={count}" for name, count in registry.stats.counters().items())
        yield f"{node.name}: CallStats({counters}) and {len(registry.live)} in flight do not balance"


def _accounted_for(registry: Router) -> int:
    stats: CallStats = registry.stats
    ended = stats.completed + stats.cancelled + stats.timed_out + stats.worker_lost + stats.failed
    return ended + len(registry.live)
