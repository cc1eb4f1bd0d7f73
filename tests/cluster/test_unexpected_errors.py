"""An unexpected exception ends one call, or one connection, and nothing else; it is logged with its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, echo, everything, forever, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.cluster.forwarded import ForwardedCalls
from trio_cluster.cluster.master import WorkerConnection, WorkerManager
from trio_cluster.cluster.remote_worker import RemoteWorker
from trio_cluster.cluster.worker import MasterConnection
from trio_cluster.core.answer import Done, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.observer import Observer
from trio_cluster.core.request import Request
from trio_cluster.local.handler import HandlerTask
from trio_cluster.protocol import MasterSession, WorkerSession


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery)


@pytest.fixture
async def worker(cluster: MemoryCluster) -> Worker:
    return await cluster.start("w1", echo, forever)


class Bug(Exception):
    """What no part of the package expects."""


@contextmanager
def bug_in(owner: Any, name: str, only_once: bool = True) -> Iterator[list[int]]:
    """Have a function raise, the first time, or each time that it is called."""
    real = getattr(owner, name)
    raised: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        if only_once and raised:
            return real(*args, **kwargs)
        raised.append(1)
        raise Bug(name)

    setattr(owner, name, fails)
    try:
        yield raised
    finally:
        setattr(owner, name, real)


async def end_of(call: Call) -> Failed:
    with trio.fail_after(60):
        end = (await everything(call))[-1]
    assert isinstance(end, Failed)
    return end


async def works(cluster: MemoryCluster) -> bool:
    return text(await everything(cluster.router.open(chat_request("echo")))).endswith("data: [DONE]\n\n")


def future(endpoint: str) -> Request:
    return Request(endpoint=endpoint, kind="chat", model="echo", body=b"{}")


@pytest.mark.parametrize("endpoint", ["chat.future", "chat", "é"])
async def test_a_route_that_a_worker_does_not_know_is_404_for_that_call(
    cluster: MemoryCluster, worker: Worker, endpoint: str
) -> None:
    end = await end_of(cluster.router.open(future(endpoint)))
    assert (end.error.status, end.error.code, end.retryable) == (404, "endpoint_not_found", True)
    assert endpoint in end.error.message
    assert worker.client.connected
    assert await works(cluster)


async def test_a_route_that_no_worker_knows_costs_neither_of_two_workers(nursery: trio.Nursery) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    workers = [await cluster.start(name, echo) for name in ("w1", "w2")]
    call = cluster.router.open(future("chat.future"))
    await end_of(call)
    again = cluster.router.reopen(call)
    assert again is not None
    assert (await end_of(again)).error.status == 404
    assert all(worker.client.connected and worker.error is None for worker in workers)
    assert await works(cluster)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ForwardedCalls, "open"),
        (ForwardedCalls, "on_data"),
        (WorkerSession, "respond"),
        (HandlerTask, "prepare"),
        (HandlerTask, "work"),
        (HandlerTask, "log_fields"),
        (RemoteWorker, "on_data"),
        (RemoteWorker, "on_event"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
async def test_a_bug_in_one_call_ends_that_call(
    cluster: MemoryCluster, worker: Worker, owner: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = cluster.router.open(chat_request("forever"))
    assert isinstance(await other.receive(), Head)
    with bug_in(owner, name) as raised:
        asked = "echo" if name != "log_fields" else "no json"
        request = chat_request("echo")
        if asked != "echo":

            def broken(*_: Any) -> Any:
                raise Bug("an unknown error, of which a log line is wanted")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("trio_cluster.local.handler.endpoint_named", broken)
                call = cluster.router.open(request)
                end = await end_of(call)
        else:
            call = cluster.router.open(request)
            end = await end_of(call)
        assert raised
    assert end.error.status == 500
    assert not end.retryable
    await wait_all_tasks_blocked()
    assert call.released
    assert f"Bug: {name}" in caplog.text
    assert "Traceback" in caplog.text
    assert not other.ended
    assert worker.client.connected
    assert worker.error is None
    assert await works(cluster)
    other.cancel("test over")
    await cluster.router.wait_idle()
    await worker.router.wait_idle()
    assert (worker.pool.running, worker.client.in_flight) == (0, 0)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (MasterConnection, "_on_master_heartbeat"),
        (MasterConnection, "_report_load"),
        (MasterConnection, "_on_sent"),
        (MasterConnection, "_on_events"),
        (WorkerConnection, "_on_sent"),
        (WorkerConnection, "_on_events"),
        (WorkerConnection, "_update_health"),
        (WorkerConnection, "_log_end"),
        (RemoteWorker, "on_heartbeat"),
        (WorkerSession, "tick"),
        (MasterSession, "tick"),
        (MasterSession, "next_message"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
async def test_a_bug_in_one_link_ends_that_link_and_the_worker_comes_back(
    nursery: trio.Nursery, owner: Any, name: str, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    cluster = MemoryCluster(nursery)
    worker = await cluster.start("w1", echo)
    with bug_in(owner, name) as raised:
        # The next link is made of what is broken.
        worker.cut()
        await trio.sleep(100)
        assert raised
    assert f"Bug: {name}" in caplog.text
    assert worker.error is None
    assert worker.client.connected
    assert await works(cluster)
    assert list(cluster.manager.workers) == ["w1"]


async def test_a_connection_that_cannot_even_be_made_is_closed(
    cluster: MemoryCluster, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with bug_in(MasterSession, "__init__"):
        ours, _theirs = cluster.connect()
        with trio.fail_after(5):
            assert await ours.receive_some() == b""
    assert "Bug: __init__" in caplog.text
    assert await works(cluster)


async def test_an_observer_that_fails_ends_the_call_and_its_slot_is_free(
    cluster: MemoryCluster, worker: Worker
) -> None:
    class Failing(Observer):
        def on_routed(self, call: Call, why: str) -> None:
            raise Bug("routed")

    observer = Failing()
    cluster.router.observers.add(observer)
    with pytest.raises(Bug):
        cluster.router.open(chat_request("forever"))
    cluster.router.observers.remove(observer)
    await cluster.router.wait_idle()
    await worker.router.wait_idle()
    assert worker.pool.running == 0
    assert await works(cluster)


async def test_an_observer_that_fails_at_the_end_of_a_call_keeps_nothing_from_being_freed(
    cluster: MemoryCluster, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Observer):
        def on_ended(self, call: Call, outcome: object) -> None:
            raise Bug("ended")

    for router in (cluster.router, worker.router):
        router.observers.add(Failing())
    assert await works(cluster)
    await wait_all_tasks_blocked()
    assert (cluster.router.live, worker.router.live, worker.client.in_flight) == ({}, {}, 0)
    assert caplog.text.count("Bug: ended") == 2
    assert await works(cluster)


async def test_a_manager_survives_a_stream_that_fails_in_an_unexpected_way(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = MemoryCluster(nursery)
    await cluster.start("w1", echo)
    ours, _theirs = cluster.connect()
    with bug_in(WorkerConnection, "_admit"):
        await ours.send_all(
            b"GET /cluster HTTP/1.1\r\nHost: m\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Protocol: trio-cluster.1\r\n\r\n"
        )
        await wait_all_tasks_blocked()
    assert "Bug: _admit" in caplog.text
    assert isinstance(cluster.manager, WorkerManager)
    end = (await everything(cluster.router.open(chat_request("echo"))))[-1]
    assert isinstance(end, Done)
