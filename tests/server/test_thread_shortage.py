"""A node that can start no further thread: that costs the requests that need one, and nothing else."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio
from thread_shortage import no_threads
from trio.testing import MockClock

from trio_cluster import ChatRequest, ClusterServer
from trio_cluster.admin import metrics
from trio_cluster.core.limits import PARSE_IN_THREAD
from trio_cluster.core.threads import NoThread
from trio_cluster.gateway.body import SPOOL_THRESHOLD, SpooledBody
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

SHORTAGE = (503, "over_capacity")


def returns(request: ChatRequest) -> str:
    return "hello"


def yields(request: ChatRequest) -> Iterator[str]:
    yield "hello"


def pushes(request: ChatRequest, provider: Any) -> None:
    provider.push("hello")
    provider.end()


async def waits(request: ChatRequest) -> str:
    return "hello"


async def starts_a_thread(request: ChatRequest) -> str:
    return await trio.to_thread.run_sync(str, "hello")


async def starts_some(request: ChatRequest) -> str:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, int)
    return "hello"


async def opens_a_file(request: ChatRequest) -> str:
    raise OSError(errno.EMFILE, "Too many open files", "weights")


HANDLERS = (returns, yields, pushes, starts_a_thread, starts_some)


def with_models(server: ClusterServer) -> ClusterServer:
    for handler in (*HANDLERS, waits, opens_a_file):
        server.register_chat(handler.__name__, handler)
    return server


@pytest.fixture(params=["local", "forwarded"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[SimulatedCluster]:
    async with open_cluster() as opened:
        if request.param == "local":
            with_models(opened.master.server)
        else:
            await opened.start_worker(with_models(worker("w1")))
        yield opened
        await settle(opened)


async def ask(cluster: SimulatedCluster, model: str, text: str = "x", **more: Any) -> tuple[int, str | None]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    answer = await cluster.client().post("/v1/chat/completions", body)
    return answer.status, answer.error["code"] if answer.status >= 400 else None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_handler_that_needs_a_thread_is_503_and_others_are_answered(
    stream: bool, cluster: SimulatedCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    with no_threads():
        for handler in HANDLERS:
            assert await ask(cluster, handler.__name__, stream=stream) == SHORTAGE
        assert await ask(cluster, "waits", stream=stream) == (200, None)
        answer = await cluster.client().get("/health")
        assert answer.status == 200
    for handler in HANDLERS:
        assert await ask(cluster, handler.__name__, stream=stream) == (200, None)
    assert caplog.text.count("no room for another thread") == 1
    assert {record.message for record in caplog.records if record.exc_info} <= {
        "the handler of 'starts_some' failed"
    }


async def test_a_handler_that_gets_no_descriptor_is_503(
    cluster: SimulatedCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    assert await ask(cluster, "opens_a_file") == SHORTAGE
    assert "the handler of 'opens_a_file' failed" in caplog.text


async def test_a_body_that_is_parsed_in_a_thread_is_503(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    large = "x" * PARSE_IN_THREAD
    with no_threads():
        assert await ask(cluster, "waits", large) == SHORTAGE
        assert await ask(cluster, "waits") == (200, None)
    assert await ask(cluster, "waits", large) == (200, None)


async def test_a_worker_without_a_thread_for_the_body_is_asked_in_vain(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster() as cluster:
        await cluster.start_worker(with_models(worker("w1")))
        # So that the master parses it at once, and the worker would in a thread.
        monkeypatch.setattr("trio_cluster.local.handler.PARSE_IN_THREAD", 10)
        with no_threads():
            assert await ask(cluster, "waits") == SHORTAGE
        assert await ask(cluster, "waits") == (200, None)


async def test_another_replica_is_asked_if_one_has_no_thread(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_cluster(on_conflict="replicate") as cluster:
        for name in ("w1", "w2"):
            await cluster.start_worker(with_models(worker(name)))
        with no_threads():
            # Both are of this process.
            assert await ask(cluster, "returns") == SHORTAGE
        counters = cluster.master.server.router.stats.counters()
        assert (counters["retried"], counters["failed"]) == (1, 2)
        assert await ask(cluster, "returns") == (200, None)


async def test_an_upload_that_cannot_be_kept_for_want_of_a_thread_is_503() -> None:
    spool = SpooledBody()
    with no_threads(), pytest.raises(NoThread):
        await spool.add(b"x" * (SPOOL_THRESHOLD + 1), last=False)
    spool.close()
    spool = SpooledBody()
    await spool.add(b"x" * (SPOOL_THRESHOLD + 1), last=False)
    with no_threads(), pytest.raises(NoThread):
        await spool.take()
    assert await spool.take() != b""
    spool.close()


async def test_the_numbers_of_a_large_node_can_be_read_without_a_thread(
    cluster: SimulatedCluster, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_MANY", 1)
    with no_threads():
        answer = await cluster.client().get("/metrics")
    assert answer.status == 200
    assert b"trio_cluster_" in answer.body


async def test_a_view_of_a_program_that_needs_a_thread_is_503(
    cluster: SimulatedCluster, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    app = cluster.master.server.app
    assert app is not None

    @app.route("/mine")
    def mine() -> str:
        return "mine"

    with no_threads():
        answer = await cluster.client().get("/mine")
        assert (answer.status, answer.error["code"]) == SHORTAGE
    assert (await cluster.client().get("/mine")).body == b"mine"


async def test_the_names_of_models_are_written_down_without_a_thread(
    autojump_clock: MockClock, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with open_cluster(state_dir=str(tmp_path / "s")) as cluster:
        with no_threads():
            await cluster.start_worker(with_models(worker("w1")))
            await trio.sleep(2)
        assert b'"waits"' in (tmp_path / "s" / "models.json").read_bytes()
        assert cluster.master.error is None


async def test_a_node_with_accounts_goes_on_without_threads_and_writes_usage_down_later(
    autojump_clock: MockClock, tmp_path: Any
) -> None:
    async with open_cluster(state_dir=str(tmp_path / "s"), operator_key="o") as cluster:
        await cluster.start_worker(with_models(worker("w1")))
        # Threads that work at this moment would be used again.
        await trio.sleep(3)
        with no_threads():
            assert await ask(cluster, "waits") == (200, None)
            await trio.sleep(10)
            answer = await cluster.client(authorization="Bearer o").get("/cluster/usage")
            assert (answer.status, answer.error["code"]) == (503, "database_unavailable")
        await trio.sleep(10)
        assert cluster.master.error is None
        answer = await cluster.client(authorization="Bearer o").get("/cluster/usage")
        assert answer.status == 200
        assert [row["requests"] for row in answer.json()["data"]] == [1]
