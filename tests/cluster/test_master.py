"""What a master does with workers that join, serve, fall silent and leave."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import attrs
import msgspec
import pytest
import trio
import wsproto
from memory_cluster import MemoryCluster, Worker, chat_request, echo, everything, forever, text
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto.events import BytesMessage, Request as WebSocketRequest

from trio_cluster._version import __version__
from trio_cluster.core.answer import Data, Done, Failed, Head, Usage
from trio_cluster.core.limits import WINDOW
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError, WorkerLost
from trio_cluster.link.websocket import PATH, PROBE_PATH
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.openai import ChatRequest, OutputChunk
from trio_cluster.protocol import (
    MAGIC,
    SUBPROTOCOL,
    Failed as FailedMessage,
    ForwardRequest,
    Handshake,
    Heartbeat,
    RegisterModel,
    UnregisterModel,
    decode,
    encode,
)


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery)


async def test_a_worker_that_joins_has_its_models_served(cluster: MemoryCluster) -> None:
    await cluster.start("w1", echo)
    assert cluster.router.catalog.names() == ["echo"]
    assert cluster.router.catalog.served_by("echo") == ["w1"]
    events = await everything(cluster.router.open(chat_request("echo")))
    assert isinstance(events[0], Head)
    assert isinstance(events[-1], Done)
    assert text(events).endswith("data: [DONE]\n\n")
    await cluster.router.wait_idle()


async def test_a_forwarded_answer_is_the_local_one_byte_for_byte(cluster: MemoryCluster) -> None:
    worker = await cluster.start("w1", echo)
    for stream in (False, True):
        request = chat_request("echo", stream=stream)
        far = text(await everything(cluster.router.open(request)))
        near = text(await everything(worker.router.open(request)))
        assert _without_ids(far) == _without_ids(near)


async def test_the_usage_that_a_remote_handler_reports_reaches_the_master(cluster: MemoryCluster) -> None:
    async def counts(request: ChatRequest) -> AsyncIterator[Any]:
        yield "x"
        usage = {
            "prompt_tokens": 5,
            "completion_tokens": 4,
            "completion_tokens_details": {"reasoning_tokens": 3},
        }
        yield {"usage": usage | {"prompt_tokens_details": {"cached_tokens": 2}}}

    await cluster.start("w1", counts, echo)
    for model, usage in (("counts", Usage(5, 4, 2, 3)), ("echo", None)):
        call = cluster.router.open(chat_request(model))
        await everything(call)
        assert call.end == Done(usage, "stop")
        assert call.end.usage == usage


def _without_ids(body: str) -> list[str]:
    return [part for part in body.replace('"', "\n").split("\n") if "chatcmpl-" not in part]


async def test_models_come_and_go_while_a_worker_is_connected(cluster: MemoryCluster) -> None:
    worker = await cluster.start("w1", echo)
    worker.serve("later", echo)
    info = worker.router.catalog.info("later")
    assert info is not None
    worker.client.announce(info)
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.names() == ["echo", "later"]
    worker.client.withdraw("echo")
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.names() == ["later"]


async def test_a_model_keeps_its_creation_time_across_reconnections(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", echo)
    before = cluster.router.catalog.info("echo")
    worker.cut()
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.info("echo") is None
    await trio.sleep(60)
    assert cluster.router.catalog.info("echo") == before


async def test_a_broken_link_fails_its_calls_and_removes_its_models_at_once(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    assert isinstance(await call.receive(), Head)
    start = trio.current_time()
    worker.cut()
    last = (await everything(call))[-1]
    assert trio.current_time() == start
    assert isinstance(last, Failed)
    assert isinstance(last.error, WorkerLost)
    assert last.error.status == 502
    assert cluster.router.catalog.names() == []
    assert call.released
    assert not cluster.router.live


async def test_a_silent_worker_is_dropped_after_the_timeout(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    assert isinstance(await call.receive(), Head)
    start = trio.current_time()
    worker.lose_way()
    with caplog.at_level(logging.WARNING, "trio_cluster"):
        last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    assert 25 <= trio.current_time() - start <= 36
    assert cluster.router.catalog.names() == []
    assert "worker left" in caplog.text


class RawWorker:
    """A websocket and nothing else: it takes all that it is sent, and sends only what the test says."""

    def __init__(self, cluster: MemoryCluster) -> None:
        self._stream, _ = cluster.connect()
        self._protocol = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)

    async def handshake(self, path: str = PATH, headers: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
        """Ask for a websocket, and return the answer."""
        request = WebSocketRequest(
            host="master", target=path, subprotocols=[SUBPROTOCOL], extra_headers=list(headers)
        )
        await self._stream.send_all(self._protocol.send(request))
        return bytes(await self._stream.receive_some())

    async def join(
        self, name: str, model: str, instance: str = "", path: str = PATH, version: str = "1"
    ) -> None:
        """Connect, and register one model."""
        request = WebSocketRequest(host="master", target=path, subprotocols=[SUBPROTOCOL])
        await self._stream.send_all(self._protocol.send(request))
        self._protocol.receive_data(bytes(await self._stream.receive_some()))
        hello = [Handshake(MAGIC, 1, 1, name, version, instance), RegisterModel.of(ModelInfo(model, "chat"))]
        await self._stream.send_all(self._protocol.send(BytesMessage(encode(hello))))

    async def send(self, message: bytes) -> None:
        """Send one message."""
        await self._stream.send_all(self._protocol.send(BytesMessage(message)))

    async def take(self) -> list[Any]:
        """Return the messages that have come."""
        self._protocol.receive_data(bytes(await self._stream.receive_some()))
        return [
            each
            for event in self._protocol.events()
            if isinstance(event, BytesMessage) and event.message_finished
            for each in decode(bytes(event.data))
        ]

    async def take_everything(self) -> None:
        """Read until the connection is closed."""
        async for _ in self._stream:
            pass


async def test_a_worker_that_takes_writes_and_sends_nothing_is_dropped_after_exactly_the_timeout(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = MemoryCluster(nursery, worker_timeout=30, heartbeat_interval=5)
    worker = RawWorker(cluster)
    await worker.join("w1", "m")
    joined = trio.current_time()
    nursery.start_soon(worker.take_everything)
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.served_by("m") == ["w1"]
    # Writes that succeed are no sign of life of the worker.
    call = cluster.router.open(chat_request("m"))
    await trio.sleep(10)
    cluster.router.open(chat_request("m"))
    last = (await everything(call))[-1]
    assert trio.current_time() - joined == pytest.approx(30)
    assert isinstance(last, Failed)
    assert isinstance(last.error, WorkerLost)
    assert "no message from the peer for 30.0 s" in last.error.message
    assert cluster.router.catalog.names() == []
    assert cluster.manager.workers == {}
    assert "worker left: no message from the peer for 30.0 s" in caplog.text


async def test_a_call_that_the_client_leaves_stops_its_remote_handler(cluster: MemoryCluster) -> None:
    stopped = trio.Event()

    async def waits(request: ChatRequest) -> AsyncIterator[str]:
        try:
            yield "begun"
            await trio.sleep_forever()
        finally:
            stopped.set()

    worker = await cluster.start("w1", waits)
    call = cluster.router.open(chat_request("waits"))
    assert isinstance(await call.receive(), Head)
    await wait_all_tasks_blocked()
    call.cancel("client left")
    await stopped.wait()
    await cluster.router.wait_idle()
    assert worker.pool.running == 0
    assert not worker.router.live
    assert cluster.router.stats.cancelled == 1


async def test_a_remote_slot_is_taken_until_the_remote_work_has_stopped(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    async def lingers(request: ChatRequest) -> AsyncIterator[str]:
        try:
            yield "begun"
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(9)

    await cluster.start("w1", lingers)
    call = cluster.router.open(chat_request("lingers"))
    assert isinstance(await call.receive(), Head)
    await wait_all_tasks_blocked()
    call.cancel("client left")
    start = trio.current_time()
    await wait_all_tasks_blocked()
    assert not call.released
    await cluster.router.wait_idle()
    assert trio.current_time() - start == pytest.approx(9)


async def test_a_client_that_does_not_read_stops_its_own_handler_and_no_other(
    cluster: MemoryCluster,
) -> None:
    produced = 0

    async def torrent(request: ChatRequest) -> AsyncIterator[str]:
        nonlocal produced
        while True:
            produced += 1
            yield "x" * 1000

    worker = await cluster.start("w1", torrent, echo)
    unread = cluster.router.open(chat_request("torrent"))
    await wait_all_tasks_blocked()
    stalled_at = produced
    # One window here, one in the worker, and what an event weighs beside its text.
    assert stalled_at * 1000 <= 3 * WINDOW
    assert unread.body.waiting_bytes <= WINDOW
    for _ in range(3):
        assert isinstance((await everything(cluster.router.open(chat_request("echo"))))[-1], Done)
    assert produced == stalled_at
    assert isinstance(await unread.receive(), Head)
    taken = 0
    while taken < 2 * WINDOW:
        event = await unread.receive()
        assert isinstance(event, Data)
        taken += len(event.data)
    assert produced > stalled_at
    unread.cancel("client left")
    await cluster.router.wait_idle()
    assert worker.pool.running == 0


async def test_a_large_body_arrives_whole(cluster: MemoryCluster) -> None:
    lengths: list[int] = []

    async def measures(request: ChatRequest) -> str:
        lengths.append(len(request.last_text))
        return "ok"

    await cluster.start("w1", measures)
    events = await everything(cluster.router.open(chat_request("measures", content="x" * 5_000_000)))
    assert isinstance(events[-1], Done)
    assert lengths == [5_000_000]


async def test_a_body_that_is_too_large_for_the_worker_is_refused_with_413(cluster: MemoryCluster) -> None:
    worker = await cluster.start("w1", echo)
    worker.options.server.max_body_size = 100_000
    last = (await everything(cluster.router.open(chat_request("echo", content="x" * 1_000_000))))[-1]
    assert isinstance(last, Failed)
    assert last.error.status == 413
    assert isinstance((await everything(cluster.router.open(chat_request("echo"))))[-1], Done)


async def test_an_error_crosses_the_wire_as_it_was_raised(cluster: MemoryCluster) -> None:
    async def refuses(request: ChatRequest) -> str:
        raise ApiError(429, "slow down", code="quota", type="rate_limit_error", param="n", retry_after=3.0)

    await cluster.start("w1", refuses)
    last = (await everything(cluster.router.open(chat_request("refuses"))))[-1]
    assert isinstance(last, Failed)
    error = last.error
    assert (error.status, error.message, error.code, error.type, error.param, error.retry_after) == (
        429,
        "slow down",
        "quota",
        "rate_limit_error",
        "n",
        3.0,
    )


async def test_an_answer_that_http_cannot_carry_fails_and_stops_its_handler(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def speech(request: Any) -> AsyncIterator[OutputChunk]:
        yield OutputChunk.audio(b"x", "audio/x\r\nset-cookie: y")
        await trio.sleep_forever()

    worker = await cluster.start("w1")
    backend = HandlerBackend(ModelInfo("speech", "tts"), speech, worker.pool)
    worker.router.catalog.add(backend.info, backend)
    worker.client.announce(backend.info)
    await wait_all_tasks_blocked()
    body = b'{"model":"speech","input":"x","voice":"y"}'
    call = cluster.router.open(Request(endpoint="audio.speech", kind="tts", model="speech", body=body))
    last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    assert last.error.status == 500
    await cluster.router.wait_idle()
    await worker.router.wait_idle()
    assert worker.client.connected


async def test_the_time_that_is_left_travels(cluster: MemoryCluster, autojump_clock: MockClock) -> None:
    seen: list[float] = []

    async def looks(request: ChatRequest) -> str:
        seen.append(trio.current_effective_deadline() - trio.current_time())
        return "x"

    await cluster.start("w1", looks)
    await everything(cluster.router.open(chat_request("looks", idle_timeout=7.0)))
    await everything(cluster.router.open(chat_request("looks", idle_timeout=7.0, total_timeout=3.0)))
    assert seen == [pytest.approx(7.0), pytest.approx(3.0)]


# Names


async def test_a_taken_model_is_refused_and_its_worker_stays(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.start("w1", echo)
    second = await cluster.start("w2", echo, forever)
    assert second.client.connected
    assert list(second.client.rejected_models) == ["echo"]
    assert "w1" in second.client.rejected_models["echo"]
    assert cluster.router.catalog.served_by("echo") == ["w1"]
    assert cluster.router.catalog.served_by("forever") == ["w2"]
    assert "refused" in caplog.text


async def test_a_refused_model_is_taken_when_the_worker_that_had_the_name_leaves(
    cluster: MemoryCluster,
) -> None:
    first = await cluster.start("w1", echo)
    second, third = await cluster.start("w2", echo), await cluster.start("w3", echo)
    first.scope.cancel()
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.served_by("echo") == ["w2"]
    assert second.client.rejected_models == {}
    assert "w2" in third.client.rejected_models["echo"]
    assert (second.dials, third.dials) == (1, 1)
    assert text(await everything(cluster.router.open(chat_request("echo")))) != ""


async def test_a_refused_model_is_taken_when_the_name_is_given_back(cluster: MemoryCluster) -> None:
    first, second = await cluster.start("w1", echo), await cluster.start("w2", echo)
    first.client.withdraw("echo")
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.served_by("echo") == ["w2"]
    assert second.client.rejected_models == {}


async def test_a_refused_model_that_is_withdrawn_or_whose_worker_leaves_or_drains_is_not_taken(
    cluster: MemoryCluster,
) -> None:
    first = await cluster.start("w1", echo)
    withdrawn, gone, draining = [await cluster.start(f"w{number}", echo) for number in (2, 3, 4)]
    withdrawn.client.withdraw("echo")
    gone.scope.cancel()
    draining.client.drain("stopping")
    await wait_all_tasks_blocked()
    first.scope.cancel()
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.served_by("echo") == []
    draining.client.close("stopped")


async def test_a_replica_of_another_kind_is_taken_when_those_of_the_first_kind_are_gone(
    nursery: trio.Nursery,
) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    first, second = await cluster.start("w1", echo), await cluster.start("w2", echo)
    third = await cluster.start("w3")
    backend = HandlerBackend(ModelInfo("echo", "embedding"), echo, third.pool)
    third.router.catalog.add(backend.info, backend)
    third.client.announce(backend.info)
    await wait_all_tasks_blocked()
    first.scope.cancel()
    await wait_all_tasks_blocked()
    assert "w2" in third.client.rejected_models["echo"], "the reason is out of date"
    second.scope.cancel()
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.served_by("echo") == ["w3"]
    assert third.client.rejected_models == {}


async def test_a_refused_model_is_taken_when_the_option_changes(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    await cluster.start("w1", echo)
    second = await cluster.start("w2", echo)
    cluster.options.on_conflict = "replicate"
    await trio.sleep(2 * cluster.options.heartbeat_interval)
    assert cluster.router.catalog.served_by("echo") == ["w1", "w2"]
    assert second.client.rejected_models == {}


async def test_a_model_that_was_refused_for_a_circle_is_taken_when_there_is_none_any_more(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker, catalog = await cluster.start("w1"), cluster.router.catalog
    backend = HandlerBackend(ModelInfo("m", "chat", via=(catalog.cluster_id,)), echo, worker.pool)
    worker.router.catalog.add(backend.info, backend)
    worker.client.announce(backend.info)
    await wait_all_tasks_blocked()
    assert "came through this cluster" in worker.client.rejected_models["m"]
    await trio.sleep(2 * cluster.options.heartbeat_interval)
    assert catalog.served_by("m") == []
    catalog.cluster_id = "another"  # type: ignore[misc]
    await trio.sleep(2 * cluster.options.heartbeat_interval)
    assert catalog.served_by("m") == ["w1"]
    assert worker.client.rejected_models == {}


async def test_with_replicas_both_serve_and_one_may_go(nursery: trio.Nursery) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    first = await cluster.start("w1", echo)
    await cluster.start("w2", echo)
    assert cluster.router.catalog.served_by("echo") == ["w1", "w2"]
    first.scope.cancel()
    await first.over.wait()
    await wait_all_tasks_blocked()
    assert cluster.router.catalog.served_by("echo") == ["w2"]
    assert isinstance((await everything(cluster.router.open(chat_request("echo"))))[-1], Done)


async def test_a_lost_replica_is_removed_before_a_call_can_be_routed_to_it(nursery: trio.Nursery) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    first = await cluster.start("w1", echo)
    await cluster.start("w2", echo)
    # Or it would come back, after a random time that can be shorter than this test.
    cluster.refusing = True
    first.cut()
    for _ in range(30):
        # One at a time, through every step that the master takes to notice.
        cluster.router.open(chat_request("echo"))
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    # Opening never failed: at every moment, the replicas in the catalogue could be given calls.
    assert cluster.router.stats.admitted == 30
    assert cluster.router.catalog.served_by("echo") == ["w2"]


async def test_the_calls_of_a_silent_worker_fail_before_the_closing_handshake(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    assert isinstance(await call.receive(), Head)
    await trio.sleep(0.5)
    worker.lose_way()
    await trio.sleep(29)
    assert not call.ended
    await trio.sleep(1)
    assert call.ended


async def test_a_call_without_an_answer_yet_can_be_retried_on_another_replica(
    nursery: trio.Nursery,
) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")

    async def shared(request: ChatRequest) -> AsyncIterator[str]:
        await trio.sleep_forever()
        yield "x"

    async def serves(request: ChatRequest) -> str:
        return "x"

    first = await cluster.start("w1", shared)
    call = cluster.router.open(chat_request("shared"))
    serves.__name__ = "shared"
    await cluster.start("w2", serves)
    first.cut()
    await everything(call)
    again = cluster.router.reopen(call)
    assert again is not None
    assert again.served_by == "w2"
    assert isinstance((await everything(again))[-1], Done)


async def test_a_call_that_crosses_the_end_of_its_model_can_be_retried_on_another_replica(
    nursery: trio.Nursery,
) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    first = await cluster.start("w1", echo)
    await cluster.start("w2", echo)
    call = cluster.router.open(chat_request("echo"))
    assert call.served_by == "w1"
    first.router.catalog.remove("echo", first.router.catalog.replicas("echo")[0])
    first.client.withdraw("echo")
    assert isinstance(last := (await everything(call))[-1], Failed)
    assert (last.error.status, last.error.code) == (503, "model_unavailable")
    again = cluster.router.reopen(call)
    assert again is not None
    assert again.served_by == "w2"
    assert isinstance((await everything(again))[-1], Done)


async def test_a_handler_that_reports_that_the_model_does_not_exist_is_not_retried_elsewhere(
    nursery: trio.Nursery,
) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")

    async def picky(request: ChatRequest) -> str:
        raise ApiError(404, "not here", code="model_not_found")

    await cluster.start("w1", picky)
    await cluster.start("w2", picky)
    call = cluster.router.open(chat_request("picky"))
    assert isinstance((await everything(call))[-1], Failed)
    assert cluster.router.reopen(call) is None


async def test_another_process_cannot_take_the_name_of_a_live_worker(cluster: MemoryCluster) -> None:
    first = await cluster.start("w1", echo)
    second = _worker(cluster, "w1", forever)
    cluster.nursery.start_soon(second.run)
    await wait_all_tasks_blocked()
    assert not second.client.connected
    assert first.client.connected
    assert cluster.router.catalog.names() == ["echo"]
    second.scope.cancel()


async def test_a_worker_that_reconnects_before_its_loss_was_noticed_replaces_itself(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    assert isinstance(await call.receive(), Head)
    ours, _theirs = worker.streams
    # The worker loses its connection; the master does not notice, and goes on waiting.
    ours.peer.end()
    ours.held = True
    last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    assert "replaced" in last.error.message or "broke" in last.error.message
    await trio.sleep(60)
    assert worker.client.connected
    assert cluster.router.catalog.served_by("forever") == ["w1"]
    assert len(cluster.manager.workers) == 1


async def test_a_new_connection_of_the_same_process_replaces_the_old_one_and_is_logged_once(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    old, new = RawWorker(cluster), RawWorker(cluster)
    await old.join("w1", "m", instance="one process")
    await wait_all_tasks_blocked()
    call = cluster.router.open(chat_request("m", request_id="lost"))
    before = cluster.manager.workers["w1"]
    await new.join("w1", "m", instance="one process")
    await wait_all_tasks_blocked()
    assert cluster.manager.workers["w1"] is not before
    assert cluster.router.catalog.replicas("m") == [cluster.manager.workers["w1"]]
    assert isinstance(last := (await everything(call))[-1], Failed)
    assert "replaced by a new connection of the same worker" in last.error.message
    left = [record for record in caplog.records if "worker left" in record.getMessage()]
    (fields,) = [vars(record)["fields"] for record in left]
    assert (fields["calls_lost"], fields["request_ids"]) == (1, ["lost"])


@pytest.mark.parametrize(("after", "replaced"), [(12, False), (13, True)])
async def test_another_process_may_take_the_name_of_a_worker_that_missed_its_heartbeats(
    nursery: trio.Nursery, autojump_clock: MockClock, after: float, replaced: bool
) -> None:
    cluster = MemoryCluster(nursery, heartbeat_interval=5, worker_timeout=30)
    old = RawWorker(cluster)
    await old.join("w1", "m", instance="one process")
    await trio.sleep(after)
    new = RawWorker(cluster)
    await new.join("w1", "m", instance="another process")
    await wait_all_tasks_blocked()
    assert cluster.manager.workers["w1"].instance == ("another process" if replaced else "one process")


async def test_the_end_of_an_old_link_leaves_the_new_one_alone(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", echo)
    for _ in range(5):
        worker.cut()
        await trio.sleep(60)
        assert cluster.router.catalog.names() == ["echo"]
        assert isinstance((await everything(cluster.router.open(chat_request("echo"))))[-1], Done)
    assert len(cluster.manager.workers) == 1


def _worker(cluster: MemoryCluster, name: str, *handlers: Any, **options: Any) -> Worker:
    worker = Worker(cluster, name, **options)
    for handler in handlers:
        worker.serve(handler.__name__, handler)
    return worker


async def test_a_worker_that_drains_gets_no_new_calls_and_finishes_its_own(nursery: trio.Nursery) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    go = trio.Event()

    async def waits(request: ChatRequest) -> str:
        await go.wait()
        return "x"

    first = await cluster.start("w1", waits)
    call = cluster.router.open(chat_request("waits"))
    await wait_all_tasks_blocked()
    await cluster.start("w2", waits)
    first.client.drain("going home")
    await wait_all_tasks_blocked()
    assert cluster.manager.workers["w1"].state == "draining"
    later = [cluster.router.open(chat_request("waits")) for _ in range(3)]
    assert {other.served_by for other in later} == {"w2"}
    go.set()
    assert isinstance((await everything(call))[-1], Done)


async def test_a_worker_that_is_drained_by_an_operator_gets_no_new_calls_and_is_asked_to_stop(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    first = await cluster.start("w1", echo)
    await cluster.start("w2", echo)
    with caplog.at_level(logging.INFO, "trio_cluster"):
        status = cluster.manager.drain_worker("w1", "an upgrade")
        # At once, and not only when the worker has received it.
        assert {cluster.router.open(chat_request("echo")).served_by for _ in range(4)} == {"w2"}
    assert status is not None
    assert (status.id, status.state, status.draining) == ("w1", "draining", True)
    assert status.instance == first.client.instance
    assert "worker is asked to stop: an upgrade" in caplog.text
    assert first.shutdown_requests == []
    await wait_all_tasks_blocked()
    assert first.shutdown_requests == ["an upgrade"]
    assert cluster.manager.drain_worker("nobody", "an upgrade") is None


async def test_the_status_of_a_worker_has_these_fields(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever, echo)
    await trio.sleep(6.00049)
    (status,) = cluster.manager.status()
    assert msgspec.to_builtins(status) == {
        "id": "w1",
        "instance": worker.client.instance,
        "address": "memory:0",
        "state": "ok",
        "draining": False,
        "stalled": "",
        "models": ["echo", "forever"],
        "running": 0,
        "waiting": 0,
        "capacity": 10,
        "in_flight": 0,
        "lag": 0.0,
        "connected_for": 6.0,
        "admitted": "open",
        "waiting_by": {},
        "in_flight_elsewhere": 0,
        "ejected": {},
        "model_states": {},
        "failed_models": [],
        "version": __version__,
    }
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        status.state = "busy"  # type: ignore[misc]


async def test_a_call_that_a_worker_had_not_begun_when_its_time_was_over_is_given_back(
    nursery: trio.Nursery,
) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")

    async def shared(request: ChatRequest) -> AsyncIterator[str]:
        if request.last_text == "begin":
            yield "begun"
        await trio.sleep_forever()

    first = await cluster.start("w1", shared)
    silent = cluster.router.open(chat_request("shared"))
    begun = cluster.router.open(chat_request("shared", content="begin"))
    assert isinstance(await begun.receive(), Head)
    await cluster.start("w2", shared)
    first.router.drain("going home")
    first.router.cancel_all("the worker is being stopped")
    last = (await everything(silent))[-1]
    assert isinstance(last, Failed)
    assert last.error.code == "shutting_down"
    again = cluster.router.reopen(silent)
    assert again is not None
    assert again.served_by == "w2"
    last = (await everything(begun))[-1]
    assert isinstance(last, Failed)
    assert last.error.code == "cancelled"
    assert cluster.router.reopen(begun) is None


async def test_the_load_of_a_worker_is_known(cluster: MemoryCluster, autojump_clock: MockClock) -> None:
    worker = await cluster.start("w1", forever)
    worker.options.server.max_concurrency = 3
    worker.options.server.queue_timeout = 100
    for _ in range(5):
        cluster.router.open(chat_request("forever"))
    await trio.sleep(6)
    (status,) = cluster.manager.status()
    assert (status.running, status.waiting, status.capacity) == (3, 2, 3)
    assert status.in_flight == 5
    assert status.models == ["forever"]


# Blocked is not lost


def _send(worker: Worker, beat: Heartbeat) -> None:
    """Let a worker send a heartbeat that its event loop would not send."""
    connection = worker.client.connections[0]
    assert connection is not None
    connection.session._outbox.post(beat)
    connection.link.wake()


_BLOCKED = Heartbeat(1, 0, 10, 7.5, "handler of 'forever' (app.py:12 in compute)")


async def test_a_worker_is_ok_or_busy_by_its_slots(cluster: MemoryCluster, autojump_clock: MockClock) -> None:
    worker = await cluster.start("w1", forever)
    remote = cluster.manager.workers["w1"]
    worker.options.server.max_concurrency = 2
    first = cluster.router.open(chat_request("forever"))
    await trio.sleep(6)
    assert (remote.state, remote.capacity) == ("ok", 2)
    cluster.router.open(chat_request("forever"))
    assert remote.state == "busy"
    first.cancel("enough")
    await wait_all_tasks_blocked()
    await trio.sleep(6)
    assert remote.state == "ok"
    # Its own clients count as well.
    for _ in range(2):
        worker.router.open(chat_request("forever"))
    await trio.sleep(6)
    assert (remote.state, remote.in_flight) == ("busy", 1)
    assert remote.health.available


async def test_a_worker_that_reports_that_it_is_blocked_keeps_its_calls_and_gets_no_new_ones(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    worker = await cluster.start("w1", forever)
    remote = cluster.manager.workers["w1"]
    call = cluster.router.open(chat_request("forever"))
    assert isinstance(await call.receive(), Head)
    _send(worker, _BLOCKED)
    await wait_all_tasks_blocked()
    (status,) = cluster.manager.status()
    assert status.state == "stalled"
    assert status.stalled == "handler of 'forever' (app.py:12 in compute)"
    assert status.lag == 7.5
    with pytest.raises(ApiError) as refused:
        cluster.router.open(chat_request("forever"))
    assert (refused.value.status, refused.value.code) == (503, "over_capacity")
    assert refused.value.retry_after is not None
    assert "Every node that serves 'forever' is busy" in refused.value.message
    _send(worker, _BLOCKED)
    await wait_all_tasks_blocked()
    assert not call.ended
    # Its loop runs again: the next heartbeat is its own.
    await trio.sleep(6)
    assert remote.state == "ok"
    cluster.router.open(chat_request("forever"))
    assert not call.ended
    logged = [record.getMessage() for record in caplog.records if record.name == "trio_cluster.workers"]
    assert [message for message in logged if "stalled" in message or "again" in message] == [
        "worker stalled: handler of 'forever' (app.py:12 in compute)",
        "worker runs again",
    ]


async def test_new_calls_go_to_the_replica_that_is_not_blocked(nursery: trio.Nursery) -> None:
    cluster = MemoryCluster(nursery, on_conflict="replicate")
    first = await cluster.start("w1", forever)
    await cluster.start("w2", forever)
    _send(first, _BLOCKED)
    await wait_all_tasks_blocked()
    calls = [cluster.router.open(chat_request("forever")) for _ in range(4)]
    assert {call.served_by for call in calls} == {"w2"}


async def test_a_worker_that_reports_that_it_is_blocked_and_then_falls_silent_is_dropped(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    call = cluster.router.open(chat_request("forever"))
    assert isinstance(await call.receive(), Head)
    _send(worker, _BLOCKED)
    await wait_all_tasks_blocked()
    start = trio.current_time()
    worker.lose_way()
    last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, WorkerLost)
    assert trio.current_time() - start <= 31


async def test_a_silent_worker_gets_no_new_calls_before_it_is_dropped(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.start("w1", forever)
    worker.lose_way()
    remote = cluster.manager.workers["w1"]
    await trio.sleep(14)
    assert remote.health.available
    await trio.sleep(8)
    assert remote.state == "stalled"
    assert remote.health.stalled.startswith("silent for ")
    assert not remote.health.available
    assert "worker stalled: silent for" in caplog.text
    await trio.sleep(15)
    assert cluster.manager.workers.get("w1") is not remote


async def test_how_far_a_call_is_on_its_worker_is_known(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = await cluster.start("w1", forever)
    worker.options.server.max_concurrency = 1
    worker.options.server.queue_timeout = 100
    running = cluster.router.open(chat_request("forever"))
    await wait_all_tasks_blocked()
    queued = cluster.router.open(chat_request("forever"))
    assert queued.phase == "waiting"
    await trio.sleep(6)
    assert (running.phase, queued.phase) == ("streaming", "queued")
    assert running.produced == running.body.waiting_bytes > 0
    assert queued.produced == 0
    running.cancel("enough")
    await trio.sleep(6)
    assert queued.phase == "streaming"


async def test_a_worker_logs_that_its_master_is_blocked(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")
    await cluster.start("w1", forever)
    (connection,) = cluster.manager._connections
    for beat in (_BLOCKED, _BLOCKED, Heartbeat(), Heartbeat()):
        connection.session._outbox.post(beat)
    connection.link.wake()
    await wait_all_tasks_blocked()
    logged = [record.getMessage() for record in caplog.records if record.name == "trio_cluster.client"]
    assert [message for message in logged if "blocked" in message or "again" in message] == [
        f"the master is blocked: {_BLOCKED.blocked}",
        "the master runs again",
    ]


async def test_a_wrong_token_is_refused_and_logged_on_both_sides(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = MemoryCluster(nursery, cluster_token="right")
    worker = _worker(cluster, "w1", echo, cluster_token="wrong")
    nursery.start_soon(worker.run)
    await worker.over.wait()
    assert "wrong or missing cluster token" in str(worker.error)
    assert "wrong or missing cluster token" in caplog.text
    assert cluster.router.catalog.names() == []
    right = await cluster.start("w2", echo, cluster_token="right")
    assert right.client.connected


async def test_nothing_that_a_probe_sends_after_its_handshake_is_decoded(
    cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr("trio_cluster.protocol.session.decode", decoded.append)
    probe = RawWorker(cluster)
    await probe.join("w1", "m", path=PROBE_PATH)
    await wait_all_tasks_blocked()
    assert (decoded, cluster.manager.workers) == ([], {})


async def test_nothing_that_a_worker_sends_whose_name_is_taken_is_decoded(
    cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.start("w1", echo)
    decoded: list[bytes] = []
    monkeypatch.setattr("trio_cluster.protocol.session.decode", decoded.append)
    await RawWorker(cluster).join("w1", "m")
    await wait_all_tasks_blocked()
    assert decoded == []


@pytest.mark.parametrize("origin", [b"http://evil.example", b"null", b"", b"http://master:9000"])
@pytest.mark.parametrize("path", [PATH, PROBE_PATH, "/elsewhere"])
@pytest.mark.parametrize("token", [None, "secret"])
async def test_a_web_page_can_neither_join_nor_probe(
    nursery: trio.Nursery, origin: bytes, path: str, token: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = MemoryCluster(nursery, cluster_token=token)
    headers = ((b"Origin", origin), (b"Authorization", b"Bearer secret"))
    answer = await RawWorker(cluster).handshake(path, headers)
    assert answer.startswith(b"HTTP/1.1 403 ")
    await wait_all_tasks_blocked()
    assert "connection refused: no web page may connect here" in caplog.text
    assert (await RawWorker(cluster).handshake(PROBE_PATH)).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize(
    ("version", "code", "unregisters", "retryable"),
    [
        ("0.1.0", "shutting_down", False, True),
        ("0.1.0", "model_not_found", True, True),
        ("0.1.0", "model_not_found", False, False),
        ("0.1.0", "over_capacity", False, False),
        ("0.2.0", "shutting_down", False, False),
        ("0.2.0", "model_not_found", True, False),
    ],
)
async def test_a_worker_that_does_not_know_retryable_gives_calls_back_by_its_error(
    version: str, code: str, unregisters: bool, retryable: bool, nursery: trio.Nursery
) -> None:
    cluster = MemoryCluster(nursery)
    worker = RawWorker(cluster)
    await worker.join("w1", "m", version=version)
    await wait_all_tasks_blocked()
    call = cluster.router.open(chat_request("m"))
    await wait_all_tasks_blocked()
    opened = [each for each in await worker.take() if isinstance(each, ForwardRequest)]
    messages: list[Any] = [UnregisterModel("m")] if unregisters else []
    messages.append(FailedMessage.of(opened[0].call, ApiError(503, "no", code=code)))
    await worker.send(encode(messages))
    last = (await everything(call))[-1]
    assert isinstance(last, Failed)
    assert (last.error.code, last.retryable) == (code, retryable)
