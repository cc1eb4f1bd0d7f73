"""The simulated cluster: faults of its nodes look from outside as they do with real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from trio_cluster import ClusterServer, CustomRequest, HandshakeRefused
from trio_cluster.http1.connection import Http1Connection
from trio_cluster.testing import (
    FakeModel,
    SimulatedClient,
    SimulatedCluster,
    SimulatedNetwork,
    StreamGrammarError,
    ThreadedFakeModel,
    check_streams,
    open_cluster,
    settle,
    worker,
)


async def start(cluster: SimulatedCluster, model: FakeModel, name: str = "w1", **options: object) -> None:
    server = worker(name, **options)
    server.register_chat("m", model)
    await cluster.start_worker(server)


async def names(cluster: SimulatedCluster) -> list[str]:
    models = (await cluster.client().get("/v1/models")).json()
    return [each["id"] for each in models["data"]]


async def test_a_killed_worker_fails_its_streams_at_once_and_sends_nothing_more(
    cluster: SimulatedCluster,
) -> None:
    model = FakeModel(tokens=100, interval=1, ignore_cancellation_for=20)
    await start(cluster, model)
    async with cluster.client().open_chat("m") as response:
        await response.receive_until(b"t3")
        cluster.workers["w1"].kill()
        report = (await response.finish()).report()
    assert report.error is not None
    assert (report.ending, report.error["code"]) == ("failed", "worker_lost")
    assert trio.current_time() == 3
    assert await names(cluster) == []
    await cluster.workers["w1"].over.wait()
    assert cluster.workers["w1"].error is None


async def test_a_frozen_worker_is_lost_after_the_timeout_and_comes_back(
    cluster: SimulatedCluster,
) -> None:
    await start(cluster, FakeModel(tokens=100, interval=1))
    node = cluster.workers["w1"]
    async with cluster.client().open_chat("m") as response:
        await response.receive_until(b"t3")
        node.freeze()
        report = (await response.finish()).report()
    assert report.ending == "failed"
    assert 30 <= trio.current_time() <= 40
    assert await names(cluster) == []
    node.thaw()
    await trio.sleep(60)
    assert await names(cluster) == ["m"]


async def test_a_stopped_worker_finishes_its_calls(cluster: SimulatedCluster) -> None:
    await start(cluster, FakeModel(tokens=5, interval=1))
    async with cluster.client().open_chat("m") as response:
        await response.receive_until(b"t1")
        cluster.workers["w1"].stop()
        assert (await response.finish()).report().ending == "finished"
    await cluster.workers["w1"].over.wait()


async def test_a_broken_link_is_reconnected(cluster: SimulatedCluster) -> None:
    await start(cluster, FakeModel())
    old = cluster.workers["w1"].link
    for harm in (old.cut, old.reset):
        harm()
        await trio.sleep(5)
        assert await names(cluster) == ["m"]
    assert cluster.workers["w1"].link is not old


async def test_workers_reconnect_to_a_new_master(cluster: SimulatedCluster) -> None:
    await start(cluster, FakeModel())
    cluster.master.kill()
    await cluster.master.over.wait()
    with pytest.raises(ConnectionRefusedError):
        await names(cluster)
    await cluster.start_master()
    await trio.sleep(60)
    assert await names(cluster) == ["m"]
    assert len(cluster.past) == 1


async def test_a_partition_affects_one_client_and_no_other(
    cluster: SimulatedCluster,
) -> None:
    await start(cluster, FakeModel())
    cluster.network.partition("client", "master")
    with trio.move_on_after(100) as waited:
        await cluster.client().get("/health")
    assert waited.cancelled_caught
    assert (await cluster.client("another").chat("m")).report().ending == "finished"
    cluster.network.heal("client", "master")
    assert (await cluster.client().chat("m")).report().ending == "finished"


async def test_a_client_that_leaves_and_one_that_crashes_stop_their_handlers(
    cluster: SimulatedCluster,
) -> None:
    model = FakeModel(stall_at=1)
    await start(cluster, model)
    for number, leaves in enumerate(("leave", "reset"), start=1):
        async with cluster.client().open_chat("m") as response:
            await response.receive_until(b"t0")
            getattr(response, leaves)()
            await model.wait_until(lambda m, number=number: m.cleaned_up == number)  # type: ignore[misc]
    assert (model.cancelled, trio.current_time()) == (2, 0)


async def test_a_client_that_does_not_read_blocks_only_its_own_handler(cluster: SimulatedCluster) -> None:
    model = FakeModel(tokens=40, piece_size=100_000)
    await start(cluster, model)
    async with cluster.client().open_chat("m") as slow:
        await trio.sleep(10)
        assert (model.running, len(slow.received)) == (1, 0)
        assert (await cluster.client("another").chat("m")).report().text == model.text()
        assert model.running == 1
        assert (await slow.finish()).report().text == model.text()


async def test_a_worker_that_the_master_refuses_raises_the_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_cluster(cluster_token="right") as cluster:
        with pytest.raises(HandshakeRefused, match="token"):
            await cluster.start_worker(worker("w1", cluster_token="wrong"))


async def test_a_worker_needs_a_name(cluster: SimulatedCluster) -> None:
    with pytest.raises(ValueError, match="worker_id"):
        await cluster.start_worker(ClusterServer())


async def test_a_master_may_have_models_of_its_own(cluster: SimulatedCluster) -> None:
    cluster.master.stop()
    await cluster.master.over.wait()
    server = ClusterServer()
    model = ThreadedFakeModel(first_after=3)
    server.register_chat("own", model)
    await cluster.start_master(server)
    assert (await cluster.client().chat("own")).report().text == model.text()


@pytest.mark.parametrize("fast_path", [True, False])
async def test_tokens_take_the_fast_path_unless_it_is_switched_off(
    fast_path: bool, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bytes] = []
    send = Http1Connection.send_nowait

    def send_nowait(connection: Http1Connection, body: bytes | memoryview) -> bool:
        gone = send(connection, body)
        taken.append(bytes(body))
        return gone

    monkeypatch.setattr(Http1Connection, "send_nowait", send_nowait)
    model = FakeModel(tokens=20, interval=1)
    async with open_cluster(fast_path=fast_path) as cluster:
        await start(cluster, model)
        assert (await cluster.client().chat("m", stream=True)).report().text == model.text()
    assert bool(taken) is fast_path


async def test_an_exception_of_the_block_is_not_wrapped_in_a_group(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_cluster():
            raise ZeroDivisionError


async def test_every_stream_is_recorded_and_checked(cluster: SimulatedCluster) -> None:
    await start(cluster, FakeModel())
    await cluster.client().chat("m")
    async with cluster.client().open_chat("m") as response:
        await response.receive_until(b"t0")
    await settle(cluster)
    finished, left = cluster.responses
    assert (finished.over, finished.complete, left.over) == (True, True, False)
    check_streams(cluster.responses)
    finished.complete = False
    with pytest.raises(StreamGrammarError, match="finished"):
        check_streams(cluster.responses)
    finished.complete = True
    left.received += b"nonsense\n\n"
    with pytest.raises(StreamGrammarError, match="nonsense"):
        check_streams(cluster.responses)
    cluster.responses.clear()


async def test_a_response_to_a_request_that_was_not_read_to_its_end_is_received(
    nursery: trio.Nursery,
) -> None:
    network = SimulatedNetwork()
    (listener,) = await network.host("server").listen("", 80)

    async def refuse() -> None:
        stream = await listener.accept()
        await stream.receive_some(100)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await stream.aclose()

    nursery.start_soon(refuse)
    client = SimulatedClient(network.host("client"), "server", 80)
    response = await client.post("/", bytes(3_000_000))
    assert (response.status, response.body, response.complete) == (413, b"no", True)
    await listener.aclose()
    with pytest.raises(ConnectionRefusedError):
        await client.get("/")


async def test_a_connection_that_is_lost_before_the_response_is_an_error(nursery: trio.Nursery) -> None:
    network = SimulatedNetwork()
    (listener,) = await network.host("server").listen("", 80)

    async def hang_up() -> None:
        await (await listener.accept()).aclose()

    nursery.start_soon(hang_up)
    with pytest.raises(ConnectionResetError):
        await SimulatedClient(network.host("client"), "server", 80).get("/")
    await listener.aclose()


async def test_streams_of_custom_routes_are_not_checked_against_the_grammar_of_the_api(
    cluster: SimulatedCluster,
) -> None:
    async def count(request: CustomRequest) -> AsyncIterator[dict[str, int]]:
        for number in range(3):
            yield {"number": number}

    server = worker("w1")
    server.register_chat("m", FakeModel())
    server.route("/v1/count", "m", count)
    await cluster.start_worker(server)
    response = await cluster.client().post("/v1/count/", {"model": "m", "stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    assert b'{"number":2}' in response.body
    check_streams(cluster.responses)
