"""Workers of a master that is several processes behind one address: a link to each of them, whatever changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from memory_streams import MemoryStream, memory_pair
from trio.testing import MockClock

from trio_cluster.cluster.dialer import Dialer
from trio_cluster.cluster.master import Place, WorkerManager
from trio_cluster.cluster.masters import ListedMasters
from trio_cluster.cluster.worker import WorkerClient
from trio_cluster.core.model import ModelInfo
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.pool import HandlerPool
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.router import Router


class Group:
    """The processes of a master, and what passes connections on to them.

    Args:
        nursery: runs them.
        hides_names: something on the way hides which process a connection is for.
    """

    def __init__(self, nursery: trio.Nursery, processes: int, *, hides_names: bool = False) -> None:
        self._nursery = nursery
        self._hides_names = hides_names
        self._next = 0
        self.named: list[int | None] = []
        self.streams: list[MemoryStream] = []
        self.managers: list[WorkerManager] = []
        self._scopes: list[list[trio.CancelScope]] = []
        self.start(processes)

    def start(self, processes: int) -> None:
        """Start all processes anew."""
        for number in range(len(self.managers)):
            self.kill(number)
        self._scopes = [[] for _ in range(processes)]
        self.managers = [self._new_manager(number, processes) for number in range(processes)]

    def _new_manager(self, number: int, processes: int) -> WorkerManager:
        options = ClusterServerOptions(on_conflict="replicate")
        return WorkerManager(Router().catalog, options, f"m-{number}", None, Place(number, processes))

    def kill(self, number: int) -> None:
        """End a process, and start it again."""
        for scope in self._scopes[number]:
            scope.cancel(reason="the process was killed")
        self._scopes[number] = []
        self.managers[number] = self._new_manager(number, len(self.managers))

    def connect(self, process: int | None) -> Any:
        self.named.append(process)
        if process is None or process >= len(self.managers) or self._hides_names:
            process = self._next % len(self.managers)
            self._next += 1
        ours, theirs = memory_pair()
        self.streams += [ours, theirs]
        self._nursery.start_soon(self._serve, process, theirs)
        return ours

    async def _serve(self, process: int, stream: Any) -> None:
        with trio.CancelScope() as scope:
            self._scopes[process].append(scope)
            await self.managers[process].serve_stream(stream)

    @property
    def linked(self) -> list[list[str]]:
        """The models that each process has from workers."""
        return [
            [name for worker in manager.workers.values() for name in worker.models]
            for manager in self.managers
        ]


class GroupDialer(Dialer):
    """Connects to a group."""

    trust = None

    def __init__(self, group: Group) -> None:
        self.host = "master"
        self._group = group

    @property
    def label(self) -> str:
        return self.host

    async def connect_to_process(self, process: int | None) -> Any:
        await trio.lowlevel.checkpoint()
        return self._group.connect(process)


async def nothing(_: Any) -> str:
    return ""


def start_worker(nursery: trio.Nursery, group: Group) -> WorkerClient:
    options = ClusterServerOptions()
    router, pool = Router(), HandlerPool(options)
    backend = HandlerBackend(ModelInfo("m", "chat"), nothing, pool)
    router.catalog.add(backend.info, backend)
    client = WorkerClient(router, pool, options, "w")
    nursery.start_soon(pool.serve)
    nursery.start_soon(client.run, ListedMasters([GroupDialer(group)]))
    return client


async def until(what: Callable[[], object], seconds: float) -> None:
    with trio.fail_after(seconds):
        while not what():  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 2, 5])
async def test_a_worker_has_a_link_to_each_process_and_names_it(
    nursery: trio.Nursery, autojump_clock: MockClock, processes: int
) -> None:
    group = Group(nursery, processes)
    client = start_worker(nursery, group)
    await until(lambda: group.linked == [["m"]] * processes, 1)
    # The first connection cannot know of any; then each is dialled once.
    assert group.named[0] is None
    assert sorted(name for name in group.named[1:] if name is not None) == list(range(1, processes))
    assert len(client.connections) == processes
    await trio.sleep(100)
    assert len(group.named) == processes


async def test_a_process_that_is_killed_is_linked_again_and_the_others_notice_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    group = Group(nursery, 3)
    client = start_worker(nursery, group)
    await until(lambda: group.linked == [["m"]] * 3, 1)
    for number in (0, 1, 2):
        kept = {each.master.instance for each in client.connections if each.master is not None}
        group.kill(number)
        await until(lambda: group.linked == [["m"]] * 3, 5)
        now = {each.master.instance for each in client.connections if each.master is not None}
        assert len(kept & now) == 2
        assert group.named[-1] == number


async def test_the_number_of_processes_may_change(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    group = Group(nursery, 3)
    client = start_worker(nursery, group)
    await until(lambda: group.linked == [["m"]] * 3, 1)
    for processes in (2, 4, 1, 3):
        group.start(processes)
        await until(lambda processes=processes: group.linked == [["m"]] * processes, 20)
        await until(lambda processes=processes: len(client.connections) == processes, 20)
        await trio.sleep(100)
        assert group.linked == [["m"]] * processes
        assert len(client.status()) == processes


async def test_all_processes_are_found_where_their_names_are_hidden(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    group = Group(nursery, 3, hides_names=True)
    start_worker(nursery, group)
    await until(lambda: group.linked == [["m"]] * 3, 60)


@pytest.mark.parametrize("hides_names", [False, True])
async def test_links_that_are_cut_are_resumed_by_the_processes_that_have_their_sessions(
    nursery: trio.Nursery, autojump_clock: MockClock, hides_names: bool
) -> None:
    group = Group(nursery, 3, hides_names=hides_names)
    client = start_worker(nursery, group)
    await until(lambda: group.linked == [["m"]] * 3, 60)
    await trio.sleep(10)
    sessions = {session.session_id for session in client.sessions}
    assert len(sessions) == 3
    for stream in group.streams:
        stream.fail()
    await until(lambda: all(session.resumptions for session in client.sessions), 20)
    assert {session.session_id for session in client.sessions} == sessions
