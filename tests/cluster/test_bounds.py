"""What a worker, or whoever reaches the port for workers, can make a master keep, log or say is bounded."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import trio
from memory_cluster import MemoryCluster, Worker, echo
from memory_streams import MemoryStream
from test_master import RawWorker
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.cluster.master import HANDSHAKE_TIMEOUT, MAX_MODELS, MAX_UNADMITTED
from trio_cluster.cluster.remote_worker import MAX_CAPACITY
from trio_cluster.core.model import ModelInfo
from trio_cluster.errors import ModelNotFound
from trio_cluster.link.websocket import PROBE_PATH
from trio_cluster.net.throttled_log import BURST, LINES_PER_SECOND, ThrottledLog
from trio_cluster.protocol import (
    Heartbeat,
    ModelRejected,
    RegisterModel,
    encode,
)


@pytest.fixture
def cluster(nursery: trio.Nursery) -> MemoryCluster:
    return MemoryCluster(nursery)


async def closed_after(stream: MemoryStream) -> float:
    """Read until the other end closes the connection; return after how many seconds that was."""
    began = trio.current_time()
    while await stream.receive_some():
        pass
    return trio.current_time() - began


@pytest.mark.parametrize(
    "said", ["nothing", "half a request", "a websocket", "a probe", "bytes now and then"]
)
async def test_a_connection_without_a_worker_ends_after_ten_seconds(
    cluster: MemoryCluster, said: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await cluster.start("w1", echo)
    raw = RawWorker(cluster)
    stream = raw._stream
    if said == "half a request":
        await stream.send_all(b"GET /cluster HTTP/1.1\r\n")
    elif said in ("a websocket", "a probe"):
        await raw.handshake(*([PROBE_PATH] if said == "a probe" else []))
    elif said != "nothing":

        async def trickle() -> None:
            try:
                for byte in b"GET /cluster HTTP/1.1\r\nHost: m\r\nX: " + b"x" * 1000:
                    await stream.send_all(bytes((byte,)))
                    await trio.sleep(1)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        cluster.nursery.start_soon(trickle)
    after = await closed_after(stream)
    assert after <= HANDSHAKE_TIMEOUT + 0.01
    await wait_all_tasks_blocked()
    if said != "a probe":
        assert after == pytest.approx(HANDSHAKE_TIMEOUT)
        assert "connection refused: no handshake of a worker within 10 s" in caplog.text
    await trio.sleep(100)
    assert worker.client.connected
    assert len(cluster.manager.sessions) == 1


async def test_the_oldest_silent_connection_makes_room_for_a_new_one(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    first = await cluster.start("w1", echo)
    oldest, _ = cluster.connect()
    await wait_all_tasks_blocked()
    for _ in range(MAX_UNADMITTED - 1):
        cluster.connect()
    await wait_all_tasks_blocked()
    assert len(cluster.manager.sessions) == MAX_UNADMITTED + 1
    # A worker gets in, at the cost of the oldest of them.
    second = await cluster.start("w2")
    assert await closed_after(oldest) < 1
    assert len(cluster.manager.sessions) == MAX_UNADMITTED + 1
    assert sorted(cluster.manager.workers) == ["w1", "w2"]
    for _ in range(3 * MAX_UNADMITTED):
        cluster.connect()
    await wait_all_tasks_blocked()
    assert len(cluster.manager.sessions) == MAX_UNADMITTED + 2
    assert first.client.connected
    assert second.client.connected


async def test_a_worker_may_serve_a_thousand_models(
    cluster: MemoryCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    raw = RawWorker(cluster)
    answers: list[Any] = []
    await raw.join("w1", "m0")
    for begin in range(1, MAX_MODELS + 600, 400):
        models = [RegisterModel.of(ModelInfo(f"m{number}", "chat")) for number in range(begin, begin + 400)]
        await raw.send(encode(models))
        await wait_all_tasks_blocked()
        answers += await raw.take()
    assert len(cluster.manager.workers["w1"].models) == MAX_MODELS
    refused = [answer for answer in answers if isinstance(answer, ModelRejected)]
    assert len(refused) == 601
    assert refused[0].reason == "a worker may serve 1000 models at most"
    assert caplog.text.count("model refused") <= BURST
    # One that it serves may still change, and another one take the place of one that left.
    await raw.send(encode([RegisterModel.of(ModelInfo("m1", "chat", "me"))]))
    await wait_all_tasks_blocked()
    info = cluster.router.catalog.info("m1")
    assert info is not None
    assert info.owner == "me"


async def test_a_model_beyond_the_thousandth_is_taken_when_another_one_is_gone(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    worker = Worker(cluster, "w1")
    for number in range(MAX_MODELS + 2):
        worker.serve(f"m{number:04}", echo)
    cluster.nursery.start_soon(worker.run)
    await worker.registered.wait()
    client = worker.client
    assert list(client.rejected_models) == ["m1000", "m1001"]
    client.withdraw("m0005")
    await trio.sleep(2 * cluster.options.heartbeat_interval)
    assert list(client.rejected_models) == ["m1001"]
    assert cluster.router.catalog.served_by("m1000") == ["w1"]
    assert len(cluster.manager.workers["w1"].models) == MAX_MODELS


async def test_models_that_are_refused_and_kept_are_bounded(
    cluster: MemoryCluster, autojump_clock: MockClock
) -> None:
    raw = RawWorker(cluster)
    await raw.join("w1", "m0")
    circle = (cluster.router.catalog.cluster_id,)
    refused = 0
    for begin in range(1, 2 * MAX_MODELS, 400):
        infos = [ModelInfo(f"m{number}", "chat", via=circle) for number in range(begin, begin + 400)]
        await raw.send(encode([RegisterModel.of(info) for info in infos]))
        await wait_all_tasks_blocked()
        refused += sum(isinstance(answer, ModelRejected) for answer in await raw.take())
    assert refused == 2 * MAX_MODELS
    cluster.router.catalog.cluster_id = "another"  # type: ignore[misc]
    await trio.sleep(2 * cluster.options.heartbeat_interval)
    assert len(cluster.manager.workers["w1"].models) == MAX_MODELS


async def test_a_capacity_is_bounded_and_that_is_logged_once(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    raw = RawWorker(cluster)
    await raw.join("w1", "m")
    for _ in range(3):
        await raw.send(encode([Heartbeat(0, 0, (1 << 31) - 1)]))
        await wait_all_tasks_blocked()
    assert cluster.manager.workers["w1"].capacity == MAX_CAPACITY
    assert cluster.manager.status()[0].capacity == MAX_CAPACITY
    assert caplog.text.count("a capacity of 2147483647 counts as 4096") == 1


async def test_a_master_cannot_make_a_worker_keep_names_that_it_makes_up(cluster: MemoryCluster) -> None:
    worker = await cluster.start("w1", echo)
    (session,) = cluster.manager.sessions
    for number in range(100):
        session.model_rejected(f"made up {number}", "no")
    session.model_rejected("echo", "yes")
    cluster.manager.workers["w1"].request_shutdown("wakes the writer")
    await wait_all_tasks_blocked()
    assert worker.client.rejected_models == {"echo": "yes"}


def test_a_404_lists_few_names_and_says_how_many_there_are() -> None:
    few = ModelNotFound("x", ["b", "a"])
    assert few.message.endswith("Available models: a, b")
    many = ModelNotFound("x", [f"m{number:06}" for number in range(100_000)])
    assert len(many.message) < 1000
    assert "m000000, m000001, " in many.message
    assert many.message.endswith("m000049, and 99950 more")
    assert ModelNotFound("x", ["n" * 512] * 1000).message.count("n" * 512) == 50


async def test_refused_connections_cost_a_few_lines_a_second_and_are_counted(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = MemoryCluster(nursery, cluster_token="secret")
    nursery.start_soon(cluster.manager.serve, [])
    for _ in range(300):
        stream, _ = cluster.connect()
        stream.close()
    await trio.sleep(3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == BURST + 1
    assert lines[-1] == f"{300 - BURST} more connections were refused"


async def test_a_throttled_log_says_everything_that_comes_slowly(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    log = ThrottledLog(logging.getLogger("trio_cluster.test"), "lines")
    nursery.start_soon(log.run)
    for number in range(100):
        log.warning(f"line {number}", {})
        await trio.sleep(1 / LINES_PER_SECOND)
    assert len(caplog.records) == 100
