"""The routes: models, health, metrics and status, and what wrong paths and methods get."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import attrs
import msgspec
import pytest
from http_node import CHAT, PLAIN, WORKER, HttpNode, open_http_node
from prometheus_client.parser import text_string_to_metric_families

from trio_cluster.admin.views import status_view
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.principal import Principal
from trio_cluster.core.status import NodeStatus, SlotStatus
from trio_cluster.errors import HandlerFailed
from trio_cluster.gateway import parse
from trio_cluster.gateway.node_context import GaugeSample, NodeContext
from trio_cluster.openai import ENDPOINTS, Endpoint, peek_model
from trio_cluster.options import ClusterServerOptions
from trio_cluster.routing.router import Router

PATH = "/v1/chat/completions"


async def test_a_node_is_ready_if_a_model_could_be_asked(node: HttpNode) -> None:
    async with node.client() as client:

        async def ask(path: str) -> tuple[int, dict[str, Any]]:
            response = await client.get(path)
            return response.status_code, response.json()

        assert await ask("/ready?model=other") == (503, {"status": "no_model", "model": "other"})
        node.router.catalog.remove("m", node.backend)
        assert await ask("/ready") == (503, {"status": "no_model", "model": None})
        assert (await client.get("/health")).status_code == 200
        response = await client.get("/v1/models/m")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
        assert response.headers["retry-after"] == "3"
        response = await node.post({"not": "checked", "model": "m"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
        node.add("m")
        assert await ask("/ready") == (200, {"status": "ready", "model": None})
        assert await ask("/ready?model=m") == (200, {"status": "ready", "model": "m"})
        node.backend.health.stall("blocked")
        assert await ask("/ready?model=m") == (503, {"status": "no_model", "model": "m"})
        node.backend.health.stall("")
        node.router.drain("stopping")
        assert await ask("/ready") == (503, {"status": "draining", "model": None})


@pytest.mark.parametrize("prefix", ["/v1", ""])
@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.name)
async def test_every_endpoint_has_a_route_with_and_without_the_prefix(
    node: HttpNode, prefix: str, endpoint: Endpoint
) -> None:
    path = prefix + endpoint.path
    async with node.client() as client:
        response = await client.post(path, content=b"{}")
        assert response.status_code in (400, 415), response.text
        response = await client.get(path)
        assert (response.status_code, "POST" in response.headers["allow"]) == (405, True)
        assert path in response.json()["error"]["message"]


async def test_a_base_url_that_ends_with_a_slash_is_no_mistake(node: HttpNode) -> None:
    async with node.connect() as wire:
        for path in ("//v1/chat/completions", "///chat/completions/"):
            await wire.request("POST", path, json.dumps(CHAT).encode())
            answer = await wire.answer()
            assert (answer.status, answer.body) == (200, PLAIN)
        await wire.request("GET", "//health")
        assert (await wire.answer()).status == 200


async def test_a_model_for_every_route_does_not_get_what_the_node_answers_itself(node: HttpNode) -> None:
    node.add("raw", kind="any")
    body = b'{"model": "raw"}'
    async with node.connect() as wire:
        for path in ("/health", "/v1/models", "/v1/models/raw", "/models", "/cluster/status", "/"):
            await wire.request("POST", path, body)
            answer = await wire.answer()
            assert (answer.status, "GET" in answer.headers["allow"]) == (405, True), path
        await wire.request("POST", "/v1/tokenize", body)
        assert (await wire.answer()).status == 200


async def test_a_model_for_every_route_does_not_make_other_paths_exist(node: HttpNode) -> None:
    node.add("raw", kind="any")
    async with node.connect() as wire:
        for method, path, model, status in (
            ("GET", "/api/tags", None, 404),
            ("DELETE", "/v1/tokenize", None, 404),
            ("POST", "/v1/chat/completion", "m", 404),
            ("POST", "/v1/tokenize", "m", 404),
            ("POST", "/v1/tokenize", "raw", 200),
        ):
            await wire.request(method, path, b"" if model is None else b'{"model": "%b"}' % model.encode())
            assert (await wire.answer()).status == status, path


async def test_a_body_is_looked_into_beforehand_only_while_a_model_wants_it_untouched(
    node: HttpNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0

    def peek(body: bytes, content_type: str) -> str | None:
        nonlocal looked_at
        looked_at += 1
        return peek_model(body, content_type)

    monkeypatch.setattr(parse, "peek_model", peek)
    node.add("other")
    assert (await node.post()).status_code == 200
    assert looked_at == 0
    node.add("raw", kind="any")
    # Of no kind that is known here, which the model itself has to judge.
    assert (await node.post({"model": "raw", "messages": 7})).status_code == 200
    assert (await node.post()).status_code == 200
    assert looked_at == 2
    assert (await node.post({"model": "m", "messages": 7})).status_code == 400


async def test_models_are_listed_with_everything_that_is_known_of_them(node: HttpNode) -> None:
    node.add("org/model", supports_vision=True, context_window=4096, extra_fields={"quant": "q4"})
    async with node.client() as client:
        for prefix in ("/v1", ""):
            listed = (await client.get(f"{prefix}/models")).json()
            assert listed["object"] == "list"
            first, second = listed["data"]
            assert (first["id"], first["object"], first["owned_by"]) == ("m", "model", "trio-cluster")
            assert second["capabilities"] == {"vision": True}
            assert (second["context_window"], second["quant"]) == (4096, "q4")


async def test_chat_models_are_listed_first_and_a_kind_can_be_asked_for(node: HttpNode) -> None:
    for name, kind in [("a-rank", "rerank"), ("b-any", "any"), ("z-chat", "chat"), ("c-emb", "embedding")]:
        node.add(name, kind=kind)  # type: ignore[arg-type]
    node.router.catalog.add(
        ModelInfo("d-draw", "image_generation", extra_endpoints=("image_edit", "/v1/draw")), node.backend
    )
    async with node.client() as client:

        async def names(query: str) -> list[str]:
            response = await client.get(f"/v1/models{query}")
            assert response.status_code == 200
            return [entry["id"] for entry in response.json()["data"]]

        assert await names("") == ["m", "z-chat", "b-any", "a-rank", "c-emb", "d-draw"]
        assert await names("?kind=chat") == ["m", "z-chat", "b-any"]
        assert await names("?kind=image_edit") == ["b-any", "d-draw"]
        assert await names("?kind=any") == ["b-any"]
        assert await names("?kind=custom") == []
        for wrong in ("chats", "", "/v1/draw"):
            response = await client.get("/v1/models", params={"kind": wrong})
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, "kind", "invalid_value")
            assert "chat, embedding, asr" in error["message"]


async def test_the_list_says_what_models_take_and_give_where_it_is_known(node: HttpNode) -> None:
    node.add("eyes", supports_vision=True, max_output_tokens=99)
    node.add("ears", kind="asr")
    node.add("any", kind="any")
    node.router.catalog.add(
        ModelInfo("draw", "image_generation", extra_endpoints=("image_edit",)), node.backend
    )
    async with node.client() as client:
        entries = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
    assert entries["m"]["modalities"] == {"input": ["text"], "output": ["text"]}
    assert entries["eyes"]["modalities"] == {"input": ["text", "image"], "output": ["text"]}
    assert entries["eyes"]["max_output_tokens"] == 99
    assert "max_output_tokens" not in entries["m"]
    assert entries["ears"]["modalities"] == {"input": ["audio"], "output": ["text"]}
    assert entries["draw"]["modalities"] == {"input": ["text", "image"], "output": ["image"]}
    assert "modalities" not in entries["any"]


@pytest.mark.parametrize("name", ["m", "org/model", "a/b/c", "with space", "h\xe9", "q?x#y", "a%2Fb", "x:1"])
async def test_a_model_is_found_whatever_its_name(node: HttpNode, name: str) -> None:
    if name != "m":
        node.add(name)
    async with node.connect() as wire:
        for quoted in {urllib.parse.quote(name), urllib.parse.quote(name, safe="")}:
            await wire.request("GET", f"/v1/models/{quoted}")
            answer = await wire.answer()
            assert (answer.status, json.loads(answer.body)["id"]) == (200, name)
            await wire.request("GET", f"/models/{quoted}")
            assert (await wire.answer()).status == 200


async def test_an_unknown_model_is_404_and_lists_what_there_is(node: HttpNode) -> None:
    async with node.client() as client:
        response = await client.get("/v1/models/no/body")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert "'no/body'" in error["message"]
    assert error["message"].endswith("m")


async def test_unknown_paths_and_wrong_methods_are_envelopes_and_keep_the_connection(node: HttpNode) -> None:
    async with node.connect() as wire:
        for method, path, status, allow in (
            ("GET", "/v2/models", 404, None),
            ("POST", "/v1/chat/completion", 404, None),
            ("GET", PATH, 405, {"POST", "OPTIONS"}),
            ("DELETE", "/v1/models/m", 405, {"GET", "HEAD", "OPTIONS"}),
            ("POST", "/health", 405, {"GET", "HEAD", "OPTIONS"}),
            ("PROPFIND", "/health", 405, {"GET", "HEAD", "OPTIONS"}),
        ):
            await wire.request(method, path, b"{}" if method == "POST" else None)
            answer = await wire.answer()
            assert answer.status == status, path
            assert answer.error["type"] == "invalid_request_error"
            allowed = answer.headers.get("allow")
            assert (set(allowed.split(", ")) if allowed else None) == allow
        await wire.request("GET", "/health")
        assert (await wire.answer()).status == 200


async def test_a_trailing_slash_is_served_and_not_redirected(node: HttpNode) -> None:
    async with node.client() as client:
        response = await client.post(PATH + "/", json=CHAT)
        assert (response.status_code, response.content) == (200, PLAIN)


async def test_head_and_options_are_answered_without_a_body(node: HttpNode) -> None:
    async with node.connect() as wire:
        for path in ("/v1/models", "/health", "/v1/models/m"):
            await wire.request("HEAD", path)
            answer = await wire.answer(bodiless=True)
            assert answer.status == 200
            assert int(answer.headers["content-length"]) > 0
        await wire.request("OPTIONS", PATH)
        answer = await wire.answer()
        assert (answer.status, answer.body) == (200, b"")
        assert set(answer.headers["allow"].split(", ")) == {"POST", "OPTIONS"}


async def test_health_tells_whether_the_node_takes_requests(node: HttpNode) -> None:
    async with node.client() as client:
        response = await client.get("/health")
        assert (response.status_code, response.json()) == (200, {"status": "ok", "mode": "standalone"})
        node.router.drain("closing")
        response = await client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "draining")


async def test_the_status_shows_models_calls_and_what_the_node_adds() -> None:
    async with open_http_node(api_key="secret") as node, node.client() as client:
        node.node_context.status = lambda: NodeStatus(workers=[WORKER])
        key = {"Authorization": "Bearer secret"}
        assert (await client.get("/cluster/status")).status_code == 401
        await client.post(PATH, json=CHAT, headers=key)
        status = (await client.get("/cluster/status", headers=key)).json()
        assert (status["node_id"], status["mode"], status["draining"]) == ("node-1", "standalone", False)
        assert status["uptime"] >= 0
        assert status["models"][0]["id"] == "m"
        assert status["models"][0]["nodes"] == ["local"]
        assert status["calls"]["completed"] == 1
        assert status["calls"]["in_flight"] == 0
        assert status["workers"] == [msgspec.to_builtins(WORKER)]
        # What only a worker has is left out.
        assert "connected" not in status


async def test_a_status_that_fails_is_a_500_and_nothing_more(
    node: HttpNode, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> dict[str, object]:
        raise ValueError("a bug")

    node.node_context.status = broken
    async with node.client() as client:
        assert (await client.get("/cluster/status")).status_code == 500
        assert (await client.get("/health")).status_code == 200
    assert len(caplog.records) == 1


async def scrape(node: HttpNode) -> dict[str, float]:
    async with node.client() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        sample.name
        + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_the_metrics_are_the_counters(node: HttpNode) -> None:
    node.add("vectors", "embedding")
    node.add("other")
    await node.post()
    node.backend.script = lambda served: served.fail(HandlerFailed())
    await node.post()
    node.backend.script = None
    async with node.connect() as wire:
        await wire.request("POST", PATH, json.dumps(CHAT).encode())
        for _ in range(3):
            served = await node.backend.next()
        numbers = await scrape(node)
    assert numbers["trio_cluster_calls_admitted_total"] == 3
    assert numbers["trio_cluster_calls_ended_total{outcome=completed}"] == 1
    assert numbers["trio_cluster_calls_ended_total{outcome=failed}"] == 1
    for outcome in ("cancelled", "timed_out", "worker_lost"):
        assert numbers[f"trio_cluster_calls_ended_total{{outcome={outcome}}}"] == 0
    assert numbers["trio_cluster_calls_retried_total"] == 0
    assert numbers["trio_cluster_calls_in_flight"] == 1
    assert numbers["trio_cluster_models{kind=chat}"] == 2
    assert numbers["trio_cluster_models{kind=embedding}"] == 1
    assert numbers["trio_cluster_draining"] == 0
    assert numbers["trio_cluster_cancel_seconds_count"] == 0
    await served.wait_cancelled()
    numbers = await scrape(node)
    assert numbers["trio_cluster_calls_ended_total{outcome=cancelled}"] == 1
    assert numbers["trio_cluster_cancel_seconds_count"] == 1
    assert numbers["trio_cluster_cancel_seconds_sum"] > 0
    buckets = [
        value for name, value in numbers.items() if name.startswith("trio_cluster_cancel_seconds_bucket")
    ]
    assert buckets == sorted(buckets)
    assert numbers["trio_cluster_cancel_seconds_bucket{le=+Inf}"] == 1


async def test_the_metrics_show_what_the_node_adds(node: HttpNode) -> None:
    node.node_context.gauges = lambda: [
        GaugeSample("worker_load", "How busy a worker is.", 0.5, {"worker": "w1"}),
        GaugeSample("worker_load", "How busy a worker is.", 0.25, {"worker": 'w"2\n'}),
        GaugeSample("workers", "Workers that are connected.", 2),
    ]
    numbers = await scrape(node)
    assert numbers["trio_cluster_worker_load{worker=w1}"] == 0.5
    assert numbers['trio_cluster_worker_load{worker=w"2\n}'] == 0.25
    assert numbers["trio_cluster_workers"] == 2


async def test_the_index_shows_what_this_server_is(node: HttpNode) -> None:
    async with node.client() as client:
        index = (await client.get("/")).json()
    assert index["name"] == "trio_cluster"
    assert PATH in index["routes"]


def test_who_waits_is_for_operators_and_a_key_sees_itself() -> None:
    waiting = {"alice": 3, "bob": 1, "": 2}

    def shown(principal: Principal) -> list[dict[str, int]]:
        status = NodeStatus(
            slots=SlotStatus(waiting=6, waiting_by=waiting),
            workers=[attrs.evolve(WORKER, waiting_by=waiting)],
        )
        view = status_view(NodeContext(Router(), ClusterServerOptions(), status=lambda: status), principal)
        return [view.slots.waiting_by, view.workers[0].waiting_by]

    assert shown(Principal("ops", "operator")) == [waiting, waiting]
    assert shown(Principal("alice")) == [{"alice": 3}] * 2
    assert shown(Principal("carol")) == [{}] * 2
    assert shown(Principal()) == [{"": 2}] * 2
