"""The Messages API, from registering a model to the answer, wherever its handler runs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, ChatRequest, ClusterServer, OutputChunk, RawCall
from trio_cluster.testing import (
    SimulatedCluster,
    assert_no_orphans,
    assert_stats_balance,
    open_cluster,
    settle,
    worker,
)

BODY = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi there"}]}
COUNT = "/v1/messages/count_tokens"


async def answer(request: ChatRequest) -> AsyncIterator[Any]:
    yield "some "
    if "fail" in request.last_text:
        raise ApiError(503, "as you wish", code="wished")
    yield "words"
    yield OutputChunk.usage(7, 2)


def count(request: ChatRequest) -> int:
    return sum(len(message["content"].split()) for message in request.messages)


@pytest.fixture
async def cluster(autojump_clock: MockClock) -> AsyncIterator[SimulatedCluster]:
    async with open_cluster() as opened:
        yield opened
        await settle(opened)
        assert_no_orphans(opened)
        assert_stats_balance(opened)


@pytest.fixture(params=["master", "worker"])
async def node(request: pytest.FixtureRequest, cluster: SimulatedCluster) -> ClusterServer:
    """A node of the cluster: the one that has the API, or one behind it."""
    if request.param == "master":
        return cluster.master.server
    server = worker("w1")
    await cluster.start_worker(server)
    return server


async def ask(cluster: SimulatedCluster, path: str = "/v1/messages", **fields: Any) -> Any:
    await trio.sleep(0.1)
    return await cluster.client().post(path, {"model": "m", **BODY, **fields})


async def test_a_chat_model_answers(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer
) -> None:
    node.register_chat("m", answer)
    response = await ask(cluster, "/v1/messages?beta=true")
    assert response.json()["content"] == [{"type": "text", "text": "some words"}]
    report = (await ask(cluster, stream=True)).report()
    assert (report.ending, report.text, report.finish_reasons) == ("finished", "some words", {0: "stop"})
    assert report.usage is not None
    assert report.usage["input_tokens"] == 7


async def test_a_client_that_looks_for_the_server_first_finds_it(
    autojump_clock: MockClock, cluster: SimulatedCluster
) -> None:
    async with cluster.client().open("HEAD", "/") as response:
        assert response.status == 200


async def test_a_stream_that_fails_says_so_in_its_own_grammar(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer
) -> None:
    node.register_chat("m", answer)
    response = await ask(cluster, stream=True, messages=[{"role": "user", "content": "fail"}])
    report = response.report()
    assert (report.ending, report.text) == ("failed", "some ")
    assert report.error == {"type": "overloaded_error", "message": "as you wish", "code": "wished"}
    assert response.complete
    cluster.master.server.options.server.stream_failure = "abort"
    response = await ask(cluster, stream=True, messages=[{"role": "user", "content": "fail"}])
    assert response.report().ending == "failed"
    assert not response.complete


async def test_tokens_are_counted_by_the_handler_s_own_function(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer
) -> None:
    node.register_chat("m", answer, count_tokens=count)
    response = await ask(cluster, COUNT, system="be brief", max_tokens=None)
    assert (response.status, response.json()) == (200, {"input_tokens": 4})
    assert response.headers["request-id"]


async def test_counting_waits_for_no_slot(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer
) -> None:
    node.set_max_concurrency(1)
    begun = trio.Event()

    @node.chat("m", count_tokens=count)
    async def handle(request: ChatRequest) -> str:
        begun.set()
        await trio.sleep(100)
        return "late"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, cluster)
        await begun.wait()
        with trio.fail_after(10):
            assert (await ask(cluster, COUNT)).json() == {"input_tokens": 2}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a passthrough model"])
async def test_without_a_function_nothing_is_guessed(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer, beside: bool
) -> None:
    node.register_chat("m", answer)
    node.register_embedding("e", lambda request: [1.0])

    async def relay(call: RawCall) -> None:
        call.begin(200, "application/json")
        await call.send(b'{"input_tokens":3}')

    if beside:
        node.register_raw("raw", relay)
    response = await ask(cluster, COUNT)
    assert (response.status, response.error["code"]) == (501, "not_supported")
    assert response.headers["x-should-retry"] == "false"
    assert (await ask(cluster, COUNT, model="e")).error["code"] == "model_kind_mismatch"
    unknown = await ask(cluster, COUNT, model="nobody")
    assert (unknown.status, unknown.error["type"]) == (404, "not_found_error")
    if beside:
        assert (await ask(cluster, COUNT, model="raw")).json() == {"input_tokens": 3}


async def test_a_replica_that_counts_is_asked(autojump_clock: MockClock, cluster: SimulatedCluster) -> None:
    cluster.master.server.options.on_conflict = "replicate"
    for name in ("w1", "w2", "w3"):
        server = worker(name)
        server.register_chat("m", answer, count_tokens=count if name == "w2" else None)
        await cluster.start_worker(server)
    for _ in range(4):
        assert (await ask(cluster, COUNT)).json() == {"input_tokens": 2}


@pytest.mark.parametrize("given", ["3", 2.5, True, -1, None])
async def test_a_function_that_does_not_count_has_failed(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer, given: Any
) -> None:
    node.register_chat("m", answer, count_tokens=lambda request: given)
    response = await ask(cluster, COUNT)
    assert (response.status, response.error["type"]) == (500, "api_error")


def test_a_function_of_no_shape_is_refused_where_it_is_registered() -> None:
    server = ClusterServer(0)
    with pytest.raises(TypeError):
        server.register_chat("m", answer, count_tokens=3)  # type: ignore[arg-type]
    assert not server.has_model("m")


async def test_thinking_comes_back_as_it_was_given(
    autojump_clock: MockClock, cluster: SimulatedCluster, node: ClusterServer
) -> None:
    seen: list[Any] = []
    thought = {"type": "thinking", "thinking": "hm", "signature": "EqQB/+=="}

    @node.chat("m")
    def handle(request: ChatRequest) -> dict[str, Any]:
        seen.append(request)
        return {"message": {"content": "yes", "thinking_blocks": [thought]}}

    content = (await ask(cluster)).json()["content"]
    assert content == [thought, {"type": "text", "text": "yes"}]
    turn = {"role": "assistant", "content": content}
    sent = [*BODY["messages"], turn, *BODY["messages"]]  # type: ignore[misc]
    await ask(cluster, messages=sent)
    assert seen[1].messages[1]["thinking_blocks"] == [thought]
    assert json.loads(json.dumps(seen[1].raw["messages"])) == sent
