"""What a handler learns of the node on which it runs, and of the key that asks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from trio_cluster import ClusterServer, CustomRequest, RawCall
from trio_cluster.core.principal import Principal
from trio_cluster.gateway.context import RequestContext
from trio_cluster.testing import SimulatedCluster, open_cluster, settle, worker


class Alice:
    """Everyone is Alice."""

    async def authenticate(self, context: RequestContext) -> Principal:
        return Principal("alice")


@pytest.fixture
async def cluster() -> AsyncIterator[SimulatedCluster]:
    async with open_cluster(worker_id="the-master", authenticator=Alice()) as opened:
        yield opened
        await settle(opened)


def tell(request: Any) -> str:
    return f"{request.worker} answers {request.key_name}"


async def tell_route(request: CustomRequest) -> dict[str, Any]:
    return {"told": tell(request), "query": request.query}


async def tell_raw(call: RawCall) -> None:
    call.begin(200, "text/plain")
    await call.send(tell(call).encode())


def serve(server: ClusterServer, name: str) -> None:
    server.register_chat(name, tell)
    server.route("/v1/tell", name, tell_route)
    server.register_raw(f"raw-{name}", tell_raw)


async def test_a_handler_knows_its_worker_and_the_name_of_the_key(cluster: SimulatedCluster) -> None:
    server = worker("gpu-1")
    serve(server, "far")
    serve(cluster.master.server, "near")
    await cluster.start_worker(server)
    client = cluster.client()
    for model, expected in [("far", "gpu-1 answers alice"), ("near", "the-master answers alice")]:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        answer = json.loads((await client.post("/v1/chat/completions", body)).body)
        assert answer["choices"][0]["message"]["content"] == expected
        answer = json.loads((await client.post("/v1/tell?a=1", {"model": model})).body)
        assert answer == {"told": expected, "query": "a=1"}
        raw = await client.post("/v1/chat/completions", body | {"model": f"raw-{model}"})
        assert raw.body.decode() == expected


async def test_each_of_several_prompts_has_them_and_a_client_cannot_set_them(
    cluster: SimulatedCluster,
) -> None:
    cluster.master.server.register_chat("m", tell)
    body = {"model": "m", "prompt": ["a", "b"], "key_name": "bob", "worker": "mine"}
    answer = json.loads((await cluster.client().post("/v1/completions", body)).body)
    assert [choice["text"] for choice in answer["choices"]] == ["the-master answers alice"] * 2
