"""Calls that come over a link: their bodies, their limits, and which of them are given back by a draining worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import patience
import pytest
import trio
from memory_cluster import MemoryCluster, Worker, chat_request, everything, forever, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.cluster.forwarded import ForwardedCalls
from trio_cluster.core.answer import Done, Failed, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.fair_queue import estimated_cost, share_of
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.log_context import current_principal
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.outcome import outcome_of
from trio_cluster.core.principal import ANONYMOUS, Principal, Priority
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.local.passthrough import RawBackend, RawCall
from trio_cluster.openai import ChatRequest


def request(body: bytes = b"", upload: ByteChannel | None = None, **fields: Any) -> Request:
    return Request("/v1/x", "any", "raw", body, "text/plain", upload=upload, **fields)


class RemoteModel:
    """A passthrough model on a worker, which reads its body when the test says."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self.cluster = cluster
        self.go_on = trio.Event()
        self.calls: list[RawCall] = []
        self.worker: Worker

    async def start(self) -> None:
        self.worker = await self.cluster.start("w1")
        backend = RawBackend(ModelInfo("raw", "any"), self.answer, self.worker.pool)
        self.worker.router.catalog.add(backend.info, backend)
        self.worker.client.announce(backend.info)
        await wait_all_tasks_blocked()

    async def answer(self, call: RawCall) -> None:
        self.calls.append(call)
        await self.go_on.wait()
        size = 0
        while piece := await call.receive():
            size += len(piece)
        call.begin(200, "text/plain")
        await call.send(b"%d" % size)

    def open(self, asked: Request) -> Call:
        return self.cluster.router.open(asked)

    def arrived(self) -> int:
        upload = self.calls[-1].request.upload
        assert upload is not None
        return upload.received


@pytest.fixture
async def remote(nursery: trio.Nursery) -> AsyncIterator[RemoteModel]:
    made = RemoteModel(MemoryCluster(nursery))
    await made.start()
    yield made
    assert made.worker.client.in_flight == 0
    session = made.worker.client.session
    assert session is None or session.idle


async def failure(call: Call) -> ApiError:
    with trio.fail_after(5):
        end = (await everything(call))[-1]
    assert isinstance(end, Failed)
    return end.error


@pytest.mark.parametrize("size", [0, 1, WINDOW, 3 * WINDOW + 1])
async def test_a_body_arrives_whether_it_is_complete_or_still_being_received(
    size: int, remote: RemoteModel
) -> None:
    remote.go_on.set()
    assert text(await everything(remote.open(request(bytes(size))))) == str(size)
    upload = ByteChannel(size)
    call = remote.open(request(upload=upload))
    upload.put(bytes(size), last=True)
    assert text(await everything(call)) == str(size)


async def test_the_announced_size_travels_and_so_does_the_lack_of_one(remote: RemoteModel) -> None:
    remote.go_on.set()
    for upload in (ByteChannel(7), ByteChannel()):
        call = remote.open(request(upload=upload))
        upload.put(b"x" * 7, last=True)
        await everything(call)
    assert [call.request.size for call in remote.calls] == [7, -1]


@pytest.mark.parametrize("principal", [ANONYMOUS, Principal("alice"), Principal("größer als ASCII")])
async def test_the_name_of_the_principal_travels(principal: Principal, remote: RemoteModel) -> None:
    remote.go_on.set()
    await everything(remote.open(request(b"x", principal=principal)))
    assert remote.calls[0].request.principal.name == principal.name


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
@pytest.mark.parametrize("weight", [1.0, 0.5, 7, 1e300, -1.0])
async def test_what_decides_when_a_request_is_served_travels(
    weight: float, priority: Priority, remote: RemoteModel
) -> None:
    remote.go_on.set()
    principal = Principal("alice", "admin", weight=weight, priority=priority)
    await everything(remote.open(request(b"x", principal=principal, max_tokens=1 << 30)))
    (call,) = remote.calls
    assert call.request.principal == Principal("alice", weight=weight, priority=priority)
    assert call.request.max_tokens == 1 << 30
    assert share_of(call.request.principal) == share_of(principal)
    assert estimated_cost(call.request) == estimated_cost(request(b"x", max_tokens=1 << 30))


async def test_waiting_calls_of_principals_are_served_in_turns_on_the_worker(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    order: list[str] = []

    async def slow(_: ChatRequest) -> str:
        order.append(current_principal.get())
        await trio.sleep(1)
        return "x"

    cluster = MemoryCluster(nursery)
    worker = await cluster.start("w1", slow, heartbeat_interval=0.1)
    worker.options.server.max_concurrency = 1
    calls = []
    for name in "aaaab":
        calls.append(cluster.router.open(chat_request("slow", principal=Principal(name))))
        await wait_all_tasks_blocked()
    await trio.sleep(0.5)
    (status,) = cluster.manager.status()
    assert (status.waiting, status.waiting_by) == (4, {"a": 3, "b": 1})
    for call in calls:
        await everything(call)
    assert "".join(order) == "aabaa"
    assert cluster.manager.status()[0].waiting_by == {}


@pytest.mark.parametrize("query", ["", "api-version=1&a=%0d%0a"])
async def test_the_query_travels(query: str, remote: RemoteModel) -> None:
    remote.go_on.set()
    await everything(remote.open(request(b"x", query=query)))
    assert remote.calls[0].request.query == query


async def test_no_more_than_a_window_is_sent_to_a_handler_that_does_not_read(remote: RemoteModel) -> None:
    upload = ByteChannel()
    call = remote.open(request(upload=upload))
    upload.put(bytes(3 * WINDOW))
    await wait_all_tasks_blocked()
    assert remote.arrived() == WINDOW
    # What was written to the worker is consumed, so that the client may send more.
    upload.put(b"", last=True)
    with patience.fail_after(1):
        remote.go_on.set()
        assert text(await everything(call)) == str(3 * WINDOW)


async def test_the_end_of_a_call_ends_its_upload_on_both_nodes(remote: RemoteModel) -> None:
    upload = ByteChannel()
    call = remote.open(request(upload=upload))
    upload.put(b"x" * 10)
    await wait_all_tasks_blocked()
    call.cancel("the client left")
    await wait_all_tasks_blocked()
    theirs = remote.calls[0].request.upload
    assert theirs is not None
    assert (upload.closed, theirs.closed, call.released) == (True, True, True)


async def test_an_answer_that_is_complete_before_its_body_ends_the_upload(remote: RemoteModel) -> None:
    async def hasty(call: RawCall) -> None:
        call.begin(413, "text/plain")

    backend = RawBackend(ModelInfo("hasty", "any"), hasty, remote.worker.pool)
    remote.worker.router.catalog.add(backend.info, backend)
    remote.worker.client.announce(backend.info)
    await wait_all_tasks_blocked()
    upload, told = ByteChannel(), trio.Event()
    upload.on_close(told.set)
    call = remote.open(Request("/v1/x", "any", "hasty", b"", upload=upload))
    upload.put(bytes(WINDOW * 2))
    assert isinstance((await everything(call))[-1], Done)
    assert told.is_set()
    # What is put now is dropped.
    upload.put(b"x")
    await wait_all_tasks_blocked()


async def test_a_body_that_is_declared_too_large_for_the_worker_is_413_at_once(remote: RemoteModel) -> None:
    remote.worker.options.server.max_body_size = 100
    upload = ByteChannel(101)
    assert (await failure(remote.open(request(upload=upload)))).status == 413
    assert (remote.calls, upload.closed) == ([], True)


async def test_a_body_that_grows_too_large_for_the_worker_is_413_when_it_does(remote: RemoteModel) -> None:
    remote.worker.options.server.max_body_size = 100
    upload = ByteChannel()
    call = remote.open(request(upload=upload))
    upload.put(b"x" * 100)
    await wait_all_tasks_blocked()
    assert not call.ended
    upload.put(b"x")
    assert (await failure(call)).status == 413
    await wait_all_tasks_blocked()
    assert remote.worker.router.live == {}


# Giving back while draining


@pytest.mark.parametrize("once", [False, True])
async def test_a_body_that_cannot_be_sent_again_is_not_given_back(once: bool, remote: RemoteModel) -> None:
    body = bytes(2 * WINDOW)
    upload = ByteChannel(len(body))
    call = remote.open(request(upload=upload) if once else request(body))
    if once:
        upload.put(body[:-1])
    await wait_all_tasks_blocked()
    remote.worker.client.drain("the worker is being stopped")
    await wait_all_tasks_blocked()
    assert call.ended is not once
    if once:
        upload.put(b"x", last=True)
        remote.go_on.set()
        assert text(await everything(call)) == str(len(body))
    else:
        assert (await failure(call)).code == "shutting_down"
    remote.worker.client.close("stopped")
    await remote.worker.over.wait()


# A client that has the whole answer


@pytest.mark.parametrize("resume_window", [0.0, 30.0])
async def test_a_call_whose_client_has_all_of_it_is_completed_on_both_nodes_with_its_usage(
    nursery: trio.Nursery, autojump_clock: MockClock, resume_window: float
) -> None:
    cluster = MemoryCluster(nursery, resume_window=resume_window)
    worker = await cluster.start("w1", resume_window=resume_window)
    stopped = trio.Event()

    async def answer(call: RawCall) -> None:
        call.begin(200, "text/event-stream")
        await call.send(b"data: [DONE]\n\n")
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            assert call.ended
            call.report_usage(5, 6)
            stopped.set()

    backend = RawBackend(ModelInfo("raw", "any"), answer, worker.pool)
    worker.router.catalog.add(backend.info, backend)
    worker.client.announce(backend.info)
    await wait_all_tasks_blocked()
    call = cluster.router.open(request())
    await wait_all_tasks_blocked()
    (there,) = worker.router.live
    call.satisfy("client left")
    assert (call.end, call.released) == (Done(), False)
    if resume_window:
        worker.reset()
    await trio.sleep(1)
    # As for a cancelled call, its end is reported when the work has stopped.
    assert (there.end, there.released, call.released) == (Done(), False, False)
    await stopped.wait()
    await wait_all_tasks_blocked()
    for each in (call, there):
        assert (each.end, each.released, outcome_of(each)) == (Done(Usage(5, 6)), True, "completed")


async def test_a_worker_that_does_not_know_of_it_changes_nothing_on_the_master(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(calls: ForwardedCalls, call_id: int, reason: str, *, complete: bool) -> None:
        # An older one takes it for a cancellation, and reports that.
        calls.live[call_id].cancel(reason)

    monkeypatch.setattr(ForwardedCalls, "cancel", cancel)
    cluster = MemoryCluster(nursery)
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    await wait_all_tasks_blocked()
    (there,) = worker.router.live
    call.satisfy("client left")
    await wait_all_tasks_blocked()
    assert (outcome_of(there), there.released) == ("cancelled", True)
    assert (call.end, call.released, outcome_of(call)) == (Done(), True, "completed")
