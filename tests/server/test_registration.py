"""Registering models: what a node answers, what a worker announces, and what a master knows of replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ChatModelOptions, ClusterServer, CustomRequest, RawCall
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def chat(request: Any) -> str:
    return "chat"


async def own(request: CustomRequest) -> dict[str, Any]:
    return {"own": request.path}


async def raw(call: RawCall) -> None:
    call.begin(200, "text/plain")
    await call.send(call.request.endpoint.encode())


@pytest.fixture
async def cluster() -> AsyncIterator[SimulatedCluster]:
    async with open_cluster(on_conflict="replicate") as opened:
        yield opened
        await settle(opened)


def node(name: str) -> ClusterServer:
    return worker(name, on_conflict="replicate")


async def ask(cluster: SimulatedCluster, path: str, model: str = "m") -> tuple[int, bytes]:
    answer = await cluster.client().post(path, {"model": model, **CHAT})
    return answer.status, answer.body


# On one node


def test_a_raw_model_has_a_name_of_its_own() -> None:
    server = ClusterServer()
    server.register_raw("m", raw, ChatModelOptions(context_window=5), max_concurrency=3)
    with pytest.raises(ValueError, match="already served"):
        server.register_chat("m", chat)
    with pytest.raises(ValueError, match="every route"):
        server.route("/v1/x", "m", own)
    assert (server.list_models(), server.router.catalog.infos()[0].kind) == (["m"], "any")
    assert server.unregister_model("m")


@pytest.mark.parametrize("register", ["register_raw", "register_chat"])
def test_a_model_that_cannot_be_leaves_no_trace(register: str) -> None:
    server = ClusterServer()
    with pytest.raises(TypeError):
        getattr(server, register)("m", "no function")
    with pytest.raises(TypeError):
        server.route("/v1/x", "m", "no function")  # type: ignore[type-var]
    assert server.list_models() == []


def test_a_route_is_a_model_or_joins_one() -> None:
    server = ClusterServer()
    server.route("/v1/x", "alone", own)
    server.register_chat("m", chat)

    @server.route("/v1/x", "m")
    async def decorated(request: CustomRequest) -> str:
        return ""

    assert decorated.__name__ == "decorated"
    kinds = {info.name: (info.kind, info.extra_endpoints) for info in server.router.catalog.infos()}
    assert kinds == {"alone": ("custom", ("/v1/x",)), "m": ("chat", ("/v1/x",))}
    with pytest.raises(ValueError, match="already"):
        server.route("/v1/x", "m", own)


def test_what_a_model_answers_beside_its_kind_goes_with_it() -> None:
    server = ClusterServer()
    server.register_chat("m", chat)
    server.route("/v1/x", "m", own)
    assert server.router.catalog.answers("/v1/x")
    server.unregister_model("m")
    assert not server.router.catalog.answers("/v1/x")
    server.register_chat("m", chat)
    assert server.router.catalog.infos()[0].extra_endpoints == ()


def test_making_and_changing_images_may_be_one_model_and_nothing_else_may() -> None:
    server = ClusterServer()
    server.register_image_edit("m", chat)
    server.register_image_generation("m", chat)
    assert server.router.catalog.infos()[0].extra_endpoints == ("image_generation",)
    with pytest.raises(ValueError, match="already served"):
        server.register_chat("m", chat)
    with pytest.raises(ValueError, match="already served"):
        server.register_image_edit("m", chat)


# On a worker


async def test_an_endpoint_that_a_running_worker_adds_is_known_to_its_master_at_once(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    server = node("w1")
    server.register_chat("m", chat)
    await cluster.start_worker(server)
    assert (await ask(cluster, "/v1/x"))[0] == 404
    server.route("/v1/x", "m", own)
    await trio.sleep(1)
    assert await ask(cluster, "/v1/x") == (200, b'{"own":"/v1/x"}')
    assert (await ask(cluster, "/v1/chat/completions"))[0] == 200
    entry = (await cluster.client().get("/v1/models/m")).json()
    assert (entry["kind"], entry["owned_by"]) == ("chat", "trio-cluster")
    (replica,) = cluster.master.server.worker_manager.workers.values()  # type: ignore[union-attr]
    assert replica.models["m"].extra_endpoints == ("/v1/x",)


async def test_it_knows_it_after_the_link_was_lost_too(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    server = node("w1")
    server.register_chat("m", chat)
    server.route("/v1/x", "m", own)
    await cluster.start_worker(server)
    cluster.workers["w1"].link.reset()
    server.route("/v1/y", "m", own)
    await trio.sleep(60)
    for path in ("/v1/x", "/v1/y"):
        assert (await ask(cluster, path))[0] == 200


async def test_a_route_is_asked_of_those_replicas_that_answer_it(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    for name in ("w1", "w2", "w3"):
        server = node(name)

        async def who(request: CustomRequest, name: str = name) -> dict[str, str]:
            return {"who": name}

        server.register_chat("m", chat)
        if name != "w2":
            server.route("/v1/who", "m", who)
        await cluster.start_worker(server)
    asked = [await ask(cluster, "/v1/who") for _ in range(6)]
    assert {body for _, body in asked} == {b'{"who":"w1"}', b'{"who":"w3"}'}
    for name in ("w1", "w3"):
        cluster.workers[name].stop()
        await cluster.workers[name].over.wait()
    # No replica is left that answers it, although the model is there.
    assert (await ask(cluster, "/v1/who"))[0] == 503
    assert (await ask(cluster, "/v1/chat/completions"))[0] == 200
    await trio.sleep(121)
    assert (await ask(cluster, "/v1/who"))[0] == 404


async def test_what_an_engine_answered_beside_a_handler_is_unavailable_while_the_engine_is_away(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    first, second = node("w1"), node("w2")
    first.register_chat("m", chat)
    second.register_raw("m", raw)
    await cluster.start_worker(first)
    await cluster.start_worker(second)
    paths = ("/v1/embeddings", "/v1/tokenize")
    for path in paths:
        assert (await ask(cluster, path))[0] == 200
    cluster.workers["w2"].kill()
    await trio.sleep(1)
    for path in paths:
        answer = await cluster.client().post(path, {"model": "m", "unusual": True})
        assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
        assert "retry-after" in answer.headers
    assert (await ask(cluster, "/v1/chat/completions"))[0] == 200
    again = node("w2")
    again.register_raw("m", raw)
    await cluster.start_worker(again)
    for path in paths:
        assert (await ask(cluster, path))[0] == 200
    assert not cluster.master.server.router.catalog.absent
    again.unregister_model("m")
    await trio.sleep(121)
    assert (await ask(cluster, "/v1/embeddings"))[0] == 400
    assert (await ask(cluster, "/v1/tokenize"))[0] == 404


async def test_a_raw_model_answers_every_route_of_the_api_and_others(cluster: SimulatedCluster) -> None:
    server = node("w1")
    server.register_raw("m", raw)
    await cluster.start_worker(server)
    for path, endpoint in [
        ("/v1/chat/completions", "chat.completions"),
        ("/embeddings", "embeddings"),
        ("/v1/tokenize", "/v1/tokenize"),
        ("/tokenize", "/v1/tokenize"),
        ("/v1/messages", "messages"),
    ]:
        assert await ask(cluster, path) == (200, endpoint.encode())
    # What it is asked is its own business, but the model must be named.
    answer = await cluster.client().post("/v1/tokenize", {"no": "model"})
    assert answer.status == 400
    assert answer.error["param"] == "model"


async def test_a_raw_model_is_a_replica_of_one_of_another_kind_where_both_answer(
    cluster: SimulatedCluster, autojump_clock: MockClock
) -> None:
    first, second = node("w1"), node("w2")
    first.register_chat("m", chat)
    second.register_raw("m", raw)
    await cluster.start_worker(first)
    await cluster.start_worker(second)
    await trio.sleep(1)
    client = second.worker_client
    assert client is not None
    assert client.rejected_models == {}
    answers = [(await ask(cluster, "/v1/chat/completions"))[1] for _ in range(4)]
    assert sum(answer == b"chat.completions" for answer in answers) == 2
    assert await ask(cluster, "/v1/embeddings") == (200, b"embeddings")


async def test_options_that_change_change_whose_the_models_are() -> None:
    server = ClusterServer()
    server.register_raw("m", raw)
    server.options = worker("w", owner="somebody else").options
    assert server.router.catalog.infos()[0].owner == "somebody else"


@pytest.mark.parametrize(
    "kind",
    ["chat", "embedding", "asr", "tts", "image_generation", "image_edit", "rerank", "moderation"],
)
def test_a_decorator_without_parentheses_is_an_error_at_once(kind: str) -> None:
    server = ClusterServer()

    def mine(request: Any) -> str:
        return ""

    with pytest.raises(TypeError, match=rf"write @server\.{kind}\('mine'\) above mine"):
        getattr(server, kind)(mine)
    with pytest.raises(TypeError, match=r"write @server\.route\("):
        server.route("/v1/x", mine)  # type: ignore[arg-type]
    assert server.list_models() == []
